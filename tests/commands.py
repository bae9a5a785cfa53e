"""Runs the command line inside the test's own process."""

from __future__ import annotations

import json
from typing import Any

from click.testing import CliRunner, Result

from kernelhub.cli import main


def run(*arguments: str, code: int = 0, **options: Any) -> Result:
    result = CliRunner().invoke(main, list(arguments), **options)
    assert result.exit_code == code, (result.output, result.exception)
    return result


def run_json(*arguments: str, code: int = 0, **options: Any) -> Any:
    return json.loads(run(*arguments, "--json", code=code, **options).stdout)
