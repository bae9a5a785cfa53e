"""The expert layers, by transformers' own switch: `set_experts_implementation("kernelhub")`.

The switch is in the model's configuration, which several models may share, so it is set once for a
configuration and put back after the last user.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import attrs
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from kernelhub.errors import ArgumentError
from kernelhub.integrations.transformers import families, layers
from kernelhub.integrations.transformers.patches import lock

NAME = "kernelhub"


class _Name(str):
    """`NAME` in a configuration; in a copy of that, which nobody switches back, what was before."""

    before: str | None

    def __deepcopy__(self, memo: dict[int, Any]) -> str | None:
        return self.before


@attrs.define(eq=False)
class _Switched:
    """A configuration that is set to `NAME`, what it was set to, and how many want it so."""

    config: Any  # kept alive, so that its id stays its own
    before: dict[str, str | None]
    count: int = 0

    def stock(self, module: Any, *args: Any, **kwargs: Any) -> Tensor:
        name = self.before[""]
        if name == NAME:
            return _alone(module, *args, **kwargs)
        eager = type(module).forward.__wrapped__
        run: Callable[..., Tensor] = ALL_EXPERTS_FUNCTIONS.get_interface(name, eager)
        return run(module, *args, **kwargs)


_switched: dict[int, _Switched] = {}
_users: dict[int, tuple[Any, ...]] = {}  # of an experts module


def add(model: Any, modules: Sequence[nn.Module], user: Any) -> _Switched:
    """Let the experts modules of a model run through the op for `user`.

    Returns what `remove` takes: the model may have another configuration by then.
    """
    with lock:
        switched = _switched.get(id(model.config))
        if switched is None:
            switched = _Switched(model.config, model.get_experts_implementation())
            name = _Name(NAME)
            name.before = switched.before[""]
            model.set_experts_implementation(name)
            _switched[id(model.config)] = switched
        switched.count += 1
        for module in modules:
            _users[id(module)] = (*_users.get(id(module), ()), user)
        return switched


def remove(switched: _Switched, modules: Sequence[nn.Module], user: Any) -> None:
    """Let go of what `add` gave."""
    with lock:
        for module in modules:
            users = list(_users.pop(id(module)))
            users.remove(user)
            if users:
                _users[id(module)] = tuple(users)
        switched.count -= 1
        if switched.count == 0:
            del _switched[id(switched.config)]
            switched.config._experts_implementation = switched.before


def forward(
    module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The experts implementation "kernelhub" of transformers.

    `accelerate` chooses it for a model. Chosen by hand, it runs any number of rows through the op.
    """
    call = (hidden_states, top_k_index, top_k_weights)
    switched = _switched.get(id(module.config))
    users = _users.get(id(module), ())
    if switched is None:
        return _alone(module, *call)
    if not users:  # not placed, or of another model that shares the configuration
        return switched.stock(module, *call)
    return layers.experts(module, switched.stock, users, *call)


def _alone(module: Any, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
    why = families.experts_refusal(module)
    if why:
        op, expected = f"experts_implementation={NAME!r}", "experts that fused_moe_gemv can run"
        raise ArgumentError(op, type(module).__name__, expected, why)
    weights = (module.gate_up_proj, None), (module.down_proj, None)
    return layers.expert_layers((), x, topk_ids, topk_weights, *weights)


ALL_EXPERTS_FUNCTIONS.register(NAME, forward)
