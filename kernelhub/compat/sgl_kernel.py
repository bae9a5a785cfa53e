"""The MUSA functions of sgl-kernel by their old names, each as one call of an op.

Names, arguments and their order are the old ones; numbers, errors and the choice of a backend are
the op's. A `DeprecationWarning` names the call to write instead. What had another meaning is
translated or refused (`ArgumentError`); docs/migrating.md lists both. Nothing is registered with
torch.
"""

# ruff: noqa: N803, N806 - A, B and C are the old names

from __future__ import annotations

import warnings
from typing import Any, cast

import torch
from torch import Generator, Tensor

from kernelhub import ops
from kernelhub.contracts._weights import FP8, PACKED
from kernelhub.errors import ArgumentError

__all__ = [
    "musa_batched_rotary_embedding_contiguous",
    "musa_fused_gemv",
    "musa_fused_moe_gemv",
    "musa_fused_mul_add",
    "musa_rotary_embedding_contiguous",
    "top_k_top_p_sampling_from_probs",
]


def musa_rotary_embedding_contiguous(
    positions: Tensor,
    query: Tensor,
    key: Tensor,
    head_size: int,
    cos_sin_cache: Tensor,
    is_neox: bool,
) -> None:
    """`rotary_embedding`, in place on query and key.

    Args:
        positions: `[T]`, int32 or int64.
        query, key: `[T, Hq, D]` and `[T, Hk, D]`; fp32, fp16 or bf16.
        head_size: D.
        cos_sin_cache: `[P, rot_dim]`, cosines, then sines; fp32 or the dtype of `query`.
        is_neox: True pairs lanes `i` and `i + rot_dim/2`, False `2i` and `2i + 1`.

    Raises:
        ArgumentError: as `rotary_embedding` does, also where `head_size` is not D.
    """
    _moved(
        "musa_rotary_embedding_contiguous",
        "rotary_embedding(positions, query, key, head_size, cos_sin_cache, is_neox)",
    )
    ops.rotary_embedding(positions, query, key, head_size, cos_sin_cache, is_neox)


def musa_batched_rotary_embedding_contiguous(
    positions: Tensor,
    query: Tensor,
    key: Tensor,
    head_size: int,
    cos_sin_cache: Tensor,
    is_neox: bool,
    rot_dim: int,
    cos_sin_cache_offsets: Tensor,
) -> None:
    """The same with row `positions + cos_sin_cache_offsets` of the cache.

    Args:
        rot_dim: the width of `cos_sin_cache`; another is an `ArgumentError`.
        cos_sin_cache_offsets: `[T]`, int32 or int64.
    """
    _moved(
        "musa_batched_rotary_embedding_contiguous",
        "rotary_embedding(positions, query, key, head_size, cos_sin_cache, is_neox, "
        "rot_dim=rot_dim, cos_sin_cache_offsets=cos_sin_cache_offsets)",
    )
    ops.rotary_embedding(
        positions, query, key, head_size, cos_sin_cache, is_neox,
        rot_dim=rot_dim, cos_sin_cache_offsets=cos_sin_cache_offsets,
    )  # fmt: skip


def musa_fused_gemv(
    x: Tensor,
    qweight: Tensor,
    x_scales: Tensor | None = None,
    qweight_scales: Tensor | None = None,
    use_swigelu: bool = False,
    use_rms_norm: bool = False,
    gamma: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """`fused_gemv`: a weight times a few rows, then SwiGLU or RMSNorm.

    Args:
        x: `[M, K]`; fp32, fp16, bf16 or float8_e4m3fn.
        qweight: `[N, K]` of x's dtype or float8_e4m3fn, or int4 packed along K, low nibble first.
        x_scales: for fp8 x, fp32 `[M, ceil(K/g)]`.
        qweight_scales: fp8: fp32 `[ceil(N/g), ceil(K/g)]`, g 128 or 64 as its columns tell. int4:
            `[N, K/g]` of two columns or more.
        use_swigelu: `silu(gate) * up`, gate the first N/2 rows of the weight.
        use_rms_norm: RMSNorm of the output with `gamma`, `[N]`, and `eps`.

    Returns:
        Tensor `[M, N]`, `[M, N/2]` with SwiGLU, of x's dtype; bf16 for fp8 weights.

    Raises:
        ArgumentError: as `fused_gemv` does; `gamma` and `use_rms_norm` do not come together, or
            `use_swigelu` joins them; int4 has one column of scales.
    """
    op = "musa_fused_gemv"
    _moved(
        op,
        "fused_gemv(x, qweight, x_scales, qweight_scales, "
        "activation='swiglu' if use_swigelu else None, norm_weight=gamma, eps=eps)",
    )
    if use_rms_norm and use_swigelu:
        raise ArgumentError(op, "use_rms_norm", "False beside use_swigelu", use_rms_norm)
    if bool(use_rms_norm) is (gamma is None):
        expected = "a tensor [N] with use_rms_norm" if use_rms_norm else "None without use_rms_norm"
        raise ArgumentError(op, "gamma", expected, gamma)
    return ops.fused_gemv(
        x, qweight, x_scales, qweight_scales,
        group_size=_group_size(op, "qweight_scales", x, qweight, qweight_scales),
        activation="swiglu" if use_swigelu else None, norm_weight=gamma, eps=eps,
        out_dtype=torch.bfloat16 if getattr(qweight, "dtype", None) is FP8 else None,
    )  # fmt: skip


def musa_fused_moe_gemv(
    A: Tensor,
    B: Tensor,
    C: Tensor,
    A_scale: Tensor | None,
    B_scale: Tensor | None,
    topk_weights: Tensor,
    topk_ids: Tensor,
    mul_routed_weight: bool,
    topk: int,
    use_int4_w4a16: bool,
    use_swigelu: bool,
) -> None:
    """`fused_moe_gemv`: the weights of each token's experts times its row, into `C`.

    Args:
        A: `[M, K]` where `topk` is k, the columns of `topk_ids`; `[M*k, K]`, a row for each slot,
            where it is 1 (down projection). Dtypes as in `musa_fused_gemv`.
        B: `[E, N, K]`, dtypes and packing as in `musa_fused_gemv`.
        C: `[M*k, n]` or `[M, k, n]`, n = N, or N/2 with SwiGLU; A's dtype, bf16 for fp8 A.
        A_scale: for fp8 A, fp32 `[rows of A, ceil(K/g)]`.
        B_scale: fp8: fp32 `[E, ceil(N/g), ceil(K/g)]`, g 128 or 64 as its columns tell. int4:
            `[E, N, K/g]` of two columns or more.
        topk_weights: `[M, k]`; multiply before SwiGLU, where `mul_routed_weight`.
        topk_ids: `[M, k]`, int32 or int64.
        use_int4_w4a16: whether B is packed int4.

    Raises:
        ArgumentError: as `fused_moe_gemv` does; `topk` is neither k nor 1, A has other rows than
            it says, `use_int4_w4a16` does not fit B, int4 has one column of scales.
    """
    op = "musa_fused_moe_gemv"
    _moved(
        op,
        "fused_moe_gemv(A, B, topk_ids, topk_weights if mul_routed_weight else None, "
        "A_scale, B_scale, activation='swiglu' if use_swigelu else None, out=C) "
        "with C [M, k, n], and A [M, k, K] where topk was 1",
    )
    wanted = {"A": (A, "2"), "B": (B, "3"), "C": (C, "2 or 3"), "topk_ids": (topk_ids, "2")}
    for name, (value, ranks) in wanted.items():
        if not isinstance(value, Tensor) or str(value.dim()) not in ranks:
            raise ArgumentError(op, name, f"a tensor of rank {ranks}", value)
    if mul_routed_weight and topk_weights is None:
        raise ArgumentError(op, "topk_weights", "a tensor with mul_routed_weight", None)
    if bool(use_int4_w4a16) is not (B.dtype in PACKED):
        expected = f"{B.dtype in PACKED} beside {str(B.dtype).removeprefix('torch.')} 'B'"
        raise ArgumentError(op, "use_int4_w4a16", expected, use_int4_w4a16)
    tokens, slots = topk_ids.shape
    if topk not in (slots, 1):
        raise ArgumentError(op, "topk", f"k = {slots}, the columns of 'topk_ids', or 1", topk)
    rows = tokens if topk == slots else tokens * slots
    if A.shape[0] != rows:
        raise ArgumentError(op, "A", f"{rows} rows beside topk = {topk}", A)
    if topk != slots:
        A, A_scale = _by_slot(A, tokens, slots), _by_slot(A_scale, tokens, slots)
    ops.fused_moe_gemv(
        A, B, topk_ids, topk_weights if mul_routed_weight else None, A_scale, B_scale,
        group_size=_group_size(op, "B_scale", A, B, B_scale),
        activation="swiglu" if use_swigelu else None, out=_by_slot(C, tokens, slots),
    )  # fmt: skip


def musa_fused_mul_add(self: Tensor, bias: Tensor, scale: float, accurate: bool = True) -> Tensor:
    """`fused_mul_add`: `self * scale + bias`, rounded once.

    Args:
        self, bias: any shape; fp32, fp16 or bf16, both the same.
        accurate: False writes the result to `bias` and returns that. The numbers are the same.

    Raises:
        ArgumentError: as `fused_mul_add` does.
    """
    _moved("musa_fused_mul_add", "fused_mul_add(self, bias, scale, out=None if accurate else bias)")
    return ops.fused_mul_add(self, bias, scale, out=None if accurate else bias)


def top_k_top_p_sampling_from_probs(
    probs: Tensor,
    top_k: Tensor | int,
    top_p: Tensor | float,
    indices: Tensor | None = None,
    filter_apply_order: str = "top_k_first",
    deterministic: bool = True,
    generator: Generator | None = None,
    check_nan: bool = False,
) -> Tensor:
    """The op of the same name: a token for each row, or for each of `indices`.

    Args:
        probs: `[R, V]`; fp32, fp16 or bf16.
        top_k, top_p: an int and a float in (0, 1], or int32 or int64 and fp32 `[R]`.
        indices: int32 or int64 `[B]`, the row of each sample.
        check_nan: look for a NaN in `probs`, which waits for the device.

    Returns:
        Tensor int32 `[B]`, or `[R]` without `indices`.

    Raises:
        ArgumentError: as the op does; `check_nan` found a NaN.
    """
    op = "top_k_top_p_sampling_from_probs"
    _moved(
        op,
        f"{op}(probs, top_k, top_p, indices=indices, filter_apply_order=filter_apply_order, "
        "deterministic=deterministic, generator=generator)",
    )
    if check_nan and isinstance(probs, Tensor) and bool(probs.isnan().any()):
        raise ArgumentError(op, "probs", "no NaN, with check_nan", "a NaN")
    tokens = ops.top_k_top_p_sampling_from_probs(
        probs, top_k, top_p, indices=indices, filter_apply_order=cast(Any, filter_apply_order),
        deterministic=deterministic, generator=generator,
    )  # fmt: skip
    return cast(Tensor, tokens)


def _moved(name: str, call: str) -> None:
    """Warn whoever called the function that calls this. Tracing by torch.compile cannot warn."""
    if not torch.compiler.is_compiling():
        warnings.warn(
            f"{name} is deprecated: call kernelhub.ops.{call}", DeprecationWarning, stacklevel=3
        )


def _group_size(op: str, name: str, x: Any, weight: Any, scale: Any) -> int | None:
    """g, which the columns of the scales told. What else is wrong with these, the op says."""
    if not all(isinstance(t, Tensor) and t.dim() > 0 for t in (x, weight, scale)):
        return None
    columns, k = scale.shape[-1], x.shape[-1]
    if weight.dtype in PACKED and columns == 1:
        # Then, and only then, nibbles were two's complement.
        raise ArgumentError(op, name, "two columns or more (docs/migrating.md has one)", scale)
    of_64, of_128 = (-(-k // g) for g in (64, 128))
    return 64 if columns == of_64 != of_128 else None


def _by_slot(t: Any, tokens: int, slots: int) -> Any:
    """`[M*k, ...]` as `[M, k, ...]`; the op judges any other shape."""
    if isinstance(t, Tensor) and t.dim() == 2 and t.shape[0] == tokens * slots:
        return t.view(tokens, slots, t.shape[1])
    return t
