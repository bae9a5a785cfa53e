"""Compiles the emulated device, once for each content, torch and compiler."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

import torch
from filelock import FileLock

SOURCE = Path(__file__).with_name("device.cpp")
CACHE = Path(__file__).parents[2] / "build" / "emulation"


def _command(source: Path) -> list[str]:
    # Not at the top: it imports setuptools and takes a while.
    from torch.utils.cpp_extension import include_paths, library_paths

    return [
        *("g++", "-std=c++17", "-O1", "-fPIC", "-shared", "-Wall", "-Wextra", str(source)),
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        *(part for path in include_paths() for part in ("-isystem", path)),
        *(f"-L{path}" for path in library_paths()),
        *("-ltorch_cpu", "-ltorch", "-lc10"),
    ]


def _key(command: list[str]) -> str:
    compiler = subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True)
    parts = [SOURCE.read_text(), *command, torch.__version__, compiler.stdout]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def library() -> Path:
    """The compiled device. Processes that ask at once wait for the one that compiles."""
    command = _command(SOURCE)
    path = CACHE / f"device-{_key(command)}.so"
    if path.exists():
        return path
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(CACHE / "lock"):
        if not path.exists():
            unfinished = path.with_suffix(f".{os.getpid()}")
            try:
                done = subprocess.run(
                    [*command, "-o", str(unfinished)], capture_output=True, text=True
                )
                if done.returncode != 0:
                    raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
                unfinished.replace(path)
            finally:
                unfinished.unlink(missing_ok=True)
    return path
