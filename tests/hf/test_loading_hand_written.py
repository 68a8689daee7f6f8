"""``attn_implementation`` on families that compute attention themselves: it works, or it raises."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from checks import assert_close
from hand_written_models import FAMILIES, image, prompt, tokens
from transformers import AutoModel, AutoModelForCausalLM

from hf_flash_two import patch, unpatch
from hf_flash_two.hf import compat

BY_NAME = {family.name: family for family in FAMILIES}
# With and without a table of attention classes; by "eager" or "sdpa"; a base model; an image model.
LOADED = ["bloom", "gptj", "gpt_neo", "bark", "falcon_alibi", "falcon_rotary", "data2vec_vision",
          "git", "sam_vision", "mpnet", "superglue", "xlm_causal"]  # fmt: skip


def first_output(model, inputs):
    torch.manual_seed(1)
    outputs = model(**inputs)
    out = next(x for x in outputs.values() if isinstance(x, torch.Tensor) and x.is_floating_point())
    mask = inputs.get("attention_mask")
    return out[mask.bool()] if mask is not None and out.shape[:2] == mask.shape else out


@pytest.mark.parametrize("name", ["flash_two", "fa_two"])
@pytest.mark.parametrize("family", LOADED)
def test_from_pretrained(family, name, kernel_calls, tmp_path):
    family = BY_NAME[family]
    model, inputs = family.build(), family.inputs()
    want = first_output(model, inputs)
    model.save_pretrained(tmp_path)
    assert not kernel_calls
    loaded = type(model).from_pretrained(tmp_path, attn_implementation=name)
    assert_close(first_output(loaded, inputs), want)
    assert len(kernel_calls) >= 2
    assert patch(loaded).ok
    unpatch(loaded)
    kernel_calls.clear()
    assert_close(first_output(loaded, inputs), want)
    if not compat.uses_interface(loaded):  # there the name stays in the config
        assert not kernel_calls
    assert "attn_implementation" not in loaded.config.to_json_string()


def test_parts_that_the_name_does_not_reach(kernel_calls):
    small = {"vocab_size": 99, "max_position_embeddings": 64}
    question = transformers.DPRConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32, **small
    )
    answer = transformers.BartConfig(
        d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=32, decoder_ffn_dim=32, **small,
    )  # fmt: skip
    parts = {"question_encoder": question.to_dict(), "generator": answer.to_dict()}
    config = transformers.RagConfig(**copy.deepcopy(parts))
    with pytest.raises(ValueError, match="no effect on RagModel[^$]*BartAttention[^$]*patch"):
        transformers.RagModel._from_config(config, attn_implementation="flash_two")
    model = transformers.RagModel(transformers.RagConfig(**parts))
    assert patch(model).ok
    model.generator(tokens(2, 9))
    assert len(kernel_calls) == 3


def test_from_config_and_auto_classes(kernel_calls):
    config = BY_NAME["bloom"].build().config
    model = AutoModelForCausalLM.from_config(config, attn_implementation="flash_two")
    assert model.config._attn_implementation == "flash_two"
    model(**prompt())
    assert len(kernel_calls) == 2
    transformers.BloomModel._from_config(config, attn_implementation="fa_two")(**prompt())
    assert len(kernel_calls) == 4
    config._attn_implementation = "flash_two"
    transformers.BloomForCausalLM(config)(**prompt())
    assert len(kernel_calls) == 6
    config._attn_implementation = "eager"
    transformers.BloomForCausalLM(config)(**prompt())
    assert len(kernel_calls) == 6


@pytest.mark.parametrize("family", LOADED)
def test_set_attn_implementation_there_and_back(family, kernel_calls):
    family = BY_NAME[family]
    model, inputs = family.build(), family.inputs()
    want = first_output(model, inputs)
    model.set_attn_implementation("flash_two")
    assert_close(first_output(model, inputs), want)
    assert len(kernel_calls) >= 2
    model.set_attn_implementation(family.reference)
    kernel_calls.clear()
    assert torch.equal(first_output(model, inputs), want)
    assert not kernel_calls


def test_generates_after_loading(tmp_path):
    family = BY_NAME["gpt_neo"]
    model, inputs = family.build(), family.inputs()
    settings = {"max_new_tokens": 7, "do_sample": False}
    want = model.generate(**inputs, **settings)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="flash_two")
    assert torch.equal(loaded.generate(**inputs, **settings), want)


IMPOSSIBLE = {
    "big_bird": lambda: transformers.BigBirdConfig(),
    "longformer": lambda: transformers.LongformerConfig(attention_window=4),
    "nystromformer": lambda: transformers.NystromformerConfig(),
    "mra": lambda: transformers.MraConfig(),
    "yoso": lambda: transformers.YosoConfig(),
}


def small(config):
    for key, value in {
        "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 32,
    }.items():  # fmt: skip
        setattr(config, key, value)
    return config


@pytest.mark.parametrize("build", IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_impossible_families_raise(build):
    config = small(build())
    with pytest.raises(ValueError, match=r"(?s)no effect on.*hf_flash_two\.patch"):
        AutoModel.from_config(config, attn_implementation="flash_two")
    config._attn_implementation = "eager"
    model = AutoModel.from_config(config)
    with pytest.raises(ValueError, match=r"(?s)no effect on.*hf_flash_two\.patch"):
        model.set_attn_implementation("flash_two")
    assert model.config._attn_implementation == "eager"


def composite(text: transformers.PreTrainedConfig, implementation=None):
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        image_size=16, patch_size=8,
    )  # fmt: skip
    config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
        vision, text, projection_dim=8
    )
    torch.manual_seed(0)
    return transformers.VisionTextDualEncoderModel._from_config(
        config, attn_implementation=implementation
    ).eval()


INPUTS = {"input_ids": tokens(2, 9), "pixel_values": image(16)["pixel_values"]}


def test_composite_models(kernel_calls):
    text = BY_NAME["mpnet"].build().config
    eager = composite(text, "eager")
    want = eager(**INPUTS).logits_per_text
    model = composite(text, "flash_two")
    assert_close(model(**INPUTS).logits_per_text, want)
    assert len(kernel_calls) == 3
    model = composite(text, {"vision_config": "eager", "text_config": "flash_two", "": "eager"})
    kernel_calls.clear()
    assert_close(model(**INPUTS).logits_per_text, want)
    assert len(kernel_calls) == 2


def test_composite_models_say_what_stays_behind(kernel_calls, caplog, monkeypatch):
    text = small(transformers.LongformerConfig(attention_window=4))
    monkeypatch.setattr(transformers.logging.get_logger("transformers"), "propagate", True)
    monkeypatch.setattr(transformers.logging.get_logger("hf_flash_two"), "propagate", True)
    transformers.logging.set_verbosity_warning()
    try:
        model = composite(text, "flash_two")
    finally:
        transformers.logging.set_verbosity_error()
    model(**INPUTS)
    assert len(kernel_calls) == 1
    assert "LongformerSelfAttention" in caplog.text
