"""Backends that torch cannot see into, under whatever follows or transforms torch's ops."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import kernelhub
from kernelhub.backend import Backend, Implementation, Traits

# torch's own forward mode compiles a decomposition with it.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")

op = kernelhub.ops.fused_mul_add


@pytest.fixture
def calls(add_backend: Callable[[Backend], Backend]) -> list[str]:
    """A backend that takes every call it may, in memory that torch does not follow."""
    made: list[str] = []

    def fused_mul_add(
        x: Tensor, bias: Tensor, scale: float | Tensor, *, out: Tensor | None = None
    ) -> Tensor:
        made.append("opaque")
        result = torch.empty(x.shape)
        result.numpy()[...] = x.numpy() * scale + bias.numpy()
        return result

    own = Implementation("fused_mul_add", fused_mul_add, traits=Traits(differentiable=False))
    add_backend(Backend("opaque", (own,)))
    return made


def arguments() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(3, 5, generator=g), torch.randn(3, 5, generator=g)


def test_runs_where_nothing_follows(calls: list[str]) -> None:
    x, bias = arguments()
    for _ in range(3):
        torch.testing.assert_close(op(x, bias, 2.0), x * 2 + bias)
    assert calls == ["opaque"] * 3


@pytest.mark.parametrize("first", [True, False])
def test_a_gradient_is_not_lost(calls: list[str], first: bool) -> None:
    x, bias = arguments()
    if not first:
        op(x, bias, 2.0)
    op(x.requires_grad_(), bias, 2.0).sum().backward()
    assert torch.equal(x.grad, torch.full((3, 5), 2.0))
    with torch.no_grad():
        op(x, bias, 2.0)
    assert calls == ["opaque"] * (1 if first else 2)


def test_a_tangent_is_not_lost(calls: list[str]) -> None:
    x, bias = arguments()
    op(x, bias, 2.0)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        result = torch.autograd.forward_ad.unpack_dual(op(dual, bias, 2.0))
    assert torch.equal(result.tangent, torch.full((3, 5), 2.0))


TRANSFORMS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "grad": lambda x, bias: torch.func.grad(lambda t: op(t, bias, 2.0).sum())(x),
    "jvp": lambda x, bias: torch.func.jvp(lambda t: op(t, bias, 2.0), (x,), (torch.ones_like(x),))[
        1
    ],
    "vmap": lambda x, bias: torch.func.vmap(lambda t, b: op(t, b, 2.0))(x, bias) - x * 2 - bias + 2,
    "no-grad-inside": lambda x, bias: torch.func.vmap(_without_grad)(x, bias) - x * 2 - bias + 2,
}


def _without_grad(x: Tensor, bias: Tensor) -> Tensor:
    with torch.no_grad():
        return op(x, bias, 2.0)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_sees_torch_ops(calls: list[str], name: str) -> None:
    x, bias = arguments()
    op(x, bias, 2.0)
    torch.testing.assert_close(TRANSFORMS[name](x, bias), torch.full((3, 5), 2.0))
    assert calls == ["opaque"]


def test_a_forced_backend_refuses_a_transform(calls: list[str]) -> None:
    x, bias = arguments()
    with pytest.raises(kernelhub.BackendUnavailable, match=r"torch\.func transform"):
        torch.func.vmap(lambda t, b: op.on("opaque")(t, b, 2.0))(x, bias)


def test_make_fx_records_the_op(calls: list[str]) -> None:
    x, bias = arguments()
    op(x, bias, 2.0)
    graph = make_fx(lambda a, b: op(a, b, 2.0) + 1)(x, bias)
    assert "kernelhub.fused_mul_add" in graph.code
    y = torch.randn(3, 5)
    torch.testing.assert_close(graph(y, bias), y * 2 + bias + 1)


def test_a_dispatch_mode_sees_the_op(calls: list[str]) -> None:
    seen: list[str] = []

    class Log(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    x, bias = arguments()
    op(x, bias, 2.0)
    with Log(), Log():
        torch.testing.assert_close(op(x, bias, 2.0), x * 2 + bias)
    assert seen.count("kernelhub.fused_mul_add.default") == 2
    assert calls == ["opaque"] * 2


def test_jit_trace_records_the_op(calls: list[str]) -> None:
    x, bias = arguments()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is on its way out
        traced = torch.jit.trace(lambda a, b: op(a, b, 2.0), (x, bias), check_trace=False)
        y = torch.randn(3, 5)
        torch.testing.assert_close(traced(y, bias), y * 2 + bias)
