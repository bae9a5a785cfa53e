"""Models on a real CUDA device: what they say, what they draw, a step in a graph. Else skipped."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import StaticCache
from transformers.utils import logging

import kernelhub
from kernelhub.integrations.census import run
from kernelhub.integrations.transformers import Census, Sampler, accelerate, quantize, sampler
from tests.integrations.models import FAMILIES, PROMPT, make, say
from tests.integrations.recital import PROMPT as BEGINNING
from tests.integrations.recital import TEXT, load, recite

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

DEVICE = "cuda"
SAMPLED = 24  # tokens


@pytest.fixture(autouse=True)
def _healthy() -> Iterator[None]:
    logging.disable_progress_bar()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # raises what a test left behind on the device


@pytest.mark.parametrize("weights", ["bf16", "int4", "fp8"])
def test_it_recites(weights: str) -> None:
    model = load(weights, DEVICE)
    if weights == "bf16":
        assert recite(model) == TEXT, "stock's"
    with accelerate(model):
        assert recite(model) == TEXT
    census = Census()
    with accelerate(model, census=census):
        assert recite(model, 2) == TEXT[: len(BEGINNING) + 2]
    assert {row.backend for row in census.rows} == {DEVICE}


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_stocks(family: str) -> None:
    model = make(family, device=DEVICE)
    stock = say(model)
    with accelerate(model):
        said = say(model)
    assert torch.equal(said.tokens, stock.tokens), (said.error(stock), stock.gap)
    assert 0 < said.error(stock) <= 2e-5


def test_what_is_drawn_is_what_the_reference_draws_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From the same probabilities always; from those of two devices with these seeds."""
    drawn = 0

    def both(censuses: Any, op: str, place: str, probs: Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal drawn
        tokens, valid = run(censuses, op, place, probs, *args, **kwargs)
        moved = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in kwargs.items()}
        with kernelhub.use("reference"):
            expected, _ = run(censuses, op, place, probs.cpu(), *args, **moved)
        assert tokens.device.type == probs.device.type
        assert torch.equal(tokens.cpu(), expected)
        drawn += 1
        return tokens, valid

    models = [load("fp32", device) for device in (DEVICE, "cpu")]
    monkeypatch.setattr(sampler, "run", both)
    texts = set()
    for seed in (0, 1, [2]):
        sample, found = Sampler(temperature=2.0, top_k=40, top_p=0.95, seed=seed), set()
        for model in models:
            with accelerate(model):
                found.add(recite(model, SAMPLED, logits_processor=[sample]))
        assert len(found) == 1, found
        texts |= found
    assert len(texts) == 3
    assert drawn == 3 * 2 * SAMPLED


class Step:
    """One decode step of a model over a static cache that holds a prompt: `ids` to logits."""

    def __init__(self, model: Any, prompt: Tensor) -> None:
        parameters = inspect.signature(type(model).forward).parameters
        name = "cache" if "cache" in parameters else "past_key_values"
        cache = StaticCache(config=model.config, max_cache_len=32)
        self._model, self._options = model, {name: cache, "use_cache": True}
        self.ids = torch.zeros_like(prompt[:, :1])
        model(prompt, **self._options)
        self._layers, self._length = cache.layers, prompt.shape[1]

    def __call__(self) -> Tensor:
        logits: Tensor = self._model(self.ids, **self._options).logits[:, -1]
        return logits

    def back(self) -> None:
        """To the position after the prompt."""
        for layer in self._layers:
            layer.cumulative_length.fill_(self._length)


def captured(step: Step) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    step.back()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step()
    return graph, logits


@pytest.mark.parametrize(
    ("family", "weights"),
    [*((family, "fp32") for family in FAMILIES), ("qwen3_moe", "int4"), ("qwen3_moe", "fp8")],
)
@torch.no_grad()
def test_a_graph_decodes_what_eager_decodes(family: str, weights: str) -> None:
    """Replayed with other tokens, at the next positions: a cache of its own, in the same state."""
    model = make(family, torch.float32 if weights == "fp32" else torch.bfloat16, DEVICE)
    if weights != "fp32":
        quantize(model, weights)  # type: ignore[arg-type]
    prompt = torch.cat([PROMPT, PROMPT.flip(1), PROMPT + 1]).to(DEVICE)
    with accelerate(model):
        step, eager = Step(model, prompt), Step(model, prompt)
        graph, logits = captured(step)
        seen = []
        for token in range(4):
            for made in (step, eager):
                made.ids.copy_(torch.tensor([[7 + token], [30 - token], [token]]))
            graph.replay()
            expected = eager()
            torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
            seen.append(expected)
    assert not torch.equal(seen[0], seen[1])
