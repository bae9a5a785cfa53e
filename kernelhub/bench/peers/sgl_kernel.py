"""sgl-kernel: samplers and rotary embedding. Version 0.3 has both, 0.4 of sglang-kernel neither."""

from __future__ import annotations

import importlib

from kernelhub.bench.cases import Case
from kernelhub.bench.inputs import Calls
from kernelhub.bench.peers import Kernel, Offer, Peer, flashinfer

_GONE = "this version has no such kernel: 0.3 of sgl-kernel has"


def _sampling(case: Case, sets: list[Calls]) -> Offer | str:
    library = importlib.import_module("sgl_kernel")
    if not hasattr(library, "top_k_top_p_sampling_from_probs"):
        return _GONE
    return flashinfer.sampling(library, case, sets)


def _rope(case: Case, sets: list[Calls]) -> Offer | str:
    library = importlib.import_module("sgl_kernel")
    if not hasattr(library, "apply_rope_with_cos_sin_cache_inplace"):
        return _GONE
    return flashinfer.rope(library, case, sets)


PEER = Peer(
    "sgl_kernel",
    "sgl_kernel",
    (
        Kernel("top_k_top_p_sampling_from_probs", _sampling),
        Kernel("rotary_embedding", _rope),
    ),
)
