"""The ops inside vLLM (written against 0.33.0): classes, by its group `vllm.general_plugins`.

vLLM makes an object of the class that is registered (`register_oot`) under the name of the class
that a model asks for.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kernelhub.integrations import engines

OPS = ("rotary_embedding", "fused_gemv")
LINEAR = (
    "ReplicatedLinear", "ColumnParallelLinear", "MergedColumnParallelLinear", "QKVParallelLinear",
    "RowParallelLinear",
)  # fmt: skip


class Rotary:
    """Before the `forward` of a rotary embedding, whichever way the engine has chosen for it."""

    def forward(self: Any, positions: Tensor, query: Tensor, key: Tensor | None = None) -> Any:
        own, cache = super().forward, self._match_cos_sin_cache_dtype(query)  # type: ignore[misc]
        engine = lambda: own(positions, query, key)  # noqa: E731
        return engines.rotary(engine, "", self, cache, positions, query, key)


class Linear:
    """Over a linear layer: its method, where it is the one without quantisation, asks first."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        from vllm.model_executor.layers.linear import UnquantizedLinearMethod

        own = self.quant_method.apply

        def apply(layer: Any, x: Tensor, bias: Tensor | None = None) -> Any:
            return engines.linear(lambda: own(layer, x, bias), layer, x, bias)

        if type(self.quant_method) is UnquantizedLinearMethod:
            self.quant_method.apply = apply


def register() -> None:
    """The plug-in: vLLM calls it in each process, before it makes a model."""
    ops = engines.chosen("vLLM", OPS)
    if "rotary_embedding" in ops:
        from vllm.model_executor.layers import rotary_embedding

        plain = rotary_embedding.RotaryEmbedding
        for cls in list(vars(rotary_embedding).values()):
            kind = isinstance(cls, type) and issubclass(cls, plain)
            if kind and engines.rotates_like(cls, plain):
                _replace(cls, Rotary)
    if "fused_gemv" in ops:
        from vllm.model_executor.layers import linear

        for name in LINEAR:
            _replace(getattr(linear, name), Linear)


def _replace(cls: Any, by: type) -> None:
    from vllm.model_executor.custom_op import op_registry_oot

    there = op_registry_oot.get(cls.__name__)
    if there is None:
        made: Any = type(cls.__name__, (by, cls), {"__module__": __name__})
        cls.register_oot(made, name=cls.__name__)
        made.name = cls.__dict__.get("name", getattr(cls, "name", None))  # for `custom_ops`
    elif by not in there.__mro__:
        engines.logger.warning("vLLM's %s is another plug-in's, %s", cls.__name__, there)
