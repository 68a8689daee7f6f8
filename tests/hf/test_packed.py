"""Packed documents never see each other: against each document alone, because eager leaks."""

from __future__ import annotations

import inspect
import sys

import pytest
import torch
from checks import assert_close, backward, error
from hand_written_models import FAMILIES, HandWritten, prompt
from hand_written_models import tokens as own_tokens
from helpers import assert_same_gradients
from models import CACHE, DECODERS, MULTIMODAL, Family, named, patched_where_known, tokens
from packed_rows import Row, boundaries, each_alone, positions
from transformers import StaticCache, masking_utils

from hf_flash_two import patch
from hf_flash_two.hf import compat
from hf_flash_two.hf.packing import document_ids

LENGTHS = (7, 1, 11, 8)
LENGTH = sum(LENGTHS)


def alone(model, ids: torch.Tensor) -> torch.Tensor:
    return torch.cat([model(part).logits for part in ids.split(LENGTHS, dim=1)], dim=1)


@pytest.mark.parametrize("mask", ["no mask", "ones"])
@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize("family", named(DECODERS))
def test_documents_are_computed_as_alone(family: Family, use_cache: bool, mask: str) -> None:
    flash, eager = family.pair("flash_two")
    ids = tokens(2, LENGTH)
    given = {"attention_mask": torch.ones_like(ids)} if mask == "ones" else {}
    packed = flash(ids, position_ids=positions(*LENGTHS), use_cache=use_cache, **given).logits
    expected = alone(eager, ids)
    assert_close(packed, expected)
    leaking = flash(ids, position_ids=positions(LENGTH), **given).logits
    assert error(leaking, expected) > 1e-2


@pytest.mark.parametrize("family", named(DECODERS))
def test_gradients_of_training_with_the_default_cache(family: Family) -> None:
    flash, eager = family.pair("flash_two")
    ids = tokens(2, LENGTH)
    flash.train()
    backward(flash(ids, position_ids=positions(*LENGTHS).expand(2, -1)).logits)
    backward(alone(eager, ids))
    assert_same_gradients(flash, eager)


ROWS = [
    Row((5, 8), (0, 0, 3)),
    Row((16,)),
    Row((1, 12), (0, 0, 3)),
    Row((1, 1, 14)),
    Row((9, 4), (3, 0, 0), padded_position=1),
    Row((6, 1, 5), (1, 2, 0, 1), padded_position=7),
]


@pytest.mark.parametrize("kind", ["no mask", "ones and zeros", "bool", "numbers", "numbers alone"])
@pytest.mark.parametrize("family", named(DECODERS))
def test_rows_of_all_kinds_in_one_batch(family: Family, kind: str) -> None:
    """Padding anywhere, single tokens, rows that are not packed: each document as by itself."""
    flash, eager = family.pair("flash_two")
    ids = tokens(len(ROWS), 16)
    numbers = torch.stack([row.numbers() for row in ROWS])
    given = {"position_ids": torch.stack([row.positions() for row in ROWS])}
    if kind == "numbers alone":
        given["position_ids"] = positions(16).expand(len(ROWS), -1)
    if kind != "no mask":
        visible = numbers != 0
        masks = {"ones and zeros": visible.long(), "bool": visible}
        given["attention_mask"] = masks.get(kind, numbers)
    packed = flash(ids, **given).logits
    for row, number, logits in zip(ids, numbers, packed, strict=True):
        if kind == "numbers alone":  # positions go on, which rotary ones do not notice
            if family.name == "llama4":
                pytest.skip("this family scales by absolute positions")
        assert_close(logits[number != 0], each_alone(eager, row, number))


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    model = DECODERS[0].build("flash_two")
    ids = tokens(len(ROWS), 16)
    position_ids = torch.stack([row.positions() for row in ROWS])
    mask = torch.stack([row.numbers() for row in ROWS]).bool()
    together = model(ids, position_ids=position_ids, attention_mask=mask).logits
    for row in range(len(ROWS)):
        one = slice(row, row + 1)
        alone = model(ids[one], position_ids=position_ids[one], attention_mask=mask[one]).logits
        assert_close(together[one][mask[one]], alone[mask[one]])


def test_gradients_of_packed_rows_with_padding() -> None:
    flash, eager = DECODERS[0].pair("flash_two")
    row = ROWS[-1]
    ids, number = tokens(1, 16), row.numbers()
    mask = (number != 0).long()[None]
    flash.train()
    backward(
        flash(ids, position_ids=row.positions()[None], attention_mask=mask).logits[0][number != 0]
    )
    backward(each_alone(eager, ids[0], number))
    assert_same_gradients(flash, eager)


@pytest.mark.parametrize("length", [LENGTH, 40])
@pytest.mark.parametrize(
    "family", named([f for f in DECODERS if f.name in ("llama", "gemma3", "gpt-oss", "llama4")])
)
def test_a_static_cache(family: Family, length: int) -> None:
    """Longer than the row, it holds keys of no document behind those of the last."""
    flash, eager = family.pair("flash_two")
    ids = tokens(1, LENGTH)
    cache = StaticCache(config=flash.config, max_cache_len=length)
    packed = flash(ids, position_ids=positions(*LENGTHS), **{CACHE: cache}).logits
    assert_close(packed, alone(eager, ids))


def test_documents_behind_earlier_tokens_are_refused() -> None:
    flash = DECODERS[0].build("flash_two")
    first = flash(tokens(1, 5), use_cache=True)
    given = {CACHE: first[CACHE]}
    with pytest.raises(ValueError, match="documents start among these tokens"):
        flash(tokens(1, 8), position_ids=positions(3, 5), **given)


def test_more_of_one_document_behind_earlier_tokens() -> None:
    flash, eager = DECODERS[0].pair("flash_two")
    ids = tokens(1, 13)
    first = flash(ids[:, :5], use_cache=True)
    given = {CACHE: first[CACHE]}
    rest = flash(ids[:, 5:], position_ids=torch.arange(5, 13)[None], **given).logits
    assert_close(rest, eager(ids).logits[:, 5:])


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize(
    "family", named([f for f in DECODERS if f.name in ("llama", "mistral", "gemma3", "gpt-oss")])
)
def test_cu_seq_lens(family: Family, use_cache: bool) -> None:
    """As trainers send them with position_ids: boundaries, lengths and a sequence index."""
    flash, eager = family.pair("flash_two")
    ids = tokens(1, LENGTH)
    ends = torch.tensor((0, *LENGTHS)).cumsum(0).to(torch.int32)
    packed = flash(
        ids,
        position_ids=positions(*LENGTHS),
        cu_seq_lens_q=ends,
        cu_seq_lens_k=ends,
        max_length_q=max(LENGTHS),
        max_length_k=max(LENGTHS),
        seq_idx=document_ids(positions(*LENGTHS)).to(torch.int32),
        use_cache=use_cache,
    ).logits
    assert_close(packed, alone(eager, ids))


def interface_family(name: str, model: str, **changes) -> HandWritten:
    return HandWritten(name, model, changes, prompt)


# Each is silent about documents in its own way: it takes no positions, or hands its mask function
# none, or hands its layers no boundaries.
SILENT = [family for family in FAMILIES if family.name in (
    "bark", "bloom", "codegen", "falcon_rotary", "falcon_new", "gpt_neo", "gpt_neox_japanese",
    "gptj", "imagegpt", "mpt", "xglm",
)] + [
    interface_family("ctrl", "CTRLLMHeadModel", dff=32),
    interface_family("gpt_bigcode", "GPTBigCodeForCausalLM"),
    interface_family("gpt2", "GPT2LMHeadModel"),
    interface_family("opt", "OPTForCausalLM", word_embed_proj_dim=32, ffn_dim=32),
    interface_family("persimmon", "PersimmonForCausalLM"),
]  # fmt: skip


@pytest.mark.parametrize("said", ["boundaries", "positions", "numbers"])
@pytest.mark.parametrize("family", [pytest.param(f, id=f.name) for f in SILENT])
def test_families_that_are_silent_about_documents(family: HandWritten, said: str) -> None:
    model = family.build()
    ids = own_tokens(1, LENGTH)
    expected = alone(model, ids)
    patched_where_known(model)
    given = boundaries(*LENGTHS) if said == "boundaries" else {}
    if "position_ids" in inspect.signature(model.forward).parameters:
        given["position_ids"] = positions(*LENGTHS)
    elif said == "positions":
        pytest.skip("takes no positions")
    if said == "numbers":
        given["attention_mask"] = Row(LENGTHS).numbers()[None]
    module = sys.modules[type(model).__module__]
    if family.name == "imagegpt" and not hasattr(module, "create_causal_mask"):
        # Older ones make their masks by hand.
        with pytest.raises(NotImplementedError, match="masks that cannot keep them apart"):
            model(ids, **given)
    else:
        assert_close(model(ids, **given).logits, expected)


@pytest.mark.parametrize("said", ["boundaries", "positions", "numbers"])
@pytest.mark.parametrize("name", ["falcon_alibi", "flaubert", "openai_gpt", "xlm_causal"])
def test_families_that_make_their_own_masks_refuse(name: str, said: str) -> None:
    model = next(f for f in FAMILIES if f.name == name).build()
    patch(model)
    ids, given = own_tokens(1, LENGTH), {}
    if said == "boundaries":
        given = boundaries(*LENGTHS)
    if said == "numbers":
        given["attention_mask"] = Row(LENGTHS).numbers()[None]
    if said == "positions":
        if name == "flaubert":
            pytest.skip("bidirectional: positions that restart say nothing of documents")
        given["position_ids"] = positions(*LENGTHS)
    with pytest.raises(NotImplementedError, match="packed documents"):
        model(ids, **given)
    # What is not packed runs as before, and so does what is after an error.
    assert model(ids, position_ids=positions(LENGTH))[0].isfinite().all()


@pytest.mark.parametrize("name", ["megatron_bert", "rembert", "squeezebert"])
def test_encoders_by_boundaries(name: str) -> None:
    """Positions that restart are not enough: an encoder's may do so for other reasons."""
    model = next(f for f in FAMILIES if f.name == name).build()
    ids = own_tokens(1, LENGTH)
    parts = [model(part).last_hidden_state for part in ids.split(LENGTHS, dim=1)]
    together = model(ids, position_ids=positions(*LENGTHS)).last_hidden_state
    patch(model)
    given = {"position_ids": positions(*LENGTHS)}
    if hasattr(sys.modules[type(model).__module__], "create_bidirectional_mask"):
        packed = model(ids, **boundaries(*LENGTHS), **given).last_hidden_state
        assert_close(packed, torch.cat(parts, dim=1))
    else:  # older ones make their masks by hand
        with pytest.raises(NotImplementedError, match="masks that cannot keep them apart"):
            model(ids, **boundaries(*LENGTHS), **given)
    assert_close(model(ids, **given).last_hidden_state, together)


def test_one_document_changes_and_nothing_else_moves() -> None:
    model = DECODERS[0].build("flash_two")
    ids = tokens(1, LENGTH)
    before = model(ids, position_ids=positions(*LENGTHS)).logits
    ids[0, 8:19] = tokens(1, 11, seed=9)
    after = model(ids, position_ids=positions(*LENGTHS)).logits
    changed = (before != after).any(-1)[0]
    assert changed[8:19].all() and not changed[:8].any() and not changed[19:].any()


def test_padding_and_positions_of_its_own_are_no_packing() -> None:
    """generate gives padding and tokens after a hole positions that stay or fall."""
    flash, eager = DECODERS[0].pair("flash_two")
    ids = tokens(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :4] = mask[1, 5:8] = 0
    position_ids = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    assert (position_ids[:, 1:] < position_ids[:, :-1]).any()
    given = {"attention_mask": mask, "position_ids": position_ids}
    real = mask.bool()
    assert_close(flash(ids, **given).logits[real], eager(ids, **given).logits[real])


@pytest.mark.parametrize("batch", [1, 2, 3, 4])
def test_multimodal_positions_are_no_packing(batch: int) -> None:
    """[3, B, T]: rows of an image fall, and with a batch of 3 the shape could pass for tokens'."""
    family = next(f for f in MULTIMODAL if f.name == "qwen2.5-vl")
    flash, eager = family.pair("flash_two")
    ids = tokens(batch, 12)
    temporal = torch.tensor([0, 1, 2, 2, 2, 2, 2, 2, 5, 6, 7, 8])
    height = torch.tensor([0, 1, 2, 2, 2, 3, 3, 3, 5, 6, 7, 8])
    width = torch.tensor([0, 1, 2, 3, 4, 2, 3, 4, 5, 6, 7, 8])
    position_ids = torch.stack([temporal, height, width])[:, None].expand(3, batch, 12)
    given = {"input_ids": ids, "position_ids": position_ids}
    assert_close(flash(**given).logits, eager(**given).logits)


def test_packed_multimodal_positions() -> None:
    """[4, B, T]: the first row are the text's, which restart with each document."""
    family = next(f for f in MULTIMODAL if f.name == "qwen2.5-vl")
    flash, eager = family.pair("flash_two")
    ids = tokens(1, LENGTH)
    position_ids = positions(*LENGTHS)[None].expand(4, 1, LENGTH)
    for use_cache in (True, False):
        packed = flash(input_ids=ids, position_ids=position_ids, use_cache=use_cache).logits
        assert_close(packed, alone(eager, ids))


@pytest.mark.parametrize(
    ("position_ids", "expected"),
    [
        ([0, 1, 2, 3], [0, 0, 0, 0]),
        ([0, 1, 2, 0, 1], [0, 0, 0, 1, 1]),
        ([0, 0, 1, 0, 0], [0, 1, 1, 2, 3]),
        ([0, 0, 1, 2], [0, 1, 1, 1]),
        ([2, 3, 4, 2, 2, 3], [0, 0, 0, 1, 2, 2]),
        ([5, 6, 7, 0, 1], [0, 0, 0, 1, 1]),
        ([0, 1, 1, 1, 1, 5], [0, 0, 0, 0, 0, 0]),
        ([0, 1, 2, 7, 8], [0, 0, 0, 0, 0]),
        ([4, 0, 1, 1, 2, 0], [0, 1, 1, 1, 1, 2]),
        ([0, 0, 0, 0], [0, 1, 2, 3]),
    ],
)
def test_where_documents_start(position_ids: list[int], expected: list[int]) -> None:
    assert document_ids(torch.tensor([position_ids])).tolist() == [expected]


@pytest.mark.parametrize("batch", ["plain", "packed"])
def test_compiled_training_makes_no_dense_mask(batch: str, kernel_calls) -> None:
    """While the compiler traces, documents are looked for in every batch."""
    torch._dynamo.reset()
    flash, eager = DECODERS[0].pair("flash_two")
    ids = tokens(2, LENGTH)
    given = {"position_ids": positions(*LENGTHS)} if batch == "packed" else {}
    compiled = torch.compile(flash, fullgraph=True, backend="eager")
    logits = compiled(ids, **given).logits
    torch._dynamo.reset()
    assert_close(logits, alone(eager, ids) if batch == "packed" else eager(ids).logits)
    assert len(kernel_calls) == 2
    assert not any("dense" in call.mask for call in kernel_calls)


def test_a_user_s_numbers_that_come_back_while_compiling() -> None:
    """Exact where they can be told from the library's own, refused where they cannot."""
    flash, eager = DECODERS[0].pair("flash_two")
    ids = tokens(2, LENGTH)
    numbers = (torch.arange(LENGTH) // 3 % 2).expand(2, -1)

    def run(model):
        embeds = model.get_input_embeddings()(ids)
        mask = masking_utils.create_causal_mask(
            config=model.config,
            inputs_embeds=embeds,
            attention_mask=None,
            **{CACHE: None},
            and_mask_function=masking_utils.packed_sequence_mask_function(numbers),
        )
        return model(inputs_embeds=embeds, attention_mask=mask).logits

    assert_close(run(flash), run(eager))
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="eager")
    if compat.remaps_positions():
        assert_close(compiled(flash), run(eager))
    else:
        with pytest.raises(RuntimeError, match="document ids that fall"):
            compiled(flash)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("position_ids", "mask", "expected"),
    [
        ([0, 1, 0, 1, 7, 0], [1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1]),
        ([1, 1, 0, 0, 1, 2], [0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1]),
        ([5, 1, 3, 4, 4, 9], [0, 0, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0]),
    ],
)
def test_padding_tells_nothing(position_ids: list[int], mask: list[int], expected: list[int]):
    found = document_ids(torch.tensor([position_ids]), torch.tensor([mask]))
    assert found.tolist() == [expected]
