"""fused_moe_gemv by the compiled kernel."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kernelhub.backend import Implementation
from kernelhub.backends.native import _gemv
from kernelhub.backends.native.kernels import Launchers


def make(launchers: Launchers) -> Implementation:
    def fused_moe_gemv(
        x: Tensor,
        weight: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor | None = None,
        x_scale: Tensor | None = None,
        weight_scale: Tensor | None = None,
        *,
        weight_zero: Tensor | None = None,
        group_size: int | None = None,
        activation: Literal["swiglu", "silu", "gelu", "gelu_tanh"] | None = None,
        reduce: bool = False,
        out_dtype: torch.dtype | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        tokens, slots = topk_ids.shape
        k, n = x.shape[-1], weight.shape[1]
        outputs = n // 2 if activation == "swiglu" else n
        shape = (tokens, outputs) if reduce else (tokens, slots, outputs)
        result = _gemv.result_for(x, shape, out_dtype, out)
        workspace = None
        if reduce:
            workspace = torch.empty(tokens, slots, outputs, dtype=torch.float32, device=x.device)
        per_slot = x.dim() == 3
        rows = tokens * slots if per_slot else tokens
        if result.numel() > 0:
            launchers[x.device](
                x.reshape(rows, k),
                weight,
                topk_ids,
                topk_weights,
                _gemv.scale_of_rows(x_scale, rows),
                weight_scale,
                weight_zero,
                result,
                workspace,
                _gemv.group_size(weight, weight_scale, group_size, k),
                _gemv.ACTIVATIONS[activation],
                per_slot,
                reduce,
                _gemv.tile(launchers, "fused_moe_gemv", x, weight, k),
            )
        return _gemv.delivered(result, out)

    return Implementation(
        "fused_moe_gemv", fused_moe_gemv, rejects=_gemv.rejects, chain=_gemv.chain
    )
