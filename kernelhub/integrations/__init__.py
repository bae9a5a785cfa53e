"""kernelhub inside other libraries: one module or folder a library, imported by who wants it."""

from torch import Tensor

MAX_ROWS = 16
"""Calls of GEMV with more rows run the library's own code: they are not what it is made for."""


def too_many_rows(x: Tensor, rows: int | None = None) -> str:
    """Why GEMV is not made for x, `[..., K]`; empty where it is. `rows` of x, if not all."""
    if rows is None:
        rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    return f"more than {MAX_ROWS} rows" if rows > MAX_ROWS else ""
