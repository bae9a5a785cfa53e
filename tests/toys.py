"""Small backends for the tests: fused_mul_add with a recognisable result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernelhub.backend import Backend, Implementation
from kernelhub.spec import Traits

OP = "fused_mul_add"
DIFFERENTIABLE = Traits(differentiable=True)


def constant(value: float) -> Callable[..., Tensor]:
    """An implementation of fused_mul_add whose every result is `value`."""

    def fused_mul_add(
        x: Tensor, bias: Tensor, scale: float | Tensor, *, out: Tensor | None = None
    ) -> Tensor:
        return torch.full_like(x, value)

    return fused_mul_add


def backend(
    name: str = "toy",
    value: float = 42.0,
    *,
    target: Callable[..., Any] | str | None = None,
    traits: Traits = DIFFERENTIABLE,
    implementation: dict[str, Any] | None = None,
    **more: Any,
) -> Backend:
    made = Implementation(OP, target or constant(value), traits=traits, **(implementation or {}))
    return Backend(name, (made,), **more)


def call() -> tuple[Tensor, Tensor, float]:
    """Arguments of a call whose true result is 7.0 everywhere."""
    return torch.full((3,), 2.0), torch.full((3,), 1.0), 3.0
