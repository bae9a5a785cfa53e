"""The `cuda` backend on a real device: graphs, streams, threads, errors. Skipped without one."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

import kernelhub
from kernelhub import quantize, registry
from kernelhub.backends.native import tiles
from kernelhub.errors import KernelError
from kernelhub.testing import run_case

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

mul_add = kernelhub.ops.fused_mul_add
rotary = kernelhub.ops.rotary_embedding
sampling = kernelhub.ops.top_k_top_p_sampling_from_probs


@pytest.fixture(autouse=True)
def _healthy() -> Iterator[None]:
    yield
    torch.cuda.synchronize()  # raises what a test left behind on the device


def rotary_arguments(tokens: int) -> dict[str, torch.Tensor | int]:
    made = torch.Generator(device="cuda").manual_seed(tokens)
    heads = {
        name: torch.randn(tokens, n, 128, generator=made, device="cuda", dtype=torch.bfloat16)
        for name, n in (("query", 32), ("key", 8))
    }
    return {
        "positions": torch.arange(tokens, device="cuda"),
        **heads,
        "head_size": 128,
        "cos_sin_cache": torch.randn(4096, 128, generator=made, device="cuda"),
    }


def test_cuda_is_the_automatic_choice() -> None:
    x = torch.ones(4, 8, device="cuda")
    assert mul_add.explain(x, x, 2.0).backend == "cuda"


def test_a_graph_replays_with_new_inputs() -> None:
    arguments = rotary_arguments(7)
    x, bias = torch.randn(7, 2048, device="cuda"), torch.randn(7, 2048, device="cuda")
    rotary(**arguments)
    mul_add(x, bias, 2.5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rotary(**arguments)
        result = mul_add(x, bias, 2.5)
    for seed in range(3):
        torch.manual_seed(seed)
        for name in ("query", "key"):
            arguments[name].normal_()
        arguments["positions"].random_(0, 4096)
        x.normal_()
        expected = {
            k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()
        }
        rotary(**expected)
        graph.replay()
        assert torch.equal(arguments["query"], expected["query"])
        assert torch.equal(arguments["key"], expected["key"])
        assert torch.equal(result, mul_add(x, bias, 2.5))


@pytest.mark.parametrize(("rows", "vocab_size"), [(2, 50257), (40, 3001)])
def test_a_graph_samples_anew(rows: int, vocab_size: int) -> None:
    """With new probabilities and the next offset, in both shapes of launches."""
    probs = torch.rand(rows, vocab_size, device="cuda")
    seed, offset = torch.tensor([7], device="cuda"), torch.tensor([0], device="cuda")
    call = {"top_k": 1000, "top_p": 0.9, "seed": seed, "offset": offset}
    sampling(probs, **call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens = sampling(probs, **call)
    for step in range(5):
        probs.uniform_()
        offset.fill_(step)
        graph.replay()
        with kernelhub.use("reference"):
            assert torch.equal(tokens, sampling(probs, **call))


def test_the_current_stream_is_used() -> None:
    x, bias = torch.zeros(1 << 20, device="cuda"), torch.ones(1 << 20, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        x.fill_(3.0)
        result = mul_add(x, bias, 2.0)
        assert not stream.query(), "the call waited for the device"
    stream.synchronize()
    assert torch.equal(result, torch.full_like(result, 7.0))


def test_several_threads() -> None:
    wrong: list[int] = []

    def work(seed: int) -> None:
        made = torch.Generator(device="cuda").manual_seed(seed)
        with torch.cuda.stream(torch.cuda.Stream()), torch.no_grad():
            x = torch.randn(64, 1000, generator=made, device="cuda")
            for scale in range(50):
                if not torch.equal(mul_add(x, x, float(scale)), torch.add(x, x, alpha=scale)):
                    wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_the_second_device() -> None:
    x = torch.randn(5, 33, device="cuda:1")
    torch.testing.assert_close(mul_add(x, x, 2.0), 3 * x)
    assert torch.cuda.current_device() == 0


def test_a_plan_with_tensors_of_another_place_is_an_error() -> None:
    x = torch.ones(4, 8, device="cuda")
    run = mul_add.plan(x, x, 2.0)
    with pytest.raises((KernelError, TypeError)):
        run(torch.ones(4, 8), x)
    assert torch.equal(run(x, x), torch.full_like(x, 3.0))


def test_more_than_2_31_elements() -> None:
    numel = 2**31 + 9
    if torch.cuda.get_device_properties(0).total_memory < 24 * 2**30:
        pytest.skip("needs 13 GB")
    x = torch.full((numel,), 2.0, device="cuda", dtype=torch.bfloat16)
    result = mul_add(x, torch.ones(1, device="cuda", dtype=torch.bfloat16), 3.0)
    assert bool((result == 7.0).all())
    rows = torch.zeros(2**21 + 2, 8, 128, device="cuda", dtype=torch.bfloat16)
    rows[-1] = 1.0
    cache = torch.cat((torch.zeros(1, 64), torch.ones(1, 64)), -1).cuda()
    rotary(torch.zeros(len(rows), device="cuda", dtype=torch.int32), rows, None, 128, cache)
    assert rows[-1, :, :64].eq(-1).all()
    assert rows[-1, :, 64:].eq(1).all()
    assert not rows[:-1].any()


# torch's own inductor imports modules that warn of torch.jit, and captures an empty graph to begin.
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
def test_compiled_with_cuda_graphs() -> None:
    x, bias = torch.randn(16, 2048, device="cuda"), torch.randn(16, 2048, device="cuda")

    def layer(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return mul_add(a * 2, b, 2.5) + 1

    compiled = torch.compile(layer, fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        for _ in range(4):
            x.normal_()
            torch.testing.assert_close(compiled(x, bias).clone(), layer(x, bias))


# ---- GEMV --------------------------------------------------------------------------------------

CLASSES = [tiles.shape_class(s, 512, k) for s in ("dense", "fp8", "int4") for k in (512, 1024)]
STREAMS = [
    t
    for t in tiles.GEMV_TILES
    if t in tiles.tiles_for("int4 n512 k512", "sm_90a")
    and t not in tiles.tiles_for("int4 n512 k512", "sm_80")
]
needs_streams = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="needs compute capability 9.0",
)


def forced(tile: str) -> tiles.Table:
    return {op: {c: tile for c in CLASSES if tiles.fits(c, tile)} for op in tiles.OPS}


@needs_streams
@pytest.mark.parametrize("op", tiles.OPS)
@pytest.mark.parametrize("tile", STREAMS)
def test_every_tile_of_cuda_alone_computes_the_op(tile: str, op: str) -> None:
    ran = 0
    for case in registry.spec(op).cases():
        if case.name.startswith("whole-slices"):
            with tiles.override(forced(tile)):
                outcome = run_case(op, case, "cuda", "cuda")
            assert outcome.status == "passed", (case.name, outcome.message)
            ran += 1
    assert ran > 10


def weights(scheme: str, n: int, k: int) -> dict[str, torch.Tensor]:
    w = torch.randn(n, k, device="cuda") * k**-0.5
    if scheme == "dense":
        return {"weight": w.to(torch.bfloat16)}
    if scheme == "fp8":
        return dict(zip(("weight", "weight_scale"), quantize.quantize_fp8(w), strict=True))
    packed, scale, _ = quantize.quantize_int4(w, group_size=128, zero_point=False)
    return {"weight": packed, "weight_scale": scale.to(torch.bfloat16)}


@pytest.mark.parametrize("scheme", ["dense", "fp8", "int4"])
@pytest.mark.parametrize("size", [(4096, 4096), (28672, 1024), (2048, 7168)])
def test_rows_do_not_depend_on_their_company(scheme: str, size: tuple[int, int]) -> None:
    n, k = size
    made = weights(scheme, n, k)
    x = torch.randn(33, k, device="cuda", dtype=torch.bfloat16)
    gemv = kernelhub.op("fused_gemv").on("cuda")
    whole = gemv(x, **made)
    for rows in range(1, 17):
        first = 33 - 2 * rows
        assert torch.equal(gemv(x[first : first + rows], **made), whole[first : first + rows]), rows
    assert torch.equal(gemv(x, **made), whole)


@pytest.mark.parametrize("scheme", ["dense", "fp8", "int4"])
def test_a_graph_multiplies_anew(scheme: str) -> None:
    """With new rows, and experts chosen anew."""
    made, x = weights(scheme, 4096, 2048), torch.randn(5, 2048, device="cuda", dtype=torch.bfloat16)
    experts = {name: t.reshape(8, t.shape[0] // 8, *t.shape[1:]) for name, t in made.items()}
    ids = torch.zeros(5, 3, dtype=torch.int32, device="cuda")
    gemv, moe = (kernelhub.op(op).on("cuda") for op in tiles.OPS)
    gemv(x, **made), moe(x, topk_ids=ids, **experts)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, z = gemv(x, **made), moe(x, topk_ids=ids, **experts)
    for _ in range(3):
        x.normal_()
        ids.random_(-1, 8)
        graph.replay()
        assert torch.equal(y, gemv(x, **made))
        assert torch.equal(z, moe(x, topk_ids=ids, **experts))
