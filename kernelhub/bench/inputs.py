"""Inputs of timed calls: finite, seeded, made on the device, as many sets as leave its caches.

A builder yields sets without end. A set is the list of calls that are timed together, each a
dictionary of arguments; `meta` as device makes sets without memory, to check and to count.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import attrs
import torch
from torch import Tensor

from kernelhub.quantize import FP8

Facts = dict[str, Any]
Calls = list[dict[str, Any]]

ROTATED_BYTES = {"cpu": 64_000_000}
ROTATED_BYTES_ELSEWHERE = 400_000_000  # several times the L2 cache of any GPU so far
SEED = 0
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def rotated_bytes(device: torch.device) -> int:
    return ROTATED_BYTES.get(device.type, ROTATED_BYTES_ELSEWHERE)


@attrs.frozen
class Maker:
    """Makes random tensors on a device."""

    device: torch.device
    generator: torch.Generator | None
    budget: int

    @classmethod
    def on(cls, device: torch.device, budget: int) -> Maker:
        if device.type == "meta":
            return cls(device, None, budget)
        return cls(device, torch.Generator(device).manual_seed(SEED), budget)

    def normal(self, *shape: int, dtype: torch.dtype, std: float = 1.0) -> Tensor:
        return self.empty(*shape, dtype=dtype).normal_(0, std, generator=self.generator)

    def uniform(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.empty(*shape, dtype=dtype).uniform_(0.5, 1.5, generator=self.generator)

    def codes(self, *shape: int) -> Tensor:
        empty = self.empty(*shape, dtype=torch.uint8)
        return empty.random_(0, 256, generator=self.generator)

    def fp8(self, *shape: int) -> Tensor:
        """Values below 2: without its highest exponent bit no code is a NaN."""
        return (self.codes(*shape) & 0xBF).view(FP8)

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)


def weight(make: Maker, scheme: str, lead: tuple[int, ...], n: int, k: int) -> dict[str, Tensor]:
    """A weight in a scheme, with its scales, such that a product with normal x is near 1."""
    if scheme in DTYPES:
        return {"weight": make.normal(*lead, n, k, dtype=DTYPES[scheme], std=k**-0.5)}
    if scheme == "int4":
        group = next((g for g in (128, 64, 32) if k % g == 0), k)
        scale = make.uniform(*lead, n, k // group, dtype=torch.bfloat16)
        return {
            "weight": make.codes(*lead, n, k // 2),
            "weight_scale": scale.mul_(0.2 * k**-0.5),
        }
    scale = make.uniform(*lead, -(-n // 128), -(-k // 128))
    return {"weight": make.fp8(*lead, n, k), "weight_scale": scale.mul_(k**-0.5)}


def activation(make: Maker, scheme: str, *shape: int) -> dict[str, Tensor]:
    if scheme != "w8a8":
        return {"x": make.normal(*shape, dtype=DTYPES.get(scheme, torch.bfloat16))}
    return {"x": make.fp8(*shape), "x_scale": make.uniform(*shape[:-1], -(-shape[-1] // 128))}


def result_dtype(scheme: str) -> torch.dtype:
    return DTYPES.get(scheme, torch.bfloat16)


def fused_gemv(make: Maker, scheme: str, rows: int, f: Facts) -> Iterator[Calls]:
    n, k, act = f["N"], f["K"], f["act"]
    width = n // 2 if act == "swiglu" else n
    x = activation(make, scheme, rows, k)
    while True:
        call = {**x, **weight(make, scheme, (), n, k)}
        out = make.empty(rows, width, dtype=result_dtype(scheme))
        yield [{**call, "activation": None if act == "none" else act, "out": out}]


def fused_moe_gemv(make: Maker, scheme: str, rows: int, f: Facts) -> Iterator[Calls]:
    """A set chooses experts that no recent set chose, so that few large weights serve many sets."""
    experts, k, hidden, inter, stage = f["E"], f["k"], f["H"], f["I"], f["stage"]
    ids = _expert_ids(rows, k, experts)
    dtype = result_dtype(scheme)
    weights: list[list[dict[str, Tensor]]] = []
    index, made_bytes = 0, 0
    x = activation(make, scheme, rows, *((k, inter) if stage == "down" else (hidden,)))
    while True:
        if not weights or made_bytes < make.budget:
            ups = weight(make, scheme, (experts,), 2 * inter, hidden) if stage != "down" else {}
            downs = weight(make, scheme, (experts,), hidden, inter) if stage != "gate-up" else {}
            weights.append([ups, downs])
            made_bytes += sum(t.nbytes for part in (ups, downs) for t in part.values())
        up, down = weights[index % len(weights)]
        topk_ids = next(ids).to(make.device)
        router = make.uniform(rows, k)
        middle = make.empty(rows, k, inter, dtype=dtype)
        calls: Calls = []
        if stage != "down":
            calls += [{**x, **up, "topk_ids": topk_ids, "activation": "swiglu", "out": middle}]
        if stage != "gate-up":
            values = x if stage == "down" else {"x": middle}
            lead = (rows,) if f["reduce"] else (rows, k)
            out = make.empty(*lead, hidden, dtype=dtype)
            more = {"topk_weights": router, "reduce": f["reduce"], "out": out}
            calls += [{**values, **down, "topk_ids": topk_ids, **more}]
        yield calls
        index += 1


def _expert_ids(rows: int, k: int, experts: int) -> Iterator[Tensor]:
    """`[rows, k]`, for each token k different experts; longest unused experts first."""
    g = torch.Generator().manual_seed(SEED)
    oldest = torch.randperm(experts, generator=g)
    while True:
        drawn = torch.rand(rows, experts, generator=g).argsort(dim=1)[:, :k]
        chosen, position = drawn.unique(return_inverse=True)
        yield oldest[position].to(torch.int32)
        oldest = oldest.roll(-len(chosen))


def rotary_embedding(make: Maker, scheme: str, rows: int, f: Facts) -> Iterator[Calls]:
    table_rows = 8192
    rot = f["rot"] or f["D"]
    dtype = DTYPES[scheme]
    cache_dtype = dtype if f["cache"] == "same" else torch.float32
    g = torch.Generator().manual_seed(SEED)
    angles = make.uniform(table_rows, rot // 2) * 6
    cache = torch.cat((angles.cos(), angles.sin()), dim=1).to(cache_dtype)
    while True:
        yield [
            {
                "positions": torch.randint(table_rows, (rows,), generator=g).to(make.device),
                "query": make.normal(rows, f["Hq"], f["D"], dtype=dtype),
                "key": make.normal(rows, f["Hk"], f["D"], dtype=dtype),
                "head_size": f["D"],
                "cos_sin_cache": cache,
                "is_neox": f["style"] == "neox",
            }
        ]


def fused_mul_add(make: Maker, scheme: str, rows: int, f: Facts) -> Iterator[Calls]:
    dtype = DTYPES[scheme]
    while True:
        x, bias = (make.normal(rows, f["H"], dtype=dtype) for _ in range(2))
        yield [{"x": x, "bias": bias, "scale": 2.5, "out": make.empty(rows, f["H"], dtype=dtype)}]


def sampling(make: Maker, scheme: str, rows: int, f: Facts) -> Iterator[Calls]:
    vocab = f["V"]
    g = torch.Generator().manual_seed(SEED)
    while True:
        if f["dist"] == "gauss":  # logits of the size of a language model's
            logits = make.normal(rows, vocab, dtype=torch.float32, std=3.0)
        else:  # Zipf's law: the r-th most likely token has 1/r of the first one's probability
            ranks = torch.randperm(vocab, generator=g).to(make.device, torch.float32)
            logits = -(ranks + 1).log().expand(rows, vocab)
        yield [
            {
                "probs": torch.softmax(logits, dim=-1),
                "top_k": f["k"],
                "top_p": f["p"],
                "filter_apply_order": f["order"],
                "seed": SEED,
                "offset": 0,
            }
        ]
