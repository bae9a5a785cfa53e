"""What torchrun runs for `tests/test_distributed.py`: the example, then cut models of other kinds.

torchrun --nproc-per-node 2 -m tests.integrations.ranks FOLDER
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from kernelhub.integrations.transformers import Census, accelerate
from tests.integrations.models import make, say

PATH = Path(__file__).parents[2] / "examples" / "distributed.py"


def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("distributed_example", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    made, (_, folder) = example(), sys.argv
    sys.argv[1:] = ["--tokens", "3"]
    made.main()
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=made.TIMEOUT,
    )
    # Biases everywhere; a dense layer, then one of experts, and a prompt of more than 16 rows.
    for family, prompt in (("llama", 4), ("qwen3_moe", 20)):
        ids = torch.arange(1, prompt + 1)[None]
        with accelerate(make(family)) as whole:
            expected = say(whole.model, ids)
        for experts in made.EXPERTS:
            model = make(family)
            made.cut(model, experts)
            with accelerate(model):
                said = say(model, ids)
            assert torch.equal(said.tokens, expected.tokens)
            assert 0 < said.error(expected) < 1e-5
            print(f"rank {dist.get_rank()}: {family}, {experts}, {said.error(expected):.1e}")
    sharded()
    dist.destroy_process_group()


def sharded() -> None:
    """FSDP: a layer's weights are plain, and whole, while it is called."""
    ids, model = torch.arange(1, 5)[None], make("llama")
    with accelerate(model):
        expected = say(model, ids)
    for part in (*model.model.layers, model):
        fully_shard(part, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    census = Census()
    with accelerate(model, census=census):
        said = say(model, ids)
    assert torch.equal(said.tokens, expected.tokens)
    assert {"linear", "query, key and value"} <= {row.place for row in census.rows}
    assert {row.backend for row in census.rows} == {"reference"}
    print(f"rank {dist.get_rank()}: sharded, {said.error(expected):.1e}")


if __name__ == "__main__":
    main()
