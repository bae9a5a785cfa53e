"""After `accelerate` a model is as it was: bit for bit, in every way of nesting and of leaving."""

from __future__ import annotations

import copy
import pickle
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import kernelhub
from kernelhub.integrations.transformers import accelerate, patches
from kernelhub.integrations.transformers import experts as experts_switch
from tests.integrations.models import FAMILIES, config, make, say


def state(model: Any) -> list[Any]:
    """All that `accelerate` might touch: modules, the family's functions, the experts' switch."""
    found: list[Any] = [model.get_experts_implementation()]
    for _, module in model.named_modules():
        found.append((id(module), type(module), sorted(vars(module)), vars(module).get("forward")))
    for p in model.parameters():
        found.append((id(p), p.data_ptr(), p._version))
    family = sys.modules[type(model).__module__]
    found.append({n: v for n, v in vars(family).items() if n.startswith("apply_rotary")})
    found.append(sorted(vars(ALL_ATTENTION_FUNCTIONS)))
    return found


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    yield
    assert not patches._patches
    assert not experts_switch._switched
    assert not experts_switch._users


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_is_put_back(family: str) -> None:
    model = make(family)
    before, stock = state(model), say(model)
    with accelerate(model):
        assert state(model) != before
        inside = say(model)
    assert state(model) == before
    after = say(model)
    assert torch.equal(after.logits, stock.logits)
    assert not torch.equal(inside.logits, stock.logits)


def test_an_exception_inside() -> None:
    model = make("deepseek_v3")
    before, stock = state(model), say(model)

    def broken(*_: Any) -> None:
        raise RuntimeError("inside a layer")

    hook = model.model.layers[1].self_attn.o_proj.register_forward_hook(broken)
    with pytest.raises(RuntimeError, match="inside a layer"), accelerate(model):
        say(model)
    hook.remove()
    assert state(model) == before
    assert torch.equal(say(model).logits, stock.logits)


def test_an_exception_on_entering(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("mixtral")
    before = state(model)

    def broken(*_: Any) -> None:
        raise RuntimeError("no switch")

    with monkeypatch.context() as patched:
        patched.setattr(type(model), "set_experts_implementation", broken)
        with pytest.raises(RuntimeError, match="no switch"), accelerate(model):
            raise AssertionError("entered")
    assert state(model) == before


def test_blocks_nest_repeat_and_overlap() -> None:
    model = make("qwen3_moe")
    before = state(model)
    stock, inside = say(model), None
    again = accelerate(model)
    for _ in range(2):
        with accelerate(model), again, again:
            pass
        with again:
            with accelerate(model):
                inside = say(model)
            assert torch.equal(say(model).logits, inside.logits)
        assert state(model) == before
    first, second = ExitStack(), ExitStack()
    first.enter_context(accelerate(model))
    second.enter_context(accelerate(model))
    first.close()  # the first to come leaves first
    assert inside is not None
    assert torch.equal(say(model).logits, inside.logits)
    second.close()
    assert state(model) == before
    assert torch.equal(say(model).logits, stock.logits)


def test_models_of_one_configuration() -> None:
    """The switch of the experts and the rotary function are shared; the acceleration is not.

    In bf16, where the op's rotary embedding differs from stock's in its bits.
    """
    shared = config("mixtral")
    torch.manual_seed(0)
    one, two = (type(make("mixtral"))(shared).eval().bfloat16() for _ in range(2))
    for model in (one, two):
        model.set_experts_implementation("batched_mm")
    before, stock = (state(one), state(two)), (say(one), say(two))
    outer, inner = ExitStack(), ExitStack()
    outer.enter_context(accelerate(one))
    assert not torch.equal(say(one).logits, stock[0].logits)
    assert torch.equal(say(two).logits, stock[1].logits), "the other model is stock"
    inner.enter_context(accelerate(two))
    outer.close()
    assert torch.equal(say(one).logits, stock[0].logits)
    assert not torch.equal(say(two).logits, stock[1].logits)
    inner.close()
    assert (state(one), state(two)) == before


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy])
def test_a_configuration_that_another_takes_the_place_of(duplicate: Any) -> None:
    model = make("mixtral")
    own, stock = model.config, say(model)
    with accelerate(model):
        inside = say(model)
        model.config = duplicate(own)
        assert torch.equal(say(model).logits, inside.logits)
    assert own._experts_implementation == "grouped_mm"
    assert torch.equal(say(model).logits, stock.logits)
    model.config = own
    with accelerate(model):
        assert torch.equal(say(model).logits, inside.logits)


def test_copies_are_stock_and_pickles_are_refused() -> None:
    model = make("qwen3_moe")
    stock = say(model)
    with accelerate(model):
        duplicate = copy.deepcopy(model)
        duplicate.model.layers[0].self_attn.q_proj.weight.data.mul_(2)
        assert not torch.equal(say(duplicate).logits, say(model).logits), "weights of its own"
        duplicate.model.layers[0].self_attn.q_proj.weight.data.div_(2)
        with pytest.raises(pickle.PicklingError, match="leave the `with accelerate"):
            pickle.dumps(model)
    assert torch.equal(say(duplicate).logits, stock.logits)


def test_who_replaced_a_forward_meanwhile_keeps_it() -> None:
    model = make("llama")
    linear = model.model.layers[0].self_attn.q_proj
    stock = say(model)
    with accelerate(model):
        below = linear.forward
        linear.forward = replacement = lambda x: below(x)
    assert vars(linear)["forward"] is replacement
    assert torch.equal(say(model).logits, stock.logits), "what it calls is stock again"
    del linear.forward


def test_threads() -> None:
    """Threads that enter, generate and leave as they please are accelerated while inside. A model
    of the family that nobody accelerates is stock all the while.
    """
    model, other = make("qwen3_moe"), make("qwen3_moe")
    before, stock = state(model), say(model).logits
    with accelerate(model):
        inside = say(model).logits
    failures: list[str] = []
    stop = threading.Event()

    def accelerated(times: int) -> None:
        for _ in range(times):
            with accelerate(model):
                if not torch.equal(say(model).logits, inside):
                    failures.append("inside a block, but not accelerated")

    def bystander() -> None:
        while not stop.is_set():
            if not torch.equal(say(other).logits, stock):
                failures.append("another model has changed")

    switching = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        workers = [threading.Thread(target=accelerated, args=(6,)) for _ in range(3)]
        watcher = threading.Thread(target=bystander)
        for thread in (*workers, watcher):
            thread.start()
        for thread in workers:
            thread.join()
        stop.set()
        watcher.join()
    finally:
        sys.setswitchinterval(switching)
    assert not failures, failures
    assert state(model) == before
    assert torch.equal(say(model).logits, stock)


def test_a_thread_that_leaves_amid_anothers_call() -> None:
    """The call goes on, partly accelerated, and is right all the same."""
    model = make("deepseek_v3")
    stock = say(model)
    entered = ExitStack()
    entered.enter_context(accelerate(model))
    router = model.model.layers[1].mlp.gate
    hook = router.register_forward_hook(lambda *_: entered.close())
    said = say(model)
    hook.remove()
    assert torch.equal(said.tokens, stock.tokens)
    assert said.error(stock) < 1e-5


def test_the_policy_is_the_callers() -> None:
    model = make("llama")
    with accelerate(model):
        reference = say(model)
        with kernelhub.use("simt"):
            simt = say(model)
    assert torch.equal(simt.tokens, reference.tokens)
    assert 0 < simt.error(reference) < 1e-5
