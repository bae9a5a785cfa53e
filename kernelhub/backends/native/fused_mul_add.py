"""fused_mul_add by the compiled kernel, or on CUDA by torch's own addition where it is the same."""

from __future__ import annotations

import math
from collections.abc import Callable
from ctypes import c_float
from typing import Any

import torch
from torch import Tensor

from kernelhub.backend import Implementation
from kernelhub.backends.native.abi import MAX_DIMS
from kernelhub.backends.native.kernels import Launchers, maker, written
from kernelhub.spec import Args


def _by_torch(empty: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """torch's addition, which multiplies and adds in fp32 and is at the memory's roof."""

    def run(x: Tensor, bias: Tensor, scale: float, out: Tensor | None) -> Tensor:
        result = empty(x) if out is None else out
        return torch.add(bias, x, alpha=c_float(scale).value, out=result)

    return run


def make(launchers: Launchers) -> Implementation:
    def prepare(a: Args) -> Callable[..., Tensor]:
        per_element = isinstance(a.scale, Tensor)
        shapes = {a.x.shape, a.bias.shape, *([a.scale.shape] if per_element else [])}
        shape = torch.broadcast_shapes(*shapes) if len(shapes) > 1 else a.x.shape
        if a.x.device.type == "cuda" and not per_element:
            return _by_torch(maker(a.x, shape, a.x.dtype))
        launch = launchers[a.x.device]
        one_dim = len(shape) > MAX_DIMS
        empty = maker(a.x, [math.prod(shape)] if one_dim else shape, a.x.dtype)

        def run(x: Tensor, bias: Tensor, scale: float | Tensor, out: Tensor | None) -> Tensor:
            result = empty(x) if out is None else out
            if per_element:
                launch(x, bias, scale, result, 0.0)
            else:
                launch(x, bias, None, result, scale)
            if out is not None:
                written((out,))
            return result

        def flat(value: Any) -> Any:
            return value.expand(shape).reshape(-1) if isinstance(value, Tensor) else value

        def run_in_one_dim(
            x: Tensor, bias: Tensor, scale: float | Tensor, out: Tensor | None
        ) -> Tensor:
            """For more dimensions than the kernel takes: through contiguous copies."""
            result = run(flat(x), flat(bias), flat(scale), None).view(shape)
            return result if out is None else out.copy_(result)

        return run_in_one_dim if one_dim else run

    return Implementation("fused_mul_add", prepare=prepare)
