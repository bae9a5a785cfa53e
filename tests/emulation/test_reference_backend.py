"""Every op's definition, in plain PyTorch, on a device that is not the host's."""

from __future__ import annotations

import pytest
import torch

from kernelhub import registry
from kernelhub.testing import run_case


@pytest.mark.parametrize("op", registry.specs())
def test_every_case(op: str) -> None:
    cases = list(registry.spec(op).cases())
    outcomes = [run_case(op, case, "reference", "musa:1") for case in cases]
    assert [outcome for outcome in outcomes if outcome.status != "passed"] == []
    assert len(outcomes) > 50
    assert torch.musa.current_device() == 0  # each ran on the device of its tensors
