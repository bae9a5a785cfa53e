"""Prints the largest relative error of a logit, by family, dtype and backend.

python -m tests.integrations.families [--musa]

With `--musa` on the emulated musa device too.
"""

from __future__ import annotations

import importlib
import sys

import torch
from transformers.utils import logging

import kernelhub
from kernelhub.integrations.transformers import accelerate
from tests.integrations.models import FAMILIES, make, say


def main() -> int:
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    places = [("reference", "cpu"), ("simt", "cpu")]
    if "--musa" in sys.argv[1:]:
        importlib.import_module("tests.emulation.conftest")  # gives the process its devices
        places.append(("musa", "musa"))
    print("family       dtype     backend    tokens     largest error  least gap of the best two")
    all_equal = True
    for family in FAMILIES:
        for dtype in (torch.float32, torch.bfloat16):
            model = make(family, dtype)
            stock = say(model)
            for backend, device in places:
                model.to(device)
                with kernelhub.use(backend), accelerate(model):
                    said = say(model)
                equal = torch.equal(said.tokens, stock.tokens)
                all_equal = all_equal and equal
                name = str(dtype).removeprefix("torch.")
                print(
                    f"{family:<12} {name:<9} {backend:<10} {'equal' if equal else 'DIFFER':<10} "
                    f"{said.error(stock):<14.1e} {stock.gap:.1e}"
                )
    return 0 if all_equal else 1


if __name__ == "__main__":
    raise SystemExit(main())
