"""Weights dense, fp8 and int4 in plain PyTorch: what fused_gemv and fused_moe_gemv share."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

FP8 = torch.float8_e4m3fn
_TILE = 2**19  # elements: 2 MiB as fp32, which stays in a CPU core's cache
_DEVICE_TILE = 2**24  # fewer, larger launches where each costs microseconds
_INT4 = (torch.uint8, torch.int8, torch.int32)


def matmul(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor | None = None,
    weight_zero: Tensor | None = None,
    group_size: int | None = None,
) -> Tensor:
    """`x @ dequant(weight).T`, fp32: x fp32 `[M, K]`, weight one expert's, in any scheme.

    Weight rows are widened a tile at a time, so that the widened weight never exists whole. The
    weight stands on the left and x has two columns or more: for a single row, or with the weight on
    the right, torch's CPU library takes paths that were 4 to 8 times slower.
    """
    n, (m, k) = weight.shape[0], x.shape
    columns = (x if m > 1 else x.repeat(2, 1)).t()
    if weight_scale is not None:
        weight_scale = _infinite_is_nan(weight_scale)
    tile = max(1, (_TILE if x.device.type == "cpu" else _DEVICE_TILE) // max(k, 1))
    with full_precision(x):
        products = [
            dequantize(weight, weight_scale, weight_zero, group_size, k=k, rows=slice(r, r + tile))
            @ columns
            for r in range(0, n, tile)
        ]
    return torch.cat(products).t()[:m].contiguous() if products else x.new_zeros(m, 0)


def full_precision(x: Tensor) -> AbstractContextManager[object]:
    """Keeps autocast from taking a product to 16 bits."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()


def dequantize(
    weight: Tensor,
    weight_scale: Tensor | None = None,
    weight_zero: Tensor | None = None,
    group_size: int | None = None,
    *,
    k: int,
    rows: slice = slice(None),
) -> Tensor:
    """`rows` of one expert's weight `[N, K]` as fp32, each value rounded once."""
    part = weight[rows]
    if weight_scale is None:  # dense
        return part.float()
    if weight.dtype in _INT4:
        scale = weight_scale[rows].float()
        group = k // max(scale.shape[1], 1)
        zero = 8 if weight_zero is None else _spread(weight_zero[rows].float(), group, k)
        return (unpack_int4(part).float() - zero) * _spread(scale, group, k)
    if weight_scale.dim() == 1:  # per tensor
        return part.float() * weight_scale
    if weight_scale.shape == (weight.shape[0], 1):  # per channel
        return part.float() * weight_scale[rows]
    group = group_size or 128
    block = torch.arange(weight.shape[0], device=weight.device)[rows] // group
    return part.float() * _spread(weight_scale[block], group, k)


def unpack_int4(weight: Tensor) -> Tensor:
    """Codes 0..15 `[N, K]`, uint8, of bytes `[N, K/2]` or int32 `[N, K/8]`: low nibble first."""
    if weight.dtype is torch.int32:
        # A view as bytes needs a last stride of 1; `contiguous` keeps that of a lone column.
        weight = weight.clone(memory_format=torch.contiguous_format)
    codes = weight.view(torch.uint8)
    return torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)


def widen(x: Tensor, x_scale: Tensor | None = None, group_size: int | None = None) -> Tensor:
    """Activations as fp32 `[M, K]`, leading dimensions flattened, fp8 multiplied by its scales."""
    k = x.shape[-1]
    flat = x.reshape(x.shape[:-1].numel(), k).float()
    if x_scale is None:
        return flat
    x_scale = _infinite_is_nan(x_scale)
    if x_scale.shape == (1,):
        return flat * x_scale
    scale = x_scale.reshape(flat.shape[0], x_scale.shape[-1])
    return flat * (scale if scale.shape[1] == 1 else _spread(scale, group_size or 128, k))


def _infinite_is_nan(scale: Tensor) -> Tensor:
    """What an infinite scale makes of single codes is lost where it multiplies a group's sum."""
    return scale + (scale - scale)


def _spread(scale: Tensor, group: int, k: int) -> Tensor:
    """`[R, ceil(K/g)]` to `[R, K]`: each column `group` times over, the last cut short."""
    return scale.unsqueeze(-1).expand(-1, -1, group).flatten(1)[:, :k]


def activate(y: Tensor, activation: str | None) -> Tensor:
    """The activation on the last dimension; SwiGLU takes its first half for the gate."""
    if activation == "swiglu":
        gate, up = y.chunk(2, dim=-1)
        return F.silu(gate) * up
    if activation == "silu":
        return F.silu(y)
    if activation in ("gelu", "gelu_tanh"):
        return F.gelu(y, approximate="tanh")
    return y
