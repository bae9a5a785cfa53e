"""Where built libraries are kept: a private folder, entries that are whole or absent.

An entry is a folder with the library, its manifest and the log of its build. It is made under a
lock in a folder of its own and renamed into place, so a build that dies leaves no entry.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock

from kernelhub.errors import BuildError

VARIABLE = "KERNELHUB_CACHE_DIR"
LIBRARY = "library.so"
MANIFEST = "manifest.json"
LOG = "build.log"


def folder() -> Path:
    """The cache's folder by the environment; need not exist."""
    named = os.environ.get(VARIABLE)
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "kernelhub"


def private_folder() -> Path:
    """The cache's folder, made where it is missing.

    Raises `BuildError` where it cannot be written, or where others could put libraries into it that
    this process would then load.
    """
    path = folder()
    mend = f"set {VARIABLE} to a folder of your own"
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.stat()
    except OSError as error:
        raise BuildError(f"the cache folder {path} cannot be made ({error}): {mend}") from error
    if status.st_uid != os.geteuid():
        raise BuildError(f"the cache folder {path} belongs to another user: {mend}")
    if status.st_mode & 0o022:
        raise BuildError(
            f"others may write to the cache folder {path}: `chmod go-w {path}`, or {mend}"
        )
    if not os.access(path, os.W_OK):
        raise BuildError(f"the cache folder {path} is read-only: {mend}")
    return path


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


def entries() -> Iterator[tuple[Path, dict[str, Any]]]:
    """Every entry with a readable manifest."""
    for path in sorted(folder().glob(f"*/{MANIFEST}")):
        with contextlib.suppress(BuildError):
            yield path.parent, read_manifest(path)


@contextlib.contextmanager
def locked(name: str) -> Iterator[Path]:
    """The place of an entry, which no other process makes meanwhile."""
    root = private_folder()
    with FileLock(root / f"{name}.lock"):
        yield root / name


@contextlib.contextmanager
def workshop(entry: Path) -> Iterator[Path]:
    """A folder to make an entry in, while its lock is held. Left without error, it is the entry."""
    prefix = f"making-{entry.name}-"
    for abandoned in entry.parent.glob(f"{prefix}*"):  # of builds that were killed
        shutil.rmtree(abandoned, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=prefix, dir=entry.parent))
    try:
        yield work
        if entry.exists():
            shutil.rmtree(entry)
        os.rename(work, entry)
    finally:
        shutil.rmtree(work, ignore_errors=True)
