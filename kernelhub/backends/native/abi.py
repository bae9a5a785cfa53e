"""The C ABI of compiled kernels: the one table from which both sides are made.

`scripts/make_abi.py` writes `csrc/include/kernelhub/abi.h` from it, and a test compares; the
binding packs calls by it. A library carries the fingerprint of the table that it was compiled
with, and only one with the same fingerprint is loaded.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from typing import Literal

import attrs
import torch

VERSION = 1
"""Raised when the meaning of a field changes; a change of a layout shows in the fingerprint."""

MAX_DIMS = 8
"""Dimensions that a kernel takes."""

DTYPES: dict[torch.dtype, int] = {
    torch.uint8: 0x0108,
    torch.int8: 0x0008,
    torch.int32: 0x0020,
    torch.int64: 0x0040,
    torch.bool: 0x0608,
    torch.float16: 0x0210,
    torch.float32: 0x0220,
    torch.bfloat16: 0x0410,
    torch.float8_e4m3fn: 0x0A08,
}
"""Codes of dtypes: DLPack's type code in the high byte, bits in the low one."""

Kind = Literal["tensor", "int64", "float64"]

_TENSOR_FORMAT = f"Pii{MAX_DIMS}q{MAX_DIMS}q"
_FORMATS: dict[Kind, str] = {"tensor": _TENSOR_FORMAT, "int64": "q", "float64": "d"}
_C_TYPES: dict[Kind, str] = {"tensor": "kh_tensor", "int64": "int64_t", "float64": "double"}


@attrs.frozen
class Field:
    """One field of an argument struct. `note` says shape or unit in the generated header."""

    name: str
    kind: Kind
    note: str = ""


def _fields(*lines: str) -> tuple[Field, ...]:
    """Fields from lines `kind name: note`."""
    made = []
    for line in lines:
        declared, _, note = line.partition(":")
        kind, name = declared.split()
        made.append(Field(name, kind, note.strip()))  # type: ignore[arg-type]
    return tuple(made)


OPS: dict[str, tuple[Field, ...]] = {
    "rotary_embedding": _fields(
        "tensor positions: [T] or [batch, seq], int32 or int64",
        "tensor query: [T, Hq, D] or [T, Hq*D], written in place",
        "tensor key: [T, Hk, D] or [T, Hk*D], written in place; may be absent",
        "tensor cos_sin_cache: [P, rot_dim], fp32 or the dtype of query",
        "tensor cos_sin_cache_offsets: shape of positions, int32 or int64; may be absent",
        "int64 head_size: D; 0 where query has a head dimension",
        "int64 is_neox: 1 pairs lanes i and i + rot_dim/2, 0 pairs 2i and 2i + 1",
    ),
    "fused_mul_add": _fields(
        "tensor x: broadcasts to out",
        "tensor bias: broadcasts to out",
        "tensor scale: broadcasts to out; absent where scale_value holds it",
        "tensor out: written; no element twice",
        "float64 scale_value: used as fp32 where scale is absent",
    ),
    "fused_gemv": _fields(
        "tensor x: [M, K], fp32, fp16, bf16 or fp8",
        "tensor weight: [N, K] as x or fp8, or int4 [N, K/2] uint8 or int8 or [N, K/8] int32",
        "tensor x_scale: [M, groups], [M, 1] or [1], fp32; beside fp8 x",
        "tensor weight_scale: fp8: per block, [N, 1] or [1], fp32; int4: [N, K/g], any float",
        "tensor weight_zero: [N, K/g], uint8; may be absent",
        "tensor bias: [N], any float; may be absent",
        "tensor norm_weight: [N], any float; may be absent",
        "tensor out: [M, n], any float, written",
        "tensor workspace: [M, N], fp32, contiguous; beside norm_weight",
        "int64 group_size: g; 0 where weights are dense",
        "int64 activation: 0 none, 1 SwiGLU, 2 SiLU, 3 GELU (tanh)",
        "int64 tile: position in the table of tiles",
        "float64 eps: used as fp32",
    ),
    "fused_moe_gemv": _fields(
        "tensor x: [M, K], or [M*k, K] where x_per_slot; dtypes as fused_gemv",
        "tensor weight: [E, N, K], or packed int4",
        "tensor topk_ids: [M, k], int32 or int64",
        "tensor topk_weights: [M, k], any float; may be absent",
        "tensor x_scale: [rows of x, groups], [rows of x, 1] or [1], fp32; beside fp8 x",
        "tensor weight_scale: fp8: per block, [E, N, 1] or [E, 1], fp32; int4: [E, N, K/g]",
        "tensor weight_zero: [E, N, K/g], uint8; may be absent",
        "tensor out: [M, k, n], or [M, n] where reduce; any float, written",
        "tensor workspace: [M, k, n], fp32, contiguous; where reduce",
        "int64 group_size: g; 0 where weights are dense",
        "int64 activation: as fused_gemv",
        "int64 x_per_slot: 1 where each slot has a row of x",
        "int64 reduce: 1 adds up the slots of a token",
        "int64 tile: position in the table of tiles",
    ),
    "top_k_top_p_sampling_from_probs": _fields(
        "tensor probs: [R, V], fp32, fp16 or bf16",
        "tensor top_k: [R], int32 or int64; absent where top_k_value holds it",
        "tensor top_p: [R], fp32; absent where top_p_value holds it",
        "tensor min_p: [R], fp32; absent where min_p_value holds it",
        "tensor indices: [B], int32 or int64; may be absent where B is R",
        "tensor seed: [B] or [1], int64; absent where seed_value holds it",
        "tensor offset: [B] or [1], int64; absent where offset_value holds it",
        "tensor tokens: [B], int32, written",
        "tensor valid: [B], bool, written; may be absent",
        "tensor workspace: uint8, written; may be absent where blocks_a_row is 1",
        "int64 top_k_value",
        "float64 top_p_value: used as fp32",
        "float64 min_p_value: used as fp32; 0 for none",
        "int64 seed_value",
        "int64 offset_value",
        "int64 joint: 1 for filter_apply_order joint, 0 for top_k_first",
        "int64 blocks_a_row: 1, or up to 32 with a workspace; never changes a result",
        "int64 cluster_blocks: of a cluster that holds a row, where the platform has them; 0: none",
    ),
}
"""The arguments of each compiled op, in order."""

LIBRARY_FUNCTIONS = {
    "kh_abi_version": "int32_t kh_abi_version(void);",
    "kh_abi_fingerprint": "const char* kh_abi_fingerprint(void);",
    "kh_platform": "const char* kh_platform(void);",
    "kh_warp_size": "int32_t kh_warp_size(void);",
    "kh_last_error": "const char* kh_last_error(void);",
}
"""What every library exports beside its ops."""


def op_symbol(op: str) -> str:
    return f"kh_{op}"


def symbols() -> tuple[str, ...]:
    """Every name that a library must export."""
    return (*LIBRARY_FUNCTIONS, *(op_symbol(op) for op in OPS))


def packing(op: str) -> struct.Struct:
    """How the argument struct of an op is laid out: the device index, then its fields."""
    return struct.Struct("q" + "".join(_FORMATS[field.kind] for field in OPS[op]))


def _struct_lines(op: str) -> Iterator[str]:
    yield f"typedef struct kh_{op}_args {{"
    yield "  int64_t device;  // index of the device that holds every tensor"
    for field in OPS[op]:
        note = f"  // {field.note}" if field.note else ""
        yield f"  {_C_TYPES[field.kind]} {field.name};{note}"
    yield f"}} kh_{op}_args;"
    yield f"int32_t {op_symbol(op)}(const kh_{op}_args* args, void* stream);"


def _body() -> str:
    lines = [
        f"#define KH_ABI_VERSION {VERSION}",
        f"#define KH_MAX_DIMS {MAX_DIMS}",
        "",
        "// DLPack's type code in the high byte, bits in the low one.",
        "enum kh_dtype {",
        *(
            f"  KH_{str(dtype).removeprefix('torch.').upper()} = {code:#06x},"
            for dtype, code in DTYPES.items()
        ),
        "};",
        "",
        "// dtype 0 is an absent tensor. Strides count elements.",
        "typedef struct kh_tensor {",
        "  void* data;",
        "  int32_t dtype;",
        "  int32_t ndim;",
        "  int64_t shape[KH_MAX_DIMS];",
        "  int64_t stride[KH_MAX_DIMS];",
        "} kh_tensor;",
        "",
        "#ifdef __cplusplus",
        'extern "C" {',
        "#endif",
        "",
        *LIBRARY_FUNCTIONS.values(),
    ]
    for op in OPS:
        lines += ["", *_struct_lines(op)]
    lines += ["", "#ifdef __cplusplus", "}", "#endif"]
    return "\n".join(lines)


def fingerprint() -> str:
    """Tells tables apart: two libraries with one fingerprint take the same calls."""
    return hashlib.sha256(_body().encode()).hexdigest()[:16]


def header() -> str:
    """The text of `abi.h`."""
    return f"""\
// SPDX-License-Identifier: Apache-2.0
// Generated by scripts/make_abi.py from kernelhub/backends/native/abi.py. Do not edit.
//
// The C ABI of the compiled kernels. Each function queues its work on `stream` and returns 0, or an
// error code whose text is `kh_last_error()` on the same thread. None allocates, waits or throws.
#pragma once
#include <stdint.h>

#define KH_ABI_FINGERPRINT "{fingerprint()}"
{_body()}
"""
