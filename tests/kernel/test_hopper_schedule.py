"""Which tiles the backward of Hopper GPUs visits, and whose turn it is: without a GPU.

The functions of `schedule` are arithmetic on whole numbers; here Python runs them as they stand.
"""

from __future__ import annotations

import random
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="the schedule is written in Triton's language")

from compiling import params

from hf_flash_two import AttentionMask
from hf_flash_two.kernels.hopper import config, schedule
from hf_flash_two.kernels.triton.args import Heads


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Gluon's functions, of numbers; ``number`` is that of the program that asks."""
    asking = SimpleNamespace(number=0)
    of_numbers = SimpleNamespace(
        constexpr=object, minimum=min, maximum=max, cdiv=lambda a, b: -(-a // b),
        where=lambda which, a, b: a if which else b, program_id=lambda axis: asking.number,
    )  # fmt: skip
    monkeypatch.setattr(schedule, "gl", of_numbers)
    names = ("log2", "heads_inside", "_span_of", "place_of", "loops_of", "visit", "rank_of")
    for name in names:
        monkeypatch.setattr(schedule, name, getattr(schedule, name).fn)
    return asking


def call(chance: random.Random) -> tuple[schedule.Setup, schedule.Sizes, torch.Tensor]:
    """A random backward with a band: what its kernel knows, and which queries see which keys."""

    def around(first: int, last: int) -> int:
        """A number of tiles, or nearly."""
        return chance.randint(first, last) * 64 + chance.choice((-1, 0, 1))

    lengths = around(1, 14), around(1, 14)
    group, key_heads = chance.choice((1, 2, 3)), chance.choice((1, 2, 5))
    left, right = (chance.choice((None, 0, 1, around(1, 10))) for _ in range(2))
    offset = chance.choice((None, around(-9, 9)))
    mask = AttentionMask.window(left, right, query_offset=offset)
    head_dim = chance.choice((64, 128))
    query, key = (
        torch.empty(2, heads, length, head_dim, dtype=torch.bfloat16, device="meta")
        for heads, length in zip((key_heads * group, key_heads), lengths, strict=True)
    )
    settings = {"deterministic": chance.random() < 0.8}
    described = params(mask, lengths[1], query_offset=mask.resolve_offset(*lengths), **settings)
    tiles = config.backward_tiles(query, key, key, described)
    sizes = schedule.Sizes(
        Heads(key_heads * group, group), 2 * key_heads, min(tiles.together, 2 * key_heads),
        *lengths, described.query_offset, left or 0, right or 0, None, 0,
    )  # fmt: skip
    return tiles.setup, sizes, mask.to_dense(*lengths)[0, 0]


def visits(setup: schedule.Setup, place: schedule.Place, sizes: schedule.Sizes) -> list:
    outer, inner = schedule.loops_of(place, sizes, setup)
    return [schedule.visit(i, j, place, setup) for i in range(outer) for j in range(inner)]


@pytest.mark.parametrize("seed", range(60))
def test_turns_are_taken_one_after_the_other(program: SimpleNamespace, seed: int) -> None:
    """All that is seen is visited, tiles of dQ by rank; nobody waits for who starts later."""
    setup, sizes, seen = call(random.Random(seed))
    key_tiles = -(-sizes.key_length // setup.BLOCK_K)
    turns, places = defaultdict(list), set()
    for program.number in range(sizes.key_heads * key_tiles):
        place = schedule.place_of(sizes, setup)
        places.add((place.batch, place.key_head, place.tile))
        found = visits(setup, place, sizes)
        assert len(set(found)) == len(found)
        keys = slice(place.tile * setup.BLOCK_K, (place.tile + 1) * setup.BLOCK_K)
        rows = seen[:, keys].any(1).nonzero().flatten() // setup.BLOCK_Q
        assert {
            (tile, member) for tile in rows.tolist() for member in range(sizes.heads.group)
        } <= {*found}
        for tile, member in found:
            rank = schedule.rank_of(place, tile, sizes, setup)
            turns[place.batch, place.key_head, member, tile].append(rank)
    assert len(places) == sizes.key_heads * key_tiles
    if setup.ORDERED:
        for of_tile, ranks in turns.items():
            assert ranks == [*range(len(ranks))], of_tile


def test_grouped_heads_go_together_where_the_others_would_wait(program: SimpleNamespace) -> None:
    """Under a causal mask in a fixed order; with a window, or in any order, one head by one."""
    sizes = schedule.Sizes(Heads(6, 3), 2, 2, 512, 512, 0, 99, 0, None, 0)
    query, key = (torch.empty(1, heads, 512, 128, device="meta") for heads in (6, 2))
    causal, window = AttentionMask.causal(), AttentionMask.causal(window=100)
    for mask, deterministic, members in (
        (causal, True, [0, 1, 2]), (causal, False, [0, 0, 0]), (window, True, [0, 0, 0]),
    ):  # fmt: skip
        described = params(mask, 512, deterministic=deterministic)
        setup = config.backward_tiles(query, key, key, described).setup
        place = schedule.place_of(sizes, setup)
        found = visits(setup, place, sizes)
        assert [member for _, member in found[:3]] == members
        assert found[0][0] == place.last


TOGETHER = {
    "causal": ({}, 1, 16), "causal D64": ({"head_dim": 64}, 1, 32), "grouped": ({}, 4, 4),
    "one key head": ({}, 32, 1), "full": ({"mask": AttentionMask.full()}, 1, 16),
    "window": ({"mask": AttentionMask.causal(window=9)}, 4, 8),
    "any order": ({"deterministic": False}, 1, 8),
    "any order, grouped": ({"deterministic": False}, 4, 4),
    "padded": ({"mask": AttentionMask.from_padding(torch.ones(1, 4096))}, 1, 1),
    "padded, grouped": ({"mask": AttentionMask.from_padding(torch.ones(1, 4096))}, 4, 8),
    "D256, grouped": ({"head_dim": 256}, 2, 2),
}  # fmt: skip


@pytest.mark.parametrize(("given", "group", "want"), TOGETHER.values(), ids=TOGETHER)
def test_so_many_key_heads_go_side_by_side(given: dict, group: int, want: int) -> None:
    given = {"mask": AttentionMask.causal(), "head_dim": 128} | given
    mask, head_dim = given.pop("mask"), given.pop("head_dim")
    query, key = (torch.empty(1, heads, 4096, head_dim, device="meta") for heads in (2 * group, 2))
    tiles = config.backward_tiles(query, key, key, params(mask, 4096, **given))
    assert tiles.together == want
