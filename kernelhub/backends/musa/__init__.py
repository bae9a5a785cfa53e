"""The `musa` backend: the portable kernels compiled for Moore Threads GPUs."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import torch

from kernelhub.backend import VENDOR_PRIORITY, Backend
from kernelhub.backends.native.kernels import Kernels
from kernelhub.backends.native.platform import MUSA
from kernelhub.spec import Device


def _arch(device: Any) -> str:
    major, minor = _torch_musa().get_device_capability(device.index or 0)
    return f"mp_{major}{minor}"


def _stream(index: int) -> int:
    """The handle of torch's current stream on a device."""
    return _raw_stream()(index)


@lru_cache(maxsize=1)
def _raw_stream() -> Callable[[int], int]:
    found: Callable[[int], int] = importlib.import_module(
        "torch_musa"
    )._MUSAC._musa_getCurrentRawStream
    return found


def _torch_musa() -> Any:
    """`torch.musa`, which exists once torch_musa is loaded."""
    if getattr(torch, "musa", None) is None:
        importlib.import_module("torch_musa")
    return torch.musa  # type: ignore[attr-defined]


_kernels = Kernels(MUSA, "musa", _arch, _stream)


def _probe(device: Device | None) -> Iterable[str]:
    if getattr(torch, "musa", None) is None and importlib.util.find_spec("torch_musa") is None:
        return ["torch_musa is not installed: it comes with Moore Threads' PyTorch"]
    try:
        module = _torch_musa()
    except (ImportError, OSError, AttributeError) as error:
        return [f"torch_musa cannot be loaded: {error}"]
    if not module.is_available():
        return ["torch.musa finds no device: see `mthreads-gmi`"]
    if device is None or device.type != "musa":
        return []
    index = device.index or 0
    if index >= module.device_count():
        return [f"there is no {device}: torch.musa finds {module.device_count()}"]
    return _kernels.unavailable(device)


backend = Backend(
    name="musa",
    implementations=_kernels.implementations(),
    device_types=("musa",),
    probe=_probe,
    priority=VENDOR_PRIORITY,
    description="portable kernels compiled for Moore Threads GPUs",
    kernels=_kernels,
)
