"""Stand-ins for other libraries: their documented signatures, the reference's arithmetic.

They show that what `bench --peers` passes means what the signature says, not that the libraries
work: argument order, layouts of packed weights, what is written and what is returned.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import kernelhub
from kernelhub.backends.reference import top_k_top_p_sampling_from_probs as sampling


def _reference(op: str) -> Any:
    return kernelhub.op(op).on("reference")


# ---- FlashInfer and sgl-kernel ---------------------------------------------------------------


def top_k_top_p_sampling_from_probs(  # type: ignore[no-untyped-def]
    probs, top_k, top_p, indices=None, filter_apply_order="top_k_first", deterministic=True,
    generator=None, check_nan=False, seed=None, offset=None,
) -> Tensor:  # fmt: skip
    """The least likely token that is kept: with any other k, p or order it is another one."""
    assert (seed is None) == (offset is None)
    mass = sampling._mass(probs)
    least = sampling._threshold(probs, mass, top_k, top_p, filter_apply_order)
    return torch.where(probs >= least, probs, torch.inf).argmin(-1).int()


def top_p_sampling_from_probs(  # type: ignore[no-untyped-def]
    probs, top_p, indices=None, deterministic=True, generator=None, check_nan=False, seed=None,
    offset=None,
) -> Tensor:  # fmt: skip
    return top_k_top_p_sampling_from_probs(probs, 0, top_p, seed=seed, offset=offset)


def cake(probs, top_k, top_p, *, philox_seed=None, philox_offset=None) -> Tensor:  # type: ignore[no-untyped-def]
    assert 1 <= top_k <= 1024 and (philox_seed is None) == (philox_offset is None)
    return top_k_top_p_sampling_from_probs(
        probs, top_k, top_p, seed=philox_seed, offset=philox_offset
    )


def apply_rope_with_cos_sin_cache_inplace(  # type: ignore[no-untyped-def]
    positions, query, key, head_size, cos_sin_cache, is_neox=True
) -> None:
    assert cos_sin_cache.dtype == torch.float32 and query.dim() == key.dim() == 2
    heads = query.view(len(query), -1, head_size), key.view(len(key), -1, head_size)
    _reference("rotary_embedding")(positions, *heads, head_size, cos_sin_cache, is_neox)


def tinygemm_bf16(input, weight, out, bias=None, use_pdl=False) -> None:  # type: ignore[no-untyped-def]
    assert input.shape[1] % 64 == 0 and weight.shape[0] % 16 == 0
    out.copy_(torch.nn.functional.linear(input, weight))


# ---- experts ---------------------------------------------------------------------------------


def _experts(
    x: Tensor, w1: Tensor, w2: Tensor, weights: Tensor, ids: Tensor, s1: Any, s2: Any
) -> Tensor:
    moe = _reference("fused_moe_gemv")
    assert weights.dtype == torch.float32 and w1.shape[1] == 2 * _width(w2)
    middle = moe(x, w1, ids, weight_scale=s1, activation="swiglu")
    return moe(middle, w2, ids, weights, weight_scale=s2, reduce=True)


def _width(weight: Tensor) -> int:
    return weight.shape[-1] * (2 if weight.dtype == torch.uint8 else 1)


class StandardTopKOutput(NamedTuple):
    topk_weights: Tensor
    topk_ids: Tensor
    router_logits: Tensor | None


def sglang_experts(  # type: ignore[no-untyped-def]
    hidden_states, w1, w2, topk_output, moe_runner_config, b1=None, b2=None, use_fp8_w8a8=False,
    use_int8_w8a8=False, use_int8_w8a16=False, use_int4_w4a16=False, per_channel_quant=False,
    w1_scale=None, w2_scale=None, w1_zp=None, w2_zp=None, a1_scale=None, a2_scale=None,
    block_shape=None,
) -> Tensor:  # fmt: skip
    weights, ids, _ = topk_output
    assert not moe_runner_config.inplace
    _check_scheme(w1, w1_scale, use_fp8_w8a8, use_int4_w4a16, block_shape)
    return _experts(hidden_states, w1, w2, weights, ids, w1_scale, w2_scale)


def _check_scheme(weight: Tensor, scale: Any, fp8: bool, int4: bool, block: Any) -> None:
    assert fp8 == (weight.dtype == torch.float8_e4m3fn) and int4 == (weight.dtype == torch.uint8)
    if fp8:
        assert block == [128, 128]
    if int4:
        assert block == [0, _width(weight) // scale.shape[-1]]


def fused_experts(  # type: ignore[no-untyped-def]
    hidden_states, w1, w2, topk_weights, topk_ids, inplace=False, activation="silu",
    apply_router_weight_on_input=False, global_num_experts=-1, expert_map=None, quant_config=None,
) -> Tensor:  # fmt: skip
    c = quant_config or SimpleNamespace(kind="", w1_scale=None, w2_scale=None, block=None)
    _check_scheme(w1, c.w1_scale, c.kind == "fp8", c.kind == "int4", c.block)
    return _experts(hidden_states, w1, w2, topk_weights, topk_ids, c.w1_scale, c.w2_scale)


def fp8_w8a8_moe_quant_config(
    w1_scale, w2_scale, a1_scale=None, a2_scale=None, block_shape=None
) -> Any:  # type: ignore[no-untyped-def]
    return SimpleNamespace(kind="fp8", w1_scale=w1_scale, w2_scale=w2_scale, block=block_shape)


def int4_w4a16_moe_quant_config(w1_scale, w2_scale, w1_zp, w2_zp, block_shape=None) -> Any:  # type: ignore[no-untyped-def]
    assert w1_zp is None and w2_zp is None
    return SimpleNamespace(kind="int4", w1_scale=w1_scale, w2_scale=w2_scale, block=block_shape)


# ---- Marlin: from GPTQ's layout, which its repacking starts from, back to ours ----------------


def gptq_marlin_repack(b_q_weight, perm, size_k, size_n, num_bits, is_a_8bit=False) -> Tensor:  # type: ignore[no-untyped-def]
    assert b_q_weight.shape[-2:] == (size_k // 8, size_n) and b_q_weight.is_contiguous()
    assert b_q_weight.dtype == torch.int32 and num_bits == 4 and perm.shape[-1] == 0
    return b_q_weight.transpose(-1, -2).contiguous().view(torch.uint8)


def marlin_permute_scales(s, size_k, size_n, group_size, is_a_8bit=False) -> Tensor:  # type: ignore[no-untyped-def]
    assert s.shape[-2:] == (size_k // group_size, size_n) and s.is_contiguous()
    return s.transpose(-1, -2)


def apply_gptq_marlin_linear(  # type: ignore[no-untyped-def]
    input, weight, weight_scale, weight_zp, g_idx, g_idx_sort_indices, workspace, wtype,
    output_size_per_partition, input_size_per_partition, is_k_full,
) -> Tensor:  # fmt: skip
    assert wtype == "uint4b8" and is_k_full and len(weight_zp) == len(g_idx) == 0
    assert (output_size_per_partition, input_size_per_partition) == (len(weight), input.shape[-1])
    return _reference("fused_gemv")(input, weight, weight_scale=weight_scale)


def fused_marlin_moe(  # type: ignore[no-untyped-def]
    hidden_states, w1, w2, bias1, bias2, w1_scale, w2_scale, topk_weights, topk_ids, quant_type_id
) -> Tensor:
    assert bias1 is None and bias2 is None and quant_type_id == 7
    return _experts(hidden_states, w1, w2, topk_weights, topk_ids, w1_scale, w2_scale)


class _Type(str):
    id = 7


def rotary_embedding(positions, query, key, head_size, cos_sin_cache, is_neox) -> None:  # type: ignore[no-untyped-def]
    assert cos_sin_cache.dtype == query.dtype
    _reference("rotary_embedding")(positions, query, key, head_size, cos_sin_cache, is_neox)


def apply_rope_inplace(q, k, cos_sin_cache, positions, *, is_neox, rope_dim=0) -> None:  # type: ignore[no-untyped-def]
    assert q.shape[-1] == k.shape[-1] == cos_sin_cache.shape[1]
    _reference("rotary_embedding")(positions, q, k, q.shape[-1], cos_sin_cache, is_neox)


SAMPLERS = {
    "top_k_top_p_sampling_from_probs": top_k_top_p_sampling_from_probs,
    "top_p_sampling_from_probs": top_p_sampling_from_probs,
}
ROPE = {"apply_rope_with_cos_sin_cache_inplace": apply_rope_with_cos_sin_cache_inplace}
_SGL, _MOE = "sglang.kernels.ops", "sglang.srt.layers.moe"
_LAYERS = "vllm.model_executor.layers"
MODULES: dict[str, dict[str, Any]] = {
    "flashinfer": {"__version__": "0.7.2"},
    "flashinfer.sampling": SAMPLERS,
    "flashinfer.cake_sampling": {"top_k_top_p_sampling_from_probs": cake},
    "flashinfer.rope": ROPE,
    "flashinfer.gemm": {"tinygemm_bf16": tinygemm_bf16},
    "sgl_kernel": {"__version__": "0.3.21", **SAMPLERS, **ROPE},
    "sglang": {"__version__": "0.5.23"},
    f"{_SGL}.attention.rope": {"apply_rope_inplace": apply_rope_inplace},
    f"{_SGL}.gemm.hopper_bf16_gemv": {"hopper_bf16_gemv": torch.nn.functional.linear},
    f"{_MOE}.moe_runner": {"MoeRunnerConfig": SimpleNamespace},
    f"{_MOE}.moe_runner.triton_utils": {"fused_experts": sglang_experts},
    f"{_MOE}.topk": {"StandardTopKOutput": StandardTopKOutput},
    "vllm": {"__version__": "0.20.2"},
    "vllm._custom_ops": {
        "gptq_marlin_repack": gptq_marlin_repack,
        "gptq_marlin_moe_repack": gptq_marlin_repack,
        "rotary_embedding": rotary_embedding,
    },
    "vllm.scalar_type": {"scalar_types": SimpleNamespace(uint4b8=_Type("uint4b8"))},
    f"{_LAYERS}.fused_moe.fused_moe": {"fused_experts": fused_experts},
    f"{_LAYERS}.fused_moe.config": {
        "fp8_w8a8_moe_quant_config": fp8_w8a8_moe_quant_config,
        "int4_w4a16_moe_quant_config": int4_w4a16_moe_quant_config,
    },
    f"{_LAYERS}.fused_moe.fused_marlin_moe": {"fused_marlin_moe": fused_marlin_moe},
    f"{_LAYERS}.quantization.utils.marlin_utils": {
        "marlin_permute_scales": marlin_permute_scales,
        "marlin_moe_permute_scales": marlin_permute_scales,
        "marlin_make_workspace_new": lambda device: torch.zeros(1, dtype=torch.int32),
        "apply_gptq_marlin_linear": apply_gptq_marlin_linear,
    },
}


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, members in MODULES.items():
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)

    def silu_and_mul(out: Tensor, y: Tensor) -> None:
        gate, up = y.chunk(2, -1)
        out.copy_(torch.nn.functional.silu(gate) * up)

    monkeypatch.setattr(torch.ops, "_C", SimpleNamespace(silu_and_mul=silu_and_mul), raising=False)
