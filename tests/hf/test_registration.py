"""Both names load everywhere, and the shim says so where it cannot work."""

from __future__ import annotations

import pytest
import torch
import transformers
from checks import assert_close
from models import CACHE, DECODERS, MULTIMODAL, left_padded, tokens
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils
from transformers.utils.generic import is_flash_attention_requested

import hf_flash_two.hf
from hf_flash_two.hf.interface import attention_forward
from hf_flash_two.hf.mask_function import make_mask

NAMES = ["flash_two", "fa_two"]
FAMILIES = {f.name: f for f in DECODERS + MULTIMODAL}


@pytest.mark.parametrize("name", NAMES)
def test_attention_and_masks_are_registered_together(name: str) -> None:
    assert AttentionInterface()[name] is attention_forward
    assert AttentionMaskInterface()[name] is make_mask


def test_registering_again_changes_nothing() -> None:
    before = [getattr(masking_utils, name) for name in dir(masking_utils)]
    hf_flash_two.hf.register()
    assert before == [getattr(masking_utils, name) for name in dir(masking_utils)]


@pytest.mark.parametrize("name", NAMES)
def test_from_pretrained(name: str, tmp_path, kernel_calls) -> None:
    FAMILIES["llama"].build("eager").save_pretrained(tmp_path)
    load = transformers.AutoModelForCausalLM.from_pretrained
    flash = load(tmp_path, attn_implementation=name)
    eager = load(tmp_path, attn_implementation="eager")
    ids, mask = tokens(2, 12), left_padded(2, 12, 3)
    real = mask.bool()
    logits = [m(ids, attention_mask=mask).logits[real] for m in (flash, eager)]
    assert_close(*logits)
    assert len(kernel_calls) == 2
    flash.save_pretrained(tmp_path / "again")
    assert name not in (tmp_path / "again" / "config.json").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_flags_of_a_model_do_not_matter(name: str, monkeypatch, kernel_calls) -> None:
    for flag in ("flash_attn", "sdpa", "flex_attn", "attention_backend"):
        monkeypatch.setattr(transformers.LlamaPreTrainedModel, f"_supports_{flag}", False)
    model = FAMILIES["llama"].build(name)
    assert model.config._attn_implementation == name
    model(tokens(2, 12))
    assert len(kernel_calls) == 2


def test_a_pipeline_hands_an_argument_of_its_own_to_generate(tmp_path) -> None:
    """As docs/serving.md says: the name belongs into model_kwargs."""
    tokenizer = transformers.ByT5Tokenizer()
    FAMILIES["qwen3"].build("eager", vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    writer = transformers.pipeline(
        "text-generation", model=str(tmp_path), tokenizer=tokenizer, attn_implementation="flash_two"
    )
    assert writer.model.config._attn_implementation != "flash_two"
    with pytest.raises(ValueError, match="attn_implementation"):
        writer("abc", max_new_tokens=2)


@pytest.mark.parametrize("name", NAMES)
def test_set_attn_implementation(name: str, kernel_calls) -> None:
    model = FAMILIES["gpt-oss"].build("eager")
    expected = model(tokens(2, 12)).logits
    model.set_attn_implementation(name)
    assert model.config._attn_implementation == name
    assert_close(model(tokens(2, 12)).logits, expected)
    assert len(kernel_calls) == 2
    model.set_attn_implementation("eager")
    assert torch.equal(model(tokens(2, 12)).logits, expected)
    assert len(kernel_calls) == 2


def test_one_name_per_part(kernel_calls) -> None:
    family = FAMILIES["qwen2.5-vl"]
    inputs = family.inputs()
    expected = family.build("eager")(**inputs).logits[inputs["attention_mask"].bool()]
    for parts, calls in (
        ({"text_config": "flash_two", "vision_config": "eager"}, 2),
        ({"text_config": "eager", "vision_config": "flash_two"}, 2),
        ({"text_config": "fa_two", "vision_config": "flash_two"}, 4),
    ):
        model = family.build("eager")
        model.set_attn_implementation(parts)
        del kernel_calls[:]
        assert_close(model(**inputs).logits[inputs["attention_mask"].bool()], expected)
        assert len(kernel_calls) == calls


def test_models_that_prefer_other_flash_kernels_keep_the_name() -> None:
    """gpt-oss lists the kernels it likes, and would be given one of them instead."""
    model = FAMILIES["gpt-oss"].build("flash_two")
    assert getattr(model, "_compatible_flash_implementations", None)
    assert model.config._attn_implementation == "flash_two"


def test_models_still_take_the_name_for_flash_attention() -> None:
    """So vision towers hand over all windows in one call; other names are left alone."""
    config = FAMILIES["llama"].build("flash_two").config
    assert is_flash_attention_requested(config)
    for module in (masking_utils, transformers.modeling_utils, transformers.generation.utils):
        test = module.is_flash_attention_requested
        assert not test(config)
        assert not test(requested_attention_implementation="flash_two")
        assert not test(requested_attention_implementation="fa_two")
        assert test(requested_attention_implementation="flash_attention_2")
        assert test(requested_attention_implementation="flash_attention_2", version=2)
        assert not test(requested_attention_implementation="flash_attention_2", version=3)
        assert not test(requested_attention_implementation="sdpa")


def test_packed_masks_of_other_implementations_are_left_alone() -> None:
    position_ids = torch.tensor([[0, 1, 2, 0, 1]])
    eager = masking_utils.create_causal_mask(
        config=FAMILIES["llama"].build("eager").config,
        inputs_embeds=torch.zeros(1, 5, 8),
        attention_mask=None,
        **{CACHE: transformers.DynamicCache()},
        position_ids=position_ids,
    )
    assert torch.equal(eager[0, 0] == 0, torch.ones(5, 5).tril().bool())
