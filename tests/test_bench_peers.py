"""`kernelhub bench --peers`: who is timed beside us, who is not, and that it does the same work."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import attrs
import pytest
import torch

import kernelhub
from kernelhub.bench import cases, clock, inputs, peers, runs
from kernelhub.bench.cases import Case
from kernelhub.bench.inputs import Calls
from kernelhub.bench.peers import Kernel, Offer, Peer, check
from tests import peer_stubs
from tests.commands import run

ADD, ROPE = "fused_mul_add", "rotary_embedding"
SAMPLE = "top_k_top_p_sampling_from_probs"
CPU = torch.device("cpu")
SHORT = ("bench", "--op", ADD, "--shape", "H=64", "--rows", "2", "--rounds", "3", "--backend",
         "reference")  # fmt: skip


@pytest.fixture(autouse=True)
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(inputs.ROTATED_BYTES, "cpu", 4096)
    monkeypatch.setattr(clock, "_HOST_SAMPLE_S", 0.002)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes `fake` the one peer, with a kernel of an op; every set is handed to `one`."""

    def make(one: Callable[..., Any], op: str = ADD, note: str = "", **facts: Any) -> None:
        def prepare(case: Case, sets: list[Calls]) -> Offer | str:
            return Offer([lambda c=c: one(**c[0]) for c in sets], note)  # type: ignore[misc]

        module = ModuleType("fake_peer")
        module.__spec__, module.__version__ = sys.__spec__, "1.5"  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "fake_peer", module)
        kernel = Kernel(op, facts.pop("prepare", prepare))
        peer = Peer("fake", "fake_peer", (kernel,), **{"devices": (), **facts})
        monkeypatch.setattr(peers, "_all", lambda: {"fake": peer})

    return make


def right(x: Any, bias: Any, scale: Any, out: Any) -> Any:
    return torch.add(bias, x, alpha=scale)


def bench(tmp_path: Path, *more: str, code: int = 0) -> tuple[str, dict[str, Any]]:
    path = tmp_path / "out.json"
    shown = run(*SHORT, "--peers", "all", "--json", str(path), *more, code=code).stdout
    return shown, json.loads(path.read_text())


# ---- a row of its own ------------------------------------------------------------------------


def test_a_peer_is_a_row_with_its_version_and_its_note(tmp_path: Path, fake: Any) -> None:
    fake(right, note="adds with a hammer")
    shown, report = bench(tmp_path)
    ours, row = report["results"]
    assert (row["backend"], row["version"], row["status"]) == ("peer:fake", "1.5", "timed")
    assert row["note"] == "adds with a hammer" and ours["note"] == ours["version"] == ""
    assert row["bytes"] == ours["bytes"] and row["input_sets"] == ours["input_sets"] > 1
    assert row["x_first"] == pytest.approx(row["us"] / ours["us"])
    assert report["peers"] == [{"name": "fake", "version": "1.5", "missing": ""}]
    assert " peer:fake ~ " in shown and "~ fused_mul_add on peer:fake 1.5: adds with" in shown


def test_a_peer_that_does_the_same_work_has_no_mark(tmp_path: Path, fake: Any) -> None:
    fake(right)
    assert "~" not in bench(tmp_path)[0]


def test_no_peer_is_timed_unless_asked_for(fake: Any) -> None:
    fake(right)
    report = json.loads(run(*SHORT, "--json", "-").stdout)
    assert [row["backend"] for row in report["results"]] == ["reference"]


def test_peers_take_turns_with_the_backends(fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    real = clock.interleaved
    monkeypatch.setattr(clock, "interleaved", lambda s, n: seen.append(list(s)) or real(s, n))
    fake(right)
    run(*SHORT, "--peers", "fake")
    assert seen[0][:2] == ["variant reference", "variant peer:fake"] and "floor copy" in seen[0]


def test_a_peer_rotates_over_the_same_inputs(fake: Any) -> None:
    seen: list[int] = []
    fake(lambda x, **rest: seen.append(x.data_ptr()) or right(x, **rest))
    (case,) = cases.collect([ADD], [], ["H=64"], [2], None)
    measured = runs.measure(case, [], CPU, peers=peers.entrants(peers.find("all"), ADD), rounds=1)
    assert len(set(seen)) == measured.num_sets > 1


# ---- who is not timed ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "said"),
    [
        (lambda **c: right(**c) + 0.5, "fault: its result differs from the reference's by 0"),
        (lambda **c: right(**c) * torch.nan, "fault: its result differs from the reference's by i"),
        (lambda **c: right(**c)[:1], "fault: its result is [1, 64], not [2, 64]"),
        (lambda **c: 1 / 0, "ZeroDivisionError: division by zero"),
    ],
)  # fmt: skip
def test_a_wrong_peer_is_a_fault_and_not_timed(
    one: Any, said: str, tmp_path: Path, fake: Any
) -> None:
    fake(one)
    shown, report = bench(tmp_path, code=1)
    ours, row = report["results"]
    assert row["status"] == "failed" and row["reason"].startswith(said) and "us" not in row
    assert ours["status"] == "timed" and report["problems"] == ["1 of 2 runs failed"]
    assert f"{ADD} on peer:fake failed (H=64 T=2 bf16): {row['reason']}" in shown


def test_one_wrong_element_is_seen(tmp_path: Path, fake: Any) -> None:
    def one(**call: Any) -> Any:
        result = right(**call)
        result[1, 63] += 0.25
        return result

    fake(one)
    assert "differs" in bench(tmp_path, code=1)[1]["results"][1]["reason"]


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"prepare": lambda case, sets: "odd sizes only"}, "odd sizes only"),
        ({"devices": ("cuda",)}, "runs on cuda"),
        ({"op": ROPE}, "has no kernel for this op"),
    ],
)
def test_a_peer_declines_with_its_reason(
    facts: dict[str, Any], said: str, tmp_path: Path, fake: Any
) -> None:
    fake(right, **facts)
    shown, report = bench(tmp_path)
    assert (report["results"][1]["status"], report["results"][1]["reason"]) == ("declined", said)
    assert f"{ADD} on peer:fake declined (H=64 T=2 bf16): {said}" in shown


def test_a_peer_without_memory_for_its_layout_declines(tmp_path: Path, fake: Any) -> None:
    def prepare(case: Case, sets: list[Calls]) -> Offer | str:
        raise torch.OutOfMemoryError("tried to allocate")

    fake(right, prepare=prepare)
    assert "do not fit" in bench(tmp_path)[1]["results"][1]["reason"]


def test_a_peer_that_is_not_installed(
    tmp_path: Path, fake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(right)
    absent = attrs.evolve(peers._all()["fake"], module="no_such_peer")
    monkeypatch.setattr(peers, "_all", lambda: {"fake": absent})
    shown, report = bench(tmp_path)
    assert [row["backend"] for row in report["results"]] == ["reference"] and report["ok"]
    assert report["peers"][0]["missing"] == "not installed"
    assert shown.count("peer fake: not installed") == 1
    assert "peer fake: not installed" in run(*SHORT, "--peers", "fake", code=1).stderr


def test_a_peer_that_cannot_be_imported(
    tmp_path: Path, fake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_peer.py").write_text("raise OSError('libcudart.so.12 not found')")
    monkeypatch.syspath_prepend(tmp_path)
    fake(right)
    broken = attrs.evolve(peers._all()["fake"], module="broken_peer")
    monkeypatch.setattr(peers, "_all", lambda: {"fake": broken})
    missing = bench(tmp_path)[1]["peers"][0]["missing"]
    assert missing == "cannot be imported: OSError: libcudart.so.12 not found"


def test_a_name_that_no_peer_has() -> None:
    said = run(*SHORT, "--peers", "torch,flashinfr", code=2).stderr
    assert "no peer named 'flashinfr'; did you mean 'flashinfer'?" in said
    said = run(*SHORT, "--peers", "torch", "--tune", "--output", "x.json", code=2).stderr
    assert "--tune has no --peers" in said


# ---- the comparison with the reference -------------------------------------------------------


def judged(op: str, shape: str, fake: Any, one: Any) -> runs.Run:
    fake(one, op=op)
    (case,) = cases.collect([op], [], [shape], [3], None)
    entrants = peers.entrants(peers.find("all"), op)
    return runs.measure(case, [], CPU, peers=entrants, rounds=1).runs[0]


def test_what_is_changed_in_place_is_compared(fake: Any) -> None:
    reference = kernelhub.op(ROPE).on("reference")

    def rotate(**call: Any) -> Any:
        reference(**call)
        return call["query"], call["key"]

    assert judged(ROPE, "Hq=4,Hk=1,D=64", fake, rotate).status == "timed"
    lazy = judged(ROPE, "Hq=4,Hk=1,D=64", fake, lambda **c: (c["query"], c["key"]))
    assert lazy.reason.startswith("fault: its result differs")


@pytest.mark.parametrize("order", ["top_k_first", "joint"])
def test_tokens_must_be_among_those_kept(order: str, fake: Any) -> None:
    shape = f"V=1000,k=5,p=0.9,order={order}"
    kinds: dict[str, Callable[..., Any]] = {
        "timed": lambda probs, **_: probs.argmax(-1),
        "fault: 3 of 3 tokens": lambda probs, **_: probs.argsort(-1, descending=True)[:, 5],
        "fault: 3 of 3": lambda probs, **_: torch.full((3,), 1000),
        "fault: it drew 2 tokens for 3 rows": lambda probs, **_: probs.argmax(-1)[:2],
    }
    for said, one in kinds.items():
        found = judged(SAMPLE, shape, fake, one)
        assert (found.reason or found.status).startswith(said)


@pytest.mark.parametrize(("token", "right"), [(0, True), (3, True), (4, False), (-1, False)])
def test_a_token_must_be_in_the_vocabulary(token: int, right: bool) -> None:
    kept = torch.ones(1, 4, dtype=torch.bool)
    assert (check.fault(SAMPLE, (kept,), torch.tensor([token])) == "") is right


def test_top_p_has_its_part_in_what_is_kept() -> None:
    probs = torch.tensor([[0.5, 0.3, 0.1, 0.06, 0.04]])
    call = {"probs": probs, "top_k": 4, "filter_apply_order": "top_k_first"}
    (kept,) = check.expected(SAMPLE, [{**call, "top_p": 0.6}])
    assert kept.tolist() == [[True, True, False, False, False]]
    (kept,) = check.expected(SAMPLE, [{**call, "top_p": 1.0}])
    assert kept.tolist() == [[True, True, True, True, False]]


def test_a_layer_is_compared_as_one_and_stays_as_it_is() -> None:
    shape = "E=8,k=2,H=64,I=32,stage=layer,reduce=true"
    (case,) = cases.collect(["fused_moe_gemv"], [], [shape], [3], None)
    up, down = case.sets(CPU, 0)[0]
    up["out"].fill_(7), down["out"].fill_(7)
    (wanted,) = check.expected(case.op, [up, down])
    assert wanted.shape == (3, 64) and wanted.std() > 0.1
    assert (up["out"] == 7).all() and (down["out"] == 7).all()


# ---- the peers themselves --------------------------------------------------------------------

CASES: dict[str, tuple[list[str], dict[str, str]]] = {
    # op: shapes; which rows are timed, by scheme
    "fused_gemv": (
        [f"N=64,K=512,act={a}" for a in ("none", "swiglu", "gelu")]
        + ["N=256,K=128", "N=40,K=96"]
        + ["N=256,K=128,act=swiglu"],
        {
            "bf16": "torch, flashinfer tinygemm, sglang hopper_bf16_gemv",
            "fp16": "torch", "fp32": "torch", "fp8": "", "w8a8": "", "int4": "vllm marlin",
        },
    ),
    "fused_moe_gemv": (
        [f"E=8,k=2,H=256,I=128,stage={s}" for s in ("gate-up", "down", "layer,reduce=true")],
        {
            "bf16": "torch grouped_mm, sglang triton, vllm triton",
            "fp16": "sglang triton, vllm triton", "fp8": "sglang triton, vllm triton",
            "int4": "sglang triton, vllm triton, vllm marlin", "w8a8": "", "fp32": "",
        },
    ),
    SAMPLE: (
        ["V=1000", "V=1000,dist=gauss,k=0,p=0.95", "V=1000,order=joint"],
        {"fp32": "torch sort, flashinfer, flashinfer cake, sgl_kernel"},
    ),
    ROPE: (
        [f"Hq=4,Hk=1,D=64,rot={r},style={s},cache={c}"
         for r in (64, 32) for s in ("neox", "gptj") for c in ("fp32", "same")],
        {
            "bf16": "flashinfer, sgl_kernel, sglang, vllm",
            "fp16": "flashinfer, sgl_kernel, sglang, vllm",
            "fp32": "vllm",
        },
    ),
    ADD: (["H=7"], {"bf16": "torch", "fp16": "torch", "fp32": "torch"}),
}  # fmt: skip


@pytest.mark.parametrize("op", CASES)
def test_every_peer_does_the_work_or_says_why_not(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch is itself, the others are stand-ins with their signatures."""
    peer_stubs.install(monkeypatch)
    everywhere = {name: attrs.evolve(peer, devices=()) for name, peer in peers._all().items()}
    monkeypatch.setattr(peers, "_all", lambda: everywhere)
    entrants = peers.entrants(peers.find("all"), op)
    shapes, wanted = CASES[op]
    assert set(wanted) == set(cases.KINDS[op].schemes)
    for scheme, names in wanted.items():
        timed: set[str] = set()
        for case in cases.collect([op], [], shapes, [1, 3], [scheme]):
            for found in runs.measure(case, [], CPU, peers=entrants, rounds=1, floor=False).runs:
                assert found.status != "failed", (case.name, found)
                assert found.status == "timed" or found.reason
                timed |= {found.variant} if found.status == "timed" else set()
        assert timed == {f"peer:{name}" for name in names.split(", ") if name}, scheme


@pytest.mark.parametrize("name", ["flashinfer", "sgl_kernel"])
def test_samplers_are_told_the_order_of_the_filters(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer_stubs.install(monkeypatch)
    kernel = next(k for k in peers._all()[name].kernels if k.op == SAMPLE)
    for order, least in (("top_k_first", 1), ("joint", 2)):
        (case,) = cases.collect([SAMPLE], [], [f"V=4,k=3,p=0.75,order={order}"], [1], None)
        call = {"probs": torch.tensor([[0.4, 0.3, 0.2, 0.1]]), "filter_apply_order": order}
        offer = kernel.prepare(case, [[call]])
        assert isinstance(offer, Offer) and offer.calls[0]().tolist() == [least]


@pytest.mark.parametrize(("order", "parts"), [("top_k_first", (4, 3, 0)), ("joint", (4, 3, 2))])
def test_what_torch_samples_follows_the_probabilities(order: str, parts: tuple[int, ...]) -> None:
    probs = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).repeat(20_000, 1)
    (sort,) = (k for k in peers._all()["torch"].kernels if k.op == SAMPLE)
    (case,) = cases.collect([SAMPLE], [], [f"V=4,k=3,p=0.75,order={order}"], [1], None)
    torch.manual_seed(0)
    offer = sort.prepare(case, [[{"probs": probs}]])
    assert isinstance(offer, Offer)
    shares = offer.calls[0]().bincount(minlength=4) / 20_000
    assert shares.tolist() == pytest.approx([p / sum(parts) for p in (*parts, 0)], abs=0.02)
