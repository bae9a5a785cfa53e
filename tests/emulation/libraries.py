"""The portable kernels as libraries for the emulated devices, shipped as built ahead of time.

The `musa` backend finds, checks and loads them as it would Moore Threads' own: nothing in it is
replaced. Only the compiler is another one: the emulator stands in for the hardware, with the warps
of each part (32 lanes on mp_31, 128 on mp_22).
"""

from __future__ import annotations

import json
from pathlib import Path

import attrs

from kernelhub.backends.native import build, cache
from kernelhub.backends.native.compilers import Compiler
from kernelhub.backends.native.platform import MUSA, SIMT, Platform

WARPS = {"mp_31": "warp32", "mp_22": "warp128"}


def _emulated(arch: str) -> Platform:
    def flags(compiler: Compiler, _: str) -> tuple[str, ...]:
        return (*SIMT.compile_flags(compiler, WARPS[arch]), '-DKH_PLATFORM="musa"')

    def link_flags(compiler: Compiler, _: str) -> tuple[str, ...]:
        return SIMT.link_flags(compiler, WARPS[arch])

    return attrs.evolve(SIMT, name="musa", compile_flags=flags, link_flags=link_flags)


def ship(folder: Path) -> None:
    """Put a library for each emulated architecture into `folder`."""
    for arch in WARPS:
        library = build.build(_emulated(arch), arch, folder)
        manifest = json.loads(library.with_suffix(".json").read_text())
        # Of the sources that Moore Threads' compiler would have been given.
        manifest["sources"] = build.sources_hash(MUSA)
        manifest["sha256"] = cache.checksum(library)
        library.with_suffix(".json").write_text(json.dumps(manifest))
