"""The mode under which a layer with hand-written attention runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from types import FunctionType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from hf_flash_two.hf.tracer.rules import PRODUCTS, RULES_OF, VIEWS, WHILE_SPLIT, follow, signature
from hf_flash_two.hf.tracer.scores import Lazy, TracedScores, version_of
from hf_flash_two.tensor_cache import is_symbolic


@contextmanager
def tracing(name: str, layer: nn.Module | None = None) -> Iterator[Tracer]:
    """Within the block products of queries and keys are `TracedScores`; yields the tracer.

    Args:
        name: of the layer, for errors.
        layer: whose forward runs.

    Raises:
        NotImplementedError: something is done to probabilities for which there is no rule, or
            there were products and none of them was lowered.
    """
    tracer = Tracer(name, layer)
    with tracer:
        yield tracer
    if tracer.multiplied and not tracer.lowered and not is_symbolic():
        tracer.refuse("what this layer does with its scores")


class Tracer(TorchFunctionMode):
    """Sees every torch function that the layer calls.

    Attributes:
        name: of the layer, for errors.
        layer: whose forward runs.
        paused: while its own work is done.
        multiplied: whether there was any product of two tensors.
        lowered: whether any attention was computed by `flash_attention`.
    """

    def __init__(self, name: str, layer: nn.Module | None):
        super().__init__()
        self.name, self.layer = name, layer
        self.paused = False
        self.multiplied = False
        self.lowered = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        if any(isinstance(x, Lazy) for x in tree_leaves((args, kwargs))):
            return self.dispatch(func, args, kwargs)
        if func is F.multi_head_attention_forward:
            with self:
                return _without_weights(*args, **kwargs)
        rule = PRODUCTS.get(_name(func))
        self.multiplied |= rule is not None
        result = follow(rule, self, *args, **kwargs)
        if isinstance(result, TracedScores):
            result.compute = lambda: func(*args, **kwargs)
        return func(*args, **kwargs) if result is None else result

    def dispatch(self, func: Callable, args: tuple, kwargs: dict):
        """``func`` of lazy operands: recorded if there is a rule for it, else on real tensors."""
        name = _name(func)
        target: Any = args[0] if args else None
        scores = [x for x in tree_leaves((args, kwargs)) if isinstance(x, TracedScores)]
        seen = [each for x in scores for each in x.shown]
        if any(x.overwritten for x in scores) or any(version_of(x) != was for x, was in seen):
            self.refuse(f"`{name}` on scores that were changed in place through a view of them")
        in_place = _is_in_place(name) and isinstance(target, TracedScores)
        if in_place:  # what they were is needed to materialise what they become
            args = (replace(target), *args[1:])
        materialise = partial(self._materialise, func, args, kwargs)
        with self.pause():
            result = self._follow_rule(func, args, kwargs)
            if result is None:
                if _writes(func, args, kwargs):
                    self.refuse(f"`{name}` in place")
                return materialise()
        _record(result, materialise, tree_leaves((args, kwargs)))
        if in_place and isinstance(result, TracedScores):
            target.overwritten.append(name)  # its views share the list
            vars(target).update(vars(result))
            return target
        return result

    def _follow_rule(self, func: Callable, args: tuple, kwargs: dict):
        """What stands for the result of ``func``; None if nothing does."""
        name, first = _name(func), args[0] if args else None
        lazy = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Lazy)]
        scores = [x for x in lazy if isinstance(x, TracedScores)]
        if _is_in_place(name) and not isinstance(first, TracedScores):
            return None
        if any(x.whole for x in scores) and name not in WHILE_SPLIT:
            return None
        if name in VIEWS and isinstance(first, TracedScores):
            shape = func(torch.empty(first.shape, device="meta"), *args[1:], **kwargs).shape
            return first.viewed_as(shape)
        rules = RULES_OF[type((scores or lazy)[0])]
        name = name.removesuffix("_") if _is_in_place(name) else name
        return follow(rules.get(name), *args, **kwargs)

    def _materialise(self, func: Callable, args: tuple, kwargs: dict):
        """``func`` of the tensors that lazy operands stand for."""
        name, real = _name(func), {}

        def tensor(x):
            if not isinstance(x, Lazy):
                return x
            return real.setdefault(id(x), (x, x.tensor(name)))[1]

        real_args, real_kwargs = tree_map(tensor, (args, kwargs))
        result = func(*real_args, **real_kwargs)
        for x, made in real.values():
            if isinstance(x, TracedScores):
                x.shown += [(y, version_of(y)) for y in tree_leaves(result) if _may_share(y, made)]
        return result

    def resolve(self, part):
        """``part`` of the layer's result, for its caller.

        None for probabilities, which were not computed; the tensor if the layer computed its
        attention as it always did.
        """
        if not isinstance(part, Lazy):
            return part
        return None if self.lowered else part.tensor("returning")

    @contextmanager
    def pause(self) -> Iterator[None]:
        before, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = before

    def refuse(self, what: str) -> NoReturn:
        raise NotImplementedError(
            f"{self.name}: flash_two has no counterpart for {what}; call "
            "hf_flash_two.unpatch(model) to have the layer compute attention as it always did"
        )


def _record(result, materialise: Callable, operands: list) -> None:
    """Note on ``result`` how to compute it, and the versions of the tensors that this reads."""
    lazy = [x for x in operands if isinstance(x, Lazy)]
    recorded = tuple((x, version_of(x)) for x in operands if isinstance(x, Tensor))
    recorded = sum((x.recorded for x in lazy), recorded)
    if isinstance(result, tuple):
        for at, part in enumerate(result):
            part.compute, part.recorded = (lambda at=at: materialise()[at]), recorded
    elif isinstance(result, Lazy) and not any(result is x for x in lazy):
        result.compute, result.recorded = materialise, recorded


def _name(func: Callable) -> str:
    return getattr(func, "__name__", "")


def _is_in_place(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")


def _writes(func: Callable, args: tuple, kwargs: dict) -> bool:
    """Whether ``func`` changes a lazy operand in place."""
    name, first = _name(func), args[0] if args else None
    if isinstance(kwargs.get("out"), Lazy):
        return True
    if not isinstance(first, Lazy):
        return False
    parameters = func.__code__.co_varnames if isinstance(func, FunctionType) else ()
    given = dict(zip(parameters, args, strict=False)) | kwargs
    return _is_in_place(name) or name == "__setitem__" or given.get("inplace") is True


def _may_share(result: object, tensor: Tensor) -> bool:
    """Whether ``result`` is a tensor in the memory of ``tensor``, as far as that can be told."""
    if not isinstance(result, Tensor):
        return False
    if is_symbolic():
        return True
    return result.untyped_storage()._cdata == tensor.untyped_storage()._cdata


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
