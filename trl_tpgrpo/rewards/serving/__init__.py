"""A server for reward functions, for those that need a machine or an environment of their own.

It needs Python 3.8, Pillow, Starlette and uvicorn, and nothing else of this package: what is served is usually too old
to be installed beside the rest.
"""
