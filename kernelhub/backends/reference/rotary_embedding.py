"""rotary_embedding in plain PyTorch: the definition."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_embedding(
    positions: Tensor,
    query: Tensor,
    key: Tensor | None,
    head_size: int | None,
    cos_sin_cache: Tensor,
    is_neox: bool = True,
    *,
    rot_dim: int | None = None,
    cos_sin_cache_offsets: Tensor | None = None,
) -> None:
    num_rows, rot_dim = cos_sin_cache.shape
    if num_rows == 0:
        return  # every position is out of range

    rows = positions.long()
    wrapped = torch.zeros_like(rows, dtype=torch.bool)
    if cos_sin_cache_offsets is not None:
        offsets = cos_sin_cache_offsets.long()
        # Of the sums that int64 cannot hold, only those of two negatives come out as row numbers.
        wrapped = (rows < 0) & (offsets < 0)
        rows = rows + offsets
    known = (rows >= 0) & (rows < num_rows) & ~wrapped
    cache = cos_sin_cache[torch.where(known, rows, 0)].float().unsqueeze(-2)  # [..., 1, rot_dim]
    cos, sin = cache[..., : rot_dim // 2], cache[..., rot_dim // 2 :]
    known = known[..., None, None]

    for tensor in (query, key):
        if tensor is None:
            continue
        heads = tensor
        if tensor.dim() == positions.dim() + 1:  # [..., H * D], seen as [..., H, D]
            assert head_size is not None
            heads = tensor.view(*tensor.shape[:-1], tensor.shape[-1] // head_size, head_size)
        lanes = heads[..., :rot_dim]
        # A copy even of fp32: autograd may need these values after they have been overwritten.
        values = lanes.to(torch.float32, copy=True)
        if is_neox:
            x, y = values[..., : rot_dim // 2], values[..., rot_dim // 2 :]
        else:
            x, y = values[..., 0::2], values[..., 1::2]
        pair = x * cos - y * sin, y * cos + x * sin
        rotated = torch.cat(pair, -1) if is_neox else torch.stack(pair, -1).flatten(-2)
        lanes.copy_(torch.where(known, rotated.to(lanes.dtype), lanes))
