"""Compiles one library: its recipe, and the running of the compilers."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import platform as host
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import attrs

from kernelhub.backends.native import abi, cache
from kernelhub.backends.native.compilers import Compiler
from kernelhub.backends.native.platform import Platform
from kernelhub.errors import BuildError

logger = logging.getLogger("kernelhub")

_HEADERS = (".h", ".hpp", ".muh", ".cuh", ".inc", ".inl")
_ERROR_LINE = re.compile(r"\b(error|fatal)\b.*:|undefined reference|cannot find", re.IGNORECASE)


def sources_hash(platform: Platform) -> str:
    """Of all that a library is compiled from, and of the ABI. The same wherever the files lie."""
    digest = hashlib.sha256(abi.fingerprint().encode())
    try:
        for name, path in _inputs(platform):
            digest.update(f"\0{name}\0{cache.checksum(path)}".encode())
    except OSError as error:
        raise BuildError(
            f"the sources of {platform.name} cannot be read ({error}): install kernelhub anew"
        ) from error
    return digest.hexdigest()


def _inputs(platform: Platform) -> Iterator[tuple[str, Path]]:
    for path in platform.sources():
        yield path.name, path
    for folder in platform.includes():
        for path in sorted(folder.rglob("*")):
            if path.suffix in _HEADERS and path.is_file():
                yield str(path.relative_to(folder)), path


@attrs.frozen
class Recipe:
    """One library to be made."""

    platform: Platform
    arch: str
    compiler: Compiler

    @property
    def title(self) -> str:
        compiler = f"{self.compiler.name} {self.compiler.version}"
        return f"{self.platform.name} {self.arch} with {compiler}"

    def manifest(self) -> dict[str, Any]:
        from kernelhub import __version__

        return {
            "kernelhub": __version__,
            "platform": self.platform.name,
            "arch": self.arch,
            "compiler": f"{self.compiler.name} {self.compiler.version}",
            "machine": host.machine(),
            "flags": [*self._compile_flags(), *self._link_flags()],
            "sources": sources_hash(self.platform),
        }

    def entry_name(self) -> str:
        """The same for all builds that would give the same library."""
        content = {**self.manifest(), "path": self.compiler.path}
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        return f"{self.platform.name}-{self.arch}-{digest[:16]}"

    def make(self, work: Path, log: Path) -> None:
        """Compile and link in `work`; leaves the library and its manifest there."""
        sources = self.platform.sources()
        if not sources:
            raise BuildError(
                f"{self.platform.name}: its sources are missing: install kernelhub anew"
            )
        # Files made are named relative to `work`, where compilers run: nvcc hands names to a shell,
        # and the folder's own name is the environment's.
        objects = [f"{number}.o" for number in range(len(sources))]
        includes = [f"-I{path}" for path in self.platform.includes()]
        compiler = self.compiler.path
        tools = Tools(work, log, self.title)
        with tools.announced(len(sources)):
            tools.run_all(
                [compiler, *self._compile_flags(), *includes, "-c", str(source), "-o", name]
                for source, name in zip(sources, objects, strict=True)
            )
            tools.run_all([[compiler, *objects, *self._link_flags(), "-o", cache.LIBRARY]])
        manifest = {**self.manifest(), "sha256": cache.checksum(work / cache.LIBRARY)}
        (work / cache.MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        for name in objects:
            (work / name).unlink()

    def _compile_flags(self) -> tuple[str, ...]:
        return self.platform.compile_flags(self.compiler, self.arch)

    def _link_flags(self) -> tuple[str, ...]:
        return self.platform.link_flags(self.compiler, self.arch)


def environment() -> dict[str, str]:
    """What compilers see of the environment. Flags and compilers named there have no effect."""
    kept = ("HOME", "LD_LIBRARY_PATH")
    return {
        "LANG": "C",
        "PATH": os.environ.get("PATH", os.defpath),
        "TMPDIR": ".",  # their scratch files go when the folder of the build goes
        **{name: os.environ[name] for name in kept if name in os.environ},
    }


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Tools:
    """Runs compilers in a folder, several at a time, none of them longer than the build."""

    def __init__(self, work: Path, log: Path, title: str) -> None:
        self._work = work
        self._log = log
        self._title = title
        self._steps = 0
        self._running: set[subprocess.Popen[str]] = set()
        self._guard = threading.Lock()
        self._stopped = False
        self._shows_progress = _is_terminal()

    @contextlib.contextmanager
    def announced(self, files: int) -> Iterator[None]:
        """Says what is built, and on a terminal how far it is."""
        self._log.write_text("")
        started = f"building {self._title} (files: {files}, log: {self._log})"
        logger.info("%s", started)
        self._show(f"kernelhub: {started}\n")
        try:
            yield
        finally:
            self._show("\r\x1b[K")

    def run_all(self, commands: Iterator[list[str]] | list[list[str]]) -> None:
        """Run them all; the first failure ends the rest and is the `BuildError`."""
        waiting = list(commands)
        pool = ThreadPoolExecutor(max_workers=min(cores(), len(waiting)))
        try:
            for job in as_completed([pool.submit(self._run, command) for command in waiting]):
                job.result()
                self._steps += 1
                self._show(f"\r\x1b[Kkernelhub: {self._steps} done")
        except BaseException:
            self._stop()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _run(self, command: list[str]) -> None:
        with self._guard:
            if self._stopped:
                return
            process = self._start(command)
            self._running.add(process)
        said, _ = process.communicate()
        with self._guard:
            self._running.discard(process)
            if self._stopped:
                return
            with self._log.open("a") as log:
                log.write(f"$ {shlex.join(command)}\n{said}")
        if process.returncode != 0:
            raise self._failure(command, said, process.returncode)

    def _start(self, command: list[str]) -> subprocess.Popen[str]:
        try:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                env=environment(),
                cwd=self._work,
                start_new_session=True,  # so that it can be ended with all that it started
            )
        except OSError as error:
            raise BuildError(
                f"building {self._title} failed: {command[0]} cannot be run ({error})"
            ) from error

    def _failure(self, command: list[str], said: str, code: int) -> BuildError:
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        errors = [line for line in lines if _ERROR_LINE.search(line)]
        ended = f"ended with {code}" if code > 0 else f"was ended by {_signal_name(-code)}"
        first = next(iter([*errors, *lines]), f"it said nothing and {ended}")
        mend = "`KERNELHUB_BACKEND=reference` runs without compiled kernels until it is mended"
        if os.strerror(errno.ENOSPC) in said:
            mend = f"free space, or set {cache.VARIABLE} to a folder on another disk"
        return BuildError(
            f"building {self._title} failed\n    {first}\n    command: {shlex.join(command)}\n"
            f"    log: {self._log}\n    {mend}"
        )

    def _stop(self) -> None:
        with self._guard:
            self._stopped = True
            for process in self._running:
                if process.returncode is None:  # else its number may be another's by now
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)

    def _show(self, text: str) -> None:
        if self._shows_progress:
            with contextlib.suppress(OSError, ValueError):
                sys.stderr.write(text)
                sys.stderr.flush()


def _is_terminal() -> bool:
    try:
        return sys.stderr is not None and sys.stderr.isatty()
    except ValueError:  # it is closed
        return False


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
