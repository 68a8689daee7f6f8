"""Branches that share their prefixes in a row give what each branch gives alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
import transformers
from helpers import assert_same_gradients, gradients_of
from models import CACHE, DECODERS
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from hf_flash_two import PrefixTreeCollator, completion_logps, patch
from hf_flash_two.hf import mask_function
from hf_flash_two.hf.families import BRANCHABLE
from hf_flash_two.hf.prefix_tree import IGNORED
from scripts.coverage.build import families, shrunk, spread_out
from scripts.coverage.inputs import find

BY_NAME = {family.name: family for family in DECODERS}
LLAMA = BY_NAME["llama"]
CAUSAL = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
SAMPLE = ["gemma3", "gptj", "olmo2", "opt"]


def drawn(*lengths: int, highest: int = 80) -> list[list[int]]:
    """Random tokens, some of which come again."""
    return [torch.randint(3, highest, (length,)).tolist() for length in lengths]


def trees(highest: int = 80) -> list[dict[str, Any]]:
    prompt, long, short, one, other = drawn(13, 12, 6, 1, 4, highest=highest)
    turns = drawn(5, 6, 1, 3, 8, 2, 7, highest=highest)
    return [
        {"prompt_ids": prompt, "completion_ids": [long, short, one, short]},
        # Below segment 2, of one token, two branch off; 3 stands between 1 and its child 4.
        {"segments": turns, "parents": [-1, 0, 1, 0, 1, 2, 2]},
        {"prompt_ids": other, "completion_ids": [long]},
    ]


def alone(
    model: PreTrainedModel, examples: Sequence[Mapping[str, Any]]
) -> tuple[list[Tensor], Tensor]:
    """The log-probabilities of each segment with labels, each after its ancestors, and the loss."""
    logps = []
    for example in examples:
        if "prompt_ids" in example:
            segments = [example["prompt_ids"], *example["completion_ids"]]
            parents = [-1] + [0] * len(example["completion_ids"])
        else:
            segments, parents = example["segments"], example["parents"]
        for own, parent in zip(segments, parents, strict=True):
            if parent == -1:
                continue
            before: list[int] = []
            while parent != -1:
                before, parent = segments[parent] + before, parents[parent]
            logits = model(torch.tensor([before + own]), use_cache=False).logits[
                0, len(before) - 1 : -1
            ]
            logps.append(logits.log_softmax(1).gather(1, torch.tensor(own)[:, None])[:, 0])
    return logps, -torch.cat(logps).mean()


def check(model: PreTrainedModel, examples, collator: PrefixTreeCollator, limit=1e-5) -> None:
    """Log-probabilities and loss, and the gradients of all parameters."""
    batch = collator(examples)
    completions = batch.pop("completions")
    expected, loss = alone(model, examples)
    loss.backward()
    wanted = gradients_of(model)
    model.zero_grad()
    out = model(**batch)
    logps, mask = completion_logps(out.logits, batch["labels"], completions)
    assert mask.sum(1).tolist() == [len(x) for x in expected]
    for row, each in zip(logps, expected, strict=True):
        torch.testing.assert_close(row[: len(each)], each, rtol=limit, atol=limit)
        assert not row[len(each) :].any()
    torch.testing.assert_close(out.loss, loss, rtol=limit, atol=0)
    out.loss.backward()
    assert_same_gradients(model, wanted, limit)


@pytest.mark.parametrize("row_length", [None, 48, 100], ids=["padded", "some to a row", "one row"])
@pytest.mark.parametrize(
    "family",
    ["llama", "mistral", "gemma2", "gemma3", "qwen3", "gpt-oss", "llama4", "phi3", "deepseek-v3"],
)
def test_branches_are_as_if_alone(family: str, row_length: int | None) -> None:
    collator = PrefixTreeCollator(row_length=row_length, number_completions=True)
    check(BY_NAME[family].build("flash_two"), trees(), collator)


def test_a_window_longer_than_all_branches_costs_no_dense_mask(monkeypatch) -> None:
    monkeypatch.delattr(mask_function, "from_tiles")
    model = BY_NAME["mistral"].build("flash_two", sliding_window=30)
    check(model, trees(), PrefixTreeCollator(row_length=100, number_completions=True))


def test_padding_on_the_left() -> None:
    """Chunks count from the first token that is no padding."""
    model = BY_NAME["llama4"].build("flash_two")
    batch = PrefixTreeCollator()(trees()[:1])
    with torch.no_grad():
        expected = model(**batch).logits
        moved = {
            name: torch.nn.functional.pad(x, (3, 0), value=IGNORED if name == "labels" else 0)
            for name, x in batch.items()
        }
        moved["subtree_stop"][:, 3:] += 3
        actual = model(**moved).logits[:, 3:]
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(family: str, reentrant: bool) -> None:
    model = BY_NAME[family].build("flash_two").train()
    batch = PrefixTreeCollator()(trees())
    model(**batch).loss.backward()
    expected = gradients_of(model)
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model(**batch).loss.backward()
    assert_same_gradients(model, expected, 1e-6)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_compiled(family: str) -> None:
    model = BY_NAME[family].build("flash_two")
    batch = PrefixTreeCollator()(trees())
    expected = model(**batch, use_cache=False)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    actual = compiled(**batch, use_cache=False)
    torch._dynamo.reset()
    torch.testing.assert_close(actual.logits, expected.logits, rtol=1e-5, atol=1e-5)


def test_through_adapters() -> None:
    peft = pytest.importorskip("peft", reason="the extra test installs it")
    model = LLAMA.build("flash_two")
    config = peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    batch = PrefixTreeCollator()(trees())
    expected = model(**batch).logits
    torch.testing.assert_close(peft.get_peft_model(model, config)(**batch).logits, expected)


def test_blocks_of_an_image_see_each_other_within_their_branch() -> None:
    """Gemma 3 tells them by token types, and asks for these in training."""
    model = build("gemma3").train()
    prompt, long, short = drawn(13, 12, 6)
    kinds = torch.zeros(19, dtype=torch.int64)
    kinds[4:10] = 1
    batch = PrefixTreeCollator()([{"prompt_ids": prompt, "completion_ids": [short, long]}])
    types = kinds[batch["position_ids"].clamp(max=18)]
    with torch.no_grad():
        rows = model(**batch, token_type_ids=types).logits[0]
        alone = model(
            torch.tensor([prompt + short]), token_type_ids=kinds[None], use_cache=False
        ).logits[0]
        causal = model(**batch, token_type_ids=types * 0).logits[0]
    torch.testing.assert_close(rows[:19], alone, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(rows[:19], causal[:19], atol=1e-3)


def refused(error: type[Exception], message: str, model=None, **changes) -> None:
    model = LLAMA.build("flash_two") if model is None else model
    batch = PrefixTreeCollator()(trees()) | changes
    with pytest.raises(error, match=message):
        model(**{name: x for name, x in batch.items() if x is not None})


def test_what_does_not_describe_branches_is_refused() -> None:
    refused(ValueError, "subtree_stop: expected .* beside position_ids", position_ids=None)
    refused(ValueError, "cu_seq_lens_q: subtree_stop tells", cu_seq_lens_q=torch.tensor([0, 9]))
    batch = PrefixTreeCollator()(trees())
    length = batch["input_ids"].shape[1]
    visible = torch.ones(3, 1, length, length, dtype=torch.bool).tril()
    for model in (None, build("falcon")):  # through the interface, and hand-written
        refused(NotImplementedError, "subtree_stop: .* cannot keep", model, attention_mask=visible)
    cut = batch["subtree_stop"][:, 1:]
    refused(ValueError, "subtree_stop: expected .* beside position_ids", subtree_stop=cut)


def test_layers_without_the_mask_are_refused(monkeypatch) -> None:
    monkeypatch.setattr(
        transformers.models.llama.modeling_llama, "create_causal_mask", lambda **_: None
    )
    refused(NotImplementedError, "subtree_stop: .* cannot keep")


def test_a_cache_of_earlier_tokens_is_refused() -> None:
    model = LLAMA.build("flash_two")
    cache = model(torch.tensor([[5, 6]] * 3), use_cache=True)[
        CACHE if CACHE == "cache" else "past_key_values"
    ]
    mask = torch.nn.functional.pad(PrefixTreeCollator()(trees())["attention_mask"], (2, 0), value=1)
    message = "subtree_stop: expected the .* tokens of its rows in one forward"
    refused(ValueError, message, model, **{CACHE: cache}, attention_mask=mask)
    refused(ValueError, message, model, attention_mask=mask, use_cache=False)


def build(family: str, **changes) -> PreTrainedModel:
    named = CAUSAL[family]
    cls = getattr(transformers, named if isinstance(named, str) else named[0])
    written = {each.name: each.override.config for each in families()}
    config_class = type(transformers.AutoConfig.for_model(family))
    config = shrunk(config_class, written.get(family, {}) | changes)
    torch.manual_seed(0)
    model = cls._from_config(config, attn_implementation="flash_two").eval()
    spread_out(model)
    return model


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("bloom", {}, "bloom is not among the families tested so"),
        ("mamba", {}, "mamba is not among"),
        ("gpt_neo", {}, "gpt_neo is not among"),
        ("falcon", {"alibi": True}, "its ALiBi counts"),
        ("mixtral", {"output_router_logits": True}, "output_router_logits adds a loss"),
        ("qwen3", {"layer_types": ["full_attention", "conv"]}, "it has layers of conv"),
    ],
)
def test_families_that_count_rows_are_refused(family: str, changes: dict, message: str) -> None:
    model = build(family)
    patch(model) if family != "mamba" else None
    for name, value in changes.items():
        setattr(model.config, name, value)
    refused(NotImplementedError, message, model)


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(x, marks=() if x in SAMPLE else pytest.mark.sweep)
        for x in sorted(BRANCHABLE & CAUSAL.keys())
    ],
)
def test_family(family: str) -> None:
    model = build(family)
    examples = trees(min(80, find(model.config, "vocab_size")))
    collator = PrefixTreeCollator(row_length=64, number_completions=True)
    check(model, examples, collator, limit=5e-5)
