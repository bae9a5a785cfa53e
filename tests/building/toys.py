"""Tiny platforms for the tests of the build system: one source, a compiler that keeps count."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kernelhub.backends.native import build
from kernelhub.backends.native.compilers import Compiler
from kernelhub.backends.native.platform import Platform
from kernelhub.errors import BuildError

SOURCE = '#include "answer.h"\nextern "C" int answer() { return ANSWER; }\n'
HOSTILE = "$(touch pwned) `touch pwned` ; touch pwned; \"q' x"
"""A name that would run commands, were it to reach a shell."""


def script(path: Path, *lines: str) -> Path:
    """An executable shell script. Its text is the test's own, never the environment's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)
    return path


class Toy:
    """A platform over a folder of sources. Its compiler is g++ behind a script.

    The script notes each run in `runs`, and where the file `hang` exists it waits instead, having
    left the number of its process in `hanging`.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.sources = root / "sources"
        self.runs = root / "runs"
        self.hang = root / "hang"
        self.hanging = root / "hanging"
        note = f"echo $! >'{root}/number'; mv '{root}/number' '{self.hanging}'"
        self.waiting = f"sleep 60 & {note}; wait"
        self.find: Callable[[], Compiler] = lambda: self.compiler
        self.sources.mkdir(parents=True)
        self.write("answer.h", "#define ANSWER 42\n")
        self.write("answer.cpp", SOURCE)
        self.use(f'exec {shutil.which("g++")} "$@"')
        self.platform = Platform(
            name="toy",
            archs=("one", "two"),
            find_compiler=lambda: self.find(),
            sources=lambda: tuple(sorted(self.sources.glob("*.cpp"))),
            includes=lambda: (self.sources,),
            compile_flags=lambda compiler, arch: ("-fPIC", f'-DARCH="{arch}"'),
            link_flags=lambda compiler, arch: ("-shared",),
        )

    def write(self, name: str, text: str) -> None:
        (self.sources / name).write_text(text)

    def use(self, *lines: str) -> None:
        """Let the compiler's script do something else."""
        wait = f"if [ -e '{self.hang}' ]; then {self.waiting}; fi"
        compiler = script(self.root / "g++", f"echo run >>'{self.runs}'", wait, *lines)
        self.compiler = Compiler("g++", str(compiler), "12.0")

    @property
    def count(self) -> int:
        """How often the compiler ran: twice a build, to compile and to link."""
        return self.runs.read_text().count("run") if self.runs.exists() else 0

    def alive(self) -> bool:
        """Whether the process that a hanging compiler started lives on."""
        number = self.hanging.read_text().strip()
        status = Path(f"/proc/{number}/stat")
        return status.exists() and status.read_text().split()[2] != "Z"


def load(library: Path) -> int:
    """What `answer` returns. In a process of its own, for a name is loaded once in a process."""
    program = f"import ctypes; print(ctypes.CDLL({str(library)!r}).answer())"
    run = subprocess.run(["python3", "-c", program], capture_output=True, text=True, check=True)
    return int(run.stdout)


def again(platform: Platform, arch: str = "one") -> Path:
    """`ensure` as a new process would see it."""
    build._done.clear()
    return build.ensure(platform, arch)


def refused(toy: Toy) -> str:
    """Why the toy cannot be had; said by `ensure`."""
    with pytest.raises(BuildError) as caught:
        again(toy.platform)
    return str(caught.value)


def no_compiler() -> Compiler:
    raise BuildError("g++ was not found: install it")


def leftovers(store: Path) -> list[str]:
    """What is in the cache beside entries, their locks and their logs."""
    kept = {p.parent for p in store.glob("*/library.so")}
    return [p.name for p in store.iterdir() if p not in kept and p.suffix not in (".lock", ".log")]


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, f"waited for {what}"
        time.sleep(0.01)


def forked(work: Callable[[], object]) -> int:
    """A child process that does the work and ends with 0, or 1 where it raised."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return child
