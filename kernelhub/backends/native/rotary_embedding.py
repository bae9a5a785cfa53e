"""rotary_embedding by the compiled kernel."""

from __future__ import annotations

from torch import Tensor
from torch.autograd.graph import increment_version

from kernelhub.backend import Implementation
from kernelhub.backends.native.kernels import Launchers


def make(launchers: Launchers) -> Implementation:
    def rotary_embedding(
        positions: Tensor,
        query: Tensor,
        key: Tensor | None,
        head_size: int | None,
        cos_sin_cache: Tensor,
        is_neox: bool = True,
        *,
        rot_dim: int | None = None,
        cos_sin_cache_offsets: Tensor | None = None,
    ) -> None:
        launchers[query.device](
            positions, query, key, cos_sin_cache, cos_sin_cache_offsets, head_size or 0, is_neox
        )
        increment_version(query if key is None else (query, key))

    return Implementation("rotary_embedding", rotary_embedding)
