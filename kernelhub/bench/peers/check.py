"""Is what a peer computes what the op computes? Its first result beside the reference's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernelhub.backends.reference import top_k_top_p_sampling_from_probs as sampling
from kernelhub.bench.inputs import Calls
from kernelhub.function import get

_LEAST = 1e-4  # fp32 sums of thousands of products in another order
_SLACK = 1e-3  # of top_p: sums of probabilities in fp32
WRITTEN = ("out", "query", "key")


def expected(op: str, calls: Calls) -> tuple[Tensor, ...]:
    """What the reference makes of a set of inputs, which stay as they are.

    For sampling, where every library draws in its own way: which tokens may be drawn.
    """
    if op == "top_k_top_p_sampling_from_probs":
        return (_kept(**calls[0]),)
    calls = _apart(calls)
    for call in calls:
        result = get(op).on("reference")(**call)
    return (call["query"], call["key"]) if op == "rotary_embedding" else (result,)


def _apart(calls: Calls) -> Calls:
    """With copies of what is written; what one call writes and the next reads stays one tensor."""
    copies = {id(call[n]): call[n].clone() for call in calls for n in WRITTEN if n in call}
    return [{name: copies.get(id(value), value) for name, value in c.items()} for c in calls]


def _kept(probs: Tensor, top_k: int, top_p: float, filter_apply_order: str, **_: Any) -> Tensor:
    share = min(1.0, top_p + _SLACK)
    mass = sampling._mass(probs)
    return probs >= sampling._threshold(probs, mass, top_k, share, filter_apply_order)


def fault(op: str, wanted: tuple[Tensor, ...], got: Any, allowed: float | None = None) -> str:
    """How a result differs from the reference's; empty where it does not by more than allowed."""
    results = got if isinstance(got, tuple) else (got,)
    if op == "top_k_top_p_sampling_from_probs":
        return _not_kept(wanted[0], results[0])
    for want, have in zip(wanted, results, strict=True):
        if have.numel() != want.numel():
            return f"its result is {list(have.shape)}, not {list(want.shape)}"
        limit = max(4 * torch.finfo(want.dtype).eps, _LEAST) if allowed is None else allowed
        truth = want.double()
        error = (have.reshape(want.shape).double() - truth).abs()
        share = error / (truth.abs() + truth.square().mean().sqrt())
        worst = float(share.nan_to_num(torch.inf, torch.inf).max()) if share.numel() else 0.0
        if worst > limit:
            return f"its result differs from the reference's by {worst:.2g}; {limit:.2g} is allowed"
    return ""


def _not_kept(kept: Tensor, tokens: Tensor) -> str:
    rows, vocab = kept.shape
    ids = tokens.reshape(-1).long()
    if len(ids) != rows:
        return f"it drew {len(ids)} tokens for {rows} rows"
    sane = (ids >= 0) & (ids < vocab)
    good = sane & kept.gather(1, ids.clamp(0, vocab - 1)[:, None])[:, 0]
    bad = rows - int(good.sum())
    return f"{bad} of {rows} tokens are none that top-k and top-p keep" if bad else ""
