"""The emulated device itself: what torch and torch_musa promise of a device."""

from __future__ import annotations

import copy
import ctypes
import importlib.util
import io
import pickle
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.emulation import musa

DEVICES = ["musa:0", "musa:1"]


@pytest.fixture(autouse=True)
def current_device_stays() -> Any:
    yield
    assert torch.musa.current_device() == 0
    assert torch.musa.current_stream(0).musa_stream == torch.musa.current_stream(1).musa_stream == 0


# ---- devices ---------------------------------------------------------------------------------


def test_module() -> None:
    assert torch.musa.is_available()
    assert torch.musa.device_count() == 2
    assert [torch.musa.get_device_capability(i) for i in range(2)] == [(3, 1), (2, 2)]
    assert torch.musa.get_device_capability() == (3, 1)
    assert torch.musa.get_device_name("musa:1") == "Emulated MTT S4000"
    assert torch.version.musa == "5.2 (emulated)"
    assert torch.accelerator.current_accelerator() == torch.device("musa")
    assert torch.get_device_module("musa") is torch.musa


def test_torch_musa_can_be_found() -> None:
    import torch_musa

    assert importlib.util.find_spec("torch_musa") is not None
    assert torch_musa.__version__
    assert torch_musa._MUSAC._musa_getCurrentRawStream(1) == 0


def test_install_again_changes_nothing() -> None:
    before = torch.musa
    assert musa.install() is before is torch.musa


def test_a_tensor_knows_its_device() -> None:
    x = torch.empty(3, device="musa:1")
    assert (x.device.type, x.device.index, str(x.device)) == ("musa", 1, "musa:1")
    assert torch.empty(3, device="musa").device == torch.device("musa:0")
    assert x.is_musa and not x.is_cpu and not x.is_cuda
    assert torch.ones(3).musa(1).device == x.device
    assert torch._C._dispatch_keys(x).has(torch._C.DispatchKey.PrivateUse1)
    assert "device='musa:1'" in repr(x)


def test_current_device() -> None:
    with torch.musa.device(1):
        assert torch.musa.current_device() == 1
        assert torch.empty(1, device="musa").device.index == 1
        assert (torch.empty(1, device="musa:0") + 1).device.index == 0
        with torch.musa.device("musa:0"):
            assert torch.musa.get_device_capability() == (3, 1)
        assert torch.musa.get_device_capability() == (2, 2)
        with torch.musa.device(None):
            assert torch.musa.current_device() == 1
    torch.musa.set_device("musa:1")
    assert torch.musa.current_device() == torch.accelerator.current_device_index() == 1
    torch.musa.set_device(0)


@pytest.mark.parametrize("device", [2, -1, "musa:5"])
def test_there_are_only_two_devices(device: Any) -> None:
    with pytest.raises(RuntimeError, match="there is no device"):
        torch.musa.set_device(device)
    with pytest.raises(RuntimeError, match="there is no device"):
        torch.empty(1, device="musa:2")


def test_memory_is_aligned_as_on_a_device() -> None:
    kept = [torch.empty(size, device="musa", dtype=torch.uint8) for size in (1, 7, 300)]
    assert all(t.data_ptr() % 256 == 0 for t in kept)
    assert torch.empty(0, device="musa").data_ptr() == 0
    assert torch.empty(513, device="musa", dtype=torch.float16)[1:].data_ptr() % 16 == 2


# ---- streams ---------------------------------------------------------------------------------


def test_streams() -> None:
    import torch_musa

    raw = torch_musa._MUSAC._musa_getCurrentRawStream
    first, second = torch.musa.Stream(), torch.musa.Stream(device="musa:1")
    handles = {0, first.musa_stream, second.musa_stream}
    assert len(handles) == 3
    assert (first.device, second.device) == (torch.device("musa:0"), torch.device("musa:1"))
    with torch.musa.stream(second):
        assert torch.musa.current_device() == 1
        assert torch.musa.current_stream() == second
        assert torch.musa.current_stream(1).musa_stream == raw(1) == second.musa_stream
        assert torch.musa.current_stream("musa:0").musa_stream == raw(0) == 0
        with torch.musa.stream(first):
            assert (torch.musa.current_device(), raw(0)) == (0, first.musa_stream)
        assert torch.musa.current_device() == 1
        with torch.musa.stream(None):
            assert torch.musa.current_stream() == second
    assert torch.musa.default_stream(1).musa_stream == raw(1) == 0


def test_set_stream() -> None:
    stream = torch.musa.Stream(device=1)
    torch.musa.set_stream(stream)
    assert torch.accelerator.current_stream(1).stream_id == stream.stream_id
    assert torch.musa.current_device() == 1
    torch.musa.set_stream(torch.musa.default_stream(1))
    torch.musa.set_device(0)


def test_streams_of_torch_itself() -> None:
    with torch.musa.Stream(device="musa:1") as stream:
        assert torch.musa.current_stream(1) == stream
    start, end = torch.musa.Event(enable_timing=True), torch.musa.Event(enable_timing=True)
    start.record()
    torch.ones(10, device="musa").record_stream(torch.musa.current_stream())
    end.record()
    end.synchronize()
    torch.musa.synchronize()
    assert start.elapsed_time(end) > 0
    assert torch.musa.current_stream().query()


def test_threads_have_current_devices_of_their_own() -> None:
    seen: list[int] = []
    with torch.musa.device(1), torch.musa.stream(torch.musa.Stream()):
        thread = threading.Thread(
            target=lambda: seen.extend(
                [torch.musa.current_device(), torch.musa.current_stream(1).musa_stream]
            )
        )
        thread.start()
        thread.join()
    assert seen == [0, 0]


# ---- random numbers --------------------------------------------------------------------------


def _draw(device: str, generator: torch.Generator | None = None) -> list[float]:
    drawn: list[float] = torch.randn(4, device=device, generator=generator).tolist()
    return drawn


@pytest.mark.parametrize("device", DEVICES)
def test_generators_are_reproducible(device: str) -> None:
    generator = torch.Generator(device).manual_seed(5)
    assert generator.device == torch.device(device)
    state = generator.get_state()
    first, second = _draw(device, generator), _draw(device, generator)
    assert first != second
    generator.set_state(state)
    assert _draw(device, generator) == first
    assert _draw(device, torch.Generator(device).manual_seed(5)) == first
    assert _draw(device, torch.Generator(device).manual_seed(6)) != first
    twin = generator.clone_state()
    assert twin.device == generator.device
    assert _draw(device, twin) == _draw(device, generator) == second


def test_default_generators_are_seeded_by_torch() -> None:
    torch.manual_seed(7)
    first = [_draw(device) for device in DEVICES]
    assert [_draw(device) for device in DEVICES] != first
    torch.manual_seed(7)
    host = torch.randn(4)  # draws from a generator of its own
    assert [_draw(device) for device in DEVICES] == first
    torch.musa.manual_seed_all(7)
    assert torch.initial_seed() == torch.musa.initial_seed() == 7
    assert host.tolist() != torch.randn(4).tolist()
    assert [_draw(device) for device in DEVICES] == first


def test_one_device_is_seeded_alone() -> None:
    torch.musa.manual_seed_all(1)
    zero, one = _draw("musa:0"), _draw("musa:1")
    torch.musa.manual_seed(1)
    assert _draw("musa:0") == zero
    assert _draw("musa:1") != one
    state = torch.musa.get_rng_state("musa:1")
    again = _draw("musa:1")
    torch.musa.set_rng_state(state, "musa:1")
    assert _draw("musa:1") == again


def test_fork_rng_gives_the_state_back() -> None:
    torch.manual_seed(3)
    with torch.random.fork_rng(devices=[0, 1], device_type="musa"):
        inside = _draw("musa:1")
    assert _draw("musa:1") == inside


def test_generators_of_the_host_are_refused() -> None:
    with pytest.raises(RuntimeError, match="Expected a 'musa' device type for generator"):
        torch.empty(3, device="musa").normal_(generator=torch.Generator())


# ---- what torch does with tensors ------------------------------------------------------------


def _pickled(x: Tensor) -> Tensor:
    loaded: Tensor = pickle.loads(pickle.dumps(x))
    return loaded


def _saved(x: Tensor) -> Tensor:
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    loaded: Tensor = torch.load(file)
    return loaded


DUPLICATES = [
    (duplicate, dtype)
    for duplicate in (copy.deepcopy, _pickled, _saved, torch.clone)
    for dtype in (torch.float32, torch.bfloat16, torch.bool, torch.float8_e4m3fn)
    # torch pickles no float8 tensors, of any device; it saves them
    if (duplicate, dtype) != (_pickled, torch.float8_e4m3fn)
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("duplicate", "dtype"), DUPLICATES)
def test_copies_are_equal_and_apart(duplicate: Any, dtype: torch.dtype, device: str) -> None:
    x = torch.arange(6).to(dtype).to(device).view(2, 3).t()
    y = duplicate(x)
    assert (y.device, y.dtype, y.stride()) == (x.device, x.dtype, x.stride())
    assert y.data_ptr() != x.data_ptr()
    assert torch.equal(y.cpu().float(), x.cpu().float())
    y.fill_(0)
    assert x.cpu().float().sum() > 0


def test_autograd() -> None:
    x = torch.arange(6.0, device="musa:1").view(2, 3).requires_grad_()
    w = torch.ones(3, 2, device="musa:1", requires_grad=True)
    y = ((x[:, :2] * 2).sum() + (x @ w).tanh().pow(2).sum()) * 3
    y.backward()
    h = x.detach().cpu().requires_grad_()
    v = torch.ones(3, 2, requires_grad=True)
    (((h[:, :2] * 2).sum() + (h @ v).tanh().pow(2).sum()) * 3).backward()
    for got, expected in ((x.grad, h.grad), (w.grad, v.grad)):
        assert got is not None and expected is not None
        assert got.device == torch.device("musa:1")
        torch.testing.assert_close(got.cpu(), expected)


def test_a_module_trains() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 1).to("musa")
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    x = torch.randn(32, 3, device="musa")
    losses = []
    for _ in range(30):
        loss = (layer(x)[:, 0] - x.sum(-1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 10


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile(backend: str) -> None:
    def function(x: Tensor, memory: Tensor) -> Tensor:
        y = torch.nn.functional.silu(x @ x.t()) + torch.arange(4, device=x.device)
        memory[:, 1:].add_(y[:, :2])
        return y.view(2, 8).softmax(-1)

    x, memory = torch.randn(4, 6), torch.zeros(4, 3)
    expected = function(x, memory)
    torch._dynamo.reset()
    compiled = torch.compile(function, backend=backend, fullgraph=True)
    for device in DEVICES:
        on_device = torch.zeros(4, 3, device=device)
        got = compiled(x.to(device), on_device)
        assert got.device == torch.device(device)
        torch.testing.assert_close(got.cpu(), expected)
        torch.testing.assert_close(on_device.cpu(), memory)


# ---- DLPack ----------------------------------------------------------------------------------

_EXTENSION_DEVICE = 12


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("dtype", ctypes.c_uint8 * 4),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


def _dltensor(x: Tensor) -> _DLTensor:
    """What DLPack's C interface says of a tensor."""
    capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
    capsule_pointer.restype = ctypes.c_void_p
    capsule_pointer.argtypes = (ctypes.py_object, ctypes.c_char_p)
    table = capsule_pointer(torch.Tensor.__dlpack_c_exchange_api__, b"dlpack_exchange_api")
    # Two words of header, then the functions; the fourth describes a tensor.
    address = ctypes.cast(table, ctypes.POINTER(ctypes.c_void_p))[2 + 3]
    function = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.POINTER(_DLTensor))
    described = _DLTensor()
    assert function(address)(x, ctypes.byref(described)) == 0
    return described


@pytest.mark.skipif(
    not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"), reason="came with torch 2.10"
)
@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn, torch.int32])
def test_dlpack_describes_the_tensor(index: int, dtype: torch.dtype) -> None:
    x = torch.zeros(4, 6, device=f"musa:{index}").to(dtype)[1:, ::2]
    found = _dltensor(x)
    assert (found.device_type, found.device_id) == (_EXTENSION_DEVICE, index)
    assert found.data + found.byte_offset == x.data_ptr()
    assert (found.shape[: found.ndim], found.strides[: found.ndim]) == ([3, 3], [6, 2])


def test_dlpack_shares_memory() -> None:
    x = torch.arange(6.0, device="musa:1")
    y = torch.from_dlpack(torch.utils.dlpack.to_dlpack(x))
    assert (y.device, y.data_ptr()) == (x.device, x.data_ptr())
    y[0] = 9
    assert x.tolist() == [9, 1, 2, 3, 4, 5]


# ---- the process -----------------------------------------------------------------------------


def test_a_renamed_device_type_is_refused() -> None:
    program = (
        "import torch\n"
        "from tests.emulation import musa\n"
        "torch.utils.rename_privateuse1_backend('other')\n"
        "musa.install()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "RuntimeError: torch already has the devices of a package for 'other'" in done.stderr
