"""Tensors of the emulated device: what torch promises of those of any device."""

from __future__ import annotations

import copy
import ctypes
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

DEVICES = ["musa:0", "musa:1"]


def test_a_tensor_knows_its_device() -> None:
    x = torch.empty(3, device="musa:1")
    assert (x.device.type, x.device.index, str(x.device)) == ("musa", 1, "musa:1")
    assert torch.empty(3, device="musa").device == torch.device("musa:0")
    assert x.is_musa and not x.is_cpu and not x.is_cuda
    assert torch.ones(3).musa(1).device == x.device
    assert torch._C._dispatch_keys(x).has(torch._C.DispatchKey.PrivateUse1)
    assert "device='musa:1'" in repr(x)


def test_memory_is_aligned_as_on_a_device() -> None:
    kept = [torch.empty(size, device="musa", dtype=torch.uint8) for size in (1, 7, 300)]
    assert all(t.data_ptr() % 256 == 0 for t in kept)
    assert torch.empty(0, device="musa").data_ptr() == 0
    assert torch.empty(513, device="musa", dtype=torch.float16)[1:].data_ptr() % 16 == 2


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
