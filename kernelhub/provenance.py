"""Where figures come from: the versions and the commit that a report of them names."""

from __future__ import annotations

import platform
import subprocess
from datetime import date
from pathlib import Path
from typing import Any

import torch

from kernelhub import __version__


def facts() -> dict[str, Any]:
    return {
        "date": date.today().isoformat(),
        "kernelhub": __version__,
        "commit": commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def commit() -> str | None:
    """The commit of the git tree that this kernelhub runs from, None where it runs from none."""
    here = Path(__file__)
    git = ["git", "-C", str(here.parent)]
    try:
        # A package installed inside somebody's repository is not of that repository.
        if _run([*git, "ls-files", "--error-unmatch", here.name]) is None:
            return None
        return _run([*git, "describe", "--always", "--dirty", "--exclude=*"])
    except OSError:
        return None  # no git


def _run(command: list[str]) -> str | None:
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    return run.stdout.strip() if run.returncode == 0 else None
