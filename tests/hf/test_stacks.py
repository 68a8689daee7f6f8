"""Training as people do it: Trainer, TRL and PEFT themselves, on tiny models.

Packed runs are held against each document alone under eager, trained by a plain loop.
"""

from __future__ import annotations

import peft
import pytest
import torch
import torch.nn.functional as F
from documentation import ROOT, run, snippets
from helpers import assert_same_gradients
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

from hf_flash_two import max_logits
from hf_flash_two.hf import interface

datasets = pytest.importorskip("datasets", reason="the extra test installs it, with TRL")
trl = pytest.importorskip("trl", reason="the extra test installs it")

# Deprecations and advice among the trainers themselves.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{kind}")
    for kind in ("FutureWarning", "DeprecationWarning", "UserWarning")
]

TOKENIZER = ByT5Tokenizer()
LENGTHS = (7, 19, 2, 30, 11, 23, 5)
DOCUMENTS = [tokens(1, length, seed=length)[0].tolist() for length in LENGTHS]
STEPS, RATE = 3, 0.05
FAMILIES = {family.name: family for family in DECODERS}
LLAMA = FAMILIES["llama"]
SOME = [LLAMA, FAMILIES["qwen2"]]
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
    weights = {n: p for n, p in model.named_parameters() if p.requires_grad}
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    optimizer = torch.optim.SGD(weights.values(), RATE)
    targets, mean = sum(length - 1 for length in LENGTHS), 0.0
    for _ in range(STEPS):
        for document in DOCUMENTS:
            ids = torch.tensor([document])
            loss = F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="sum") / targets
            loss.backward()
            mean += loss.item() / STEPS
        optimizer.step()
        optimizer.zero_grad()
    return mean, {name: weight.detach() - before[name] for name, weight in weights.items()}


def assert_same(actual, expected, limit: float = 1e-4) -> None:
    """Losses, and all weights' movements, which are sums of gradients."""
    assert actual[0] == pytest.approx(expected[0], rel=limit / 10)
    assert_same_gradients(actual[1], expected[1], limit)


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
    ],
    ids=["bfd", "bfd split", "padding-free", "padding-free to multiples"],
)
@pytest.mark.parametrize("family", named(SOME))
def test_sft_trainer(family: Family, options: dict, implementation: str, alone, tmp_path) -> None:
    trainer = sft(build(family, implementation), tmp_path, **options)
    batch = next(iter(trainer.get_train_dataloader()))
    assert "attention_mask" not in batch and len(batch["input_ids"]) == 1
    assert_same(trained(trainer), alone[family.name])


@pytest.mark.parametrize(
    "options",
    [
        {"packing": True, "packing_strategy": "bfd", "max_length": 24},
        {"packing": True, "packing_strategy": "wrapped", "max_length": 24},
        {"max_length": None},
    ],
    ids=["bfd", "wrapped", "padded"],
)
def test_sft_trainer_as_with_eager(options: dict, tmp_path) -> None:
    """Wrapped documents lose their boundaries before any attention sees them."""
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
    breaks = list(counters["graph_break"])
    if trainer == "sft":  # newer versions write their fused loss in a way that breaks it
        assert all("`out=` tensor" in reason for reason in breaks), breaks
    else:
        assert not breaks and counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


def of_others(trainer: Trainer, *, changed: bool, **extra) -> tuple[float, list[torch.Tensor]]:
    """Loss and gradients of a packed batch but for its second document, changed or not."""
    batch = next(iter(trainer.get_train_dataloader())) | extra
    starts = batch.get("cu_seq_lens_q")
    if starts is None:
        starts = (batch["position_ids"][0] == 0).nonzero().flatten()
    second = slice(starts[1], starts[2])
    assert (batch["labels"][0, starts[1:3].long()] == -100).all()
    batch["labels"][:, second] = -100
    if changed:
        batch["input_ids"][:, second] = (batch["input_ids"][:, second] + 7) % 80
    model = trainer.model
    model.zero_grad()
    loss = trainer.compute_loss(model, batch)
    loss.backward()
    return loss.item(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


def moves(trainer: Trainer, **extra) -> bool:
    """Whether the loss or any gradient of other documents moves by a single bit."""
    (loss, gradients), (other_loss, other_gradients) = (
        of_others(trainer, changed=changed, **extra) for changed in (False, True)
    )
    assert any(gradient.any() for gradient in gradients)
    moved = [not torch.equal(a, b) for a, b in zip(gradients, other_gradients, strict=True)]
    return loss != other_loss or any(moved)


@pytest.mark.parametrize("packing", [True, False], ids=["packing", "padding-free"])
@pytest.mark.parametrize("adapters", [False, True], ids=["whole", "lora"])
def test_sft_trainer_keeps_documents_apart(packing: bool, adapters: bool, tmp_path) -> None:
    config = peft.LoraConfig(target_modules="all-linear", init_lora_weights=False)
    trainer = sft(
        build(FAMILIES["qwen3"], "flash_two"),
        tmp_path,
        config if adapters else None,
        packing=packing,
        padding_free=not packing,
        max_length=40 if packing else None,
    )
    assert not moves(trainer)


@pytest.mark.parametrize(
    ("options", "extra", "eager_is_right"),
    [
        ({}, {"use_cache": False}, True),
        ({}, {"use_cache": True}, False),
        ({}, {"attention_mask": torch.ones(1, sum(LENGTHS), dtype=torch.long)}, False),
        ({"return_flash_attn_kwargs": True, "return_position_ids": False}, {}, False),
    ],
    ids=["positions", "cache", "mask of ones", "boundaries alone"],
)
def test_documents_stay_apart_where_others_mix_them(options, extra, eager_is_right, tmp_path):
    collator = DataCollatorWithFlattening(**options)
    others = {"eager": eager_is_right, "sdpa": eager_is_right}
    for name, right in {"flash_two": True, "fa_two": True, **others}.items():
        model = build(LLAMA, name, use_cache=False)
        assert moves(plain(model, tmp_path, collator), **extra) is not right, name


def lora(model: PreTrainedModel, **options) -> peft.PeftModel:
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **options)
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("packing", [True, False], ids=["packing", "padding-free"])
def test_adapters(packing: bool, kernel_calls, tmp_path) -> None:
    expected = trained_alone(lora(build(LLAMA, "eager")))
    assert not kernel_calls
    options = dict(packing=packing, padding_free=not packing, max_length=40 if packing else None)
    assert_same(trained(sft(lora(build(LLAMA, "flash_two")), tmp_path, **options)), expected)
    assert len(kernel_calls) == STEPS * LLAMA.layers


def test_upcast_norms_over_a_bfloat16_base(monkeypatch, tmp_path) -> None:
    """As `prepare_model_for_kbit_training` leaves them: queries in float32, values in bfloat16.

    Rounding is judged by what it does to eager, both against float32.
    """

    def half(implementation: str) -> peft.PeftModel:
        model = build(FAMILIES["qwen3"], implementation, use_cache=False)
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.data = weight.data.bfloat16()
        return lora(model, init_lora_weights=False)

    arrived = set()
    attend = interface.flash_attention

    def noting(query, key, value, **rest):
        arrived.add((query.dtype, key.dtype, value.dtype))
        return attend(query, key, value, **rest)

    monkeypatch.setattr(interface, "flash_attention", noting)
    options = dict(packing=True, max_length=40)
    ours, eager = (
        trained(sft(half(name), tmp_path, bf16=True, **options)) for name in ("flash_two", "eager")
    )
    assert arrived == {(torch.float32, torch.float32, torch.bfloat16)}
    exact = half("eager").float()
    loss, movement = trained(sft(exact, tmp_path, **options))
    assert abs(ours[0] - loss) <= 2 * abs(eager[0] - loss) + 1e-3 * loss
    assert ours[1].keys() == movement.keys()
    off = [sum((run[name] - movement[name]).square().sum() for name in movement).sqrt()
           for run in (ours[1], eager[1])]  # fmt: skip
    assert 0 < off[0] <= 2 * off[1]


@pytest.fixture
def documented(monkeypatch, tmp_path) -> None:
    """What the snippets find: a model, and a text in paragraphs."""
    model = FAMILIES["qwen3"].build("eager", vocab_size=len(TOKENIZER))
    model.save_pretrained(tmp_path / "tiny")
    TOKENIZER.save_pretrained(tmp_path / "tiny")
    (tmp_path / "notes.txt").write_text("\n\n".join("abcdefg " * n for n in range(1, 9)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


SNIPPETS = snippets(ROOT / "docs" / "training.md")


@pytest.mark.parametrize("code", SNIPPETS)
def test_documentation(code: str, documented, kernel_calls) -> None:
    # Inductor would compile C++ for a minute.
    run(code.replace("torch_compile=True", "torch_compile=True, torch_compile_backend='eager'"))
    assert kernel_calls


def test_clipping_as_documented(documented) -> None:
    """Each head's scores follow its factor, whatever heads share its keys."""
    (code,) = (snippet.values[0] for snippet in SNIPPETS if "def clip(" in snippet.values[0])
    names = run(code)
    model, ids = names["model"], tokens(2, 21)
    layer = model.model.layers[0].self_attn
    layer.q_proj.weight.data[: layer.head_dim] *= 4  # of two heads that share keys, one is large

    def largest() -> dict[str, torch.Tensor]:
        with max_logits(model) as seen, torch.no_grad():
            model(ids)
        return seen

    before = largest()
    name, scores = next(iter(before.items()))
    names["LIMIT"] = scores.median().item()
    names["clip"](model, before)
    after = largest()[name]
    torch.testing.assert_close(after, scores.clamp(max=names["LIMIT"]))
    assert (after < scores).any() and (after == scores).any()


def test_left_padding_as_documented(documented, tmp_path) -> None:
    """The first token of a row is predicted from padding, of which each attention makes its own."""
    (code,) = (snippet.values[0] for snippet in SNIPPETS if '"runs/left"' in snippet.values[0])
    names = run(code)

    def with_each(collator) -> list[tuple]:
        models = [build(LLAMA, name) for name in ("flash_two", "sdpa", "eager")]
        return [trained(plain(model, tmp_path, collator)) for model in models]

    flash_two, sdpa, eager = with_each(names["collator"])
    assert_same(flash_two, sdpa)
    assert_same(flash_two, eager)
    flash_two, sdpa, eager = with_each(names["pad"])
    assert_same(flash_two, sdpa)
    with pytest.raises(AssertionError):
        assert_same((eager[0], flash_two[1]), eager, limit=0.1)
