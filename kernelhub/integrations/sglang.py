"""The ops inside SGLang (written against 0.5.23): hooks of its plug-in group `sglang.srt.plugins`.

Forwards for out-of-tree platforms (`register_oot_forward`) are asked on such platforms alone, and
CUDA and MUSA are in its tree; a hook wraps a method everywhere, and the method is the way back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from kernelhub.integrations import engines

Own = Callable[..., Any]


def rotary(own: Own, module: Any, positions: Tensor, query: Tensor, *args: Any, **more: Any) -> Any:
    from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding

    call = {**dict(zip(("key", "offsets", "fused_set_kv_buffer_arg"), args, strict=False)), **more}
    key, offsets = call.pop("key", None), call.pop("offsets", None)
    unknown = ", ".join(name for name, value in call.items() if value is not None)
    why = f"arguments that the op has not: {unknown}" if unknown else ""
    if not engines.rotates_like(type(module), RotaryEmbedding):
        why = f"{type(module).__name__} has a forward of its own"
    elif module.is_torch_compile or module._force_native:
        why = "the engine asks for its native forward"
    engine, cache = lambda: own(module, positions, query, *args, **more), module.cos_sin_cache
    return engines.rotary(engine, why, module, cache, positions, query, key, offsets)


def linear(own: Own, method: Any, layer: Any, x: Tensor, bias: Tensor | None = None) -> Any:
    return engines.linear(lambda: own(method, layer, x, bias), layer, x, bias)


def swiglu_can_run(own: Own, dual: Any, x: Any, layer: Any) -> bool:
    """Whether the op takes a call is certain once it has: `swiglu` hands over what it made."""
    from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
    from sglang.srt.runtime_context import get_forward

    why = engines.why_not_gemv(layer, x)
    if type(getattr(layer, "quant_method", None)) is not UnquantizedLinearMethod:
        why = f"{type(layer).__name__} is quantised or wrapped"
    elif dual.tp_size > 1 and get_forward().sp_active:
        why = "sequence parallel: the layer gathers its input first"
    call = (x, getattr(layer, "weight", None))
    dual.made = engines.run("fused_gemv", "MLP", lambda: None, why, *call, activation="swiglu")
    return dual.made is not None or own(dual, x, layer)


def swiglu(own: Own, dual: Any, x: Any, layer: Any) -> Any:
    y, dual.made = getattr(dual, "made", None), None
    return own(dual, x, layer) if y is None else y


def sample(own: Own, self: Any, probs: Tensor, info: Any, positions: Tensor, simple: bool) -> Any:
    seed, masked = info.sampling_seed, info.sampling_mask_batch_indices is not None
    tokens = engines.run(
        "top_k_top_p_sampling_from_probs", "Sampler",
        lambda: own(self, probs, info, positions, simple),
        "the engine asks for the mask of what may be drawn" if masked else "", probs,
        info.top_ks if info.need_top_k_sampling else 0,
        info.top_ps if info.need_top_p_sampling else 1.0,
        min_p=info.min_ps if info.need_min_p_sampling else None, filter_apply_order="joint",
        seed=seed, offset=None if seed is None else positions,
    )  # fmt: skip
    return tokens if isinstance(tokens, tuple) else (tokens, None)


HOOKS: dict[str, dict[str, Callable[..., Any]]] = {
    "rotary_embedding": {"rotary_embedding.base.RotaryEmbedding.forward": rotary},
    "fused_gemv": {
        "quantization.unquant.UnquantizedLinearMethod.apply": linear,
        "dual_gemm.DualGemm.can_run": swiglu_can_run,
        "dual_gemm.DualGemm.__call__": swiglu,
    },
    "top_k_top_p_sampling_from_probs": {"sampler.Sampler._sample_from_probs": sample},
}


def register() -> None:
    """The plug-in: SGLang calls it in each process, then applies the hooks."""
    ops = engines.chosen("SGLang", HOOKS)
    if ops:
        from sglang.srt.plugins.hook_registry import HookRegistry, HookType
    for op in ops:
        for method, hook in HOOKS[op].items():
            HookRegistry.register(f"sglang.srt.layers.{method}", hook, HookType.AROUND)
