"""Whole models: training and generation agree bit for bit, whatever shares a batch."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from models import CACHE, text, tokens
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, StaticCache

from hf_flash_two import batch_invariant

LENGTHS = (171, 70, 9)
WINDOW = 40
STEPS = 3


def config(name: str) -> transformers.PreTrainedConfig:
    sizes = dict(hidden_size=32, intermediate_size=32, head_dim=32, max_position_embeddings=512)
    if name == "GptOssConfig":
        sizes |= dict(num_local_experts=2, num_experts_per_tok=1)
    if name != "LlamaConfig":
        sizes |= dict(sliding_window=WINDOW)
    return text(name, num_hidden_layers=2, **sizes)


MODELS = {
    "llama": ("LlamaConfig", "LlamaForCausalLM"),
    "mistral": ("MistralConfig", "MistralForCausalLM"),
    "gpt-oss": ("GptOssConfig", "GptOssForCausalLM"),
}


def one_by_one(forward):
    """``forward`` of [..., D], token by token: nothing but attention may depend on the batch."""

    def each(x: Tensor) -> Tensor:
        flat = x.reshape(-1, 1, x.shape[-1]) if x.dim() == 3 else x.reshape(-1, x.shape[-1])
        rows = [forward(flat[at : at + 1]) for at in range(flat.shape[0])]
        return torch.cat(rows).unflatten(0, x.shape[:-1]).reshape(*x.shape[:-1], -1)

    return each


def build(name: str) -> PreTrainedModel:
    made, of = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, of)._from_config(config(made), attn_implementation="flash_two")
    model = model.eval()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.forward = one_by_one(module.forward)
        elif type(module).__name__ == "GptOssMLP":
            whole = module.forward

            def mlp(x: Tensor, whole=whole):
                flat = x.reshape(-1, 1, 1, x.shape[-1])
                return torch.cat([whole(token)[0] for token in flat]).view_as(x), None

            module.forward = mlp
    return model


def documents() -> list[Tensor]:
    return [tokens(1, length, seed=at)[0] for at, length in enumerate(LENGTHS)]


@torch.no_grad()
def alone(model: PreTrainedModel) -> list[Tensor]:
    return [model(x[None], use_cache=False).logits[0] for x in documents()]


def padded(side: str) -> tuple[Tensor, Tensor]:
    longest = max(LENGTHS)
    ids, mask = torch.zeros(2, len(LENGTHS), longest, dtype=torch.long)
    for row, x in enumerate(documents()):
        at = slice(longest - len(x), None) if side == "left" else slice(0, len(x))
        ids[row, at], mask[row, at] = x, 1
    return ids, mask


@torch.no_grad()
def from_batch(model: PreTrainedModel, side: str) -> list[Tensor]:
    ids, mask = padded(side)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    return [x[m != 0] for x, m in zip(logits, mask, strict=True)]


@torch.no_grad()
def from_packed_row(model: PreTrainedModel) -> list[Tensor]:
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    ids = torch.cat(documents())[None]
    logits = model(ids, position_ids=positions, use_cache=False).logits[0]
    return list(logits.split(LENGTHS))


@torch.no_grad()
def from_cache(model: PreTrainedModel, kind: str) -> list[Tensor]:
    """The prompts at once, then a chunk, then single tokens."""
    ids, mask = padded("left")
    longest = ids.shape[1]
    settings = copy.deepcopy(model.config)
    if kind == "static":
        cache = StaticCache(config=settings, max_cache_len=longest + 30)
    else:
        cache = DynamicCache(config=settings)
    ends = [longest - 7 - STEPS, longest - STEPS, *range(longest - STEPS + 1, longest + 1)]
    logits, start = [], 0
    for stop in ends:
        seen = mask[:, :stop]
        positions = (seen.cumsum(1) - 1).clamp(min=0)[:, start:]
        given = {"attention_mask": seen, "position_ids": positions, CACHE: cache}
        logits.append(model(ids[:, start:stop], use_cache=True, **given).logits)
        start = stop
    logits = torch.cat(logits, 1)
    return [x[m != 0] for x, m in zip(logits, mask, strict=True)]


WAYS = {
    "left padding": lambda model: from_batch(model, "left"),
    "right padding": lambda model: from_batch(model, "right"),
    "packed": from_packed_row,
    "dynamic cache": lambda model: from_cache(model, "dynamic"),
    "static cache": lambda model: from_cache(model, "static"),
}


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_each_document_alone(name: str) -> None:
    model = build(name)
    with batch_invariant():
        expected = alone(model)
        for way, compute in WAYS.items():
            got = compute(model)
            for row, (a, b) in enumerate(zip(got, expected, strict=True)):
                assert torch.equal(a, b), (way, row, (a - b).abs().max())
    # Without the mode they are not: this test can fail.
    usual = alone(model)
    for way, compute in WAYS.items():
        assert not all(map(torch.equal, compute(model), usual)), way


def test_a_keyword_of_the_model_is_enough_without_a_window() -> None:
    model = build("llama")
    ids, mask = padded("left")
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    given = {"attention_mask": mask, "position_ids": positions, "use_cache": False}
    with torch.no_grad():
        said = model(ids, **given, batch_invariant=True).logits
        with batch_invariant():
            assert torch.equal(model(ids, **given).logits, said)
            assert not torch.equal(model(ids, **given, batch_invariant=False).logits, said)


def test_generate_gives_the_tokens_and_scores_of_each_prompt_alone() -> None:
    model = build("mistral")
    ids, mask = padded("left")
    settings = {
        "max_new_tokens": 4, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0,
        "output_logits": True, "return_dict_in_generate": True,
    }  # fmt: skip
    with batch_invariant():
        together = model.generate(ids, attention_mask=mask, **settings)
        for row, prompt in enumerate(documents()):
            alone = model.generate(prompt[None], **settings)
            for a, b in zip(together.logits, alone.logits, strict=True):
                assert torch.equal(a[row], b[0])


def test_a_step_whose_mask_forgot_the_documents_is_refused() -> None:
    model = build("mistral")
    ids, mask = padded("left")
    cache = DynamicCache(config=copy.deepcopy(model.config))
    with torch.no_grad():
        model(ids[:, :-1], attention_mask=mask[:, :-1], **{CACHE: cache})
        with pytest.raises(ValueError, match="no longer tells where documents start"):
            model(ids[:, -1:], attention_mask=mask, **{CACHE: cache}, batch_invariant=True)


def test_weights_are_those_of_the_keys_that_are_left() -> None:
    model = build("mistral")
    ids, mask = padded("left")

    def weights() -> Tensor:
        cache = DynamicCache(config=copy.deepcopy(model.config))
        with torch.no_grad():
            model(ids[:, :-1], attention_mask=mask[:, :-1], **{CACHE: cache})
            given = {"attention_mask": mask, "output_attentions": True, CACHE: cache}
            return model(ids[:, -1:], **given).attentions[0]

    usual = weights()
    with batch_invariant():
        torch.testing.assert_close(weights(), usual)


def test_gradients_of_a_batch_are_those_of_each_row() -> None:
    """Those of the embeddings, which each row has for itself."""
    model = build("gpt-oss")
    ids, mask = padded("left")
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    embed = model.get_input_embeddings()

    def gradient(ids: Tensor, **given) -> Tensor:
        embedded = embed(ids).detach().requires_grad_()
        logits = model(inputs_embeds=embedded, use_cache=False, **given).logits
        seen = given.get("attention_mask", torch.ones_like(ids))
        (logits.square().sum(-1) * seen).sum().backward()
        return embedded.grad

    with batch_invariant():
        together = gradient(ids, attention_mask=mask, position_ids=positions)
        for row, x in enumerate(documents()):
            assert torch.equal(together[row, -len(x) :], gradient(x[None])[0])
