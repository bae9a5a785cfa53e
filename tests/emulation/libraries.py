"""The portable kernels as libraries for the emulated devices, shipped as built ahead of time.

The `musa` backend finds, checks and loads them as it would Moore Threads' own: nothing in it is
replaced. Only the compiler is another one: the emulator stands in for the hardware, with the warps
of each part (32 lanes on mp_31, 128 on mp_22). The kernels are those of the `simt` backend; a
library in front of them says that it is for `musa`.
"""

from __future__ import annotations

import json
from pathlib import Path

import attrs

from kernelhub.backends.native import build, cache
from kernelhub.backends.native.platform import MUSA, SIMT, Platform

WARPS = {"mp_31": "warp32", "mp_22": "warp128"}
NAME = Path(__file__).with_name("name.cpp")


def _in_front_of(kernels: Path) -> Platform:
    """A library whose names are looked up in it first, then in that of the kernels."""
    return attrs.evolve(
        SIMT,
        name="musa",
        sources=lambda: (NAME,),
        compile_flags=lambda compiler, arch: SIMT.compile_flags(compiler, WARPS[arch]),
        link_flags=lambda compiler, arch: ("-shared", "-Wl,--no-as-needed", str(kernels)),
    )


def ship(folder: Path) -> None:
    """Put a library for each emulated architecture into `folder`."""
    for arch, warps in WARPS.items():
        library = build.build(_in_front_of(build.build(SIMT, warps)), arch, folder)
        manifest = json.loads(library.with_suffix(".json").read_text())
        # Of the sources that Moore Threads' compiler would have been given.
        manifest["sources"] = build.sources_hash(MUSA)
        manifest["sha256"] = cache.checksum(library)
        library.with_suffix(".json").write_text(json.dumps(manifest))
