"""fused_moe_gemv by the compiled kernel."""

from __future__ import annotations

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
        tokens, slots = a.topk_ids.shape
        k, outputs = a.x.shape[-1], _weights.result_width(a)
        per_slot = a.x.dim() == 3
        rows = tokens * slots if per_slot else tokens
        shape = (tokens, outputs) if a.reduce else (tokens, slots, outputs)
        nothing = 0 in shape
        to_rows = _gemv.rows_of_scale(a.x_scale, rows)
        group_size, activation = _gemv.group_size(a), _gemv.ACTIVATIONS[a.activation]
        tile = _gemv.tile(launchers, "fused_moe_gemv", a)
        empty = maker(a.x, shape, _weights.result_dtype(a))
        in_place = a.out is not None and a.out.is_contiguous()
        workspace_for = maker(a.x, (tokens, slots, outputs), torch.float32) if a.reduce else None

        def run(
            x: Tensor,
            weight: Tensor,
            topk_ids: Tensor,
            topk_weights: Tensor | None,
            x_scale: Tensor | None,
            weight_scale: Tensor | None,
            weight_zero: Tensor | None,
            _group_size: int | None,
            _activation: str | None,
            reduce: bool,
            _out_dtype: torch.dtype | None,
            out: Tensor | None,
        ) -> Tensor:
            result = out if out is not None and in_place else empty(x)
            if nothing:
                return _gemv.delivered(result, out)
            launch(
                x.reshape(rows, k) if per_slot else x,
                weight,
                topk_ids,
                topk_weights,
                to_rows(x_scale) if to_rows else x_scale,
                weight_scale,
                weight_zero,
                result,
                workspace_for(x) if workspace_for else None,
                group_size,
                activation,
                per_slot,
                reduce,
                tile,
            )
            return result if out is None else _gemv.delivered(result, out)

        return run

    return Implementation(
        "fused_moe_gemv", prepare=prepare, rejects=_gemv.rejects, chain=_gemv.chain
    )
