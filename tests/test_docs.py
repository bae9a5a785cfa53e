"""The documentation is true: its Python runs, its output is what that prints, its links lead on.

In *.md and docs/*.md, the blocks marked `python` of one file run in order, in one process of their
own. A block marked `output` holds lines that they print, in order. Anything else (a fragment, a
shell command, output of another machine) carries another mark.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]

_FENCE = re.compile(r"^```(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_RUN = "import sys; exec(compile(sys.stdin.read(), sys.argv[1], 'exec'), {'__name__': 'page'})"


def blocks(text: str, mark: str) -> list[str]:
    return [body for found, body in _FENCE.findall(text) if found == mark]


def program(text: str) -> str:
    """The Python blocks of a page, each on the lines where the page has it."""
    lines = [""] * (text.count("\n") + 1)
    for block in _FENCE.finditer(text):
        if block[1] == "python":
            first = text.count("\n", 0, block.start(2))
            body = block[2].splitlines()
            lines[first : first + len(body)] = body
    return "\n".join(lines)


def anchors(page: Path) -> set[str]:
    """What `#...` may name on a page: its headings, as GitHub spells them."""
    prose = _FENCE.sub("", page.read_text())
    titles = re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_python_runs_and_prints_what_is_shown(page: Path, tmp_path: Path) -> None:
    text = page.read_text()
    if not blocks(text, "python"):
        return
    if "from transformers import" in text:
        pytest.importorskip("transformers", reason="the extra e2e is not installed")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("KERNELHUB_")}
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", _RUN, str(page.relative_to(ROOT))],
        input=program(text),
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": str(ROOT)},
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    end = 0
    for shown in blocks(text, "output"):
        at = run.stdout.find(shown, end)
        assert at >= 0, f"the page shows\n{shown}\nbut its Python prints\n{run.stdout[end:]}"
        end = at + len(shown)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page: Path) -> None:
    for link in _LINK.findall(_FENCE.sub("", page.read_text())):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link}: no such file"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{link}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_fences_are_closed(page: Path) -> None:
    fences = re.findall(r"^```.*$", page.read_text(), re.MULTILINE)
    assert all(fence == "```" for fence in fences[1::2]) and len(fences) % 2 == 0


def test_a_program_keeps_its_lines() -> None:
    page = "# title\n\n```python\na = 1\n```\n\n```output\n1\n```\n\n```python\nprint(a)\n```\n"
    assert program(page).splitlines()[3] == "a = 1"
    assert program(page).splitlines()[11] == "print(a)"
    assert blocks(page, "output") == ["1\n"]
