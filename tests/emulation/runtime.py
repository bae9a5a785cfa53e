"""The contents of the emulated `torch.musa`: its devices, streams and generators."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from typing import Any

import torch

from tests.emulation import build

_native = ctypes.PyDLL(str(build.library()))  # loading it registers the device
_native.emulated_musa_current_stream.restype = ctypes.c_int64
_native.emulated_musa_set_stream.argtypes = (ctypes.c_int, ctypes.c_int64)

# One device of each architecture that Moore Threads' stack still ships for: MTT S5000, MTT S4000.
_DEVICES = (("Emulated MTT S5000", (3, 1)), ("Emulated MTT S4000", (2, 2)))
_HANDLE_STEP = 0x1000  # handles look like addresses and differ from stream numbers

DeviceLike = Any  # an index, a name such as "musa:1", a torch.device, or None for the current one


def _index(device: DeviceLike = None) -> int:
    if not isinstance(device, int) and device is not None:
        device = torch.device(device)
        if device.type != "musa":
            raise ValueError(f"expected a musa device, got {device}")
        device = device.index
    if device is None:
        return current_device()
    if not 0 <= device < device_count():
        raise RuntimeError(f"musa: there is no device {device}, only {device_count()}")
    return device


# ---- devices ---------------------------------------------------------------------------------


def is_available() -> bool:
    return True


def is_initialized() -> bool:
    return True


def _is_in_bad_fork() -> bool:
    return False


def device_count() -> int:
    return int(_native.emulated_musa_device_count())


def current_device() -> int:
    return int(_native.emulated_musa_current_device())


def set_device(device: DeviceLike) -> None:
    _native.emulated_musa_set_device(_index(device))


class device:  # noqa: N801
    """Makes a device the current one for a `with` block; None changes nothing."""

    def __init__(self, device: DeviceLike) -> None:
        self.idx = _index(device)
        self._before: list[int] = []

    def __enter__(self) -> None:
        self._before.append(current_device())
        set_device(self.idx)

    def __exit__(self, *exception: object) -> None:
        set_device(self._before.pop())


def synchronize(device: DeviceLike = None) -> None:
    _index(device)


def empty_cache() -> None:
    """Host memory goes back by itself."""


def get_device_capability(device: DeviceLike = None) -> tuple[int, int]:
    return _DEVICES[_index(device)][1]


def get_device_name(device: DeviceLike = None) -> str:
    return _DEVICES[_index(device)][0]


# ---- streams ---------------------------------------------------------------------------------

Event = torch.Event


def _handle(stream_id: int) -> int:
    return stream_id * _HANDLE_STEP


def _current_raw_stream(index: int) -> int:
    """What torch_musa offers as `_MUSAC._musa_getCurrentRawStream`."""
    return _handle(_native.emulated_musa_current_stream(_index(index)))


class Stream(torch.Stream):
    """A queue of work. The emulated device does all work at once, so only its identity counts."""

    def __new__(cls, device: DeviceLike = None, priority: int = 0, **known: int) -> Stream:
        if known:  # the number of a stream that exists
            return super().__new__(cls, **known)
        return super().__new__(cls, device=f"musa:{_index(device)}", priority=priority)

    @property
    def musa_stream(self) -> int:
        """The handle that kernels are launched with; 0 is the default stream."""
        return _handle(self.stream_id)


def _stream(stream_id: int, index: int) -> Stream:
    kind = torch.Stream(device=f"musa:{index}").device_type  # PrivateUse1's number
    return Stream(stream_id=stream_id, device_index=index, device_type=kind)


def current_stream(device: DeviceLike = None) -> Stream:
    index = _index(device)
    return _stream(_native.emulated_musa_current_stream(index), index)


def default_stream(device: DeviceLike = None) -> Stream:
    return _stream(0, _index(device))


def set_stream(stream: torch.Stream) -> None:
    """Make a stream the current one, and its device too."""
    set_device(stream.device_index)
    _native.emulated_musa_set_stream(stream.device_index, stream.stream_id)


@contextlib.contextmanager
def stream(stream: torch.Stream | None) -> Iterator[None]:
    """Makes a stream and its device the current ones for a block; None changes nothing."""
    if stream is None:
        yield
        return
    device_before = current_device()
    stream_before = current_stream(stream.device_index)
    set_stream(stream)
    try:
        yield
    finally:
        set_stream(stream_before)
        set_device(device_before)


# ---- random numbers --------------------------------------------------------------------------

default_generators = tuple(
    torch.ops.emulated_musa.default_generator(index) for index in range(device_count())
)


def get_rng_state(device: DeviceLike = "musa") -> torch.Tensor:
    return default_generators[_index(device)].get_state()


def set_rng_state(state: torch.Tensor, device: DeviceLike = "musa") -> None:
    default_generators[_index(device)].set_state(state)


def manual_seed(seed: int) -> None:
    """Seed the current device."""
    default_generators[current_device()].manual_seed(seed)


def manual_seed_all(seed: int) -> None:
    for generator in default_generators:
        generator.manual_seed(seed)


def initial_seed() -> int:
    """The seed of the current device."""
    return default_generators[current_device()].initial_seed()
