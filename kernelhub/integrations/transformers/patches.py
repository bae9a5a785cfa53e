"""Attributes replaced while somebody uses the replacement, and put back after the last.

One patch serves every user of an attribute: the first one makes it, the last one takes it away,
in whatever order they leave. What is patched is a module's `forward` or a function of a Python
module; a replacement without users calls what it replaced.
"""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

lock = threading.RLock()
_MISSING = object()


class Patch:
    """A callable in the place of `owner.name`; `users` are those who want it."""

    def __init__(self, owner: Any, name: str, run: Callable[..., Any]) -> None:
        self.owner = owner
        self.name = name
        self.run = run
        self.stock = getattr(owner, name)
        self.users: tuple[Any, ...] = ()
        self._before = vars(owner).get(name, _MISSING)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        users = self.users  # another thread may leave meanwhile: this call stays with what it saw
        if not users:
            return self.stock(*args, **kwargs)
        return self.run(self, users, *args, **kwargs)

    def put(self) -> None:
        setattr(self.owner, self.name, self)

    def take_away(self) -> None:
        if vars(self.owner).get(self.name) is not self:
            return  # replaced by others since; where they call this patch, it calls the stock
        if self._before is _MISSING:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self._before)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy of an accelerated module is stock: this acceleration is not the copy's."""
        return copy.deepcopy(self.stock, memo)

    def __reduce__(self) -> Any:
        raise pickle.PicklingError(
            "an accelerated model cannot be pickled: leave the `with accelerate(...)` block first"
        )


_patches: dict[tuple[int, str], Patch] = {}  # a patch keeps its owner alive, so ids stay its own


def add(owner: Any, name: str, run: Callable[..., Any], user: Any) -> Patch:
    """Let `user` use a patch of `owner.name`; `run(patch, users, *args)` is called in its place.

    Returns the patch, which may be an earlier user's, with a `run` of that one.
    """
    with lock:
        patch = _patches.get((id(owner), name))
        if patch is None:
            patch = _patches[id(owner), name] = Patch(owner, name, run)
            patch.put()
        patch.users = (*patch.users, user)
        return patch


def remove(owner: Any, name: str, user: Any) -> None:
    """Let go of what `add` gave."""
    with lock:
        patch = _patches[id(owner), name]
        users = list(patch.users)
        users.remove(user)
        patch.users = tuple(users)
        if not users:
            del _patches[id(owner), name]
            patch.take_away()
