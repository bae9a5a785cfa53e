"""Trains a Qwen3-MoE of about a million parameters to recite a text, in under a minute on a CPU.

    python examples/recital/train.py [DIRECTORY]

The vocabulary is the 256 bytes. The model that ships lies in `examples/recital/model`.
"""

from __future__ import annotations

import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from kernelhub import quantize

HERE = Path(__file__).parent
TEXT = (HERE / "text.txt").read_bytes()
STEPS = 300


def untrained() -> Qwen3MoeForCausalLM:
    config = Qwen3MoeConfig(
        vocab_size=256, hidden_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, intermediate_size=128, moe_intermediate_size=128,
        num_experts=8, num_experts_per_tok=2, norm_topk_prob=True, max_position_embeddings=512,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config)


class AsInt4:
    """Inside its block a model's matrices hold what int4 leaves of them."""

    def __init__(self, model: nn.Module) -> None:
        named = model.named_parameters()
        self._matrices = [p for name, p in named if name.endswith("proj.weight") or p.dim() == 3]
        self._exact: list[Tensor] = []

    def __enter__(self) -> None:
        self._exact = [p.data for p in self._matrices]
        for p in self._matrices:
            packed, scale, _ = quantize.quantize_int4(p.data, p.shape[-1])
            p.data = quantize.dequantize_int4(packed, scale)

    def __exit__(self, *exception: object) -> None:
        for p, exact in zip(self._matrices, self._exact, strict=True):
            p.data = exact


def train() -> Qwen3MoeForCausalLM:
    """A model that recites the text, as it is and in int4: every other step is for each."""
    torch.manual_seed(0)
    model = untrained()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=STEPS)
    text = torch.tensor([list(TEXT)])
    for step in range(STEPS):
        optimizer.zero_grad()
        with AsInt4(model) if step % 2 else nullcontext():
            loss = model(text, labels=text).loss
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 19:
            print(f"step {step + 1}: loss {loss.item():.4f}", flush=True)
    return model.eval()


def main() -> None:
    directory = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "model"
    start = time.perf_counter()
    model = train().bfloat16()
    count = sum(p.numel() for p in model.parameters())
    print(f"{count} parameters in {time.perf_counter() - start:.0f} s, to {directory}")
    model.save_pretrained(directory)


if __name__ == "__main__":
    main()
