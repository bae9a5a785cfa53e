"""Which tile of a kernel serves a call: one table by architecture and shape class.

A shape class is a scheme and the sizes of a weight, never the number of rows of x, for a tile also
says in which order a result is summed. `KERNELHUB_TILES` names a file that goes before the shipped
table, as `kernelhub bench --tune` writes it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from kernelhub import registry
from kernelhub.contracts._weights import FP8, PACKED
from kernelhub.errors import PolicyError, nearest
from kernelhub.spec import Args

VARIABLE = "KERNELHUB_TILES"

_PORTABLE_TILES = ("m16w4", "m16w8", "m32w2", "m32w4", "m64w2", "r8", "r16")
_CUDA_TILES = (
    *("s2x4c2", "s2x8c2", "s4x1c1", "s4x2c1", "s4x2c2", "s4x2c4"),
    *("s4x4c2", "s4x4c4", "s8x2c1", "s8x2c4", "d4x2c1", "d4x2c2", "whole"),
)
GEMV_TILES = (*_PORTABLE_TILES, *_CUDA_TILES)
"""In the order of csrc/common/gemv.muh and csrc/cuda/gemv_stream.cu. The portable ones by rows of
the weight to a block: `m` runs on the matrix unit, with `w` warps; `r` does without and takes fp32
too. CUDA's own, for compute capability 9.0 and 10.x, by warps along rows, warps along K and blocks
of a cluster: `s`, of fp8 and int4, with one tile of 16 rows to a warp, `d`, of int4, with two;
`whole`, of 16-bit weights and of int4 ones without experts, has whole rows in a block. What they do
not serve (another K, alignment, group size or dtype of x) runs on the portable tile that `portable`
names."""

OPS: dict[str, tuple[str, ...]] = {"fused_gemv": GEMV_TILES, "fused_moe_gemv": GEMV_TILES}

Table = Mapping[str, Mapping[str, str]]
"""From an op to its shape classes, from a class to a tile."""

_SCHEMES = {
    torch.float32: "fp32",
    torch.float16: "dense",
    torch.bfloat16: "dense",
    FP8: "fp8",
    **dict.fromkeys(PACKED, "int4"),
}
_CLASS = re.compile(rf"({'|'.join(dict.fromkeys(_SCHEMES.values()))}) n([0-9]+) k([0-9]+)")
_SMALLEST, _LARGEST = 2**9, 2**16  # sizes of a class
_MEASURED = "measured"  # stands beside the ops in a file that --tune wrote

_SHIPPED = Path(__file__).with_name("tiles.json")
_overrides: list[Table] = []


def scheme(weight_dtype: torch.dtype) -> str:
    return _SCHEMES[weight_dtype]


def shape_class(scheme: str, rows: int, k: int) -> str:
    """The class of a weight `[N, K]`: `"int4 n4096 k8192"`, sizes rounded up to powers of two."""
    return f"{scheme} n{_rounded(rows)} k{_rounded(k)}"


def _rounded(size: int) -> int:
    power: int = 1 << max(size - 1, 0).bit_length()
    return min(max(power, _SMALLEST), _LARGEST)


def fits(name: str, tile: str) -> bool:
    """Whether a tile serves a class: no fp32 on the matrix unit; CUDA's own as said above."""
    only = {"s": ("fp8", "int4"), "d": ("int4",), "w": ("dense", "int4")}.get(tile[0], ("",))
    return name.startswith(only) and not (name.startswith("fp32") and tile[0] == "m")


def tiles_for(name: str, arch: str) -> tuple[str, ...]:
    """The tiles that serve a class on an architecture."""
    kinds = "r" if arch.startswith(_WITHOUT_MATRIX_UNIT) else "mr"
    kinds += "sdw" if arch.startswith(_WITH_STREAMS) else ""
    return tuple(t for t in GEMV_TILES if t[0] in kinds and fits(name, t))


def classes_of(op: str, call: Args) -> str:
    """The shape class of a call of an op that has tiles; its tensors may be described."""
    return shape_class(scheme(call.weight.dtype), call.weight.shape[-2], call.x.shape[-1])


@lru_cache(maxsize=4096)
def choose(op: str, arch: str, scheme: str, rows: int, k: int) -> int:
    """The tile of a weight `[N, K]`, as a position in `OPS[op]`.

    Beside one of CUDA's own there is, times 256, the position of the portable one for what it does
    not serve.

    Raises `PolicyError` where a table asks for a tile that the architecture cannot run.
    """
    name = shape_class(scheme, rows, k)
    for table in (*reversed(_overrides), _from_environment(), table_of(arch)):
        tile = table.get(op, {}).get(name)
        if tile is not None:
            if tile not in tiles_for(name, arch):
                raise PolicyError(
                    f"{op}, {name}: tile '{tile}' is not for {arch}; "
                    f"{nearest(tile, tiles_for(name, arch))}"
                )
            break
    else:
        tile = default(op, arch, scheme, rows, k)
    position = OPS[op].index(tile)
    if tile in _CUDA_TILES:
        position += OPS[op].index(portable(op, arch, scheme, rows, k)) << 8
    return position


def default(op: str, arch: str, scheme: str, rows: int, k: int) -> str:
    """The tile of a class that no table has: what was best for its like on an H200."""
    tile = _default_stream(op, scheme, rows, k) if arch == _TUNED else None
    return tile or portable(op, arch, scheme, rows, k)


def portable(op: str, arch: str, scheme: str, rows: int, k: int) -> str:
    """The same among the tiles that every platform has."""
    if scheme == "fp32" or arch.startswith(_WITHOUT_MATRIX_UNIT):
        return "r8" if rows <= 4096 else "r16"
    if op == "fused_moe_gemv" or k <= 1024:
        return "m64w2" if scheme == "int4" else "m32w2"
    if rows * k < 2**25:
        return "m32w4" if scheme == "int4" and rows > 2048 else "m16w8"
    if k <= 4096:
        return "m64w2" if scheme == "dense" else "m32w2"
    return "m32w4" if scheme == "dense" else "m64w2"


def _default_stream(op: str, scheme: str, rows: int, k: int) -> str | None:
    """Of CUDA's own; None where a portable one is as good."""
    if scheme == "fp32":
        return None
    if op == "fused_moe_gemv":
        if scheme == "dense":
            return "whole" if 256 < k <= 4096 else None
        if k > 8192:
            return "s4x2c4"
        if scheme == "int4":
            return "d4x2c2" if k > 2048 else "d4x2c1"
        if k > 2048:
            return "s4x2c2"
        return "s4x2c1" if k > 1024 else "s4x1c1"
    if scheme == "dense" or (scheme == "int4" and 1024 < k <= 4096 < rows):
        return "whole"
    if k > 8192:
        return "s4x4c4" if rows <= 4096 and scheme != "int4" else "s4x2c4"
    if k > 4096:
        if scheme == "int4":
            return "s2x4c2"
        if rows <= 4096:
            return "s2x8c2"
        return "s8x2c4"
    if rows > 4096 and (k > 2048 or rows <= 8192):
        return "s4x2c2" if scheme == "int4" else "s8x2c4"
    if k > 2048:
        return "s4x2c2"
    return "s2x4c2" if rows <= 2048 else "s4x2c2"


_WITHOUT_MATRIX_UNIT = ("mp_21", "mp_22", "warp128")
_WITH_STREAMS = ("sm_90", "sm_100", "sm_103")
"""How architectures begin that have no matrix unit, and those that run CUDA's own kernels."""
_TUNED = "sm_90a"


# ---- tables ----------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def table_of(arch: str) -> Table:
    """The shipped table of an architecture; empty where there is none."""
    return checked(json.loads(_SHIPPED.read_text()).get(arch, {}), f"{_SHIPPED.name}, {arch}")


@lru_cache(maxsize=1)
def _from_environment() -> Table:
    path = os.environ.get(VARIABLE, "").strip()
    return read(path) if path else {}


def read(path: str) -> Table:
    """The table of a file. Raises `PolicyError` where there is none or something in it is not."""
    try:
        found = json.loads(Path(path).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise PolicyError(f"{VARIABLE}: {path} cannot be read: {error}") from error
    if isinstance(found, dict):
        found.pop(_MEASURED, None)
    return checked(found, f"{VARIABLE}: {path}")


def checked(table: Any, where: str) -> Table:
    """The table. Raises `PolicyError` where it names an op, class or tile that there is not."""
    for op, classes in _mapping(table, where).items():
        if op not in OPS:
            raise PolicyError(f"{where}: op '{op}' has no tiles; {nearest(op, OPS)}")
        for name, tile in _mapping(classes, f"{where}: {op}").items():
            if not _is_class(name):
                wanted = f"'{_CLASS.pattern}', sizes powers of two, {_SMALLEST} to {_LARGEST}"
                raise PolicyError(f"{where}: {op}: '{name}' is no shape class: expected {wanted}")
            if tile not in OPS[op]:
                known = nearest(str(tile), OPS[op])
                raise PolicyError(f"{where}: {op}, {name}: there is no tile '{tile}'; {known}")
            if not fits(name, tile):
                raise PolicyError(f"{where}: {op}, {name}: tile '{tile}' is not for it")
    return table  # type: ignore[no-any-return]


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise PolicyError(f"{where}: expected an object, got {type(value).__name__}")
    return value


def _is_class(name: str) -> bool:
    found = _CLASS.fullmatch(name) if len(name) < 64 else None
    return found is not None and shape_class(found[1], int(found[2]), int(found[3])) == name


@contextmanager
def override(table: Table) -> Iterator[None]:
    """Puts a table before all others in this process, for tuning. Does not reach plans."""
    _overrides.append(checked(table, "override"))
    _forget()
    try:
        yield
    finally:
        _overrides.pop()
        _forget()


def _forget() -> None:
    """Drop every tile chosen so far, those in prepared calls too."""
    choose.cache_clear()
    with registry.lock:
        registry.notify()
