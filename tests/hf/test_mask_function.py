"""Mask functions -> `AttentionMask`, against the dense mask that Transformers makes of them."""

from __future__ import annotations

import pytest
import torch
from helpers import Watched
from torch import Tensor
from transformers import BertModel, RemBertModel, masking_utils
from transformers.masking_utils import causal_mask_function, sdpa_mask

from hf_flash_two.hf import compat, mask_function, tensor_masks
from hf_flash_two.hf.mask_function import make_mask

BATCH = 3
# queries, keys, position of query 0, position of key 0
PLACES = {
    "prefill": (37, 37, 0, 0),
    "continued": (11, 37, 26, 0),
    "decode": (1, 37, 36, 0),
    "static cache": (7, 53, 12, 0),
    "static decode": (1, 53, 19, 0),
    "sliding cache": (5, 19, 40, 26),
    "sliding decode": (1, 14, 40, 27),
    "long": (150, 150, 0, 0),
}
PADDINGS = ["none", "ones", "left", "right", "holes", "short", "long"]


def attention_mask(padding: str, keys: int) -> Tensor | None:
    """The 2-D mask as Transformers hands it over: bool, over all positions seen so far."""
    if padding == "none":
        return None
    length = {"short": max(1, keys - 9), "long": keys + 6}.get(padding, keys)
    mask = torch.ones(BATCH, length, dtype=torch.bool)
    if padding in ("left", "short", "long"):
        mask[0, : length // 3] = False
    if padding == "right":
        mask[1, length - length // 3 :] = False
    if padding == "holes":
        mask = torch.rand(BATCH, length) > 0.3
    return mask


def position_ids(length: int) -> Tensor:
    """Row 0 holds three documents, one of a single token; row 1 one document; row 2 two."""
    rows = []
    for lengths in ([5, 1, length - 6], [length], [length // 2, length - length // 2]):
        rows.append(torch.cat([torch.arange(n) for n in lengths]))
    return torch.stack(rows)


def block_ids(length: int) -> Tensor:
    """Two image blocks in row 0, the second at the end; none in row 1; everything in row 2."""
    ids = torch.full((BATCH, length), -1)
    ids[0, 1:6], ids[0, length - 4 :] = 0, 1
    ids[2] = 0
    return ids


def packed(base, length: int):
    ids = position_ids(length)
    documents = masking_utils.find_packed_sequence_indices(ids)
    if hasattr(masking_utils, "packed_sequence_compatibility_function"):
        return masking_utils.packed_sequence_compatibility_function(base, ids, documents)
    return masking_utils.and_masks(base, masking_utils.packed_sequence_mask_function(documents))


def closures(length: int) -> dict:
    """Every kind that Transformers puts together; packed ones only fit a prefill."""
    m = masking_utils
    left = torch.tensor([3, 0, 1])
    chunked = m.chunked_causal_mask_function(8, left)
    sliding = m.sliding_window_causal_mask_function(6)
    made = {
        "causal": causal_mask_function,
        "bidirectional": m.bidirectional_mask_function,
        "sliding": sliding,
        "sliding both ways": m.sliding_window_bidirectional_mask_function(4),
        "chunked": chunked,
        "padding": m.and_masks(
            causal_mask_function, m.padding_mask_function(torch.rand(BATCH, length) > 0.4)
        ),
    }
    if hasattr(m, "blockwise_overlay"):
        blocks = m.blockwise_overlay(block_ids(length))
        made["blocks"] = m.or_masks(causal_mask_function, blocks)
        made["sliding or blocks"] = m.or_masks(sliding, blocks)
        made["blocks in a window"] = m.and_masks(
            m.or_masks(causal_mask_function, blocks), m.sliding_window_overlay(6)
        )
        made["chunked or blocks"] = m.or_masks(chunked, blocks)
    return made


def packed_closures(length: int) -> dict:
    m = masking_utils
    bases = {
        "causal": causal_mask_function,
        "sliding": m.sliding_window_causal_mask_function(6),
        "chunked": m.chunked_causal_mask_function(8, torch.zeros(BATCH, dtype=torch.int64)),
    }
    return {name: packed(base, length) for name, base in bases.items()}


def dense(function, place: tuple[int, int, int, int], mask: Tensor | None, vmap=False) -> Tensor:
    queries, keys, q_offset, kv_offset = place
    return sdpa_mask(
        batch_size=BATCH,
        q_length=queries,
        kv_length=keys,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=function,
        attention_mask=mask,
        allow_is_causal_skip=False,
        use_vmap=vmap,
    )


def proxy(function, place: tuple, mask: Tensor | None, **options):
    queries, keys, q_offset, kv_offset = place
    return make_mask(
        batch_size=BATCH,
        q_length=queries,
        kv_length=keys,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=function,
        attention_mask=mask,
        **options,
    )


@pytest.mark.parametrize("offset", ["int", "tensor"])
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", closures(64))
def test_equals_the_dense_mask(kind: str, place: str, padding: str, offset: str) -> None:
    queries, keys, q_offset, kv_offset = PLACES[place]
    function = closures(keys + kv_offset)[kind]
    mask = attention_mask(padding, keys + kv_offset)
    expected = dense(function, PLACES[place], mask)
    position = torch.tensor(q_offset) if offset == "tensor" else q_offset
    made = proxy(function, (queries, keys, position, kv_offset), mask)
    assert made.shape == expected.shape
    assert made.mask.dense is None
    assert torch.equal(made.as_bool(), expected)


@pytest.mark.parametrize("padding", ["none", "ones", "right"])
@pytest.mark.parametrize("length", [37, 130])
@pytest.mark.parametrize("kind", ["causal", "sliding", "chunked"])
def test_packed_documents(kind: str, length: int, padding: str) -> None:
    function = packed_closures(length)[kind]
    mask = attention_mask(padding, length)
    made = proxy(function, (length, length, 0, 0), mask)
    assert made.mask.dense is None
    assert torch.equal(made.as_bool(), dense(function, (length, length, 0, 0), mask))


@pytest.mark.parametrize("kind", [k for k in closures(64) if k != "bidirectional"])
def test_closures_made_before_the_import_are_recognised(kind: str, monkeypatch) -> None:
    """A model file that took its builders earlier has ones that do not describe what they make."""
    for name in compat._BUILDERS:
        if hasattr(masking_utils, name):
            monkeypatch.setattr(masking_utils, name, getattr(masking_utils, name).__wrapped__)
    function = closures(37)[kind]
    assert kind == "causal" or not hasattr(function, compat._DESCRIPTION)
    monkeypatch.setattr(mask_function, "from_tiles", None)
    made = proxy(function, PLACES["prefill"], None)
    assert torch.equal(made.as_bool(), dense(function, PLACES["prefill"], None))


def own_window(batch, head, q, k):
    return (q - k).abs() < 4


def parity(batch, head, q, k):
    return (q % 2 == k % 2) & (k <= q)


def hidden_parity(batch, head, q, k):
    return (k <= q) | ((k % 3 == 2) & (q % 2 == 0))


@pytest.mark.parametrize("vmap", [False, True], ids=["broadcast", "vmap"])
@pytest.mark.parametrize("place", ["prefill", "continued", "decode", "static cache", "long"])
@pytest.mark.parametrize("padding", ["none", "left", "holes"])
def test_unknown_function_with_runs_becomes_intervals(padding, place, vmap, monkeypatch) -> None:
    monkeypatch.setattr(tensor_masks, "_TILE_ELEMENTS", 500)  # several tiles
    mask = attention_mask(padding, PLACES[place][1])
    made = proxy(own_window, PLACES[place], mask, use_vmap=vmap)
    assert made.mask.dense is None
    assert torch.equal(made.as_bool(), dense(own_window, PLACES[place], mask, vmap))


@pytest.mark.parametrize("function", [parity, hidden_parity])
@pytest.mark.parametrize("place", ["prefill", "continued", "static cache", "long"])
def test_unknown_function_without_runs_stays_dense(function, place, monkeypatch) -> None:
    monkeypatch.setattr(tensor_masks, "_TILE_ELEMENTS", 500)
    warnings: list[str] = []
    monkeypatch.setattr(tensor_masks.logger, "warning_once", warnings.append)
    mask = attention_mask("left", PLACES[place][1])
    made = proxy(function, PLACES[place], mask)
    assert torch.equal(made.as_bool(), dense(function, PLACES[place], mask))
    assert made.mask.dense is not None
    assert len(warnings) == 1 and "dense tensor of batch x queries x keys bytes" in warnings[0]


@pytest.mark.skipif(
    not hasattr(masking_utils, "blockwise_overlay"), reason="this Transformers has no block masks"
)
def test_block_ids_that_come_back_are_kept_exactly(monkeypatch) -> None:
    """All images of a row under one id see each other: no interval per key says that."""
    monkeypatch.setattr(tensor_masks.logger, "warning_once", lambda text: None)
    ids = torch.full((BATCH, 37), -1)
    ids[0, 2:7] = ids[0, 15:20] = 0
    function = masking_utils.or_masks(causal_mask_function, masking_utils.blockwise_overlay(ids))
    made = proxy(function, PLACES["prefill"], None)
    assert torch.equal(made.as_bool(), dense(function, PLACES["prefill"], None))


def test_document_ids_that_come_back_are_kept_exactly() -> None:
    ids = torch.tensor([[0, 0, 1, 1, 0, 0, 2], [0] * 7, [3, 3, 3, 1, 1, 2, 2]])
    function = masking_utils.and_masks(
        causal_mask_function, masking_utils.packed_sequence_mask_function(ids)
    )
    made = proxy(function, (7, 7, 0, 0), None)
    assert torch.equal(made.as_bool(), dense(function, (7, 7, 0, 0), None))


def test_a_growing_cache_needs_no_tensor() -> None:
    for place in ("prefill", "continued", "decode"):
        mask = proxy(causal_mask_function, PLACES[place], attention_mask("ones", 37)).mask
        assert (mask.window_right, mask.query_offset, mask.query_start) == (0, None, None)


def test_the_counter_of_a_static_cache_is_not_read_later() -> None:
    """The cache goes on counting in the tensor that it hands over."""
    position = torch.tensor(12)
    made = proxy(causal_mask_function, (7, 53, position, 0), None)
    position.add_(7)
    assert torch.equal(made.as_bool(), dense(causal_mask_function, PLACES["static cache"], None))


@pytest.mark.parametrize(("offset", "most"), [(20, 7), (torch.tensor(20), 9)], ids=["", "static"])
def test_a_step_of_decoding_takes_few_operations(offset, most: int) -> None:
    """Most are kernels to launch, which bind a step of a small model."""
    keys = 53 if isinstance(offset, Tensor) else 21
    keep = attention_mask("left", 21)
    with Watched() as watched:
        made = proxy(causal_mask_function, (1, keys, offset, 0), keep)
    assert made.mask.intervals is not None
    assert len(watched.seen) <= most, watched.seen


def test_a_full_bidirectional_mask_is_left_out_where_it_would_be_added() -> None:
    function = masking_utils.bidirectional_mask_function
    place = PLACES["prefill"]
    # The attention of RemBert is hand-written, that of Bert is not.
    options = {"allow_is_bidirectional_skip": True, "config": RemBertModel.config_class()}
    assert proxy(function, place, None, **options) is None
    assert proxy(function, place, attention_mask("ones", 37), **options) is None
    assert proxy(function, place, attention_mask("left", 37), **options) is not None
    assert proxy(function, place, None, config=options["config"]) is not None
    window = masking_utils.sliding_window_bidirectional_mask_function(4)
    assert proxy(window, place, None, **options) is not None
    assert proxy(function, place, None, **{**options, "config": BertModel.config_class()})


def test_a_mask_of_three_dimensions_is_refused() -> None:
    with pytest.raises(ValueError, match="attention_mask: expected 2 dimensions"):
        proxy(causal_mask_function, PLACES["prefill"], torch.ones(BATCH, 37, 37))


def test_a_mask_of_fewer_rows_is_refused() -> None:
    """One row's padding is not that of the others; eager fails as well."""
    with pytest.raises(ValueError, match="attention_mask: expected 2 batch rows, .* got 1"):
        make_mask(2, 4, 4, attention_mask=torch.ones(1, 4))
