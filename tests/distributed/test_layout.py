"""Which rank holds which tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_flash_two import AttentionMask
from hf_flash_two.parallel import sequence
from hf_flash_two.parallel.layout import Layout

LAYOUTS = {
    "contiguous": Layout.contiguous(4),
    "head_tail": Layout.head_tail(4),
    "balanced": Layout.balanced(4, [1, 9, 2, 8, 3, 7, 4, 6, 5, 5, 1, 1]),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_whole_is_split_and_joined(layout: Layout) -> None:
    whole = torch.randn(2, 24, 3)
    shards = [layout.split(whole, rank, 1) for rank in range(layout.ranks)]
    for rank, shard in enumerate(shards):
        assert torch.equal(shard, whole[:, layout.positions(rank, 24)])
        assert (layout.positions(rank, 24).diff() > 0).all()
    in_order_of_ranks = torch.cat(shards, 1)
    assert torch.equal(in_order_of_ranks, whole[:, layout.order(24)])
    assert torch.equal(layout.join(in_order_of_ranks, 1), whole)
    assert torch.equal(layout.split_all(whole, 1), in_order_of_ranks)


def test_head_tail_gives_each_rank_the_same_causal_work() -> None:
    work = {int((Layout.head_tail(8).positions(rank, 64) + 1).sum()) for rank in range(8)}
    assert len(work) == 1


def test_balanced_deals_out_work_evenly() -> None:
    work = [float(x) for x in torch.randint(1, 1000, (64,))]
    loads = [sum(work[c] for c in chunks) for chunks in Layout.balanced(4, work).owners]
    assert max(loads) < 1.05 * min(loads)
    with pytest.raises(ValueError, match="work: expected a multiple of 4 chunks, got 6"):
        Layout.balanced(4, work[:6])


def test_neighbouring_ranks_as_one() -> None:
    assert Layout.head_tail(4).merged(2).owners == ((0, 1, 6, 7), (2, 3, 4, 5))


def test_a_shard_has_whole_chunks() -> None:
    Layout.head_tail(2).check("queries", 4)
    with pytest.raises(ValueError, match="of even length with 'head_tail', got 5 queries"):
        Layout.head_tail(2).check("queries", 5)
    with pytest.raises(ValueError, match="of 3 equal parts, got 5 keys"):
        Layout.balanced(2, [1.0] * 6).check("keys", 5)


@pytest.mark.parametrize("window", [None, 3], ids=["all keys", "some keys"])
@pytest.mark.parametrize("rank", range(2))
def test_keys_that_come_rank_by_rank_are_put_in_order(
    monkeypatch: pytest.MonkeyPatch, rank: int, window: int | None
) -> None:
    """Those of a document then lie side by side: kernels visit nothing between them."""
    monkeypatch.setattr(sequence._Shard, "group", property(lambda shard: None))
    layout, length = Layout(((0, 2, 5, 7), (1, 3, 4, 6))), 64
    mask = AttentionMask.from_documents(torch.tensor([0, 20, 64]), causal=True)
    if window is not None:
        mask = mask & AttentionMask.causal(window=window)
    shard: Any = sequence._Shard(layout, None, rank, (length, length))  # pyright: ignore[reportArgumentType]
    view = sequence._make_view(mask, shard, torch.device("cpu"))
    assert (view.positions is None) == (window is None)
    wanted = torch.arange(length) if view.positions is None else view.positions
    assert torch.equal(wanted, wanted.sort().values)
    came = view.as_they_came(wanted)
    owner = torch.tensor([0, 1, 0, 1, 1, 0, 1, 0])[came // 8]
    assert torch.equal(owner, owner.sort().values)
    assert torch.equal(view.put_in_order(came), wanted)
