"""fused_mul_add by the compiled kernel."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from kernelhub.backend import Implementation
from kernelhub.backends.native.abi import MAX_DIMS
from kernelhub.backends.native.kernels import Launchers


def make(launchers: Launchers) -> Implementation:
    def fused_mul_add(
        x: Tensor, bias: Tensor, scale: float | Tensor, *, out: Tensor | None = None
    ) -> Tensor:
        per_element = scale if isinstance(scale, Tensor) else None
        value = 0.0 if per_element is not None else scale
        given = out
        if out is None:
            shape = x.shape
            if per_element is not None:
                shape = torch.broadcast_shapes(shape, bias.shape, per_element.shape)
            elif bias.shape != shape:
                shape = torch.broadcast_shapes(shape, bias.shape)
            out = x.new_empty(shape)
        if out.dim() > MAX_DIMS:
            return _in_one_dim(x, bias, scale, out)
        launchers[x.device](x, bias, per_element, out, value)
        if given is not None:
            increment_version(given)
        return out

    def _in_one_dim(x: Tensor, bias: Tensor, scale: float | Tensor, out: Tensor) -> Tensor:
        """For more dimensions than the kernel takes: through contiguous copies."""
        shape = out.shape
        x, bias = x.expand(shape).reshape(-1), bias.expand(shape).reshape(-1)
        if isinstance(scale, Tensor):
            scale = scale.expand(shape).reshape(-1)
        return out.copy_(fused_mul_add(x, bias, scale).view(shape))

    return Implementation("fused_mul_add", fused_mul_add)
