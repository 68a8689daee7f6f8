"""The largest attention scores in the logs of Transformers' trainers."""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from hf_flash_two.hf.max_logits import max_logits

if TYPE_CHECKING:
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments


class MaxLogitsCallback(TrainerCallback):
    """Logs the largest attention score of each layer beside the loss: see `max_logits`.

    ``trainer.add_callback(MaxLogitsCallback(trainer))``. Logs get ``max_logits/NAME`` for the layer
    of that name, and ``max_logits`` for the whole model: over all forwards of training since the
    last log, and over all processes. Nothing is computed twice; once a log, a number for each
    module of the model is sent between processes. All of them need the callback.

    Args:
        trainer: the one that it is added to. It goes before the callbacks that report logs.

    Raises:
        NotImplementedError: when training begins: several GPUs in one process (`nn.DataParallel`),
            or what `max_logits` refuses.
        ValueError: when training begins: no part of the model uses flash_two.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer, self._recording = trainer, ExitStack()
        self._names: list[str] = []
        self._seen: dict[str, Tensor] = {}
        self._of_training: dict[str, Tensor] = {}

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **_,
    ) -> None:
        if args.n_gpu > 1:
            raise NotImplementedError(
                "max_logits: nn.DataParallel runs copies of the model at the same time; start "
                "training with torchrun or accelerate launch"
            )
        assert model is not None
        callbacks = self._trainer.callback_handler.callbacks
        callbacks.remove(self)
        callbacks.insert(0, self)
        self._seen = self._recording.enter_context(max_logits(model))
        self._names, self._of_training = [name for name, _ in model.named_modules()], {}

    def on_step_begin(self, *_, **__) -> None:
        # Without what evaluation has added since the last step.
        self._seen.clear()
        self._seen.update(self._of_training)

    def on_step_end(self, *_, **__) -> None:
        self._of_training = dict(self._seen)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_,
    ) -> None:
        if logs is None or "loss" not in logs:
            return
        # A layer need not have run on each process.
        largest = torch.full((len(self._names) + 1,), -math.inf, device=args.device)
        for at, name in enumerate(self._names):
            if name in self._of_training:
                largest[at] = self._of_training[name].amax()
        largest[-1] = largest.amax()
        of_ranks: Any = self._trainer.accelerator.gather(largest[None])
        *each, of_all = of_ranks.amax(0).tolist()
        found = {"max_logits": of_all}
        found |= {f"max_logits/{name}": x for name, x in zip(self._names, each, strict=True)}
        found = {name: x for name, x in found.items() if x != -math.inf}
        logs.update(found)
        state.log_history[-1].update(found)
        self._of_training = {}

    def on_train_end(self, *_, **__) -> None:
        self._recording.close()
