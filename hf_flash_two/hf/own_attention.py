"""Attention that a model writes out itself, carried out by `flash_attention`.

Such a layer multiplies queries with keys, scales, adds biases and masks, takes the softmax, drops
out and multiplies with values. Under `own_attention` the first product yields `Scores`, which only
note what is done to them, and the last product calls `flash_attention` once: nothing of the size of
the scores is computed, and the layer's forward runs as its authors wrote it.

What is done to scores and has no counterpart computes them after all, by the operations noted: that
is how a layer makes a bias out of another product. Probabilities are never computed: what has no
counterpart there raises, and so does a layer of which nothing was carried out; but where no values
are known (see `tensor_cache.is_symbolic`), such a layer computes its attention as it always did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from types import FunctionType

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from hf_flash_two.hf.rules import (
    PRODUCTS,
    RULES_OF,
    VIEWS,
    WHILE_SPLIT,
    follow,
    signature,
)
from hf_flash_two.hf.scores import Lazy, Scores, version_of
from hf_flash_two.tensor_cache import is_symbolic


@contextmanager
def own_attention(layer: str) -> Iterator[OwnAttention]:
    """Within the block products of queries and keys are `Scores`; yields what sees to it.

    Args:
        layer: named in errors.

    Raises:
        NotImplementedError: something is done to probabilities that cannot be carried out, or
            there were products and none of them was carried out as attention.
    """
    mode = OwnAttention(layer)
    with mode:
        yield mode
    if mode.multiplied and not mode.attended and not is_symbolic():
        mode.refuse("what this layer does with its scores")


class OwnAttention(TorchFunctionMode):
    """Sees every torch function that the layer calls.

    Attributes:
        name: of the layer, for errors.
        paused: while its own work is done.
        multiplied: whether there was any product of two tensors.
        attended: whether any attention was carried out.
    """

    def __init__(self, name: str):
        super().__init__()
        self.name = name
        self.paused = False
        self.multiplied = False
        self.attended = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        if any(isinstance(x, Lazy) for x in tree_leaves((args, kwargs))):
            return self.apply(func, args, kwargs)
        if func is F.multi_head_attention_forward:
            with self:
                return _without_weights(*args, **kwargs)
        rule = PRODUCTS.get(_name(func))
        self.multiplied |= rule is not None
        result = follow(rule, self, *args, **kwargs)
        if isinstance(result, Scores):
            result.compute = lambda: func(*args, **kwargs)
        return func(*args, **kwargs) if result is None else result

    def apply(self, func: Callable, args: tuple, kwargs: dict):
        """``func`` of lazy operands: noted if there is a rule for it, carried out otherwise."""
        name, first = _name(func), args[0] if args else None
        leaves = tree_leaves((args, kwargs))
        lazy = [x for x in leaves if isinstance(x, Lazy)]
        scores = [x for x in lazy if isinstance(x, Scores)]
        in_place = name.endswith("_") and not name.endswith("__")
        if any(x.overwritten for x in scores):
            self.refuse(f"`{name}` on scores that were changed in place through a view of them")
        if in_place and isinstance(first, Scores):
            args = (replace(first), *args[1:])

        def compute():
            real = tree_map(lambda x: x.tensor(name) if isinstance(x, Lazy) else x, (args, kwargs))
            return func(*real[0], **real[1])

        with self.pause():
            split = any(x.whole for x in scores)
            if in_place and not isinstance(first, Scores) or split and name not in WHILE_SPLIT:
                result = None
            elif name in VIEWS and isinstance(first, Scores):
                shape = func(torch.empty(first.shape, device="meta"), *args[1:], **kwargs).shape
                result = first.viewed_as(shape)
            else:
                rules = RULES_OF[type((scores or lazy)[0])]
                rule = rules.get(name.removesuffix("_") if in_place else name)
                result = follow(rule, *args, **kwargs)
            if result is None:
                return compute()
        noted = [(x, version_of(x)) for x in leaves if isinstance(x, Tensor)]
        noted = sum((x.noted for x in lazy), tuple(noted))
        if isinstance(result, tuple):
            for at, part in enumerate(result):
                part.compute, part.noted = (lambda at=at: compute()[at]), noted
        elif isinstance(result, Lazy) and not any(result is x for x in lazy):
            result.compute, result.noted = compute, noted
        if in_place and isinstance(result, Scores):
            first.overwritten.append(name)
            vars(first).update(vars(result))
            return first
        return result

    def settled(self, part):
        """What stands for ``part`` of the layer's result once it is through.

        None for probabilities, which were not computed; of a layer that computed its attention as
        it always did, the last product.
        """
        if not isinstance(part, Lazy):
            return part
        return None if self.attended else part.tensor("returning")

    @contextmanager
    def pause(self) -> Iterator[None]:
        before, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = before

    def refuse(self, what: str):
        raise NotImplementedError(
            f"{self.name}: flash_two cannot carry out {what}; call hf_flash_two.unpatch(model) to "
            "have the layer compute attention as it always did"
        )


def _name(func: Callable) -> str:
    return getattr(func, "__name__", "")


def _without_weights(*args, **kwargs) -> tuple[Tensor, None]:
    """`F.multi_head_attention_forward`; averaged probabilities are not computed."""
    bound = signature(F.multi_head_attention_forward).bind(*args, **kwargs)
    bound.arguments["need_weights"] = False
    return _within(F.multi_head_attention_forward)(*bound.args, **bound.kwargs)


@cache
def _within(func: FunctionType) -> FunctionType:
    """``func`` past its own look for a mode, so that the mode sees the calls within."""
    scope = {**func.__globals__, "has_torch_function": lambda _: False}
    inner = FunctionType(func.__code__, scope, func.__name__, func.__defaults__, func.__closure__)
    inner.__kwdefaults__ = func.__kwdefaults__
    return inner
