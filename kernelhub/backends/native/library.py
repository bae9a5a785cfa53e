"""Loads compiled libraries and calls what is in them.

A launcher is a callable for one op of one library: it takes the fields of the op's argument struct,
in order, reads the tensors' addresses, shapes and strides, and queues the kernel on the current
stream of their device. There are two of one behaviour: the compiled one of `csrc/binding`, and one
in ctypes, which needs nothing but Python and serves wherever the first cannot be built.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import importlib.util
import logging
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch.autograd import forward_ad

from kernelhub import dispatch
from kernelhub.backends.native import abi, build, platform
from kernelhub.errors import BuildError, KernelError
from kernelhub.spec import OpSpec

logger = logging.getLogger("kernelhub")

Launcher = Callable[..., None]
StreamOf = Callable[[int], int]
"""From a device index to the handle of its current stream."""

# DLPack's numbers; the last is its name for every device that registers itself with torch.
_DEVICE_TYPES = {"cpu": 1, "cuda": 2}
_EXTENSION_DEVICE = 12


class Library:
    """A loaded library whose ABI is this kernelhub's.

    Raises `BuildError` where the file cannot be loaded, belongs to another platform, was compiled
    with another ABI or lacks a function.
    """

    def __init__(self, path: Path, platform_name: str) -> None:
        self.path = path
        try:
            self._handle = ctypes.CDLL(str(path))
        except OSError as error:
            raise BuildError(f"{path} cannot be loaded: {error}") from error
        missing = [name for name in abi.symbols() if not hasattr(self._handle, name)]
        if missing:
            raise self._unfit(f"it lacks {', '.join(missing)}")
        for name in ("kh_abi_fingerprint", "kh_platform", "kh_last_error"):
            getattr(self._handle, name).restype = ctypes.c_char_p
        version, fingerprint = self._handle.kh_abi_version(), self._text("kh_abi_fingerprint")
        if (version, fingerprint) != (abi.VERSION, abi.fingerprint()):
            raise self._unfit(
                f"its ABI is {version} ({fingerprint}), "
                f"this kernelhub's is {abi.VERSION} ({abi.fingerprint()})"
            )
        if self._text("kh_platform") != platform_name:
            found = self._text("kh_platform")
            raise self._unfit(f"it is for the platform '{found}', not '{platform_name}'")
        self.warp_size: int = self._handle.kh_warp_size()

    def _text(self, function: str) -> str:
        text: bytes = getattr(self._handle, function)()
        return text.decode(errors="replace")

    def _unfit(self, reason: str) -> BuildError:
        return BuildError(f"{self.path} does not fit: {reason}; build it anew")

    def function(self, name: str) -> Any:
        """An exported function, for what the ABI does not cover."""
        return getattr(self._handle, name)

    def launcher(
        self, op: str, device_type: str, stream_of: StreamOf | None, *, fast: bool | None = None
    ) -> Launcher:
        """The launcher of an op for devices of a type.

        `stream_of` gives the current stream; None is torch's own one on CUDA, of which the compiled
        launcher learns through DLPack, and none on other devices. `fast` asks for one of the two
        launchers; by default the compiled one is taken where it can be had.
        """
        binding = None if fast is False else fast_binding()
        if fast and binding is None:
            raise BuildError("; ".join(why_not_fast()))
        if binding is None:
            if stream_of is None and device_type == "cuda":
                stream_of = _cuda_stream
            return _CtypesLauncher(self, op, device_type, stream_of)
        launcher: Launcher = binding.Launcher(
            name=op,
            kernel=_address(self.function(abi.op_symbol(op))),
            last_error=_address(self.function("kh_last_error")),
            kinds="".join(_LETTERS[field.kind] for field in abi.OPS[op]),
            device_type=_DEVICE_TYPES.get(device_type, _EXTENSION_DEVICE),
            tensor_type=torch.Tensor,
            error_type=KernelError,
            stream_of=stream_of,
            owner=self._handle,
        )
        return launcher


def _cuda_stream(index: int) -> int:
    return int(torch.cuda.current_stream(index).cuda_stream)


_LETTERS = {"tensor": "t", "int64": "q", "float64": "d"}


def _address(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0


@lru_cache(maxsize=1)
def why_not_fast() -> tuple[str, ...]:
    """Why calls go through ctypes; empty where the compiled launcher can be had."""
    if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        return (f"torch {torch.__version__} has no DLPack exchange interface: 2.10 or later has",)
    return tuple(build.available(platform.BINDING, platform.soabi()))


@lru_cache(maxsize=1)
def fast_binding() -> Any:
    """The compiled binding, built where needed; None, the reason logged, where it cannot be."""
    reasons = why_not_fast()
    if not reasons:
        try:
            binding = _load_binding(build.ensure(platform.BINDING, platform.soabi()))
            dispatch.use_keys(lambda spec, checks: _key_of(binding, spec, checks))
            return binding
        except (BuildError, ImportError) as error:
            reasons = (str(error),)
    logger.info("calls of compiled kernels go through ctypes: %s", "; ".join(reasons))
    return None


def _key_of(binding: Any, spec: OpSpec, checks: bool = True) -> dispatch.KeyOf:
    written = spec.mutated
    key: dispatch.KeyOf = binding.Key(
        roles="".join(
            "w" if p.name in written else "n" if p.any_number else "r" for p in spec.params
        ),
        tensor_type=torch.Tensor,
        parameter_type=torch.nn.Parameter,
        dtype_type=torch.dtype,
        grad_enabled=torch.is_grad_enabled,
        inference_mode=torch.is_inference_mode_enabled,
        watchers=dispatch.WATCHERS,
        forward_ad=forward_ad,
        checks=checks,
    )
    return key


def _load_binding(path: Path) -> Any:
    name = "kernelhub_binding"
    loader = importlib.machinery.ExtensionFileLoader(name, str(path))
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    if module.fingerprint != abi.fingerprint():
        raise ImportError(f"{path} was built for another ABI")
    return module


class _CtypesLauncher:
    """The launcher in ctypes; see `Library.launcher`."""

    def __init__(
        self, library: Library, op: str, device_type: str, stream_of: StreamOf | None
    ) -> None:
        self._library = library
        self._op = op
        self._fields = abi.OPS[op]
        self._pack = abi.packing(op).pack
        self._device_type = device_type
        self._stream_of = stream_of
        self._kernel = library.function(abi.op_symbol(op))
        self._kernel.restype = ctypes.c_int32
        self._kernel.argtypes = (ctypes.c_char_p, ctypes.c_void_p)

    def __call__(self, *values: Any) -> None:
        if len(values) != len(self._fields):
            raise TypeError(f"{self._op}: expected {len(self._fields)} positional arguments")
        device, packed = None, [0]
        for position, (field, value) in enumerate(zip(self._fields, values, strict=True)):
            if field.kind != "tensor":
                packed.append(value)
                continue
            if value is None:
                packed += _ABSENT
                continue
            device = self._check(position, value, device)
            pad = _ZEROS[value.dim()]
            packed += (value.data_ptr(), abi.DTYPES.get(value.dtype, -1), value.dim())
            packed += (*value.shape, *pad, *value.stride(), *pad)
        index = (device.index or 0) if device is not None else 0
        packed[0] = index
        stream = self._stream_of(index) if self._stream_of else 0
        if self._kernel(self._pack(*packed), stream) != 0:
            raise KernelError(f"{self._op}: {self._library._text('kh_last_error')}")

    def _check(self, position: int, value: Any, device: torch.device | None) -> torch.device:
        where = f"{self._op}: argument {position}"
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{where}: expected a tensor, got {type(value).__name__}")
        if value.dim() > abi.MAX_DIMS:
            raise KernelError(
                f"{where}: expected at most {abi.MAX_DIMS} dimensions, got {value.dim()}"
            )
        found: torch.device = value.device
        if found.type != self._device_type or (device is not None and found != device):
            raise KernelError(f"{where} is on another device than the kernel")
        return found


_ABSENT = (0,) * (3 + 2 * abi.MAX_DIMS)
_ZEROS = tuple((0,) * (abi.MAX_DIMS - ndim) for ndim in range(abi.MAX_DIMS + 1))
