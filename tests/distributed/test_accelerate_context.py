"""Accelerate's ``cp_size``, by itself, under Trainer and under TRL: equal to one process.

All checks run in one set of processes; a test for each reads how it went.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from accelerate import Accelerator, ParallelismConfig
from accelerate.state import AcceleratorState
from documentation import run as run_snippet
from documentation import snippets
from models import DECODERS, tokens
from packaging.version import Version
from ranks import assert_passed, launch, run
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.experimental import context_parallel
from transformers import DataCollatorWithFlattening, PreTrainedModel

from hf_flash_two import MaxLogitsCallback, max_logits
from hf_flash_two.hf import compat
from hf_flash_two.parallel import accelerate as seam

TESTS = Path(__file__).parents[1]
FAMILIES = {family.name: family for family in DECODERS}
# Up to 2.12 PyTorch takes only multiples of 2 W.
ANY_LENGTH = Version(torch.__version__) >= Version("2.13")
TRAINS = Version(accelerate.__version__) >= Version("1.12")  # as Transformers wants it
RANKS, STEPS, MICRO, RATE = 2, 3, 2, 0.1
# Lengths of documents; those of a row are packed.
ROWS = [(5, 20, 3), (17, 15), (30, 6), (9, 9, 10), (11, 13), (2, 38)]
SETTINGS = dict(
    max_steps=STEPS,
    learning_rate=RATE,
    optim="sgd",
    lr_scheduler_type="constant",
    max_grad_norm=0.5,
    gradient_accumulation_steps=MICRO,
    logging_steps=1,
    save_strategy="no",
    report_to="none",
    use_cpu=True,
    bf16=False,
    disable_tqdm=True,
    dataloader_pin_memory=False,
)


def build(family: str, implementation: str) -> PreTrainedModel:
    return FAMILIES[family].build(implementation, use_cache=False).train()


def start() -> Accelerator:
    AcceleratorState._reset_state()
    return Accelerator(cpu=True, parallelism_config=ParallelismConfig(cp_size=RANKS))


def shifted(labels: Tensor) -> Tensor:
    return F.pad(labels[:, 1:], (0, 1), value=-100)


def document(length: int, seed: int) -> dict[str, list[int]]:
    """Of different numbers of labels."""
    ids = tokens(1, length, seed=seed)[0].tolist()
    hidden = seed % min(length, 7)
    return {"input_ids": ids, "labels": [-100] * hidden + ids[hidden:]}


# A plain loop


def step_over_ranks(
    model: PreTrainedModel, accelerator: Accelerator, batch: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and the gradients of a model that is prepared; ``batch`` is cut."""
    prepared = accelerator.prepare(model)
    buffers = list(batch.values())
    with accelerator.maybe_context_parallel(
        buffers=buffers, buffer_seq_dims=[1] * len(buffers), no_restore_buffers=set(buffers)
    ):
        loss = prepared(**batch).loss
        accelerator.backward(loss)
    loss = accelerator.reduce(loss.detach(), "mean")
    return loss, {name: p.grad for name, p in model.named_parameters()}


def check_step(family: str, length: int, left: int = 0) -> None:
    flash, eager = (build(family, name) for name in ("flash_two", "eager"))
    ids = tokens(2, length)
    mask = torch.ones_like(ids)
    mask[0, :left] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, : left + 1] = -100
    whole: dict[str, Any] = dict(input_ids=ids, labels=labels, position_ids=positions(ids))
    if left:
        whole["attention_mask"] = mask
    want = eager(**whole).loss
    want.backward()
    batch = {name: x.clone() for name, x in whole.items()} | {"shift_labels": shifted(labels)}
    loss, grads = step_over_ranks(flash, start(), batch)
    assert batch["input_ids"].shape[1] == length // RANKS
    torch.testing.assert_close(loss, want.detach())
    for name, p in eager.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, atol=1e-5, rtol=1e-4)


def positions(ids: Tensor) -> Tensor:
    return torch.arange(ids.shape[1]).repeat(ids.shape[0], 1)


def check_plain_loop(mesh: DeviceMesh) -> None:
    """PyTorch lays out lengths that 2 W divides head to tail, others contiguously."""
    check_step("llama", 64)
    if ANY_LENGTH:
        check_step("llama", 62)


def check_window(mesh: DeviceMesh) -> None:
    """Newer versions of Accelerate refuse it of other attention."""
    check_step("mistral", 64)


def check_left_padding(mesh: DeviceMesh) -> None:
    check_step("llama", 64, left=23)


def check_other_attention_is_prepared_as_before(mesh: DeviceMesh) -> None:
    model = build("llama", "sdpa")
    prepared = start().prepare(model, torch.optim.SGD(model.parameters()))
    assert len(prepared) == 2
    assert all(layer.self_attn._forward_pre_hooks for layer in model.model.layers)
    flash = build("llama", "flash_two")
    start().prepare(flash)
    assert not any(layer.self_attn._forward_pre_hooks for layer in flash.model.layers)


def check_lost_masks_are_refused(mesh: DeviceMesh) -> None:
    """The model was prepared as one under sdpa."""
    model, accelerator = build("llama", "sdpa"), start()
    prepared = accelerator.prepare(model)
    model.set_attn_implementation("flash_two")
    ids = tokens(1, 32)
    with (
        accelerator.maybe_context_parallel(buffers=[ids], buffer_seq_dims=[1]),
        pytest.raises(ValueError, match="needs the mask that flash_two made of the whole"),
    ):
        prepared(ids)


def check_unknown_sharding_is_refused(mesh: DeviceMesh) -> None:
    model, accelerator = build("llama", "flash_two"), start()
    accelerator.prepare(model)
    odd, even = tokens(1, 33), tokens(1, 32)
    refusal = pytest.raises(NotImplementedError, match="does not know how it shards")
    if ANY_LENGTH:
        with (
            accelerator.maybe_context_parallel(buffers=[odd], buffer_seq_dims=[1]),
            refusal,
        ):
            model(even)
    mesh = accelerator.torch_device_mesh["cp"]
    with context_parallel(mesh, buffers=[even.clone()], buffer_seq_dims=[1]), refusal:
        model(even)
    # Without the seam.
    hooked = Accelerator._prepare_cp
    Accelerator._prepare_cp = hooked.__wrapped__
    try:
        accelerator = start()
        accelerator.prepare(model)
    finally:
        Accelerator._prepare_cp = hooked
    with (
        accelerator.maybe_context_parallel(buffers=[even], buffer_seq_dims=[1]),
        refusal,
    ):
        model(even)


# Trainers


class Recording:
    """A collator, and the batches that it has made."""

    def __init__(self, collate: Callable) -> None:
        self.collate, self.batches = collate, []

    def __call__(self, features: list) -> dict[str, Any]:
        batch = self.collate(features)
        self.batches.append({name: torch.as_tensor(x).clone() for name, x in batch.items()})
        return batch


def plain_loop(model: PreTrainedModel, batches: list[dict[str, Tensor]]) -> list[dict[str, float]]:
    """What `Trainer` does with `SETTINGS`, in one process."""
    optimizer, logs = torch.optim.SGD(model.parameters(), RATE), []
    for at in range(0, STEPS * MICRO, MICRO):
        parts, loss = batches[at : at + MICRO], 0.0
        count = sum((part["labels"][:, 1:] != -100).sum() for part in parts)
        for part in parts:
            told = ("input_ids", "position_ids", "attention_mask")
            logits = model(**{name: part[name] for name in told if name in part}).logits
            targets = shifted(part["labels"]).flatten()
            share = F.cross_entropy(logits.flatten(0, 1), targets, reduction="sum") / count
            share.backward()
            loss += share.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), SETTINGS["max_grad_norm"])
        optimizer.step()
        optimizer.zero_grad()
        logs.append({"loss": loss, "grad_norm": norm.item()})
    return logs


def check_training(family: str, collate: Callable, rows: list, size: int = 2) -> None:
    model, collator = build(family, "flash_two"), Recording(collate)
    with tempfile.TemporaryDirectory() as folder:
        args = transformers.TrainingArguments(
            folder, per_device_train_batch_size=size, **SETTINGS, **cp()
        )
        trainer = transformers.Trainer(model, args, train_dataset=rows, data_collator=collator)
        trainer.train()
    # DDP hides the config, FSDP does not.
    trainer._prepare_context_parallel_inputs(model, dict(collator.batches[0]))
    assert model.config._attn_implementation == "flash_two"
    check_as_trained(trainer, model, family, collator.batches)


def cp() -> dict[str, ParallelismConfig]:
    return {"parallelism_config": ParallelismConfig(cp_size=RANKS)}


def check_as_trained(trainer, model, family: str, batches: list[dict[str, Tensor]]) -> None:
    alone = build(family, "eager")
    wanted = plain_loop(alone, batches)
    logs = [log for log in trainer.state.log_history if "grad_norm" in log]
    assert len(logs) == STEPS
    for log, want in zip(logs, wanted, strict=True):
        for name, value in want.items():
            assert log[name] == pytest.approx(value, rel=1e-4)
    for got, want in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def padded(features: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """On the left, to a multiple of 2 W."""
    length = max(len(x["input_ids"]) for x in features)
    length += -length % (2 * RANKS)
    batch: dict[str, list] = {"input_ids": [], "labels": [], "attention_mask": []}
    for feature in features:
        missing = length - len(feature["input_ids"])
        batch["input_ids"].append([0] * missing + feature["input_ids"])
        batch["labels"].append([-100] * missing + [-100] + feature["labels"][1:])
        batch["attention_mask"].append([0] * missing + [1] * (length - missing))
    return {name: torch.tensor(x) for name, x in batch.items()}


def flattened(**options) -> Callable:
    collate = DataCollatorWithFlattening(return_tensors="pt", **options)

    def flatten(features: list[dict[str, list[int]]]) -> dict[str, Any]:
        """One more document makes the length a multiple of W."""
        missing = -sum(len(x["input_ids"]) for x in features) % RANKS
        more = [{"input_ids": [1] * missing, "labels": [-100] * missing}] if missing else []
        return dict(collate([*features, *more]))

    return flatten


DOCUMENTS = [document(length, at) for at, length in enumerate(sum(ROWS, ()))]


def check_trainer(mesh: DeviceMesh) -> None:
    """Labels differ in number from rank to rank, and rows are padded on the left."""
    check_training("llama", padded, DOCUMENTS)


def check_trainer_with_a_window(mesh: DeviceMesh) -> None:
    check_training("mistral", padded, DOCUMENTS)


def check_trainer_with_packed_positions(mesh: DeviceMesh) -> None:
    check_training("llama", flattened(), DOCUMENTS)
    check_training("mistral", flattened(), DOCUMENTS)


def check_trainer_with_packed_boundaries(mesh: DeviceMesh) -> None:
    check_training("llama", flattened(return_flash_attn_kwargs=True), DOCUMENTS)


def check_trainer_logs_the_largest_scores(mesh: DeviceMesh) -> None:
    """Of whole rows that both ranks share, and over the rows of each without ``cp_size``."""
    for options in (cp(), {}):
        model, collator = build("llama", "flash_two"), Recording(padded)
        with tempfile.TemporaryDirectory() as folder:
            args = transformers.TrainingArguments(
                folder,
                per_device_train_batch_size=1,
                **SETTINGS | {"learning_rate": 0.0},
                **options,
            )
            trainer = transformers.Trainer(
                model, args, train_dataset=DOCUMENTS, data_collator=collator
            )
            trainer.add_callback(MaxLogitsCallback(trainer))
            trainer.train()
        logs = [log for log in trainer.state.log_history if "loss" in log]
        wanted = []
        for at in range(STEPS):
            with max_logits(model) as seen, torch.no_grad():
                for batch in collator.batches[at * MICRO : (at + 1) * MICRO]:
                    model(batch["input_ids"], attention_mask=batch["attention_mask"])
            for largest in seen.values():
                dist.all_reduce(largest, dist.ReduceOp.MAX)
            wanted.append({f"max_logits/{name}": x.max().item() for name, x in seen.items()})
        for log, want in zip(logs, wanted, strict=True):
            want["max_logits"] = max(want.values())
            assert {name: log[name] for name in want} == pytest.approx(want, rel=1e-5)


def check_trl(mesh: DeviceMesh) -> None:
    """Rows that are packed before: newer versions of TRL refuse to pack themselves."""
    import datasets
    import trl

    tokenizer = transformers.ByT5Tokenizer()
    texts = datasets.Dataset.from_list([{"input_ids": x["input_ids"]} for x in DOCUMENTS])
    packed = trl.pack_dataset(texts, 40, strategy="bfd")
    assert max(map(len, packed["seq_lengths"])) > 1
    sizes = dict(vocab_size=len(tokenizer), use_cache=False)
    model, alone = (FAMILIES["llama"].build(x, **sizes).train() for x in ("flash_two", "eager"))
    with tempfile.TemporaryDirectory() as folder:
        args = trl.SFTConfig(
            folder, padding_free=True, max_length=None, pad_to_multiple_of=RANKS,
            per_device_train_batch_size=1, gradient_checkpointing=False, **SETTINGS, **cp(),
        )  # fmt: skip
        trainer = trl.SFTTrainer(model, args, train_dataset=packed, processing_class=tokenizer)
        collator = trainer.data_collator = Recording(trainer.data_collator)
        trainer.train()
        wanted = plain_loop(alone, collator.batches)
    logs = [log for log in trainer.state.log_history if "grad_norm" in log]
    for log, want in zip(logs, wanted, strict=True):
        for name, value in want.items():
            assert log[name] == pytest.approx(value, rel=1e-4)


ON_CPU = {
    '"cuda"': '"cpu"',
    "Accelerator(": "Accelerator(cpu=True, ",
    "max_steps=2": "max_steps=2, use_cpu=True, dataloader_pin_memory=False",
}


def check_documentation(mesh: DeviceMesh) -> None:
    """Its snippets run as they stand, with a tiny model."""
    tokenizer = transformers.ByT5Tokenizer()
    with contextlib.chdir(sys.argv[1]):
        # The first rank alone writes.
        FAMILIES["llama"].build("eager", vocab_size=len(tokenizer)).save_pretrained("tiny")
        tokenizer.save_pretrained("tiny")
        dist.barrier()
        for param in snippets(TESTS.parent / "docs" / "parallel.md"):
            (code,) = param.values
            for given, here in ON_CPU.items():
                code = code.replace(given, here)
            AcceleratorState._reset_state()
            run_snippet(code)


CHECKS = [
    check_plain_loop,
    check_window,
    check_left_padding,
    check_other_attention_is_prepared_as_before,
    check_lost_masks_are_refused,
    check_unknown_sharding_is_refused,
]
if TRAINS:
    CHECKS += [
        check_trainer,
        check_trainer_with_a_window,
        check_trainer_with_packed_positions,
        check_trainer_with_packed_boundaries,
        check_trainer_logs_the_largest_scores,
    ]
    if importlib.util.find_spec("trl"):
        CHECKS += [check_trl, check_documentation]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str | None]]:
    results = tmp_path_factory.mktemp("accelerate")
    return launch(__file__, RANKS, results, ACCELERATE_ALLOW_CP_STANDALONE="true")


@pytest.mark.parametrize("name", [check.__name__ for check in CHECKS])
def test_processes(outcomes: list[dict[str, str | None]], name: str) -> None:
    assert_passed(outcomes, name)


@pytest.mark.parametrize("prepare", [None, lambda self, model: model], ids=["missing", "changed"])
def test_a_private_name_that_changed_is_left_alone(monkeypatch, prepare) -> None:
    """Models under flash_two are then refused, as without the seam."""
    if prepare is None:
        monkeypatch.delattr(accelerate.Accelerator, "_prepare_cp")
    else:
        monkeypatch.setattr(accelerate.Accelerator, "_prepare_cp", prepare)
    seam.register(lambda module: True)
    assert getattr(accelerate.Accelerator, "_prepare_cp", None) is prepare


def test_a_trainer_that_changed_is_left_alone(monkeypatch) -> None:
    """It refuses our names itself."""

    def changed(self, inputs): ...

    name = "_prepare_context_parallel_inputs"
    monkeypatch.setattr(transformers.Trainer, name, changed)
    compat.hook_trainer()
    assert getattr(transformers.Trainer, name) is changed


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    # It knows accelerators alone, and their FSDP.
    ParallelismConfig._validate_accelerator = lambda self, accelerator: None
    run(CHECKS, Path(sys.argv[1]))
