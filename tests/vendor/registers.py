"""Registers and spilled bytes of the kernels of CUDA alone, on record in registers.json.

`python -m tests.vendor.registers` records them anew; takes two minutes.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path

RECORDED_WITH = "release 13.0"
_RECORD = Path(__file__).with_name("registers.json")
_CSRC = Path(__file__).parents[2] / "csrc"
_KERNEL = re.compile(
    r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers", re.DOTALL
)
_STREAM = re.compile(r"Format\w*?(half|bf16)_t.*?SchemeE(\d)ELi(\d)ELb(\d)EEELi(\d)E")
_WHOLE = re.compile(r"gemv_whole_kernelI\w*?(half|bf16)_tELi(\d+)ELi(\d+)ELi(\d+)E\w*?KindE(\d)E")
_WHOLE_INT4 = re.compile(r"gemv_whole_int4_kernelI\w*?(half|bf16)_tELb(\d)ELi(\d+)ELi(\d+)EE")
_HELD = re.compile(r"held_kernelILi(\d+)EL\w*?WayE(\d)E")


def read(report: str) -> dict[str, list[int]]:
    """`[registers, spilled bytes]` by kernel, from what ptxas says."""
    return {_kind_of(name): [int(u), int(s)] for name, s, u in _KERNEL.findall(report)}


def _kind_of(name: str) -> str:
    """A kernel's parameters in words."""
    if whole := _WHOLE.search(name):
        dtype, warps, units, columns, index = whole.groups()
        kind = ("whole", "whole long", "whole experts")[int(index)]
        return f"{kind} {dtype}, {warps} warps, {units} units, {columns} x 8 columns"
    if whole := _WHOLE_INT4.search(name):
        dtype, zeros, columns, depth = whole.groups()
        kind = "int4 with zeros" if zeros == "1" else "int4"
        return f"whole {kind} {dtype}, {columns} x 8 columns, {depth} units ahead"
    if held := _HELD.search(name):
        vectors, way = held.groups()
        return f"held, {vectors} vectors" + ("", ", in steps", ", summed in steps")[int(way)]
    parts = _STREAM.search(name)
    assert parts is not None, name
    dtype, scheme, tiles, plain, columns = parts.groups()
    kind = ("fp8", "int4")[int(scheme)]
    general = "" if plain == "1" else " general"
    return f"{kind}{general} {dtype}, {tiles} x 16 rows, {columns} x 8 columns"


def record() -> dict[str, dict[str, list[int]]]:
    kept: dict[str, dict[str, list[int]]] = json.loads(_RECORD.read_text())
    return kept


def main() -> None:
    kept = {}
    for source in sorted(_CSRC.glob("cuda/*.cu")):
        with tempfile.TemporaryDirectory() as folder:
            command = ["nvcc", "-x", "cu", "-std=c++17", "-O3", "-arch=sm_90a", "-Xptxas", "-v"]
            includes = [f"-I{_CSRC / part}" for part in ("vendor/cuda", "common", "include")]
            command += [*includes, "-c", str(source), "-o", f"{folder}/kernel.o"]
            run = subprocess.run(command, capture_output=True, text=True, check=True)
        if found := read(run.stderr):
            kept[source.name] = found
    lines = json.dumps(kept, indent=1).replace("[\n   ", "[").replace(",\n   ", ", ")
    _RECORD.write_text(lines.replace("\n  ]", "]") + "\n")


if __name__ == "__main__":
    main()
