"""FlashInfer: samplers, rotary embedding, and a GEMM for few rows. Written for version 0.7."""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor

from kernelhub.bench.cases import Case
from kernelhub.bench.clock import Call
from kernelhub.bench.inputs import Calls
from kernelhub.bench.peers import Kernel, Offer, Peer

_SEEDS = (0, 0)  # passed by value, so that a graph can hold the call
_MOST_CAKE = 1024


def sampling(library: Any, case: Case, sets: list[Calls], **seeds: int) -> Offer:
    """The samplers that FlashInfer and sgl-kernel share; only FlashInfer's take `seeds`."""
    k, p = case.facts["k"], case.facts["p"]

    def call(probs: Tensor, filter_apply_order: str, **_: Any) -> Call:
        if not 0 < k < probs.shape[1]:
            return lambda: library.top_p_sampling_from_probs(probs, p, **seeds)
        return lambda: library.top_k_top_p_sampling_from_probs(
            probs, k, p, filter_apply_order=filter_apply_order, **seeds
        )

    note = "rejection sampling in fp32, other random numbers"
    return Offer([call(**only) for (only,) in sets], note)


def _sampling(case: Case, sets: list[Calls]) -> Offer | str:
    seed, offset = _SEEDS
    library = importlib.import_module("flashinfer.sampling")
    return sampling(library, case, sets, seed=seed, offset=offset)


def _cake(case: Case, sets: list[Calls]) -> Offer | str:
    k, p = case.facts["k"], case.facts["p"]
    if case.facts["order"] != "top_k_first" or not 0 < k <= min(_MOST_CAKE, case.facts["V"] - 1):
        return f"filters by top-k first, of 1 to {_MOST_CAKE}"
    library = importlib.import_module("flashinfer.cake_sampling")
    seed, offset = _SEEDS

    def call(probs: Tensor, **_: Any) -> Call:
        return lambda: library.top_k_top_p_sampling_from_probs(
            probs, k, p, philox_seed=seed, philox_offset=offset
        )

    note = "sums in fp32, other random numbers"
    return Offer([call(**only) for (only,) in sets], note)


def rope(library: Any, case: Case, sets: list[Calls]) -> Offer | str:
    """The signature that FlashInfer and sgl-kernel share: heads flattened into rows."""
    if case.facts["cache"] != "fp32":
        return "reads an fp32 cache only"
    if case.scheme == "fp32":
        return "rotates 16-bit heads only"

    def call(query: Tensor, key: Tensor, **rest: Any) -> Call:
        def run() -> tuple[Tensor, Tensor]:
            library.apply_rope_with_cos_sin_cache_inplace(
                positions=rest["positions"],
                query=query.view(len(query), -1),
                key=key.view(len(key), -1),
                head_size=rest["head_size"],
                cos_sin_cache=rest["cos_sin_cache"],
                is_neox=rest["is_neox"],
            )
            return query, key

        return run

    return Offer([call(**only) for (only,) in sets])


def _rope(case: Case, sets: list[Calls]) -> Offer | str:
    return rope(importlib.import_module("flashinfer.rope"), case, sets)


def _tinygemm(case: Case, sets: list[Calls]) -> Offer | str:
    n, k = case.facts["N"], case.facts["K"]
    if case.scheme != "bf16" or case.facts["act"] != "none" or n % 16 or k % 64:
        return "multiplies dense bf16 without an activation, N a multiple of 16 and K of 64"
    library = importlib.import_module("flashinfer.gemm")

    def call(x: Tensor, weight: Tensor, out: Tensor, **_: Any) -> Call:
        def run() -> Tensor:
            library.tinygemm_bf16(x, weight, out)
            return out

        return run

    return Offer([call(**only) for (only,) in sets])


PEER = Peer(
    "flashinfer",
    "flashinfer",
    (
        Kernel("top_k_top_p_sampling_from_probs", _sampling),
        Kernel("top_k_top_p_sampling_from_probs", _cake, "cake"),
        Kernel("rotary_embedding", _rope),
        Kernel("fused_gemv", _tinygemm, "tinygemm"),
    ),
)
