"""`kernelhub bench` and `check --report` on musa devices: no graphs here, all else as on a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kernelhub.bench import inputs, stream
from tests.commands import run


def test_backends_on_a_musa_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "ROOF_BYTES", 2**16)
    monkeypatch.setattr(inputs, "ROTATED_BYTES_ELSEWHERE", 4096)
    path = tmp_path / "out.json"
    what = ("--op", "fused_mul_add", "--shape", "H=256", "--rows", "2", "--rounds", "2")
    where = ("--device", "musa:1", "--backend", "musa", "--backend", "reference")
    with torch.musa.device(0):  # the clock leaves its own device the current one
        run("bench", *what, *where, "--json", str(path))
    report = json.loads(path.read_text())
    assert report["device"] == {"type": "musa", "name": "Emulated MTT S4000"}
    assert report["roof"]["read_gbs"] > 0
    ours, reference = report["results"]
    for row in (ours, reference):
        assert (row["status"], row["method"], row["fault"]) == ("timed", "eager", "")
        assert row["gbs"] == pytest.approx(3 * 2 * 256 * 2 / row["us"] / 1e3)
    assert reference["x_first"] == pytest.approx(reference["us"] / ours["us"])


@pytest.mark.parametrize(("device", "arch"), [("musa:0", "mp_31"), ("musa:1", "mp_22")])
def test_the_report_names_the_library(device: str, arch: str, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    what = ("--op", "fused_mul_add", "--case", "tail-9-*")
    run("check", *what, "--backend", "musa", "--device", device, "--report", str(path))
    report = json.loads(path.read_text())
    (backend,) = report["backends"]
    assert (backend["arch"], backend["library"]) == (arch, "")
    assert backend["warp_size"] == {"mp_31": 32, "mp_22": 128}[arch]
    (result,) = report["results"]
    assert (result["passed"], result["failed"], result["same_bits"]) == (3, 0, True)
    assert {"name": device, "usable": True} in [
        {"name": d["name"], "usable": d["usable"]} for d in report["devices"]
    ]
