"""Every op under torch.compile, torch.library.opcheck and fake tensors."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch
from torch.library import opcheck

import kernelhub
from kernelhub import contracts, registry
from kernelhub.compile import _flat_names, _in_schema, _split
from kernelhub.spec import Case
from tests.toys import OP, backend, call

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

# Tracing with "aot_eager" shows everything but code generation and needs no C++ compiler.
BACKEND = "aot_eager"


@pytest.fixture(autouse=True)
def _no_recompile_from_other_tests() -> None:
    torch._dynamo.reset()


def good_cases(name: str, count: int = 6) -> list[Case]:
    """Some small good cases of an op, of every kind, in even steps through its list."""
    good = [c for c in registry.spec(name).cases() if c.error is None and c.kind != "typical"]
    step = max(1, len(good) // count)
    return good[::step][:count]


ALL = [(name, case) for name in contracts.NAMES for case in good_cases(name)]
IDS = [f"{name}-{case.name}" for name, case in ALL]


def outputs(name: str, result: Any, arguments: dict[str, Any]) -> list[torch.Tensor]:
    returned = list(result) if isinstance(result, tuple) else [] if result is None else [result]
    in_place = [p.name for p in registry.spec(name).params if p.role == "in_place"]
    return returned + [arguments[n] for n in in_place if arguments.get(n) is not None]


def assert_same(a: list[torch.Tensor], b: list[torch.Tensor]) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("name", "case"), ALL, ids=IDS)
def test_fullgraph_gives_the_bits_of_eager(name: str, case: Case) -> None:
    op = kernelhub.op(name)
    compiled = torch.compile(lambda kw: op(**kw), fullgraph=True, backend=BACKEND)
    eager_arguments, arguments = case.arguments(), case.arguments()
    eager = op(**eager_arguments)
    assert_same(
        outputs(name, compiled(arguments), arguments), outputs(name, eager, eager_arguments)
    )


def _flat(name: str, arguments: dict[str, Any]) -> tuple[Any, ...]:
    spec = registry.spec(name)
    args = spec.bind(**arguments)
    flat: list[Any] = []
    for param in filter(_in_schema, spec.params):
        value = spec.all_outputs.get(param.name, getattr(args, param.name))
        if _split(param):
            tensor = isinstance(value, torch.Tensor)
            flat += [value if tensor else None, None if tensor else value]
        else:
            flat.append(value)
    assert len(flat) == len(_flat_names(spec))
    return (*flat, "")


@pytest.mark.parametrize(("name", "case"), ALL, ids=IDS)
def test_opcheck(name: str, case: Case) -> None:
    arguments = case.arguments()
    arguments.pop("out", None)
    op = getattr(torch.ops.kernelhub, name).default
    flat = _flat(name, arguments)
    utils = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if not any(isinstance(v, torch.Tensor) and v.dtype == torch.float8_e4m3fn for v in flat):
        utils.append("test_schema")  # compares inputs by arithmetic that torch lacks for fp8
    opcheck(op, flat, test_utils=utils)


@pytest.mark.parametrize("name", contracts.NAMES)
def test_one_graph_serves_any_number_of_rows(name: str) -> None:
    op = kernelhub.op(name)
    graphs = []

    def count(graph, inputs):  # type: ignore[no-untyped-def]
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(lambda kw: op(**kw), fullgraph=True, backend=count, dynamic=True)
    for rows in (5, 3, 9, 17):
        first, second = _rows(name, rows), _rows(name, rows)
        assert_same(outputs(name, compiled(first), first), outputs(name, op(**second), second))
    assert len(graphs) == 1


def _rows(name: str, rows: int) -> dict[str, Any]:
    g = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 64, generator=g)
    if name == "fused_mul_add":
        return {"x": x, "bias": x.flip(0), "scale": 2.5}
    if name == "fused_gemv":
        return {"x": x, "weight": torch.randn(32, 64, generator=g), "activation": "swiglu"}
    if name == "fused_moe_gemv":
        ids = torch.randint(0, 4, (rows, 2), generator=g)
        weight = torch.randn(4, 32, 64, generator=g)
        return {"x": x, "weight": weight, "topk_ids": ids, "activation": "silu"}
    if name == "rotary_embedding":
        return {
            "positions": torch.arange(rows),
            "query": x.view(rows, 2, 32),
            "key": None,
            "head_size": 32,
            "cos_sin_cache": torch.randn(40, 32, generator=g),
        }
    probs = torch.softmax(x, -1)
    return {"probs": probs, "top_k": 7, "top_p": 0.9, "seed": torch.arange(rows) + 11}


def test_forcing_a_backend_compiles_once_more_and_is_obeyed(add_backend) -> None:  # type: ignore[no-untyped-def]
    add_backend(backend("toy", 42.0))
    graphs = []

    def count(graph, inputs):  # type: ignore[no-untyped-def]
        graphs.append(graph)
        return graph

    op = kernelhub.op(OP)
    compiled = torch.compile(lambda *a: op(*a), fullgraph=True, backend=count)
    assert compiled(*call()).tolist() == [42.0] * 3
    for _ in range(3):
        kernelhub.configure("reference")
        assert compiled(*call()).tolist() == [7.0] * 3
        kernelhub.configure()
        assert compiled(*call()).tolist() == [42.0] * 3
        with kernelhub.use("reference"):
            assert compiled(*call()).tolist() == [7.0] * 3
    assert len(graphs) == 2


def test_on_and_plan_are_obeyed_inside_a_graph(add_backend) -> None:  # type: ignore[no-untyped-def]
    add_backend(backend("toy", 42.0))
    op = kernelhub.op(OP)
    on = op.on("reference")
    x, bias, scale = call()
    plan = op.plan(x, bias, scale)

    @torch.compile(fullgraph=True, backend=BACKEND)
    def both(x, bias):  # type: ignore[no-untyped-def]
        return on(x, bias, 3.0), op(x, bias, 3.0), plan(x, bias)

    assert [t[0].item() for t in both(x, bias)] == [7.0, 42.0, 42.0]


def test_out_under_compile_is_written_and_returned() -> None:
    op = kernelhub.op(OP)
    x, bias, scale = call()
    out = torch.empty(3)
    result = torch.compile(lambda o: op(x, bias, scale, out=o), fullgraph=True, backend=BACKEND)(
        out
    )
    assert result is out
    assert out.tolist() == [7.0] * 3


@pytest.mark.parametrize(
    "out", [torch.zeros(2, 3), torch.zeros(3, dtype=torch.float64), torch.zeros(3, device="meta")]
)
def test_out_under_compile_is_checked(out: torch.Tensor) -> None:
    op = kernelhub.op(OP)
    x, bias, scale = call()
    compiled = torch.compile(lambda o: op(x, bias, scale, out=o), fullgraph=True, backend=BACKEND)
    with pytest.raises(Exception, match="argument 'out': expected the shape"):
        compiled(out)


def test_forced_in_place_without_a_derivative_is_refused(add_backend) -> None:  # type: ignore[no-untyped-def]
    from kernelhub.backend import Backend, Implementation

    spec = registry.spec("rotary_embedding")
    add_backend(Backend("toy", (Implementation("rotary_embedding", spec.reference),)))
    on = kernelhub.ops.rotary_embedding.on("toy")

    def f(q):  # type: ignore[no-untyped-def]
        q = q * 1.0
        on(torch.tensor([0]), q, None, 2, torch.ones(1, 2))
        return q

    with pytest.raises(Exception, match="only 'reference' has a derivative"):
        torch.compile(f, fullgraph=True, backend=BACKEND)(torch.ones(1, 2, requires_grad=True))


@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_gradients(mode: str) -> None:
    gemv = kernelhub.ops.fused_gemv
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, 16, generator=g).requires_grad_()
    weight = torch.randn(8, 16, generator=g).requires_grad_()
    bias = torch.randn(8, generator=g).requires_grad_()

    def f(x, weight, bias):  # type: ignore[no-untyped-def]
        return gemv(x, weight, bias=bias, activation="silu").sum()

    run = torch.compile(f, fullgraph=True, backend=BACKEND) if mode == "compiled" else f
    grads = torch.autograd.grad(run(x, weight, bias), (x, weight, bias))
    truth = torch.nn.functional.silu(x.double() @ weight.double().T + bias.double()).sum()
    for got, expected in zip(grads, torch.autograd.grad(truth, (x, weight, bias)), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_gradients_of_an_op_in_place(mode: str) -> None:
    op = kernelhub.ops.rotary_embedding
    cache = torch.tensor([[1.0, 0.0], [0.0, 1.0]])  # angles 0 and a quarter turn
    positions = torch.tensor([1])

    def f(q):  # type: ignore[no-untyped-def]
        rotated = q * 1.0
        op(positions, rotated, None, 2, cache)
        return rotated

    run = torch.compile(f, fullgraph=True, backend=BACKEND) if mode == "compiled" else f
    q = torch.tensor([[5.0, 7.0]], requires_grad=True)
    result = run(q)
    assert result.tolist() == [[-7.0, 5.0]]
    (grad,) = torch.autograd.grad((result * torch.tensor([[1.0, 10.0]])).sum(), q)
    assert grad.tolist() == [[10.0, -1.0]]


def test_bad_arguments_are_refused_while_tracing() -> None:
    op = kernelhub.op(OP)
    compiled = torch.compile(lambda x, b: op(x, b, 1.0), fullgraph=True, backend=BACKEND)
    with pytest.raises(Exception, match="argument 'bias': expected a shape that broadcasts"):
        compiled(torch.ones(4, 5), torch.ones(4, 6))


def test_a_generator_cannot_be_traced_and_says_what_to_do() -> None:
    op = kernelhub.ops.top_k_top_p_sampling_from_probs
    probs = torch.full((8, 40), 1 / 40)

    def f(p, generator):  # type: ignore[no-untyped-def]
        return op(p, 0, 1.0, generator=generator)

    with pytest.raises(Exception, match="pass seed="):
        torch.compile(f, backend="eager", fullgraph=True)(probs, torch.Generator())
    torch._dynamo.reset()
    broken = torch.compile(f, backend="eager")(probs, torch.Generator().manual_seed(5))
    assert torch.equal(broken, f(probs, torch.Generator().manual_seed(5)))


def test_seedless_sampling_draws_anew_in_a_graph() -> None:
    op = kernelhub.ops.top_k_top_p_sampling_from_probs
    probs = torch.full((64, 50), 0.02)
    compiled = torch.compile(
        lambda p: (op(p, 0, 1.0), op(p, 0, 1.0)), fullgraph=True, backend=BACKEND
    )
    torch.manual_seed(3)
    first, second = compiled(probs)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(op(probs, 0, 1.0), first)


def test_inductor_packed_qkv_in_place() -> None:
    """Query and key are slices of one tensor, written in place by one node."""
    op = kernelhub.ops.rotary_embedding

    def f(qkv, positions, cache):  # type: ignore[no-untyped-def]
        q, k, _ = qkv.split((64, 32, 32), dim=-1)
        op(positions, q, k, 32, cache)
        return qkv * 2

    g = torch.Generator().manual_seed(1)
    qkv, cache = torch.randn(5, 128, generator=g), torch.randn(9, 32, generator=g)
    positions = torch.tensor([0, 8, 3, 100, 2])
    expected = f(qkv.clone(), positions, cache)
    got = torch.compile(f, fullgraph=True)(qkv.clone(), positions, cache)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_fake_tensors_of_a_musa_device_on_this_torch() -> None:
    code = textwrap.dedent(
        """
        import torch
        torch.utils.rename_privateuse1_backend("musa")
        from torch._subclasses.fake_tensor import FakeTensorMode
        import kernelhub
        with FakeTensorMode(allow_non_fake_inputs=False):
            device = torch.device("musa", 0)
            def empty(*shape, dtype=torch.bfloat16):
                return torch.empty(*shape, dtype=dtype, device=device)
            x, w = empty(3, 64), empty(32, 64)
            y = kernelhub.ops.fused_gemv(x, w, activation="swiglu")
            print(y.device, tuple(y.shape), y.dtype)
            ids = empty(3, 2, dtype=torch.int64)
            y = kernelhub.ops.fused_moe_gemv(x, empty(4, 32, 64), ids, reduce=True)
            print(y.device, tuple(y.shape), y.dtype)
            y = kernelhub.ops.fused_mul_add(x, x, 2.0)
            print(y.device, tuple(y.shape), y.dtype)
            q = empty(3, 2, 32)
            r = kernelhub.ops.rotary_embedding(
                empty(3, dtype=torch.int32), q, None, 32, empty(9, 32, dtype=torch.float32))
            print(r)
            t, v = kernelhub.ops.top_k_top_p_sampling_from_probs(
                empty(3, 100, dtype=torch.float32), 5, 0.9, seed=1, return_valid=True)
            print(t.device, tuple(t.shape), t.dtype, v.dtype)
        """
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == [
        "musa:0 (3, 16) torch.bfloat16",
        "musa:0 (3, 32) torch.bfloat16",
        "musa:0 (3, 64) torch.bfloat16",
        "None",
        "musa:0 (3,) torch.int32 torch.bool",
    ]
