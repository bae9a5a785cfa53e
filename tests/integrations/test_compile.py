"""Accelerated models under torch.compile: one graph, stock's tokens, stock again afterwards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager

import kernelhub
from kernelhub.integrations.transformers import Census, accelerate, layers, quantize
from tests.integrations.models import make, say

# Of a graph; query, key and value, gate and up each have a product of their own, and rotary
# embedding is the model's code, for torch.compile to fuse.
OPS: dict[str, dict[str, int]] = {
    "llama": {"fused_gemv": 2 * (4 + 3) + 1},
    "qwen3_moe": {"fused_gemv": 2 * 4 + 3 + 1 + 1, "fused_moe_gemv": 2},
    "mixtral": {"fused_gemv": 2 * (4 + 1) + 1, "fused_moe_gemv": 4},
    "deepseek_v3": {"fused_gemv": 2 * (5 + 3) + 1, "fused_moe_gemv": 2, "fused_mul_add": 1},
}
# Where the weights are frozen these are one product each.
FROZEN = {
    "llama": 2 * (2 + 2) + 1,
    "qwen3_moe": 2 * 2 + 2 + 1 + 1,
    "mixtral": 2 * (2 + 1) + 1,
}
IDS = torch.tensor([[5, 17, 3], [7, 2, 30]])

pytestmark = pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")


@pytest.fixture(autouse=True)
def _anew() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model: Any, ops: Counter[str] | None = None) -> Any:
    """The model as one graph; the ops in each graph are counted in `ops`."""

    def backend(graph: torch.fx.GraphModule, example: Any) -> Any:
        names = [str(node.target) for node in graph.graph.nodes]
        if ops is not None:
            ops.update(n.split(".")[1] for n in names if n.startswith("kernelhub."))
        return aot_eager(graph, example)

    return torch.compile(model.forward, fullgraph=True, backend=backend)


@pytest.mark.parametrize("family", OPS)
def test_tokens_are_stocks(family: str) -> None:
    """Prompt and steps over a static cache, each one graph."""
    model = make(family)
    stock = say(model, cache_implementation="static")
    ops: Counter[str] = Counter()
    with accelerate(model):
        model.forward = compiled(model, ops)
        said = say(model, cache_implementation="static")
        del model.forward
    assert torch.equal(said.tokens, stock.tokens)
    assert said.error(stock) < 1e-5
    assert dict(ops) == {op: 2 * count for op, count in OPS[family].items()}
    assert torch.equal(say(model, cache_implementation="static").logits, stock.logits)


@pytest.mark.parametrize("family", FROZEN)
def test_frozen_weights_are_joined(family: str) -> None:
    model = make(family)
    stock = say(model, cache_implementation="static")
    ops: Counter[str] = Counter()
    with accelerate(model, frozen=True):
        model.forward = compiled(model, ops)
        said = say(model, cache_implementation="static")
        del model.forward
    assert torch.equal(said.tokens, stock.tokens)
    assert said.error(stock) < 1e-5
    assert dict(ops) == {
        op: 2 * count for op, count in (OPS[family] | {"fused_gemv": FROZEN[family]}).items()
    }


@torch.no_grad()
def test_frozen_while_one_block_says_so() -> None:
    """A graph knows which it was made for; after the block weights may change."""
    model, ops = make("llama"), Counter[str]()
    run = compiled(model, ops)
    with accelerate(model):
        with accelerate(model, frozen=True):
            inside = run(IDS).logits
            assert ops["fused_gemv"] == FROZEN["llama"]
            torch.testing.assert_close(model(IDS).logits, inside, rtol=1e-4, atol=1e-5)
        model.model.layers[0].self_attn.k_proj.weight.mul_(1.5)
        outside = run(IDS).logits
        assert ops["fused_gemv"] == FROZEN["llama"] + OPS["llama"]["fused_gemv"]
        torch.testing.assert_close(model(IDS).logits, outside, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(inside, outside, rtol=1e-4, atol=1e-5)


def test_gradients_flow_through_frozen_layers() -> None:
    """Whoever asks for gradients is given the weights themselves, which are not one."""
    model, ops = make("llama"), Counter[str]()
    weight = model.model.layers[0].self_attn.k_proj.weight
    model(IDS).logits.square().sum().backward()
    expected, weight.grad = weight.grad, None
    with accelerate(model, frozen=True), kernelhub.use("reference"):
        for forward in (model.forward, compiled(model, ops)):
            forward(IDS).logits.square().sum().backward()
            torch.testing.assert_close(weight.grad, expected, rtol=1e-3, atol=1e-4)
            weight.grad = None
    assert ops["fused_gemv"] == OPS["llama"]["fused_gemv"]


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_entering_and_leaving_are_seen(family: str) -> None:
    """One compiled function, called outside, inside and outside again."""
    model, ops = make(family), Counter[str]()
    run = compiled(model, ops)
    stock = run(IDS).logits
    assert not ops
    with accelerate(model):
        inside = run(IDS).logits
        assert ops["fused_gemv"] == OPS["llama"]["fused_gemv"]  # as many as Qwen3 has
        eager = model(IDS).logits
    assert torch.equal(run(IDS).logits, stock)
    torch.testing.assert_close(inside, eager, rtol=1e-4, atol=1e-5)
    with accelerate(model), kernelhub.use("simt"):
        assert not torch.equal(run(IDS).logits, stock)


@torch.no_grad()
def test_new_weights_are_seen() -> None:
    """No copy of joined weights is in the graph; nothing is counted in it."""
    model, census = make("llama"), Census()
    with accelerate(model, census=census):
        run = compiled(model)
        run(IDS)
        layer = model.model.layers[0]
        for part in (layer.mlp.up_proj, layer.self_attn.k_proj):
            part.weight.mul_(1.5)
        got = run(IDS).logits
    assert not census.rows
    torch.testing.assert_close(got, model(IDS).logits, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("scheme", ["int4", "fp8"])
def test_quantised_models(scheme: str, frozen: bool) -> None:
    model = make("qwen3_moe", torch.bfloat16)
    quantize(model, scheme)  # type: ignore[arg-type]
    with accelerate(model, frozen=frozen):
        expected = model(IDS).logits
        got = compiled(model)(IDS).logits
    torch.testing.assert_close(got, expected, rtol=0.02, atol=0.02 * expected.abs().max().item())


@torch.no_grad()
def test_the_policy_is_the_callers() -> None:
    """Each op chooses its backend when it runs."""
    model = make("llama")
    with accelerate(model):
        run = compiled(model)
        reference = run(IDS).logits
        with kernelhub.use("simt"):
            simt = run(IDS).logits
    assert not torch.equal(simt, reference)
    torch.testing.assert_close(simt, reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("divided", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_choice_of_experts(dtype: torch.dtype, divided: bool) -> None:
    """By ranks in a graph, by topk outside: ties, infinities and NaN, too."""
    torch.manual_seed(0)
    in_a_graph = torch.compile(layers.choose, fullgraph=True, backend="aot_eager")
    logits = torch.randn(8, 60).to(dtype)
    logits[0, 7] = -float("inf")
    logits[1] = 0.5
    logits[2, 50:] = logits[2].max()
    logits[3, 5] = float("nan")
    logits[4, 9] = float("inf")
    logits[5, 3:] = -float("inf")
    for k in (1, 6, 60):
        shares, ids = in_a_graph(logits, k, divided)
        expected, _ = layers.choose(logits, k, divided)
        chosen = logits.gather(1, ids).float().nan_to_num(2e38, 1e38, -1e38).sort().values
        largest = logits.topk(k).values.float().nan_to_num(2e38, 1e38, -1e38).sort().values
        assert torch.equal(chosen[:4], largest[:4])
        assert all(len(set(row)) == k for row in ids.tolist())
        assert ids.dtype is torch.int64
        assert shares.dtype is torch.float32
        torch.testing.assert_close(
            shares.sort().values, expected.sort().values, rtol=1e-5, atol=1e-7, equal_nan=True
        )
        where = torch.softmax(logits, -1, dtype=torch.float32).gather(1, ids)
        total = where.sum(-1, keepdim=True) if divided else 1.0
        torch.testing.assert_close(shares, where / total, rtol=1e-5, atol=1e-7, equal_nan=True)
