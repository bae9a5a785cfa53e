"""The portable kernels behind the MUSA vendor header, on an NVIDIA GPU.

A pytest plug-in: `pytest -p tests.vendor.musa_on_cuda_backend --kernelhub-backend musa_on_cuda`.
The header's MUSA names are defined on top of CUDA, so that it is compiled and run, not only read.
"""

from __future__ import annotations

from pathlib import Path

import attrs

from kernelhub import plugins, registry
from kernelhub.backend import Backend
from kernelhub.backends.cuda import backend as cuda
from kernelhub.backends.native.kernels import Kernels
from kernelhub.backends.native.platform import CUDA, includes_of, portable_sources

SHIM = Path(__file__).parent / "musa_on_cuda"

PLATFORM = attrs.evolve(
    CUDA,
    name="musa",
    sources=portable_sources,
    includes=lambda: (*includes_of("musa")(), SHIM),
)


kernels = Kernels(PLATFORM, "cuda", cuda.kernels.arch_of)
backend = Backend(
    name="musa_on_cuda",
    implementations=kernels.implementations(),
    device_types=("cuda",),
    automatic=False,
    kernels=kernels,
)

plugins.load()
registry.add_backend(backend)
