"""The command line: what it says, what it exits with, and that nothing broken breaks it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import kernelhub
from kernelhub import _entry_points, doctor, plugins, policy, registry
from kernelhub.backend import Backend, Implementation
from kernelhub.backends.native import library
from kernelhub.cli import COMMANDS
from kernelhub.spec import Traits
from kernelhub.testing import Outcome
from tests.commands import run, run_json

GEMV = ["--arg", "x=bf16[1,4096]", "--arg", "weight=bf16[12288,4096]"]


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (policy.BACKEND_VARIABLE, policy.FALLBACK_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(policy, "_environment", None)
    plugins.load()


def process(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    root = Path(kernelhub.__file__).parents[1]
    path = os.pathsep.join(filter(None, [environment.pop("PYTHONPATH", ""), str(root)]))
    return subprocess.run(
        [sys.executable, "-m", "kernelhub", *arguments],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def doubled(x: Any, bias: Any, scale: Any, *, out: Any = None) -> Any:
    """Wrong: a scale too many."""
    print("noise from a kernel")
    result = (x.float() * scale * 2 + bias.float()).to(x.dtype)
    return result if out is None else out.copy_(result)


def picky(x: Any, bias: Any, scale: Any, *, out: Any = None) -> Any:
    """Right, for what it takes."""
    result = (x.float() * scale + bias.float()).to(x.dtype)
    return result if out is None else out.copy_(result)


def backend(name: str, function: Any = doubled, **facts: Any) -> Backend:
    rejects = facts.pop("rejects", lambda args: ())
    traits = Traits(differentiable=True)
    one = Implementation("fused_mul_add", function, rejects=rejects, traits=traits)
    implementations: Any = (one,)
    return Backend(name, implementations, **facts)


@pytest.fixture
def add() -> Iterator[Any]:
    added: list[str] = []

    def put(new: Backend) -> None:
        registry.add_backend(new)
        added.append(new.name)

    yield put
    for name in added:
        registry.remove_backend(name)


class TestMain:
    def test_help_names_every_command(self) -> None:
        output = run("--help").output
        assert all(f"  {name} " in output for name in COMMANDS)

    @pytest.mark.parametrize("name", COMMANDS)
    def test_each_command_has_help(self, name: str) -> None:
        assert "--json" in run(name, "-h").output

    def test_help_imports_no_command(self) -> None:
        script = (
            "import sys; from kernelhub.cli import main; main(['--help'], standalone_mode=False);"
            "print([m for m in sys.modules if m == 'rich' or m.startswith('kernelhub.cli.')])"
        )
        root = str(Path(kernelhub.__file__).parents[1])
        shown = subprocess.run(
            [sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True
        )
        assert shown.stdout.splitlines()[-1] == "[]"

    def test_version(self) -> None:
        assert kernelhub.__version__ in run("--version").output

    def test_a_mistyped_command_gets_the_nearest(self) -> None:
        result = run("exlpain", code=2)
        assert "did you mean 'explain'?" in result.stderr
        assert result.stdout == ""


class TestOps:
    @pytest.mark.parametrize("columns", ["50", "80", "200"])
    def test_the_table_has_every_name_whole(self, columns: str) -> None:
        output = run("ops", env={"COLUMNS": columns}).output
        assert all(name in output for name in registry.specs())
        assert max(map(len, output.splitlines())) <= int(columns)
        assert "…" not in output

    def test_json_has_every_op(self) -> None:
        ops = run_json("ops")["ops"]
        assert [op["name"] for op in ops] == list(registry.specs())
        assert all(op["backends"][-1] == "reference" and op["summary"] for op in ops)

    def test_one_op_in_full(self) -> None:
        output = run("ops", "fused_gemv").output
        assert "epilogue(x @ dequant(weight).T)" in output
        assert "torch schema  kernelhub::fused_gemv(Tensor x, Tensor weight, Tensor? x" in output
        assert "'swiglu'" in output
        assert "[N, K]" in output

    def test_one_op_as_json(self) -> None:
        op = run_json("ops", "fused_mul_add")
        scale = next(p for p in op["params"] if p["name"] == "scale")
        assert scale["types"] == ["float"]
        assert scale["dtypes"] == ["bfloat16", "float16", "float32"]
        assert scale["ranks"] == [0, 64]
        assert scale["required"]
        assert scale["fixed"]
        assert op["signature"] == "fused_mul_add(x, bias, scale, *, out=None)"
        assert op["schema"].endswith("str backend) -> Tensor")

    def test_an_unknown_op(self) -> None:
        assert "did you mean 'fused_gemv'?" in run("ops", "fused_gemm", code=2).stderr


class TestBackends:
    def test_reference(self) -> None:
        found = run_json("backends")
        assert found["failed"] == []
        reference = next(b for b in found["backends"] if b["name"] == "reference")
        assert reference["available"]
        assert reference["distribution"].startswith("kernelhub")
        assert reference["ops"] == list(registry.specs())
        assert reference["device_types"] == []

    def test_every_reason_is_shown(self, add: Any) -> None:
        add(backend("acme", probe=lambda device: ["no driver: get one", "no licence"]))
        acme = next(b for b in run_json("backends")["backends"] if b["name"] == "acme")
        assert not acme["available"]
        assert acme["reasons"] == ["no driver: get one", "no licence"]
        assert acme["ops"] == ["fused_mul_add"]
        assert acme["priority"] == 50
        output = run("backends").output
        assert "missing: no driver: get one" in output
        assert "missing: no licence" in output

    def test_a_device_that_the_probe_refuses(self, add: Any) -> None:
        add(backend("acme", device_types=("cpu",), probe=lambda d: ["too old"] if d else []))
        acme = next(b for b in run_json("backends")["backends"] if b["name"] == "acme")
        assert not acme["available"]
        assert acme["reasons"] == ["cpu: too old"]

    def test_text_of_a_plugin_is_not_markup(self, add: Any) -> None:
        add(backend("acme", description="[bold]not[/] [link=x]bold[/link] :smile: \x1b[31mred"))
        output = run("backends").output
        assert r"[bold]not[/] [link=x]bold[/link] :smile: \x1b[31mred" in output


BROKEN = plugins.Problem("broken", "broken-kernels 1.2", "ImportError: no [libfoo]", "Traceback...")


class TestDoctor:
    def test_nothing_wrong(self) -> None:
        output = run("doctor").output
        assert f"torch {torch.__version__}" in " ".join(output.split())
        assert "nothing is wrong" in output
        assert "torch_musa is not installed" in output

    def test_json(self) -> None:
        report = run_json("doctor")
        assert report["ok"]
        assert report["versions"]["kernelhub"] == kernelhub.__version__
        assert report["devices"][0]["name"] == "cpu"
        states = {b["name"]: b["state"] for b in report["backends"]}
        assert states["reference"] == "usable"
        shipped = set(registry.backends())
        absent = [name for name in registry.SHIPPED if name not in shipped]
        assert [states[name] for name in absent] == ["absent"] * len(absent)

    @pytest.mark.parametrize(
        ("name", "value", "said"),
        [
            ("KERNELHUB_BACKEND", "cuda,,x", "^ column 6"),
            ("KERNELHUB_BACKEND", "refrence", "did you mean 'reference'?"),
            ("KERNELHUB_BACKEND", "fused_gem=reference", "did you mean 'fused_gemv'?"),
            ("KERNELHUB_FALLBACK", "warm", "did you mean 'warn'?"),
            ("KERNELHUB_ENGINE_OPS", "fused_gem", "did you mean 'fused_gemv'?"),
        ],
    )
    def test_malformed_environment(self, name: str, value: str, said: str) -> None:
        output = run("doctor", code=1, env={name: value}).output
        assert "malformed" in output
        assert said in output
        report = run_json("doctor", code=1, env={name: value})
        (problem,) = report["problems"]
        assert problem.startswith(f"{name}: ")
        assert said in problem

    def test_both_variables_malformed(self) -> None:
        env = {"KERNELHUB_BACKEND": "-", "KERNELHUB_FALLBACK": "-"}
        problems = run_json("doctor", code=1, env=env)["problems"]
        assert [p.split(":")[0] for p in problems] == list(env)

    def test_well_formed_environment(self) -> None:
        env = {"KERNELHUB_BACKEND": "-musa", "KERNELHUB_BACKED": "x", "KERNELHUB_ENGINE_OPS": "*"}
        report = run_json("doctor", env=env)
        notes = {v["name"]: v["note"] for v in report["environment"]}
        assert notes["KERNELHUB_BACKEND"] == notes["KERNELHUB_ENGINE_OPS"] == ""
        assert "did you mean 'KERNELHUB_BACKEND'?" in notes["KERNELHUB_BACKED"]

    def test_environment_that_nothing_can_meet(self, add: Any) -> None:
        add(backend("acme", probe=lambda device: ["no driver"]))
        env = {"KERNELHUB_BACKEND": "fused_mul_add=acme"}
        (problem,) = run_json("doctor", code=1, env=env)["problems"]
        assert "acme cannot be used here, so nothing can run fused_mul_add" in problem
        run("doctor", env={"KERNELHUB_BACKEND": "acme,auto"})
        run("doctor", env={"KERNELHUB_BACKEND": "acme,reference"})

    def test_why_calls_go_through_ctypes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert run_json("doctor")["binding"]["missing"] == list(library.why_not_fast())
        reasons = (
            "torch 2.9.1 has no DLPack exchange interface: 2.10 or later has",
            "no g++: get it",
        )
        monkeypatch.setattr(library, "why_not_fast", lambda: reasons)
        report = run_json("doctor")
        assert report["ok"]
        assert report["binding"] == {"missing": list(reasons)}
        output = " ".join(run("doctor").output.split())
        slower = "missing calls of compiled kernels go through ctypes, which takes longer:"
        assert " ".join((slower, *reasons)) in output

    def test_failed_plugins(self, monkeypatch: pytest.MonkeyPatch) -> None:
        unreadable = plugins.Problem("?", "?", "odd in /x: unreadable entry points: [")
        monkeypatch.setattr(plugins, "_problems", [BROKEN, unreadable])
        output = run("doctor", code=1).output
        assert "2 problems" in output
        assert "broken-kernels 1.2: plug-in 'broken' failed to load: ImportError: no [lib" in output
        assert "to do: install a version of broken-kernels" in " ".join(output.split())
        assert "odd in /x" in output
        report = run_json("doctor", code=1)
        assert report["backends"][-2]["details"] == "Traceback..."
        assert run_json("backends")["failed"][0]["name"] == "broken"
        assert "broken (broken-kernels 1.2) failed: ImportError: no [lib" in run("backends").output

    def test_a_broken_probe_is_a_reason(self, add: Any) -> None:
        def probe(device: Any) -> Any:
            raise OSError("libacme.so: wrong ELF class")

        add(backend("acme", probe=probe))
        output = " ".join(run("doctor").output.split())
        assert "its probe failed: OSError: libacme.so: wrong ELF class" in output

    @pytest.mark.parametrize(
        "broken",
        [
            (_entry_points, "read"),
            (plugins, "problems"),
            (registry, "specs"),
            (registry, "backends"),
            (registry, "entries"),
            (doctor, "devices"),
            (doctor, "_versions"),
            (doctor, "_environment"),
        ],
        ids=lambda broken: f"{broken[0].__name__}.{broken[1]}",
    )
    def test_whatever_is_broken(self, broken: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: Any) -> Any:
            raise RuntimeError("pulled out")

        monkeypatch.setattr(broken[0], broken[1], fail)
        monkeypatch.setattr(plugins, "_loaded", broken[1] != "read")
        report = run_json("doctor", code=1)
        assert any("RuntimeError: pulled out" in problem for problem in report["problems"])
        monkeypatch.setattr(plugins, "_loaded", broken[1] != "read")
        assert "pulled out" in run("doctor", code=1).output

    def test_a_torch_that_cannot_say(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail() -> bool:
            raise RuntimeError("driver too old")

        monkeypatch.setattr(torch.version, "cuda", "12.8")
        monkeypatch.setattr(torch.cuda, "is_available", fail)
        cuda = next(d for d in run_json("doctor")["devices"] if d["name"] == "cuda")
        assert cuda == {"name": "cuda", "usable": False, "detail": "RuntimeError: driver too old"}


class TestExplain:
    def explain(self, *arguments: str, code: int = 0, **options: Any) -> Any:
        return run_json("explain", *arguments, code=code, **options)

    def test_cpu(self) -> None:
        output = run("explain", "fused_gemv", *GEMV, "--arg", "activation=swiglu").output
        assert output.splitlines()[0] == "fused_gemv: reference"
        assert "weight  [12288, 4096] bfloat16 cpu" in output
        assert "policy: default ranking" in output

    @pytest.mark.parametrize("device", ["musa", "cuda", "cuda:0"])
    def test_a_device_that_is_not_here(self, device: str) -> None:
        found = self.explain("fused_gemv", "--device", device, *GEMV, "--backend", "reference")
        assert found["device"] == device.partition(":")[0] + ":0"
        assert found["chosen"] == "reference"
        assert found["policy"] == "--backend reference"
        assert found["fallback"] is None

    @pytest.mark.parametrize(("mode", "code"), [("warn", 0), ("quiet", 0), ("error", 1)])
    def test_fallback(self, mode: str, code: int) -> None:
        env = {"KERNELHUB_FALLBACK": mode}
        found = self.explain(
            "fused_gemv", "--device", "musa", *GEMV, "--backend", "-musa", code=code, env=env
        )
        assert found["chosen"] == "reference"
        assert found["fallback"] == mode

    @pytest.mark.parametrize(
        ("rules", "mode"), [("reference,auto", None), ("cuda,reference", "error")]
    )
    def test_the_reference_named_first_is_no_fallback(self, rules: str, mode: str | None) -> None:
        env = {"KERNELHUB_FALLBACK": "error"}
        found = self.explain(
            *("fused_gemv", "--device", "cuda", *GEMV, "--backend", rules),
            code=1 if mode else 0,
            env=env,
        )
        assert found["chosen"] == "reference"
        assert found["fallback"] == mode

    def test_nothing_would_run(self, add: Any) -> None:
        add(backend("acme", device_types=("acme",), probe=lambda device: ["no driver", "no card"]))
        given = ["--arg", "x=fp32[4]", "--arg", "bias=fp32[4]", "--arg", "scale=2.5"]
        found = self.explain(
            "fused_mul_add", "--device", "acme:1", *given, "--backend", "acme", code=1
        )
        assert found["chosen"] is None
        reasons = {c["name"]: c["reasons"] for c in found["candidates"]}
        assert reasons["acme"] == ["no driver", "no card"]
        assert reasons["reference"] == ["excluded by --backend acme"]
        output = run("explain", "fused_mul_add", *given, "--backend", "acme", code=1).output
        assert "no backend can run this call" in output
        assert "runs on acme; the tensors are on cpu" in output

    def test_tensors_and_scalars(self) -> None:
        found = self.explain(
            "top_k_top_p_sampling_from_probs",
            *["--arg", "probs = float16[4, 8]:1, 4", "--arg", "top_k=i32[4]", "--arg", "top_p=.9"],
            *["--arg", "min_p=none", "--arg", "deterministic=False", "--arg", "seed=7"],
            *["--arg", "filter_apply_order=joint"],
        )
        assert found["inputs"] == {
            "probs": "[4, 8] float16 cpu strides (1, 4)",
            "top_k": "[4] int32 cpu",
        }

    def test_a_dtype_as_argument(self) -> None:
        for name in ("fp32", "float32", "half"):
            self.explain("fused_gemv", *GEMV, "--arg", f"out_dtype={name}")

    def test_the_environment_counts(self) -> None:
        env = {"KERNELHUB_BACKEND": "reference"}
        assert self.explain("fused_gemv", *GEMV, env=env)["policy"] == "KERNELHUB_BACKEND=reference"

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["fused_gem"], "did you mean 'fused_gemv'?"),
            (["fused_gemv", "--arg", "x"], "expected name=value"),
            (["fused_gemv", "--arg", "wieght=bf16[2,4]"], "did you mean 'weight'?"),
            (["fused_gemv", *GEMV, *GEMV], "--arg x is given twice"),
            (["fused_gemv", "--arg", "x=bf16[1,4]"], "--arg weight=...  a tensor [N, K]"),
            (["fused_gemv", "--arg", "x=bf61[1,4]"], "did you mean 'bf16'?"),
            (["fused_gemv", "--arg", "x=bf16[1,b]"], "'b' is not a size"),
            (["fused_gemv", "--arg", "x=bf16[1,-4]"], "'-4' is not a size"),
            (["fused_gemv", "--arg", "x=bf16[1,4"], "not a tensor; write a tensor as bf16[4,8]"),
            (["fused_gemv", "--arg", "x=bf16[1,4]:1"], "expected 2 strides"),
            (["fused_gemv", "--arg", "x=2"], "expected a tensor [..., K] bfloat16|"),
            (["fused_gemv", "--arg", "x=none"], "expected a tensor [..., K] bfloat16|"),
            (["fused_gemv", *GEMV, "--arg", "eps=soft"], "expected a float"),
            (["fused_gemv", *GEMV, "--arg", "out_dtype=fp33"], "no dtype named 'fp33'"),
            (["fused_gemv", *GEMV, "--arg", "activation=swigl"], "expected 'swiglu' or 'silu'"),
            (["fused_gemv", *GEMV, "--arg", "bias=bf16[7]"], "argument 'bias'"),
            (["fused_gemv", *GEMV, "--arg", "bias=bf16[12288]@cuda:0"], "a tensor on cpu"),
            (["fused_gemv", *GEMV, "--device", "cdua"], "did you mean 'cuda'?"),
            (["fused_gemv", *GEMV, "--device", "cuda:x"], "not a device"),
            (["fused_gemv", *GEMV, "--backend", "refrence"], "did you mean 'reference'?"),
            (["fused_gemv", *GEMV, "--backend", "a,,b"], "^ column 3"),
            (
                ["top_k_top_p_sampling_from_probs", "--arg", "generator=1"],
                "a Generator cannot be described here",
            ),
            (
                ["top_k_top_p_sampling_from_probs", "--arg", "deterministic=maybe"],
                "expected a bool",
            ),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_what_cannot_be_understood(self, arguments: list[str], said: str) -> None:
        result = run("explain", *arguments, code=2)
        assert said in result.stderr
        assert result.stdout == ""

    def test_malformed_environment(self) -> None:
        env = {"KERNELHUB_BACKEND": "refrence"}
        result = run("explain", "fused_gemv", *GEMV, code=2, env=env)
        assert "KERNELHUB_BACKEND: no backend is named 'refrence'" in result.stderr


class TestCheck:
    ONE = ("check", "--op", "fused_mul_add")

    def test_the_reference_passes(self) -> None:
        report = run_json(*self.ONE, "--seed", "3")
        (result,) = report["results"]
        cases = len(list(registry.spec("fused_mul_add").cases()))
        assert report["ok"]
        assert report["seed"] == 3
        assert (result["op"], result["backend"]) == ("fused_mul_add", "reference")
        assert (result["cases"], result["passed"], result["failed"]) == (cases, cases, 0)
        assert 0 < result["worst"]["fraction"] <= 1

    def test_a_wrong_backend_fails(self, add: Any) -> None:
        add(backend("doubler"))
        result = run(*self.ONE, "--case", "tail-7-*", code=1)
        assert "fused_mul_add on doubler" in result.output
        assert "failed    tail-7-float32: error past its bound" in result.output
        assert "3 of 6 cases failed" in result.output
        assert "noise" not in result.stdout

    def test_a_wrong_backend_as_json(self, add: Any) -> None:
        add(backend("doubler"))
        report = run_json(*self.ONE, "--backend", "doubler", "--case", "tail-*", code=1)
        (result,) = report["results"]
        assert result["failed"] == len(result["failures"]) == 18
        assert result["worst"]["fraction"] > 1000
        assert {f["message"] for f in result["failures"]} == {"error past its bound"}
        assert report["problems"] == ["18 of 18 cases failed"]

    def test_infinite_error_is_valid_json(self, add: Any) -> None:
        def crash(x: Any, bias: Any, scale: Any, *, out: Any = None) -> Any:
            raise RuntimeError("illegal [red]address[/]\nin line 2")

        add(backend("crasher", crash))
        report = run_json(*self.ONE, "--backend", "crasher", "--case", "tail-1-*", code=1)
        failure = report["results"][0]["failures"][0]
        assert failure["fraction"] is None
        assert "illegal [red]address[/]" in failure["message"]
        output = run(*self.ONE, "--backend", "crasher", "--case", "tail-1-*", code=1).output
        assert "RuntimeError: illegal [red]address[/]\n      in line 2" in output
        assert "wrong" in output

    def test_declined_cases_are_counted_apart(self, add: Any) -> None:
        def rejects(args: Any) -> list[str]:
            return [] if args.x.dtype is torch.float32 else ["only fp32 is done"]

        add(backend("picky", picky, rejects=rejects))
        arguments = (*self.ONE, "--backend", "picky", "--case", "tail-*")
        report = run_json(*arguments, "--verbose")
        (result,) = report["results"]
        assert (result["passed"], result["declined"], result["failed"]) == (6, 12, 0)
        declined = [o for o in result["outcomes"] if o["status"] == "declined"]
        assert all("only fp32 is done" in outcome["message"] for outcome in declined)
        assert "only fp32 is done" in run(*arguments, "--verbose").output
        nothing = run(*self.ONE, "--backend", "picky", "--case", "tail-*-bfloat16", code=1)
        assert "no case ran" in nothing.output

    def test_a_backend_that_declines_every_good_case_has_been_held_to_nothing(
        self, add: Any
    ) -> None:
        add(backend("idle", rejects=lambda args: ["not today"]))
        report = run_json(*self.ONE, "--backend", "idle", "--backend", "reference", code=1)
        assert report["problems"] == ["idle declines every case of fused_mul_add"]
        (idle,) = (r for r in report["results"] if r["backend"] == "idle")
        assert idle["passed"] > 0, "of bad input, which the op itself refuses"
        run(*self.ONE, "--backend", "idle", "--backend", "reference", "--case", "tail-1-*")

    def test_a_named_backend_that_cannot_be_used(self, add: Any) -> None:
        add(backend("acme", probe=lambda device: ["no driver"]))
        report = run_json(*self.ONE, "--backend", "acme", "--backend", "reference", code=1)
        assert report["unavailable"] == {"acme": ["no driver"]}
        assert [r["backend"] for r in report["results"]] == ["reference"]
        assert "acme: no driver" in run(*self.ONE, "--backend", "acme", code=1).output

    def test_unusable_backends_are_left_out_unless_named(self, add: Any) -> None:
        add(backend("acme", probe=lambda device: ["no driver"]))
        add(backend("shy", automatic=False, priority=40))
        report = run_json(*self.ONE, "--case", "tail-1-*")
        assert [r["backend"] for r in report["results"]] == ["reference"]

    def test_a_named_backend_is_held_to_its_own_ops(self, add: Any) -> None:
        add(backend("picky", picky))
        report = run_json("check", "--backend", "picky", "--case", "tail-1-float32")
        assert [r["op"] for r in report["results"]] == ["fused_mul_add"]
        other = run_json("check", "--backend", "picky", "--op", "fused_gemv", code=1)
        assert other["unavailable"] == {"picky": ["does not implement fused_gemv"]}

    def test_no_case_of_that_name(self) -> None:
        assert run_json(*self.ONE, "--case", "nope", code=1)["problems"] == ["no case ran"]

    def test_a_device_that_is_not_here(self) -> None:
        output = run(*self.ONE, "--device", "musa", code=1).output
        assert "torch has no 'musa' devices here" in output

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["--op", "fused_gem"], "did you mean 'fused_gemv'?"),
            (["--backend", "refrence"], "did you mean 'reference'?"),
            (["--device", "cdua"], "did you mean 'cuda'?"),
            (["--device", "meta"], "hold no numbers"),
            (["--seed", "x"], "'x' is not a valid integer"),
        ],
    )
    def test_what_cannot_be_understood(self, arguments: list[str], said: str) -> None:
        result = run("check", *arguments, code=2)
        assert said in result.stderr
        assert result.stdout == ""

    def test_every_op_is_checked_by_default(self, monkeypatch: pytest.MonkeyPatch) -> None:
        ran: list[str] = []

        def fake(op: str, case: Any, name: str, device: str, seed: int) -> Outcome:
            ran.append(op)
            return Outcome(op, name, case.name, "passed", 0.5)

        monkeypatch.setattr("kernelhub.cli.check.run_case", fake)
        output = run("check").output
        assert list(dict.fromkeys(ran)) == list(registry.specs())
        assert f"{len(ran)} cases passed on cpu, seed 0" in output
        assert max(map(len, output.splitlines())) <= 80


PLUGIN = """\
print("a plug-in that talks")
from kernelhub.backend import Backend, Implementation
def run(x, bias, scale, *, out=None): ...
good = Backend("good", (Implementation("fused_mul_add", run),), device_types=("acme",))
"""


@pytest.fixture
def plugin_folder(tmp_path: Path) -> str:
    (tmp_path / "acme_kernels.py").write_text(PLUGIN)
    info = tmp_path / "acme_tools-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme_tools\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(
        "[kernelhub.backends]\ngood = acme_kernels:good\nbroken = acme_kernels:missing\n"
    )
    return str(tmp_path)


class TestProcess:
    def test_a_talking_plugin_leaves_json_whole(self, plugin_folder: str) -> None:
        done = process("doctor", "--json", PYTHONPATH=plugin_folder, KERNELHUB_BACKEND="a b")
        assert done.returncode == 1, done.stderr
        report = json.loads(done.stdout)
        assert "a plug-in that talks" in done.stderr
        states = {b["name"]: (b["state"], b["distribution"]) for b in report["backends"]}
        assert states["good"] == ("usable", "acme_tools 1.2")
        assert states["broken"] == ("failed", "acme_tools 1.2")
        first, second = report["problems"]
        assert first.startswith("acme_tools 1.2: plug-in 'broken' failed to load: AttributeErr")
        assert second.startswith("KERNELHUB_BACKEND: ")

    def test_a_terminal_without_unicode(self) -> None:
        done = process("explain", "fused_gemv", *GEMV, PYTHONIOENCODING="ascii")
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("fused_gemv: reference\n")
        assert done.stderr == ""
