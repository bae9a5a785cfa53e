"""What kernels that are brought up early do before all work before them has ended.

They may not touch memory, nor let the next kernel come. `await_last` says when the work before has
ended. ptxas keeps the order of ordinary loads, but moves those that it is told are of constant data
(`ld.global.nc`, `__ldg`) to before it.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

_WAIT = "ACQBULK"
_EARLY = re.compile(r"(LDG|LD\.|LDGSTS|UTMA|UBLKCP|STG|ST\.|ATOM|RED|PREEXIT)")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?(.*?)\s*;")


def disassembler() -> str | None:
    """nvdisasm, of the CUDA toolkit or of the package nvidia-cuda-nvdisasm."""
    spec = importlib.util.find_spec("nvidia")
    places = () if spec is None else spec.submodule_search_locations or ()
    packaged = (found for place in places for found in Path(place).glob("cu*/bin/nvdisasm"))
    return shutil.which("nvdisasm") or next(map(str, packaged), None)


def before_the_wait(cubin: Path) -> dict[str, list[str]]:
    """By kernel that waits: the instructions before the wait that should stand after it."""
    tool = disassembler()
    assert tool is not None, "nvdisasm is missing: pip install nvidia-cuda-nvdisasm"
    run = subprocess.run([tool, "-c", str(cubin)], capture_output=True, text=True, check=True)
    found = {}
    for kernel in run.stdout.split("\n\t.section\t.text.")[1:]:
        instructions = _INSTRUCTION.findall(kernel)
        wait = next((i for i, each in enumerate(instructions) if each.startswith(_WAIT)), None)
        if wait is not None:
            name = kernel.partition(",")[0]
            found[name] = [each for each in instructions[:wait] if _EARLY.match(each)]
    return found
