"""The tests of the kernels are tested: every planted fault is caught by the op's own cases.

A mutant is compiled for the emulator with checks of alignment, which the processor here forgives
and a GPU does not, and run in a child process, for some mutants crash.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import attrs
import pytest

from kernelhub import registry
from kernelhub.backend import Backend
from kernelhub.backends.native import abi, build
from kernelhub.backends.native.kernels import Kernels
from kernelhub.backends.native.platform import SIMT, Platform, csrc
from kernelhub.testing import run_case
from tests.mutants import (
    Mutant,
    fused_gemv,
    fused_moe_gemv,
    fused_mul_add,
    rotary_embedding,
    top_k_top_p_sampling_from_probs,
)

MUTANTS = [
    (module.__name__.rpartition(".")[2], mutant)
    for module in (
        fused_gemv,
        fused_moe_gemv,
        fused_mul_add,
        rotary_embedding,
        top_k_top_p_sampling_from_probs,
    )
    for mutant in module.KERNEL_MUTANTS
]
_IDS = [f"{op}-{mutant.name}-{mutant.arch}" for op, mutant in MUTANTS]


def mutated(mutant: Mutant, root: Path) -> Platform:
    """The emulator's platform over a copy of the sources with the fault in it."""
    copy = root / "csrc"
    shutil.copytree(csrc(), copy)
    path = copy / mutant.module
    source = path.read_text()
    assert source.count(mutant.old) == 1, f"found {source.count(mutant.old)} times"
    path.write_text(source.replace(mutant.old, mutant.new))
    return moved(SIMT, copy)


def moved(platform: Platform, to: Path) -> Platform:
    """A platform over another copy of `csrc`, compiled quickly and with alignment checked."""

    def there(path: Path) -> Path:
        return to / path.relative_to(csrc())

    quick = ("-O1", "-fsanitize=alignment", "-fno-sanitize-recover=all")
    return attrs.evolve(
        platform,
        sources=lambda: tuple(map(there, platform.sources())),
        includes=lambda: tuple(map(there, platform.includes())),
        compile_flags=lambda compiler, arch: (*platform.compile_flags(compiler, arch), *quick),
        link_flags=lambda compiler, arch: (*platform.link_flags(compiler, arch), quick[1]),
    )


def verdict(op: str, platform: Platform, arch: str, output: Path) -> str:
    """What the op's cases say of a library, in a child process: "passed", a case or a crash."""
    library = build.build(platform, arch, output)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        os.write(writing, _first_failure(op, platform, arch, library).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    return said if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0 else f"crash ({status})"


def _first_failure(op: str, platform: Platform, arch: str, library: Path) -> str:
    from kernelhub.backends.native.library import Library

    kernels = Kernels(platform, "cpu", lambda device: arch, lambda index: 0)
    kernels._libraries[arch] = Library(library, "simt")
    made = kernels.implementations((op,))
    registry.add_backend(Backend("mutant", made, device_types=("cpu",), automatic=False))
    for case in sorted(registry.spec(op).cases(), key=lambda case: case.kind == "typical"):
        outcome = run_case(op, case, "mutant")
        if outcome.status == "failed":
            return f"{case.name}: {outcome.message}"
    return "passed"


@pytest.mark.parametrize(("op", "mutant"), MUTANTS, ids=_IDS)
def test_mutant_is_caught(op: str, mutant: Mutant, tmp_path: Path) -> None:
    platform = mutated(mutant, tmp_path)
    assert verdict(op, platform, mutant.arch, tmp_path / "library") != "passed"


@pytest.mark.parametrize(("op", "arch"), sorted({(op, mutant.arch) for op, mutant in MUTANTS}))
def test_the_kernel_itself_passes(op: str, arch: str, tmp_path: Path) -> None:
    """Else the lane above would catch everything."""
    shutil.copytree(csrc(), tmp_path / "csrc")
    assert verdict(op, moved(SIMT, tmp_path / "csrc"), arch, tmp_path / "library") == "passed"


@pytest.mark.parametrize("op", abi.OPS)
def test_there_are_mutants(op: str) -> None:
    assert sum(name == op for name, _ in MUTANTS) >= 6
