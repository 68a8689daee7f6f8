"""What `MaxLogitsCallback` writes into the logs of a trainer."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from models import DECODERS, tokens
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_flash_two import MaxLogitsCallback, max_logits
from hf_flash_two.hf.max_logits import records_of

LLAMA = next(family for family in DECODERS if family.name == "llama")
LENGTH = 9
ROWS, LONGER = ([{"input_ids": x, "labels": x} for x in tokens(12, n)] for n in (LENGTH, 40))
SETTINGS = dict(
    per_device_train_batch_size=2,
    gradient_accumulation_steps=2,
    num_train_epochs=2,
    learning_rate=0.0,
    save_strategy="no",
    report_to="none",
    use_cpu=True,
    disable_tqdm=True,
    dataloader_pin_memory=False,
)


class Reporter(TrainerCallback):
    """Takes what it is given to report."""

    def __init__(self) -> None:
        self.logs: list[dict] = []

    def on_log(self, args, state, control, logs=None, **_) -> None:
        self.logs.append(dict(logs))


def build(folder, *callbacks: TrainerCallback, **options) -> tuple[Trainer, list[Tensor]]:
    """A trainer whose logs get the largest scores, and the batches that it trains with."""
    batches: list[Tensor] = []

    def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        ids = torch.stack([row["input_ids"] for row in rows])
        if ids.shape[1] == LENGTH:
            batches.append(ids)
        return {"input_ids": ids, "labels": ids}

    trainer = Trainer(
        LLAMA.build("flash_two"), TrainingArguments(str(folder), **SETTINGS | options),
        train_dataset=ROWS, eval_dataset=LONGER, data_collator=collate, callbacks=[*callbacks],
    )  # fmt: skip
    trainer.add_callback(MaxLogitsCallback(trainer))
    return trainer, batches


def largest(model: nn.Module, batches: Iterable[Tensor]) -> dict[str, float]:
    with max_logits(model) as seen, torch.no_grad():
        for ids in batches:
            model(ids)
    found = {f"max_logits/{name}": x.max().item() for name, x in seen.items()}
    return found | {"max_logits": max(found.values())}


@pytest.mark.parametrize(
    "options", [{"logging_steps": 1}, {"logging_steps": 2, "eval_strategy": "steps"}], ids=str
)
def test_logs_hold_the_largest_since_the_last_log(tmp_path, options: dict) -> None:
    """Over all batches of training, for whoever reports; the model stays as it was."""
    trainer, batches = build(tmp_path, reporter := Reporter(), eval_steps=1, **options)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    reported = [log for log in reporter.logs if "loss" in log]
    assert len(batches) == 12 and len(logs) == len(reported) == 6 // options["logging_steps"]
    share = len(batches) // len(logs)
    for at, (log, same) in enumerate(zip(logs, reported, strict=True)):
        want = largest(trainer.model, batches[at * share : (at + 1) * share])
        got = {name: x for name, x in log.items() if name.startswith("max_logits")}
        assert len(want) == 3 and got == pytest.approx(want)
        assert same.items() >= got.items()
    in_evaluation = largest(trainer.model, (row["input_ids"][None] for row in LONGER))
    assert in_evaluation["max_logits"] > max(log["max_logits"] for log in logs)
    others = [log for log in trainer.state.log_history if "loss" not in log]
    assert others and not any("max_logits" in log for log in others)
    assert not any(records_of(module) for module in trainer.model.modules())


def test_training_that_was_cut_short_goes_on(tmp_path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, *_, **__):
            raise KeyboardInterrupt

    trainer, batches = build(tmp_path, Stop(), logging_steps=6)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(Stop)
    batches.clear()
    trainer.train()
    assert trainer.state.log_history[0].items() >= largest(trainer.model, batches).items()
    assert not any(records_of(module) for module in trainer.model.modules())


def test_copies_that_run_at_the_same_time_are_refused(tmp_path) -> None:
    trainer, _ = build(tmp_path)
    trainer.args._n_gpu = 2
    with pytest.raises(NotImplementedError, match="max_logits: nn.DataParallel runs copies"):
        MaxLogitsCallback(trainer).on_train_begin(trainer.args, trainer.state, trainer.control)
