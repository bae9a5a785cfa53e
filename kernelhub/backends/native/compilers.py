"""Finds the compilers and asks for their versions. Reads the environment when asked, not before."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import attrs

from kernelhub.errors import BuildError

_VERSION_TIMEOUT_S = 60
_CUDA_HOMES = (Path("/usr/local/cuda"),)
_MUSA_HOMES = (Path("/usr/local/musa"), Path("/opt/musa"))


@attrs.frozen
class Compiler:
    """A compiler that was found: what it is, where it is, which version it says it has."""

    name: str
    path: str
    version: str

    def at_least(self, oldest: tuple[int, ...], what_to_do: str) -> Compiler:
        """Itself; `BuildError` where it is older."""
        if tuple(map(int, self.version.split("."))) < oldest:
            wanted = ".".join(map(str, oldest))
            raise BuildError(
                f"{self.name} {self.version} ({self.path}) is too old, {wanted} or later is "
                f"needed: {what_to_do}"
            )
        return self


def gxx() -> Compiler:
    """The host compiler."""
    mend = "install g++ 9 or later (Debian: `apt-get install g++`)"
    path = _first("g++", [_on_path("g++")], mend)
    return _compiler("g++", path, "-dumpfullversion", r"^(\d+(?:\.\d+)*)", mend).at_least(
        (9,), mend
    )


def nvcc() -> Compiler:
    """NVIDIA's compiler: of $CUDA_HOME, $CUDA_PATH, the path, or /usr/local/cuda."""
    mend = "install the CUDA toolkit 12.0 or later, or set CUDA_HOME to where it is"
    named = [home / "bin" / "nvcc" for home in _homes("CUDA_HOME", "CUDA_PATH")]
    usual = [home / "bin" / "nvcc" for home in _CUDA_HOMES]
    path = _first("nvcc", [*named, _on_path("nvcc"), *usual], mend)
    found = _compiler("nvcc", path, "--version", r"release \S+, V(\d+(?:\.\d+)*)", mend)
    gxx()  # nvcc calls it for the host side
    return found.at_least((12, 0), mend)


def mcc() -> Compiler:
    """Moore Threads' compiler: $PYTORCH_MCC, or of $MUSA_HOME, $MUSA_PATH or the usual folders."""
    mend = "install the MUSA SDK, or set MUSA_HOME to where it is"
    named = os.environ.get("PYTORCH_MCC")
    homes = [*_homes("MUSA_HOME", "MUSA_PATH"), *_MUSA_HOMES]
    places = [home / "bin" / "mcc" for home in homes]
    chosen = [_on_path(named) or Path(named)] if named else [*places, _on_path("mcc")]
    path = _first("mcc", chosen, mend)
    return _compiler("mcc", path, "--version", r"mcc version (\d+(?:\.\d+)*)", mend)


FINDERS = {"g++": gxx, "nvcc": nvcc, "mcc": mcc}
"""What `kernelhub doctor` asks for."""


def need_file(path: Path, what: str) -> None:
    if not path.is_file():
        raise BuildError(f"{path} is missing, {what}")


def _homes(*variables: str) -> list[Path]:
    # Absolute: compilers run in another folder.
    return [Path(os.environ[name]).absolute() for name in variables if os.environ.get(name)]


def _on_path(name: str) -> Path | None:
    found = shutil.which(name)
    return Path(found).absolute() if found else None


def _first(name: str, places: Iterable[Path | None], mend: str) -> Path:
    looked = list(dict.fromkeys(place for place in places if place is not None))
    for place in looked:
        if place.is_file() and os.access(place, os.X_OK):
            return place
    where = ", ".join(["PATH", *map(str, looked)])
    raise BuildError(f"{name} was not found (looked at {where}): {mend}")


def _compiler(name: str, path: Path, flag: str, pattern: str, mend: str) -> Compiler:
    try:
        run = subprocess.run(
            [str(path), flag],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_VERSION_TIMEOUT_S,
            env={"LANG": "C", "PATH": os.environ.get("PATH", os.defpath)},
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"{path} cannot be run ({error}): {mend}") from error
    found = re.search(pattern, run.stdout + run.stderr, re.MULTILINE)
    if run.returncode != 0 or found is None:
        said = " ".join((run.stdout + run.stderr).split())[:200]
        raise BuildError(f"{path} {flag} names no version ({said!r}): {mend}")
    return Compiler(name, str(path), found[1])
