"""A server for reward functions, for those that need a machine or an environment of their own.

It needs Python 3.8, Pillow, Starlette and uvicorn, so that it runs where what is served is old.
"""
