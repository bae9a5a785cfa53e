"""Greedy tokens of every family equal stock's, on every backend; every layer is accounted for."""

from __future__ import annotations

import inspect
import types
from collections import Counter
from typing import Any

import pytest
import torch

import kernelhub
from kernelhub.errors import ArgumentError, BackendUnavailable
from kernelhub.integrations.transformers import Census, accelerate, attention
from tests.integrations.models import FAMILIES, make, say

# What a logit may be off, as a share of the largest. In fp32 sums in another order; in bf16
# roundings that stand elsewhere (the op rounds once where stock rounds after each step).
LIMIT = {torch.float32: 1e-5, torch.bfloat16: 0.025}

OPS = ("fused_gemv", "fused_moe_gemv", "fused_mul_add", "rotary_embedding")
# Calls of each op for a token, counted by hand from the models' configurations.
CALLS = {
    "llama": (2 * (2 + 2) + 1, 0, 0, 2),
    "qwen2": (2 * (2 + 2) + 1, 0, 0, 2),
    "qwen3": (2 * (2 + 2) + 1, 0, 0, 2),
    "qwen3_moe": (2 * 2 + 2 + 1 + 1, 2, 0, 2),
    "mixtral": (2 * (2 + 1) + 1, 2 * 2, 0, 2),
    "deepseek_v3": (2 * (5 + 2) + 1, 2, 1, 2),
}


@pytest.mark.parametrize("dtype", LIMIT, ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_stocks(family: str, dtype: torch.dtype) -> None:
    model = make(family, dtype)
    stock = say(model)
    assert len(set(stock.tokens[0].tolist())) >= 6, "a model that says one thing shows little"
    for backend in ("reference", "simt"):
        census = Census()
        with kernelhub.use(backend), accelerate(model, census=census):
            said = say(model)
        error = said.error(stock)
        assert torch.equal(said.tokens, stock.tokens), (backend, error, stock.gap)
        assert 0 < error <= LIMIT[dtype], (backend, error)  # 0: nothing was put in
        assert error < stock.gap, (backend, error, stock.gap)
        assert {row.backend for row in census.rows} == {backend}
        assert {row.why for row in census.rows} == {f'use("{backend}")'}
        counts = tuple(census.count(op) for op in OPS)
        assert counts == tuple(8 * calls for calls in CALLS[family]), census


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_with_weights_is_accounted_for(family: str) -> None:
    model = make(family)
    with accelerate(model) as accelerated:
        pass
    named = {layer.name for layer in accelerated.layers}
    own = {name for name, module in model.named_modules() if module._parameters}
    assert own <= named
    assert all(layer.op or layer.why for layer in accelerated.layers)
    reasons = Counter(layer.why for layer in accelerated.stock)
    routers = 1 if family == "deepseek_v3" else 0
    assert reasons["its product is a part of the routing, of no nn.Linear"] == routers
    assert reasons["no op looks up embeddings"] == 1
    assert reasons["no op normalises its input alone"] == sum(n.endswith("norm") for n in own)
    assert len(reasons) == (3 if routers else 2)
    assert "lm_head" in str(accelerated)


def test_long_calls_run_the_models_own_code() -> None:
    """More than 16 rows: bit for bit as stock, but for the rotary embedding; 16 rows: the ops."""
    model = make("qwen3_moe")
    for rows, backend in ((16, "reference"), (17, "stock")):
        census = Census()
        prompt = torch.arange(rows)[None] % 48
        with accelerate(model, census=census), torch.no_grad():
            model(prompt)
        products = [row for row in census.rows if row.op != "rotary_embedding"]
        assert {row.backend for row in products} == {backend}
        assert {row.place for row in products} >= {"linear", "gate-up with SwiGLU"}
        assert census.count("rotary_embedding", "reference") == 2
        if backend == "stock":
            assert {row.why for row in products} == {"more than 16 rows"}
            assert {row.op for row in products} == {"fused_gemv", "fused_moe_gemv"}
            assert census.count("fused_gemv") == 0
            assert census.count("fused_gemv", "stock") > 0


@pytest.mark.parametrize("before", ["eager", "batched_mm", "grouped_mm"])
def test_long_calls_of_experts_run_the_implementation_that_was_set(before: str) -> None:
    model = make("mixtral")
    model.set_experts_implementation(before)
    experts = model.model.layers[0].mlp.experts
    x, ids = torch.randn(20, 64), torch.rand(20, 4).topk(2).indices
    weights = torch.rand(20, 2)
    expected = experts(x, ids, weights)
    with accelerate(model):
        assert torch.equal(experts(x, ids, weights), expected)
    assert model.get_experts_implementation() == {"": before}


def test_batches_and_padding() -> None:
    """Rows of one batch at other positions, and a mask: three prompts of two lengths."""
    model = make("llama")
    prompt = torch.tensor([[0, 0, 7, 9], [1, 2, 3, 4], [0, 0, 11, 30]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 1, 1]])
    stock = say(model, prompt, attention_mask=mask)
    for backend in ("reference", "simt"):
        with kernelhub.use(backend), accelerate(model):
            said = say(model, prompt, attention_mask=mask)
        assert torch.equal(said.tokens, stock.tokens)
        assert 0 < said.error(stock) < 1e-5


def test_a_cache_that_stock_began_goes_on() -> None:
    """What the cache holds is in the family's own layout, DeepSeek's rotary lanes too."""
    for family in ("llama", "deepseek_v3"):
        model = make(family)
        with torch.no_grad():
            begun = model(torch.tensor([[5, 17, 3]]), use_cache=True)
            expected = model(torch.tensor([[5, 17, 3, 40]])).logits[:, -1]
            with accelerate(model):
                parameters = inspect.signature(type(model).forward).parameters
                name = "cache" if "cache" in parameters else "past_key_values"
                got = model(torch.tensor([[40]]), **{name: begun[name]}).logits[:, -1]
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_static_cache(family: str) -> None:
    """Attention with a mask: heads of one key are rows of one query."""
    model = make(family)
    prompt = torch.tensor([[0, 0, 7, 9], [1, 2, 3, 4]])
    options = {"attention_mask": (prompt != 0).long(), "cache_implementation": "static"}
    stock = say(model, prompt, **options)
    with accelerate(model):
        said = say(model, prompt, **options)
    assert torch.equal(said.tokens, stock.tokens)
    assert 0 < said.error(stock) < 1e-5


def test_projections_that_are_called_by_others() -> None:
    """Query, key and value are one product only where the attention module asks for all."""
    model = make("llama")
    attention = model.model.layers[0].self_attn
    x, census = torch.randn(1, 3, 64), Census()
    with torch.no_grad():
        expected = [attention.get_submodule(n)(x) for n in ("k_proj", "q_proj", "q_proj")]
        with accelerate(model, census=census):
            got = [attention.get_submodule(n)(x) for n in ("k_proj", "q_proj", "q_proj")]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert {row.place for row in census.rows} == {"linear"}


def test_a_hook_that_changes_the_input_of_a_projection() -> None:
    model, ids = make("qwen3"), torch.tensor([[5, 17, 3]])
    attention = model.model.layers[0].self_attn
    attention.k_proj.register_forward_pre_hook(lambda _, args: (args[0] * 2,))
    attention.q_proj.register_forward_hook(lambda *_: None)
    with torch.no_grad():
        expected = model(ids).logits
        with accelerate(model):
            got = model(ids).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_new_weights_are_seen() -> None:
    """Weights are kept joined: the copy follows a change of any."""
    model = make("llama")
    with accelerate(model), torch.no_grad():
        say(model)
        model.model.layers[1].mlp.up_proj.weight.mul_(1.5)
        model.model.layers[0].mlp.gate_proj.bias.add_(0.5)
        model.model.layers[1].self_attn.k_proj.weight.mul_(1.2)
        model.model.layers[0].self_attn.v_proj.bias.add_(0.5)
        said = say(model)
    stock = say(model)
    assert torch.equal(said.tokens, stock.tokens)
    assert said.error(stock) < 1e-5


def test_gradients() -> None:
    model, ids = make("deepseek_v3"), torch.tensor([[5, 17, 3]])
    expected = _gradients(model, ids)
    with accelerate(model):
        got = _gradients(model, ids)
    assert set(got) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-4, msg=name)
    with accelerate(model), kernelhub.use("simt"), pytest.raises(BackendUnavailable, match="grad"):
        model(ids)


def _gradients(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(ids).logits.square().sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_hooks_see_what_they_see_in_stock() -> None:
    model = make("llama")
    seen: dict[str, torch.Tensor] = {}
    for name in ("self_attn.q_proj", "mlp.gate_proj"):
        module = model.model.layers[0].get_submodule(name)
        module.register_forward_hook(lambda _, __, y, name=name: seen.__setitem__(name, y))
    with torch.no_grad():
        model(torch.tensor([[5, 17]]))
        stock = dict(seen)
        seen.clear()
        census = Census()
        with accelerate(model, census=census):
            model(torch.tensor([[5, 17]]))
    assert seen.keys() == stock.keys()
    for name, y in stock.items():
        torch.testing.assert_close(seen[name], y)
    assert "hooks on gate, up or the activation" in {row.why for row in census.rows}


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "mlp": ("llama", {"hidden_act": "gelu"}, "its activation is 'gelu'"),
    "experts": ("mixtral", {"hidden_act": "gelu"}, "its activation is 'gelu'"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_layers_that_no_op_computes_are_listed_and_stay(kind: str) -> None:
    family, options, why = REFUSED[kind]
    model = make(family, **options)
    stock = say(model)
    with accelerate(model) as accelerated:
        said = say(model)
    assert len([layer for layer in accelerated.stock if layer.why.startswith(why)]) == 2
    assert torch.equal(said.tokens, stock.tokens)
    assert said.error(stock) < 1e-5


class Scaled(torch.nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 2


def test_changed_linears_are_listed_and_stay() -> None:
    model = make("qwen2")
    mlp = model.model.layers[0].mlp
    mlp.up_proj.__class__ = Scaled
    model.model.layers[1].mlp.up_proj.bias = torch.nn.Parameter(torch.ones(96))
    down = mlp.down_proj
    down.forward = lambda x: torch.nn.functional.linear(x, down.weight) * 3
    stock = say(model)
    with accelerate(model) as accelerated:
        said = say(model)
    assert torch.equal(said.tokens, stock.tokens)
    assert said.error(stock) < 1e-5
    reasons = {layer.name: layer.why for layer in accelerated.stock}
    subclass = "what this subclass of nn.Linear adds is not known"
    assert reasons["model.layers.0.mlp.up_proj"] == subclass
    assert reasons["model.layers.0.mlp"] == f"'up_proj', a Scaled: {subclass}"
    assert reasons["model.layers.1.mlp"] == "one of gate and up has a bias, the other has none"
    assert reasons["model.layers.0.mlp.down_proj"] == "its forward has been replaced"


def _subclass(module: torch.nn.Module) -> None:
    module.__class__ = type(f"My{type(module).__name__}", (type(module),), {})


def _own_rotary(module: Any) -> None:
    """An attention of the family's class whose code turns query and key by itself."""
    forward = inspect.unwrap(type(module).forward)
    names = tuple(f"{n}_" if "rotary" in n else n for n in forward.__code__.co_names)
    code = forward.__code__.replace(co_names=names)
    function = {**forward.__globals__}
    function["apply_rotary_pos_emb_"] = function["apply_rotary_pos_emb"]
    type(module).forward = types.FunctionType(code, function, "forward", forward.__defaults__)


CHANGED = {
    "self_attn": "what this subclass of LlamaAttention adds is not known",
    "mlp": "what this subclass of LlamaMLP adds is not known",
}


@pytest.mark.parametrize("name", CHANGED)
def test_subclasses_of_a_familys_layers_are_listed_and_stay(name: str) -> None:
    model = make("llama")
    for layer in model.model.layers:
        _subclass(layer.get_submodule(name))
    stock, census = say(model), Census()
    with accelerate(model, census=census) as accelerated:
        said = say(model)
    listed = {layer.name: layer.why for layer in accelerated.stock}
    assert listed[f"model.layers.1.{name}"] == CHANGED[name]
    assert torch.equal(said.tokens, stock.tokens)
    rotary, joined = (census.count("rotary_embedding"), "gate-up with SwiGLU")
    assert (rotary == 0) == (name == "self_attn")
    assert (joined in {row.place for row in census.rows}) == (name != "mlp")


@pytest.mark.parametrize("name", ["self_attn", "mlp", "mlp.experts"])
def test_a_layer_whose_forward_is_replaced_keeps_it(name: str) -> None:
    model = make("deepseek_v3")
    module, calls = model.model.layers[1].get_submodule(name), []
    below = module.forward
    module.forward = replacement = lambda *args, **kwargs: calls.append(1) or below(*args, **kwargs)
    stock = say(model)
    with accelerate(model) as accelerated:
        assert vars(module)["forward"] is replacement
        calls.clear()
        said = say(model)
    assert len(calls) == 8
    assert {layer.name: layer.why for layer in accelerated.stock}[f"model.layers.1.{name}"] == (
        "its forward has been replaced"
    )
    assert torch.equal(said.tokens, stock.tokens)
    assert said.error(stock) < 1e-5


def test_an_attention_that_does_not_call_the_familys_function_is_listed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make("llama")
    attention = model.model.layers[0].self_attn
    monkeypatch.setattr(type(attention), "forward", type(attention).forward)  # to be put back
    _own_rotary(attention)
    stock, census = say(model), Census()
    with accelerate(model, census=census) as accelerated:
        said = say(model)
    reasons = {layer.name: layer.why for layer in accelerated.stock}
    expected = "its forward does not call apply_rotary_pos_emb"
    assert reasons["model.layers.0.self_attn"] == expected
    assert census.count("rotary_embedding") == 0
    assert torch.equal(said.tokens, stock.tokens)


def test_autocast_and_other_dtypes_run_stock() -> None:
    model, ids = make("qwen3"), torch.tensor([[5, 17]])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(ids).logits
        census = Census()
        with accelerate(model, census=census):
            got = model(ids).logits
    assert torch.equal(got, expected) or (got - expected).abs().max() < 0.05 * expected.abs().max()
    assert {r.why for r in census.rows if r.op == "fused_gemv"} == {"under autocast"}
    for family in ("qwen3", "mixtral", "deepseek_v3"):
        double, census = make(family, torch.float64), Census()
        double.set_experts_implementation("eager")  # the only one for float64
        with accelerate(double, census=census) as accelerated, torch.no_grad():
            got = double(ids).logits
        assert torch.equal(got, double(ids).logits)
        assert "weight of float64" in {layer.why for layer in accelerated.stock}
        assert {row.backend for row in census.rows} == {"stock"}
        assert {r.why for r in census.rows} <= {"dtypes float64 and float64", "dtype float64"}


def test_other_models_are_refused() -> None:
    for model in (torch.nn.Linear(3, 3), "llama", None):
        with pytest.raises(ArgumentError, match=r"accelerate: argument 'model'.*llama, qwen2"):
            accelerate(model)


def test_grouped_attention_is_not_for_deterministic_algorithms(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torch leaves cuDNN's out where they are asked for, but not where it is to warn only."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: True)
    device, found = torch.device("cuda"), []
    try:
        for strict, warn_only in ((False, False), (True, True), (True, False)):
            torch.use_deterministic_algorithms(strict, warn_only=warn_only)
            found.append(attention._knows_groups(device, torch.bfloat16))
    finally:
        torch.use_deterministic_algorithms(False)
    assert found == [True, True, False]
    assert not attention._knows_groups(device, torch.float32)
