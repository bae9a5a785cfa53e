"""Mistakes 2 to 5, each in an otherwise plausible backend."""

from __future__ import annotations

from typing import Any

from kernelhub.backend import Backend, Implementation

HERE = "kernelhub_example_broken.mistakes"


def fused_mul_add(x: Any, bias: Any, scale: Any, *, out: Any = None) -> Any:
    return x * scale + bias


def scale_in_front(scale: Any, x: Any, bias: Any) -> Any:
    return x * scale + bias


# 2: the op is called fused_mul_add; under this name nobody could ever call it.
unknown_op = Backend(
    name="unknown_op",
    implementations=(Implementation("musa_fused_mul_add", f"{HERE}:fused_mul_add"),),
)

# 3: other parameters than the op's.
wrong_signature = Backend(
    name="wrong_signature",
    implementations=(Implementation("fused_mul_add", f"{HERE}:scale_in_front"),),
)

# 4: written for a backend API that this kernelhub does not have.
future_api = Backend(
    name="future_api",
    api_version=1000,
    implementations=(Implementation("fused_mul_add", f"{HERE}:fused_mul_add"),),
)

# 5: declared, but nothing behind it.
no_function = Backend(
    name="no_function",
    implementations=(Implementation("fused_mul_add", f"{HERE}:fused_mul_add_kernel"),),
)
