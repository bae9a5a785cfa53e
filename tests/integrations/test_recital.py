"""The model that ships recites its text on every backend, quantised too; with a fault it fails."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers.utils import logging

import kernelhub
from kernelhub.integrations.census import run
from kernelhub.integrations.transformers import Sampler, accelerate, attention, layers, quantized
from tests.integrations.recital import FOLDER, PROMPT, TEXT, load, recite, script

ON_EMULATOR = 24  # tokens
WITH_FAULTS = (50, 200)  # tokens: most faults show soon, some late
WEIGHTS = ("bf16", "int4", "fp8")


@pytest.fixture(autouse=True)
def quiet() -> None:
    logging.disable_progress_bar()


@pytest.mark.parametrize("weights", WEIGHTS)
def test_it_recites(weights: str) -> None:
    model = load(weights)
    assert recite(model, ON_EMULATOR) == TEXT[: len(PROMPT) + ON_EMULATOR]
    with accelerate(model):
        assert recite(model) == TEXT
        with kernelhub.use("simt"):
            assert recite(model, ON_EMULATOR) == TEXT[: len(PROMPT) + ON_EMULATOR]


def test_sampled_text_is_the_same_on_every_backend() -> None:
    """In fp32, where backends differ by 1e-6 of a logit: no draw of these seeds is that close."""
    model, texts = load("fp32"), []
    for seed in range(2):
        sampler, found = Sampler(temperature=2.0, top_k=40, top_p=0.95, seed=seed), set()
        for backend in ("reference", "simt"):
            with kernelhub.use(backend), accelerate(model):
                found.add(recite(model, 16, logits_processor=[sampler]))
        assert len(found) == 1
        texts += found
    assert len(set(texts)) == 2


def _rotary(change: Callable[[list[Any], dict[str, Any]], None]) -> Any:
    return ("rotary_embedding", "bf16", change)


def _sines_negated(args: list[Any], _: dict[str, Any]) -> None:
    table = args[4]
    args[4] = torch.cat([table[:, :16], -table[:, 16:]], -1)


def _next_expert(args: list[Any], _: dict[str, Any]) -> None:
    args[2] = (args[2] + 1) % 8


def _slots_swapped(args: list[Any], kwargs: dict[str, Any]) -> None:
    if kwargs.get("reduce"):
        args[3] = args[3].flip(1)


def _gate_and_up_swapped(args: list[Any], kwargs: dict[str, Any]) -> None:
    if kwargs.get("activation"):
        args[1] = torch.cat(list(reversed(args[1].chunk(2, 1))), 1)


def _scales_of_other_rows(_: list[Any], kwargs: dict[str, Any]) -> None:
    if kwargs.get("weight_scale") is not None:
        kwargs["weight_scale"] = kwargs["weight_scale"].roll(1, -2)


def _scales_too_large(_: list[Any], kwargs: dict[str, Any]) -> None:
    if kwargs.get("weight_scale") is not None:
        kwargs["weight_scale"] = kwargs["weight_scale"] * 2


# Each changes the arguments of one op's calls.
FAULTS: dict[str, tuple[str, str, Callable[[list[Any], dict[str, Any]], None]]] = {
    "pairs as in GPT-J": _rotary(lambda _, kwargs: kwargs.update(is_neox=False)),
    "turned backwards": _rotary(_sines_negated),
    "key not turned": _rotary(lambda args, _: args.__setitem__(2, args[2].clone())),
    "next expert": ("fused_moe_gemv", "bf16", _next_expert),
    "weights of the other slot": ("fused_moe_gemv", "bf16", _slots_swapped),
    "gate and up swapped": ("fused_moe_gemv", "bf16", _gate_and_up_swapped),
    "scales of other rows": ("fused_gemv", "int4", _scales_of_other_rows),
    "scales too large": ("fused_gemv", "fp8", _scales_too_large),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_one_fault_and_it_loses_the_thread(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    op, weights, change = FAULTS[fault]

    def faulty(censuses: Any, name: str, place: str, *args: Any, **kwargs: Any) -> Any:
        changed = list(args)
        if name == op:
            change(changed, kwargs)
        return run(censuses, name, place, *changed, **kwargs)

    for module in (attention, layers, quantized):
        monkeypatch.setattr(module, "run", faulty)
    model = load(weights)
    right, said = 1.0, b""
    for tokens in WITH_FAULTS:
        with accelerate(model):
            said = recite(model, tokens)[len(PROMPT) :]
        right = sum(a == b for a, b in zip(said, TEXT[len(PROMPT) :], strict=False)) / len(said)
        if right < 0.75:
            return
    raise AssertionError(f"{right:.0%} of the text is right: {said!r}")


def test_what_ships() -> None:
    size = (FOLDER / "model" / "model.safetensors").stat().st_size
    assert 1.5e6 < size < 2.5e6
    model = load()
    assert 0.8e6 < sum(p.numel() for p in model.parameters()) < 1.2e6
    assert TEXT.decode("ascii").endswith(".\n")
    made = script()
    assert made.TEXT == TEXT
    assert made.untrained().config.to_dict().keys() == model.config.to_dict().keys()
    shapes = {n: p.shape for n, p in model.named_parameters()}
    assert {n: p.shape for n, p in made.untrained().named_parameters()} == shapes


def test_the_script_trains(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = script()
    monkeypatch.setattr(made, "STEPS", 40)
    made.train()
    losses = [float(x) for x in re.findall(r"loss ([\d.]+)", capsys.readouterr().out)]
    assert losses[0] < 5.5
    assert losses[-1] < 0.7 * losses[0]
