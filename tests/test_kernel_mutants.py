"""The tests of the kernels are tested: every planted fault is caught by the op's own cases.

A mutant is compiled for the emulator with checks of alignment, which the processor here forgives
and a GPU does not, and run in a child process, for some mutants crash. Of the sources only those
with the fault in them are compiled for it, of those that read a header perhaps one alone; the
objects of the others are shared.
"""

from __future__ import annotations

import importlib
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import attrs
import pytest

from kernelhub import registry
from kernelhub.backend import Backend
from kernelhub.backends.native import abi, build
from kernelhub.backends.native.kernels import Kernels
from kernelhub.backends.native.library import Library
from kernelhub.backends.native.platform import SIMT, Platform, csrc
from kernelhub.testing import run_case
from tests.mutants import Mutant

_NIGHTLY = os.environ.get("KERNELHUB_NIGHTLY") == "1"
_SLOW = ("fused_gemv", "fused_moe_gemv", "top_k_top_p_sampling_from_probs")
_AT_MOST = 7  # of a slow op, spread over its list, in other runs: one takes up to half a minute


def all_mutants_of(op: str) -> tuple[Mutant, ...]:
    found = importlib.import_module(f"tests.mutants.{op}")
    return getattr(found, "KERNEL_MUTANTS", ())


def mutants_of(op: str) -> list[Mutant]:
    found = all_mutants_of(op)
    step = -(-len(found) // _AT_MOST) if op in _SLOW and not _NIGHTLY else 1
    return list(found[::step])


MUTANTS = [(op, mutant) for op in abi.OPS for mutant in mutants_of(op)]
_IDS = [f"{op}-{mutant.name}-{mutant.arch}" for op, mutant in MUTANTS]


_CHECKED = ("-fsanitize=alignment", "-fno-sanitize-recover=all")
ALIGNED = attrs.evolve(
    SIMT,
    compile_flags=lambda compiler, arch: (*SIMT.compile_flags(compiler, arch), *_CHECKED),
    link_flags=lambda compiler, arch: (*SIMT.link_flags(compiler, arch), *_CHECKED),
)
"""The emulator's platform with alignment checked."""


def mutated(mutant: Mutant, root: Path) -> Platform:
    """The emulator's platform with the fault in it."""
    copy = root / "csrc"
    shutil.copytree(csrc(), copy)
    path = copy / mutant.module
    source = path.read_text()
    assert source.count(mutant.old) == 1, f"found {source.count(mutant.old)} times"
    path.write_text(source.replace(mutant.old, mutant.new))
    changed = [s for s in ALIGNED.sources() if csrc() / mutant.module in read_by(s)]
    if mutant.only:
        changed = [source for source in changed if source.name == mutant.only]
    return compiling(changed, copy, mutant.arch)


def compiling(sources: list[Path], copy: Path, arch: str) -> Platform:
    """A platform that compiles these from a copy of `csrc` and takes the others as they are."""
    assert sources
    objects = [object_of(source, arch) for source in ALIGNED.sources() if source not in sources]

    def there(paths: Iterable[Path]) -> tuple[Path, ...]:
        return tuple(copy / path.relative_to(csrc()) for path in paths)

    return attrs.evolve(
        ALIGNED,
        sources=lambda: there(sources),
        includes=lambda: there(ALIGNED.includes()),
        link_flags=lambda compiler, arch: (*objects, *ALIGNED.link_flags(compiler, arch)),
    )


@cache
def read_by(source: Path) -> frozenset[Path]:
    """A source and the headers that it includes."""
    includes = [f"-I{folder}" for folder in ALIGNED.includes()]
    command = [ALIGNED.find_compiler().path, "-MM", "-x", "c++", *includes, str(source)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return frozenset(map(Path, shlex.split(said.replace("\\\n", " "))[1:]))


def object_of(source: Path, arch: str) -> str:
    """One source by itself, compiled once and kept in the cache."""
    alone = attrs.evolve(
        ALIGNED, sources=lambda: (source,), link_flags=lambda compiler, arch: ("-r", "-nostdlib")
    )
    return str(build.build(alone, arch))


def failing_case(op: str, library: Path, arch: str, first: str = "", only: str = "") -> str:
    """The first of the op's cases that a library fails or crashes in; "" where there is none.

    `first` comes before the others; with `only` there is no other.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            _run_cases(op, library, arch, first, only, writing)
            os._exit(0)
        finally:
            os._exit(1)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        begun = pipe.read().split()
    _, status = os.waitpid(child, 0)
    assert begun
    return "" if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0 else begun[-1]


def _run_cases(op: str, path: Path, arch: str, first: str, only: str, writing: int) -> None:
    """Write the name of each case before it is run; end the process where one fails."""
    kernels = Kernels(ALIGNED, "cpu", lambda device: arch, lambda index: 0)
    kernels._libraries[arch] = Library(path, "simt")
    made = kernels.implementations((op,))
    registry.add_backend(Backend("mutant", made, device_types=("cpu",), automatic=False))
    cases = registry.spec(op).cases()
    for case in sorted(cases, key=lambda case: (case.name != first, case.kind == "typical")):
        if only in ("", case.name):
            os.write(writing, f"{case.name}\n".encode())
            if run_case(op, case, "mutant").status == "failed":
                os._exit(1)


@pytest.mark.parametrize("op", abi.OPS)
def test_every_fault_has_its_place(op: str) -> None:
    """Also of those that other runs leave out, for the kernels change under them."""
    found = {
        (m.name, m.arch): (csrc() / m.module).read_text().count(m.old) for m in all_mutants_of(op)
    }
    assert {key for key, times in found.items() if times != 1} == set()
    sources = {source.name for source in ALIGNED.sources()}
    assert {m.only for m in all_mutants_of(op)} <= {"", *sources}
    cases = {case.name for case in registry.spec(op).cases()}
    assert {m.case for m in all_mutants_of(op)} <= {"", *cases}


@pytest.mark.parametrize(("op", "mutant"), MUTANTS, ids=_IDS)
def test_mutant_is_caught(op: str, mutant: Mutant, tmp_path: Path) -> None:
    library = build.build(mutated(mutant, tmp_path), mutant.arch, tmp_path / "library")
    case = failing_case(op, library, mutant.arch, first=mutant.case)
    assert case, "every case passes"
    sound = compiling([csrc() / "musa" / "library.mu"], csrc(), mutant.arch)
    assert not failing_case(op, build.build(sound, mutant.arch), mutant.arch, only=case), (
        f"{case} fails without the fault too"
    )


@pytest.mark.parametrize("op", abi.OPS)
def test_there_are_mutants(op: str) -> None:
    assert sum(name == op for name, _ in MUTANTS) >= 6
