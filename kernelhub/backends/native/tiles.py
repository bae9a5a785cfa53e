"""Which tile of a kernel serves a call: one table by architecture and shape class.

A shape class is a scheme and the sizes of a weight, never the number of rows of x, for a tile also
says in which order a result is summed. `KERNELHUB_TILES` names a file that goes before the shipped
table, as `kernelhub bench --tune` writes it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

GEMV_TILES = ("m16w4", "m16w8", "m32w2", "m32w4", "r8", "r16", "r32")
"""By rows of the weight to a block. `m` runs on the matrix unit with `w` warps, for dense fp16 and bf16
alone. In the order of csrc/common/gemv.muh."""

OPS: dict[str, tuple[str, ...]] = {"fused_gemv": GEMV_TILES, "fused_moe_gemv": GEMV_TILES}

Table = Mapping[str, Mapping[str, str]]
"""From an op to its shape classes, from a class to a tile."""

_SHIPPED = Path(__file__).with_name("tiles.json")
_overrides: list[Table] = []


def shape_class(scheme: str, rows: int, k: int) -> str:
    """The class of a weight `[N, K]`: `"w4a16 n4096 k8192"`, sizes rounded up to powers of two."""
    return f"{scheme} n{_rounded(rows)} k{_rounded(k)}"


def _rounded(size: int) -> int:
    return min(max(1 << (size - 1).bit_length(), 512), 65536) if size > 0 else 512


@lru_cache(maxsize=4096)
def choose(op: str, arch: str, scheme: str, rows: int, k: int) -> int:
    """The tile of a weight `[N, K]`, as a position in `OPS[op]`."""
    name = shape_class(scheme, rows, k)
    for table in (*reversed(_overrides), _given(), table_of(arch)):
        tile = table.get(op, {}).get(name)
        if tile is not None:
            return OPS[op].index(tile)
    return OPS[op].index(default(arch, scheme, rows, k))


def default(arch: str, scheme: str, rows: int, k: int) -> str:
    """The tile of a class that no table has."""
    if scheme == "fp32" or arch in _WITHOUT_MATRIX_UNIT:
        return "r8" if rows <= 4096 else "r16"
    if scheme == "dense":
        return "m32w4" if rows * k >= 2**26 else "m32w2" if k <= 1024 else "m16w4"
    return "m16w8" if rows * k < 2**25 and k > 1024 else "m16w4" if k > 4096 else "m32w2"


_WITHOUT_MATRIX_UNIT = ("mp_21", "mp_22", "warp128", "warp128-asan", "warp128-tsan")
"""Architectures on which the kernels for the matrix unit make do without, slowly."""


@lru_cache(maxsize=64)
def table_of(arch: str) -> Table:
    """The shipped table of an architecture; empty where there is none."""
    shipped = json.loads(_SHIPPED.read_text())
    return checked(shipped.get(arch, {}), f"{_SHIPPED.name}, '{arch}'")


@lru_cache(maxsize=1)
def _given() -> Table:
    path = os.environ.get("KERNELHUB_TILES")
    if not path:
        return {}
    return checked(json.loads(Path(path).read_text())["tiles"], path)


def checked(table: Table, where: str) -> Table:
    """The table; `ValueError` where it names an op or tile that there is not."""
    for op, classes in table.items():
        if op not in OPS:
            raise ValueError(f"{where}: op '{op}' has no tiles; these have: {', '.join(OPS)}")
        for name, tile in classes.items():
            if tile not in OPS[op]:
                known = ", ".join(OPS[op])
                raise ValueError(
                    f"{where}: '{op}', class '{name}': tile '{tile}' is not of {known}"
                )
    return table


@contextmanager
def override(table: Table) -> Iterator[None]:
    """Puts a table before all others in this process, for tuning."""
    _overrides.append(checked(table, "override"))
    choose.cache_clear()
    try:
        yield
    finally:
        _overrides.pop()
        choose.cache_clear()
