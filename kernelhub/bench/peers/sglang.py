"""SGLang: Triton experts and its run-time compiled kernels. Written for version 0.5.23."""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor

from kernelhub.bench.cases import Case
from kernelhub.bench.clock import Call
from kernelhub.bench.inputs import Calls
from kernelhub.bench.peers import Kernel, Offer, Peer, whole_layer

_MOE = "sglang.srt.layers.moe"
ROUNDED = "gate and up rounded before SwiGLU"
FP8 = "x and the middle rounded to fp8 by further kernels"
# Of a result's size: 16-bit roundings between two products, and e4m3's 6 % of every factor.
ALLOWED, ALLOWED_FP8 = 0.0625, 0.3


def _experts(case: Case, sets: list[Calls]) -> Offer | str:
    reason = whole_layer(case)
    if reason or case.scheme not in ("bf16", "fp16", "fp8", "int4"):
        return reason or f"has no experts of scheme {case.scheme} on these inputs"
    library = importlib.import_module(f"{_MOE}.moe_runner.triton_utils")
    config = importlib.import_module(f"{_MOE}.moe_runner").MoeRunnerConfig(inplace=False)
    chosen = importlib.import_module(f"{_MOE}.topk").StandardTopKOutput

    def call(up: dict[str, Any], down: dict[str, Any]) -> Call:
        topk = chosen(down["topk_weights"], up["topk_ids"], None)
        more: dict[str, Any] = {}
        if case.scheme in ("fp8", "int4"):
            more = {"w1_scale": up["weight_scale"], "w2_scale": down["weight_scale"]}
        if case.scheme == "fp8":
            more |= {"use_fp8_w8a8": True, "block_shape": [128, 128]}
        if case.scheme == "int4":
            group = up["x"].shape[-1] // up["weight_scale"].shape[-1]
            more |= {"use_int4_w4a16": True, "block_shape": [0, group]}
        weights = up["weight"], down["weight"]
        return lambda: library.fused_experts(up["x"], *weights, topk, config, **more)

    calls = [call(up, down) for up, down in sets]
    return (
        Offer(calls, FP8, ALLOWED_FP8) if case.scheme == "fp8" else Offer(calls, ROUNDED, ALLOWED)
    )


def _rope(case: Case, sets: list[Calls]) -> Offer | str:
    if case.facts["cache"] != "fp32" or case.scheme == "fp32":
        return "rotates 16-bit heads by an fp32 cache only"
    library = importlib.import_module("sglang.kernels.ops.attention.rope")

    def call(query: Tensor, key: Tensor, cos_sin_cache: Tensor, **rest: Any) -> Call:
        rot = cos_sin_cache.shape[1]
        part = query[..., :rot], key[..., :rot]

        def run() -> tuple[Tensor, Tensor]:
            library.apply_rope_inplace(
                *part, cos_sin_cache, rest["positions"], is_neox=rest["is_neox"]
            )
            return query, key

        return run

    return Offer([call(**only) for (only,) in sets])


def _gemv(case: Case, sets: list[Calls]) -> Offer | str:
    n, k = case.facts["N"], case.facts["K"]
    if case.scheme != "bf16" or case.facts["act"] != "none" or case.rows != 1:
        return "multiplies one row by dense bf16, without an activation"
    if n % 8 or k % 512 or not (64 <= n <= 65536 and 512 <= k <= 17408):
        return "N is a multiple of 8 up to 65536, K one of 512 up to 17408"
    library = importlib.import_module("sglang.kernels.ops.gemm.hopper_bf16_gemv")

    def call(x: Tensor, weight: Tensor, **_: Any) -> Call:
        return lambda: library.hopper_bf16_gemv(x, weight)

    return Offer([call(**only) for (only,) in sets])


PEER = Peer(
    "sglang",
    "sglang",
    (
        Kernel("fused_moe_gemv", _experts, "triton"),
        Kernel("rotary_embedding", _rope),
        Kernel("fused_gemv", _gemv, "hopper_bf16_gemv"),
    ),
)
