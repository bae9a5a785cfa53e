"""Who decides: op.on > use > configure > KERNELHUB_BACKEND > default ranking."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import threading

import pytest
import torch

import kernelhub
from kernelhub import BackendUnavailable, PolicyError, function
from kernelhub.backend import Backend, Implementation
from tests.toys import OP, backend, call, constant


@pytest.fixture(autouse=True)
def _toys(add_backend) -> None:  # type: ignore[no-untyped-def]
    add_backend(backend("one", 1.0, priority=10))
    add_backend(backend("two", 2.0, priority=20))
    add_backend(backend("three", 3.0, priority=30, automatic=False))


def value() -> float:
    """Which backend answers: 1, 2, 3, or 7 for the reference."""
    return float(kernelhub.op(OP)(*call())[0])


def test_default_is_the_highest_automatic_priority() -> None:
    assert value() == 2.0


def test_each_level_beats_the_next(fresh_environment) -> None:  # type: ignore[no-untyped-def]
    fresh_environment(KERNELHUB_BACKEND="one")
    assert value() == 1.0
    kernelhub.configure("three")
    assert value() == 3.0
    with kernelhub.use("two"):
        assert value() == 2.0
        assert float(kernelhub.op(OP).on("reference")(*call())[0]) == 7.0
        with kernelhub.use("one"):
            assert value() == 1.0
        assert value() == 2.0
    assert value() == 3.0
    kernelhub.configure()
    assert value() == 1.0


@pytest.mark.parametrize(
    ("rules", "answer"),
    [
        ("auto", 2.0),
        ("one,auto", 1.0),
        ("-two", 1.0),
        ("-two,-one", 7.0),
        ("cuda,one", 1.0),  # not installed here: a preference, so the next one serves
        ("three", 3.0),  # not automatic, but named
        ("auto,three", 2.0),
        ("*=one", 1.0),
        ("fused_mul_add=reference;one", 7.0),
        ("*mul*=reference;*=one", 7.0),
        ("fused_gemv=reference", 2.0),
    ],
)
def test_rules(rules: str, answer: float) -> None:
    with kernelhub.use(rules):
        assert value() == answer


def test_inner_use_leaves_other_ops_to_the_outer() -> None:
    with kernelhub.use("reference"), kernelhub.use("fused_gemv=reference"):
        assert value() == 7.0


def test_forced_backend_runs_or_raises() -> None:
    with kernelhub.use("cuda"), pytest.raises(BackendUnavailable) as caught:
        value()
    message = str(caught.value)
    assert message.startswith(
        "fused_mul_add: no backend can run this call\n    x     [3] float32 cpu"
    )
    assert 'one        excluded by use("cuda")' in message
    assert "cuda       runs on cuda; the tensors are on cpu" in message


@pytest.mark.parametrize("set_policy", [kernelhub.use, kernelhub.configure, kernelhub.op(OP).on])
def test_unknown_backend_points_at_the_column_and_the_nearest_name(set_policy) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(PolicyError) as caught:
        set_policy("auto,referense")
    assert caught.value.column == 5
    assert "did you mean 'reference'" in str(caught.value)
    assert value() == 2.0


def test_on_takes_a_choice_and_no_rules() -> None:
    with pytest.raises(PolicyError, match="one choice"):
        kernelhub.op(OP).on("fused_mul_add=one")


def test_configure_that_fails_changes_nothing() -> None:
    kernelhub.configure("one")
    with pytest.raises(PolicyError):
        kernelhub.configure("two", fallback="loud")  # type: ignore[arg-type]
    assert value() == 1.0


def test_the_environment_is_read_once(fresh_environment, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    fresh_environment(KERNELHUB_BACKEND="one")
    assert value() == 1.0
    monkeypatch.setenv("KERNELHUB_BACKEND", "reference")
    assert value() == 1.0


@pytest.mark.parametrize(
    ("name", "text"), [("KERNELHUB_BACKEND", "refrence"), ("KERNELHUB_FALLBACK", "wran")]
)
def test_malformed_environment_names_the_variable(fresh_environment, name: str, text: str) -> None:  # type: ignore[no-untyped-def]
    fresh_environment(**{name: text})
    with pytest.raises(PolicyError, match=name):
        value()


def test_use_as_a_decorator() -> None:
    @kernelhub.use("one")
    def decorated() -> float:
        return value()

    assert decorated() == 1.0
    assert value() == 2.0


def test_use_ends_when_the_block_raises() -> None:
    with pytest.raises(ZeroDivisionError), kernelhub.use("one"):
        1 / 0  # noqa: B018
    assert value() == 2.0


def test_use_is_per_thread() -> None:
    wrong: list[tuple[str, float]] = []
    start = threading.Barrier(5)

    def work(rules: str, expected: float) -> None:
        start.wait()
        for _ in range(200):
            with kernelhub.use(rules):
                if (got := value()) != expected:
                    wrong.append((rules, got))
            if (got := value()) != 2.0:
                wrong.append(("default", got))

    wishes = [("one", 1.0), ("three", 3.0), ("reference", 7.0), ("two", 2.0), ("-two", 1.0)]
    threads = [threading.Thread(target=work, args=wish) for wish in wishes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_task_that_outlives_the_block_is_back_on_the_default() -> None:
    async def main() -> tuple[float, float]:
        gate = asyncio.Event()

        async def task() -> tuple[float, float]:
            inside = value()
            await gate.wait()
            return inside, value()

        with kernelhub.use("one"):
            running = asyncio.create_task(task())
            await asyncio.sleep(0)
        gate.set()
        return await running

    assert asyncio.run(main()) == (1.0, 2.0)


def test_two_tasks_of_one_thread_keep_their_own() -> None:
    async def task(rules: str) -> list[float]:
        with kernelhub.use(rules):
            seen = []
            for _ in range(3):
                seen.append(value())
                await asyncio.sleep(0)
            return seen

    async def main() -> list[list[float]]:
        return await asyncio.gather(task("one"), task("reference"))

    assert asyncio.run(main()) == [[1.0] * 3, [7.0] * 3]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_fork_while_another_thread_dispatches() -> None:
    stop = threading.Event()

    def busy() -> None:
        while not stop.is_set():
            with kernelhub.use("one"):
                value()

    thread = threading.Thread(target=busy)
    thread.start()
    try:
        for _ in range(20):
            child = os.fork()
            if child == 0:
                with kernelhub.use("three"):
                    os._exit(0 if value() == 3.0 else 1)
            assert _wait(child, 20.0) == 0, "the child hung or answered wrongly"
    finally:
        stop.set()
        thread.join()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_child_forked_amid_anothers_block_keeps_what_it_chooses() -> None:
    inside, leave = threading.Event(), threading.Event()
    by_device = function._ops[OP].table.by_device

    def other() -> None:
        with kernelhub.use("one"):
            inside.set()
            leave.wait()

    def kept() -> bool:
        return value() == 2.0 and bool(by_device)

    def alone() -> bool:
        first = kept()
        with kernelhub.use("three"):
            return first and value() == 3.0 and not by_device

    thread = threading.Thread(target=other)
    thread.start()
    inside.wait()
    try:
        assert value() == 2.0
        assert not by_device
        for own in (False, True):
            with kernelhub.use("three") if own else contextlib.nullcontext():
                child = os.fork()
                right = value() == (3.0 if own else 2.0) and not (own and by_device)
            if child == 0:
                os._exit(0 if right and alone() and kept() else 1)
            assert _wait(child, 20.0) == 0
    finally:
        leave.set()
        thread.join()
    assert kept()


def _wait(child: int, seconds: float) -> int | None:
    import signal
    import time

    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def test_environment_of_a_fresh_process() -> None:
    code = (
        "import torch, kernelhub\n"
        "op = kernelhub.op('fused_mul_add')\n"
        "print(op.explain(torch.ones(2), torch.ones(2), 1.0).origin)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "KERNELHUB_BACKEND": " fused_mul_add = reference "},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == "KERNELHUB_BACKEND=fused_mul_add = reference"


def test_a_use_block_in_another_thread_does_not_lose_the_own_choice() -> None:
    """The tables are not kept while any block is open; a call outside still takes the default."""
    with kernelhub.use("one"):
        seen: list[float] = []
        thread = threading.Thread(target=lambda: seen.append(value()))
        thread.start()
        thread.join()
        assert seen == [2.0]
        assert value() == 1.0


def test_variants_rank_inside_their_backend(add_backend) -> None:  # type: ignore[no-untyped-def]
    from kernelhub.spec import Traits

    even = lambda call: [] if call.x.numel() % 2 == 0 else ["built for even sizes"]  # noqa: E731
    traits = Traits(differentiable=True)
    add_backend(
        Backend(
            "split",
            (
                Implementation(OP, constant(50), "even", rejects=even, traits=traits, priority=90),
                Implementation(OP, constant(51), "any", traits=traits, priority=89),
            ),
        )
    )
    op = kernelhub.op(OP)
    for size, expected in ((4, 50.0), (3, 51.0), (6, 50.0)):
        assert float(op(torch.ones(size), torch.ones(size), 1.0)[0]) == expected
    odd = op.explain(torch.ones(3), torch.ones(3), 1.0)
    assert odd.chosen is not None
    assert odd.chosen.name == "split.any"
    assert odd.candidates[0].reasons == ("built for even sizes",)


def test_blocks_that_end_out_of_order_leave_the_others_alone() -> None:
    def generator():  # type: ignore[no-untyped-def]
        with kernelhub.use("one"):
            yield

    moving = generator()
    next(moving)
    with kernelhub.use("reference"):
        next(moving, None)  # the outer block ends inside the inner one
        assert value() == 7.0
    assert value() == 2.0


def test_one_use_object_in_two_threads() -> None:
    shared = kernelhub.use("one")
    inside, leave = threading.Event(), threading.Event()
    seen: list[float] = []

    def other() -> None:
        with shared:
            inside.set()
            leave.wait()
            seen.append(value())
        seen.append(value())

    thread = threading.Thread(target=other)
    with shared:
        thread.start()
        inside.wait()
    here = value()
    leave.set()
    thread.join()
    assert (here, seen) == (2.0, [1.0, 2.0])
