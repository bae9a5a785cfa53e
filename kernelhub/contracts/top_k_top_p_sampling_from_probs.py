"""top_k_top_p_sampling_from_probs: one token per sample, exactly reproducible on every backend."""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from kernelhub.backends.reference.top_k_top_p_sampling_from_probs import (
    top_k_top_p_sampling_from_probs as _reference,
)
from kernelhub.contracts._cases import every_second, misaligned, padded_rows, transposed
from kernelhub.errors import ArgumentError
from kernelhub.spec import Args, Case, Cost, Expected, OpSpec, Param, TensorDesc, is_tensor

NAME = "top_k_top_p_sampling_from_probs"
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
INTS = (torch.int32, torch.int64)
VOCAB_LIMIT = 2**19  # a row's mass, up to 2^44 a token, stays below 2^63


def top_k_top_p_sampling_from_probs(
    probs: Tensor,
    top_k: int | Tensor,
    top_p: float | Tensor,
    *,
    min_p: float | Tensor | None = None,
    indices: Tensor | None = None,
    filter_apply_order: Literal["top_k_first", "joint"] = "top_k_first",
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
    offset: int | Tensor | None = None,
    return_valid: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Draw one token per sample from the probabilities that top-k, top-p and min-p keep.

    The same probabilities, seed and offset give the same tokens on every backend, alone or in a
    batch. All masses are integers, `q_i = floor(clamp(p_i, 0, 1) * 2^44)`, with p as fp32.

    Kept by `"joint"`: token i where `#{j: p_j > p_i} < top_k` and
    `mass{j: p_j > p_i} < top_p * mass{all}`. By `"top_k_first"`: the top-k rule, then the top-p
    rule with the survivors' mass for `mass{all}`. By both, where `min_p` is given, only where
    `p_i >= min_p * max_j p_j`. Ties are kept together, and the largest token always is.

    Drawn: the first kept token, in index order, at which the running mass of the kept tokens
    exceeds `floor(u * S / 2^64)`, S their total mass and u 64 random bits.

    Args:
        probs: probabilities `[R, V]`; fp32, fp16 or bf16; any strides; need not sum to 1.
            V below 2^19, so that a row's mass fits 64 bits.
        top_k: number of largest tokens to keep: an int, or int32 or int64 `[R]`. `<= 0` or `>= V`
            keeps all.
        top_p: share of the mass to keep, in (0, 1]: a float (used as fp32), or fp32 `[R]`, clamped
            to the range. `2^-24` or less keeps the maximum and its ties.
        min_p: share of the largest probability that a token must have, in [0, 1]: a float (used as
            fp32), or fp32 `[R]`, clamped to the range.
        indices: int32 or int64 `[B]`: sample b reads row `indices[b]` of `probs` and of the
            per-row parameters. B may exceed R. Without it B is R and sample b reads row b.
        filter_apply_order: `"top_k_first"` or `"joint"`.
        deterministic: accepted for compatibility; the result is the same.
        generator: torch's generator on the device of `probs` that a seed is drawn from where none
            is passed; the device's default generator without it.
        seed: a signed 64-bit int, or int64 `[1]` or `[B]`, read on the device. Sample b uses stream
            b of it; with one seed per sample, `[B]`, stream 0, so that a request's token does not
            depend on its place in the batch. (At B = 1 both are stream 0.)
        offset: where in a seed's sequence to draw, 0 unless given: a signed 64-bit int, or int64
            `[1]` or `[B]`, whichever form `seed` has. Raise it by one a step.
        return_valid: also return which samples could be drawn.

    Returns:
        Tokens int32 `[B]`; with `return_valid` a pair of these and bool `[B]`. Where a row has no
        mass or holds a NaN or an infinity, where its top_p or min_p is NaN, or where an index is
        outside [0, R), the token is 0 and valid is False.

    Raises:
        ArgumentError: a scalar `top_p` or `min_p` is out of its range, a parameter's shape is not
            as above, V is 0 or too large, `generator` is on another device or joined by `seed`,
            `offset` comes without `seed`.

    Supported:
        reference: any device
        cuda, musa: devices of their own
        simt: CPU tensors, for tests

    Cost: reads the sampled rows once, writes the tokens; 2 operations a probability.
    Definition: u is the first two words of Philox4x32-10 (Salmon et al., SC 2011), low word first,
    under the key (seed low, seed high) at the counter (offset low, offset high, stream low, stream
    high). `mass < top_p * total` is decided as `mass * 2^24 < floor(top_p * 2^24) * total` in
    integers, the floor at least 1; `min_p * max` is one fp32 product. Names and order as in
    FlashInfer.
    """
    raise NotImplementedError


def _batch_size(a: Args) -> int:
    size: int = a.probs.shape[0] if a.indices is None else a.indices.shape[0]
    return size


def check(a: Args) -> None:
    num_rows, vocab_size = a.probs.shape
    batch_size = _batch_size(a)
    if vocab_size >= VOCAB_LIMIT:
        expected = "[R, V] with V < 2^19, so that a row's mass fits 64 bits"
        raise ArgumentError(NAME, "probs", expected, a.probs)
    if vocab_size == 0 and batch_size > 0:
        raise ArgumentError(NAME, "probs", "[R, V] with V > 0, as there are samples", a.probs)
    for name in ("top_k", "top_p", "min_p"):
        value = getattr(a, name)
        if is_tensor(value) and value.shape[0] != num_rows:
            raise ArgumentError(NAME, name, f"shape [R] = [{num_rows}]", value)
    # Written so that NaN fails.
    if not is_tensor(a.top_p) and not 0 < a.top_p <= 1:
        raise ArgumentError(NAME, "top_p", "a share in (0, 1]", a.top_p)
    if a.min_p is not None and not is_tensor(a.min_p) and not 0 <= a.min_p <= 1:
        raise ArgumentError(NAME, "min_p", "a share in [0, 1]", a.min_p)
    for name in ("seed", "offset"):
        value = getattr(a, name)
        if is_tensor(value) and value.shape[0] != 1 and value.shape[0] != batch_size:
            raise ArgumentError(NAME, name, f"shape [B] = [{batch_size}] or [1]", value)
    if a.offset is not None and a.seed is None:
        raise ArgumentError(NAME, "offset", "None, as there is no 'seed'", a.offset)
    if a.generator is not None:
        if a.seed is not None:
            raise ArgumentError(NAME, "generator", "None, as 'seed' is given", a.generator)
        _check_generator(a)


def _check_generator(a: Args) -> None:
    theirs, ours = a.generator.device, a.probs.device
    apart = theirs.index is not None and ours.index is not None and theirs.index != ours.index
    if theirs.type != ours.type or apart:
        expected = f"a generator on {ours}, the device of 'probs'"
        raise ArgumentError(NAME, "generator", expected, f"one on {theirs}")


def outputs(a: Args) -> tuple[TensorDesc, ...]:
    shape, device = (_batch_size(a),), a.probs.device
    tokens = TensorDesc(shape, torch.int32, device)
    return (tokens, TensorDesc(shape, torch.bool, device)) if a.return_valid else (tokens,)


def finish(a: Args, results: Sequence[Any]) -> Any:
    return tuple(results) if a.return_valid else results[0]


def oracle(a: Args, chain: int | None = None) -> tuple[Expected, ...]:
    """The definition in Python's integers, row by row and sample by sample."""
    num_rows = a.probs.shape[0]
    batch_size = _batch_size(a)
    rows = list(range(num_rows)) if a.indices is None else a.indices.tolist()
    seeds = _per_sample(a.seed, batch_size)
    offsets = _per_sample(a.offset, batch_size)
    one_stream = is_tensor(a.seed) and len(a.seed) == batch_size
    running: dict[int, list[int]] = {}
    draws = []
    for sample, row in enumerate(rows):
        draw = None
        if 0 <= row < num_rows:
            if row not in running:
                running[row] = _running_mass(a, row)
            u = _uniform(seeds[sample], offsets[sample], 0 if one_stream else sample)
            draw = _draw(running[row], u)
        draws.append(draw)
    tokens = torch.tensor([draw or 0 for draw in draws], dtype=torch.float64)
    valid = torch.tensor([draw is not None for draw in draws], dtype=torch.float64)
    exact = torch.zeros(())
    expected = (Expected("tokens", tokens, exact), Expected("valid", valid, exact))
    return expected if a.return_valid else expected[:1]


def _per_sample(value: int | Tensor | None, batch_size: int) -> list[int]:
    if not isinstance(value, Tensor):
        return [value or 0] * batch_size
    values: list[int] = value.tolist()
    return values * batch_size if len(values) == 1 else values


def _of_row(value: Any, row: int) -> Any:
    return value[row].item() if isinstance(value, Tensor) else value


def _fp32(value: float) -> float:
    rounded: float = struct.unpack("f", struct.pack("f", value))[0]
    return rounded


def _quantised(p: float) -> int:
    return min(max(math.floor(p * 2.0**44), 0), 2**44)


def _running_mass(a: Args, row: int) -> list[int]:
    """Running mass of the support, in index order; empty where the row cannot be sampled."""
    probs: list[float] = a.probs[row].float().tolist()
    top_p, min_p = _of_row(a.top_p, row), _of_row(a.min_p, row)
    if math.isnan(top_p) or (min_p is not None and math.isnan(min_p)):
        return []
    if not all(map(math.isfinite, probs)):
        return []
    portion = max(math.floor(_fp32(min(max(top_p, 0.0), 1.0)) * 2**24), 1)
    top_k = _of_row(a.top_k, row)
    if not 0 < top_k < len(probs):
        top_k = len(probs)
    least = -math.inf
    if min_p is not None:
        least = _fp32(_fp32(min(max(min_p, 0.0), 1.0)) * max(probs))  # exact before it is rounded

    # (value, how many are greater, mass of those, mass of these), from the largest value down.
    groups = []
    count_greater = mass_greater = 0
    for value, count in sorted(Counter(probs).items(), reverse=True):
        mass = count * _quantised(value)
        groups.append((value, count_greater, mass_greater, mass))
        count_greater += count
        mass_greater += mass
    survivors = [group for group in groups if group[1] < top_k]
    total = sum(group[3] for group in (groups if a.filter_apply_order == "joint" else survivors))
    support = {
        value
        for value, _, greater, _ in survivors
        if greater * 2**24 < portion * total and value >= least
    }
    running, mass = [], 0
    for p in probs:
        mass += _quantised(p) if p in support else 0
        running.append(mass)
    return running


def _draw(running: list[int], u: int) -> int | None:
    if not running or running[-1] == 0:
        return None
    target = (u * running[-1]) >> 64
    return next(token for token, mass in enumerate(running) if mass > target)


def _uniform(seed: int, offset: int, stream: int) -> int:
    """64 random bits: the first two words of Philox4x32-10."""
    mask = 2**32 - 1
    key = [seed & mask, (seed >> 32) & mask]
    counter = [offset & mask, (offset >> 32) & mask, stream & mask, (stream >> 32) & mask]
    for _ in range(10):
        first, second = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [
            (second >> 32) ^ counter[1] ^ key[0],
            second & mask,
            (first >> 32) ^ counter[3] ^ key[1],
            first & mask,
        ]
        key = [(key[0] + 0x9E3779B9) & mask, (key[1] + 0xBB67AE85) & mask]
    return counter[0] + (counter[1] << 32)


def cost(a: Args) -> Cost:
    num_rows, vocab_size = a.probs.shape
    read_rows = min(num_rows, _batch_size(a))
    read = read_rows * vocab_size * a.probs.element_size()
    for name in ("top_k", "top_p", "min_p", "indices", "seed", "offset"):
        value = getattr(a, name)
        if is_tensor(value):
            read += value.numel() * value.element_size()
    write = sum(result.numel() * result.element_size() for result in outputs(a))
    return Cost(read, write, 2 * read_rows * vocab_size)


def _model_probs(g: torch.Generator, rows: int, vocab_size: int, sharpness: float = 3.0) -> Tensor:
    """Probabilities of a language model's shape: a few large, a long tail."""
    return torch.softmax(torch.randn(rows, vocab_size, generator=g) * sharpness, dim=-1)


def _of_mass(*rows: Sequence[float]) -> Tensor:
    """Probabilities whose integer masses are these: where one unit too many or few shows."""
    return (torch.tensor(rows, dtype=torch.float64) * 2.0**-44).float()


def _ones(vocab_size: int, rows: int = 1) -> Tensor:
    """Masses 1: the running mass is the index + 1, so the token drawn is the target itself."""
    return _of_mass([1] * vocab_size).expand(rows, vocab_size)


def _before(value: float) -> float:
    """The fp32 next below fp32(value), for positive values."""
    bits: int = struct.unpack("i", struct.pack("f", value))[0]
    below: float = struct.unpack("f", struct.pack("i", bits - 1))[0]
    return below


_Kind = Literal["typical", "boundary", "hostile"]


def _case(
    kind: _Kind,
    name: str,
    probs: Any,
    *,
    draws: int | None = None,
    error: str | None = None,
    **arguments: Any,
) -> Case:
    """A case with the filters off and seed 7 where not given otherwise.

    `probs` is a tensor or makes one. `draws` samples every row that often, which shows each token
    of a small support, and asks for `valid` too.
    """

    def make(g: torch.Generator) -> dict[str, Any]:
        made = probs(g) if callable(probs) else probs
        call = {"probs": made, "top_k": 0, "top_p": 1.0, "seed": 7, **arguments}
        if draws is not None:
            call |= {"indices": torch.arange(len(made)).repeat(draws), "return_valid": True}
        # deepcopy keeps strides, which clone does not.
        return {n: deepcopy(v) if isinstance(v, Tensor) else v for n, v in call.items()}

    return Case(name, kind, make, error)


def _tag(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def cases() -> Iterator[Case]:
    yield from _typical()
    yield from _exact()
    yield from _layouts()
    yield from _randomness()
    yield from _bad_data()
    yield from _bad_calls()


def _typical() -> Iterator[Case]:
    case = partial(_case, "typical")
    for model, vocab_size, rows, top_k, top_p in (
        ("llama2-7b", 32000, 2, 40, 0.95),
        ("gpt2", 50257, 2, 50, 0.9),
        ("llama3-8b", 128256, 1, 0, 0.9),
        ("qwen3-30b", 151936, 1, 20, 0.95),
    ):
        probs = partial(_model_probs, rows=rows, vocab_size=vocab_size)
        name = f"{model}-b{rows}-k{top_k}-p{top_p}"
        yield case(name, probs, top_k=top_k, top_p=top_p, seed=1234, offset=5)
    requests: dict[str, Any] = {
        "top_k": torch.tensor([0, 1, 2, 5, 20, 100, 1000, 3000, 3001]),
        "top_p": torch.tensor([0.9, 0.9, 0.6, 0.5, 1.0, 0.99, 0.8, 0.1, 0.3]),
        "min_p": torch.tensor([0.0, 0.0, 0.1, 0.2, 0.0, 0.01, 0.001, 0.5, 0.0]),
        "seed": torch.arange(9) * 12345678901 - 7,
        "offset": torch.arange(9) * 1000,
        "return_valid": True,
    }
    for dtype in FLOATS:
        for order in ("top_k_first", "joint"):
            probs = partial(_laid_out, dtype, Tensor.contiguous, (9, 3001))
            name = f"requests-b9-v3001-{order}-{_tag(dtype)}"
            yield case(name, probs, **requests, filter_apply_order=order)


def _exact() -> Iterator[Case]:
    """One unit of mass, one token or one place too many or few gives another token."""
    case = partial(_case, "boundary")
    for vocab_size in (1, 2, 31, 33, 127, 129, 255, 257, 1023, 1025, 3000):
        yield case(f"token-is-target-v{vocab_size}", _ones(vocab_size), draws=24)
    for order in ("top_k_first", "joint"):
        for name, top_p, masses in (
            # fp32(0.6) * 2^24 = 10066330, so 5 * top_p is just above 3: the second value is kept.
            ("just-above", 0.6, [3, 1, 1]),
            # The share is not rounded to a multiple of 2^-24 but cut to one: 2684357 is dropped.
            ("floor", 3355443.75 * 2.0**-24, [2684354, 3355443, *[2684354] * 3, 2684357]),
            # 0.75 * total = 16777215.75, which 24 bits cannot tell from the first value's mass.
            ("wider-than-fp32", 0.75, [5592406, 2**24 - 1]),
            ("tie", 0.5, [1, 2, 1]),  # mass 2 of 4 is not below the share
            ("tie-missed-by-one", 0.5 + 2.0**-24, [1, 2, 1]),
            ("all-but-the-last", 1.0 - 2.0**-24, [2**24 - 1, 1, 1]),
            ("least", 2.0**-24, [1, 3, 2, 3]),
            ("below-least", 1e-30, [1, 3, 2, 3]),
            ("large-masses", 0.7, [2**44, 2**43, 2**43 - 2**20, 2**42, 2**42, 2**20]),
        ):
            probs = _of_mass(masses)
            yield case(f"share-{name}-{order}", probs, draws=48, top_p=top_p,
                       filter_apply_order=order)  # fmt: skip
        # The first value reaches half of the two survivors' mass 5, but not of all mass 8.
        yield case(f"order-matters-{order}", _of_mass([1, 2, 3, 1, 1]), draws=48, top_k=2,
                   top_p=0.5, filter_apply_order=order)  # fmt: skip
    for top_k in (-1, 0, 1, 2, 3, 4, 5, 6, 7, 8, 2**40):
        yield case(f"ties-k{top_k}", _of_mass([2, 5, 3, 0, 2, 3, 3]), draws=48, top_k=top_k)
    # Of the survivors 5, 3, 3, 3 (mass 14) half takes one 3, and so all.
    yield case("ties-k-and-p", _of_mass([2, 5, 3, 0, 2, 3, 3]), draws=48, top_k=2, top_p=0.5)
    for min_p in (0.0, 0.25, 0.25 + 2.0**-25, 0.5, 1.0):
        yield case(f"min-p-{min_p:.8f}", _of_mass([4, 1, 3, 2, 4, 0]), draws=48, min_p=min_p)
    similar = (1 + torch.arange(8) * 2.0**-12)[None] / 16  # within 1 in 256 of each other
    yield case("min-p-among-close-values", similar, draws=48, top_k=6, min_p=1 - 2.0**-11)
    one = torch.tensor([[1.0, 2.0**-10, 2.0**-10]], dtype=torch.bfloat16)
    # Of these seeds' targets all lie above 1 / 1.00195: only the first value may be drawn.
    yield case("share-of-one-bfloat16", one, top_p=0.998, seed=torch.tensor([39, 95, 377, 546]),
               indices=torch.zeros(4, dtype=torch.int64))  # fmt: skip
    # The product in fp32 is a rounding away from the exact one, to either side.
    largest = torch.tensor([[3.0], [5.0], [7.0], [11.0], [1.0]])
    at = torch.tensor([_fp32(_fp32(0.1) * value) for value in largest[:, 0].tolist()])[:, None]
    near = torch.cat((largest, at.nextafter(largest), at, at.nextafter(-largest)), 1)
    yield case("min-p-product-rounded", near / 16, draws=64, min_p=0.1)
    yield case("above-one-ranks-by-value",
               torch.tensor([[1.5, 3.0, 1.0, 2.0], [1.0, 1.0, 1e30, 1.0]]),
               draws=48, top_k=2)  # fmt: skip
    yield case("least-of-min-p-beside-two", torch.tensor([[2.0, 0.5, 0.25, 0.5]]), draws=48,
               min_p=0.25)  # fmt: skip
    yield case("least-mass-filtered", _ones(600), draws=12, top_k=5, top_p=0.5)
    empty = [[-3.0, 1e-14, 0.25, -0.0, 1e-40, 0.5], [1e-40, -1.0, 0.0, 1e-3, 0.0, 0.0]]
    yield case("zero-mass-tokens", torch.tensor(empty), draws=48, top_k=4, top_p=0.9)
    edges = (0, 1, 31, 32, 63, 64, 127, 128, 255, 256, 511, 512, 1023, 1024, 1499, 1500)
    spikes = torch.nn.functional.one_hot(torch.tensor(edges), 1501).float()
    yield case("spikes", spikes, top_k=50, top_p=0.9)
    yield case("spikes-over-a-floor", spikes / 4 + 0.5 / 1501, top_k=torch.arange(16) * 100,
               top_p=0.4)  # fmt: skip
    yield case("quantised-values", lambda g: torch.randint(0, 9, (6, 45), generator=g) / 64,
               draws=12, top_k=12, top_p=0.75)  # fmt: skip
    equal = torch.full((2, 1000), 1e-3, dtype=torch.float16)
    yield case("all-equal", equal, draws=12, top_k=3, top_p=0.1)
    yield case("masses-are-cut", _of_mass([1.9, 2.5, 0.99, 1.99, 2.0]), draws=48, top_p=0.8)
    # With these seeds the target lies within S / 2^28 of the first or last mass of a token: sums in
    # fp32 draw its neighbour.
    uneven = _of_mass([((i * 2654435761) % 2**24 | 1) << 10 for i in range(3000)])
    close = [5583376, 8045831, 4924921, 4145840, 2800879, 6343328]  # last
    close += [6140338, 2716136, 5234994, 3516059, 2942477, 4003061]  # first
    yield case("target-next-to-a-boundary", uneven, seed=torch.tensor(close),
               indices=torch.zeros(12, dtype=torch.int32))  # fmt: skip
    # More values than a kernel may care to list lie close to the threshold.
    for order in ("top_k_first", "joint"):
        yield case(f"crowded-{order}", _crowded, draws=4,
                   top_k=torch.tensor([0, 6000, 7000, 4500, 5000]),
                   top_p=torch.tensor([0.9, 0.8, 1.0, 0.3, 1e-5]),
                   min_p=torch.tensor([0.0, 0.9992, 0.0, 0.9999, 0.0]),
                   filter_apply_order=order)  # fmt: skip
        yield case(f"long-rows-{order}", _long_rows,
                   top_k=torch.tensor([50, 20000, 30000, 0, 0, 3000, 0, 9, 5]),
                   top_p=torch.tensor([0.9, 0.6, 0.999, 1.0, 0.9, 0.8, 1.0, 0.9, 0.9]),
                   min_p=torch.tensor([0.0, 0.0, 0.0, 0.0, 0.3, 0.4, 0.0, 0.0, 0.0]),
                   indices=torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, -1, 3, 5, 5]),
                   filter_apply_order=order, return_valid=True)  # fmt: skip
    yield case("long-rows-unfiltered", _long_rows, return_valid=True)
    # A look at some of a row's elements tells little of these, or something wrong.
    for order in ("top_k_first", "joint"):
        yield case(f"misleading-{order}", _misleading, draws=2,
                   top_k=torch.tensor([0, 0, 0, 300, 700, 0, 800, 5000, 30, 0, 2800, 0, 0, 5500]),
                   top_p=torch.tensor([0.9, 0.9, 0.5, 1, 1, 0.6, 1, 0.7, 0.9, 1, 1, 0.9, 0.5, 1]),
                   min_p=torch.tensor([0, 0, 0.01, 0, 0, 0, 0, 0, 0.5, 0.9, 0, 0, 0, 0]),
                   filter_apply_order=order)  # fmt: skip
    # Elements that are not looked at are other than those that are; each sample has one block.
    for name, rows in (("many", _hidden_many), ("large", _hidden_large)):
        yield case(f"hidden-{name}", rows, top_k=40 if name == "many" else 0, top_p=0.5,
                   indices=torch.zeros(130, dtype=torch.int64))  # fmt: skip
    # So many samples that each has a block of its own, which reads its row in several steps.
    yield case("long-row-often", partial(_model_probs, rows=1, vocab_size=25001), draws=130,
               top_k=2000, top_p=0.99)  # fmt: skip
    # The same with few to keep, told by the largest values of groups.
    for order in ("top_k_first", "joint"):
        yield case(f"few-of-long-rows-often-{order}", _few_of_long_rows,
                   top_k=torch.tensor([60, 5, 200]), top_p=torch.tensor([0.5, 0.9, 0.7]),
                   indices=torch.arange(130) % 3, filter_apply_order=order)  # fmt: skip
    yield case("masses-near-2^63", torch.ones(1, 20000), top_p=0.999, seed=-3,
               indices=torch.zeros(3, dtype=torch.int64))  # fmt: skip


def _crowded(g: torch.Generator, vocab_size: int = 9000) -> Tensor:
    """Nearly equal values, in the first row about a half; the last row has nine of them."""
    probs = (1 + torch.rand(5, vocab_size, generator=g) * 1e-3) / vocab_size
    probs[0] *= vocab_size / 2
    probs[4] = probs[4, :9].repeat(vocab_size)[:vocab_size]
    return probs


def _misleading(g: torch.Generator, vocab_size: int = 9002) -> Tensor:
    """Rows that sum to 3 and to 1/50, that hold their mass in every third group of 8 elements or in
    the other two, ties on both sides of every mark, few elements with mass, and ranked ones."""
    flat = _model_probs(g, 14, vocab_size, 0.5)
    groups = torch.arange(vocab_size) // 8 % 3
    flat[0] *= 3
    flat[1] /= 50
    flat[2:5] *= torch.where(groups == 1, 3.0, 1e-6)
    flat[4, 5], flat[4, 6] = -1.0, 1.5
    flat[5] = (1 + torch.arange(vocab_size) % 7) / (4 * vocab_size)
    flat[6, 500:] = 0.0
    flat[7] = flat[7].sort(descending=True).values
    flat[8] = flat[8].sort().values
    flat[10] *= torch.where(groups == 1, 3.0, 1e-6)
    flat[11] *= torch.where(groups == 0, 0.3, 1.35)
    flat[12] *= torch.where(groups == 0, 1e-6, 1.5)
    flat[13, ::2] *= groups[::2] != 0
    return flat


_LOOKED_AT = torch.arange(9002) // 32 % 3 == 0  # of a row of fp32


def _hidden_many(g: torch.Generator) -> Tensor:
    """Of what is looked at few are large, of the rest all."""
    probs = 1e-4 * (1 + torch.rand(1, 9002, generator=g) * 1e-3)
    few = torch.arange(9002) < 320
    return probs * torch.where(_LOOKED_AT & ~few, 1e-4, 1.0)


def _hidden_large(g: torch.Generator) -> Tensor:
    """Two values that are not looked at have most of the mass."""
    probs = (0.5 + torch.rand(1, 9002, generator=g)) / 9002
    probs[0, [40, 8972]] = 1.0
    assert not _LOOKED_AT[[40, 8972]].any()
    return probs


def _long_rows(g: torch.Generator) -> Tensor:
    """Rows of odd length, for several blocks each: ordinary, crowded, spikes, none and bad ones."""
    vocab_size = 40001
    probs = torch.zeros(9, vocab_size)
    probs[:1] = _model_probs(g, 1, vocab_size)
    probs[1:6] = _crowded(g, vocab_size)
    probs[5] = torch.rand(vocab_size, generator=g) ** 9
    probs[5, 30000], probs[6, -1] = 2.0, 1e-3
    probs[7:] = _model_probs(g, 2, vocab_size, 1.0)
    probs[7, 39000], probs[8, 17] = math.nan, -math.inf
    return probs


def _few_of_long_rows(g: torch.Generator) -> Tensor:
    """Peaked, with values above 1 and below 0, flat."""
    probs = _model_probs(g, 3, 25001, 3.0)
    probs[1, 100:25000:2700], probs[1, 7:25000:3000] = 1.25, -0.5
    probs[2] = torch.rand(25001, generator=g) / 12500
    return probs


def _laid_out(
    dtype: torch.dtype, layout: Callable[[Tensor], Tensor], shape: tuple[int, int],
    g: torch.Generator,
) -> Tensor:  # fmt: skip
    return layout(_model_probs(g, *shape, sharpness=1.0).to(dtype))


def _expanded(t: Tensor) -> Tensor:
    """The first row at every row, stride 0."""
    return t[:1].expand(t.shape)


def _layouts() -> Iterator[Case]:
    case = partial(_case, "boundary")
    for dtype in (torch.float32, torch.bfloat16):
        for layout in (padded_rows, transposed, every_second, misaligned, _expanded):
            probs = partial(_laid_out, dtype, layout, (6, 777))
            name = f"{layout.__name__.strip('_')}-{_tag(dtype)}"
            yield case(name, probs, top_k=500, top_p=0.9, seed=11)
    for kind in INTS:
        yield case(
            f"strided-parameters-{_tag(kind)}",
            partial(_model_probs, rows=5, vocab_size=333, sharpness=1.0),
            top_k=every_second(torch.tensor([300, 1, 5, 100, 0], dtype=kind)),
            top_p=every_second(torch.tensor([0.3, 0.9, 1.0, 0.5, 0.99])),
            min_p=every_second(torch.tensor([0.1, 0.0, 0.2, 0.01, 0.05])),
            indices=every_second(torch.tensor([4, 4, 0, 3, 2, 1, 1, 0, 3, 2], dtype=kind)),
            seed=every_second(torch.arange(10) - 5),
            offset=every_second(torch.arange(10) * 2**33),
            return_valid=True,
        )
    none = torch.empty(0, dtype=torch.int64)
    yield case("no-samples", torch.ones(3, 8), top_k=2, indices=none.int(), return_valid=True)
    for vocab_size in (0, 8):
        yield case(f"no-rows-v{vocab_size}", torch.empty(0, vocab_size), top_k=none,
                   top_p=none.float(), seed=none)  # fmt: skip


def _randomness() -> Iterator[Case]:
    """Seeds as ints and `[1]` number their streams, seeds `[B]` do not; whatever the offsets."""
    case = partial(_case, "boundary")
    seeds: list[tuple[str, Any]] = [(f"{seed}", seed) for seed in (0, -1, 2**63 - 1, -(2**63))]
    seeds += [("one", torch.tensor([2**40 + 3])), ("each", torch.tensor([5, 5, 5, 6, -1, 2**62]))]
    offsets: list[tuple[str, Any]] = [("none", None), ("high-word", 2**32), ("-1", -1)]
    offsets += [("one", torch.tensor([2**33 + 1]))]
    offsets += [("each", torch.tensor([0, 1, 1, 0, 2**32, -(2**63)]))]
    for seed_name, seed in seeds:
        for offset_name, offset in offsets:
            name = f"seed-{seed_name}-offset-{offset_name}"
            yield case(name, _ones(2999, rows=6), seed=seed, offset=offset)
    one = torch.tensor([9])
    yield case("batch-of-one-has-stream-0", _ones(2999), seed=one, offset=one)
    probs = partial(_model_probs, rows=3, vocab_size=50, sharpness=1.0)
    yield case("more-samples-than-rows", probs, draws=100, top_k=20, top_p=0.8)
    yield case("not-deterministic", probs, draws=20, top_k=20, top_p=0.8, deterministic=False)


def _bad_data() -> Iterator[Case]:
    case = partial(_case, "hostile")
    inf, nan = math.inf, math.nan
    for name, row in {
        "nan": [nan, 0.5, 0.5],
        "nan-with-sign": [0.5, 0.5, -nan],
        "inf": [0.5, inf, 0.25],
        "minus-inf": [0.5, 0.5, -inf],
        "zero": [0.0, -0.0, 0.0],
        "negative": [-1.0, -0.5, -1e30],
        "too-small": [1e-15, 5e-14, 1e-45],
        "huge": [3e38, 3e38, -3e38],
    }.items():
        probs = torch.tensor([[0.25, 0.5, 0.25], row, [0.125, 0.125, 0.75]])
        yield case(f"row-{name}", probs, draws=8)
        yield case(f"row-{name}-filtered", probs, draws=8, top_k=2, top_p=0.5, min_p=0.2)
    for dtype in (torch.float16, torch.bfloat16):
        probs = torch.tensor([[0.25, nan], [0.5, 0.5], [1.0, inf]]).to(dtype)
        yield case(f"row-nan-{_tag(dtype)}", probs, draws=8, top_p=0.9)
    masses = [4, 1, 3, 2, 4, 0]
    odd = torch.tensor([nan, inf, -inf, -1.0, 2.0, 0.0, 1e-40, 0.5])
    probs = _of_mass(masses).expand(8, 6)
    yield case("top-p-out-of-range-on-the-device", probs, draws=12, top_p=odd)
    yield case("min-p-out-of-range-on-the-device", probs, draws=12, min_p=odd)
    for kind in INTS:
        low, high = torch.iinfo(kind).min, torch.iinfo(kind).max
        top_k = torch.tensor([low, -1, 0, 7, high], dtype=kind)
        probs = _of_mass(masses).expand(5, 6)
        yield case(f"top-k-out-of-range-{_tag(kind)}", probs, draws=12, top_k=top_k)
        indices = torch.tensor([-1, 0, 3, 1, low, 2, high, 2, 4], dtype=kind)
        yield case(f"indices-out-of-range-{_tag(kind)}",
                   partial(_model_probs, rows=3, vocab_size=40), top_k=torch.tensor([3, 0, 2]),
                   top_p=0.9, indices=indices, return_valid=True)  # fmt: skip
    yield case("indices-without-rows", torch.empty(0, 5), top_k=2, top_p=0.9,
               indices=torch.tensor([0, -1, 4]), return_valid=True)  # fmt: skip


def _bad_calls() -> Iterator[Case]:
    ints, floats = partial(torch.zeros, dtype=torch.int64), torch.zeros
    bad: dict[str, list[Any]] = {
        "top_k": [5.0, True, "5", None, 2**63, floats(4), ints(1), ints(4, 1), ints(())],
        "top_p": [0.0, -0.5, 1.0000001, math.nan, math.inf, 2, "0.9", None, floats(3) + 1,
                  torch.ones(4, dtype=torch.float64), floats(()) + 1, floats(4, 1)],
        "min_p": [-1e-9, 1.5, math.nan, -math.inf, True, floats(5), floats(4).half()],
        "indices": [floats(3), [0, 1], 0, ints(2, 2), ints(3).short()],
        "filter_apply_order": ["top_p_first", 1, None],
        "deterministic": [1, None],
        "return_valid": ["yes", ints(1)],
        "seed": [1.5, 2**63, -(2**63) - 1, True, ints(4).int(), ints(3), ints(0), ints(()),
                 ints(4, 1)],
        "offset": [0.0, 2**63, ints(2), ints(4).int()],
        "generator": [7, torch.Generator()],  # the second is refused for the seed beside it
        "probs": [ints(4, 10), torch.ones(4, 10, dtype=torch.float64), torch.ones(10),
                  torch.ones(2, 2, 10), torch.eye(4).to_sparse(), [[0.5, 0.5]], None,
                  torch.empty(4, 0), torch.ones(1, 1).expand(1, VOCAB_LIMIT)],
    }  # fmt: skip
    probs = partial(_model_probs, rows=4, vocab_size=10)
    for argument, values in bad.items():
        for number, value in enumerate(values):
            call = {"probs": probs, "top_k": 5, "top_p": 0.9, argument: value}
            yield _case("hostile", f"bad-{argument}-{number}", **call, error=argument)
    # One seed a sample, not one a row.
    yield _case("hostile", "seed-per-row", probs, seed=ints(4), indices=ints(3), error="seed")
    yield _case("hostile", "offset-without-seed", probs, seed=None, offset=1, error="offset")


SPEC = OpSpec(
    prototype=top_k_top_p_sampling_from_probs,
    params=(
        Param("probs", dtypes=FLOATS, ranks=range(2, 3), shape="[R, V]"),
        Param(
            "top_k",
            dtypes=INTS,
            ranks=range(1, 2),
            shape="[R]",
            types=(int,),
            any_number=True,
        ),
        Param("top_p", dtypes={torch.float32}, ranks=range(1, 2), shape="[R]", types=(float,)),
        Param(
            "min_p",
            dtypes={torch.float32},
            ranks=range(1, 2),
            shape="[R]",
            types=(float,),
            optional=True,
        ),
        Param("indices", dtypes=INTS, ranks=range(1, 2), shape="[B]", optional=True),
        Param(
            "filter_apply_order",
            "attribute",
            types=(str,),
            choices=("top_k_first", "joint"),
            fixed=True,
        ),
        Param("deterministic", "attribute", types=(bool,), fixed=True),
        Param("generator", types=(torch.Generator,), optional=True),
        Param(
            "seed",
            dtypes={torch.int64},
            ranks=range(1, 2),
            shape="[B] or [1]",
            types=(int,),
            optional=True,
            any_number=True,
        ),
        Param(
            "offset",
            dtypes={torch.int64},
            ranks=range(1, 2),
            shape="[B] or [1]",
            types=(int,),
            optional=True,
            any_number=True,
        ),
        Param("return_valid", "attribute", types=(bool,), fixed=True),
    ),
    check=check,
    outputs=outputs,
    reference=_reference,
    oracle=oracle,
    cases=cases,
    cost=cost,
    device_param="probs",
    num_outputs=2,
    all_outputs={"return_valid": True},
    finish=finish,
    random=True,
)
