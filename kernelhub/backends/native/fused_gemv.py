"""fused_gemv by the compiled kernel."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from kernelhub.backend import Implementation
from kernelhub.backends.native import _gemv
from kernelhub.backends.native.kernels import Launchers, maker
from kernelhub.contracts import _weights
from kernelhub.spec import Args


def make(launchers: Launchers) -> Implementation:
    def prepare(a: Args) -> Callable[..., Tensor]:
        launch = launchers[a.x.device]
        *lead, k = a.x.shape
        m, n = math.prod(lead), a.weight.shape[0]
        outputs = _weights.result_width(a)
        matrix = len(lead) == 1
        nothing = m == 0 or outputs == 0
        to_rows = _gemv.rows_of_scale(a.x_scale, m)
        group_size, activation = _gemv.group_size(a), _gemv.ACTIVATIONS[a.activation]
        tile = _gemv.tile(launchers, "fused_gemv", a)
        empty = maker(a.x, (*lead, outputs), _weights.result_dtype(a))
        in_place = a.out is not None and a.out.is_contiguous()
        workspace_for = maker(a.x, (m, n), torch.float32) if a.norm_weight is not None else None

        def run(
            x: Tensor,
            weight: Tensor,
            x_scale: Tensor | None,
            weight_scale: Tensor | None,
            weight_zero: Tensor | None,
            _group_size: int | None,
            bias: Tensor | None,
            _activation: str | None,
            norm_weight: Tensor | None,
            eps: float,
            _out_dtype: torch.dtype | None,
            out: Tensor | None,
        ) -> Tensor:
            result = out if out is not None and in_place else empty(x)
            if nothing:
                return _gemv.delivered(result, out)
            launch(
                x if matrix else x.reshape(m, k),
                weight,
                to_rows(x_scale) if to_rows else x_scale,
                weight_scale,
                weight_zero,
                bias,
                norm_weight,
                result if matrix else result.view(m, outputs),
                workspace_for(x) if workspace_for else None,
                group_size,
                activation,
                tile,
                eps,
            )
            return result if out is None else _gemv.delivered(result, out)

        return run

    return Implementation("fused_gemv", prepare=prepare, rejects=_gemv.rejects, chain=_gemv.chain)
