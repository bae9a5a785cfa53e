"""fused_mul_add in plain PyTorch: the definition."""

from __future__ import annotations

from torch import Tensor


def fused_mul_add(
    x: Tensor, bias: Tensor, scale: float | Tensor, *, out: Tensor | None = None
) -> Tensor:
    scale = scale.float() if isinstance(scale, Tensor) else scale
    y = (x.float() * scale + bias.float()).to(x.dtype)
    return y.contiguous() if out is None else out.copy_(y)
