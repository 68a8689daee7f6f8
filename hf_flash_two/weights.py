"""`AttentionWeights`: what attention looked at, without the matrix of queries by keys."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor

from hf_flash_two.attention import Settings, as_mask, flash_attention, validated
from hf_flash_two.kernels.blockwise import weights
from hf_flash_two.masks import AttentionMask


class AttentionWeights:
    """The probabilities of a `flash_attention`: computed tile by tile, summed up, not kept.

    Results are float32 (float64 for float64), have no gradient, and take memory linear in the
    sequence. Weights are those before dropout. Sinks take their share of a row and are no keys: a
    row then sums to less than 1. A query that sees no key has weights of 0.

    Args:
        query, key: [B, Hq, Tq, D] and [B, Hk, Tk, D], in the dtype to compute in.
        lse: [B, Hq, Tq], as `flash_attention` returned it; computed if None.
        mask, scale, bias, alibi_slopes, softcap, sinks: as in `flash_attention`.

    Raises:
        ValueError: an argument does not fit.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        *,
        lse: Tensor | None = None,
        mask: AttentionMask | Tensor | None = None,
        scale: float | None = None,
        bias: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ):
        mask, settings = as_mask(mask), Settings(scale, softcap)
        terms = dict(bias=bias, alibi_slopes=alibi_slopes, sinks=sinks)
        with torch.no_grad():
            query, key, value, params = validated(
                query, key, key[..., :1], mask, settings, **terms, dropout_seed=None
            )
            if lse is None:
                more: Any = dict(mask=mask, scale=scale, softcap=softcap, **terms)
                _, lse = flash_attention(query, key, value, return_lse=True, **more)
        if lse.shape != query.shape[:3]:
            raise ValueError(
                f"lse: expected shape {list(query.shape[:3])} as of query, got {list(lse.shape)}"
            )
        self._call = query.detach(), key.detach(), lse.detach(), params

    def slice_queries(self, start: int, stop: int) -> AttentionWeights:
        """Those of queries ``start`` to ``stop``, to the same keys."""
        query, key, lse, params = self._call
        start, stop, _ = slice(start, stop).indices(query.shape[2])
        rows = (slice(None), slice(None), slice(start, stop))
        parts = {
            name: x[rows]
            for name in ("dense", "bias")
            if (x := getattr(params, name)) is not None and x.shape[2] > 1
        }
        params = params._replace(query_offset=params.query_offset + start, **parts)
        part = copy(self)
        part._call = query[rows], key, lse[rows], params
        return part

    @torch.no_grad()
    def received(self) -> Tensor:
        """How much attention each key received, summed over the queries: [B, Hq, Tk]."""
        return weights.received(*self._call)

    @torch.no_grad()
    def entropy(self) -> Tensor:
        """-sum p log p over the keys of each query, in nats: [B, Hq, Tq]."""
        return weights.entropy(*self._call)

    @torch.no_grad()
    def top_keys(self, count: int) -> tuple[Tensor, Tensor]:
        """The ``count`` largest weights of each query, and the indices of their keys.

        Returns:
            Both [B, Hq, Tq, count], the largest first. Where fewer keys have a weight, the others
            are 0, with index -1.
        """
        keys = self._call[1].shape[2]
        if not 1 <= count <= keys:
            raise ValueError(f"count: expected from 1 to {keys} keys, got {count}")
        return weights.top_keys(*self._call, count)

    @torch.no_grad()
    def rows(self, queries: Sequence[int] | None = None) -> Tensor:
        """The weights themselves of some queries, [B, Hq, n, Tk].

        Args:
            queries: their indices, negative ones from the end; None: all, in memory of Tq * Tk.
        """
        if queries is None:
            return weights.dense(*self._call)
        every = range(self._call[0].shape[2])
        parts = [self.slice_queries(at, at + 1).rows() for at in (every[i] for i in queries)]
        return torch.cat(parts, 2)
