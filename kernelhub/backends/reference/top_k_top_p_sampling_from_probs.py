"""top_k_top_p_sampling_from_probs in plain PyTorch: the definition.

Masses are integers, so no order of summation matters, and both filters are thresholds on the value:
what top-k keeps is all of at least the k-th largest value, what top-p keeps is all of at least the
value at which the running mass from the largest down reaches the share asked for.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kernelhub.backends.reference._philox import multiply_high, philox4x32, words


@torch.no_grad()
def top_k_top_p_sampling_from_probs(
    probs: Tensor,
    top_k: int | Tensor,
    top_p: float | Tensor,
    *,
    min_p: float | Tensor | None = None,
    indices: Tensor | None = None,
    filter_apply_order: Literal["top_k_first", "joint"] = "top_k_first",
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
    offset: int | Tensor | None = None,
    return_valid: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    num_rows, device = probs.shape[0], probs.device
    batch_size = num_rows if indices is None else indices.shape[0]
    if batch_size == 0 or num_rows == 0:  # no sample, or no row that an index could name
        tokens = torch.zeros(batch_size, dtype=torch.int32, device=device)
        return (tokens, tokens.bool()) if return_valid else tokens

    # A row that cannot be sampled becomes a row without mass.
    least, largest = probs.float().aminmax(dim=-1, keepdim=True)
    sane = least.isfinite() & largest.isfinite()
    for share in (top_p, min_p):
        if isinstance(share, Tensor):
            sane = sane & ~share.isnan()[:, None]
    probs = torch.where(sane, probs.float(), 0)

    mass = _mass(probs)
    threshold = _threshold(probs, mass, top_k, top_p, filter_apply_order)
    if min_p is not None:
        threshold = threshold.maximum(_share(min_p, device) * largest)
    running = torch.where(probs >= threshold, mass, 0).cumsum(-1)  # [R, V]

    if indices is None:
        row = torch.arange(num_rows, device=device)
        inside = torch.ones_like(row, dtype=torch.bool)
    else:
        row = indices.long()
        inside = (row >= 0) & (row < num_rows)
        row = row.clamp(0, num_rows - 1)
    support_mass = running[row, -1]
    low, high = _uniform(batch_size, seed, offset, generator, device)
    tokens = _first_above(running, row, multiply_high(low, high, support_mass))
    valid = inside & (support_mass > 0)
    tokens = torch.where(valid, tokens, 0).int()
    return (tokens, valid) if return_valid else tokens


def _mass(probs: Tensor) -> Tensor:
    """`floor(p * 2^44)` of each probability; scaling is exact, conversion truncates."""
    return (probs.clamp(0, 1) * 2.0**44).long()


def _share(value: float | Tensor, device: torch.device) -> Tensor:
    """A top_p or min_p as a column of fp32 in [0, 1]; NaN, whose row is out already, becomes 0."""
    if not isinstance(value, Tensor):
        value = torch.full((1,), value, dtype=torch.float32, device=device)
    return value.nan_to_num(0.0).clamp(0, 1)[:, None]


def _threshold(
    probs: Tensor, mass: Tensor, top_k: int | Tensor, top_p: float | Tensor, order: str
) -> Tensor:
    """The smallest value `[R, 1]` that top-k and top-p keep."""
    vocab_size = probs.shape[1]
    if isinstance(top_k, Tensor):
        kept = torch.where((top_k > 0) & (top_k < vocab_size), top_k.long(), vocab_size)
        ranked = probs.sort(descending=True).values
    else:
        k = top_k if 0 < top_k < vocab_size else vocab_size
        if k == vocab_size and not isinstance(top_p, Tensor) and top_p == 1:
            return probs.new_full((1, 1), -torch.inf)
        kept = torch.full((1,), k, device=probs.device)
        ranked = (probs.topk(k) if k < vocab_size else probs.sort(descending=True)).values
    last = (kept - 1)[:, None].expand(len(probs), 1)

    if order == "top_k_first":
        total = torch.where(probs >= ranked.gather(-1, last), mass, 0).sum(-1, keepdim=True)
    else:
        total = mass.sum(-1, keepdim=True)
    # The rule `greater * 2^24 < portion * total` is `greater < ceil(portion * total / 2^24)`; the
    # total in two halves keeps the product inside 64 bits.
    portion = (_share(top_p, probs.device) * 2.0**24).long().clamp(min=1)
    needed = portion * (total >> 24) + ((portion * (total & 0xFFFFFF) + 0xFFFFFF) >> 24)
    # The first rank at which the running mass has what is needed is the last value kept. Ties of
    # the k-th value that `ranked` leaves out are kept or dropped with it.
    reached = torch.searchsorted(_mass(ranked).cumsum(-1), needed)
    return ranked.gather(-1, reached.minimum(last))


def _uniform(
    batch_size: int,
    seed: int | Tensor | None,
    offset: int | Tensor | None,
    generator: torch.Generator | None,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Low and high word of one random 64-bit number per sample."""
    if seed is None:
        seed = torch.empty(1, dtype=torch.int64, device=device).random_(generator=generator)
    elif not isinstance(seed, Tensor):
        seed = torch.full((1,), seed, dtype=torch.int64, device=device)
    if not isinstance(offset, Tensor):
        offset = torch.full((1,), offset or 0, dtype=torch.int64, device=device)
    stream = torch.arange(batch_size, device=device)
    if seed.shape[0] != 1:  # one seed per sample: the sample's place in the batch must not matter
        stream = torch.zeros_like(stream)
    out = philox4x32((*words(offset), *words(stream)), words(seed))
    return out[0], out[1]


def _first_above(running: Tensor, row: Tensor, target: Tensor) -> Tensor:
    """First index of `running[row]` above `target`, by bisection; at most the last index."""
    first = torch.zeros_like(row)
    last = torch.full_like(row, running.shape[1] - 1)
    for _ in range(running.shape[1].bit_length()):
        middle = (first + last) // 2
        above = running[row, middle] > target
        first = torch.where(above, first, (middle + 1).minimum(last))
        last = torch.where(above, middle, last)
    return first
