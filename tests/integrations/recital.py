"""The model that ships with the examples, and what it recites."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from kernelhub.integrations.transformers import quantize

FOLDER = Path(__file__).parents[2] / "examples" / "recital"
TEXT = (FOLDER / "text.txt").read_bytes()
PROMPT = TEXT[:10]


def load(weights: str = "bf16", device: str = "cpu") -> Any:
    """bf16 as in the file, fp32, int4 or fp8."""
    dtype = torch.float32 if weights == "fp32" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(FOLDER / "model", dtype=dtype)
    if weights in ("int4", "fp8"):
        quantize(model, weights)  # type: ignore[arg-type]
    return model.to(device)


def recite(model: Any, tokens: int = len(TEXT) - len(PROMPT), **options: Any) -> bytes:
    ids = torch.tensor([list(PROMPT)], device=model.device)
    made = model.generate(ids, max_new_tokens=tokens, do_sample=False, **options)
    return bytes(made[0].tolist())


def script() -> ModuleType:
    """The training script, imported."""
    spec = importlib.util.spec_from_file_location("recital_train", FOLDER / "train.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
