"""Interchangeable kernels that take one `AttentionParams`, and the choice between them.

A kernel is a package here with two functions:

- ``declines(query, key, value, params, by_name) -> str | None``: why it does not compute this call,
  or None. It may look at everything but the tensors' values. It runs in each call, so it remembers
  its answers. A package whose backward computes other calls than its forward also has
  ``declines_backward``, with the same arguments.
- ``load() -> (forward, backward)``, and perhaps ``prepare`` and ``prepare_backward``, imported on
  first use:
  ``forward(query, key, value, params) -> (out, lse)``, with `AttentionParams.max_logits` ``(out,
  lse, max_logits)``, and
  ``backward(d_out, d_lse, query, key, value, out, lse, params, need_d_bias) -> (dq, dk, dv, d_bias,
  d_sinks)``;
  ``prepare(query, key, value, params, with_lse)`` gives what computes all calls that differ from
  this one in their tensors' values only, a `Prepared`, or None. The kernel then declines by nothing
  else either. ``prepare_backward``, with the arguments of ``backward``, gives such a backward.

CONTRIBUTING.md says what a new one touches.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

from torch import Tensor

from hf_flash_two.kernels import blockwise, fused_cpu, hopper, triton
from hf_flash_two.kernels.blockwise import tangents
from hf_flash_two.kernels.params import AttentionParams, Prepared

_PACKAGES = {"hopper": hopper, "triton": triton, "fused_cpu": fused_cpu, "blockwise": blockwise}
"""The kernels, in the order in which "auto" asks them."""
NAMES = ("auto", *sorted(_PACKAGES))


class Kernel(NamedTuple):
    name: str
    forward: Callable
    backward: Callable
    prepare: Callable[..., Prepared | None] = lambda *call: None
    prepare_backward: Callable[..., Callable | None] = lambda *call: None


def select(
    name: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    params: AttentionParams,
    backward: bool = False,
) -> Kernel:
    """The kernel that computes this call.

    "auto" is the first that does not decline.

    Args:
        backward: the backward is to be computed, perhaps by another kernel than the forward was.

    Raises:
        ValueError: the kernel asked for by name declines, or all do; the message has the reasons.
    """
    if name == "auto":
        reasons = []
        for found, package in _PACKAGES.items():
            reason = _question(package, backward)(query, key, value, params, by_name=False)
            if reason is None:
                return _loaded(found)
            reasons.append(f"{found}: {reason}")
        raise ValueError(f"kernel: none computes this call; {'; '.join(reasons)}")
    if reason := declines(name, query, key, value, params, backward):
        can = (x for x in _PACKAGES if not declines(x, query, key, value, params, backward))
        others = " or ".join(map(repr, ("auto", *sorted(can))))
        raise ValueError(f"kernel: {name!r} cannot run, {reason}; use {others}")
    return _loaded(name)


def declines(
    name: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    params: AttentionParams,
    backward: bool = False,
) -> str | None:
    """Why the kernel of this name, asked for by it, does not compute this call, or None."""
    return _question(_PACKAGES[name], backward)(query, key, value, params, by_name=True)


def derivatives(name: str) -> tuple[Callable, Callable]:
    """Derivatives of the forward and of the backward along a direction, for every call.

    Raises:
        ValueError: a kernel asked for by name that has none.
    """
    if name not in ("auto", "blockwise"):
        raise ValueError(
            f"kernel: {name!r} cannot run, it has no second and no forward-mode derivatives; use "
            "'auto' or 'blockwise'"
        )
    return tangents.forward_jvp, tangents.backward_jvp


def _question(package: Any, backward: bool) -> Callable[..., str | None]:
    return getattr(package, "declines_backward", package.declines) if backward else package.declines


@lru_cache
def _loaded(name: str) -> Kernel:
    return Kernel(name, *_PACKAGES[name].load())
