"""Batches of shared prefixes, and the losses that docs/branches.md computes from them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from documentation import ROOT, run, snippets
from helpers import assert_same_gradients, gradients_of
from models import DECODERS
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    ByT5Tokenizer,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from hf_flash_two import AttentionMask, PrefixTreeCollator, merge_rows

TOKENIZER = ByT5Tokenizer()
PAGE = snippets(ROOT / "docs" / "branches.md")
QWEN = next(family for family in DECODERS if family.name == "qwen3")
PROMPT, LONG, SHORT = [5, 6, 7], [11, 12, 13], [14]


def seen(batch: dict[str, Tensor], row: int = 0) -> Tensor:
    stop = batch["subtree_stop"][row]
    mask = AttentionMask.from_intervals(torch.arange(len(stop)), stop)
    return mask.to_dense(len(stop), len(stop))[0, 0]


def test_a_row_as_it_stands() -> None:
    examples = [{"prompt_ids": PROMPT, "completion_ids": [LONG, SHORT]}]
    collator = PrefixTreeCollator(99, pad_to_multiple_of=5, number_completions=True)
    batch = collator(examples)
    assert {name: x[0].tolist() for name, x in batch.items()} == {
        "input_ids": [5, 6, 7, 11, 12, 13, 7, 14, 99, 99],
        "attention_mask": [1, 1, 1, 1, 1, 1, 1, 1, 0, 0],
        "labels": [-100, -100, -100, 11, 12, 13, -100, 14, -100, -100],
        "position_ids": [0, 1, 2, 3, 4, 5, 2, 3, 0, 0],
        "completions": [-1, -1, -1, 0, 0, 0, -1, 1, -1, -1],
        "subtree_stop": [8, 8, 6, 6, 6, 6, 8, 8, 9, 10],
    }


def test_segments_with_one_child_each_are_a_tree_of_masks() -> None:
    lengths, parents = [3, 2, 4, 2, 1], [-1, 0, 1, -1, 3]
    segments = [list(range(10, 10 + n)) for n in lengths]
    batch = PrefixTreeCollator(row_length=12)([{"segments": segments, "parents": parents}])
    tree = AttentionMask.from_tree(lengths, parents).to_dense(12, 12)[0, 0]
    assert torch.equal(seen(batch), tree)


def test_each_token_sees_its_branch_alone() -> None:
    """Tokens tell their segments; each sees those before it on its branch, in their order."""
    parents = [-1, 0, 0, 1, 1, 4, 4, 1, 2]
    segments = [[10 * at + place for place in range(1 + at % 3)] for at in range(len(parents))]
    batch = PrefixTreeCollator()([{"segments": segments, "parents": parents}])
    tokens, visible = batch["input_ids"][0], seen(batch)
    found = set()
    for at, label in enumerate(batch["labels"][0].tolist()):
        branch = tokens[visible[at]].tolist()
        path, node = [], branch[-1] // 10
        while node != -1:
            path, node = segments[node] + path, parents[node]
        assert branch == path[: len(branch)]
        assert batch["position_ids"][0, at] == len(branch) - 1
        if label != -100:
            assert label == branch[-1] and label not in found
            found.add(label)
            # The token before it in the row predicts it.
            assert tokens[visible[at - 1]].tolist() == branch[:-1]
    assert found == {token for segment in segments[1:] for token in segment}


def test_the_first_token_of_a_tree_has_no_label() -> None:
    """It would be predicted from the tree before it in the row."""
    examples = [{"segments": [PROMPT, LONG], "parents": [-1, 0], "labels": [PROMPT, LONG]}] * 2
    labels = PrefixTreeCollator(row_length=12)(examples)["labels"][0].tolist()
    assert labels == [-100, 6, 7, *LONG] * 2


def test_trees_fill_rows_in_their_order() -> None:
    examples = [{"prompt_ids": PROMPT, "completion_ids": [LONG]}] * 3
    batch = PrefixTreeCollator(row_length=13, number_completions=True)(examples)
    assert batch["attention_mask"].sum(1).tolist() == [12, 6]
    assert batch["completions"].amax(1).tolist() == [1, 2]


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ({"prompt_ids": PROMPT, "completion_ids": [[]]}, "segments: expected at least one token"),
        ({"segments": [PROMPT, LONG], "parents": [-1, 1]}, "parents: expected an earlier one"),
        ({"segments": [PROMPT, LONG], "parents": [-1]}, "parents: expected an earlier one"),
        ({"segments": [PROMPT], "parents": [-1], "labels": [SHORT]}, "labels: expected one"),
        ({"prompt_ids": PROMPT, "completion_ids": [LONG] * 4}, "row_length: a tree of 18 tokens"),
        ({"prompt": PROMPT, "chosen": LONG}, r"examples: expected .*got \['prompt', 'chosen'\]"),
        ({"prompt_ids": PROMPT}, r"examples: expected .*in each, got \['prompt_ids'\]"),
        ({"prompt_ids": "Two", "completion_ids": [LONG]}, "prompt_ids: .* integers, got 'Two'"),
        ({"prompt_ids": PROMPT, "completion_ids": [3, 4]}, "each of completion_ids: .*, got 3"),
        ({"segments": [[0.5]], "parents": [-1]}, r"each of segments: .*integers, got \[0.5\]"),
        ({"segments": [PROMPT], "parents": [-1], "labels": [5]}, "each of labels: .*, got 5"),
    ],
)
def test_what_is_no_tree_is_refused(example: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrefixTreeCollator(row_length=17)([example])


def test_no_examples_are_refused() -> None:
    with pytest.raises(ValueError, match="examples: expected at least one, got none"):
        PrefixTreeCollator()([])


def test_a_tokenizer_without_pad_token_is_refused() -> None:
    with pytest.raises(ValueError, match="pad_token_id: expected an integer, got None; .*pass 0"):
        PrefixTreeCollator(None)


@pytest.mark.parametrize("form", [tuple, torch.tensor, np.array, lambda x: [*torch.tensor(x)]])
def test_tokens_in_any_sequence(form: Callable) -> None:
    example = {"prompt_ids": form(PROMPT), "completion_ids": [form(LONG), form(SHORT)]}
    batch = PrefixTreeCollator()([example])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 11, 12, 13, 7, 14]]


def padded_rows() -> dict[str, Tensor]:
    """Prompts, padded on the left, and completions, on the right, one of them without labels."""
    rows = [(PROMPT, LONG), (SHORT, PROMPT), (PROMPT, SHORT), (SHORT, LONG), (PROMPT, [15, 16])]
    ids = torch.zeros(5, 8, dtype=torch.int64)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, (prompt, completion) in enumerate(rows):
        ids[row, 4 - len(prompt) : 4], mask[row, 4 - len(prompt) : 4] = torch.tensor(prompt), 1
        until = 4 + len(completion)
        ids[row, 4:until], mask[row, 4:until] = torch.tensor(completion), 1
        labels[row, 4:until] = ids[row, 4:until]
    labels[4], labels[0, 5] = -100, -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def test_rows_of_one_prompt_are_merged() -> None:
    rows = padded_rows()
    batch, index = merge_rows(**rows)
    assert batch["input_ids"].shape[0] == 3  # the row without label is its own
    assert torch.equal(index >= 0, rows["labels"] != -100)
    labels = rows["labels"]
    assert torch.equal(batch["labels"].flatten()[index[index >= 0]], labels[labels != -100])
    assert (batch["labels"] != -100).sum() == (labels != -100).sum()


def model_of_page(seed: int = 0) -> PreTrainedModel:
    return QWEN.build("flash_two", seed, vocab_size=len(TOKENIZER), eos_token_id=1)


@pytest.fixture
def page(tmp_path, monkeypatch) -> dict[str, dict]:
    """The names that the snippets of DPO and GRPO define."""
    model_of_page().save_pretrained(tmp_path / "tiny")
    TOKENIZER.save_pretrained(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    return {name: run(x.values[0]) for x in PAGE for name in ("DPO", "GRPO") if f" {name}" in x.id}


def logps_alone(model: PreTrainedModel, prompt: list[int], completion: list[int]) -> Tensor:
    logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(1).gather(1, torch.tensor(completion)[:, None])[:, 0]


def drawn(*lengths: int) -> list[list[int]]:
    return [torch.randint(3, 250, (length,)).tolist() for length in lengths]


def assert_same(model: PreTrainedModel, loss: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    expected.backward()
    wanted = gradients_of(model)
    model.zero_grad()
    loss.backward()
    assert_same_gradients(model, wanted, 1e-5)


def test_dpo_as_documented(page) -> None:
    model, reference = model_of_page(), model_of_page(seed=1)
    prompts, pairs = drawn(17, 4), [drawn(9, 5), drawn(1, 12)]
    batch = PrefixTreeCollator(number_completions=True)(
        [{"prompt_ids": p, "completion_ids": c} for p, c in zip(prompts, pairs, strict=True)]
    )
    loss = page["DPO"]["dpo_loss"](model, reference, batch, beta=0.3)
    losses = []
    for prompt, pair in zip(prompts, pairs, strict=True):
        chosen, rejected = (
            logps_alone(model, prompt, x).sum() - logps_alone(reference, prompt, x).sum().detach()
            for x in pair
        )
        losses.append(-F.logsigmoid(0.3 * (chosen - rejected)))
    assert_same(model, loss, torch.stack(losses).mean())


def test_grpo_as_documented(page) -> None:
    model, sampler = model_of_page(), model_of_page(seed=1)
    (prompt, *completions), advantages = drawn(15, 7, 1, 12, 7), torch.randn(4)
    batch = PrefixTreeCollator(number_completions=True)(
        [{"prompt_ids": prompt, "completion_ids": completions}]
    )
    with torch.no_grad():
        old, _ = page["GRPO"]["completions_of"](sampler, batch)
    loss = page["GRPO"]["grpo_loss"](model, batch, advantages, old, epsilon=0.3)
    losses = []
    for completion, advantage in zip(completions, advantages, strict=True):
        before = logps_alone(sampler, prompt, completion).detach()
        ratio = (logps_alone(model, prompt, completion) - before).exp()
        gain = torch.minimum(ratio * advantage, ratio.clamp(0.7, 1.3) * advantage)
        losses.append(-gain.mean())
    assert_same(model, loss, torch.stack(losses).mean())


SETTINGS: dict[str, Any] = dict(
    max_steps=2, per_device_train_batch_size=4, learning_rate=0.05, optim="sgd",
    lr_scheduler_type="constant", max_grad_norm=0.0, save_strategy="no", report_to="none",
    use_cpu=True, bf16=False, disable_tqdm=True, gradient_checkpointing=False, logging_steps=1,
)  # fmt: skip
TEXTS = ["What is two and two?", "Name a colour.", "What is two and two?", "Go on: a, b, c"]


def dpo(trl, trainer: type, model: PreTrainedModel, folder: Path):
    rows = [{"prompt": x, "chosen": f" It is {len(x)}.", "rejected": x[::-1]} for x in TEXTS]
    args = trl.DPOConfig(str(folder), **SETTINGS, beta=0.5)
    return trainer(model, model_of_page(seed=1), args, **given(rows))


def grpo(trl, trainer: type, model: PreTrainedModel, folder: Path):
    """Two steps from the same samples, so that the ratio is not 1 in the second."""

    def reward(completion_ids, **_):
        return [float(sum(x) % 7) for x in completion_ids]

    args = trl.GRPOConfig(
        str(folder), **SETTINGS, beta=0.1, num_generations=4, max_completion_length=7,
        num_iterations=2, temperature=0.8,
    )  # fmt: skip
    return trainer(model, reward, args, **given([{"prompt": x} for x in TEXTS]))


def given(rows: list[dict]) -> dict[str, Any]:
    dataset = importlib.import_module("datasets").Dataset.from_list(rows)
    return {"train_dataset": dataset, "processing_class": TOKENIZER}


def test_trainer(tmp_path) -> None:
    """A step moves the weights by the gradient of the mean over all tokens of all completions."""
    prompts, completions = drawn(11, 5), [drawn(3, 8), drawn(6)]
    examples = [
        {"prompt_ids": p, "completion_ids": c} for p, c in zip(prompts, completions, strict=True)
    ]
    model = model_of_page()
    logps = [
        logps_alone(model, p, x)
        for p, several in zip(prompts, completions, strict=True)
        for x in several
    ]
    loss = -torch.cat(logps).mean()
    loss.backward()
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    wanted = {name: -0.05 * grad for name, grad in gradients_of(model).items()}
    model.zero_grad()
    args = TrainingArguments(
        str(tmp_path), **SETTINGS | {"max_steps": 1, "remove_unused_columns": False}
    )
    trainer = Trainer(model, args, train_dataset=examples, data_collator=PrefixTreeCollator())
    assert trainer.train().training_loss == pytest.approx(loss.item(), rel=1e-5)
    moved = {name: weight.detach() - before[name] for name, weight in model.named_parameters()}
    assert_same_gradients(moved, wanted, 1e-4)


@pytest.mark.parametrize("method", [dpo, grpo])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_trl_as_documented(method, tmp_path, monkeypatch) -> None:
    """The same losses, and the same weights after two steps, from fewer tokens."""
    trl = pytest.importorskip("trl", reason="the extra test installs it")
    if not hasattr(importlib.import_module("trl.trainer.utils"), "add_fused_lm_head"):
        pytest.skip(f"TRL {trl.__version__} cuts the logits itself")
    model_of_page().save_pretrained(tmp_path / "tiny")
    TOKENIZER.save_pretrained(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    names = run(next(x.values[0] for x in PAGE if "import DPO" in x.values[0]))
    name, merged, sizes = f"{method.__name__.upper()}Trainer", names["merge_rows"], []

    def merge(*rows: Tensor):
        batch, index = merged(*rows)
        sizes.append((rows[0].numel(), batch["input_ids"].numel()))
        return batch, index

    names["merge_rows"] = merge

    def trained(trainer: type) -> tuple[list[float], dict[str, Tensor]]:
        model = AutoModelForCausalLM.from_pretrained("tiny", attn_implementation="flash_two")
        before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        made = method(trl, trainer, model, tmp_path / "runs")
        torch.manual_seed(0)
        made.train()
        losses = [x["loss"] for x in made.state.log_history if "loss" in x]
        after = model.named_parameters()
        return losses, {name: weight.detach() - before[name] for name, weight in after}

    losses, moved = trained(getattr(trl, name))
    assert not sizes
    shared, with_shared = trained(names[f"Sharing{name}"])
    assert len(sizes) == 2 and all(after < before for before, after in sizes)
    assert shared == pytest.approx(losses, rel=1e-5, abs=1e-6)
    assert_same_gradients(with_shared, moved, 1e-4)
