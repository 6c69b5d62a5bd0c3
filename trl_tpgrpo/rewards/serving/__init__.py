"""A server for reward functions, for those that need a machine or an environment of their own.

It needs Python 3.8 and Pillow, and nothing else of this package: what it serves is usually too old to be installed beside
the rest.
"""
