"""Where built libraries are kept: a private folder, entries that are whole or absent.

An entry is a folder with the library and its manifest. It is made under a lock in a folder of its
own and renamed into place, so a build that dies leaves no entry. Beside it lie its lock and the log
of its last build.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from kernelhub.errors import BuildError

logger = logging.getLogger("kernelhub")

VARIABLE = "KERNELHUB_CACHE_DIR"
LIBRARY = "library.so"
MANIFEST = "manifest.json"

_MEND = f"set {VARIABLE} to a folder of your own"
_MAKING = "making-"
_PATIENCE_S = 1.0  # before it is said what is waited for


# ---- the folder ------------------------------------------------------------------------------


def folder() -> Path:
    """The cache's folder by the environment; need not exist. `BuildError` where there is none."""
    named = os.environ.get(VARIABLE)
    if named:
        return Path(named).absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    if base and Path(base).is_absolute():  # its specification has relative ones ignored
        return Path(base) / "kernelhub"
    try:
        return Path.home() / ".cache" / "kernelhub"
    except RuntimeError as error:
        raise BuildError(f"there is no home folder for the cache ({error}): {_MEND}") from error


def trusted_folder() -> Path:
    """The cache's folder, which nobody else can put libraries into; need not exist.

    Raises `BuildError` where others could: this process would load what they left there.
    """
    path = folder()
    try:
        status = path.stat()
    except FileNotFoundError:
        return path
    except OSError as error:
        raise BuildError(f"the cache folder {path} cannot be read ({error}): {_MEND}") from error
    if not path.is_dir():
        raise BuildError(f"the cache folder {path} is not a folder: {_MEND}")
    if status.st_uid != os.geteuid():
        raise BuildError(f"the cache folder {path} belongs to another user: {_MEND}")
    if status.st_mode & 0o022:
        raise BuildError(
            f"others may write to the cache folder {path}: `chmod go-w {path}`, or {_MEND}"
        )
    return path


def check_writable() -> None:
    """`BuildError` unless libraries can be built in the cache's folder. Makes nothing."""
    path = trusted_folder()
    nearest = next((place for place in (path, *path.parents) if place.exists()), path)
    if not nearest.is_dir():
        raise BuildError(f"the cache folder {path} cannot be made: {nearest} is a file: {_MEND}")
    if not os.access(nearest, os.W_OK | os.X_OK):
        what = "is read-only" if nearest == path else f"cannot be made: {nearest} is read-only"
        raise BuildError(f"the cache folder {path} {what}: {_MEND}")


def private_folder() -> Path:
    """The cache's folder, made where it is missing. `BuildError` where nothing can be put there."""
    check_writable()
    path = folder()
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise BuildError(f"the cache folder {path} cannot be made ({error}): {_MEND}") from error
    return trusted_folder()


# ---- libraries and manifests -----------------------------------------------------------------


def checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_manifest(path: Path) -> dict[str, Any]:
    """A manifest; `BuildError` where it is none."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BuildError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise BuildError(f"{path} is not a manifest")
    return found


def verify(library: Path, manifest: dict[str, Any]) -> None:
    """`BuildError` unless the library is, byte for byte, what its manifest describes."""
    try:
        found = checksum(library)
    except OSError as error:
        raise BuildError(f"{library} cannot be read: {error}") from error
    if found != manifest.get("sha256"):
        raise BuildError(f"{library} is damaged: its checksum is not its manifest's")


def intact(name: str) -> Path | None:
    """The library of an entry; None where there is no entry. `BuildError` where it is damaged."""
    entry = trusted_folder() / name
    if not entry.is_dir():
        return None
    verify(entry / LIBRARY, read_manifest(entry / MANIFEST))
    return entry / LIBRARY


def entries(prefix: str = "") -> Iterator[tuple[Path, dict[str, Any]]]:
    """Every entry with a readable manifest whose name starts with `prefix`."""
    for path in sorted(trusted_folder().glob(f"*/{MANIFEST}")):
        if path.parent.name.startswith(prefix) and not path.parent.name.startswith(_MAKING):
            with contextlib.suppress(BuildError):
                yield path.parent, read_manifest(path)


# ---- making entries --------------------------------------------------------------------------


@contextlib.contextmanager
def locked(name: str) -> Iterator[Path]:
    """The place of an entry, which no other process makes meanwhile."""
    root = private_folder()
    lock = FileLock(_lock_file(root, name))
    try:
        try:
            lock.acquire(timeout=_PATIENCE_S)
        except Timeout:
            logger.info("waiting for another process, which builds %s", root / name)
            lock.acquire()
    except NotImplementedError as error:
        raise BuildError(f"files in {root} cannot be locked ({error}): {_MEND}") from error
    try:
        yield root / name
    finally:
        lock.release()


@contextlib.contextmanager
def workshop(entry: Path) -> Iterator[Path]:
    """A folder to make an entry in, while its lock is held. Left without error, it is the entry."""
    _clear(entry)
    work = Path(tempfile.mkdtemp(prefix=f"{_MAKING}{entry.name}-", dir=entry.parent))
    try:
        yield work
        if entry.exists():
            shutil.rmtree(entry)
        os.rename(work, entry)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _clear(entry: Path) -> None:
    """Remove what builds that were killed left here: those of `entry`, whose lock is held, and of
    every other entry that nobody makes."""
    for abandoned in entry.parent.glob(f"{_MAKING}*"):
        name = abandoned.name.removeprefix(_MAKING).rpartition("-")[0]
        if name == entry.name:
            shutil.rmtree(abandoned, ignore_errors=True)
            continue
        with (
            contextlib.suppress(Timeout, OSError),
            FileLock(_lock_file(entry.parent, name), timeout=0),
        ):
            shutil.rmtree(abandoned, ignore_errors=True)


def _lock_file(root: Path, name: str) -> Path:
    return root / f"{name}.lock"


def log_file(entry: Path) -> Path:
    """Where the log of an entry's last build is, made or failed."""
    return entry.with_name(f"{entry.name}.log")
