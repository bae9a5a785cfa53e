"""kernelhub inside other libraries: one module or folder a library, imported by who wants it."""

MAX_ROWS = 16
"""Calls of GEMV with more rows run the library's own code: they are not what it is made for."""
