"""The `cuda` backend: kernels compiled for NVIDIA GPUs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from kernelhub.backend import VENDOR_PRIORITY, Backend
from kernelhub.backends.native.kernels import Kernels
from kernelhub.backends.native.platform import CUDA
from kernelhub.spec import Device, DeviceDesc

_OLDEST = (8, 0)


def _arch(device: Any) -> str:
    major, minor = torch.cuda.get_device_capability(device.index or 0)
    # Kernels for compute capability 9.0 use instructions that only its own target has.
    return "sm_90a" if (major, minor) == (9, 0) else f"sm_{major}{minor}"


_kernels = Kernels(CUDA, "cuda", _arch)


def _probe(device: Device | None) -> Iterable[str]:
    if getattr(torch.version, "hip", None):
        return ["this torch is built for ROCm, whose 'cuda' devices are AMD's: use 'reference'"]
    if torch.version.cuda is None:
        return ["this torch is built without CUDA: install a CUDA build of torch"]
    if device is None or device.type != "cuda":
        return []
    if isinstance(device, DeviceDesc) or not torch.cuda.is_available():
        return ["torch finds no CUDA device: see `nvidia-smi`"]
    capability = torch.cuda.get_device_capability(device.index or 0)
    if capability < _OLDEST:
        wanted, got = (".".join(map(str, pair)) for pair in (_OLDEST, capability))
        return [f"needs compute capability {wanted} or later, {device} has {got}"]
    return _kernels.unavailable(device)


backend = Backend(
    name="cuda",
    implementations=_kernels.implementations(),
    device_types=("cuda",),
    probe=_probe,
    priority=VENDOR_PRIORITY,
    description="kernels compiled for NVIDIA GPUs, compute capability 8.0 and later",
    kernels=_kernels,
)
