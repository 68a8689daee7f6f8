"""AttentionMask against brute force written from the plain description of each mask."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from helpers import LargestTensor
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, is_fake

from hf_flash_two import AttentionMask, flash_attention
from hf_flash_two.kernels.blockwise.tiles import TileMap, band_tiles, bound_tiles
from hf_flash_two.masks import FAR, KEY_GROUP

BATCH = 3

settings.register_profile("masks", max_examples=60, deadline=None, derandomize=True)
settings.load_profile("masks")


@dataclass(frozen=True)
class Case:
    """A mask and, computed without it, who sees whom."""

    mask: AttentionMask
    visible: Tensor  # bool [B or 1, 1, Tq, Tk]
    description: str

    def __repr__(self) -> str:
        return f"{self.description} {list(self.visible.shape)}"


@dataclass(frozen=True)
class Size:
    """Lengths of a problem and where its first query stands."""

    queries: int
    keys: int
    offset: int | None

    @property
    def first_position(self) -> int:
        return self.keys - self.queries if self.offset is None else self.offset

    def brute(self, sees: Callable) -> Tensor:
        """``sees(b, i, j)`` for query position i and key j, all numbers."""
        positions = range(self.first_position, self.first_position + self.queries)
        return torch.tensor(
            [
                [[[bool(sees(b, i, j)) for j in range(self.keys)] for i in positions]]
                for b in range(BATCH)
            ],
            dtype=torch.bool,
        ).view(BATCH, 1, self.queries, self.keys)


sizes = st.builds(Size, st.integers(1, 40), st.integers(1, 150), st.none() | st.integers(-20, 60))
square_sizes = st.integers(1, 70).map(lambda length: Size(length, length, 0))
widths = st.none() | st.integers(0, 50)


def numbers(draw, count: int, low: int, high: int) -> list[int]:
    return draw(st.lists(st.integers(low, high), min_size=count, max_size=count))


def cuts(draw, length: int) -> list[int]:
    """Boundaries that split ``length`` into up to six documents, some of them empty."""
    inner = draw(st.lists(st.integers(0, length), max_size=5))
    return [0, *sorted(inner), length]


def part_of(boundaries: list[int], index: int) -> int:
    """Which document holds a place."""
    return max(n for n, start in enumerate(boundaries[:-1]) if start <= index)


# One strategy for each constructor.


def full(size: Size) -> st.SearchStrategy[Case]:
    return st.just(Case(AttentionMask.full(), size.brute(lambda b, i, j: True), "full"))


@st.composite
def causal(draw, size: Size) -> Case:
    window = draw(st.none() | st.integers(1, 60))
    mask = AttentionMask.causal(window, query_offset=size.offset)
    width = math.inf if window is None else window
    return Case(mask, size.brute(lambda b, i, j: 0 <= i - j < width), f"causal {window}")


@st.composite
def window(draw, size: Size) -> Case:
    left, right = draw(widths), draw(widths)
    mask = AttentionMask.window(left, right, query_offset=size.offset)
    behind = math.inf if left is None else left
    ahead = math.inf if right is None else right
    visible = size.brute(lambda b, i, j: j - ahead <= i <= j + behind)
    return Case(mask, visible, f"window {left} {right}")


@st.composite
def intervals(draw, size: Size) -> Case:
    rows = draw(st.sampled_from([1, BATCH]))
    first = [numbers(draw, size.keys, -30, 120) for _ in range(rows)]
    last = [numbers(draw, size.keys, -30, 120) for _ in range(rows)]
    dtype = draw(st.sampled_from([torch.int32, torch.int64]))
    mask = AttentionMask.from_intervals(
        torch.tensor(first, dtype=dtype), torch.tensor(last, dtype=dtype), query_offset=size.offset
    )
    visible = size.brute(lambda b, i, j: first[b % rows][j] <= i < last[b % rows][j])
    return Case(mask, visible, "intervals")


@st.composite
def padding(draw, size: Size) -> Case:
    keep = [draw(st.lists(st.booleans(), min_size=size.keys, max_size=size.keys))] * BATCH
    per_row = draw(st.booleans())
    if per_row:
        keep = [keep[0], [True] * size.keys, [False] * size.keys]
    dtype = draw(st.sampled_from([torch.bool, torch.int64, torch.uint8, torch.float32]))
    tensor = torch.tensor(keep if per_row else keep[0]).to(dtype)
    visible = size.brute(lambda b, i, j: keep[b][j])
    return Case(AttentionMask.from_padding(tensor), visible, f"padding {dtype}")


@st.composite
def prefix(draw, size: Size) -> Case:
    lengths = numbers(draw, BATCH, 0, size.keys)
    mask = AttentionMask.from_prefix(torch.tensor(lengths), size.keys)
    visible = size.brute(lambda b, i, j: j <= i or j < lengths[b])
    return Case(mask, visible, f"prefix {lengths}")


@st.composite
def blocks(draw, size: Size) -> Case:
    ids = [numbers(draw, size.keys, -1, 1) for _ in range(BATCH)]

    def sees(b: int, i: int, j: int) -> bool:
        """Behind, or every token from i to j bears one id that is a block's."""
        low, high = sorted((i, j))
        if j <= i:
            return True
        return low >= 0 and high < size.keys and {*ids[b][low : high + 1]} in ({0}, {1})

    return Case(AttentionMask.from_blocks(torch.tensor(ids)), size.brute(sees), "blocks")


@st.composite
def chunks(draw, size: Size) -> Case:
    width = draw(st.integers(1, 40))
    starts = draw(st.none() | st.lists(st.integers(0, 30), min_size=BATCH, max_size=BATCH))
    tensor = None if starts is None else torch.tensor(starts)
    mask = AttentionMask.chunked(width, size.keys, starts=tensor)

    def sees(b: int, i: int, j: int) -> bool:
        start = starts[b] if starts else 0
        return j <= i and (i - start) // width == (j - start) // width

    return Case(mask, size.brute(sees), f"chunks {width} from {starts}")


@st.composite
def dense(draw, size: Size) -> Case:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = draw(
        st.sampled_from([(size.keys,), (size.queries, size.keys), (BATCH, 1, 1, size.keys)])
    )
    visible = torch.rand(shape, generator=generator) > 0.5
    expanded = visible.expand(BATCH, 1, size.queries, size.keys)
    return Case(AttentionMask.from_dense(visible), expanded, f"dense {shape}")


@st.composite
def segments(draw, size: Size) -> Case:
    """Documents named by ids; the queries are the keys."""
    boundaries = cuts(draw, size.keys)
    ids = [part_of(boundaries, j) * 7 - 3 for j in range(size.keys)]
    is_causal = draw(st.booleans())
    mask = AttentionMask.from_documents(segment_ids=torch.tensor(ids), causal=is_causal)
    visible = size.brute(lambda b, i, j: ids[i] == ids[j] and (j <= i or not is_causal))
    return Case(mask, visible, f"segments {boundaries} causal={is_causal}")


@st.composite
def positions(draw, size: Size) -> Case:
    """Documents shown by position ids that start again, each batch row on its own."""
    boundaries = [cuts(draw, size.keys) for _ in range(BATCH)]
    part = [[part_of(row, j) for j in range(size.keys)] for row in boundaries]
    ids = [
        [j - row[part_of(row, j)] + start for j in range(size.keys)]
        for row, start in zip(boundaries, (0, 0, 5), strict=True)
    ]
    width = draw(st.none() | st.integers(1, 20))
    sinks = draw(st.integers(0, 5)) if width else 0
    mask = AttentionMask.from_documents(
        position_ids=torch.tensor(ids), causal=True, window=width, sink_tokens=sinks
    )

    def sees(b: int, i: int, j: int) -> bool:
        near = i - j < (width or math.inf) or j - boundaries[b][part[b][j]] < sinks
        return part[b][i] == part[b][j] and j <= i and near

    description = f"positions {boundaries} window={width} sink_tokens={sinks}"
    return Case(mask, size.brute(sees), description)


@st.composite
def block_diffusion(draw, size: Size) -> Case:
    """Blocks of which some lack a copy."""
    boundaries = cuts(draw, size.keys)
    copies = [part_of(boundaries, j) for j in range(size.keys)]
    rows = draw(st.sampled_from([1, BATCH]))
    # A shift makes the first copy a clean one.
    shifts = numbers(draw, rows, 0, 1)
    ids = torch.tensor([[(copy + shift) // 2 for copy in copies] for shift in shifts])
    noisy = torch.tensor([[(copy + shift) % 2 == 0 for copy in copies] for shift in shifts])
    if rows == 1 and draw(st.booleans()):
        ids, noisy = ids[0], noisy[0]
    mask = AttentionMask.from_block_diffusion(ids, noisy)

    def sees(b: int, i: int, j: int) -> bool:
        clean = (copies[j] + shifts[b % rows]) % 2 == 1
        return copies[i] == copies[j] or (clean and copies[j] < copies[i])

    return Case(mask, size.brute(sees), f"block diffusion {boundaries} {shifts}")


@st.composite
def tree(draw, size: Size) -> Case:
    """Segments in depth-first order, each with a parent among those still open."""
    boundaries = cuts(draw, size.keys)
    parents, path = [], []
    for node in range(len(boundaries) - 1):
        depth = draw(st.integers(0, len(path)))
        path = path[:depth]
        parents.append(path[-1] if path else -1)
        path.append(node)
    lengths = [b - a for a, b in itertools.pairwise(boundaries)]

    def sees(b: int, i: int, j: int) -> bool:
        walk, target = part_of(boundaries, i), part_of(boundaries, j)
        while walk != -1 and walk != target:
            walk = parents[walk]
        return j <= i and walk == target

    return Case(AttentionMask.from_tree(lengths, parents), size.brute(sees), f"tree {parents}")


@st.composite
def packed(draw, size: Size) -> Case:
    """Documents whose queries and keys differ in number, bottom-right causal within each."""
    key_cu = cuts(draw, size.keys)
    query_cu = [0, *sorted(numbers(draw, len(key_cu) - 2, 0, size.queries)), size.queries]
    is_causal = draw(st.booleans())
    width = draw(st.none() | st.integers(1, 20)) if is_causal else None
    sinks = draw(st.integers(0, 5)) if width else 0
    length = draw(st.sampled_from([None, size.keys]))
    mask = AttentionMask.from_documents(
        torch.tensor(key_cu),
        query_cu_seqlens=torch.tensor(query_cu, dtype=torch.int32),
        key_length=length,
        causal=is_causal,
        window=width,
        sink_tokens=sinks,
    )

    def sees(b: int, i: int, j: int) -> bool:
        document = part_of(key_cu, j)
        if not query_cu[document] <= i < query_cu[document + 1]:
            return False
        from_the_end = query_cu[document + 1] - i
        behind = (key_cu[document + 1] - j) - from_the_end
        near = behind < (width or math.inf) or j - key_cu[document] < sinks
        return not is_causal or (behind >= 0 and near)

    description = f"packed {query_cu} {key_cu} causal={is_causal} window={width} {sinks}"
    return Case(mask, size.brute(sees), description)


ANYWHERE = [full, causal, window, intervals, padding, dense]
BOTTOM_RIGHT = [prefix, blocks, chunks]
FROM_ZERO = [segments, positions, tree, packed, block_diffusion]


@st.composite
def cases(draw, count: int = 1, kinds: list | None = None) -> tuple[Size, list[Case]]:
    """Some masks over one size, all with their first query at one place."""
    size = draw(sizes | square_sizes)
    allowed = [*ANYWHERE]
    if size.offset is None:
        allowed += BOTTOM_RIGHT
    if size.offset == 0 and size.queries == size.keys:
        allowed += BOTTOM_RIGHT + FROM_ZERO
    if kinds is not None:
        allowed = [kind for kind in allowed if kind in kinds]
    chosen = [draw(draw(st.sampled_from(allowed))(size)) for _ in range(count)]
    return size, chosen


def seen(mask: AttentionMask, size: Size) -> Tensor:
    mask = dataclasses.replace(mask, query_offset=size.first_position)
    return mask.to_dense(size.queries, size.keys).expand(BATCH, 1, size.queries, size.keys)


# Constructors


@pytest.mark.parametrize("kind", ANYWHERE, ids=lambda kind: kind.__name__)
@given(data=st.data())
def test_anywhere(kind: Callable, data) -> None:
    size = data.draw(sizes)
    case = data.draw(kind(size))
    assert torch.equal(seen(case.mask, size), case.visible)


@pytest.mark.parametrize("kind", [*ANYWHERE, *BOTTOM_RIGHT], ids=lambda kind: kind.__name__)
@given(data=st.data())
def test_bottom_right(kind: Callable, data) -> None:
    """Without an offset the last query stands on the last key."""
    size = data.draw(st.builds(Size, st.integers(1, 60), st.integers(1, 90), st.none()))
    case = data.draw(kind(size))
    dense = case.mask.to_dense(size.queries, size.keys)
    assert torch.equal(dense.expand_as(case.visible), case.visible)


@pytest.mark.parametrize("kind", FROM_ZERO, ids=lambda kind: kind.__name__)
@given(data=st.data())
def test_from_zero(kind: Callable, data) -> None:
    """Masks that say where the queries are need no offset."""
    size = data.draw(square_sizes)
    case = data.draw(kind(size))
    dense = case.mask.to_dense(size.queries, size.keys)
    assert torch.equal(dense.expand_as(case.visible), case.visible)


@given(data=st.data())
def test_packed_queries_and_keys_differ_in_number(data) -> None:
    size = data.draw(st.builds(Size, st.integers(1, 60), st.integers(1, 90), st.just(0)))
    case = data.draw(packed(size))
    dense = case.mask.to_dense(size.queries, size.keys)
    assert torch.equal(dense.expand_as(case.visible), case.visible)


def test_the_docstrings_picture() -> None:
    picture = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]).bool()
    assert torch.equal(AttentionMask.causal().to_dense(2, 5)[0, 0], picture)


def test_documents_can_be_described_in_three_ways() -> None:
    by_cu = AttentionMask.from_documents(torch.tensor([0, 4, 4, 9]), causal=True)
    by_segment = AttentionMask.from_documents(
        segment_ids=torch.tensor([3] * 4 + [1] * 5), causal=True
    )
    by_position = AttentionMask.from_documents(
        position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]), causal=True
    )
    wanted = by_cu.to_dense(9, 9)
    assert torch.equal(by_segment.to_dense(9, 9), wanted)
    assert torch.equal(by_position.to_dense(9, 9), wanted)


def test_a_tree_may_come_as_tensors() -> None:
    lengths, parents = [2, 1, 3], [-1, 0, 0]
    made = AttentionMask.from_tree(torch.tensor(lengths), torch.tensor(parents))
    assert torch.equal(
        made.to_dense(6, 6), AttentionMask.from_tree(lengths, parents).to_dense(6, 6)
    )


@pytest.mark.parametrize(("dtype", "blocks"), [(torch.uint8, 200), (torch.int8, 120)])
def test_block_diffusion_of_many_blocks(dtype: torch.dtype, blocks: int) -> None:
    """Twice the id of a block is more than its dtype holds."""
    place = torch.arange(2 * blocks)
    noisy = place % 2 == 0
    mask = AttentionMask.from_block_diffusion((place // 2).to(dtype), noisy)
    want = (~noisy & (place < place[:, None] // 2 * 2)) | (place == place[:, None])
    assert torch.equal(mask.to_dense(2 * blocks, 2 * blocks)[0, 0], want)


def test_keys_past_the_last_document_are_padding() -> None:
    mask = AttentionMask.from_documents(torch.tensor([0, 3, 5]), key_length=8)
    visible = mask.to_dense(8, 8)[0, 0]
    assert visible[:3, :3].all() and visible[3:5, 3:5].all() and visible.sum() == 9 + 4


def test_a_segment_that_returns_is_another_document() -> None:
    mask = AttentionMask.from_documents(segment_ids=torch.tensor([1, 2, 1]))
    assert torch.equal(mask.to_dense(3, 3)[0, 0], torch.eye(3).bool())


@pytest.mark.parametrize("window", [1000, FAR, 2**31, 2**62])
def test_a_window_longer_than_any_sequence(window: int) -> None:
    causal = AttentionMask.causal(window)
    keep = torch.tensor([0, 1, 1, 1])
    for mask in (causal, causal & AttentionMask.from_padding(keep)):
        reach = mask.to_dense(4, 4)[0, 0, :, 1:]
        assert torch.equal(reach, torch.ones(4, 4).tril().bool()[:, 1:])
    both_ways = AttentionMask.window(window, window) & AttentionMask.from_padding(keep)
    assert both_ways.to_dense(4, 4)[0, 0, :, 1:].all()
    assert tiles_of(causal, 4, 4, 4).nonempty.all()
    documents = AttentionMask.from_documents(torch.tensor([0, 4]), causal=True, window=window)
    assert torch.equal(documents.to_dense(4, 4)[0, 0], torch.ones(4, 4).tril().bool())


# Combining, slicing, moving


@given(cases(count=3))
def test_intersection(drawn) -> None:
    size, (a, b, c) = drawn
    both = a.visible & b.visible
    assert torch.equal(seen(a.mask & b.mask, size), both)
    assert torch.equal(seen(b.mask & a.mask, size), both)
    all_three = both & c.visible
    assert torch.equal(seen((a.mask & b.mask) & c.mask, size), all_three)
    assert torch.equal(seen(a.mask & (b.mask & c.mask), size), all_three)


def test_intersection_of_bands_needs_no_tensor() -> None:
    mask = AttentionMask.causal(8) & AttentionMask.window(5, None) & AttentionMask.full()
    assert (mask.window_left, mask.window_right) == (5, 0)
    assert mask.query_start is None and mask.dense is None


def test_intersection_takes_the_explicit_offset() -> None:
    mask = AttentionMask.causal() & AttentionMask.window(3, 3, query_offset=7)
    assert mask.resolve_offset(2, 20) == 7
    assert AttentionMask.causal().resolve_offset(2, 20) == 18


@given(cases(count=2), st.data())
def test_slices(drawn, data) -> None:
    """A shard of the queries, of the keys, and one of the other."""
    size, (a, b) = drawn
    mask = dataclasses.replace(a.mask & b.mask, query_offset=size.offset)
    visible = a.visible & b.visible
    q0 = data.draw(st.integers(0, size.queries))
    q1 = data.draw(st.integers(q0, size.queries))
    k0 = data.draw(st.integers(0, size.keys))
    k1 = data.draw(st.integers(k0, size.keys))
    by_query = mask.slice_queries(q0, q1, size.queries, size.keys)
    by_key = mask.slice_keys(k0, k1, size.queries, size.keys)
    both = by_query.slice_keys(k0, k1, q1 - q0, size.keys)
    for got, want in (
        (by_query.to_dense(q1 - q0, size.keys), visible[:, :, q0:q1]),
        (by_key.to_dense(size.queries, k1 - k0), visible[..., k0:k1]),
        (both.to_dense(q1 - q0, k1 - k0), visible[:, :, q0:q1, k0:k1]),
    ):
        assert torch.equal(got.expand_as(want), want)


def test_slices_put_together_are_the_whole() -> None:
    """Two shards of the keys, as two ranks would hold them."""
    keep = torch.arange(130) % 5 != 0
    mask = AttentionMask.causal(40) & AttentionMask.from_padding(keep)
    parts = [mask.slice_keys(a, a + 65, 130, 130).to_dense(130, 65) for a in (0, 65)]
    assert torch.equal(torch.cat(parts, dim=-1), mask.to_dense(130, 130))


def test_to_moves_every_tensor() -> None:
    mask = (
        AttentionMask.from_padding(torch.ones(2, 9))
        & AttentionMask.from_dense(torch.ones(9, 9).bool())
        & AttentionMask.causal(3)
    )
    moved = mask.to("meta", non_blocking=True)
    tensors = (moved.query_start, moved.query_stop, moved.dense, moved.key_bounds())
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert mask.query_start.device.type == "cpu"
    assert torch.equal(mask.to("cpu").to_dense(9, 9), mask.to_dense(9, 9))
    band = AttentionMask.causal(3)
    assert band.to("meta") is band


def test_a_mask_can_be_copied() -> None:
    mask = AttentionMask.from_padding(torch.tensor([0, 1, 1])) & AttentionMask.causal()
    assert torch.equal(copy.deepcopy(mask).to_dense(3, 3), mask.to_dense(3, 3))


# Tiles


def tile_truth(visible: Tensor, block_q: int) -> tuple[Tensor, Tensor]:
    """For each tile: does any pair see, do all."""
    some, every = [], []
    for rows in visible.split(block_q, dim=2):
        tiles = rows.split(KEY_GROUP, dim=3)
        some.append(torch.stack([tile.flatten(1).any(1) for tile in tiles], dim=1))
        every.append(torch.stack([tile.flatten(1).all(1) for tile in tiles], dim=1))
    return torch.stack(some, dim=1), torch.stack(every, dim=1)


def tiles_of(mask: AttentionMask, queries: int, keys: int, block_q: int) -> TileMap:
    offset, bounds = mask.resolve_offset(queries, keys), mask.key_bounds()
    dense = mask.dense is not None
    if bounds is None:
        band = (mask.window_left, mask.window_right)
        return band_tiles(*band, offset, queries, keys, block_q, dense)
    return bound_tiles(bounds, offset, queries, block_q, dense)


def tiles_from(mask: AttentionMask, size: Size, block_q: int) -> TileMap:
    mask = dataclasses.replace(mask, query_offset=size.first_position)
    return tiles_of(mask, size.queries, size.keys, block_q)


block_sizes = st.integers(1, 50) | st.sampled_from([64, 128])


@given(cases(count=2), block_sizes)
def test_tiles_hold_what_is_seen(drawn, block_q: int) -> None:
    """No visible pair is skipped; a tile called full is full."""
    size, (a, b) = drawn
    for mask, visible in (
        (a.mask, a.visible),
        (b.mask, b.visible),
        (a.mask & b.mask, a.visible & b.visible),
    ):
        tiles = tiles_from(mask, size, block_q)
        some, every = tile_truth(visible, block_q)
        assert not (some & ~tiles.nonempty).any()
        assert not (tiles.full & ~every).any()
        assert not (tiles.full & ~tiles.nonempty).any()


@given(cases(kinds=[full, causal, window]), block_sizes)
def test_tiles_of_a_band_are_exact(drawn, block_q: int) -> None:
    size, (case,) = drawn
    tiles = tiles_from(case.mask, size, block_q)
    some, every = tile_truth(case.visible, block_q)
    assert torch.equal(tiles.nonempty.expand_as(some), some)
    assert torch.equal(tiles.full.expand_as(every), every)


@pytest.mark.parametrize("block_q", [1, 64, 100])
@pytest.mark.parametrize(
    "mask",
    [
        AttentionMask.causal() & AttentionMask.from_padding(torch.arange(512) >= 256),
        AttentionMask.from_padding(torch.arange(512) < 256),
        AttentionMask.from_documents(torch.tensor([0, 256, 512])),
        AttentionMask.from_documents(torch.tensor([0, 256, 512]), causal=True),
        AttentionMask.from_prefix(torch.tensor(256), 512),
    ],
    ids=["left-padding", "right-padding", "documents", "causal-documents", "prefix"],
)
def test_tiles_are_exact_where_edges_meet_tiles(mask, block_q: int) -> None:
    tiles = tiles_of(mask, 512, 512, block_q)
    some, every = tile_truth(mask.to_dense(512, 512), block_q)
    assert torch.equal(tiles.nonempty, some)
    assert torch.equal(tiles.full, every)


@given(cases(kinds=[intervals, padding, blocks, chunks, tree, packed, positions]))
def test_key_bounds(drawn) -> None:
    """Smallest and largest begin and end over each group of keys, those seen by nobody left out."""
    _, (case,) = drawn
    mask = case.mask
    bounds = mask.key_bounds()
    groups = zip(
        mask.query_start.split(KEY_GROUP, 1), mask.query_stop.split(KEY_GROUP, 1), strict=True
    )
    for index, (first, last) in enumerate(groups):
        for row in range(first.shape[0]):
            runs = list(zip(first[row].tolist(), last[row].tolist(), strict=True))
            live = [run for run in runs if run[0] < run[1]]
            got = bounds[row, index].tolist()
            assert got[0] == min((a for a, _ in live), default=FAR)
            assert got[3] == max((b for _, b in live), default=-FAR)
            if len(live) == len(runs):
                assert got[1:3] == [max(a for a, _ in live), min(b for _, b in live)]
            else:
                assert got[1] >= FAR or got[2] <= -FAR


def test_key_bounds_are_computed_once() -> None:
    mask = AttentionMask.from_padding(torch.ones(2, 100))
    assert mask.key_bounds() is mask.key_bounds()
    assert mask.slice_queries(5, 9, 100, 100).key_bounds() is mask.key_bounds()
    assert AttentionMask.causal().key_bounds() is None


def test_no_keys() -> None:
    mask = AttentionMask.from_padding(torch.ones(2, 0))
    assert mask.key_bounds().shape == (2, 0, 4)
    assert tiles_of(mask, 5, 0, 2).nonempty.shape == (2, 3, 0)
    assert tiles_of(AttentionMask.causal(), 5, 0, 2).nonempty.shape == (1, 3, 0)


# The value


LONG = 100_000

LONG_MASKS = {
    "full": lambda: AttentionMask.full(),
    "causal": lambda: AttentionMask.causal(500),
    "padding": lambda: AttentionMask.from_padding(torch.ones(1, LONG)),
    "cu_seqlens": lambda: AttentionMask.from_documents(
        torch.arange(0, LONG + 1, 100), causal=True, window=20
    ),
    "segments": lambda: AttentionMask.from_documents(segment_ids=torch.arange(LONG) // 100),
    "positions": lambda: AttentionMask.from_documents(position_ids=torch.arange(LONG) % 100),
    "prefix": lambda: AttentionMask.from_prefix(torch.tensor([70]), LONG),
    "blocks": lambda: AttentionMask.from_blocks(torch.arange(LONG) // 64 % 2 - 1),
    "tree": lambda: AttentionMask.from_tree([LONG // 2, LONG // 4, LONG // 4], [-1, 0, 0]),
    "chunks": lambda: AttentionMask.chunked(64, LONG),
}


@pytest.mark.parametrize("make", LONG_MASKS.values(), ids=LONG_MASKS)
def test_memory_is_linear(make: Callable) -> None:
    """Making, intersecting, moving, slicing and summarising never holds N x N."""
    with LargestTensor() as largest:
        mask = make() & AttentionMask.causal(query_offset=0)
        mask = mask & AttentionMask.from_padding(torch.ones(LONG))
        mask.slice_keys(10, LONG, LONG, LONG).slice_queries(5, 9, LONG, LONG - 10)
        mask.to("cpu").key_bounds()
    assert largest.elements < 2 * LONG
    assert mask.query_start.dtype == mask.query_stop.dtype == torch.int32
    assert mask.query_start.numel() == mask.query_stop.numel() == LONG


def test_immutable() -> None:
    mask = AttentionMask.causal()
    with pytest.raises(dataclasses.FrozenInstanceError):
        mask.window_left = 3


def test_independent_of_what_it_was_made_from() -> None:
    first, last = torch.zeros(1, 4, dtype=torch.int32), torch.full((1, 4), 9, dtype=torch.int32)
    keep = torch.tensor([True, False, True, True])
    masks = [AttentionMask.from_intervals(first, last), AttentionMask.from_padding(keep)]
    before = [mask.to_dense(4, 4) for mask in masks]
    first.fill_(3)
    last.fill_(3)
    keep.fill_(False)
    for mask, dense in zip(masks, before, strict=True):
        assert torch.equal(mask.to_dense(4, 4), dense)


WRITES = {
    "copy_": lambda old, new: old.copy_(new),
    "data.copy_": lambda old, new: old.data.copy_(new),
    "data": lambda old, new: setattr(old, "data", new.clone()),
    "numpy": lambda old, new: np.copyto(old.numpy(), new.numpy()),
    "dlpack": lambda old, new: torch.from_dlpack(old).copy_(new),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("own", [False, True], ids=["from_intervals", "fields"])
def test_what_was_worked_out_is_never_of_other_values(write: Callable, own: bool) -> None:
    """A mask keeps what it was made from or reads it live: it never mixes old and new."""
    first = torch.full((1, 200), 150, dtype=torch.int32)
    last = torch.full_like(first, 180)
    make = AttentionMask if own else AttentionMask.from_intervals
    mask = make(query_start=first, query_stop=last, query_offset=0)
    tensors = [torch.randn(1, 1, 200, 8) for _ in range(3)]

    def attend(mask: AttentionMask | Tensor) -> Tensor:
        return flash_attention(*tensors, mask=mask, q_bucket_size=16)

    attend(mask)
    write(first, torch.arange(200, dtype=torch.int32)[None])
    write(last, torch.full_like(last, FAR))
    assert torch.equal(attend(mask), attend(mask.to_dense(200, 200)))


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_dense_mask_is_read_in_each_call(write: Callable) -> None:
    given = torch.ones(30, 40, dtype=torch.bool).tril(10)
    mask = AttentionMask.from_dense(given)
    combined = mask & AttentionMask.from_padding(torch.ones(40))
    tensors = [torch.randn(1, 1, n, 8) for n in (30, 40, 40)]
    for each in (mask, combined):
        flash_attention(*tensors, mask=each)
    other = torch.rand(30, 40) > 0.5
    write(given, other)
    for each in (mask, combined):
        want = flash_attention(*tensors, mask=each.to_dense(30, 40))
        assert torch.equal(flash_attention(*tensors, mask=each), want)


WORDS = {
    "full": AttentionMask.full,
    "causal": AttentionMask.causal,
    "causal, window=4": lambda: AttentionMask.causal(4),
    "window left=3 right=None": lambda: AttentionMask.window(3, None),
    "causal, query_offset=3": lambda: AttentionMask.causal(query_offset=3),
    "intervals over 128 keys, batch 2, on cpu": lambda: (
        AttentionMask.causal() & AttentionMask.from_padding(torch.ones(2, 128))
    ),
    "dense [1, 1, 5, 7] on cpu": lambda: AttentionMask.from_dense(torch.ones(5, 7).bool()),
}


@pytest.mark.parametrize("words", WORDS)
def test_repr_says_what_it_is(words: str) -> None:
    assert repr(WORDS[words]()) == f"AttentionMask({words})"


# Under vmap


IDS = torch.tensor([[0, 0, 1, 1, 1, 2], [0, 1, 1, 1, 2, 2], [3, 3, 3, 3, 3, 3]])
MAPPED: dict[str, tuple[Callable, Tensor]] = {
    "padding": (AttentionMask.from_padding, torch.rand(3, 2, 6) > 0.3),
    "padding-one-row": (AttentionMask.from_padding, torch.rand(3, 6) > 0.3),
    "padding-int": (AttentionMask.from_padding, (torch.rand(3, 2, 6) > 0.3).long()),
    "padding-float": (AttentionMask.from_padding, (torch.rand(3, 2, 6) > 0.3).float()),
    "intervals": (lambda x: AttentionMask.from_intervals(x, x + 2), IDS),
    "intervals-and-plain": (
        lambda x: AttentionMask.from_intervals(x, torch.full((6,), 9)), IDS
    ),
    "segments": (lambda x: AttentionMask.from_documents(segment_ids=x, causal=True), IDS),
    "positions": (
        lambda x: AttentionMask.from_documents(position_ids=x),
        torch.tensor([[0, 1, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5], [5, 6, 0, 0, 1, 2]]),
    ),
    "boundaries": (
        lambda x: AttentionMask.from_documents(x, key_length=6, causal=True, window=2),
        torch.tensor([[0, 2, 6], [0, 5, 6], [0, 1, 5]]),
    ),
    "sink-tokens": (
        lambda x: AttentionMask.from_documents(
            segment_ids=x, causal=True, window=1, sink_tokens=1
        ),
        IDS,
    ),
    "sink-tokens-of-boundaries": (
        lambda x: AttentionMask.from_documents(
            x, key_length=6, causal=True, window=1, sink_tokens=2
        ),
        torch.tensor([[0, 2, 6], [0, 5, 6], [0, 1, 5]]),
    ),
    "block-diffusion": (lambda x: AttentionMask.from_block_diffusion(x // 2, x % 2 == 0), IDS),
    "prefix": (lambda x: AttentionMask.from_prefix(x, 6), torch.tensor([[1, 2], [0, 6], [3, 3]])),
    "blocks": (AttentionMask.from_blocks, IDS - 1),
    "chunked": (
        lambda x: AttentionMask.chunked(2, 6, starts=x), torch.tensor([[0, 1], [1, 1], [2, 0]])
    ),
    "dense": (AttentionMask.from_dense, torch.rand(3, 6, 6) > 0.3),
    "bool": (lambda x: x, torch.rand(3, 6, 6) > 0.3),
    "intersection": (
        lambda x: AttentionMask.from_padding(x) & AttentionMask.causal(3), torch.rand(3, 6) > 0.3
    ),
    "slices": (
        lambda x: (AttentionMask.from_padding(x) & AttentionMask.causal()).slice_keys(0, 6, 6, 6)
        .slice_queries(0, 6, 6, 6),
        torch.rand(3, 6) > 0.3,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "given"), MAPPED.values(), ids=MAPPED)
def test_made_under_vmap(make: Callable, given: Tensor) -> None:
    """Each sample gets the mask of its own values; with gradients, and mapped twice."""
    tensors = [torch.randn(2, 2, 6, 8) for _ in range(3)]

    def attend(given: Tensor, query: Tensor) -> Tensor:
        return flash_attention(query, *tensors[1:], mask=make(given))

    def loss(query: Tensor, given: Tensor) -> Tensor:
        return attend(given, query).sin().sum()

    for function in (attend, lambda given, query: torch.func.grad(loss)(query, given)):
        once = torch.vmap(function, in_dims=(0, None))
        got = once(given, tensors[0])
        twice = torch.vmap(once, in_dims=(0, None))(torch.stack([given, given]), tensors[0])
        for n in range(3):
            want = function(given[n], tensors[0])
            for result in (got[n], twice[0, n], twice[1, n]):
                torch.testing.assert_close(result, want)


def test_values_are_looked_at_under_vmap() -> None:
    """A mask that is added to scores is refused there, too."""
    added = torch.tensor([[1.0, 0.0], [0.0, -1e9]])
    with pytest.raises(ValueError, match="keep: expected 0 and 1"):
        torch.vmap(lambda keep: AttentionMask.from_padding(keep).query_start)(added)


@pytest.mark.parametrize("axis", [0, 1])
def test_boundaries_are_looked_at_under_vmap(axis: int) -> None:
    def make(boundaries: Tensor) -> Tensor:
        return AttentionMask.from_documents(boundaries, key_length=6).query_start

    made = torch.vmap(make, axis)(torch.tensor([[0, 4, 6], [0, 2, 6]]).movedim(0, axis))
    assert made[:, 0].tolist() == [[0, 0, 0, 0, 4, 4], [0, 0, 2, 2, 2, 2]]
    with pytest.raises(ValueError, match="cu_seqlens: expected 0, then boundaries"):
        torch.vmap(make, axis)(torch.tensor([[0, 4, 6], [0, 4, 2]]).movedim(0, axis))


def test_boundaries_are_not_looked_at_where_that_would_wait() -> None:
    """Without data stands in for a GPU; what torch.compile traces runs on other values."""
    meta = AttentionMask.from_documents(torch.tensor([0, 6, 4], device="meta"), key_length=6)
    assert meta.query_start.shape == (1, 6)

    @torch.compile(fullgraph=True, backend="eager")
    def make(boundaries: Tensor, start: int) -> Tensor:
        mask = AttentionMask.from_documents(boundaries, key_length=9, causal=True)
        return mask.slice_queries(start, 9, 9, 9).to_dense(9 - start, 9)

    for start, ends in ((2, [0, 4, 9]), (3, [0, 5, 5]), (4, [0, 0, 9])):
        boundaries = torch.tensor(ends)
        want = AttentionMask.from_documents(boundaries, key_length=9, causal=True).to_dense(9, 9)
        assert torch.equal(make(boundaries, start), want[:, :, start:])


def test_boundaries_under_vmap_need_a_length() -> None:
    def make(boundaries: Tensor) -> Tensor:
        return AttentionMask.from_documents(boundaries).query_start

    with pytest.raises(ValueError, match="key_length: expected the number of keys"):
        torch.vmap(make)(torch.tensor([[0, 2, 6], [0, 5, 6]]))


def test_fake_tensors_leave_nothing_behind() -> None:
    """What is worked out without data is not taken for the mask's own later on."""
    keep = torch.rand(2, 100) > 0.3
    mask = AttentionMask.from_padding(keep)
    tensors = [torch.randn(2, 2, 100, 8) for _ in range(3)]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(x).requires_grad_() for x in tensors]
        for each in (mask, AttentionMask.from_padding(mode.from_tensor(keep))):
            out = flash_attention(*fakes, mask=each)
            (grad,) = torch.autograd.grad(out.sum(), fakes[1])
            assert is_fake(out) and out.shape == grad.shape == (2, 2, 100, 8)
    want = flash_attention(*tensors, mask=AttentionMask.from_padding(keep))
    assert torch.equal(flash_attention(*tensors, mask=mask), want)


def test_inputs_are_not_written_to() -> None:
    ids = torch.tensor([[0, 0, 1, 1, 2]])
    cu = torch.tensor([0, 2, 5])
    AttentionMask.from_documents(segment_ids=ids, causal=True)
    AttentionMask.from_blocks(ids)
    AttentionMask.from_documents(cu, causal=True, window=2)
    assert ids.tolist() == [[0, 0, 1, 1, 2]] and cu.tolist() == [0, 2, 5]


def test_check_accepts_what_fits() -> None:
    AttentionMask.from_padding(torch.ones(7)).check(3, 4, 5, 7)
    AttentionMask.from_padding(torch.ones(3, 7)).check(3, 4, 5, 7)
    AttentionMask.from_dense(torch.ones(4, 5, 1).bool()).check(3, 4, 5, 7)
    AttentionMask.causal().check(3, 4, 5, 7)


REFUSALS = {
    "causal-window": (lambda: AttentionMask.causal(0), r"window: expected .*at least 1 .*got 0"),
    "causal-window-float": (
        lambda: AttentionMask.causal(2.0), r"window: expected an integer of .*got 2.0"
    ),
    "window-float": (lambda: AttentionMask.window(1, 1.5), r"right: expected .*integer .*got 1.5"),
    "window-left": (lambda: AttentionMask.window(-1, 2), r"left: expected None or .*got -1"),
    "window-right": (lambda: AttentionMask.window(1, -2), r"right: expected None or .*got -2"),
    "intervals-float": (
        lambda: AttentionMask.from_intervals(torch.zeros(4), torch.ones(4)),
        r"query_start, query_stop: expected integers .*torch.float32 \[4\]",
    ),
    "intervals-3d": (
        lambda: AttentionMask.from_intervals(*torch.zeros(2, 1, 2, 4).long()),
        r"query_start, query_stop: expected integers of shape .*, got .*\[1, 2, 4\]",
    ),
    "padding-4d": (
        lambda: AttentionMask.from_padding(torch.ones(1, 1, 1, 4)),
        r"keep: expected shape \[Tk\] or \[B, Tk\], got \[1, 1, 1, 4\]",
    ),
    "padding-added": (
        lambda: AttentionMask.from_padding(torch.tensor([0.0, -1e9])),
        r"keep: expected 0 and 1 \(1 may be seen\), got torch.float32 with other values",
    ),
    "padding-numbers-documents": (
        lambda: AttentionMask.from_padding(torch.tensor([1, 1, 2, 2, 0])),
        r"keep: expected 0 and 1 .*got torch.int64 .*documents by AttentionMask.from_documents",
    ),
    "documents-none": (
        lambda: AttentionMask.from_documents(),
        r"cu_seqlens, segment_ids, position_ids: expected exactly one of them, got 0",
    ),
    "documents-two": (
        lambda: AttentionMask.from_documents(
            torch.tensor([0, 4]), segment_ids=torch.zeros(4).long()
        ),
        r"segment_ids, position_ids: expected exactly one of them, got 2",
    ),
    "documents-window": (
        lambda: AttentionMask.from_documents(torch.tensor([0, 4]), window=2),
        r"window: expected None without causal=True, got 2; .*AttentionMask.window",
    ),
    "documents-query-cu": (
        lambda: AttentionMask.from_documents(
            segment_ids=torch.zeros(4).long(), query_cu_seqlens=torch.tensor([0, 4])
        ),
        r"query_cu_seqlens: expected cu_seqlens along with it",
    ),
    "documents-shapes": (
        lambda: AttentionMask.from_documents(
            torch.tensor([0, 2, 4]), query_cu_seqlens=torch.tensor([0, 4])
        ),
        r"cu_seqlens, query_cu_seqlens: expected .*\[N \+ 1\], got .*\[3\] and torch.int64 \[2\]",
    ),
    "documents-empty": (
        lambda: AttentionMask.from_documents(torch.tensor([0])),
        r"cu_seqlens, query_cu_seqlens: expected integers of one shape",
    ),
    "documents-float": (
        lambda: AttentionMask.from_documents(torch.tensor([0.0, 2.5, 5.0])),
        r"cu_seqlens, query_cu_seqlens: expected integers .*got torch.float32 \[3\]",
    ),
    "documents-go-down": (
        lambda: AttentionMask.from_documents(torch.tensor([0, 6, 4, 10])),
        r"^cu_seqlens: expected 0, then boundaries that never go down, got \[0, 6, 4, 10\]; of .*"
        r"torch.tensor\(\[0, \*lengths\]\).cumsum\(0\)",
    ),
    "documents-lengths": (
        lambda: AttentionMask.from_documents(
            torch.tensor([4, 6], dtype=torch.uint8), key_length=10, causal=True
        ),
        r"^cu_seqlens: expected 0, then .*got \[4, 6\]; of lengths they are",
    ),
    "documents-of-queries-go-down": (
        lambda: AttentionMask.from_documents(
            torch.tensor([0, 4, 9]), query_cu_seqlens=torch.tensor([0, 4, 3])
        ),
        r"^query_cu_seqlens: expected 0, then boundaries that never go down, got \[0, 4, 3\]",
    ),
    "documents-segments-3d": (
        lambda: AttentionMask.from_documents(segment_ids=torch.zeros(1, 2, 3).long()),
        r"segment_ids: expected shape \[T\] or \[B, T\], got \[1, 2, 3\]",
    ),
    "documents-positions-0d": (
        lambda: AttentionMask.from_documents(position_ids=torch.tensor(3)),
        r"position_ids: expected shape \[T\] or \[B, T\], got \[\]",
    ),
    "blocks-3d": (
        lambda: AttentionMask.from_blocks(torch.zeros(1, 2, 3).long()),
        r"block_ids: expected shape \[T\] or \[B, T\], got \[1, 2, 3\]",
    ),
    "tree-lengths": (
        lambda: AttentionMask.from_tree([2, 2], [-1]),
        r"parents: expected 2 entries, got 1",
    ),
    "sink-tokens": (
        lambda: AttentionMask.from_documents(
            torch.tensor([0, 4]), causal=True, window=2, sink_tokens=-1
        ),
        r"sink_tokens: expected an integer of at least 0, and 0 without a window, got -1",
    ),
    "sink-tokens-without-a-window": (
        lambda: AttentionMask.from_documents(torch.tensor([0, 4]), causal=True, sink_tokens=2),
        r"sink_tokens: .* 0 without a window, got 2",
    ),
    "block-diffusion-dtype": (
        lambda: AttentionMask.from_block_diffusion(torch.zeros(4).long(), torch.zeros(4)),
        r"noisy: expected bool of shape \[4\], as block_ids, got torch.float32 \[4\]",
    ),
    "block-diffusion-shape": (
        lambda: AttentionMask.from_block_diffusion(torch.zeros(2, 4).long(), torch.ones(4).bool()),
        r"noisy: expected bool of shape \[2, 4\], .*got torch.bool \[4\]",
    ),
    "block-diffusion-halves": (
        lambda: AttentionMask.from_block_diffusion(
            torch.tensor([0, 0, 1, 1, 0, 0, 1, 1]), torch.arange(8) < 4
        ),
        r"block_ids, noisy: .*got another order; sort the tokens by 2 \* block_ids \+ ~noisy",
    ),
    "block-diffusion-halves-unsigned": (
        lambda: AttentionMask.from_block_diffusion(
            torch.tensor([0, 0, 1, 1, 0, 0, 1, 1]).to(torch.uint8), torch.arange(8) < 4
        ),
        r"block_ids, noisy: .*got another order",
    ),
    "block-diffusion-float": (
        lambda: AttentionMask.from_block_diffusion(torch.arange(4) / 10, torch.ones(4).bool()),
        r"block_ids: expected a tensor of integers, got torch.float32",
    ),
    "block-diffusion-clean-first": (
        lambda: AttentionMask.from_block_diffusion(torch.zeros(2).long(), torch.arange(2) > 0),
        r"block_ids, noisy: expected each block's noisy tokens and then its clean ones",
    ),
    "tree-negative-length": (
        lambda: AttentionMask.from_tree([2, -2], [-1, 0]),
        r"segment_lengths: expected integers of at least 0, got \[2, -2\]",
    ),
    "tree-float-length": (
        lambda: AttentionMask.from_tree(torch.tensor([2.5]), [-1]),
        r"segment_lengths: expected integers of at least 0, got \[2.5\]",
    ),
    "tree-order": (
        lambda: AttentionMask.from_tree([1, 1, 1, 1], [-1, 0, 0, 1]),
        r"parents: expected .*depth-first order, got segment 3 neither right after its parent 1",
    ),
    "tree-forward": (
        lambda: AttentionMask.from_tree([1, 1], [1, -1]),
        r"parents: expected .*depth-first order, got segment 0 neither right after its parent 1",
    ),
    "chunk-size": (lambda: AttentionMask.chunked(0, 8), r"size: expected an integer of .*1, got 0"),
    "chunk-size-float": (
        lambda: AttentionMask.chunked(2.5, 8), r"size: expected an integer of .*got 2.5"
    ),
    "prefix-float": (
        lambda: AttentionMask.from_prefix(torch.tensor([3.5]), 10),
        r"prefix_lengths: expected a tensor of integers, got torch.float32",
    ),
    "chunk-starts-float": (
        lambda: AttentionMask.chunked(2, 4, starts=torch.tensor([0.5])),
        r"starts: expected a tensor of integers, got torch.float32",
    ),
    "dense-float": (
        lambda: AttentionMask.from_dense(torch.zeros(4, 4)),
        r"visible: expected bool .*got torch.float32; .*`bias` of flash_attention",
    ),
    "dense-5d": (
        lambda: AttentionMask.from_dense(torch.ones(1, 1, 1, 4, 4).bool()),
        r"visible: expected at most 4 dimensions, got 5",
    ),
    "offset-float": (
        lambda: AttentionMask.causal(query_offset=1.5),
        r"query_offset: expected an integer or None, got 1.5",
    ),
    "offset-tensor": (
        lambda: AttentionMask.from_intervals(*IDS[:2], query_offset=torch.tensor(2)),
        r"query_offset: expected an integer or None, got 2",
    ),
    "slice-backwards": (
        lambda: AttentionMask.causal().slice_queries(5, 2, 8, 8),
        r"start, stop: expected 0 <= start <= stop <= query_length = 8, got 5 and 2",
    ),
    "slice-past-the-end": (
        lambda: AttentionMask.causal().slice_keys(5, 9, 6, 8),
        r"start, stop: expected .* <= key_length = 8, got 5 and 9",
    ),
    "half-an-interval": (
        lambda: AttentionMask(query_start=torch.zeros(1, 4).int()),
        r"query_start, query_stop: expected both or none",
    ),
    "band-and-intervals": (
        lambda: AttentionMask(
            window_right=0, query_start=torch.zeros(1, 4).int(), query_stop=torch.ones(1, 4).int()
        ),
        r"window_left, window_right: expected None beside intervals, got \(None, 0\); combine .* &",
    ),
    "and-offsets": (
        lambda: AttentionMask.causal(query_offset=1) & AttentionMask.full()
        & AttentionMask.causal(query_offset=2),
        r"query_offset: expected the same in both masks, got 1 and 2",
    ),
    "and-lengths": (
        lambda: (
            AttentionMask.from_padding(torch.ones(4)) & AttentionMask.from_padding(torch.ones(5))
        ),
        r"expected the same number of keys in both, got 4 and 5",
    ),
    "check-batch": (
        lambda: AttentionMask.from_padding(torch.ones(2, 4)).check(3, 1, 4, 4),
        r"mask: expected 4 keys and 1 or 3 batch rows, .*got 4 keys and 2 batch rows",
    ),
    "check-dense": (
        lambda: AttentionMask.from_dense(torch.ones(3, 4).bool()).check(1, 1, 4, 4),
        r"mask: expected a tensor broadcastable to .*\[1, 1, 4, 4\], got \[1, 1, 3, 4\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "message"), REFUSALS.values(), ids=REFUSALS)
def test_refusal(make: Callable, message: str) -> None:
    """Names the argument, what was expected and what came."""
    with pytest.raises(ValueError, match=message):
        make()


NO_TENSORS = {
    "query_start": lambda: AttentionMask.from_intervals([0, 1], torch.tensor([2, 2])),
    "query_stop": lambda: AttentionMask.from_intervals(torch.tensor([0, 1]), [2, 2]),
    "keep": lambda: AttentionMask.from_padding([1, 0]),
    "cu_seqlens": lambda: AttentionMask.from_documents([0, 4, 10]),
    "query_cu_seqlens": lambda: AttentionMask.from_documents(
        torch.tensor([0, 4]), query_cu_seqlens=[0, 4]
    ),
    "segment_ids": lambda: AttentionMask.from_documents(segment_ids=[0, 0]),
    "position_ids": lambda: AttentionMask.from_documents(position_ids=[0, 1]),
    "prefix_lengths": lambda: AttentionMask.from_prefix([3], 10),
    "block_ids": lambda: AttentionMask.from_blocks([0, 0]),
    "noisy": lambda: AttentionMask.from_block_diffusion(torch.tensor([0, 0]), [True, False]),
    "starts": lambda: AttentionMask.chunked(2, 4, starts=[1]),
    "visible": lambda: AttentionMask.from_dense([[True]]),
}


@pytest.mark.parametrize("name", NO_TENSORS)
def test_what_is_no_tensor_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: expected a tensor of .*, got list$"):
        NO_TENSORS[name]()


def test_a_used_mask_can_be_copied() -> None:
    mask = AttentionMask.from_padding(torch.tensor([True, False, True]))
    assert torch.equal(copy.deepcopy(mask).key_bounds(), mask.key_bounds())
    mask.key_bounds()
    assert torch.equal(copy.deepcopy(mask).key_bounds(), mask.key_bounds())


def test_and_with_something_else() -> None:
    with pytest.raises(TypeError):
        AttentionMask.causal() & torch.ones(4, 4).bool()
