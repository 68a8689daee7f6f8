"""Packed documents: each seam that keeps them apart is needed by the models it is said to serve."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
from checks import assert_close, error
from hand_written_models import FAMILIES
from hand_written_models import tokens as small_tokens
from models import DECODERS, MULTIMODAL, tokens
from packed_rows import Row, boundaries, positions
from test_packed import LENGTH, LENGTHS, SILENT, alone
from transformers import PreTrainedModel, masking_utils

from hf_flash_two import patch
from hf_flash_two.hf import compat, forward_pass, interface, mask_function, packing
from hf_flash_two.hf.families import attention_kind

LEAK = 1e-2
BY_NAME = {family.name: family for family in (*FAMILIES, *SILENT)}
LIBRARY = {family.name: family for family in (*DECODERS, *MULTIMODAL)}


def without_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(*_, in_function: bool, **__):
        return None, in_function

    monkeypatch.setattr(mask_function, "documents_of_mask", nothing)


def without_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interface, "keep_apart_in_layer", lambda mask, *_: mask)


def leaks_or_refuses(run: Callable[[], torch.Tensor], expected: torch.Tensor) -> None:
    try:
        got = run()
    except NotImplementedError as refused:
        assert "packed documents" in str(refused)
    else:
        assert error(got, expected) > LEAK


def given_to(model: PreTrainedModel, said: str) -> dict:
    takes = inspect.signature(model.forward).parameters
    given = {"position_ids": positions(*LENGTHS)} if "position_ids" in takes else {}
    if said == "ones":
        given["attention_mask"] = torch.ones(1, LENGTH, dtype=torch.long)
    if said == "boundaries":
        given |= boundaries(*LENGTHS)
    if said == "numbers":
        given["attention_mask"] = Row(LENGTHS).numbers()[None]
    return given


@pytest.mark.parametrize("said", ["positions", "ones", "boundaries", "numbers"])
@pytest.mark.parametrize(
    "name",
    [
        "bloom", "codegen", "falcon_new", "falcon_rotary", "gpt_bigcode", "gpt_neo",
        "gpt_neox_japanese", "gptj", "ctrl", "mpt", "persimmon", "xglm",
    ],
)  # fmt: skip
def test_masks_serve_models_that_tell_their_layers_nothing(
    name: str, said: str, monkeypatch
) -> None:
    """With the default cache, which hides packing from Transformers, and with a mask of ones."""
    model = BY_NAME[name].build()
    given = given_to(model, said)
    if said in ("positions", "ones") and "position_ids" not in given:
        pytest.skip("takes no positions")
    kinds = {attention_kind(type(layer)) for layer in model.modules()}
    if name == "ctrl" and "interface" not in kinds:
        pytest.skip("its attention is hand-written in this Transformers, and not known")
    ids = small_tokens(1, LENGTH)
    expected = alone(model, ids)
    patch(model)
    assert_close(model(ids, **given).logits, expected)
    without_masks(monkeypatch)
    if "interface" in kinds and (name in ("codegen", "gptj") or said == "boundaries"):
        # Their layers are told as well: those of GPT-J and CodeGen are hand-written until 5.23.
        assert_close(model(ids, **given).logits, expected)
        without_layers(monkeypatch)
    leaks_or_refuses(lambda: model(ids, **given).logits, expected)


@pytest.mark.parametrize("said", ["positions", "ones", "boundaries", "numbers"])
def test_masks_serve_chunks_that_count_within_documents(said: str, monkeypatch) -> None:
    flash, eager = LIBRARY["llama4"].pair("flash_two")
    ids, given = tokens(1, LENGTH), given_to(LIBRARY["llama4"].build("eager"), said)
    expected = alone(eager, ids)
    assert_close(flash(ids, **given).logits, expected)
    without_masks(monkeypatch)
    leaks_or_refuses(lambda: flash(ids, **given).logits, expected)


def test_layers_serve_towers_that_are_given_boundaries_and_no_mask(monkeypatch) -> None:
    family = LIBRARY["qwen2.5-vl"]
    flash, eager = family.pair("flash_two")
    inputs = family.inputs()
    real = inputs["attention_mask"].bool()
    expected = eager(**inputs).logits[real]
    assert_close(flash(**inputs).logits[real], expected)
    without_layers(monkeypatch)
    leaks_or_refuses(lambda: flash(**inputs).logits[real], expected)


def unwatched(name: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """(flash, eager), of which the first runs without a forward pass being known."""
    flash, eager = LIBRARY[name].pair("flash_two")
    for module in flash.modules():
        if isinstance(module, PreTrainedModel):
            forward_pass.unwatch(module)
    return flash, eager


def test_layers_serve_models_that_nobody_watches(monkeypatch) -> None:
    flash, eager = unwatched("llama")
    ids, given = tokens(1, LENGTH), {"position_ids": positions(*LENGTHS)}
    expected = alone(eager, ids)
    assert_close(flash(ids, **given).logits, expected)
    without_layers(monkeypatch)
    leaks_or_refuses(lambda: flash(ids, **given).logits, expected)


def test_transformers_serves_chunks_of_models_that_nobody_watches(monkeypatch) -> None:
    """It looks for restarts itself where it makes a mask without a cache."""
    if not compat.remaps_positions():
        pytest.skip("this Transformers counts chunks from the start of the row")
    flash, eager = unwatched("llama4")
    ids, given = tokens(1, LENGTH), {"position_ids": positions(*LENGTHS), "use_cache": False}
    expected = alone(eager, ids)
    assert_close(flash(ids, **given).logits, expected)
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda *_, **__: None)
    leaks_or_refuses(lambda: flash(ids, **given).logits, expected)


def test_ones_serve_models_that_compute_with_the_numbers_of_a_mask(monkeypatch) -> None:
    """BLOOM counts its positions from the mask."""
    model = BY_NAME["bloom"].build()
    ids, given = small_tokens(1, LENGTH), given_to(model, "numbers")
    expected = alone(model, ids)
    monkeypatch.setattr(packing, "_begin", lambda running, arguments: {})
    patch(model)
    leaks_or_refuses(lambda: model(ids, **given).logits, expected)


@pytest.mark.parametrize("name", ["openai_gpt", "xlm_causal"])
def test_the_end_refuses_models_that_make_their_own_masks(name: str, monkeypatch) -> None:
    model = BY_NAME[name].build()
    ids, given = small_tokens(1, LENGTH), boundaries(*LENGTHS)
    expected = torch.cat([model(part)[0] for part in ids.split(LENGTHS, dim=1)], dim=1)
    monkeypatch.setattr(packing, "_end", lambda ending: None)
    patch(model)
    assert error(model(ids, **given)[0], expected) > LEAK


def test_callers_are_looked_up_where_a_model_is_called_past_its_hooks(monkeypatch) -> None:
    peft = pytest.importorskip("peft")
    model = BY_NAME["bloom"].build()
    ids = small_tokens(1, LENGTH)
    expected = alone(model, ids)
    config = peft.LoraConfig(r=2, target_modules=["query_key_value"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config)
    patch(adapted)
    given = boundaries(*LENGTHS)
    assert_close(adapted(input_ids=ids, **given).logits, expected)
    monkeypatch.setattr(forward_pass, "_said_past_hooks", lambda *_: {})
    leaks_or_refuses(lambda: adapted(input_ids=ids, **given).logits, expected)
