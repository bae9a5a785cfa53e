"""Builds libraries of compiled kernels, and finds those that were built before.

A library comes, in this order, from the folders of `KERNELHUB_LIBRARY_PATH` (built ahead of time),
from the cache, or from a build now. See `docs/building.md`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import platform as host
import re
import shlex
import shutil
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
from kernelhub.backends.native.platform import Platform, environment
from kernelhub.errors import BuildError

logger = logging.getLogger("kernelhub")

LIBRARY_PATH_VARIABLE = "KERNELHUB_LIBRARY_PATH"

_lock = threading.Lock()
_done: dict[tuple[Platform, str], Path | BuildError] = {}


def ensure(platform: Platform, arch: str) -> Path:
    """The library of a platform for an architecture: found, or built now.

    Raises `BuildError` where there is none and none can be built; a second call raises the same
    error and does not try again.
    """
    with _lock:
        key = (platform, arch)
        if key not in _done:
            try:
                _done[key] = _find_ahead(platform, arch)[0] or _cached_or_built(platform, arch)
            except BuildError as error:
                _done[key] = error
        found = _done[key]
    if isinstance(found, BuildError):
        raise BuildError(str(found))
    return found


def available(platform: Platform, arch: str) -> list[str]:
    """Every reason why `ensure` would fail, as far as can be told without compiling."""
    known = _done.get((platform, arch))
    if known is not None:
        return [str(known)] if isinstance(known, BuildError) else []
    path, reasons = _find_ahead(platform, arch)
    if path is not None:
        return []
    try:
        platform.find_compiler()
        cache.private_folder()
        return []
    except BuildError as error:
        if _find_cached(platform, arch) is not None:
            return []
        return [*reasons, str(error)]


def build(
    platform: Platform, arch: str, output: Path | None = None, *, force: bool = False
) -> Path:
    """Build a library, or take the cache's unless `force`; returns its path.

    With `output`, a copy to ship goes there: `kernelhub-PLATFORM-ARCH.so` and its manifest.
    Raises `BuildError`.
    """
    library = _cached_or_built(platform, arch, force=force)
    if output is None:
        return library
    shipped = output / file_name(platform, arch)
    try:
        output.mkdir(parents=True, exist_ok=True)
        _replace(library, shipped)
        _replace(library.with_name(cache.MANIFEST), shipped.with_suffix(".json"))
    except OSError as error:
        raise BuildError(f"{shipped} cannot be written: {error}") from error
    return shipped


def file_name(platform: Platform, arch: str) -> str:
    """The name of a library that is built ahead of time."""
    return f"kernelhub-{platform.name}-{arch}.so"


def _replace(source: Path, target: Path) -> None:
    part = target.with_name(f"{target.name}.{os.getpid()}")
    shutil.copyfile(source, part)
    os.replace(part, target)


# ---- libraries that exist --------------------------------------------------------------------


def library_folders() -> list[Path]:
    """Where libraries that were built ahead of time are looked for."""
    named = os.environ.get(LIBRARY_PATH_VARIABLE, "").split(os.pathsep)
    return [*(Path(name) for name in named if name), Path(__file__).parents[2] / "lib"]


def _find_ahead(platform: Platform, arch: str) -> tuple[Path | None, list[str]]:
    """A fitting library built ahead of time, or why those that are there do not fit."""
    reasons = []
    for folder in library_folders():
        library = folder / file_name(platform, arch)
        if not library.is_file():
            continue
        try:
            manifest = cache.read_manifest(library.with_suffix(".json"))
            _check_fits(library, manifest, platform, arch)
            return library, []
        except BuildError as error:
            reasons.append(str(error))
            logger.warning("%s", error)
    return None, reasons


def _check_fits(library: Path, manifest: dict[str, Any], platform: Platform, arch: str) -> None:
    wanted = {"platform": platform.name, "arch": arch, "sources": sources_hash(platform)}
    for name, value in wanted.items():
        if manifest.get(name) != value:
            raise BuildError(
                f"{library} does not fit: its {name} is {manifest.get(name)}, needed is {value}; "
                f"build it anew with `kernelhub build {platform.name} --arch {arch}`"
            )
    cache.verify(library, manifest)


def _find_cached(platform: Platform, arch: str) -> Path | None:
    """A library in the cache that any compiler made of the present sources."""
    for entry, manifest in cache.entries():
        try:
            _check_fits(entry / cache.LIBRARY, manifest, platform, arch)
            return entry / cache.LIBRARY
        except BuildError:
            continue
    return None


def sources_hash(platform: Platform) -> str:
    """Of all that a library is compiled from, and of the ABI."""
    digest = hashlib.sha256(abi.fingerprint().encode())
    for path in sorted({*platform.sources(), *_headers(platform)}):
        digest.update(f"\0{path.name}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _headers(platform: Platform) -> Iterator[Path]:
    for folder in platform.includes():
        yield from (path for path in folder.rglob("*") if path.suffix in (".h", ".muh", ".cuh"))


# ---- builds ----------------------------------------------------------------------------------


def _cached_or_built(platform: Platform, arch: str, *, force: bool = False) -> Path:
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", arch):
        raise BuildError(f"{platform.name}: {arch!r} is not the name of an architecture")
    try:
        compiler = platform.find_compiler()
    except BuildError:
        cached = None if force else _find_cached(platform, arch)
        if cached is not None:
            return cached
        raise
    try:
        return _from_cache(_Build(platform, arch, compiler), force)
    except OSError as error:
        mend = f"set {cache.VARIABLE} to a folder that can be written"
        if error.errno == errno.ENOSPC:
            mend = f"free space, or set {cache.VARIABLE} to a folder on another disk"
        raise BuildError(f"building {platform.name} {arch} failed ({error}): {mend}") from error


def _from_cache(made: _Build, force: bool) -> Path:
    with cache.locked(made.entry_name()) as entry:
        library = entry / cache.LIBRARY
        if library.is_file() and not force:
            try:
                cache.verify(library, cache.read_manifest(entry / cache.MANIFEST))
                return library
            except BuildError as error:
                logger.warning("%s; building it again", error)
        with cache.workshop(entry) as work:
            made.run(work)
        return library


@attrs.frozen
class _Build:
    """One library to be made."""

    platform: Platform
    arch: str
    compiler: Compiler

    def compile_flags(self) -> tuple[str, ...]:
        includes = tuple(f"-I{path}" for path in self.platform.includes())
        return (*self.platform.compile_flags(self.compiler, self.arch), *includes)

    def link_flags(self) -> tuple[str, ...]:
        return self.platform.link_flags(self.compiler, self.arch)

    def manifest(self) -> dict[str, Any]:
        from kernelhub import __version__

        return {
            "kernelhub": __version__,
            "platform": self.platform.name,
            "arch": self.arch,
            "compiler": f"{self.compiler.name} {self.compiler.version}",
            "machine": host.machine(),
            "flags": [*self.platform.compile_flags(self.compiler, self.arch), *self.link_flags()],
            "sources": sources_hash(self.platform),
        }

    def entry_name(self) -> str:
        """The same for all builds that would give the same library."""
        content = {**self.manifest(), "path": self.compiler.path}
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        return f"{self.platform.name}-{self.arch}-{digest[:16]}"

    def run(self, work: Path) -> None:
        """Compile and link in `work`; leaves the library and its manifest there."""
        sources = self.platform.sources()
        title = (
            f"{self.platform.name} {self.arch} with {self.compiler.name} {self.compiler.version}"
        )
        logger.info("building %s (%d files)", title, len(sources))
        objects = [work / f"{path.name}.o" for path in sources]
        # Linking needs `-x` no more: it would take the objects for sources.
        steps = [
            [self.compiler.path, *self.compile_flags(), "-c", str(source), "-o", str(made)]
            for source, made in zip(sources, objects, strict=True)
        ]
        tools = _Tools(work / cache.LOG, title)
        tools.run_all(steps, total=len(steps) + 1)
        library = work / cache.LIBRARY
        names = map(str, objects)
        tools.run_all(
            [[self.compiler.path, *names, *self.link_flags(), "-o", str(library)]], total=0
        )
        tools.finished()
        manifest = {**self.manifest(), "sha256": cache.checksum(library)}
        (work / cache.MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        for path in objects:
            path.unlink()


class _Tools:
    """Runs compilers, several at a time, none of them longer than the build."""

    def __init__(self, log: Path, title: str) -> None:
        self._log = log
        self._title = title
        self._running: set[subprocess.Popen[str]] = set()
        self._guard = threading.Lock()
        self._stopped = False
        self._shows_progress = sys.stderr is not None and sys.stderr.isatty()

    def run_all(self, commands: list[list[str]], total: int) -> None:
        """Run them all; the first failure ends the rest and is the `BuildError`."""
        pool = ThreadPoolExecutor(max_workers=min(os.cpu_count() or 1, len(commands)))
        try:
            jobs = [pool.submit(self._run, command) for command in commands]
            for done, job in enumerate(as_completed(jobs), start=1):
                job.result()
                self._progress(f"{done} of {total}" if total else "linked")
        except BaseException:
            self._stop()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _run(self, command: list[str]) -> None:
        with self._guard:
            if self._stopped:
                return
            # A session of its own: an interrupted build can end it with all that it started.
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                env=environment(),
                cwd=self._log.parent,
                start_new_session=True,
            )
            self._running.add(process)
        said, _ = process.communicate()
        with self._guard:
            self._running.discard(process)
            with self._log.open("a") as log:
                log.write(f"$ {shlex.join(command)}\n{said}")
        if process.returncode != 0 and not self._stopped:
            raise self._failure(command, said, process.returncode)

    def _failure(self, command: list[str], said: str, code: int) -> BuildError:
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        errors = [line for line in lines if "error" in line.lower()]
        first = next(iter([*errors, *lines]), f"it said nothing and ended with {code}")
        kept = self._keep_log()
        return BuildError(
            f"building {self._title} failed\n    {first}\n    command: {shlex.join(command)}\n"
            f"    log: {kept}\n"
            "    until it is mended, `KERNELHUB_BACKEND=reference` runs without compiled kernels"
        )

    def _keep_log(self) -> Path:
        """The log outlives the failed build's folder."""
        kept = self._log.parent.parent / f"{self._log.parent.name.rpartition('-')[0]}-failed.log"
        try:
            shutil.copyfile(self._log, kept)
        except OSError as error:
            logger.warning("the log of the build cannot be kept: %s", error)
        return kept

    def _stop(self) -> None:
        with self._guard:
            self._stopped = True
            for process in self._running:
                try:
                    os.killpg(process.pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue

    def _progress(self, what: str) -> None:
        logger.debug("building %s: %s", self._title, what)
        if self._shows_progress:
            sys.stderr.write(f"\rkernelhub: building {self._title}: {what}\x1b[K")
            sys.stderr.flush()

    def finished(self) -> None:
        if self._shows_progress:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
