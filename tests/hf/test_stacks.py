"""Training as people do it: Trainer, TRL and PEFT themselves, on tiny models.

Packed runs are held against each document alone under eager, trained by a plain loop.
"""

from __future__ import annotations

import datasets
import pytest
import torch
import torch.nn.functional as F
import trl
from models import DECODERS, Family, named, tokens
from torch import nn
from torch._dynamo.utils import counters
from transformers import (
    ByT5Tokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorWithFlattening,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

# Deprecations and advice among the trainers themselves.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{kind}")
    for kind in ("FutureWarning", "DeprecationWarning", "UserWarning")
]

TOKENIZER = ByT5Tokenizer()
LENGTHS = (7, 19, 2, 30, 11, 23, 5)
DOCUMENTS = [tokens(1, length, seed=length)[0].tolist() for length in LENGTHS]
STEPS, RATE = 3, 0.05
SOME = [family for family in DECODERS if family.name in ("llama", "qwen2")]
LLAMA = SOME[0]
# Every step sees all documents, so their order and the way they are packed make no difference.
SETTINGS = dict(
    max_steps=STEPS,
    per_device_train_batch_size=len(DOCUMENTS),
    learning_rate=RATE,
    optim="sgd",
    lr_scheduler_type="constant",
    max_grad_norm=0.0,
    logging_strategy="no",
    save_strategy="no",
    report_to="none",
    use_cpu=True,
    bf16=False,
    disable_tqdm=True,
)


def build(family: Family, implementation: str, **changes) -> PreTrainedModel:
    return family.build(implementation, vocab_size=len(TOKENIZER), **changes)


def data() -> datasets.Dataset:
    return datasets.Dataset.from_list([{"input_ids": document} for document in DOCUMENTS])


def sft(model: nn.Module, folder, peft_config=None, **options) -> trl.SFTTrainer:
    args = trl.SFTConfig(str(folder), **SETTINGS | dict(gradient_checkpointing=False) | options)
    return trl.SFTTrainer(
        model, args, train_dataset=data(), processing_class=TOKENIZER, peft_config=peft_config
    )


def plain(model: nn.Module, folder, collator, **options) -> Trainer:
    args = TrainingArguments(str(folder), **SETTINGS | options)
    return Trainer(model, args, train_dataset=data().to_list(), data_collator=collator)


def padding() -> DataCollatorForLanguageModeling:
    return DataCollatorForLanguageModeling(TOKENIZER, mlm=False)


def trained(trainer: Trainer) -> tuple[float, dict[str, torch.Tensor]]:
    """The mean loss of the steps, and by how much they moved each weight that is trained."""
    weights = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    loss = trainer.train().training_loss
    return loss, {name: weight.detach() - before[name] for name, weight in weights.items()}


def trained_alone(model: nn.Module) -> tuple[float, dict[str, torch.Tensor]]:
    """The same of a plain loop, in which the model gets one document at a time."""
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    targets, mean = sum(length - 1 for length in LENGTHS), 0.0
    for _ in range(STEPS):
        for document in DOCUMENTS:
            ids = torch.tensor([document])
            loss = F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="sum") / targets
            loss.backward()
            mean += loss.item() / STEPS
        optimizer.step()
        optimizer.zero_grad()
    return mean, {name: p.detach() - before[name] for name, p in model.named_parameters()}


def assert_same(actual, expected, limit: float = 1e-4) -> None:
    """Losses, and all weights' movements, relative to the largest of each weight."""
    assert actual[0] == pytest.approx(expected[0], rel=limit / 10)
    assert actual[1].keys() == expected[1].keys()
    for name, wanted in expected[1].items():
        scale = max(wanted.abs().max(), 1e-3 * max(w.abs().max() for w in expected[1].values()))
        off = ((actual[1][name] - wanted).abs().max() / scale).item()
        assert off <= limit, f"{name}: {off:.1e} > {limit:.0e}"


@pytest.fixture(scope="module")
def alone() -> dict[str, tuple]:
    return {family.name: trained_alone(build(family, "eager")) for family in SOME}


def test_the_measure_sees_a_leak(alone, tmp_path) -> None:
    """All documents in one, as a trainer that forgets their boundaries would have it."""
    model = build(LLAMA, "flash_two")

    def forget_boundaries(examples):
        batch = DataCollatorWithFlattening()(examples)
        batch["position_ids"] = torch.arange(sum(LENGTHS))[None]
        return batch

    loss, movement = trained(plain(model, tmp_path, forget_boundaries))
    with pytest.raises(AssertionError):
        assert_same((alone["llama"][0], movement), alone["llama"], limit=1e-2)


@pytest.mark.parametrize("implementation", ["flash_two", "fa_two"])
@pytest.mark.parametrize(
    "options",
    [
        {"packing": True, "packing_strategy": "bfd", "max_length": 40},
        {"packing": True, "packing_strategy": "bfd_split", "max_length": 40},
        {"padding_free": True, "max_length": None},
        {"padding_free": True, "max_length": None, "pad_to_multiple_of": 64},
        {"max_length": None},
    ],
    ids=["bfd", "bfd split", "padding-free", "padding-free to multiples", "padded"],
)
@pytest.mark.parametrize("family", named(SOME))
def test_sft_trainer(family: Family, options: dict, implementation: str, alone, tmp_path) -> None:
    trainer = sft(build(family, implementation), tmp_path, **options)
    batch = next(iter(trainer.get_train_dataloader()))
    assert ("attention_mask" in batch) == ("max_length" in options and len(options) == 1)
    assert_same(trained(trainer), alone[family.name])


@pytest.mark.parametrize("strategy", ["bfd", "wrapped"])
def test_sft_trainer_as_with_eager(strategy: str, tmp_path) -> None:
    """Wrapped documents lose their boundaries before any attention sees them."""
    options = dict(packing=True, packing_strategy=strategy, max_length=24)
    results = [
        trained(sft(build(LLAMA, name, use_cache=False), tmp_path, **options))
        for name in ("flash_two", "eager", "sdpa")
    ]
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"return_flash_attn_kwargs": True},
        {"return_seq_idx": True},
        {"return_flash_attn_kwargs": True, "return_seq_idx": True, "return_position_ids": False},
    ],
    ids=["positions", "boundaries", "index", "boundaries and index alone"],
)
@pytest.mark.parametrize("family", named(SOME))
def test_flattening_collator(
    family: Family, options: dict, use_cache: bool, alone, tmp_path
) -> None:
    model = build(family, "flash_two", use_cache=use_cache)
    collator = DataCollatorWithFlattening(**options)
    assert_same(trained(plain(model, tmp_path, collator)), alone[family.name])


@pytest.mark.parametrize("family", named(SOME))
def test_trainer_with_padding(family: Family, tmp_path) -> None:
    results = [
        trained(plain(build(family, name), tmp_path, padding()))
        for name in ("flash_two", "eager", "sdpa")
    ]
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("trainer", ["sft", "trainer"])
def test_gradient_checkpointing(
    trainer: str, reentrant: bool, alone, kernel_calls, tmp_path
) -> None:
    model = build(LLAMA, "flash_two")
    options = dict(
        gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": reentrant}
    )
    if trainer == "sft":
        run = sft(model, tmp_path, packing=True, max_length=40, **options)
    else:
        run = plain(model, tmp_path, DataCollatorWithFlattening(), **options)
    assert_same(trained(run), alone["llama"])
    assert len(kernel_calls) == STEPS * LLAMA.layers * 2


@pytest.mark.parametrize("trainer", ["sft", "trainer"])
def test_compiled_training(trainer: str, alone, tmp_path) -> None:
    """In one graph, as the trainers compile it."""
    torch._dynamo.reset()
    counters.clear()
    model = build(LLAMA, "flash_two", num_hidden_layers=1)
    expected = trained_alone(build(LLAMA, "eager", num_hidden_layers=1))
    options = dict(torch_compile=True, torch_compile_backend="aot_eager")
    if trainer == "sft":
        run = sft(model, tmp_path, padding_free=True, max_length=None, **options)
    else:
        run = plain(model, tmp_path, DataCollatorWithFlattening(), **options)
    assert_same(trained(run), expected)
    breaks = dict(counters["graph_break"])
    assert not any("flash_two" in reason for reason in breaks), breaks
    torch._dynamo.reset()
