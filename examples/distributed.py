"""The model that recites, on two ranks: tensor- and expert-parallel, beside one process.

python examples/distributed.py [--tokens N]                  # starts its own ranks
torchrun --nproc-per-node 2 examples/distributed.py          # or torch does

The distributed part is torch's: here weights are cut and partial results added. kernelhub's ops see
smaller tensors, and ids of experts that are not theirs as -1. NCCL with a CUDA device for each rank
where there are two, gloo on the CPU otherwise.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

# transformers is imported by the ranks alone: what starts them needs torch and nothing else.
RECITAL = Path(__file__).parent / "recital"
TEXT = (RECITAL / "text.txt").read_bytes()
PROMPT = TEXT[:10]
RANKS = 2
TIMEOUT = timedelta(seconds=60)  # of one collective: a rank that died must not hold the others

COLUMNS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")  # each rank has some outputs
ROWS = ("o_proj", "down_proj")  # each rank has some inputs, and a part of every sum
EXPERTS = ("whole", "sliced")  # some experts of each layer, or a slice of every one


def part(weight: Tensor, dim: int) -> nn.Parameter:
    """This rank's share of a weight, with memory of its own."""
    rank, world = dist.get_rank(), dist.get_world_size()
    if weight.shape[dim] % world:
        raise SystemExit(f"{list(weight.shape)} cannot be cut in {world} along {dim}")
    return nn.Parameter(weight.detach().chunk(world, dim)[rank].clone(), requires_grad=False)


def add(_: nn.Module, __: Any, partial: Tensor) -> Tensor:
    dist.all_reduce(partial)
    return partial


def gather(_: nn.Module, __: Any, columns: Tensor) -> Tensor:
    parts = [torch.empty_like(columns) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, columns.contiguous())
    return torch.cat(parts, -1)


def only(first: int, count: int) -> Callable[[nn.Module, Any], Any]:
    """Count ids from this rank's first expert; -1 masks the other ranks' experts."""

    def mask(_: nn.Module, args: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
        x, ids, weights = args
        mine = (ids >= first) & (ids < first + count)
        return x, torch.where(mine, ids - first, -1), weights

    return mask


def cut(model: Any, experts: str) -> None:
    """Leave this rank's part in a model of transformers, and put the collectives in."""
    model.set_experts_implementation("kernelhub")  # with any number of rows: -1 is the op's
    for name, module in model.named_modules():
        kind = name.rpartition(".")[2]
        if kind in COLUMNS or kind == "lm_head":
            module.weight = part(module.weight, 0)
            module.bias = None if module.bias is None else part(module.bias, 0)
            if kind == "lm_head":
                module.register_forward_hook(gather)
        elif kind in ROWS:
            module.weight = part(module.weight, 1)
            module.bias = None if dist.get_rank() else module.bias  # added once
            module.register_forward_hook(add)
        elif kind == "experts":
            _cut_experts(module, experts)


def _cut_experts(module: Any, experts: str) -> None:
    gate_up, down = (
        module.gate_up_proj,
        module.down_proj,
    )  # [E, gate rows then up rows, K]; [E, K, I]
    if experts == "whole":
        module.gate_up_proj, module.down_proj = part(gate_up, 0), part(down, 0)
        count = len(module.down_proj)
        module.register_forward_pre_hook(only(dist.get_rank() * count, count))
    else:
        pair = part(gate_up.unflatten(1, (2, -1)), 2)  # of the gate rows and of the up rows
        module.gate_up_proj = nn.Parameter(pair.flatten(1, 2), requires_grad=False)
        module.down_proj = part(down, 2)
    module.register_forward_hook(add)


def load(dtype: torch.dtype, device: torch.device) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(RECITAL / "model", dtype=dtype).to(device)


def say(model: Any, tokens: int, census: Any = None) -> tuple[bytes, Tensor]:
    """What the model recites, and the logits `[tokens, V]` of each step."""
    from kernelhub.integrations.transformers import accelerate

    with accelerate(model, census=census):
        made = model.generate(
            torch.tensor([list(PROMPT)], device=model.device),
            max_new_tokens=tokens,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
    return bytes(made.sequences[0].tolist()), torch.cat(made.logits).float()


def everywhere(right: bool, device: torch.device) -> bool:
    """Whether all ranks find it right."""
    wrong = torch.tensor(int(not right), device=device)
    dist.all_reduce(wrong)
    return int(wrong) == 0


def compare(tokens: int, device: torch.device) -> bool:
    """Recite in every way of cutting, beside the whole model; rank 0 tells."""
    from kernelhub.integrations.transformers import Census

    tell = print if dist.get_rank() == 0 else lambda *_: None
    tell(f"{dist.get_world_size()} ranks, {dist.get_backend()}, {device.type}; {tokens} tokens\n")
    tell("dtype     experts  share of weights  tokens  largest logit difference, of the largest")
    right, text = True, b""
    for dtype in (torch.bfloat16, torch.float32):
        whole = load(dtype, device)
        size = sum(p.numel() for p in whole.parameters())
        text, logits = say(whole, tokens)
        for experts in EXPERTS:
            model = load(dtype, device)
            cut(model, experts)
            share = sum(p.numel() for p in model.parameters()) / size
            said, found = say(model, tokens)
            equal = everywhere(said == text, device)
            right &= equal
            error = ((found - logits).abs().max() / logits.abs().max()).item()
            name = str(dtype).removeprefix("torch.")
            mark = "equal" if equal else "DIFFER"
            tell(f"{name:<9} {experts:<8} {share:<17.0%} {mark:<7} {error:.1e}")
    tell(f"\n{text.decode(errors='replace')}\n")
    census = Census()
    say(model, 2, census)
    tell(f"On rank 0, 2 tokens:\n{census}")
    return right


def run(rank: int, world: int, rendezvous: str, tokens: int) -> None:
    """One rank: join, compare, leave. Exits with 1 where tokens differ."""
    from transformers.utils import logging

    torch.set_num_threads(1)  # these matrices are too small to share
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    backend, device = "gloo", torch.device("cpu")
    local = int(os.environ.get("LOCAL_RANK", rank))
    if torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", world)):
        backend, device = "nccl", torch.device("cuda", local)
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend, init_method=rendezvous, rank=rank, world_size=world, timeout=TIMEOUT
    )
    try:
        right = compare(tokens, device)
    finally:
        dist.destroy_process_group()
    if not right:
        sys.exit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tokens", type=int, default=len(TEXT) - len(PROMPT))
    tokens = parser.parse_args().tokens
    if importlib.util.find_spec("transformers") is None:
        raise SystemExit("this needs the extra e2e (Python 3.11 or later)")
    if "RANK" in os.environ:  # torchrun's, or another launcher's
        run(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), "env://", tokens)
        return
    with tempfile.TemporaryDirectory() as folder:
        arguments = (RANKS, f"file://{folder}/rendezvous", tokens)
        torch.multiprocessing.spawn(run, arguments, nprocs=RANKS)


if __name__ == "__main__":
    main()
