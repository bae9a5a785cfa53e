"""Runs every case of the compiled ops on a backend, for tools that watch a process.

python tests/vendor/run_cases.py BACKEND [DEVICE] [PATTERNS [BLOCKS]]

PATTERNS are globs of CASE or OP/CASE, with commas between. One that begins with ! leaves cases out;
one that names no case is an error.
BLOCKS is how many blocks share a row in sampling, which are more than one for long rows alone; none
is held by a cluster then.
"""

from __future__ import annotations

import sys
from fnmatch import fnmatchcase

from kernelhub import plugins, registry
from kernelhub.backends.native import abi
from kernelhub.backends.native import top_k_top_p_sampling_from_probs as sampling
from kernelhub.testing import run_case


def main(backend: str, device: str = "cpu", patterns: str = "*", blocks: str = "") -> int:
    if backend == "musa_on_cuda":
        import tests.vendor.musa_on_cuda_backend  # noqa: F401
    plugins.load()
    if blocks:
        sampling.blocks_a_row = lambda batch_size, vocab_size: int(blocks)
        sampling.cluster_blocks = lambda *args: 0
    ran = failed = 0
    unused = set(patterns.split(","))
    for op in abi.OPS:
        for case in registry.spec(op).cases():
            names = (case.name, f"{op}/{case.name}")
            found = {
                p for p in patterns.split(",") if any(fnmatchcase(n, p.strip("!")) for n in names)
            }
            unused -= found
            if not found or any(p.startswith("!") for p in found):
                continue
            outcome = run_case(op, case, backend, device)
            ran += 1
            if outcome.status != "passed":
                failed += 1
                print(f"{outcome.status} {op} {case.name}: {outcome.message}")
    print(f"{ran} cases on {backend}, {failed} not passed")
    for pattern in sorted(unused):
        print(f"no case is named {pattern}")
    return 1 if failed or unused else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
