"""`patch`, `unpatch` and `patched` on loaded models, against the same models unpatched."""

from __future__ import annotations

import copy
import types

import peft
import pytest
import torch
import transformers
from helpers import assert_same_gradients, gradients_of
from torch import nn

from hf_flash_two import attention, patch, patched, unpatch
from hf_flash_two.hf import compat, families
from hf_flash_two.hf.tracer.mode import tracing

OFF = {"attention_dropout": 0.0, "hidden_dropout": 0.0}
GPT_OFF = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
GPT = {
    "vocab_size": 97,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "rotary_dim": 4,
    "n_positions": 64,
}
IDS = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}


def build(family: str, **changes) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    if family == "bloom":
        settings = {"vocab_size": 97, "hidden_size": 32, "n_layer": 2, "n_head": 4} | OFF | IDS
        config = transformers.BloomConfig(**(settings | changes))
        return transformers.BloomForCausalLM(config).eval()
    if family == "gptj":
        config = transformers.GPTJConfig(**(GPT | GPT_OFF | IDS | changes))
        return transformers.GPTJForCausalLM(config).eval()
    if family == "codegen":
        config = transformers.CodeGenConfig(**(GPT | GPT_OFF | IDS | changes))
        return transformers.CodeGenForCausalLM(config).eval()
    if family == "gpt_neo":
        settings = {
            "vocab_size": 97, "hidden_size": 32, "num_layers": 2, "num_heads": 4,
            "attention_types": [[["global", "local"], 1]], "window_size": 5,
            "max_position_embeddings": 64, "attention_dropout": 0.0, "resid_dropout": 0.0,
            "embed_dropout": 0.0,
        }  # fmt: skip
        return transformers.GPTNeoForCausalLM(
            transformers.GPTNeoConfig(**(settings | IDS | changes))
        ).eval()
    settings = {
        "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 64,
    }  # fmt: skip
    config = transformers.LlamaConfig(**(settings | IDS | changes))
    return transformers.LlamaForCausalLM(config).eval()


OWN = ["bloom", "gptj", "codegen", "gpt_neo"]
ALL = [*OWN, "llama"]


@pytest.fixture
def batch():
    torch.manual_seed(1)
    ids = torch.randint(3, 97, (2, 17))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture
def calls(monkeypatch):
    """Counts how often our op runs."""
    counted = []
    run = attention.flash_attn

    def count(*args):
        counted.append(args)
        return run(*args)

    monkeypatch.setattr(attention, "flash_attn", count)
    return counted


def logits_and_gradients(model, batch):
    model.zero_grad()
    logits = model(**batch).logits[batch["attention_mask"].bool()]
    logits.square().sum().backward()
    return logits.detach(), gradients_of(model)


def assert_same(ours, theirs):
    (logits, gradients), (want_logits, want_gradients) = ours, theirs
    assert (logits - want_logits).abs().max() <= 2e-5 * want_logits.abs().max()
    assert_same_gradients(gradients, want_gradients)


@pytest.mark.parametrize("family", ALL)
def test_same_numbers_through_our_op(family, batch, calls):
    model = build(family)
    model.set_attn_implementation("eager")
    theirs = logits_and_gradients(model, batch)
    assert not calls
    report = patch(model)
    assert report.ok and len(report.layers) == 2 and "flash_two" in str(report)
    assert_same(logits_and_gradients(model, batch), theirs)
    assert len(calls) == 2
    shapes = [tuple(args[3].dense.shape) for args in calls if args[3].dense is not None]
    assert family == "gpt_neo" or not shapes, "a mask of queries by keys was made"


@pytest.mark.parametrize("cache", [None, "static"], ids=["dynamic", "static"])
@pytest.mark.parametrize("family", OWN)
def test_same_tokens(family, batch, cache):
    model = build(family)
    settings = {"max_new_tokens": 9, "do_sample": False, "cache_implementation": cache}
    want = model.generate(**batch, **settings)
    with patched(model):
        assert torch.equal(model.generate(**batch, **settings), want)


@pytest.mark.filterwarnings("ignore")
def test_compiles_with_a_break_at_each_layer(batch, calls):
    model = build("bloom")
    want = model(**batch).logits
    visible = batch["attention_mask"].bool()
    with patched(model):
        torch._dynamo.reset()
        got = torch.compile(model, backend="aot_eager")(**batch).logits
        assert len(calls) == 2
        torch.testing.assert_close(got[visible], want[visible], atol=1e-5, rtol=1e-4)
        torch._dynamo.reset()
        with pytest.raises(Exception, match="hand-written attention runs uncompiled"):
            torch.compile(model, backend="aot_eager", fullgraph=True)(**batch)
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")
def test_torch_multihead_attention_compiles_whole():
    config = transformers.SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        image_size=16, patch_size=8,
    )  # fmt: skip
    model = transformers.SiglipVisionModel(config).eval()
    pixels = torch.randn(2, 3, 16, 16)
    want = model(pixels).pooler_output
    assert patch(model).ok
    torch._dynamo.reset()
    got = torch.compile(model, backend="aot_eager", fullgraph=True)(pixels).pooler_output
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ALL)
def test_undo_leaves_nothing(family, batch):
    model = build(family)
    before = model(**batch).logits
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    implementation = model.config._attn_implementation
    keys = list(model.state_dict())
    patch(model)
    assert list(model.state_dict()) == keys
    patch(model)
    unpatch(model)
    unpatch(model)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert model.config._attn_implementation == implementation
    assert torch.equal(model(**batch).logits, before)


def test_undo_after_an_exception(batch):
    model = build("bloom")
    with pytest.raises(ZeroDivisionError), patched(model):
        raise ZeroDivisionError
    assert "forward" not in vars(model.transformer.h[0].self_attention)


def test_teacher_and_student_are_independent(batch, calls):
    teacher, student = build("gptj"), build("gptj")
    patch(student)
    teacher(**batch)
    assert not calls
    copied = copy.deepcopy(student)
    unpatch(student)
    copied(**batch)
    assert len(calls) == 2
    student(**batch)
    assert len(calls) == 2


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("family", ["bloom", "llama"])
def test_inside_peft_and_any_wrapper(family, batch, calls):
    targets = {"bloom": "query_key_value", "llama": "q_proj"}[family]
    adapted = peft.get_peft_model(build(family), peft.LoraConfig(target_modules=[targets]))
    want = adapted(**batch).logits
    wrapped = nn.ModuleDict({"model": adapted})
    calls.clear()
    report = patch(wrapped)
    assert report.ok
    got = adapted(**batch).logits
    assert len(calls) == 2
    visible = batch["attention_mask"].bool()
    torch.testing.assert_close(got[visible], want[visible], atol=1e-5, rtol=1e-5)
    unpatch(wrapped)
    assert torch.equal(adapted(**batch).logits, want)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(batch, reentrant):
    model = build("bloom").train()
    theirs = logits_and_gradients(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with patched(model):
        assert_same(logits_and_gradients(model, batch), theirs)


def test_dropout_is_kept(batch, calls):
    model = build("bloom", attention_dropout=0.4).train()
    patch(model)
    model(**batch)
    assert {args[3].dropout_p for args in calls} == {0.4}
    calls.clear()
    model.eval()
    model(**batch)
    assert {args[3].dropout_p for args in calls} == {0.0}


def test_saves_while_patched(batch, tmp_path):
    model = build("bloom")
    want = model(**batch).logits
    with patched(model):
        model.save_pretrained(tmp_path)
    loaded = transformers.BloomForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(**batch).logits, want)


def test_sub_configs_are_switched_and_restored():
    tiny = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }  # fmt: skip
    config = transformers.CLIPConfig(
        text_config=tiny | {"vocab_size": 97},
        vision_config=tiny | {"image_size": 16, "patch_size": 8},
    )
    model = transformers.CLIPModel(config)
    model.set_attn_implementation({"text_config": "eager", "vision_config": "sdpa"})
    with patched(model) as report:
        assert report.ok and len(report.layers) == 2
        assert model.config.vision_config._attn_implementation == "flash_two"
    assert model.config.text_config._attn_implementation == "eager"
    assert model.config.vision_config._attn_implementation == "sdpa"


def test_report_names_what_is_not_ours():
    model = transformers.BigBirdModel(
        transformers.BigBirdConfig(
            vocab_size=97,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
        )  # fmt: skip
    )
    with pytest.raises(ValueError, match="BigBirdBlockSparseAttention .*a fixed sparse pattern"):
        patch(model)
    assert all("forward" not in vars(module) for module in model.modules())


def test_a_layer_of_a_class_that_is_possible_may_be_impossible():
    settings = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "type_vocab_size": 2}
    config = transformers.DebertaConfig(
        **settings, num_attention_heads=4, relative_attention=True, talking_head=True
    )
    with pytest.raises(ValueError, match="mixes the probabilities of its heads"):
        patch(transformers.DebertaModel(config))


def test_unknown_classes_are_reported(monkeypatch):
    monkeypatch.setattr(families, "HAND_WRITTEN", frozenset())
    with pytest.raises(ValueError, match="BloomAttention .*in a way not known"):
        patch(build("bloom"))


def test_refuses_what_it_cannot_patch():
    with pytest.raises(ValueError, match="expected a Transformers model.*got Linear"):
        patch(nn.Linear(2, 2))
    config = transformers.FNetConfig(hidden_size=16, num_hidden_layers=1, intermediate_size=16)
    with pytest.raises(ValueError, match="has no layer for flash_two"):
        patch(transformers.FNetModel(config))


@pytest.mark.parametrize("call", [patch, unpatch, lambda x: patched(x).__enter__()])
def test_says_how_to_come_by_a_model(call):
    config = transformers.LlamaConfig()
    for given, message in (
        ("org/name", r"got 'org/name'; load it: AutoModelForCausalLM\.from_pretrained"),
        (config, r"got LlamaConfig; build the model: AutoModelForCausalLM\.from_config"),
        (transformers.LlamaForCausalLM, "got the class LlamaForCausalLM; load or build"),
        (types.SimpleNamespace(model=nn.Linear(1, 1)), r"got SimpleNamespace; pass its `\.model`"),
        ([build("llama")], "got list; pass the model"),
        (None, "got NoneType"),
    ):
        with pytest.raises(TypeError, match=rf"^model: expected a loaded model.*{message}"):
            call(given)


@pytest.mark.parametrize("family", OWN)
def test_attention_weights_are_computed_on_request(family, batch):
    model = build(family)
    if compat.uses_interface(model):
        model.set_attn_implementation("eager")
    want = model(**batch, output_attentions=True)
    with patched(model):
        got = model(**batch, output_attentions=True)
        plain = model(**batch)
    visible = batch["attention_mask"].bool()
    assert len(got.attentions) == len(want.attentions) == 2
    for weights, theirs in zip(got.attentions, want.attentions, strict=True):
        weights, theirs = (x.transpose(1, 2)[visible] for x in (weights, theirs))
        torch.testing.assert_close(weights, theirs, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(plain.logits[visible], want.logits[visible], atol=1e-5, rtol=1e-4)


def test_weights_that_a_model_always_asks_of_its_layers(kernel_calls):
    torch.manual_seed(0)
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], out_features=["stage2"]
    )
    config = transformers.DabDetrConfig(
        use_timm_backbone=False, backbone=None, backbone_config=backbone, hidden_size=32,
        encoder_layers=1, decoder_layers=2, encoder_ffn_dim=32, decoder_ffn_dim=32, num_queries=5,
        encoder_attention_heads=4, decoder_attention_heads=4, dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    model, pixels = transformers.DabDetrModel(config).eval(), torch.randn(2, 3, 32, 48)
    want = model(pixels, output_attentions=True)
    with patched(model) as report:
        got = model(pixels)
        assert report.ok and len(kernel_calls) == len(report.layers) == 5
        asked = model(pixels, output_attentions=True)
        assert len(kernel_calls) == 5
        with torch.no_grad():
            compiled = torch.compile(model, backend="eager")(pixels)
    assert got.decoder_attentions is None
    torch.testing.assert_close(compiled.last_hidden_state, got.last_hidden_state)
    torch.testing.assert_close(got.last_hidden_state, want.last_hidden_state, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(asked.decoder_attentions, want.decoder_attentions)
    assert not any("forward" in vars(module) for module in model.modules())


def test_scores_follow_the_formula():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 4)
    bias = torch.randn(1, 3, 1, 7)
    seen = torch.rand(2, 1, 5, 7) > 0.2

    def attend():
        s = torch.matmul(q, k.transpose(-1, -2)) / 3.0
        s = torch.where(seen, s + bias, torch.tensor(-1e9)) * 0.5
        return nn.functional.dropout(s.float().softmax(-1), p=0.0).to(v.dtype) @ v

    want = attend()
    with tracing("layer"):
        got = attend()
    torch.testing.assert_close(got, want)
