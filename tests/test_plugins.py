"""Backends from outside: installed packages, found, isolated, explained."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip has installed both example packages."""
    target = tmp_path_factory.mktemp("site")
    for example in ("backend", "broken_backends"):
        pip = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--no-build-isolation",
        ]
        subprocess.run(
            [*pip, "--target", str(target), str(ROOT / "examples" / example)], check=True
        )
    return target


def python(code: str, *paths: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh process that sees the given folders and this kernelhub."""
    path = os.pathsep.join(map(str, (*paths, ROOT)))
    environment = {**os.environ, "PYTHONPATH": path, **variables}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=120,
    )


def answer(code: str, *paths: Path, **variables: str) -> object:
    run = python("import json, torch, kernelhub\n" + code, *paths, **variables)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


CALL = "op = kernelhub.op('fused_mul_add'); x = torch.ones(3); "


def test_the_example_is_short() -> None:
    lines = (ROOT / "examples/backend/kernelhub_example_alpha.py").read_text().splitlines()
    assert len(lines) < 60


def test_an_installed_backend_is_found_used_and_explained(site: Path) -> None:
    made = answer(
        CALL
        + "y = op(x, x, 2.0); s = op.explain(x, x, 2.0); h = op.explain(x.half(), x.half(), 2.0);"
        "why = h.candidates[0].reasons;"
        "print(json.dumps([y.tolist(), s.backend, op.backends(), h.backend, why]))",
        site,
    )
    assert made == [
        [3.0] * 3,
        "alpha",
        ["cuda", "musa", "simt", "alpha", "reference"],
        "reference",
        ["built for float32, not torch.float16"],
    ]


def kit(name: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run `pytest --kernelhub-backend NAME` in a folder that holds the backend."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    path = os.pathsep.join([str(folder), str(ROOT)])
    return subprocess.run(
        [*command, "--kernelhub-backend", name],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": path},
        cwd=folder,
        timeout=300,
    )


def test_the_installed_backend_passes_the_conformance_kit(site: Path) -> None:
    run = kit("alpha", site)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout
    assert "failed" not in run.stdout


BROKEN = {
    "raises_on_import": "ImportError: libvendor.so.3: cannot open shared object file",
    "unknown_op": "no op named 'musa_fused_mul_add'; did you mean 'fused_mul_add'?",
    "wrong_signature": "+positional or keyword scale",
    "future_api": "written for backend API 1000",
    "no_function": "has no attribute 'fused_mul_add_kernel'",
}


def test_five_broken_backends_are_reported_and_stop_nobody(site: Path) -> None:
    made = answer(
        CALL + "y = op(x, x, 2.0);"
        "found = {p.name: [p.reason, p.distribution] for p in kernelhub.plugins.problems()};"
        "print(json.dumps(found))",
        site,
    )
    assert isinstance(made, dict)
    assert set(made) == set(BROKEN)
    for name, reason in BROKEN.items():
        assert reason in made[name][0]
        assert made[name][1] == "kernelhub_example_broken 1.0"


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_backend_is_an_error_only_if_forced(site: Path, name: str) -> None:
    run = python(f"import torch, kernelhub; {CALL} op(x, x, 2.0)", site, KERNELHUB_BACKEND=name)
    assert run.returncode == 1
    assert "kernelhub.errors.BackendUnavailable" in run.stderr
    assert "failed to load: " in run.stderr
    assert BROKEN[name] in run.stderr
    assert "KeyError" not in run.stderr
    preferred = answer(
        CALL + "print(json.dumps(op(x, x, 2.0).tolist()))", site, KERNELHUB_BACKEND=f"{name},auto"
    )
    assert preferred == [3.0] * 3


def test_loading_is_lazy_and_happens_once(site: Path) -> None:
    made = answer(
        "import sys\n" + CALL + "before = 'kernelhub_example_alpha' in sys.modules\n"
        "read = kernelhub.plugins._entry_points.read; count = []\n"
        "kernelhub.plugins._entry_points.read = lambda g: count.append(g) or read(g)\n"
        "for _ in range(3): op(x, x, 2.0)\n"
        "kernelhub.op('fused_gemv').backends()\n"
        "print(json.dumps([before, 'kernelhub_example_alpha' in sys.modules, count]))",
        site,
    )
    assert made == [False, True, ["kernelhub.backends"]]


def test_unreadable_metadata_hides_no_neighbour(tmp_path: Path, site: Path) -> None:
    info = tmp_path / "bad-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bad\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("this is [not an ini file\n")
    good = tmp_path / "good-1.0.dist-info"
    good.mkdir()
    (good / "METADATA").write_text("Metadata-Version: 2.1\nName: good\nVersion: 1.0\n")
    (good / "entry_points.txt").write_text(
        "[kernelhub.backends]\nalpha = kernelhub_example_alpha:backend\n"
    )
    for module in site.glob("kernelhub_example_alpha.py"):
        (tmp_path / module.name).write_text(module.read_text())
    made = answer(
        CALL + "op(x, x, 2.0);"
        "print(json.dumps([op.backends(), [p.reason for p in kernelhub.plugins.problems()]]))",
        tmp_path,
    )
    assert isinstance(made, list)
    assert made[0] == ["cuda", "musa", "simt", "alpha", "reference"]
    assert len(made[1]) == 1
    assert "bad-1.0.dist-info" in made[1][0]


def test_two_distributions_with_one_backend_name(tmp_path: Path, site: Path) -> None:
    info = tmp_path / "copycat-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: copycat\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[kernelhub.backends]\nalpha = kernelhub_example_alpha:backend\n"
    )
    made = answer(
        CALL + "print(json.dumps([op(x, x, 2.0).tolist(), op.explain(x, x, 2.0).backend,"
        "[[p.name, p.distribution] for p in kernelhub.plugins.problems() if p.name == 'alpha']]))",
        site,
        tmp_path,
    )
    assert made == [[3.0] * 3, "alpha", [["alpha", "copycat 1.0"]]]


def test_the_shipped_backends_exist_without_any_metadata(tmp_path: Path) -> None:
    """A source tree that is not installed still computes."""
    (tmp_path / "kernelhub").symlink_to(ROOT / "kernelhub")
    code = (
        "from kernelhub import _entry_points\n"
        "_entry_points.read = lambda group: ([], [])\n"
        "import torch, kernelhub\n"
        "op = kernelhub.op('fused_mul_add')\n"
        "print(op(torch.ones(1), torch.ones(1), 2.0).item(), sorted(op.backends()))\n"
    )
    run = python(code, tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "3.0 ['cuda', 'musa', 'reference', 'simt']"


def test_an_interrupted_load_is_taken_up_again(site: Path) -> None:
    made = answer(
        CALL + "load = kernelhub.plugins._load_one; calls = []\n"
        "def interrupted(entry, *, shipped):\n"
        "    calls.append(entry.name)\n"
        "    if len(calls) == 2: raise KeyboardInterrupt\n"
        "    load(entry, shipped=shipped)\n"
        "kernelhub.plugins._load_one = interrupted\n"
        "try: op(x, x, 2.0)\n"
        "except KeyboardInterrupt: pass\n"
        "op(x, x, 2.0)\n"
        "print(json.dumps([op.backends(), len(kernelhub.plugins.problems())]))",
        site,
    )
    assert made == [["cuda", "musa", "simt", "alpha", "reference"], 5]


def test_odd_entries_on_the_path_are_passed_over(site: Path) -> None:
    made = answer(
        "import sys, pathlib; sys.path.append(pathlib.Path('/nowhere'))\n"
        + CALL
        + "op(x, x, 2.0); print(json.dumps(op.backends()))",
        site,
    )
    assert made == ["cuda", "musa", "simt", "alpha", "reference"]


def test_a_backend_that_declines_everything_fails_the_kit(tmp_path: Path) -> None:
    info = tmp_path / "shy-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: shy\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[kernelhub.backends]\nshy = shy:backend\n")
    (tmp_path / "shy.py").write_text(
        "from kernelhub.backend import Backend, Implementation\n"
        "from kernelhub.backends.reference.fused_mul_add import fused_mul_add\n"
        "made = Implementation('fused_mul_add', fused_mul_add, rejects=lambda call: ['shy'])\n"
        "backend = Backend('shy', (made,))\n"
    )
    run = kit("shy", tmp_path)
    assert run.returncode == 1, run.stdout + run.stderr
    assert "declines every case" in run.stdout
