"""Inside torch.distributed: two ranks, spawned and forked, compute together what one process does.

The ranks are processes of a process of their own (`ranks.py`), so that none that hangs or dies
takes the tests with it: the whole group is killed after `TIMEOUT_S`.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import kernelhub

ROOT = Path(__file__).parent.parent
TIMEOUT_S = 150
GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="torch has no gloo"
)


def run(*command: str) -> str:
    """What a Python program and its ranks print; ends all of them where they take too long."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("KERNELHUB_BACKEND")}
    found_in = os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH"))))
    with subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env={**environment, "PYTHONPATH": found_in},
        start_new_session=True,
    ) as process:
        try:
            printed, _ = process.communicate(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            printed, _ = process.communicate()
            pytest.fail(f"no end after {TIMEOUT_S} s:\n{printed}")
    assert process.returncode == 0, printed
    return printed


@pytest.fixture(scope="module")
def built() -> None:
    """The emulator's library is compiled before a timeout counts."""
    x = torch.ones(1, 8)
    kernelhub.ops.fused_gemv.on("simt")(x, x)


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_cut_ops_agree_with_whole_ones(method: str) -> None:
    printed = run("-m", "tests.ranks", method, "reference", "simt")
    for rank in range(2):
        for backend in ("reference", "simt"):
            assert f"rank {rank}: {backend} on cpu agrees" in printed


@pytest.mark.skipif(GPUS < 2, reason=f"{GPUS} CUDA devices, of two")
def test_a_device_for_each_rank() -> None:
    printed = run("-m", "tests.ranks", "spawn", "cuda")
    for rank in range(2):
        assert f"rank {rank}: cuda on cuda:{rank} agrees" in printed


def rows_of(printed: str) -> list[tuple[str, ...]]:
    """dtype, experts, share of weights, tokens, difference: as the example tells them."""
    return re.findall(r"^(\w+) +(whole|sliced) +(\d+)% +(\w+) +([-.e\d]+)$", printed, re.MULTILINE)


def test_the_example_starts_ranks_that_say_the_same() -> None:
    pytest.importorskip("transformers", reason="the extra e2e is not installed")
    printed = run("examples/distributed.py", "--tokens", "8")
    rows = rows_of(printed)
    assert [row[:2] for row in rows] == [
        (dtype, experts) for dtype in ("bfloat16", "float32") for experts in ("whole", "sliced")
    ]
    for dtype, _, share, tokens, difference in rows:
        assert 50 <= int(share) < 55
        assert tokens == "equal"
        assert 0 < float(difference) < (2e-2 if dtype == "bfloat16" else 2e-6)
    assert "\nThe keeper of the " in printed


def test_under_torchrun_and_models_of_other_kinds(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="the extra e2e is not installed")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    printed = run(*torchrun, "-m", "tests.integrations.ranks", str(tmp_path))
    assert len(rows_of(printed)) == 4
    for rank in range(2):
        for model in ("llama", "qwen3_moe"):
            assert len(re.findall(f"rank {rank}: {model}, (?:whole|sliced), ", printed)) == 2
        assert f"rank {rank}: sharded, " in printed
