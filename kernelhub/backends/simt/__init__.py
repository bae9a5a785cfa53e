"""The `simt` backend: the portable kernels on CPU tensors, through an emulator of a GPU.

For tests and for the development of kernels; never chosen automatically.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from kernelhub.backend import VENDOR_PRIORITY, Backend
from kernelhub.backends.native.kernels import Kernels
from kernelhub.backends.native.library import Library
from kernelhub.backends.native.platform import SIMT
from kernelhub.backends.simt.options import VARIABLE, Options, from_environment
from kernelhub.errors import PolicyError
from kernelhub.spec import Device


@lru_cache(maxsize=1)
def _options() -> Options:
    return from_environment()


def _arch(device: Any) -> str:
    return _options().arch


def _null_stream(index: int) -> int:
    return 0


def configure(library: Library, options: Options) -> None:
    """Set an emulator library's options for its next launches."""
    function = library.function("kh_simt_configure")
    function.argtypes = (ctypes.c_char_p, ctypes.c_uint64, ctypes.c_int, ctypes.c_double)
    wrong = function(options.order.encode(), options.seed, options.threads, options.timeout_s)
    if wrong:
        error = library.function("kh_simt_error")
        error.restype = ctypes.c_char_p
        raise PolicyError(f"{VARIABLE}: the emulator refuses {error().decode()}")


_kernels = Kernels(
    SIMT, "cpu", _arch, _null_stream, on_load=lambda library: configure(library, _options())
)


def _probe(device: Device | None) -> Iterable[str]:
    try:
        _options()
    except PolicyError as error:
        return [str(error)]
    return _kernels.unavailable(device)


backend = Backend(
    name="simt",
    implementations=_kernels.implementations(),
    device_types=("cpu",),
    probe=_probe,
    priority=VENDOR_PRIORITY,
    automatic=False,
    description="the portable kernels on CPU tensors, through an emulator of a GPU (for tests)",
    kernels=_kernels,
)
