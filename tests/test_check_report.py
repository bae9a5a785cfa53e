"""`kernelhub check --report`: all that is needed to judge a run, and nothing of who ran it."""

from __future__ import annotations

import getpass
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import kernelhub
from kernelhub.backend import Backend, Implementation
from kernelhub.cli import _check_report
from kernelhub.cli._check_report import scrubbed
from kernelhub.errors import BuildError
from kernelhub.spec import Traits
from tests.commands import run, run_json

OP = "fused_mul_add"
ARGUMENTS = ("check", "--op", OP, "--case", "*m1-float32")


def backend(name: str, function: Callable[..., Any], **facts: Any) -> Backend:
    return Backend(name, (Implementation(OP, function, **facts),))


def right(x: Any, bias: Any, scale: Any, *, out: Any = None) -> Any:
    result = (x.double() * scale + bias.double()).to(x.dtype)
    return result if out is None else out.copy_(result)


def report_of(tmp_path: Path, *more: str, code: int = 0) -> dict[str, Any]:
    path = tmp_path / "report.json"
    run(*ARGUMENTS, *more, "--report", str(path), code=code)
    text = path.read_text()
    for private in (str(Path.home()), str(tmp_path), os.getcwd()):
        assert private not in text
    return json.loads(text)


def test_a_good_backend(tmp_path: Path, add_backend: Any) -> None:
    add_backend(backend("good", right))
    report = report_of(tmp_path, "--backend", "good")
    assert (report["schema"], report["ok"], report["device"]) == (1, True, "cpu")
    assert report["kernelhub"] == kernelhub.__version__
    assert report["versions"]["torch"].startswith(torch.__version__)
    assert report["devices"][0] == run_json("doctor")["devices"][0]
    (result,) = report["results"]
    (checked,) = run_json(*ARGUMENTS, "--backend", "good")["results"]
    for key in ("op", "backend", "cases", "passed", "failed", "declined"):
        assert result[key] == checked[key]
    assert result["passed"] == 1 and result["same_bits"] is True
    assert 0 < result["seconds"] < 60
    assert result["worst"]["fraction"] == checked["worst"]["fraction"]


def test_a_wrong_backend(tmp_path: Path, add_backend: Any) -> None:
    add_backend(backend("wrong", lambda x, bias, scale, *, out=None: right(x, bias, 2 * scale)))
    report = report_of(tmp_path, "--backend", "wrong", code=1)
    assert not report["ok"]
    (failure,) = report["results"][0]["failures"]
    assert failure["case"] == "deepseek-v3-m1-float32"
    assert failure["message"] == "error past its bound"
    assert failure["fraction"] > 1000
    assert report["results"][0]["same_bits"] is None  # it was not worth a second run


@pytest.mark.parametrize(("deterministic", "code"), [(True, 1), (False, 0)])
def test_two_runs_with_other_bits(
    deterministic: bool, code: int, tmp_path: Path, add_backend: Any
) -> None:
    calls: list[int] = []

    def drifting(x: Any, bias: Any, scale: Any, *, out: Any = None) -> Any:
        calls.append(1)
        result = right(x, bias, scale)
        if x.shape[0] != 1:  # one of the two cases
            return result if out is None else out.copy_(result)
        # One unit in the last place, half of which the bound allows; a few elements suffice.
        exact = x.double() * scale + bias.double()
        other = torch.nextafter(result, torch.where(exact > result, torch.inf, -torch.inf).float())
        near = (other.double() - exact).abs() < 0.6 * (other.double() - result.double()).abs()
        result = torch.where(near & (len(calls) % 2 == 0), other, result)
        return result if out is None else out.copy_(result)

    traits = Traits(deterministic=deterministic, batch_invariant=False)
    add_backend(backend("drifting", drifting, traits=traits))
    more = ("--backend", "drifting", "--case", "*m[17]-float32")
    report = report_of(tmp_path, *more, code=code)
    assert report["results"][0]["cases"] == 2
    assert report["results"][0]["same_bits"] is False
    said = [failure["message"] for failure in report["results"][0]["failures"]]
    assert said == (["a second run gave other bits"] if deterministic else [])


def test_an_error_is_told_without_names_and_folders(tmp_path: Path, add_backend: Any) -> None:
    user, host = getpass.getuser(), socket.gethostname()

    def broken(x: Any, bias: Any, scale: Any, *, out: Any = None) -> Any:
        raise BuildError(
            f"mcc failed for {user} on {host}\n    {Path.home()}/src/k.mu:3:1: error: 'x' of "
            "[N, K/g]\n    command: /opt/musa/bin/mcc -I/home/me/include MUSA_HOME=/secret/sdk\n"
            f"    log: {tmp_path}/musa.log"
        )

    add_backend(backend("broken", broken))
    report = report_of(tmp_path, "--backend", "broken", code=1)
    (failure,) = report["results"][0]["failures"]
    assert failure["fraction"] is None
    text = failure["message"]
    assert "BuildError: mcc failed for " in text and "error: 'x' of [N, K/g]" in text
    for private in (host, "/opt", "/home", "me/include", "secret", "musa.log", "src/k.mu"):
        assert private not in text
    if user != "root":
        assert user not in text


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("cannot open /home/ann/a-b.c/x.mu:10:2", "cannot open <path>:10:2"),
        ("-I/usr/local/inc -L/x", "-I<path> -L<path>"),
        ("see ~/.cache/kernelhub.", "see <path>"),
        ("KERNELHUB_CACHE_DIR=/tmp/ann x=1", "KERNELHUB_CACHE_DIR=... x=1"),
        ("'/a/b', \"/c\" (/d/e)", "'<path>', \"<path>\" (<path>)"),
        ("K/2 = 3, 1/3, [N, K/g], a / b, ~5 GB", "K/2 = 3, 1/3, [N, K/g], a / b, ~5 GB"),
        ("MTT S4000, capability 2.2", "MTT S4000, capability 2.2"),
        ("ann@build-7 of ann: banned", "<name>@<name> of <name>: banned"),
    ],
)
def test_scrubbing(text: str, left: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_check_report, "_identities", lambda: iter(["build-7", "ann"]))
    assert scrubbed(text) == left


def test_folders_with_blanks_and_long_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_check_report, "_folders", lambda: iter(["/home/Ann Lee"]))
    assert scrubbed("in /home/Ann Lee/src/k.mu: no") == "in <path>: no"
    assert len(scrubbed("a " * 5000)) < 2010


def test_a_backend_that_cannot_be_used(tmp_path: Path) -> None:
    report = report_of(tmp_path, "--backend", "musa", code=1)
    assert report["results"] == []
    assert "torch_musa" in report["problems"][0] or "runs on musa" in report["problems"][0]
    (said,) = report["backends"]
    assert said["name"] == "musa" and said["arch"] is None
    assert said["library"].startswith("ModuleNotFoundError")


def test_a_report_that_cannot_be_written(tmp_path: Path) -> None:
    result = run(*ARGUMENTS, "--report", str(tmp_path / "no" / "r.json"), code=2)
    assert "cannot be written" in result.stderr
    assert result.stdout == ""
