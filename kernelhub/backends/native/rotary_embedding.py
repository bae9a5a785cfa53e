"""rotary_embedding by the compiled kernel."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from kernelhub.backend import Implementation
from kernelhub.backends.native.kernels import Launchers, written
from kernelhub.spec import Args


def make(launchers: Launchers) -> Implementation:
    def prepare(a: Args) -> Callable[..., None]:
        launch = launchers[a.query.device]

        def run(
            positions: Tensor,
            query: Tensor,
            key: Tensor | None,
            head_size: int | None,
            cos_sin_cache: Tensor,
            is_neox: bool,
            rot_dim: int | None,
            cos_sin_cache_offsets: Tensor | None,
        ) -> None:
            launch(
                positions, query, key, cos_sin_cache, cos_sin_cache_offsets, head_size or 0, is_neox
            )
            written((query,) if key is None else (query, key))

        return run

    return Implementation("rotary_embedding", prepare=prepare)
