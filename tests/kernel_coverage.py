"""Which lines of the portable kernels the ops' own cases execute, on the emulator at both widths.

Cases are calls that are right, so each launcher is also made to refuse some that no caller makes.

python -m tests.kernel_coverage [CASE-PATTERN]

Exits with 1 where less than 95 % of the lines of any one file, or of all, are ever executed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import attrs
import torch

from kernelhub import registry
from kernelhub.backend import Backend
from kernelhub.backends.native import abi, cache
from kernelhub.backends.native.compiling import Recipe
from kernelhub.backends.native.kernels import Kernels, Launchers
from kernelhub.backends.native.library import Library
from kernelhub.backends.native.platform import SIMT, csrc
from kernelhub.errors import KernelError
from tests.vendor import run_cases

NEEDED = 0.95
WIDTHS = ("warp32", "warp128")

PLATFORM = attrs.evolve(
    SIMT,
    compile_flags=lambda compiler, arch: (
        *(flag for flag in SIMT.compile_flags(compiler, arch) if not flag.startswith("-O")),
        *("-O0", "--coverage"),
    ),
    link_flags=lambda compiler, arch: (*SIMT.link_flags(compiler, arch), "--coverage"),
)


def judged_files() -> list[Path]:
    return sorted([*csrc().glob("musa/*.mu"), *csrc().glob("common/*.muh")])


def run(folder: Path, arch: str, pattern: str) -> int:
    """Run the cases in this process, whose end writes what was executed into `folder`."""
    kernels = Kernels(PLATFORM, "cpu", lambda device: arch, lambda index: 0)
    kernels._libraries[arch] = Library(folder / cache.LIBRARY, PLATFORM.name)
    made = kernels.implementations()
    registry.add_backend(Backend("coverage", made, device_types=("cpu",), automatic=False))
    for op in abi.OPS:
        refuse(kernels, op)
    return run_cases.main("coverage", "cpu", pattern)


def refuse(kernels: Kernels, op: str) -> None:
    """Call a launcher with tensors of a type that no op computes in, all there or one absent."""
    wrong = torch.zeros(1, dtype=torch.int64)
    values = [wrong if field.kind == "tensor" else 0 for field in abi.OPS[op]]
    for absent in range(-1, len(values)):
        given = [None if i == absent and v is wrong else v for i, v in enumerate(values)]
        try:
            Launchers(kernels, op)[wrong.device](*given)
        except KernelError:
            continue
        raise SystemExit(f"{op}: the launcher takes int64 tensors for all arguments")


def executed_lines(folder: Path) -> Iterator[tuple[Path, int, bool]]:
    """File, line, and whether it was executed; a line comes again for each unit and template."""
    counts = sorted(path.name for path in folder.glob("*.gcda"))
    assert counts, "the library wrote no counts"
    command = ["gcov", "--json-format", "--stdout", *counts]
    said = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout
    for report in map(json.loads, said.splitlines()):
        for file in report["files"]:
            for line in file["lines"]:
                yield Path(file["file"]), line["line_number"], line["count"] > 0


def share(lines: dict[int, bool]) -> float:
    return sum(lines.values()) / len(lines) if lines else 1.0


def main(pattern: str = "*") -> int:
    found: dict[Path, dict[int, bool]] = {path: {} for path in judged_files()}
    for arch in WIDTHS:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            Recipe(PLATFORM, arch, PLATFORM.find_compiler()).make(folder, folder / "log")
            child = [sys.executable, "-m", "tests.kernel_coverage", "--run", name, arch, pattern]
            if subprocess.run(child).returncode != 0:
                return 1
            for path, number, executed in executed_lines(folder):
                if path in found:
                    found[path][number] = executed or found[path].get(number, False)
    low = False
    for path, lines in found.items():
        missed = [number for number, executed in sorted(lines.items()) if not executed]
        print(f"{share(lines):7.1%} of {len(lines):4} lines  {path.relative_to(csrc())}")
        if missed:
            print(f"         never executed: {', '.join(map(str, missed))}")
        low |= share(lines) < NEEDED
    total = {(path, n): executed for path, lines in found.items() for n, executed in lines.items()}
    print(f"{sum(total.values()) / len(total):7.1%} in all; {NEEDED:.0%} are needed of each")
    return 1 if low else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        sys.exit(run(Path(sys.argv[2]), *sys.argv[3:]))
    sys.exit(main(*sys.argv[1:]))
