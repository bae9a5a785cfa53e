"""vLLM: Triton experts, Marlin for int4, rotary embedding. Written for version 0.20.

Marlin's layout of weights and scales is made in `prepare`, as a loader would, and not timed.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from kernelhub.bench.cases import Case
from kernelhub.bench.clock import Call
from kernelhub.bench.inputs import Calls
from kernelhub.bench.peers import Kernel, Offer, Peer, joined, whole_layer
from kernelhub.bench.peers.sglang import ALLOWED, ALLOWED_FP8, FP8, ROUNDED

_LAYERS = "vllm.model_executor.layers"
_LAYOUT = "weights laid out for it beforehand"


def _experts(case: Case, sets: list[Calls]) -> Offer | str:
    reason = whole_layer(case)
    if reason or case.scheme not in ("bf16", "fp16", "fp8", "int4"):
        return reason or f"has no experts of scheme {case.scheme} on these inputs"
    library = importlib.import_module(f"{_LAYERS}.fused_moe.fused_moe")
    configs = importlib.import_module(f"{_LAYERS}.fused_moe.config")

    def call(up: dict[str, Any], down: dict[str, Any]) -> Call:
        config = None
        if case.scheme == "fp8":
            config = configs.fp8_w8a8_moe_quant_config(
                up["weight_scale"], down["weight_scale"], block_shape=[128, 128]
            )
        if case.scheme == "int4":
            config = configs.int4_w4a16_moe_quant_config(
                up["weight_scale"], down["weight_scale"], None, None, [0, _group(up)]
            )
        weights = up["weight"], down["weight"]
        chosen = down["topk_weights"], up["topk_ids"]
        return lambda: library.fused_experts(up["x"], *weights, *chosen, quant_config=config)

    calls = [call(up, down) for up, down in sets]
    return (
        Offer(calls, FP8, ALLOWED_FP8) if case.scheme == "fp8" else Offer(calls, ROUNDED, ALLOWED)
    )


def _group(call: dict[str, Any]) -> int:
    return int(2 * call["weight"].shape[-1] // call["weight_scale"].shape[-1])


class _Marlin:
    """Weights in Marlin's layout, each made once however many sets share it."""

    def __init__(self) -> None:
        self.ops = importlib.import_module("vllm._custom_ops")
        self.utils = importlib.import_module(f"{_LAYERS}.quantization.utils.marlin_utils")
        self.type = importlib.import_module("vllm.scalar_type").scalar_types.uint4b8
        self._made: dict[int, tuple[Tensor, Tensor]] = {}

    def weight(self, call: dict[str, Any]) -> tuple[Tensor, Tensor]:
        codes, scale = call["weight"], call["weight_scale"]
        if id(codes) not in self._made:
            n, k = codes.shape[-2], 2 * codes.shape[-1]
            # Four bytes, low nibble first, are the eight codes of GPTQ's int32.
            packed = codes.view(torch.int32).transpose(-1, -2).contiguous()
            none = torch.empty((*codes.shape[:-2], 0), dtype=torch.int32, device=codes.device)
            experts = codes.dim() == 3
            repack = self.ops.gptq_marlin_moe_repack if experts else self.ops.gptq_marlin_repack
            permute = getattr(self.utils, f"marlin_{'moe_' if experts else ''}permute_scales")
            scales = permute(scale.transpose(-1, -2).contiguous(), k, n, _group(call))
            self._made[id(codes)] = repack(packed, none, k, n, 4), scales
        return self._made[id(codes)]


def _not_marlin(case: Case, sets: list[Calls], sizes: tuple[int, ...]) -> str:
    if case.scheme != "int4":
        return "multiplies int4 weights only"
    if any(size % 128 for size in sizes) or _group(sets[0][0]) not in (32, 64, 128):
        return "sizes are multiples of 128, groups of 32, 64 or 128"
    return ""


def _marlin(case: Case, sets: list[Calls]) -> Offer | str:
    n, k, act = case.facts["N"], case.facts["K"], case.facts["act"]
    reason = _not_marlin(case, sets, (n, k))
    if reason or act not in ("none", "swiglu"):
        return reason or f"has no {act}"
    made = _Marlin()

    def call(x: Tensor, out: Tensor, **rest: Any) -> Call:
        weight, scale = made.weight(rest)
        empty = torch.empty(0, dtype=torch.int32, device=x.device)
        space = made.utils.marlin_make_workspace_new(x.device)

        def run() -> Tensor:
            product: Tensor = made.utils.apply_gptq_marlin_linear(
                input=x,
                weight=weight,
                weight_scale=scale,
                weight_zp=empty,
                g_idx=empty,
                g_idx_sort_indices=empty,
                workspace=space,
                wtype=made.type,
                output_size_per_partition=n,
                input_size_per_partition=k,
                is_k_full=True,
            )
            if act == "none":
                return product
            torch.ops._C.silu_and_mul(out, product)
            return out

        return run

    note = joined(_LAYOUT, "" if act == "none" else "SwiGLU as a second kernel")
    return Offer([call(**only) for (only,) in sets], note, ALLOWED)


def _marlin_experts(case: Case, sets: list[Calls]) -> Offer | str:
    reason = whole_layer(case) or _not_marlin(case, sets, (case.facts["H"], case.facts["I"]))
    if reason:
        return reason
    library = importlib.import_module(f"{_LAYERS}.fused_moe.fused_marlin_moe")
    made = _Marlin()

    def call(up: dict[str, Any], down: dict[str, Any]) -> Call:
        (first, first_scale), (second, second_scale) = made.weight(up), made.weight(down)
        scales = first_scale, second_scale
        chosen = down["topk_weights"], up["topk_ids"]
        return lambda: library.fused_marlin_moe(
            up["x"], first, second, None, None, *scales, *chosen, quant_type_id=made.type.id
        )

    return Offer([call(up, down) for up, down in sets], joined(_LAYOUT, ROUNDED), ALLOWED)


def _rope(case: Case, sets: list[Calls]) -> Offer | str:
    if case.facts["cache"] != "same" and case.scheme != "fp32":
        return "reads a cache of the heads' dtype only"
    library = importlib.import_module("vllm._custom_ops")

    def call(query: Tensor, key: Tensor, **rest: Any) -> Call:
        names = ("head_size", "cos_sin_cache", "is_neox")

        def run() -> tuple[Tensor, Tensor]:
            library.rotary_embedding(rest["positions"], query, key, *map(rest.get, names))
            return query, key

        return run

    return Offer([call(**only) for (only,) in sets])


PEER = Peer(
    "vllm",
    "vllm",
    (
        Kernel("fused_moe_gemv", _experts, "triton"),
        Kernel("fused_moe_gemv", _marlin_experts, "marlin"),
        Kernel("fused_gemv", _marlin, "marlin"),
        Kernel("rotary_embedding", _rope),
    ),
)
