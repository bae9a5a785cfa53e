"""A small language model recites its text through kernelhub: every backend that is here, bf16, int4
and fp8 weights, beside transformers' own code.

The model is a Qwen3-MoE of a million parameters over bytes (examples/recital), trained to recite.
In a wrong rotary embedding, scale or routing it loses the thread at once.
"""

from __future__ import annotations

import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import kernelhub

try:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from kernelhub.integrations.transformers import Census, Sampler, accelerate, quantize
except ImportError as error:
    raise SystemExit(f"the demo needs the extra e2e (Python 3.11 or later): {error}") from error

RECITAL = Path(__file__).parent / "recital"
TEXT = (RECITAL / "text.txt").read_bytes()
PROMPT = TEXT[:10]
EMULATED_TOKENS = 96  # the emulator runs each GPU thread on the CPU
WEIGHTS = ("bf16", "int4", "fp8")

console = Console()


def load(weights: str, device: str = "cpu") -> Any:
    """The model that ships, its weights bf16 (as in the file), fp32, int4 or fp8."""
    dtype = torch.float32 if weights == "fp32" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(RECITAL / "model", dtype=dtype)
    if weights in ("int4", "fp8"):
        quantize(model, weights)
    return model.to(device)


def backends() -> list[tuple[str, str]]:
    """(device, backend) for all that can run here; says of the others why not."""
    gemv, found = kernelhub.ops.fused_gemv, []
    here = [kind for kind in ("cuda", "musa") if hasattr(torch, kind)]
    devices = ["cpu", *(kind for kind in here if getattr(torch, kind).is_available())]
    for backend in gemv.backends():
        for device in dict.fromkeys([*devices, backend if backend in here else "cpu"]):
            x = kernelhub.TensorDesc((1, 8), torch.float32, torch.device(device))
            with kernelhub.use(backend):
                selection = gemv.explain(x, x)
            if selection.chosen is not None:
                found.append((device, backend))
        if backend not in [name for _, name in found]:
            reasons = "; ".join(selection.candidates[0].reasons)
            console.print(f"{backend} is left out: {reasons}", highlight=False, soft_wrap=True)
    return found


def recite(model: Any, tokens: int, prompt: bytes = PROMPT, **options: Any) -> bytes:
    ids = torch.tensor([list(prompt)], device=model.device)
    made = model.generate(ids, max_new_tokens=tokens, do_sample=False, **options)
    return bytes(made[0].tolist())


def main() -> int:
    torch.set_num_threads(1)  # these matrices are too small to share
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore", kernelhub.FallbackWarning)
    start, right = time.perf_counter(), True
    every = len(TEXT) - len(PROMPT)
    stock = recite(load("bf16"), every)  # also warms torch up
    begun = time.perf_counter()
    stock = recite(load("bf16"), every)
    spent = (time.perf_counter() - begun) / every
    console.print(f"[bold]stock transformers, bf16, {spent * 1e3:.1f} ms a token[/]")
    console.print(stock.decode(errors="replace"), highlight=False)
    right &= stock == TEXT

    table = Table(title="Through kernelhub")
    for column in ("weights", "device", "backend", "tokens", "ms a token", "equal to stock's"):
        right_hand = column in ("tokens", "ms a token")
        table.add_column(column, justify="right" if right_hand else "left")
    census, sampled = Census(), []
    for device, backend in backends():
        kernelhub.configure(backend)
        tokens = EMULATED_TOKENS if backend == "simt" else every
        for weights in WEIGHTS:
            model = load(weights, device)
            with accelerate(model):
                recite(model, 1)
                begun = time.perf_counter()
                text = recite(model, tokens)
                spent = (time.perf_counter() - begun) / tokens
            equal = text == stock[: len(PROMPT) + tokens]
            right &= equal
            console.print(f"[bold]{weights} weights, {backend} on {device}[/]")
            console.print(text.decode(errors="replace"), highlight=False)
            mark = "[green]yes[/]" if equal else "[red]NO[/]"
            table.add_row(weights, device, backend, str(tokens), f"{spent * 1e3:.1f}", mark)
        model = load("bf16", device)
        with accelerate(model, census=census):
            recite(model, 4, prompt=TEXT[:40])
        model, sampler = load("fp32", device), Sampler(temperature=2.0, seed=7, census=census)
        with accelerate(model):
            sampled.append(recite(model, 24, logits_processor=[sampler]))
        kernelhub.configure()
    console.print(table)
    right &= len(set(sampled)) == 1
    console.print(
        f"sampled at temperature 2 with seed 7, on {len(sampled)} backends "
        f"{'the same text' if len(set(sampled)) == 1 else '[red]DIFFERENT TEXTS[/]'}:"
    )
    console.print(repr(sampled[0]), markup=False, highlight=False)
    console.print(
        "\n[bold]Who ran what[/] (a prompt of 40 bytes, 3 tokens more; 24 sampled tokens)"
    )
    console.print(str(census), markup=False, highlight=False, soft_wrap=True)
    console.print(f"{time.perf_counter() - start:.0f} s. ", end="")
    console.print("All tokens are stock's." if right else "[red]Some tokens are not stock's.[/]")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
