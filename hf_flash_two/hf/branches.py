"""Branches: tokens that stand once in a row, and are seen by all branches that go on from them.

A caller describes them by positions that count along each branch, and by ``subtree_stop``: of each
token the place in the row past the last token that goes on from it. Tokens stand in depth-first
order; where a tree ends the next begins, so rows may hold several. `prefix_tree` makes such rows.

If causality alone hides tokens, ``subtree_stop`` is the mask: which queries see each key. A window
or chunk that is shorter than a branch hides a key from the ends of all branches that go on from it,
so that more than one run of queries sees it: the mask is dense, with distances along the branch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_flash_two.hf import families, shard
from hf_flash_two.hf.forward_pass import ForwardPass, current
from hf_flash_two.masks import AttentionMask
from hf_flash_two.tensor_cache import is_symbolic


@dataclass(frozen=True)
class Branches:
    """
    Attributes:
        stop: [B, T], ``subtree_stop``.
        positions: [B, T], along the branch.
    """

    stop: Tensor
    positions: Tensor

    def related(self, b: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """Whether tokens q and k of row b are on one branch."""
        return torch.where(k <= q, q < self.stop[b, k], k < self.stop[b, q])

    def mask(self) -> AttentionMask:
        """A query sees itself and all tokens before it on its branch."""
        key = torch.arange(self.stop.shape[1], device=self.stop.device)
        return AttentionMask.from_intervals(key, self.stop)

    def are_within(self, distance: int) -> bool:
        """Whether all positions are known to be less than ``distance``."""
        if self.stop.shape[1] <= distance:
            return True
        return not is_symbolic() and int(self.positions.amax()) < distance


def check(running: ForwardPass, arguments: dict[str, Any]) -> None:
    """Refuse branches that the model of ``running`` would compute wrongly.

    Raises:
        ValueError: what its caller said does not describe branches.
        NotImplementedError: the family is not known to be right.
    """
    said, model = running.said, running.model
    stop, positions = said.subtree_stop, said.position_ids
    if stop is None:
        return
    if positions is None or positions.shape[-1:] != stop.shape[-1:] or stop.dim() != 2:
        got = None if positions is None else list(positions.shape)
        raise ValueError(
            "subtree_stop: expected [batch, tokens] beside position_ids that count along each "
            f"branch, got {list(stop.shape)} and position_ids {got}"
        )
    if said.cu_seq_lens_q is not None:
        raise ValueError("cu_seq_lens_q: subtree_stop tells of documents; drop the boundaries")
    reason = shard.why_not_by_token(model, arguments, stop.shape[1])
    if getattr(model.config, "alibi", False):
        reason = "its ALiBi counts the tokens of a row"
    if model.config.model_type not in families.BRANCHABLE:
        reason = f"{model.config.model_type} is not among the families tested so"
    if reason is not None:
        raise NotImplementedError(
            f"subtree_stop: {type(model).__name__} cannot get branches in a row: {reason}; "
            "docs/branches.md says which can"
        )


def of_mask(
    batch: int,
    queries: int,
    keys: int,
    q_offset: int | Tensor,
    padding: Tensor | None,
    *,
    causal: bool,
) -> Branches | None:
    """The branches that a mask has to keep apart; None if the caller described none.

    Args:
        q_offset: the position of query 0.
        padding: [B, T], nonzero for visible tokens; None if all are.
        causal: whether causality is part of the mask.

    Raises:
        ValueError: not all tokens come in this forward, or shared ones would see what follows.
    """
    running = current()
    if running is None or running.whole.subtree_stop is None:
        return None
    stop: Tensor = running.whole.subtree_stop
    positions: Any = running.whole.position_ids  # as `check` has seen
    if isinstance(q_offset, Tensor) or q_offset or not queries == keys == stop.shape[1]:
        raise ValueError(
            f"subtree_stop: expected the {stop.shape[1]} tokens of its rows in one forward and no "
            f"cache of others, got {queries} queries and {keys} keys; pass use_cache=False"
        )
    if not causal:
        name = type(running.model).__name__
        raise ValueError(f"subtree_stop: expected a causal model, and {name} attends both ways")
    running.apart = True
    if padding is not None:
        # Chunks are told how much of it there is on the left.
        positions = positions + (padding.cumsum(1) == 0).sum(1, keepdim=True)
    return Branches(stop.expand(batch, -1), positions.expand(batch, -1))
