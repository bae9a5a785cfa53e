"""fused_mul_add: by hand, and the faults of the kernel that it replaces."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import kernelhub
from kernelhub import ArgumentError, registry
from kernelhub.spec import OpSpec

op = kernelhub.ops.fused_mul_add
SPEC: OpSpec = registry.spec("fused_mul_add")


def test_by_hand() -> None:
    x, bias = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([10.0, 20.0])
    assert op(x, bias, 2.5).tolist() == [[12.5, 25.0], [17.5, 30.0]]
    column = torch.tensor([[1.0], [-1.0]])
    assert op(x, bias, column).tolist() == [[11.0, 22.0], [7.0, 16.0]]


def test_one_rounding() -> None:
    """In bf16, 1.0078125 * 129 + 0.5 is 130.5078: rounding the product first would give 130."""
    x, bias = torch.tensor([1.0078125]).bfloat16(), torch.tensor([0.5]).bfloat16()
    exact = 1.0078125 * 129 + 0.5
    assert op(x, bias, 129.0).item() == torch.tensor(exact).bfloat16().item() == 131.0
    assert ((x * 129.0) + bias).item() == 130.0


@pytest.mark.parametrize("numel", range(1, 18))
def test_fault_write_past_the_end_where_numel_is_no_multiple_of_8(numel: int) -> None:
    room = torch.full((numel + 16,), float("nan"))
    out = room[8 : 8 + numel]
    op(torch.ones(numel), torch.ones(numel), 2.0, out=out)
    assert out.tolist() == [3.0] * numel
    assert room[:8].isnan().all()
    assert room[8 + numel :].isnan().all()


def test_fault_permuted_input_gave_permuted_output() -> None:
    x = torch.arange(24.0).view(2, 3, 4).permute(2, 0, 1)
    bias = torch.arange(24.0).view(4, 2, 3) * 100
    expected = [[[x[i, j, k].item() * 2 + bias[i, j, k].item() for k in range(3)]
                 for j in range(2)] for i in range(4)]  # fmt: skip
    assert op(x, bias, 2.0).tolist() == expected
    assert op(x, bias, 2.0).is_contiguous()
    out = torch.empty(3, 4, 2).permute(1, 2, 0)
    assert op(x, bias, 2.0, out=out) is out
    assert out.tolist() == expected


@pytest.mark.parametrize("target", ["x", "bias"])
def test_out_may_be_an_input(target: str) -> None:
    tensors = {"x": torch.tensor([1.0, 2.0]), "bias": torch.tensor([10.0, 20.0])}
    assert op(**tensors, scale=3.0, out=tensors[target]) is tensors[target]
    assert tensors[target].tolist() == [13.0, 26.0]


def test_partial_overlap_is_refused_and_writes_nothing() -> None:
    memory = torch.arange(10.0)
    with pytest.raises(ArgumentError, match="argument 'out'"):
        op(memory[:8], torch.ones(8), 1.0, out=memory[1:9])
    assert memory.tolist() == list(range(10))


def test_gradients() -> None:
    def f(x: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
        return op(x, bias, scale).sum()

    leaves = [torch.tensor(v, requires_grad=True) for v in ([1.0, 2.0], [3.0, 4.0], [5.0, 6.0])]
    grads = torch.autograd.grad(f(*leaves), leaves)
    assert [g.tolist() for g in grads] == [[5.0, 6.0], [1.0, 1.0], [1.0, 2.0]]


@pytest.mark.parametrize("scale", [0.1, 1e300, -1e300, float("nan"), float("inf"), 2**62])
def test_a_scalar_scale_is_used_as_fp32(scale: float) -> None:
    x, bias = torch.tensor([3.0, 0.0]), torch.tensor([0.25, 0.25])
    tensor = torch.tensor(scale, dtype=torch.float32)
    torch.testing.assert_close(
        op(x, bias, scale), op(x, bias, tensor), rtol=0, atol=0, equal_nan=True
    )


def test_cost() -> None:
    x = torch.ones(4, 8, dtype=torch.bfloat16)
    cost = SPEC.cost(SPEC.bind(x, x[0], 2.0))
    assert (cost.read_bytes, cost.write_bytes, cost.operations) == (64 + 16, 64, 64)
