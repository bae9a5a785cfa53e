"""Finds libraries of compiled kernels, and builds those that are missing.

A library comes, in this order, from the folders of `KERNELHUB_LIBRARY_PATH` (built ahead of time),
from the cache, or from a build now. See `docs/building.md`.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import platform as host
import re
import shutil
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import attrs

from kernelhub.backends.native import cache
from kernelhub.backends.native.compiling import Recipe, sources_hash
from kernelhub.backends.native.platform import Platform
from kernelhub.errors import BuildError

logger = logging.getLogger("kernelhub")

LIBRARY_PATH_VARIABLE = "KERNELHUB_LIBRARY_PATH"


class Lock:
    """A lock that a forked child finds free: the thread that held it is not there to let go."""

    def __init__(self) -> None:
        self._renew()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._renew)

    def _renew(self) -> None:
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        with self._lock:
            yield


_lock = Lock()
_done: dict[tuple[Platform, str], Path | BuildError] = {}


def ensure(platform: Platform, arch: str) -> Path:
    """The library of a platform for an architecture: found, or built now.

    Raises `BuildError` where there is none and none can be built; a second call raises the same
    error and does not try again.
    """
    with _lock.held():
        key = (platform, arch)
        if key not in _done:
            try:
                _done[key] = _found_or_built(platform, arch)
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
    library, reasons = _find_ahead(platform, arch)
    if library is not None:
        return []
    obstacles = list(_obstacles(platform))
    if not obstacles or _find_cached(platform, arch) is not None:
        return []
    elsewhere = (
        f"no library built ahead of time was found: `kernelhub build {platform.name} --arch {arch} "
        f"--output DIR` makes one, {LIBRARY_PATH_VARIABLE}=DIR names its folder"
    )
    return [*(reasons or [elsewhere]), *obstacles]


def build(
    platform: Platform, arch: str, output: Path | None = None, *, force: bool = False
) -> Path:
    """Build a library, or take the cache's unless `force`; returns its path.

    With `output`, a copy to ship goes there: `kernelhub-PLATFORM-ARCH.so` and its manifest.
    Raises `BuildError`.
    """
    library = _cached_or_built(platform, arch, force=force)
    with _lock.held():
        _done.pop((platform, arch), None)  # an earlier failure is out of date
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
    try:
        shutil.copyfile(source, part)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


# ---- libraries that exist --------------------------------------------------------------------


def library_folders() -> list[Path]:
    """Where libraries that were built ahead of time are looked for."""
    named = os.environ.get(LIBRARY_PATH_VARIABLE, "").split(os.pathsep)
    return [*(Path(name).absolute() for name in named if name), Path(__file__).parents[2] / "lib"]


def _find_ahead(platform: Platform, arch: str) -> tuple[Path | None, list[str]]:
    """A fitting library built ahead of time, or why those that are there do not fit."""
    reasons = []
    for folder in library_folders():
        library = folder / file_name(platform, arch)
        if not library.is_file():
            continue
        try:
            check_fits(library, cache.read_manifest(library.with_suffix(".json")), platform, arch)
            return library, []
        except BuildError as error:
            reasons.append(str(error))
    return None, reasons


def check_fits(library: Path, manifest: dict[str, Any], platform: Platform, arch: str) -> None:
    """`BuildError` unless the library was built of the present sources, for this, and is whole."""
    wanted = {
        "platform": platform.name,
        "arch": arch,
        "machine": host.machine(),
        "sources": sources_hash(platform),
    }
    for name, value in wanted.items():
        if manifest.get(name) != value:
            raise BuildError(
                f"{library} does not fit: its {name} is {manifest.get(name)}, needed is {value}; "
                f"build it anew with `kernelhub build {platform.name} --arch {arch}`"
            )
    cache.verify(library, manifest)


def _find_cached(platform: Platform, arch: str) -> Path | None:
    """A library in the cache that any compiler made of the present sources."""
    with contextlib.suppress(BuildError):  # others may write there
        for entry, manifest in cache.entries(f"{platform.name}-{arch}-"):
            with contextlib.suppress(BuildError):  # it does not fit
                check_fits(entry / cache.LIBRARY, manifest, platform, arch)
                return entry / cache.LIBRARY
    return None


@attrs.frozen
class Found:
    """A library that lies here. `fault` says why it is not used; empty where it fits."""

    platform: Platform
    arch: str
    path: Path
    shipped: bool
    compiler: str = ""
    fault: str = ""


def libraries(platforms: Iterable[Platform]) -> Iterator[Found]:
    """Every library of these platforms, built ahead of time or in the cache."""
    by_name = {platform.name: platform for platform in platforms}
    for folder in library_folders():
        for name, platform in by_name.items():
            start = f"kernelhub-{name}-"
            for path in sorted(folder.glob(f"{start}*.so")):
                yield _examined(platform, path, path.with_suffix(".json"), path.stem[len(start) :])
    with contextlib.suppress(BuildError):  # the cache's folder is not to be trusted
        for entry, manifest in cache.entries():
            if manifest.get("platform") in by_name:
                arch = str(manifest.get("arch"))
                platform = by_name[manifest["platform"]]
                yield _examined(platform, entry / cache.LIBRARY, entry / cache.MANIFEST, arch)


def _examined(platform: Platform, library: Path, beside: Path, arch: str) -> Found:
    shipped = library.name != cache.LIBRARY
    try:
        manifest = cache.read_manifest(beside)
    except BuildError as error:
        return Found(platform, arch, library, shipped, fault=str(error))
    compiler = str(manifest.get("compiler", ""))
    try:
        check_fits(library, manifest, platform, arch)
    except BuildError as error:
        return Found(platform, arch, library, shipped, compiler, str(error))
    return Found(platform, arch, library, shipped, compiler)


def _obstacles(platform: Platform) -> Iterator[str]:
    """Why nothing can be built now."""
    for look in (platform.find_compiler, cache.check_writable):
        try:
            look()
        except BuildError as error:
            yield str(error)


# ---- builds ----------------------------------------------------------------------------------


def _found_or_built(platform: Platform, arch: str) -> Path:
    library, reasons = _find_ahead(platform, arch)
    if library is not None:
        return library
    for reason in reasons:
        logger.warning("%s", reason)
    try:
        return _cached_or_built(platform, arch)
    except BuildError as error:
        raise BuildError("\n".join([*reasons, str(error)])) from error


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
        return _from_cache(Recipe(platform, arch, compiler), force)
    except OSError as error:
        mend = f"set {cache.VARIABLE} to a folder that can be written"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            mend = f"free space, or set {cache.VARIABLE} to a folder on another disk"
        raise BuildError(f"building {platform.name} {arch} failed ({error}): {mend}") from error


def _from_cache(recipe: Recipe, force: bool) -> Path:
    name = recipe.entry_name()
    if not force:
        # Entries are renamed into place, so a whole one needs no lock, nor a folder to write to.
        with contextlib.suppress(BuildError):
            library = cache.intact(name)
            if library is not None:
                return library
    with cache.locked(name) as entry:
        if not force:
            try:
                library = cache.intact(name)
            except BuildError as error:
                logger.warning("%s; building it again", error)
                library = None
            if library is not None:
                return library
        with cache.workshop(entry) as work:
            recipe.make(work, cache.log_file(entry))
        return entry / cache.LIBRARY
