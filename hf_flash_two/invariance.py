"""Whether attention is batch-invariant where a call does not say."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_is_on = False


@contextmanager
def batch_invariant() -> Iterator[None]:
    """Attention within the block, of all threads, is batch-invariant unless a call says otherwise.

    What a document's rows become, and their gradients, then depends on nothing but its own queries,
    keys and values, bit for bit: docs/batch_invariance.md. A backward is what its forward was; one
    that computes forwards again, for gradient checkpointing, belongs into the block too.
    """
    global _is_on
    before, _is_on = _is_on, True
    try:
        yield
    finally:
        _is_on = before


def is_batch_invariant() -> bool:
    return _is_on
