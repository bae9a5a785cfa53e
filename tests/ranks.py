"""Ranks of torch.distributed that compare cut ops with whole ones; `test_distributed.py` starts it.

python -m tests.ranks spawn|fork BACKEND...

Each rank computes the whole result too, so a difference is found where it arises. A backend that is
not for CPU tensors has a device of its kind for each rank, and NCCL.
"""

from __future__ import annotations

import sys
import tempfile
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

import kernelhub
from kernelhub import quantize, registry
from kernelhub.function import entry_for
from kernelhub.testing import compare

RANKS = 2
TIMEOUT_S = 60
SCHEMES = ("fp32", "bf16", "fp8", "int4")
M, K, N, E = 3, 256, 264, 6  # N / RANKS = 132: tails for the kernels
SLOTS = 2

gemv, moe = kernelhub.ops.fused_gemv, kernelhub.ops.fused_moe_gemv


def weight(scheme: str, shape: tuple[int, ...], g: torch.Generator) -> dict[str, Any]:
    """A weight `[..., N, K]` as arguments of an op; fp8 with a scale a row, which cuts anywhere."""
    w = torch.randn(shape, generator=g)
    if scheme == "int4":
        made = quantize.quantize_int4(w, group_size=32, zero_point=True)
        return {"weight": made[0], "weight_scale": made[1], "weight_zero": made[2]}
    if scheme == "fp8":
        scale = torch.rand(*shape[:-1], 1, generator=g) / 8 + 0.01
        return {"weight": (w / 8).to(torch.float8_e4m3fn), "weight_scale": scale}
    return {"weight": w.to(torch.float32 if scheme == "fp32" else torch.bfloat16)}


def part(t: Tensor, dim: int, of: int = RANKS) -> Tensor:
    return t.chunk(of, dim)[dist.get_rank()]


def columns(given: dict[str, Any], *, swiglu: bool = False) -> dict[str, Any]:
    """This rank's outputs: rows of the weight, with SwiGLU a part of the gate and one of the up."""

    def cut(t: Tensor) -> Tensor:
        dim = t.dim() - (1 if t is given.get("bias") else 2)
        if not swiglu:
            return part(t, dim)
        return torch.cat([part(half, dim) for half in t.chunk(2, dim)], dim)

    return {name: cut(t) for name, t in given.items()}


def rows(given: dict[str, Any]) -> dict[str, Any]:
    """This rank's inputs: columns of the weight; a scale for a whole row stays."""
    return {name: t if t.shape[-1] == 1 else part(t, -1) for name, t in given.items()}


def gathered(t: Tensor, dim: int = -1) -> Tensor:
    parts = [torch.empty_like(t) for _ in range(RANKS)]
    dist.all_gather(parts, t.contiguous())
    return torch.cat(parts, dim)


def added(partial: Tensor) -> Tensor:
    """The ranks' fp32 sums, added in fp32."""
    assert partial.dtype is torch.float32
    dist.all_reduce(partial)
    return partial


class Rank:
    """The checks of one rank on one backend."""

    def __init__(self, backend: str, device: torch.device) -> None:
        self.backend, self.device = backend, device

    def within_bound(self, op: str, got: Tensor, **call: Any) -> None:
        """`got` against the bound of the whole call, and against the other ranks' bits."""
        args = registry.spec(op).bind(**call)
        entry = entry_for(op, self.backend, args)
        assert entry is not None
        chain = entry.implementation.chain
        cpu = {n: v.cpu() if isinstance(v, Tensor) else v for n, v in call.items()}
        truth = registry.spec(op).oracle(
            registry.spec(op).bind(**cpu), chain(args) if chain else None
        )
        assert compare(truth[0], got) <= 1
        assert torch.equal(*gathered(got[None], 0))

    def same(self, op: str, got: Tensor, **call: Any) -> None:
        """Bits of the whole call. The reference's product is a BLAS's, whose bits depend on N."""
        if self.backend == "reference":
            self.within_bound(op, got, **call)
        else:
            assert torch.equal(got, kernelhub.op(op).on(self.backend)(**call))

    def check(self) -> None:
        for seed, scheme in enumerate(SCHEMES):
            g = torch.Generator().manual_seed(seed)
            dtype = torch.float32 if scheme == "fp32" else torch.bfloat16
            self.linear(scheme, dtype, g)
            self.experts(scheme, dtype, g)
        self.attention_and_sampling()
        if self.device.type == "cuda":
            self.graph()

    def put(self, given: dict[str, Any]) -> dict[str, Any]:
        return {name: t.to(self.device) for name, t in given.items()}

    def linear(self, scheme: str, dtype: torch.dtype, g: torch.Generator) -> None:
        op = gemv.on(self.backend)
        x = torch.randn(M, K, generator=g).to(dtype).to(self.device)
        w = self.put({**weight(scheme, (N, K), g), "bias": torch.randn(N, generator=g)})
        self.same("fused_gemv", gathered(op(x, **columns(w))), x=x, **w)
        gate_up = columns(w, swiglu=True)
        halves = gathered(op(x, **gate_up, activation="swiglu"))
        self.same("fused_gemv", halves, x=x, **w, activation="swiglu")

        bias = w.pop("bias")  # added by one rank
        mine = {**rows(w), "bias": None if dist.get_rank() else bias}
        partial = op(part(x, -1), **mine, out_dtype=torch.float32)
        self.within_bound("fused_gemv", added(partial).to(dtype), x=x, **w, bias=bias)

    def experts(self, scheme: str, dtype: torch.dtype, g: torch.Generator) -> None:
        op, rank = moe.on(self.backend), dist.get_rank()
        x = torch.randn(M, K, generator=g).to(dtype).to(self.device)
        ids = torch.stack([torch.randperm(E, generator=g)[:SLOTS] for _ in range(M)])
        ids[0] = torch.tensor([0, E - 1])  # each rank has one at least
        ids[1] = torch.tensor([1, 0])  # and one token that is not its own
        ids = ids.to(self.device)
        router = torch.rand(M, SLOTS, generator=g).to(self.device)
        gate_up = self.put(weight(scheme, (E, 2 * K, K), g))
        down = self.put(weight(scheme, (E, N, K), g))
        swiglu: dict[str, Any] = {"activation": "swiglu"}
        full: dict[str, Any] = {"out_dtype": torch.float32, "reduce": True}
        hidden = op(x, topk_ids=ids, **gate_up, **swiglu)
        call = {"x": hidden, "topk_ids": ids, "topk_weights": router, **down, "reduce": True}

        first, count = rank * E // RANKS, E // RANKS
        here = (ids >= first) & (ids < first + count)
        mine = torch.where(here, ids - first, -1)
        y = op(x, topk_ids=mine, **{n: part(t, 0) for n, t in gate_up.items()}, **swiglu)
        assert torch.equal(y[here], hidden[here])  # the same experts: nothing is cut
        assert not y[~here].any()
        own = {n: part(t, 0) for n, t in down.items()}
        partial = op(y, topk_ids=mine, topk_weights=router, **own, **full)
        assert bool(partial[1].any()) == (rank == 0)
        self.within_bound("fused_moe_gemv", added(partial).to(dtype), **call)

        slices = gathered(op(x, topk_ids=ids, **columns(gate_up, swiglu=True), **swiglu))
        self.same("fused_moe_gemv", slices, x=x, topk_ids=ids, **gate_up, **swiglu)
        partial = op(part(hidden, -1), topk_ids=ids, topk_weights=router, **rows(down), **full)
        self.within_bound("fused_moe_gemv", added(partial).to(dtype), **call)

    def attention_and_sampling(self) -> None:
        """Heads turn apart as together; the ranks draw one token without a word to each other."""
        g = torch.Generator().manual_seed(9)
        q = torch.randn(M, 4, 32, generator=g).to(self.device)
        cache = torch.randn(16, 32, generator=g).to(self.device)
        positions = torch.tensor([3, 0, 15], device=self.device)
        rotary = kernelhub.ops.rotary_embedding.on(self.backend)
        mine = part(q, 1).clone()
        rotary(positions, q, None, 32, cache)
        rotary(positions, mine, None, 32, cache)
        assert torch.equal(gathered(mine, 1), q)

        probs = torch.softmax(torch.randn(M, 96, generator=g) * 2, -1).to(self.device)
        seed = torch.tensor([5, 6, 7], device=self.device)
        sample = kernelhub.ops.top_k_top_p_sampling_from_probs
        tokens = sample.on(self.backend)(probs, 40, 0.9, seed=seed)
        assert torch.equal(*gathered(tokens[None], 0))
        assert torch.equal(
            tokens.cpu(), sample.on("reference")(probs.cpu(), 40, 0.9, seed=seed.cpu())
        )

    def graph(self) -> None:
        """A row-parallel product and its collective, captured and replayed on a stream of its own.

        The current device is the rank's by then; the first call of all was made while it was not.
        """
        w = rows({"weight": torch.randn(N, K, device=self.device)})
        x = torch.randn(M, K // RANKS, device=self.device)
        y = torch.empty(M, N, device=self.device)

        def layer() -> None:
            gemv(x, **w, out=y)
            dist.all_reduce(y)

        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            layer()
            stream.synchronize()
            with torch.cuda.graph(graph, stream=stream):
                layer()
            for _ in range(3):
                x.normal_()
                layer()
                expected = y.clone()
                y.fill_(torch.nan)
                graph.replay()
                stream.synchronize()
                assert torch.equal(y, expected)
        graph.reset()  # while a graph holds a collective, its process group cannot be destroyed


def use_ops(backends: list[str]) -> None:
    """What a process does before it forks: leaves tables, libraries and locks behind."""
    for backend in backends:
        x = torch.ones(M, K)
        gemv.on(backend)(x, torch.ones(N * 16, K))  # for torch's own threads, if it has some
        moe.on(backend)(x, torch.ones(E, N, K), torch.zeros(M, SLOTS, dtype=torch.int64))
    kernelhub.configure(backends[-1])


def device_of(backend: str, rank: int) -> torch.device:
    gemv.backends()  # loads them
    kinds = registry.backends()[backend].device_types or ("cpu",)
    return torch.device("cpu") if "cpu" in kinds else torch.device(kinds[0], rank)


def run(rank: int, rendezvous: str, backends: list[str], inherited: bool) -> None:
    torch.set_num_threads(1)  # of a fork also because OpenMP's threads stayed with the parent
    ones = torch.ones(1, 8)
    expected = backends[-1] if inherited else "reference"
    assert gemv.explain(ones, ones).backend == expected
    devices = [device_of(backend, rank) for backend in backends]
    if devices[0].type == "cuda":
        x = torch.ones(1, 8, device=devices[0])  # on a device that is not the current one
        assert gemv(x, x).device == devices[0]
        assert gemv(x, x).item() == 8
        torch.cuda.set_device(devices[0])
    dist.init_process_group(
        "gloo" if devices[0].type == "cpu" else "nccl",
        init_method=rendezvous,
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=TIMEOUT_S),
    )
    try:
        for backend, device in zip(backends, devices, strict=True):
            Rank(backend, device).check()
            print(f"rank {rank}: {backend} on {device} agrees", flush=True)
    finally:
        dist.destroy_process_group()


def main() -> None:
    method, *backends = sys.argv[1:]
    if method == "fork":
        use_ops(backends)
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(
            run,
            (f"file://{folder}/rendezvous", backends, method == "fork"),
            nprocs=RANKS,
            start_method=method,
        )


if __name__ == "__main__":
    main()
