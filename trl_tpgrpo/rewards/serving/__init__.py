"""Server for reward functions that need another machine or environment.

It needs only Python 3.8, Pillow, Starlette and uvicorn, so that it runs in old environments.
"""
