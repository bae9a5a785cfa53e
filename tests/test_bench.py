"""`kernelhub bench`: figures that agree with each other, and nothing left out in silence."""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kernelhub import registry
from kernelhub.backend import Backend, Implementation
from kernelhub.backends.native import tiles
from kernelhub.bench import cases, clock, inputs, runs, stream, tune
from kernelhub.bench.clock import Timing
from kernelhub.bench.stream import Roof
from kernelhub.errors import KernelhubError
from kernelhub.spec import DeviceDesc, Traits
from tests.commands import run, run_json

OP = "fused_mul_add"
CPU = torch.device("cpu")
SHORT = ("bench", "--op", OP, "--shape", "H=64", "--rows", "2", "--rounds", "3")


@pytest.fixture(autouse=True)
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few and short samples: the tests look at how figures hang together."""
    monkeypatch.setitem(inputs.ROTATED_BYTES, "cpu", 4096)
    monkeypatch.setattr(clock, "_HOST_SAMPLE_S", 0.002)


def backend(name: str, function: Callable[..., Any] | None = None, **facts: Any) -> Backend:
    def right(x: Any, bias: Any, scale: Any, *, out: Any = None) -> Any:
        return torch.add(bias, x, alpha=scale, out=out)

    one = Implementation(OP, function or right, traits=Traits(), **facts)
    return Backend(name, (one,))


def bench(tmp_path: Path, *more: str, code: int = 0) -> tuple[str, dict[str, Any]]:
    path = tmp_path / "out.json"
    shown = run(*SHORT, *more, "--json", str(path), code=code).stdout
    return shown, json.loads(path.read_text())


# ---- figures ---------------------------------------------------------------------------------


def test_the_figures_of_table_and_json_agree(tmp_path: Path, add_backend: Any) -> None:
    add_backend(backend("acme"))
    shown, report = bench(tmp_path, "--backend", "acme", "--backend", "reference")
    assert report["ok"] and report["schema"] == 1 and report["roof"] is None
    first, second = report["results"]
    assert (first["backend"], second["backend"]) == ("acme", "reference")
    for row in (first, second):
        assert row["bytes"] == 3 * 2 * 64 * 2  # reads x and bias, writes the result, bf16
        assert row["gbs"] == pytest.approx(row["bytes"] / row["us"] / 1e3)
        assert row["x_floor"] == pytest.approx(row["us"] / row["floor_us"])
        assert row["x_first"] == pytest.approx(row["us"] / first["us"])
        (line,) = [line for line in shown.splitlines() if f" {row['backend']} " in line]
        figures = [float(word) for word in line.split()[-5:]]
        wanted = [row[key] for key in ("us", "spread_us", "gbs", "x_floor", "x_first")]
        assert figures == pytest.approx(wanted, rel=1e-2, abs=6e-3)


def test_a_slower_backend_is_slower_by_as_much(tmp_path: Path, add_backend: Any) -> None:
    def sleeps(x: Any, bias: Any, scale: Any, *, out: Any = None) -> Any:
        time.sleep(0.004)
        return torch.add(bias, x, alpha=scale, out=out)

    add_backend(backend("sleepy", sleeps))
    _, report = bench(tmp_path, "--backend", "reference", "--backend", "sleepy")
    fast, slow = report["results"]
    assert fast["us"] < 2000 < 4000 < slow["us"] < 40000
    assert slow["x_first"] > 2


def test_spread_is_half_of_the_middle_half() -> None:
    timing = Timing((1e-6, 2e-6, 3e-6, 4e-6, 5e-6))
    assert timing.us == pytest.approx(3)
    assert timing.spread_us == pytest.approx(1)
    assert Timing((1e-6,)).spread_us == 0


def test_variants_take_turns() -> None:
    turns: list[str] = []

    def sampler(name: str) -> Callable[[], float]:
        return lambda: float(len(turns.append(name) or turns))  # type: ignore[func-returns-value]

    timings, failures = clock.interleaved({"a": sampler("a"), "b": sampler("b")}, 3)
    assert turns == ["a", "b"] * 3
    assert not failures
    assert timings["b"].samples == (2, 4, 6)


def test_the_floor_moves_as_many_bytes() -> None:
    for num_bytes in (1, 4096, 100_000):
        for way, calls in stream.reads(num_bytes, CPU, 10 * num_bytes).items():
            assert len(calls) == 10, way
            calls[-1]()


def test_an_impossible_figure_is_flagged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "measure_roof", lambda *_, **__: Roof(read=1.0, copy=2.0))
    shown, report = bench(tmp_path, "--backend", "reference", code=1)
    assert "is above the roof of 0 GB/s" in report["results"][0]["fault"]
    assert report["problems"] == ["1 of 1 figures are impossible"] and not report["ok"]
    assert f"! {OP} H=64 T=2 bf16 on reference:" in shown


@pytest.mark.parametrize(("share", "faulty"), [(1.05, False), (1.07, True)])
def test_the_roof_has_six_percent(share: float, faulty: bool) -> None:
    timing = Timing((1e-6,) * 3)
    judged = runs._judged("x", "graph", timing, int(share * 1e6), Roof(read=0.9e12, copy=1e12))
    assert bool(judged.fault) is faulty


# ---- what cannot be timed --------------------------------------------------------------------


def test_a_backend_that_declines_is_listed_with_its_reason(
    tmp_path: Path, add_backend: Any
) -> None:
    add_backend(backend("picky", rejects=lambda call: ["odd sizes only", "no bf16"]))
    shown, report = bench(tmp_path, "--backend", "reference", "--backend", "picky")
    row = report["results"][1]
    assert (row["status"], row["reason"]) == ("declined", "odd sizes only; no bf16")
    assert "us" not in row
    wanted = f"{OP} on picky declined (H=64 T=2 bf16): odd sizes only; no bf16"
    assert wanted in shown


def test_no_inputs_are_made_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    monkeypatch.setattr(runs, "_measure", lambda *_: made.append("inputs"))
    (case,) = cases.collect([OP], [], ["H=64"], [1], None)
    measured = runs.measure(case, [runs.Variant("c", "cuda"), runs.Variant("m", "musa")], CPU)
    assert [r.status for r in measured.runs] == ["declined"] * 2
    assert made == []


def test_nothing_to_time_is_a_no(tmp_path: Path) -> None:
    _, report = bench(tmp_path, "--backend", "cuda", code=1)
    assert "on cpu" in report["results"][0]["reason"]
    assert report["problems"] == ["nothing was timed"]


@pytest.mark.parametrize(
    ("result", "said"),
    [(float("inf"), "its result is not finite"), (None, "OSError: broken")],
)
def test_a_broken_backend_stops_nobody(
    result: float | None, said: str, tmp_path: Path, add_backend: Any
) -> None:
    def broken(x: Any, bias: Any, scale: Any, *, out: Any = None) -> Any:
        if result is None:
            raise OSError("broken")
        return out.fill_(result)

    add_backend(backend("broken", broken))
    _, report = bench(tmp_path, "--backend", "broken", "--backend", "reference", code=1)
    broke, right = report["results"]
    assert (broke["status"], broke["reason"]) == ("failed", said)
    assert right["status"] == "timed" and right["x_first"] is None


def test_a_backend_that_breaks_while_it_is_timed(tmp_path: Path, add_backend: Any) -> None:
    calls = itertools.count()

    def weary(x: Any, bias: Any, scale: Any, *, out: Any = None) -> Any:
        if next(calls) > 4:
            raise OSError("weary")
        time.sleep(0.003)
        return torch.add(bias, x, alpha=scale, out=out)

    add_backend(backend("weary", weary))
    _, report = bench(tmp_path, "--backend", "weary", "--backend", "reference", code=1)
    broke, right = report["results"]
    assert (broke["status"], broke["reason"]) == ("failed", "OSError: weary")
    assert right["status"] == "timed"


def test_inputs_beyond_memory_are_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "memory_limit", lambda device: 1000)
    report = run_json_bench("--backend", "reference", code=1)
    (row,) = report["results"]
    assert row["status"] == "declined"
    assert row["reason"].endswith("GB of cpu, which has 0.00 GB left")
    assert report["problems"] == ["nothing was timed"]


def test_a_broken_device_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("illegal memory access")

    monkeypatch.setattr(cases.Case, "sets", fail)
    report = run_json_bench("--backend", "reference", code=1)
    assert report["results"][0]["reason"] == "RuntimeError: illegal memory access"
    assert report["problems"] == ["1 of 1 runs failed", "nothing was timed"]


def test_a_way_to_read_that_torch_lacks_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise NotImplementedError("sum")

    monkeypatch.setattr(
        stream, "reads", lambda *_: {"sum": [fail], "nap": [lambda: time.sleep(0.004)]}
    )
    _, report = bench(tmp_path, "--backend", "reference")
    (row,) = report["results"]
    assert row["floor_way"] == "nap" and row["floor_us"] > 4000 and row["x_floor"] < 1


def run_json_bench(*more: str, code: int = 0) -> Any:
    return json.loads(run(*SHORT, *more, "--json", "-", code=code).stdout)


def test_json_on_stdout_is_alone() -> None:
    report = run_json_bench("--backend", "reference")
    assert report["results"][0]["status"] == "timed"
    assert run_json("doctor")["versions"]["kernelhub"] == report["kernelhub"]


def test_a_plugin_of_this_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "roadrunner_plugin.py").write_text(
        "import torch\nfrom kernelhub import registry\n"
        "from kernelhub.backend import Backend, Implementation\n"
        "def f(x, bias, scale, *, out=None): return torch.add(bias, x, alpha=scale, out=out)\n"
        f"registry.add_backend(Backend('roadrunner', (Implementation('{OP}', f),)))\n"
    )
    monkeypatch.chdir(tmp_path)
    try:
        report = run_json_bench("--backend", "roadrunner", "--plugin", "roadrunner_plugin")
        assert report["results"][0]["us"] > 0
    finally:
        registry.remove_backend("roadrunner")
    assert "ModuleNotFoundError" in run(*SHORT, "--plugin", "no_such_module", code=2).stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--op", "fused_gem", "--shape", "N=1,K=1"], "did you mean 'fused_gemv'?"),
        (["--op", "fused_gemv", "--shape", "N=1"], "also needs K"),
        (["--op", "fused_gemv", "--shape", "N=1,M=1"], "known: K, N, act"),
        (["--op", "fused_gemv", "--shape", "N=1,K=0"], "a whole number from 1 to"),
        (["--op", "fused_gemv", "--shape", "N=8,K=5", "--scheme", "int4"], "K a multiple of 2"),
        (["--op", "fused_gemv", "--shape", "N=8,K=8,act=relu"], "known: gelu, gelu_tanh"),
        (["--op", "fused_mul_add", "--shape", "H=8", "--scheme", "int4"], "no scheme 'int4'"),
        (["--op", "fused_mul_add", "--shape", "H=8", "--rows", "0"], "--rows is a whole number"),
        (["--op", "fused_moe_gemv", "--shape", "E=2,k=3,H=8,I=8"], "k <= E"),
        (["--op", "fused_moe_gemv", "--model", "llama-3-8b"], "has no layer for fused_moe_gemv"),
        (["--model", "llama-3-9b"], "did you mean 'llama-3-8b'?"),
        (["--shape", "N=8,K=8"], "name it with --op"),
        ([], "nothing to time"),
        (["--op", "fused_mul_add", "--shape", "H=8", "--tune"], "needs one --backend"),
        (["--op", "fused_mul_add", "--shape", "H=8", "--output", "f"], "where --tune puts"),
        (["--suite", "decode", "--scheme", "fp8"], "a suite has its own"),
    ],
)
def test_what_cannot_be_understood(arguments: list[str], said: str) -> None:
    result = run("bench", *arguments, code=2)
    assert said in result.stderr
    assert result.stdout == ""


def test_a_device_that_is_not_here() -> None:
    assert "torch has no 'musa' devices" in run(*SHORT, "--device", "musa", code=1).stderr


# ---- cases and their inputs ------------------------------------------------------------------

TINY = {
    "fused_gemv": ["N=96,K=64", "N=96,K=64,act=swiglu"],
    "fused_moe_gemv": [
        f"E=8,k=2,H=64,I=32,stage={s}" for s in ("gate-up", "down", "layer,reduce=true")
    ],
    "top_k_top_p_sampling_from_probs": ["V=1000", "V=1000,dist=gauss,k=0,p=0.95,order=joint"],
    "rotary_embedding": ["Hq=4,Hk=1,D=64", "Hq=4,Hk=1,D=64,rot=32,style=gptj,cache=same"],
    OP: ["H=7"],
}


@pytest.mark.parametrize("op", TINY)
def test_inputs_of_every_scheme_give_finite_results(op: str) -> None:
    assert list(TINY) == sorted(TINY, key=list(cases.KINDS).index)
    schemes = cases.KINDS[op].schemes
    for case in cases.collect([op], [], TINY[op], [1, 3], schemes):
        case.check()
        (run_,) = runs.measure(case, [runs.Variant("r", "reference")], CPU, rounds=1).runs
        assert run_.status == "timed", (case.name, run_.reason)
        assert case.memory_bytes(4096) > case.cost(case.sets(CPU, 4096)[0])


def test_every_case_of_the_suites_keeps_its_contract() -> None:
    found = cases.suite("decode")
    assert len({(case.op, case.name) for case in found}) == len(found) > 100
    assert {case.op for case in found} == set(cases.KINDS)
    for case in found:
        case.check()


def test_every_model_has_cases_for_its_ops() -> None:
    for model in cases.MODELS:
        ops = [op for op in cases.KINDS if cases.KINDS[op].of_model(cases.MODELS[model])]
        assert ("fused_moe_gemv" in ops) == bool(cases.MODELS[model].experts)
        for case in cases.collect(ops, [model], [], [1], None):
            case.check()
    (up,) = [c for c in cases.collect(["fused_gemv"], ["llama-2-7b"], [], [1], None)
             if "gate-up" in c.model]  # fmt: skip
    assert (up.facts["N"], up.facts["K"], up.facts["act"]) == (22016, 4096, "swiglu")


def test_bytes_of_a_known_case() -> None:
    (case,) = cases.collect(["fused_gemv"], [], ["N=4096,K=4096"], [4], ["int4"])
    meta = case.sets(torch.device("meta"), 0)[0]
    weight, scales = 4096 * 2048, 4096 * 32 * 2
    assert case.cost(meta) == weight + scales + 2 * 4 * (4096 + 4096)
    assert case.num_sets(400_000_000) == 46
    assert case.num_sets(10**12) == cases.MOST_SETS


def test_chosen_experts_differ_within_a_token_and_between_sets() -> None:
    drawn = inputs._expert_ids(rows=2, k=4, experts=64)
    seen: list[set[int]] = []
    for _ in range(30):
        ids = next(drawn)
        assert all(len(set(row)) == 4 for row in ids.tolist())
        assert int(ids.min()) >= 0
        assert int(ids.max()) < 64
        seen.append(set(ids.flatten().tolist()))
    assert all(not a & b for a, b in itertools.pairwise(seen))
    again = inputs._expert_ids(rows=2, k=4, experts=64)
    assert set(next(again).flatten().tolist()) == seen[0]


# ---- the clock of a device -------------------------------------------------------------------


class FakeDevice:
    """`torch.musa` as far as the clock uses it: a call takes a microsecond of its own time."""

    def __init__(self, graphs: bool = True) -> None:
        self.now_us, self.capturing, self.replays = 0.0, None, 0
        fake = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = fake.now_us

            def synchronize(self) -> None: ...

            def elapsed_time(self, end: Any) -> float:
                return (end.at - self.at) / 1e3

        class Graph:
            calls = 0

            def replay(self) -> None:
                fake.replays += 1
                fake.now_us += self.calls * 1.0

        class Stream:
            def wait_stream(self, other: Any) -> None: ...

        self.Event, self.Stream, self.current_stream = Event, Stream, Stream
        if graphs:
            self.MUSAGraph = Graph

    def call(self) -> None:
        if self.capturing is not None:
            self.capturing.calls += 1
        else:
            self.now_us += 3.0  # the host's share

    @contextlib.contextmanager
    def graph(self, graph: Any) -> Iterator[None]:
        self.capturing = graph
        yield
        self.capturing = None

    @contextlib.contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        yield

    def set_device(self, index: int) -> None: ...
    def synchronize(self) -> None: ...
    def empty_cache(self) -> None: ...


@pytest.mark.parametrize(
    ("has_graphs", "wanted", "safe", "method", "us"),
    [
        (True, True, True, "graph", 1.0),
        (True, True, False, "eager", 3.0),
        (True, False, True, "eager", 3.0),
        (False, True, True, "eager", 3.0),
    ],
)
def test_a_device_is_timed_by_replay_where_it_can(
    has_graphs: bool,
    wanted: bool,
    safe: bool,
    method: str,
    us: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = FakeDevice(has_graphs)
    monkeypatch.setattr(torch, "musa", fake, raising=False)
    timer = clock.clock_of(DeviceDesc("musa", 0), wanted)  # type: ignore[arg-type]
    assert timer.method(safe) == method
    sample = timer.sampler([fake.call] * 5, contextlib.nullcontext, safe)
    assert sample() == pytest.approx(us * 1e-6)
    assert (fake.replays > 0) == (method == "graph")


# ---- tuning ----------------------------------------------------------------------------------


@pytest.fixture
def tiled(monkeypatch: pytest.MonkeyPatch, add_backend: Any) -> Callable[[dict[str, float]], None]:
    """A backend that sleeps for as many milliseconds as its tile says; "" is the one in use.

    Less than nothing: for so long, but not with two rows.
    """

    def install(milliseconds: dict[str, float]) -> None:
        chosen = [""]

        @contextlib.contextmanager
        def override(tables: Any) -> Iterator[None]:
            chosen.append(tables[OP]["h64"])
            try:
                yield
            finally:
                chosen.pop()

        def target(x: Any, bias: Any, scale: Any, *, out: Any = None) -> Any:
            if milliseconds[chosen[-1]] < 0 and x.shape[0] == 2:
                raise RuntimeError("too much shared memory")
            time.sleep(abs(milliseconds[chosen[-1]]) / 1e3)
            return torch.add(bias, x, alpha=scale, out=out)

        monkeypatch.setattr(tiles, "OPS", {OP: tuple(name for name in milliseconds if name)})
        monkeypatch.setattr(tiles, "classes_of", lambda op, args: f"h{args.x.shape[-1]}")
        monkeypatch.setattr(tiles, "override", override)
        add_backend(backend("tiled", target))

    return install


def tuned(tmp_path: Path, code: int = 0) -> tuple[str, dict[str, Any]]:
    path = tmp_path / "tiles.json"
    arguments = ("--rows", "1,2", "--tune", "--backend", "tiled", "--output", str(path))
    shown = run(*SHORT, *arguments, code=code).stdout
    return shown, json.loads(path.read_text())


def test_tune_picks_the_fast_tile(tmp_path: Path, tiled: Any) -> None:
    tiled({"": 4.0, "lazy": 8.0, "fast": 1.0, "equal": 4.0})
    shown, table = tuned(tmp_path)
    assert {op: best for op, best in table.items() if op != "measured"} == {OP: {"h64": "fast"}}
    found = table["measured"][OP]["h64"]
    assert set(found["us"]) == {"H=64 T=1 bf16", "H=64 T=2 bf16"}
    for us in found["us"].values():
        assert us["fast"] < us[tune.IN_USE] < us["lazy"]
    assert 0.5 < found["gain"] < 0.9
    assert table["measured"]["backend"] == "tiled"
    assert f"{OP} h64: fast, " in shown


def test_tune_leaves_what_is_best_already(tmp_path: Path, tiled: Any) -> None:
    tiled({"": 1.0, "lazy": 4.0, "lazier": 8.0})
    shown, table = tuned(tmp_path)
    assert set(table) == {"measured"}
    assert table["measured"][OP]["h64"]["best"] == "lazy"
    assert "the one in use stays" in shown


def test_a_tile_that_fails_is_not_picked(tmp_path: Path, tiled: Any) -> None:
    tiled({"": 4.0, "broken": -0.1, "fast": 1.0})
    _, table = tuned(tmp_path, code=1)
    assert table[OP] == {"h64": "fast"}
    reasons = table["measured"][OP]["h64"]["not_timed"]
    assert reasons == {"H=64 T=2 bf16": {"broken": "RuntimeError: too much shared memory"}}


@pytest.mark.parametrize(("noise", "chosen"), [(0.01, "new"), (0.2, "")])
def test_a_gain_within_the_spread_is_none(
    noise: float, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "OPS", {OP: ("new",)})
    (case,) = cases.collect([OP], [], ["H=64"], [1], None)
    times = [1 - noise, 1 - noise, 1.0, 1 + noise, 1 + noise]
    found = tuple(
        runs.Run(name, "timed", timing=Timing(tuple(t * by for t in times)))
        for name, by in ((tune.IN_USE, 1.0), ("new", 0.9))
    )
    choice = tune.choose(OP, "h64", (runs.Measured(case, 1, 1, found, None),))
    assert choice.best == "new" and choice.gain == pytest.approx(0.1)
    assert choice.chosen == chosen


def test_an_op_without_tiles_cannot_be_tuned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "OPS", {})
    (case,) = cases.collect([OP], [], ["H=64"], [1], None)
    with pytest.raises(KernelhubError, match="no single call has tiles"):
        tune.by_class([case])
