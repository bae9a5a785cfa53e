"""Operators on the emulated device read and write what those of the CPU do, wherever it lies."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

ROWS = torch.tensor([3, 0])


def _columns(memory: Tensor) -> Tensor:
    """Every second column of rows 1 to 4: strided both ways, and not at the memory's start."""
    return memory.as_strided((4, 3), (6, 2), 6)


def _bits(t: Tensor) -> Tensor:
    return t.contiguous().view(torch.uint8)


def _rows(memory: Tensor) -> Tensor:
    return torch.arange(6.0, device=memory.device).view(2, 3)


def _foreach(memory: Tensor) -> Tensor:
    torch._foreach_add_([memory[:4], _columns(memory)[2:]], 1.0)
    return memory


# Each writes into a view of 36 floats, and returns what the operator does.
WRITES: dict[str, Callable[[Tensor], Tensor]] = {
    "add_": lambda m: _columns(m).add_(1),
    "add_ of itself": lambda m: _columns(m).add_(_columns(m)),
    "add_ of the transposed": lambda m: m.view(6, 6)[:, 3:].add_(m.view(6, 6)[:3].clone().t()),
    "fill_": lambda m: _columns(m).fill_(7),
    "zero_": lambda m: _columns(m).zero_(),
    "copy_ from the host": lambda m: _columns(m).copy_(torch.arange(12.0).view(4, 3)),
    "copy_ from another type": lambda m: _columns(m).copy_(
        torch.arange(3, dtype=torch.int16, device=m.device)
    ),
    "copy_ of an overlap": lambda m: m[1:].copy_(m[:-1].clone()),
    "assigned slice": lambda m: _columns(m)[1:3].__setitem__(slice(None), 5) or m,
    "assigned mask": lambda m: m.__setitem__(m > 20, -1) or m,
    "assigned by indices of the host": lambda m: _columns(m).__setitem__(ROWS, 9.0) or m,
    "index_copy_": lambda m: _columns(m).index_copy_(0, ROWS.to(m.device), _rows(m)),
    "index_add_": lambda m: _columns(m).index_add_(0, ROWS.to(m.device), _rows(m)),
    "index_put_": lambda m: _columns(m).index_put_((ROWS.to(m.device),), _rows(m)),
    "scatter_": lambda m: _columns(m).scatter_(1, ROWS.to(m.device)[:, None] % 3, 4.0),
    "masked_fill_": lambda m: _columns(m).masked_fill_(_columns(m) > 9, 0),
    "add(out=)": lambda m: torch.add(_columns(m), 1, out=_columns(m)),
    "mm(out=)": lambda m: torch.mm(m[:12].view(4, 3), m[:9].view(3, 3), out=_columns(m)),
    "sum(out=)": lambda m: torch.sum(m.view(2, 18), 0, out=m.as_strided((18,), (2,), 0)),
    "cat(out=)": lambda m: torch.cat([_rows(m), _rows(m)], out=_columns(m)),
    "sort(out=)": lambda m: torch.sort(
        _rows(m),
        descending=True,
        out=(m.as_strided((2, 3), (6, 2), 3), torch.empty(2, 3, dtype=torch.long).to(m.device)),
    )[0],
    "foreach": _foreach,
    "bytes": lambda m: m.view(torch.uint8)[5:9].fill_(255).clone(),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
@pytest.mark.parametrize("device", ["musa:0", "musa:1"])
def test_writes_go_where_the_cpu_writes_them(
    write: Callable[[Tensor], Tensor], device: str
) -> None:
    start = torch.arange(36.0)
    expected, got = start.clone(), start.to(device)
    expected_result, result = write(expected), write(got)
    assert result.device == torch.device(device)
    assert (result.shape, result.stride()) == (expected_result.shape, expected_result.stride())
    assert torch.equal(_bits(result.cpu()), _bits(expected_result))
    assert torch.equal(_bits(got.cpu()), _bits(expected))
    assert not torch.equal(_bits(expected), _bits(start))


# Each computes something from a 4 by 6 matrix of floats.
READS: dict[str, Callable[[Tensor], object]] = {
    "full": lambda x: torch.full((3,), 255, dtype=torch.uint8, device=x.device),
    "arange": lambda x: torch.arange(5, device=x.device),
    "eye": lambda x: torch.eye(3, device=x.device),
    "tril_indices": lambda x: torch.tril_indices(3, 3, device=x.device),
    "tensor": lambda x: torch.tensor([[1.5, 2], [3, 4]], device=x.device),
    "clone of a view": lambda x: x.t()[1:].clone(),
    "contiguous": lambda x: x.t().contiguous(),
    "==": lambda x: x == x.flip(0),
    "any": lambda x: (x > 20).any(),
    "equal": lambda x: torch.equal(x, x.clone()) and not torch.equal(x, x + 1),
    "item": lambda x: x[1, 2].item(),
    "view of another type": lambda x: x.view(torch.int16)[:, ::2],
    "float8": lambda x: x.to(torch.float8_e4m3fn).view(torch.uint8),
    "float8 and back": lambda x: x.to(torch.float8_e4m3fn).to(torch.bfloat16),
    "unfold": lambda x: x.unfold(1, 2, 2),
    "split": lambda x: torch.stack([part.sum() for part in x.split(4, 1)]),
    "expand": lambda x: x[:, None].expand(4, 3, 6).sum(-1),
    "indices of the host": lambda x: x[torch.tensor([2, 0])],
    "indices of the device": lambda x: x[:, torch.tensor([5, 1]).to(x.device)],
    "mask": lambda x: x[x > 7],
    "nonzero": lambda x: (x % 5 == 0).nonzero(),
    "scalar of the host": lambda x: x * torch.tensor(0.5),
    "kept type": lambda x: x.bfloat16() * 2.5,
    "matmul": lambda x: x @ x.t(),
    "softmax": lambda x: torch.softmax(x, -1),
    "sort": lambda x: x.sort(descending=True).values,
    "topk": lambda x: x.topk(3).indices,
    "cumsum": lambda x: x.cumsum(0),
    "where": lambda x: torch.where(x > 5, x, 0.0),
    "one_hot": lambda x: torch.nn.functional.one_hot(x[0].long()),
    "linear": lambda x: torch.nn.functional.linear(x, x, x[:, 0]),
    "attention": lambda x: torch.nn.functional.scaled_dot_product_attention(
        *x.div(24).view(1, 1, 4, 6).expand(3, 1, 2, 4, 6)
    ),
    "conjugate moved": lambda x: torch.view_as_complex(x.view(4, 3, 2)).conj().cpu().to(x.device),
    "complex": lambda x: torch.view_as_real(torch.view_as_complex(x.view(4, 3, 2)).conj() * 1j),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS.keys())
def test_results_are_those_of_the_cpu(read: Callable[[Tensor], object]) -> None:
    x = torch.arange(24.0).view(4, 6)
    expected, got = read(x), read(x.to("musa:1"))
    if isinstance(expected, Tensor):
        assert isinstance(got, Tensor)
        assert got.device == torch.device("musa:1")
        assert got.stride() == expected.stride()
        got = got.cpu()
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    else:
        assert got == expected


def test_out_of_another_shape_is_resized() -> None:
    out = torch.empty(0, device="musa:1")
    x = torch.ones(2, 3, device="musa:1")
    assert torch.add(x, x, out=out) is out
    assert out.tolist() == [[2, 2, 2], [2, 2, 2]]
    assert torch.sum(torch.ones(4, 5, device="musa:1"), 0, out=out.resize_(0)) is out
    assert (out.device, out.tolist()) == (torch.device("musa:1"), [4] * 5)


def test_resize_keeps_what_was_there() -> None:
    x = torch.arange(4.0, device="musa:1")
    x.resize_(100_000)
    assert x[:4].tolist() == [0, 1, 2, 3]
    x.fill_(3)
    assert x.sum().item() == 300_000
    x.untyped_storage().resize_(800_000)
    assert x.sum().item() == 300_000
    assert x.untyped_storage().device == torch.device("musa:1")


@torch.inference_mode()  # so that nothing stands between the caller and the device
def test_what_is_written_is_what_is_returned() -> None:
    x, out = torch.arange(3.0, device="musa"), torch.empty(3, device="musa")
    assert torch.ops.aten.add_.Tensor(x, x) is x
    assert torch.ops.aten.add.out(x, x, out=out) is out
    assert out.tolist() == [0, 4, 8]


def test_results_can_be_resized_and_seen_through() -> None:
    """Memory that an operator of the host allocated is memory of the device."""
    x = torch.ones(3, device="musa:1") + 1
    assert x.untyped_storage().device == torch.device("musa:1")
    view = x[1:]
    x.resize_(5)[3:] = 0
    assert x.tolist() == [2, 2, 2, 0, 0]
    view.fill_(7)
    assert x.tolist() == [2, 7, 7, 0, 0]


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "view": lambda x: x.view(2, 12),
    "reshape": lambda x: x.reshape(2, 12),
    "transpose": lambda x: x.t(),
    "select": lambda x: x[1],
    "as_strided": lambda x: x.as_strided((2, 2), (1, 3), 1),
    "unfold": lambda x: x.unfold(1, 2, 2),
    "detach": lambda x: x.detach(),
    "other type": lambda x: x.view(torch.int32),
    "set_": lambda x: torch.empty(0, device=x.device).set_(x.untyped_storage(), 3, (2,), (4,)),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
def test_views_share_memory(view: Callable[[Tensor], Tensor]) -> None:
    expected, got = torch.zeros(4, 6), torch.zeros(4, 6, device="musa:1")
    view(expected).fill_(1)
    view(got).fill_(1)
    assert torch.equal(got.cpu(), expected)
    assert view(got).data_ptr() - got.data_ptr() == 4 * view(expected).storage_offset()
    assert view(got).untyped_storage()._cdata == got.untyped_storage()._cdata


def test_overlapping_writes_are_refused() -> None:
    x = torch.arange(4.0, device="musa")
    with pytest.raises(RuntimeError, match="the written-to tensor refer to a single"):
        torch.neg(x[:-1], out=x[1:])
    with pytest.raises(RuntimeError, match="more than one element of the written-to tensor"):
        x[:1].expand(3).add_(1)


MIXTURES: dict[str, Callable[[Tensor, Tensor], object]] = {
    "add": lambda x, other: x + other,
    "other first": lambda x, other: other + x,
    "in place": lambda x, other: x.add_(other),
    "into the other": lambda x, other: other.add_(x),
    "out": lambda x, other: torch.add(x, x, out=other),
    "out of a scalar": lambda x, other: torch.sum(x, 0, out=other.new_empty(())),
    "cat": lambda x, other: torch.cat([x, other]),
    "index_copy_": lambda x, other: x.index_copy_(0, other.long(), x.clone()),
    "where": lambda x, other: torch.where(x > 1, x, other),
    "matmul": lambda x, other: x @ other,
}


@pytest.mark.parametrize("mix", MIXTURES.values(), ids=MIXTURES.keys())
@pytest.mark.parametrize("other", ["cpu", "musa:1"])
def test_devices_do_not_mix(mix: Callable[[Tensor, Tensor], object], other: str) -> None:
    x = torch.arange(3.0, device="musa:0")
    with pytest.raises(RuntimeError, match="same device"):
        mix(x, torch.arange(3.0, device=other))
    assert x.tolist() == [0, 1, 2]


@pytest.mark.parametrize("non_blocking", [False, True])
def test_copies_between_devices(non_blocking: bool) -> None:
    source = torch.arange(12.0).view(3, 4).t()
    first = source.to("musa:0", non_blocking=non_blocking)
    second = first.to("musa:1", non_blocking=non_blocking)
    back = second.to("cpu", non_blocking=non_blocking)
    assert [t.device for t in (first, second)] == [torch.device("musa:0"), torch.device("musa:1")]
    assert len({t.data_ptr() for t in (source, first, second, back)}) == 4
    assert torch.equal(back, source)
    first.zero_()
    assert torch.equal(second.cpu(), source)
    target = torch.zeros(8, 3, device="musa:1")
    target[::2].copy_(source, non_blocking=non_blocking)
    assert torch.equal(target[::2].cpu(), source)
    assert not target[1::2].any()


def test_assert_close_sees_differences() -> None:
    x = torch.randn(8, device="musa")
    torch.testing.assert_close(x, x.clone())
    with pytest.raises(AssertionError, match="not close"):
        torch.testing.assert_close(x, x + 1)
