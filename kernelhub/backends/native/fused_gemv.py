"""fused_gemv by the compiled kernel."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from kernelhub.backend import Implementation
from kernelhub.backends.native import _gemv
from kernelhub.backends.native.kernels import Launchers


def make(launchers: Launchers) -> Implementation:
    def fused_gemv(
        x: Tensor,
        weight: Tensor,
        x_scale: Tensor | None = None,
        weight_scale: Tensor | None = None,
        *,
        weight_zero: Tensor | None = None,
        group_size: int | None = None,
        bias: Tensor | None = None,
        activation: Literal["swiglu", "silu", "gelu", "gelu_tanh"] | None = None,
        norm_weight: Tensor | None = None,
        eps: float = 1e-6,
        out_dtype: torch.dtype | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        *lead, k = x.shape
        m, n = math.prod(lead), weight.shape[0]
        outputs = n // 2 if activation == "swiglu" else n
        result = _gemv.result_for(x, (m, outputs), out_dtype, out)
        workspace = None
        if norm_weight is not None:
            workspace = torch.empty(m, n, dtype=torch.float32, device=x.device)
        if m > 0 and outputs > 0:
            launchers[x.device](
                x.reshape(m, k),
                weight,
                _gemv.scale_of_rows(x_scale, m),
                weight_scale,
                weight_zero,
                bias,
                norm_weight,
                result,
                workspace,
                _gemv.group_size(weight, weight_scale, group_size, k),
                _gemv.ACTIVATIONS[activation],
                _gemv.tile(launchers, "fused_gemv", x, weight, k),
                eps,
            )
        return _gemv.delivered(result.view(*lead, outputs), out)

    return Implementation("fused_gemv", fused_gemv, rejects=_gemv.rejects, chain=_gemv.chain)
