"""PyTorch itself: cuBLAS for dense weights, grouped_mm for experts, sort-based sampling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernelhub.bench.cases import Case
from kernelhub.bench.clock import Call
from kernelhub.bench.inputs import DTYPES, Calls
from kernelhub.bench.peers import Kernel, Offer, Peer, joined

_TWICE = 2 * 4 * torch.finfo(torch.bfloat16).eps  # rounded to 16 bits once more on the way

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "swiglu": lambda y: F.silu(y[..., : y.shape[-1] // 2]) * y[..., y.shape[-1] // 2 :],
    "silu": F.silu,
    "gelu": lambda y: F.gelu(y, approximate="tanh"),
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
}


def _linear(case: Case, sets: list[Calls]) -> Offer | str:
    if case.scheme not in DTYPES:
        return "multiplies dense weights only"
    act = case.facts["act"]
    apply = ACTIVATIONS[act]

    def call(x: Tensor, weight: Tensor, out: Tensor, **_: Any) -> Call:
        if act == "none":
            return lambda: torch.mm(x, weight.t(), out=out)
        return lambda: apply(F.linear(x, weight))

    note = "" if act == "none" else "activation as further kernels"
    allowed = None if act == "none" or case.scheme == "fp32" else _TWICE
    return Offer([call(**only) for (only,) in sets], note, allowed)


def _grouped(case: Case, sets: list[Calls]) -> Offer | str:
    if case.scheme != "bf16":
        return "grouped_mm multiplies dense bf16 only"
    # Public since torch 2.10, an operator without promises before.
    multiply = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
    if multiply is None:
        return "this torch has no grouped_mm"

    def one(call: dict[str, Any], rows: Tensor | None) -> Tensor:
        weight, ids = call["weight"], call["topk_ids"]
        ranked, order = ids.flatten().sort()
        experts = torch.arange(len(weight), device=ids.device, dtype=ids.dtype)
        ends = torch.searchsorted(ranked, experts, right=True).int()
        x = call["x"] if rows is None else rows
        x = x.flatten(0, 1)[order] if x.dim() == 3 else x[order // ids.shape[1]]
        made = ACTIVATIONS[call.get("activation") or "none"](
            multiply(x, weight.transpose(1, 2), offs=ends)
        )
        result = torch.empty_like(made)
        result[order] = made
        result = result.view(*ids.shape, -1)
        if "topk_weights" not in call:
            return result
        weighted: Tensor = result * call["topk_weights"][..., None]
        reduced = weighted.sum(1) if call["reduce"] else weighted
        return reduced.to(made.dtype)

    def all_of(calls: Calls) -> Tensor:
        rows = None
        for call in calls:
            rows = one(call, rows)
        assert rows is not None
        return rows

    note = joined("sorting, gathering and epilogue as further kernels", "rounded between them")
    return Offer([lambda c=calls: all_of(c) for calls in sets], note, _TWICE)  # type: ignore[misc]


def _add(case: Case, sets: list[Calls]) -> Offer | str:
    def call(x: Tensor, bias: Tensor, scale: float, out: Tensor) -> Call:
        return lambda: torch.add(bias, x, alpha=scale, out=out)

    return Offer([call(**only) for (only,) in sets])


def _sort(case: Case, sets: list[Calls]) -> Offer | str:
    k, p = case.facts["k"], case.facts["p"]
    joint = case.facts["order"] == "joint"

    def draw(probs: Tensor) -> Tensor:
        limited = 0 < k < probs.shape[1]
        if limited and not joint:
            ranked, ids = probs.topk(k)
            total = ranked.sum(-1, keepdim=True)
        else:
            ranked, ids = probs.sort(descending=True)
            total = ranked.sum(-1, keepdim=True)
            if limited:
                ranked, ids = ranked[:, :k], ids[:, :k]
        before = ranked.cumsum(-1) - ranked
        ranked = ranked.where(before < p * total, 0)
        # The largest of p / E, E exponential, falls on a token with probability p.
        best = (ranked / torch.empty_like(ranked).exponential_()).argmax(-1, keepdim=True)
        return ids.gather(1, best)[:, 0]

    note = "sums in fp32, other random numbers"
    return Offer([lambda t=only["probs"]: draw(t) for (only,) in sets], note)  # type: ignore[misc]


PEER = Peer(
    "torch",
    "torch",
    (
        Kernel("fused_gemv", _linear),
        Kernel("fused_moe_gemv", _grouped, "grouped_mm"),
        Kernel("fused_mul_add", _add),
        Kernel("top_k_top_p_sampling_from_probs", _sort, "sort"),
    ),
    devices=(),
)
