"""Models of transformers on the emulated device: musa kernels, and the tokens of stock."""

from __future__ import annotations

import importlib.util

import pytest
import torch

if importlib.util.find_spec("transformers") is None:
    pytest.skip("the extra e2e is not installed", allow_module_level=True)

from transformers.utils import logging

import kernelhub
from kernelhub.integrations.transformers import Census, Sampler, accelerate
from tests.integrations.models import FAMILIES, make, say
from tests.integrations.recital import PROMPT, TEXT, load, recite
from tests.integrations.test_accelerate import CALLS, LIMIT, OPS

TOKENS = 32


@pytest.fixture(autouse=True)
def quiet() -> None:
    logging.disable_progress_bar()


@pytest.mark.parametrize("dtype", LIMIT, ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_stock_on_the_cpu(family: str, dtype: torch.dtype) -> None:
    model, census = make(family, dtype), Census()
    stock = say(model)
    model.to("musa:1" if family == "llama" else "musa:0")
    with accelerate(model, census=census):
        said = say(model)
    error = said.error(stock)
    assert torch.equal(said.tokens, stock.tokens), (error, stock.gap)
    assert 0 < error <= LIMIT[dtype]
    assert {row.backend for row in census.rows} == {"musa"}
    assert tuple(census.count(op, "musa") for op in OPS) == tuple(8 * n for n in CALLS[family])


@pytest.mark.parametrize("weights", ["bf16", "int4", "fp8"])
def test_the_model_that_ships_recites(weights: str) -> None:
    model, census = load(weights).to("musa"), Census()
    with accelerate(model, census=census):
        assert recite(model, TOKENS) == TEXT[: len(PROMPT) + TOKENS]
    assert {row.backend for row in census.rows} == {"musa"}


def test_sampled_text_is_that_of_the_reference() -> None:
    """Both draws are made where the probabilities are: on the CPU, and on the device."""
    for seed in range(2):
        census = Census()
        sampler = Sampler(temperature=2.0, top_k=40, top_p=0.95, seed=seed, census=census)
        model = load("fp32")
        with kernelhub.use("reference"), accelerate(model):
            expected = recite(model, 16, logits_processor=[sampler])
        model.to("musa")
        with accelerate(model):
            assert recite(model, 16, logits_processor=[sampler]) == expected
        assert {row.backend for row in census.rows} == {"reference", "musa"}


def test_the_same_probabilities_give_the_same_token() -> None:
    scores = torch.randn(3, 256, generator=torch.Generator().manual_seed(1)) * 2
    ids = torch.zeros(3, 7, dtype=torch.int64)
    for seed in (0, -5, [1, 2, 3]):
        probs = torch.softmax(scores, -1)
        drawn = []
        for device in ("cpu", "musa:0", "musa:1"):
            sampler = Sampler(top_k=30, top_p=0.9, seed=seed)
            # log of the same probabilities: softmax is stock's on either device, bit for bit
            drawn.append(sampler(ids.to(device), probs.log().to(device)).cpu())
        assert torch.equal(drawn[0], drawn[1])
        assert torch.equal(drawn[0], drawn[2])
