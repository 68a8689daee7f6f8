"""Families that compute attention themselves give the same numbers under `patch`."""

from __future__ import annotations

import pytest
import torch
import transformers

from hf_flash_two import attention, patch, patched
from hf_flash_two.hf.patching import OWN_ATTENTION

ENCODER = {
    "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 64, "max_position_embeddings": 64, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0, "pad_token_id": 0,
}  # fmt: skip
GPT = {
    "vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
    "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
}  # fmt: skip
SEQ2SEQ = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "dropout": 0.0,
    "attention_dropout": 0.0,
}  # fmt: skip
GPT_NEO = {
    "vocab_size": 97, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": 5,
    "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 64,
    "attention_dropout": 0.0, "resid_dropout": 0.0, "embed_dropout": 0.0,
}  # fmt: skip
NEOX = {
    "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "attention_dropout": 0.0, "hidden_dropout": 0.0,
}  # fmt: skip
TROCR = {
    "vocab_size": 97, "d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4,
    "decoder_ffn_dim": 64, "dropout": 0.0,
}  # fmt: skip
BLOOM = {
    "vocab_size": 97, "hidden_size": 32, "n_layer": 2, "n_head": 4,
    "attention_dropout": 0.0, "hidden_dropout": 0.0,
}  # fmt: skip
FAMILIES = {
    "blip_text": ("BlipTextModel", "BlipTextConfig", ENCODER | {"encoder_hidden_size": 32}),
    "bloom": ("BloomForCausalLM", "BloomConfig", BLOOM),
    "codegen": ("CodeGenForCausalLM", "CodeGenConfig", GPT | {"rotary_dim": 4}),
    "fsmt": (
        "FSMTForConditionalGeneration",
        "FSMTConfig",
        SEQ2SEQ | {"langs": ["a", "b"], "src_vocab_size": 97, "tgt_vocab_size": 97},
    ),
    "gpt_neo": ("GPTNeoForCausalLM", "GPTNeoConfig", GPT_NEO),
    "gpt_neox_japanese": ("GPTNeoXJapaneseForCausalLM", "GPTNeoXJapaneseConfig", NEOX),
    "gptj": ("GPTJForCausalLM", "GPTJConfig", GPT | {"rotary_dim": 4}),
    "ibert": ("IBertModel", "IBertConfig", ENCODER),
    "imagegpt": ("ImageGPTForCausalImageModeling", "ImageGPTConfig", GPT),
    "luke": ("LukeModel", "LukeConfig", ENCODER | {"entity_vocab_size": 9, "entity_emb_size": 8}),
    "megatron_bert": ("MegatronBertModel", "MegatronBertConfig", ENCODER),
    "mpnet": ("MPNetModel", "MPNetConfig", ENCODER),
    "mvp": ("MvpForConditionalGeneration", "MvpConfig", SEQ2SEQ | {"vocab_size": 97}),
    "rembert": ("RemBertModel", "RemBertConfig", ENCODER | {"input_embedding_size": 16}),
    "roformer": ("RoFormerModel", "RoFormerConfig", ENCODER | {"embedding_size": 32}),
    "tapas": ("TapasModel", "TapasConfig", ENCODER),
    "trocr": ("TrOCRForCausalLM", "TrOCRConfig", TROCR),
    "visual_bert": ("VisualBertModel", "VisualBertConfig", ENCODER),
}


def build(family: str):
    torch.manual_seed(0)
    cls, config, settings = FAMILIES[family]
    settings = settings | {"bos_token_id": 1, "eos_token_id": 2}
    model = getattr(transformers, cls)(getattr(transformers, config)(**settings)).eval()
    # Scores of a freshly made model are so small that a lost bias or mask would hardly show.
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=0.2)
    ids = torch.randint(5, 97, (2, 17))
    mask = torch.ones_like(ids)
    mask[0, 12:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids[:, :9]
    return model, inputs


def outputs_and_gradients(model, inputs):
    model.zero_grad()
    out = model(**inputs)[0]
    if "decoder_input_ids" not in inputs:
        out = out[inputs["attention_mask"].bool()]
    out.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return out.detach(), gradients


@pytest.mark.parametrize("family", FAMILIES)
def test_same_outputs_and_gradients(family, monkeypatch):
    model, inputs = build(family)
    want, want_gradients = outputs_and_gradients(model, inputs)
    calls = []
    run = attention.flash_attn
    monkeypatch.setattr(attention, "flash_attn", lambda *args: calls.append(args) or run(*args))
    with patched(model) as report:
        assert report.ok, str(report)
        got, gradients = outputs_and_gradients(model, inputs)
    # Cross attention sleeps in a decoder that is given no encoder's states.
    asleep = () if model.config.is_encoder_decoder else ("encoder_attn", "crossattention")
    awake = [layer for layer in report.layers if not any(part in layer.name for part in asleep)]
    assert len(calls) == len(awake) > 0
    assert (got - want).abs().max() <= 2e-5 * want.abs().max()
    largest = max(gradient.abs().max() for gradient in want_gradients.values())
    assert gradients.keys() == want_gradients.keys()
    for name, gradient in gradients.items():
        assert (gradient - want_gradients[name]).abs().max() <= 1e-4 * largest, name


@pytest.mark.parametrize("family", ["fsmt", "mvp", "trocr", "gpt_neox_japanese", "imagegpt"])
def test_same_tokens(family):
    model, inputs = build(family)
    inputs.pop("decoder_input_ids", None)
    if not model.config.is_encoder_decoder:
        inputs["attention_mask"] = inputs["attention_mask"].flip(1)
    settings = {"max_new_tokens": 7, "do_sample": False, "num_beams": 1, "pad_token_id": 0}
    want = model.generate(**inputs, **settings)
    patch(model)
    assert torch.equal(model.generate(**inputs, **settings), want)


def test_every_listed_class_is_tested():
    tested = set()
    for family in FAMILIES:
        for module in build(family)[0].modules():
            name = f"{type(module).__module__}.{type(module).__qualname__}"
            tested.add(name.removeprefix("transformers.models."))
    assert tested >= OWN_ATTENTION
