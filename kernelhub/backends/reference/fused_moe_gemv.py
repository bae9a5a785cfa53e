"""fused_moe_gemv in plain PyTorch: the definition."""

from __future__ import annotations

from functools import reduce as fold

import torch
from torch import Tensor

from kernelhub.backends.reference._weights import FP8, activate, matmul, widen


def fused_moe_gemv(
    x: Tensor,
    weight: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor | None = None,
    x_scale: Tensor | None = None,
    weight_scale: Tensor | None = None,
    *,
    weight_zero: Tensor | None = None,
    group_size: int | None = None,
    activation: str | None = None,
    reduce: bool = False,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    dtype = out_dtype or (torch.bfloat16 if x.dtype is FP8 else x.dtype)
    num_tokens, slots = topk_ids.shape
    num_experts, n = weight.shape[:2]

    # A place is a position in the flattened topk_ids. Sorted by id, the places of one expert stand
    # together, so each weight is read once. Places of no expert are left out: nothing of theirs is
    # read.
    ids = topk_ids.flatten()
    places = ((ids >= 0) & (ids < num_experts)).nonzero().squeeze(1)
    places = places[ids[places].argsort(stable=True)]
    experts, counts = ids[places].unique_consecutive(return_counts=True)

    rows_of_x = x.flatten(0, -2)
    products = [x.new_zeros(0, n, dtype=torch.float32)]
    for e, at in zip(experts.tolist(), places.split(counts.tolist()), strict=True):
        rows = at // slots if x.dim() == 2 else at
        scale = x_scale if x_scale is None or x_scale.dim() == 1 else x_scale.flatten(0, -2)[rows]
        row = widen(rows_of_x[rows], scale, group_size)
        product = matmul(row, weight[e], _of(weight_scale, e), _of(weight_zero, e), group_size)
        products.append(product)
    y = torch.cat(products)

    if topk_weights is not None:
        y = y * topk_weights.flatten()[places].float().unsqueeze(1)
    y = activate(y, activation)
    y = y.new_zeros(num_tokens * slots, y.shape[1]).index_copy(0, places, y)
    y = y.reshape(num_tokens, slots, y.shape[1])
    if reduce:
        # Slot after slot: neither torch.sum nor an indexed addition promises an order.
        y = fold(torch.add, y.unbind(1), y.new_zeros(num_tokens, y.shape[2]))
    y = y.to(dtype)
    return y if out is None else out.copy_(y)


def _of(t: Tensor | None, expert: int) -> Tensor | None:
    return None if t is None else t[expert]
