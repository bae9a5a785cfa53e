"""What the compiled fused_gemv and fused_moe_gemv share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from operator import methodcaller

from torch import Tensor

from kernelhub.backends.native import tiles
from kernelhub.backends.native.kernels import Launchers, written
from kernelhub.contracts import _weights
from kernelhub.spec import Args

ACTIVATIONS = {None: 0, "swiglu": 1, "silu": 2, "gelu": 3, "gelu_tanh": 3}
"""Codes of the ABI; in csrc/common/gemv.muh as well."""

_LIMIT = 2**30  # the kernels count rows and elements of K in 32 bits


def rejects(a: Args) -> Iterable[str]:
    for letter, size in (("K", a.x.shape[-1]), ("N", a.weight.shape[-2])):
        if size > _LIMIT:
            yield f"{letter} = {size} is above 2^30"


def chain(a: Args) -> int:
    """Additions into one result, at most.

    At least two warps share out K, and what adds up one's share is either four lanes or a matrix
    unit that takes 16 products a step: K/32 steps of at most two units each, as units truncate, and
    some for the scales, lanes and warps. Four times that is granted.
    """
    k = int(a.x.shape[-1])
    return min(k, k // 4 + 32)


def tile(launchers: Launchers, op: str, a: Args) -> int:
    arch, scheme = launchers.arch(a.x.device), tiles.scheme(a.weight.dtype)
    return tiles.choose(op, arch, scheme, a.weight.shape[-2], a.x.shape[-1])


def group_size(a: Args) -> int:
    """What the kernel is to take for g; 0 for dense weights."""
    return 0 if a.weight_scale is None else _weights.group_size(a)


def rows_of_scale(scale: Tensor | None, rows: int) -> Callable[[Tensor | None], Tensor] | None:
    """What makes one dimension of x_scale's leading ones; None where it may stay as it is.

    `[1]` is one scale for all.
    """
    if scale is None or scale.shape == (1,) or scale.dim() == 2:
        return None
    return methodcaller("reshape", rows, scale.shape[-1])


def delivered(result: Tensor, out: Tensor | None) -> Tensor:
    """The result, in `out` where the caller gave one."""
    if out is None:
        return result
    if out is result:
        written((out,))
    else:
        out.copy_(result)
    return out
