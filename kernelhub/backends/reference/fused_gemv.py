"""fused_gemv in plain PyTorch: the definition."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernelhub.backends.reference import _weights


def fused_gemv(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor | None = None,
    weight_scale: Tensor | None = None,
    *,
    weight_zero: Tensor | None = None,
    group_size: int | None = None,
    bias: Tensor | None = None,
    activation: str | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    dtype = out_dtype or (torch.bfloat16 if x.dtype is _weights.FP8 else x.dtype)
    epilogue = bias is not None or activation is not None or norm_weight is not None
    if weight_scale is None and x.device.type == "cpu" and dtype is x.dtype and not epilogue:
        # On a CPU torch accumulates bf16 and fp16 in fp32 and rounds once (tests hold it to that);
        # elsewhere it may add partial sums in 16 bits.
        with _weights.full_precision(x):
            y = F.linear(x, weight)
    else:
        y = _weights.matmul(
            _weights.widen(x, x_scale, group_size), weight, weight_scale, weight_zero, group_size
        )
        if bias is not None:
            y = y + bias.float()
        y = _weights.activate(y, activation)
        if norm_weight is not None:
            y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * norm_weight.float()
        y = y.to(dtype).reshape(*x.shape[:-1], y.shape[-1])
    return y if out is None else out.copy_(y)
