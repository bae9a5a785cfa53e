"""The compiled kernels of one backend: from a device to the library and launchers for it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from kernelhub.backend import Implementation
from kernelhub.backends.native import abi, build
from kernelhub.backends.native.library import Launcher, Library, StreamOf
from kernelhub.backends.native.platform import Platform
from kernelhub.spec import contiguous_strides

_lock = build.Lock()

written: Callable[[tuple[Tensor, ...]], None] = torch._C._increment_version
"""Tells autograd that tensors were written to: what `torch.autograd.graph.increment_version` calls,
without its search for the kind of argument."""


def _leave_alone(library: Library) -> None:
    pass


class Launchers(dict[torch.device, Launcher]):
    """The launchers of one op by device. The first call for a device builds and loads."""

    def __init__(self, kernels: Kernels, op: str) -> None:
        self._kernels = kernels
        self._op = op
        self._archs: dict[torch.device, str] = {}

    def __missing__(self, device: torch.device) -> Launcher:
        kernels = self._kernels
        library = kernels.library(device)
        launcher = library.launcher(self._op, kernels.device_type, kernels.stream_of)
        self[device] = launcher
        return launcher

    def arch(self, device: torch.device) -> str:
        """The architecture of a device, as the platform's compiler calls it."""
        if device not in self._archs:
            self._archs[device] = self._kernels.arch_of(device)
        return self._archs[device]


def maker(like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """What makes new contiguous tensors, on the device of the tensor it is given, a `like`."""
    shape = tuple(shape)
    if (like.shape, like.stride(), like.dtype) == (shape, contiguous_strides(shape), dtype):
        return torch.empty_like
    sizes: Any = shape or ((),)
    if like.dtype is dtype:
        return lambda like: like.new_empty(*sizes)
    return lambda like: like.new_empty(*sizes, dtype=dtype)


@attrs.frozen
class Kernels:
    """What a backend of compiled kernels is made of.

    Attributes:
        platform: how its libraries are compiled.
        device_type: the torch device type that they run on.
        arch_of: the architecture of a device, as the platform's compiler calls it.
        stream_of: from a device index to the handle of torch's current stream on it; None where
            DLPack tells it (CUDA) or there are no streams.
        on_load: called with each library once it is loaded.
    """

    platform: Platform
    device_type: str
    arch_of: Callable[[Any], str]
    stream_of: StreamOf | None = None
    on_load: Callable[[Library], None] = _leave_alone
    _libraries: dict[str, Library] = attrs.field(factory=dict, init=False)

    def library(self, device: Any) -> Library:
        """The library for a device's architecture; built and loaded on first use."""
        arch = self.arch_of(device)
        with _lock.held():
            if arch not in self._libraries:
                path = build.ensure(self.platform, arch)
                library = Library(path, self.platform.name)
                self.on_load(library)
                self._libraries[arch] = library
            return self._libraries[arch]

    def unavailable(self, device: Any) -> list[str]:
        """Why no library can be had for a device. Compiles nothing."""
        return build.available(self.platform, self.arch_of(device))

    def implementations(self, ops: Iterable[str] = tuple(abi.OPS)) -> tuple[Implementation, ...]:
        """One implementation for each op, made by `make` in the module of the op's name."""
        return tuple(
            importlib.import_module(f"kernelhub.backends.native.{op}").make(Launchers(self, op))
            for op in ops
        )
