"""A kernelhub backend for one op: fused_mul_add on the CPU through torch.add(..., alpha=scale)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kernelhub.backend import Backend, Implementation
from kernelhub.spec import Traits


def fused_mul_add(
    x: Tensor, bias: Tensor, scale: float | Tensor, *, out: Tensor | None = None
) -> Tensor:
    # The op has checked the arguments; `rejects` has kept away what torch.add cannot do.
    return torch.add(bias, x, alpha=scale, out=out)


def rejects(call: Any) -> Iterator[str]:
    """Facts about a call, in plain words; the call's arguments are attributes."""
    if isinstance(call.scale, Tensor) or hasattr(call.scale, "shape"):
        yield "the scale is a tensor; torch.add takes a number"
    if call.x.dtype != torch.float32:
        yield f"built for float32, not {call.x.dtype}"


backend = Backend(
    name="alpha",
    device_types=("cpu",),
    description="example: fused_mul_add through torch.add",
    implementations=(
        Implementation(
            op="fused_mul_add",
            target="kernelhub_example_alpha:fused_mul_add",
            rejects=rejects,
            traits=Traits(differentiable=False),  # torch.add(out=...) has no derivative
        ),
    ),
)
