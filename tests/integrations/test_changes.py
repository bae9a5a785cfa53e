"""What others change in a model, or put on its layers, holds while it is accelerated."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.utils import weight_norm
from torch.utils._pytree import tree_map_only
from transformers import StaticCache

from kernelhub.integrations.transformers import accelerate, quantize
from tests.integrations.models import config, make

IDS = torch.tensor([[5, 17, 3]])
LIMIT = 1e-5


def off(logits: Tensor, stock: Tensor) -> float:
    return ((logits - stock).abs().max() / stock.abs().max()).item()


class Adapted(nn.Module):
    """A layer with something of low rank added, which shows the weight of what it wraps."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Parameter(torch.randn(4, base.in_features) * 0.3)
        self.b = nn.Parameter(torch.randn(base.out_features, 4) * 0.3)
        self.weight, self.bias = base.weight, base.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.a.T @ self.b.T  # type: ignore[no-any-return]


def _hook_on_activation(model: Any) -> None:
    model.model.layers[0].mlp.act_fn.register_forward_hook(lambda module, given, y: y * 0)


def _other_activation(model: Any) -> None:
    model.model.layers[0].mlp.act_fn = nn.GELU()


def _adapters(model: Any) -> None:
    for layer in model.model.layers:
        layer.mlp.gate_proj = Adapted(layer.mlp.gate_proj)
        layer.self_attn.k_proj = Adapted(layer.self_attn.k_proj)


def _wrapped(module: Any, change: Callable[[Any], Any]) -> None:
    before = module.forward
    module.forward = lambda *given: change(before(*given))


def _up_wrapped(model: Any) -> None:
    _wrapped(model.model.layers[0].mlp.up_proj, lambda y: y * 2)


def _router_wrapped(model: Any) -> None:
    _wrapped(model.model.layers[1].mlp.gate, lambda given: given)


def _hook_on_router(model: Any) -> None:
    model.model.layers[1].mlp.gate.register_forward_hook(
        lambda module, given, y: (y[0], torch.full_like(y[1], 0.5), y[2])
    )


def _router_not_normed(model: Any) -> None:
    model.model.layers[1].mlp.gate.norm_topk_prob = False


def _weights_of_hooks(model: Any) -> None:
    for layer in model.model.layers:
        for name in ("k_proj", "v_proj"):
            getattr(layer.self_attn, name).weight_g.mul_(3)


def _new_weights(model: Any) -> None:
    """One after another: in time one lies where an earlier one lay."""
    gate = model.model.layers[0].mlp.gate_proj
    for _ in range(20):
        model(IDS)
        gate.weight = None
        gate.weight = nn.Parameter(torch.randn(96, 64) * 0.3, requires_grad=False)


CHANGES = {
    "a hook on the activation": ("llama", _hook_on_activation),
    "another activation": ("llama", _other_activation),
    "adapters": ("llama", _adapters),
    "a wrapped forward of up": ("llama", _up_wrapped),
    "a wrapped forward of the router": ("deepseek_v3", _router_wrapped),
    "a hook on the router": ("deepseek_v3", _hook_on_router),
    "an option of the router": ("deepseek_v3", _router_not_normed),
    "new weights": ("llama", _new_weights),
    "weights that hooks set": ("llama", _weights_of_hooks),
}


@pytest.mark.parametrize("inside", [False, True], ids=["before", "inside"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_a_change_holds(change: str, inside: bool) -> None:
    family, apply = CHANGES[change]
    model = make(family).requires_grad_(False)
    if change == "weights that hooks set":
        for layer in model.model.layers:
            for name in ("q_proj", "k_proj", "v_proj"):
                weight_norm(getattr(layer.self_attn, name))
    with torch.no_grad():
        unchanged = model(IDS).logits
        if not inside:
            apply(model)
        with accelerate(model):
            model(IDS)
            if inside:
                apply(model)
            logits = model(IDS).logits
        stock = model(IDS).logits
    assert off(logits, stock) <= LIMIT
    if change != "a wrapped forward of the router":
        assert off(unchanged, stock) > 0.01, "the change changes nothing"


def test_hooks_of_gradients_run() -> None:
    model = make("llama")
    called: list[str] = []
    gate = model.model.layers[0].mlp.gate_proj
    gate.register_full_backward_hook(lambda *given: called.append("backward"))
    with accelerate(model):
        model(IDS).logits.sum().backward()
    assert called == ["backward"]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_mask_that_is_changed_in_place(mode: Any) -> None:
    model = make("llama")

    def steps() -> Tensor:
        cache = StaticCache(config=model.config, max_cache_len=16)
        mask, found = torch.zeros(1, 1, 1, 16, dtype=torch.bool), []
        for at, token in enumerate((5, 17, 3, 40, 6)):
            mask[..., at] = True
            step = {"attention_mask": mask, "cache": cache}
            here = torch.tensor([[at]])
            found.append(model(torch.tensor([[token]]), position_ids=here, **step).logits)
        return torch.cat(found).clone()

    with mode():
        stock = steps()
        with accelerate(model):
            assert off(steps(), stock) <= LIMIT


def test_weights_that_were_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = make("llama")
        layer = model.model.layers[0]
        with accelerate(model):
            model(IDS)
            layer.mlp.gate_proj.weight.mul_(3)
            layer.self_attn.k_proj.weight.mul_(-2)
            logits = model(IDS).logits
        assert off(logits, model(IDS).logits) <= LIMIT


@pytest.mark.parametrize("family", ["llama", "mixtral", "deepseek_v3"])
def test_a_copy_made_inside_is_stock_and_can_be_accelerated(family: str) -> None:
    model = make(family)
    before = model.get_experts_implementation()
    with accelerate(model):
        duplicate = copy.deepcopy(model)
    assert duplicate.get_experts_implementation() == before
    with torch.no_grad():
        stock = duplicate(IDS).logits
        with accelerate(duplicate) as accelerated:
            assert off(duplicate(IDS).logits, stock) <= LIMIT
    with accelerate(model) as own:
        assert accelerated.stock == own.stock


class Coded(Tensor):
    """Numbers in another form, as libraries that quantise have them: torch's ops alone read it."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> Coded:
        made: Coded = Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype)
        made.values = values
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "aten":
            return NotImplemented
        plain = tree_map_only(cls, lambda t: t.values, (args, kwargs or {}))
        result = func(*plain[0], **plain[1])
        return cls(result) if func is torch.ops.aten.detach.default else result


class Weight(nn.Parameter):
    """As serving engines have them."""


CODED = {
    "llama": ("self_attn.k_proj", "mlp.up_proj", "mlp.down_proj"),
    "mixtral": ("self_attn.q_proj", "mlp.experts"),
}


@pytest.mark.parametrize("family", CODED)
def test_weights_that_are_no_plain_memory(family: str) -> None:
    model = make(family).requires_grad_(False)
    for name in CODED[family]:
        module = model.model.layers[0].get_submodule(name)
        for leaf in ("weight", "gate_up_proj"):
            if hasattr(module, leaf):
                coded = nn.Parameter(Coded(getattr(module, leaf).data), requires_grad=False)
                setattr(module, leaf, coded)
        other = model.model.layers[1].get_submodule(name)
        if isinstance(other, nn.Linear):
            other.weight = Weight(other.weight.data, requires_grad=False)
    with torch.no_grad():
        stock = model(IDS).logits
        with accelerate(model) as accelerated:
            assert off(model(IDS).logits, stock) <= LIMIT
    reason = "its weight, a Coded, is no plain memory"
    refused = {layer.name for layer in accelerated.stock if layer.why.endswith(reason)}
    expected = {f"model.layers.0.{name}" for name in CODED[family]}
    assert refused == expected | ({"model.layers.0.mlp"} if family == "llama" else set())


def test_output_layers_of_any_name_keep_their_weights() -> None:
    model = transformers.LlamaForSequenceClassification(config("llama")).to(torch.bfloat16)
    report = quantize(model, "int4")
    assert type(model.score) is nn.Linear
    (score,) = (layer for layer in report.layers if layer.name == "score")
    assert score.why == "the output layer keeps its weights"
