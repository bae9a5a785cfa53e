"""`with accelerate(model):` puts the ops into a model, and leaves it as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kernelhub.integrations.census import Census
from kernelhub.integrations.transformers import attention, experts, families, layers, patches
from kernelhub.integrations.transformers.families import Family, Layer
from kernelhub.integrations.transformers.quantized import QUANTIZED, count

NAME = "accelerate"

_OP = {
    "attention": "rotary_embedding",
    "mlp": "fused_gemv",
    "experts": "fused_moe_gemv",
    "moe": "fused_mul_add",
    "router": "fused_gemv",
}  # norms have none: torch's own rms_norm
_RUN: dict[str, Callable[[nn.Module], Callable[..., Any]]] = {
    "attention": lambda _: attention.attention,
    "mlp": layers.GateUp,
    "moe": layers.SharedExperts,
    "router": lambda _: layers.router,
    "norm": lambda _: layers.rms_norm,
}


class Accelerated:
    """A model inside its `with accelerate(model):` block, and what became of its layers.

    `layers` holds every layer that has weights, `stock` those that keep their own code, each with
    the reason. Both are empty before the block is entered first.
    """

    def __init__(self, model: Any, census: Census | None = None, frozen: bool = False) -> None:
        self._family = families.family_of(NAME, model)
        self.model = model
        self.census = census
        self.frozen = frozen
        self.layers: tuple[Layer, ...] = ()
        self._entered: list[ExitStack] = []

    @property
    def stock(self) -> tuple[Layer, ...]:
        return tuple(layer for layer in self.layers if layer.why)

    def __enter__(self) -> Accelerated:
        with ExitStack() as undo, patches.lock:
            self.layers = tuple(_place(self, self._family, undo))
            self._entered.append(undo.pop_all())
        return self

    def __exit__(self, *exception: object) -> None:
        with patches.lock:
            self._entered.pop().close()

    def __str__(self) -> str:
        width = max((len(layer.name) for layer in self.layers), default=0)
        return "\n".join(
            f"{layer.name:<{width}}  {layer.kind}  "
            + (f"stock: {layer.why}" if layer.why else layer.op)
            for layer in self.layers
        )


def accelerate(model: Any, *, census: Census | None = None, frozen: bool = False) -> Accelerated:
    """Run a model's layers through kernelhub's ops inside a `with` block.

    What runs through which op, on the backend that kernelhub chooses for each call:

    - `rotary_embedding`: the family's rotary function, any number of tokens, but under
      torch.compile, which fuses the model's own code;
    - `fused_gemv`: each `nn.Linear` and the product of a router by softmax; in one call query, key
      and value, and in one with SwiGLU gate and up of an MLP; where a call has at most 16 rows;
    - `fused_moe_gemv`: the experts, gate-up with SwiGLU and down with weights and sum, where a call
      has at most 16 rows;
    - `fused_mul_add`: DeepSeek's `routed * factor + shared`.

    Norms run through torch's `rms_norm`, and attention over a static cache does not copy keys and
    values for each head, where a call has at most 16 tokens.

    Calls of more rows, calls under autocast and calls of other dtypes run the model's own code.
    Sampling is the `Sampler`'s, a logits processor.

    The model is accelerated for whoever calls it, in every thread, until the last block that
    accelerates it is left; other models are not, even of the same family or configuration. Blocks
    nest and overlap in any order. After the last one the model is as it was, also where an
    exception ended a block. A copy of the model made inside (`copy.deepcopy`) is not accelerated.

    Gate and up, and query, key and value, are kept as one more copy while the block lasts, made on
    first use and anew where one has changed; a change through `.data` is not seen. Under
    torch.compile, which could not see any change, each has a product of its own, unless `frozen`.

    Args:
        model: a model of Llama, Qwen2, Qwen3, Qwen3-MoE, Mixtral or DeepSeek-V3, perhaps quantised
            by `quantize`; weights fp32, fp16 or bf16.
        census: counts each call, with its backend and why; see `Census` for the cost.
        frozen: promises that no weight changes while the block lasts. The copies are made on
            entry, nothing looks for a change, and torch.compile uses them too.

    Returns:
        Accelerated: a context manager whose `layers` and `stock` say what became of each layer.

    Raises:
        ArgumentError: the model is of none of the families.
    """
    return Accelerated(model, census, frozen)


def _place(user: Accelerated, family: Family, undo: ExitStack) -> Iterator[Layer]:
    """Place the ops for `user`, push on `undo` what takes them away, tell of each layer."""

    def patch(owner: Any, name: str, run: Callable[..., Any]) -> None:
        running = patches.add(owner, name, run, user).run
        undo.callback(patches.remove, owner, name, user)
        if user.frozen and isinstance(running, (layers.GateUp, attention.Projection)):
            undo.callback(running.hold().let_go)

    def place(module: nn.Module) -> tuple[str, str] | None:
        """The op of a module, or why it has none; None where it has nothing to say."""
        kind = family.kind_of(module)
        if kind is not None:
            why = families.refusal(family, kind, module)
            if kind == "experts" and not why:
                placed.append(module)
            elif not why:
                patch(module, "forward", _RUN[kind](module))
            if kind == "attention" and not why:
                joined.update(_projections(module))
            return ("", families.no_op(module)) if kind == "norm" else (_OP[kind], why)
        if isinstance(module, QUANTIZED):
            patch(module, "forward", joined.get(module, count))
            return module.op, ""
        if isinstance(module, nn.Linear):
            why = families.linear_refusal(module)
            if not why:
                patch(module, "forward", joined.get(module, layers.linear))
            return "fused_gemv", why
        return ("", families.no_op(module)) if module._parameters else None

    placed: list[nn.Module] = []
    joined: dict[nn.Module, Callable[..., Any]] = {}
    for name, module in user.model.named_modules():  # an attention module before its parts
        found = place(module)
        if found is not None:
            yield Layer(name, type(module).__name__, *found)
    for name in family.rotary:
        if hasattr(family.module, name):
            patch(family.module, name, attention.rotary)
    patch(ALL_ATTENTION_FUNCTIONS, "get_interface", attention.attention_function)
    if placed:
        switched = experts.add(user.model, placed, user)
        undo.callback(experts.remove, switched, placed, user)


def _projections(module: nn.Module) -> Iterator[tuple[nn.Module, Callable[..., Any]]]:
    """What runs in the place of each projection that can be computed with the others."""
    found = attention.projections(module)
    if found is not None:
        for index, part in enumerate(found.parts):
            alone = count if isinstance(part, QUANTIZED) else layers.linear
            yield part, attention.Projection(found, index, alone)
