"""Every mask over every layout and exchange: several processes compute what one computes."""

from __future__ import annotations

import itertools
import os
import sys
from dataclasses import replace
from pathlib import Path

import mask_cases
import pytest
import torch
import torch.distributed as dist
from helpers import BATCH
from ranks import assert_passed, run
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from hf_flash_two import AttentionMask, flash_attention
from hf_flash_two.parallel import sequence
from hf_flash_two.parallel.layout import Layout
from hf_flash_two.parallel.sequence import Spread, attend_over_mesh

TOKENS = 96
CAUSAL = AttentionMask.causal()


def layouts(ranks: int) -> list[Layout]:
    work = [float(chunk**2) for chunk in range(3 * ranks)]
    return [Layout.contiguous(ranks), Layout.head_tail(ranks), Layout.balanced(ranks, work)]


def masks() -> dict[str, AttentionMask]:
    made = {}
    for make in mask_cases.MASKS:
        torch.manual_seed(1)
        mask, _ = make(TOKENS, TOKENS)
        made[make.__name__] = AttentionMask.from_dense(mask) if isinstance(mask, Tensor) else mask
    return made


TERMS = {
    "sinks": lambda heads: {"sinks": torch.randn(heads)},
    "slopes": lambda heads: {"alibi_slopes": torch.rand(heads)},
    "bias": lambda heads: {"bias": torch.randn(1, heads, TOKENS, TOKENS)},
    "bias of keys": lambda heads: {"bias": torch.randn(BATCH, 1, 1, TOKENS)},
    "several": lambda heads: {"sinks": torch.randn(heads), "softcap": 5.0, "scale": 0.5},
}


def check_equal(
    spread: Spread,
    mask: AttentionMask,
    *,
    heads=(6, 2),
    term: str | None = None,
    keys: int = TOKENS,
) -> None:
    """Output, lse and all gradients; those of sinks and of the bias of keys are sums of parts."""
    torch.manual_seed(3)
    query = torch.randn(BATCH, heads[0], TOKENS, 16)
    key, value = (torch.randn(BATCH, heads[1], keys, dim) for dim in (16, 8))
    terms = TERMS[term](heads[0]) if term else {}
    whole = {"query": query, "key": key, "value": value}
    whole |= {name: terms.pop(name) for name in ("bias", "sinks") if name in terms}
    cut = [name for name, x in whole.items() if x.dim() == 4 and x.shape[2] > 1]

    def shard(x: Tensor) -> Tensor:
        return spread.layout.split(x, spread.rank, 2)

    leaves = {name: x.clone().requires_grad_() for name, x in whole.items()}
    out, lse = flash_attention(**leaves, mask=mask, return_lse=True, **terms)
    d_out, d_lse = torch.randn_like(out), torch.randn_like(lse)
    want = torch.autograd.grad((out, lse), list(leaves.values()), (d_out, d_lse))

    parts = {n: (shard(x) if n in cut else x).clone().requires_grad_() for n, x in whole.items()}
    tensors = [parts.pop(name) for name in ("query", "key", "value")]
    got, got_lse = attend_over_mesh(*tensors, mask, spread, return_lse=True, **parts, **terms)
    upstream = shard(d_out), shard(d_lse)
    grads = torch.autograd.grad((got, got_lse), [*tensors, *parts.values()], upstream)
    close = dict(atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(got, shard(out), **close)
    torch.testing.assert_close(got_lse, shard(lse), **close)
    for name, grad, expected in zip(whole, grads, want, strict=True):
        if name in cut:
            torch.testing.assert_close(grad, shard(expected), **close)
        else:
            dist.all_reduce(grad)
            torch.testing.assert_close(grad, expected, **close)


def check_masks_by_keys(mesh: DeviceMesh) -> None:
    """Each number of ranks has another layout for each mask; four take every other mask."""
    some = itertools.islice(itertools.cycle(layouts(mesh.size())), mesh.size(), None)
    for mask, layout in zip(list(masks().values())[:: mesh.size() // 2], some, strict=False):
        check_equal(Spread(mesh, layout, "gather"), mask)


def check_masks_by_heads(mesh: DeviceMesh) -> None:
    for mask, layout in zip(masks().values(), itertools.cycle(layouts(mesh.size()))):
        if mask.dense is not None:
            mask = replace(mask, dense=mask.dense[:, :4])
        check_equal(Spread(mesh, layout, "ulysses"), mask, heads=(4, 2))


def check_terms(mesh: DeviceMesh) -> None:
    padded = masks()["padded"]
    for layout, term in zip(itertools.cycle(layouts(mesh.size())), TERMS):
        for mask in (CAUSAL, padded):
            check_equal(Spread(mesh, layout, "gather"), mask, term=term)
        if term != "bias":
            check_equal(Spread(mesh, layout, "ulysses"), padded, heads=(4, 1), term=term)


def check_max_logits(mesh: DeviceMesh) -> None:
    """Of all rows and heads on each rank, NaN included; gradients are those without them."""
    ranks, heads = mesh.size(), (2 * mesh.size(), 2)
    spreads = [Spread(mesh, x, y) for x in layouts(ranks) for y in ("gather", "ulysses")]
    if ranks == 4:
        grid = init_device_mesh("cpu", (2, 2))
        spreads = [Spread(grid, layout) for layout in layouts(ranks)]
    padded, terms = masks()["padded"], TERMS["several"](heads[0])
    terms["alibi_slopes"] = torch.rand(heads[0])
    for at, spread in enumerate(spreads):
        torch.manual_seed(at)
        whole = [torch.randn(BATCH, n, TOKENS, 16) for n in (heads[0], heads[1], heads[1])]
        if at == 0:
            whole[1][0, 0, 5] = torch.nan
        parts = [spread.layout.split(x, spread.rank, 2) for x in whole]
        for mask in (CAUSAL, AttentionMask.causal(window=7), padded):
            asked = dict(mask=mask, return_max_logits=True, **terms)
            _, want = flash_attention(*whole, **asked)
            assert want.isnan().any() == (at == 0 and mask is not padded)
            leaves = [x.clone().requires_grad_() for x in parts]
            out, got = attend_over_mesh(*leaves, spread=spread, **asked)
            torch.testing.assert_close(got, want, equal_nan=True)
            without = attend_over_mesh(*leaves, spread=spread, mask=mask, **terms)
            pair = [torch.autograd.grad(x.sin().sum(), leaves) for x in (out, without)]
            torch.testing.assert_close(*pair, equal_nan=True)


def check_two_dimensions(mesh: DeviceMesh) -> None:
    """Heads within pairs of ranks, keys among the pairs."""
    grid = init_device_mesh("cpu", (mesh.size() // 2, 2))
    for mask, layout in zip(masks().values(), itertools.cycle(layouts(mesh.size()))):
        check_equal(Spread(grid, layout), mask)
    check_equal(Spread(grid, Layout.head_tail(mesh.size())), CAUSAL, term="slopes")


def check_other_keys(mesh: DeviceMesh) -> None:
    """More keys than queries, as from a decoder to an encoder."""
    for exchange in ("gather", "ulysses"):
        spread = Spread(mesh, Layout.head_tail(mesh.size()), exchange)
        check_equal(spread, AttentionMask.full(), heads=(4, 4), keys=2 * TOKENS)
        check_equal(spread, CAUSAL, heads=(4, 4), keys=2 * TOKENS)


def check_some_heads_at_a_time(mesh: DeviceMesh) -> None:
    before, sequence._GATHERED = sequence._GATHERED, 1
    try:
        check_equal(Spread(mesh, Layout.head_tail(mesh.size())), CAUSAL, term="several")
    finally:
        sequence._GATHERED = before


def check_only_what_a_window_reaches_is_sent(mesh: DeviceMesh) -> None:
    layout, ranks = Layout.contiguous(mesh.size()), mesh.size()
    shard = sequence._Shard(layout, mesh, mesh.get_local_rank(), (TOKENS, TOKENS))
    view = sequence._view(AttentionMask.causal(window=5), shard, torch.device("cpu"), False)
    rank, size = mesh.get_local_rank(), TOKENS // ranks
    expected = [
        size if source == rank else 4 if source == rank - 1 else 0 for source in range(ranks)
    ]
    assert list(view.route.received) == expected


def check_bits_are_the_same_each_time(mesh: DeviceMesh) -> None:
    spread = Spread(mesh, Layout.head_tail(mesh.size()))
    torch.manual_seed(mesh.get_local_rank())
    tensors = [torch.randn(1, heads, 24, 16).bfloat16().requires_grad_() for heads in (4, 2, 2)]
    upstream, found = torch.randn(1, 4, 24, 16).bfloat16(), []
    for _ in range(3):
        out = attend_over_mesh(*tensors, CAUSAL, spread)
        found.append([out, *torch.autograd.grad(out, tensors, upstream)])
    for again in found[1:]:
        assert all(map(torch.equal, again, found[0]))


def check_second_derivatives(mesh: DeviceMesh) -> None:
    """What is sent between ranks by heads goes back again; gathered keys refuse by name."""
    torch.manual_seed(3)
    layout = Layout.head_tail(mesh.size())
    whole = [torch.randn(1, heads, TOKENS, 16) for heads in (4, 2, 2)]

    def penalty(attend, tensors: list[Tensor]) -> tuple[Tensor, ...]:
        leaves = [x.clone().requires_grad_() for x in tensors]
        grads = torch.autograd.grad(attend(*leaves).sin().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(x.square().sum() for x in grads), leaves)

    def parts(tensors) -> list[Tensor]:
        return [layout.split(x, mesh.get_local_rank(), 2) for x in tensors]

    def over(exchange: str):
        spread = Spread(mesh, layout, exchange)
        return lambda *x: attend_over_mesh(*x, CAUSAL, spread)

    want = penalty(lambda *x: flash_attention(*x, mask=CAUSAL), whole)
    got = penalty(over("ulysses"), parts(whole))
    for a, b in zip(got, parts(want), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)
    with pytest.raises(NotImplementedError, match="'gather' has no second derivatives"):
        penalty(over("gather"), parts(whole))


def check_refusals(mesh: DeviceMesh) -> None:
    tensors = [torch.randn(1, heads, 24, 16) for heads in (3, 3, 3)]
    spread = Spread(mesh, Layout.head_tail(mesh.size()), "ulysses")
    with pytest.raises(ValueError, match="'ulysses' is not possible, 3 heads cannot be spread"):
        attend_over_mesh(*tensors, CAUSAL, spread)
    bias = torch.randn(1, 1, 24, 24 * mesh.size())
    with pytest.raises(ValueError, match="the bias has rows of its own for each query"):
        attend_over_mesh(*(x.repeat(1, 4, 1, 1) for x in tensors), CAUSAL, spread, bias=bias)


def check_what_was_chosen_and_why(mesh: DeviceMesh) -> None:
    ranks, layout = mesh.size(), Layout.head_tail(mesh.size())
    tensors = [torch.randn(1, heads, 24, 16) for heads in (ranks, ranks, ranks)]
    for mask, heads, start in (
        (CAUSAL, ranks, "ulysses: sends" if ranks > 2 else "gather: sends"),
        (CAUSAL, 3, "gather: 3 heads cannot be spread"),
        (AttentionMask.causal(window=4), ranks, "gather: a window reaches few keys"),
    ):
        spread = Spread(mesh, layout)
        attend_over_mesh(*(x[:, :1].repeat(1, heads, 1, 1) for x in tensors), mask, spread)
        (decision,) = spread.decisions
        assert decision.startswith(start), decision


CHECKS = (
    check_masks_by_keys,
    check_masks_by_heads,
    check_terms,
    check_max_logits,
    check_other_keys,
    check_some_heads_at_a_time,
    check_only_what_a_window_reaches_is_sent,
    check_bits_are_the_same_each_time,
    check_second_derivatives,
    check_refusals,
    check_what_was_chosen_and_why,
)
OF_FOUR = (check_masks_by_keys, check_terms, check_max_logits, check_two_dimensions)


@pytest.mark.parametrize(
    ("world", "name"),
    [(2, check.__name__) for check in CHECKS] + [(4, check.__name__) for check in OF_FOUR],
)
def test_processes(outcomes_of, world: int, name: str) -> None:
    assert_passed(outcomes_of(world), name)


if __name__ == "__main__":
    run(CHECKS if os.environ["WORLD_SIZE"] == "2" else OF_FOUR, Path(sys.argv[1]))
