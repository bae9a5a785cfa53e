"""One decode step of whole layers: models of transformers with kernelhub's ops, beside stock.

    python benchmarks/decode_step.py [--json FILE] [--model NAME]... [--batch B]... [--no-compile]
    python benchmarks/decode_step.py --tiny     # small sizes on the CPU, eager: does it run

Two layers, embedding and output layer at the sizes of the model, random weights in bf16, a static
cache that holds 512 tokens, one token for each sequence. On a GPU a step is captured in a CUDA
graph; consecutive replays decode consecutive positions, and the cache is set back between samples.
Variants, interleaved in one process:

- `stock`: transformers' own code; with experts each implementation that a graph can hold.
- `compiled`: under torch.compile (stock in the mode of `--mode`, kernelhub's in the default mode),
  captured the same way. Further ways by `--way`: `early`, where Inductor's kernels are brought up
  while those before them work (`triton.enable_pdl`), and `combined`, early and small kernels that
  do not depend on each other as one (`combo_kernels`). Each model and batch has its share of
  `--compile-seconds` and what others left; what does not fit is left out, and said so.
- `kernelhub`: inside `accelerate`; bf16, or int4 and fp8 by `quantize`.
- `head`: the output layer alone, by either; it is bf16 in every scheme.

Each variant's logits are held to those of stock, eager, for other tokens than the timed ones; int4
and fp8 to stock with the dequantised weights. A router's near tie, decided otherwise, moves a row
by a whole expert: so the median of the rows is what may not be off, and the largest is told too.
Each step is taken twice with the same tokens; where the two differ in a bit, that is told.
No inputs rotate: the weights of a step exceed the L2 cache several times with the output layer.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import torch
import transformers
from torch import Tensor
from transformers import LlamaConfig, Qwen3MoeConfig, StaticCache
from transformers.utils import logging

import kernelhub
from kernelhub import quantize as quantization
from kernelhub.bench.clock import Call, Timing, interleaved, ratio
from kernelhub.bench.models import MODELS, Model
from kernelhub.integrations.transformers import accelerate, quantize
from kernelhub.integrations.transformers.quantized import QuantizedExperts, QuantizedLinear

try:
    from benchmarks.timing import save
except ModuleNotFoundError:  # run as a script
    from timing import save  # type: ignore[no-redef]

SIZES = {"qwen3-30b-a3b": MODELS["qwen3-30b-a3b"], "llama-3-8b": MODELS["llama-3-8b"]}
TINY = {
    "qwen3-moe": Model(128, 128, 4, 2, 32, 512, experts=8, top_k=2),
    "llama": Model(128, 256, 4, 2, 32, 512),
}
LAYERS, CONTEXT = 2, 512
SPARE = 64
"""Positions after the context: replays of one sample."""
TRIALS = 8
LIMIT = 0.05
"""Median error of a row's logits, as a share of its largest, above which a step is wrong."""
SCHEMES = ("bf16", "fp8", "int4")
EXPERTS = ("batched_mm", "grouped_mm")  # stock's that a graph can hold
EARLY = {"triton.enable_pdl": True}
WAYS: dict[str, dict[str, Any]] = {
    "compiled": {},
    "early": EARLY,
    "combined": EARLY | {"combo_kernels": True},
}
"""Options of Inductor."""


# ---- models --------------------------------------------------------------------------------------


def make(sizes: Model, device: torch.device) -> Any:
    """A model of random weights, every time the same."""
    options: dict[str, Any] = {
        "vocab_size": sizes.vocab, "hidden_size": sizes.hidden, "num_hidden_layers": LAYERS,
        "num_attention_heads": sizes.heads, "num_key_value_heads": sizes.kv_heads,
        "head_dim": sizes.head_size, "intermediate_size": sizes.intermediate,
        "max_position_embeddings": 8192, "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
    }  # fmt: skip
    config: Any = LlamaConfig(**options)
    if sizes.experts:
        config = Qwen3MoeConfig(
            **options, num_experts=sizes.experts, num_experts_per_tok=sizes.top_k,
            moe_intermediate_size=sizes.intermediate, norm_topk_prob=True,
        )  # fmt: skip
    torch.manual_seed(0)
    with device:
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.eval().requires_grad_(False)


def dequantized(sizes: Model, device: torch.device, quantized: Any) -> Any:
    """Stock with the weights that a quantised model's codes stand for."""
    model = make(sizes, device)

    def put(weight: Tensor, codes: Tensor, scale: Tensor) -> None:
        of = quantization.dequantize_fp8
        weight.copy_(
            (quantization.dequantize_int4 if codes.dtype is torch.uint8 else of)(codes, scale)
        )

    for name, module in quantized.named_modules():
        if isinstance(module, QuantizedExperts):
            experts = model.get_submodule(name)
            put(experts.gate_up_proj, module.gate_up, module.gate_up_scale)
            put(experts.down_proj, module.down, module.down_scale)
        elif name.endswith(".gate_up"):
            mlp = model.get_submodule(name.rpartition(".")[0])
            both = mlp.gate_proj.weight.new_empty(module.weight.shape[0], mlp.hidden_size)
            put(both, module.weight, module.weight_scale)
            for part, half in zip((mlp.gate_proj, mlp.up_proj), both.chunk(2), strict=True):
                part.weight.copy_(half)
        elif isinstance(module, QuantizedLinear):
            name = f"{name}_proj" if name.endswith(".down") else name
            put(model.get_submodule(name).weight, module.weight, module.weight_scale)
    return model


# ---- steps ---------------------------------------------------------------------------------------


class Step:
    """One decode step of a model: `ids` `[batch, 1]` to logits `[batch, V]`."""

    def __init__(self, model: Any, ids: Tensor, context: int) -> None:
        self.context, self._ids = context, ids
        config, device = model.config, ids.device
        cache = StaticCache(config=config, max_cache_len=context + SPARE)
        cache.early_initialization(
            len(ids), config.num_key_value_heads, config.head_dim, torch.bfloat16, device
        )
        made = torch.Generator(device).manual_seed(1)
        for layer in cache.layers:
            for t in (layer.keys, layer.values):
                t[:, :, :context].normal_(generator=made)
        parameters = inspect.signature(type(model).forward).parameters
        name = "cache" if "cache" in parameters else "past_key_values"
        self._options, self._layers = {name: cache, "use_cache": True}, cache.layers
        self._forward: Callable[..., Any] = model.forward
        self._once: Call = self._eager
        self._logits = torch.empty(0)

    def _eager(self) -> None:
        self._logits = self._forward(input_ids=self._ids, **self._options).logits[:, -1]

    def compile(self, mode: str, options: dict[str, Any]) -> None:
        """In a mode, with further options of Inductor."""
        options = torch._inductor.list_mode_options(mode) | options
        self._forward = torch.compile(self._forward, options=options, dynamic=False)

    def back(self) -> None:
        """To the first position after the context."""
        for layer in self._layers:
            layer.cumulative_length.fill_(self.context)

    def prepare(self) -> None:
        """Warm up, and on a GPU capture the step."""
        self.back()
        if self._ids.device.type == "cpu":
            return self._eager()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._eager()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        self.back()
        self._once = captured(self._eager)

    def logits(self) -> Tensor:
        self.back()
        self._once()
        return self._logits.float().clone()

    def time(self, steps: int) -> float:
        self.back()
        return seconds(self._once, steps, self._ids.device)


def captured(call: Call) -> Call:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def seconds(call: Call, count: int, device: torch.device) -> float:
    """A call's time, of `count` in a row."""
    if device.type == "cpu":
        start = time.perf_counter()
        for _ in range(count):
            call()
        return (time.perf_counter() - start) / count
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(count):
        call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3 / count


_NAME = 120  # of a kernel, so many letters are told


def kernels(call: Call) -> dict[str, tuple[int, float]]:
    """How often a step launches each kernel, and the microseconds of all its launches."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    rows = profile.key_averages()
    found = [row for row in rows if row.self_device_time_total > 0]
    found.sort(key=lambda row: row.self_device_time_total, reverse=True)
    return {row.key[:_NAME]: (row.count, row.self_device_time_total) for row in found}


# ---- variants ------------------------------------------------------------------------------------


@attrs.define
class Variant:
    """A step, or why there is none; `of` names whose logits are the truth."""

    name: str
    of: str
    step: Step | None = None
    failure: str = ""
    errors: list[float] = attrs.field(factory=list)
    repeats: bool = True
    kernels: dict[str, tuple[int, float]] = attrs.field(factory=dict)

    @property
    def stock(self) -> bool:
        return self.name.startswith("stock")


class Bench:
    """All variants of one model; the models serve every batch."""

    def __init__(self, name: str, sizes: Model, given: argparse.Namespace) -> None:
        self.name, self.sizes, self.given = name, sizes, given
        self.device = torch.device("cpu" if given.tiny else "cuda")
        self.context = 16 if given.tiny else CONTEXT
        self._undo = contextlib.ExitStack()
        self.stock, self.ours, self.truths = {}, {}, {}  # type: ignore[var-annotated]
        for implementation in (given.experts or EXPERTS) if sizes.experts else ("",):
            self.stock[implementation] = make(sizes, self.device)
            if implementation:
                self.stock[implementation].set_experts_implementation(implementation)
        self.truths["bf16"] = next(iter(self.stock.values()))
        for scheme in SCHEMES:
            self.ours[scheme] = model = make(sizes, self.device)
            if scheme != "bf16":
                quantize(model, scheme)  # type: ignore[arg-type]
                self.truths[scheme] = dequantized(sizes, self.device, model)
                if sizes.experts:
                    self.truths[scheme].set_experts_implementation("batched_mm")
            self._undo.enter_context(accelerate(model, frozen=True))

    def close(self) -> None:
        self._undo.close()

    def variants(self, ids: Tensor, compiling: Compiling) -> Iterator[Variant]:
        """Prepared; those that are compiled last, the ones that matter most first."""
        made = [("stock", *item) for item in self.stock.items()]
        made += [("kernelhub", *item) for item in self.ours.items()]
        ways = ["", *(self.given.way or ["compiled"] if compiling.wanted else [])]
        for way in ways:
            for who, what, model in made:
                variant = Variant(
                    ", ".join(filter(None, (who, what, way))),
                    what if who == "kernelhub" else "bf16",
                )
                mode = self.given.mode if who == "stock" else "default"
                prepare = lambda m=model, w=way, o=mode: self._step(m, ids, w, o)  # noqa: E731
                with compiling.counted(variant) if way else contextlib.nullcontext():
                    self._try(variant, prepare)
                yield variant

    def _step(self, model: Any, ids: Tensor, way: str, mode: str) -> Step:
        step = Step(model, ids, self.context)
        if way:
            step.compile(mode, WAYS[way])
        step.prepare()
        return step

    def _try(self, variant: Variant, prepare: Callable[[], Step]) -> None:
        if not variant.failure:
            try:
                variant.step = prepare()
            except Exception as error:  # of one variant; the others go on
                variant.failure = first_line(error)

    def check(self, variants: list[Variant], ids: Tensor) -> None:
        """Hold every variant's logits to the truth's."""
        truths = {scheme: Step(model, ids, self.context) for scheme, model in self.truths.items()}
        made = torch.Generator().manual_seed(2)
        before = ids.clone()
        for _ in range(TRIALS):
            ids.copy_(torch.randint(self.sizes.vocab, ids.shape, generator=made))
            expected = {scheme: truth.logits() for scheme, truth in truths.items()}
            for variant in variants:
                if variant.step is not None:
                    truth, logits = expected[variant.of], variant.step.logits()
                    off = (logits - truth).abs().amax(-1) / truth.abs().amax(-1)
                    variant.errors += off.tolist()
                    variant.repeats &= torch.equal(variant.step.logits(), logits)
        ids.copy_(before)
        for variant in variants:
            off = statistics.median(variant.errors or [0.0])
            if variant.step is not None and not off <= LIMIT:
                variant.step, variant.failure = None, f"wrong: logits are off by {off:.1%}"

    def head(self, ids: Tensor) -> dict[str, Callable[[], float]]:
        """Samplers of the output layer alone."""
        weight = self.truths["bf16"].lm_head.weight
        x = torch.randn(len(ids), weight.shape[1], device=self.device).to(weight.dtype)
        calls: dict[str, Call] = {
            "head, stock": lambda: torch.nn.functional.linear(x, weight),
            "head, kernelhub": lambda: kernelhub.ops.fused_gemv(x, weight),
        }
        if self.device.type == "cuda":
            for call in calls.values():
                call()
            calls = {name: captured(call) for name, call in calls.items()}
        return {
            name: lambda c=call: seconds(c, self.given.steps, self.device)  # type: ignore[misc]
            for name, call in calls.items()
        }

    def rows(self, batch: int, compiling: Compiling) -> list[dict[str, Any]]:
        made = torch.Generator().manual_seed(3)
        ids = torch.randint(self.sizes.vocab, (batch, 1), generator=made).to(self.device)
        variants = list(self.variants(ids, compiling))
        self.check(variants, ids)
        steps = {v.name: v.step for v in variants if v.step is not None}
        samplers: dict[str, Callable[[], float]] = {
            name: lambda s=step: s.time(self.given.steps)  # type: ignore[misc]
            for name, step in steps.items()
        }
        samplers |= self.head(ids)
        timings, failures = interleaved(samplers, self.given.rounds)
        for variant in variants:
            variant.failure = variant.failure or failures.get(variant.name, "")
            if self.given.kernels and variant.name in timings:
                with contextlib.suppress(Exception):  # a profiler that is not allowed
                    variant.step.back()  # type: ignore[union-attr]
                    variant.kernels = kernels(variant.step._once)  # type: ignore[union-attr]
        heads = [Variant(name, "") for name in timings if name.startswith("head")]
        return self._rows(batch, [*variants, *heads], timings)

    def _rows(
        self, batch: int, variants: list[Variant], timings: dict[str, Timing]
    ) -> list[dict[str, Any]]:
        stock = [v.name for v in variants if v.stock and v.name in timings]
        best = min(stock, key=lambda name: timings[name].us, default=None)
        rows = []
        for v in variants:
            row: dict[str, Any] = {"model": self.name, "batch": batch, "variant": v.name}
            if v.name in timings:
                row |= {"us": timings[v.name].us, "spread_us": timings[v.name].spread_us}
                if best is not None and v.of:
                    row |= {"best_stock": best, "ratio": ratio(timings[v.name], timings[best])}
            if v.errors:
                row |= {"error": statistics.median(v.errors), "largest_error": max(v.errors)}
                row["repeats"] = v.repeats
            if v.kernels:
                row["kernels"] = v.kernels
            if v.failure:
                row["failure"] = v.failure
            rows.append(row)
        return rows


class Compiling:
    """How much time torch.compile may still take."""

    def __init__(self, wanted: bool) -> None:
        self.wanted, self.left = wanted, 0.0
        torch._dynamo.config.recompile_limit = 1000  # each variant compiles the same code anew

    @contextlib.contextmanager
    def counted(self, variant: Variant) -> Iterator[None]:
        if self.left <= 0:
            variant.failure = "left out: the time for torch.compile is spent"
        start = time.monotonic()
        yield
        self.left -= time.monotonic() - start


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:300]


def show(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        start = f"{row['model']:<14} {row['batch']:>2}  {row['variant']:<30}"
        if "us" not in row:
            print(f"{start} {row['failure']}", flush=True)
            continue
        share = f"{row['ratio']:6.2f}" if "ratio" in row else f"{'':6}"
        error = f"{row['error']:.1e} {row['largest_error']:.1e}" if "error" in row else ""
        count = (
            f"{sum(n for n, _ in row['kernels'].values()):4} kernels" if "kernels" in row else ""
        )
        mark = "" if row.get("repeats", True) else "  not the same twice"
        mark += "  the better stock" if row.get("best_stock") == row["variant"] else ""
        us = f"{row['us']:9.1f} ±{row['spread_us']:5.1f}"
        print(f"{start}{us} {share}  {error:<16} {count}{mark}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--model", action="append", help=f"{', '.join(SIZES)}; both if not given")
    parser.add_argument("--batch", action="append", type=int, help="1, 4 and 8 if not given")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--mode", default="max-autotune-no-cudagraphs", help="of stock's compile")
    parser.add_argument("--way", action="append", choices=WAYS, help="compiled if not given")
    parser.add_argument("--experts", action="append", choices=EXPERTS, help="stock's, if not both")
    parser.add_argument("--compile-seconds", type=float, default=90)
    parser.add_argument(
        "--kernels", action="store_true", help="count and time each kernel of a step"
    )
    given = parser.parse_args()
    given.steps = 2 if given.tiny else SPARE
    sizes = {n: s for n, s in (TINY if given.tiny else SIZES).items() if n in (given.model or [n])}
    if not sizes or not (given.tiny or torch.cuda.is_available()):
        parser.error(f"no such model: {given.model}" if not sizes else "no CUDA device: try --tiny")
    if given.tiny:
        torch.set_num_threads(1)
    logging.set_verbosity_error()
    compiling = Compiling(not given.no_compile)
    batches = given.batch or [1, 4, 8]
    results: list[dict[str, Any]] = []
    print(f"{'model':<11}batch  {'variant':<38}us{'of stock':>18}  error: median, largest")
    with torch.no_grad():
        benches = [Bench(name, size, given) for name, size in sizes.items()]
        for batch in batches:
            for bench in benches:
                compiling.left += given.compile_seconds / len(batches) / len(benches)
                rows = bench.rows(batch, compiling)
                show(rows)
                results += rows
                about = {
                    "transformers": transformers.__version__,
                    "layers": LAYERS,
                    "context": bench.context,
                    "mode": given.mode,
                    "steps": results,
                }
                save(given.json, about)  # what there is, should a later one break the process
        for bench in benches:
            bench.close()


if __name__ == "__main__":
    main()
