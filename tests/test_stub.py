"""The stub that editors read is made from the contracts and up to date."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import kernelhub

ROOT = Path(__file__).parent.parent


def test_the_stub_is_current() -> None:
    path = ROOT / "scripts" / "make_stub.py"
    spec = importlib.util.spec_from_file_location("make_stub", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    written = (ROOT / "kernelhub" / "ops.pyi").read_text()
    assert written == module.stub(), "run `python scripts/make_stub.py`"


def test_a_type_checker_sees_the_signatures(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import torch, kernelhub\n"
        "x = torch.ones(2, 4)\n"
        "y: torch.Tensor = kernelhub.ops.fused_gemv(x, x, activation='silu')\n"
        "kernelhub.ops.fused_gemv(x, x, activation='relu')\n"
        "kernelhub.ops.fused_gemv(x)\n"
        "kernelhub.ops.fused_mul_add.on('reference')(x, x, 2.0)\n"
        "kernelhub.ops.fused_mul_add.plan(x, x, 2.0)(x, x)\n"
        "print(kernelhub.op('fused_gemv').explain(x, x).backend)\n"
    )
    run = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path), str(program)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    errors = [line for line in run.stdout.splitlines() if ": error:" in line]
    assert [line.split(":")[1] for line in errors] == ["4", "5"], run.stdout


def test_the_version_is_in_one_place() -> None:
    assert (
        f'__version__ = "{kernelhub.__version__}"' in (ROOT / "kernelhub/__init__.py").read_text()
    )
    assert 'dynamic = ["version"]' in (ROOT / "pyproject.toml").read_text()
