"""Models whose weights lie elsewhere until they are needed, or that several GPUs share."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import accelerate
import pytest
import torch
from checks import assert_close, backward
from hand_written_models import FAMILIES, floats
from helpers import assert_same_gradients, gradients_of
from models import DECODERS, ENCODERS, SEQUENCE_MODELS, encoder_inputs, supported, tokens
from packed_rows import boundaries
from test_layer_forward import replica
from test_packed import LENGTH, LENGTHS, alone
from test_patching import build
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_flash_two import patch
from hf_flash_two.hf.families import attention_kind

KNOWN = {family.name: family for family in [*DECODERS, *SEQUENCE_MODELS, *ENCODERS, *FAMILIES]}
NAMES = ["llama", "gpt-oss", "t5", "clip", "bloom", "gptj"]


def model_of(name: str) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """One under its own attention, and inputs with padding."""
    if name == "gptj":
        return build(name), encoder_inputs()
    family = KNOWN[name]
    supported(family)
    model = family.build("eager") if hasattr(family, "pair") else family.build()
    return model, family.inputs() if family.inputs else encoder_inputs()


def visible(outputs, given: dict[str, Tensor]) -> list[Tensor]:
    """What a model returns for tokens that are no padding."""
    mask = given.get("decoder_attention_mask", given.get("attention_mask"))
    return [x[mask.bool()] if x.shape[:2] == mask.shape else x for x in floats(outputs)]


def on_cpu(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    return accelerate.cpu_offload(model, execution_device="cpu")


def on_disk(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    accelerate.disk_offload(model, str(folder), execution_device="cpu")
    return model


def loaded_in_part(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """What there is no room for comes from the disk each time."""
    model.save_pretrained(folder / "saved")
    size = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    return type(model).from_pretrained(
        folder / "saved",
        attn_implementation="flash_two",
        device_map="auto",
        max_memory={"cpu": size * 2 // 3},
        offload_folder=folder / "offloaded",
    )


@pytest.mark.parametrize("place", [on_cpu, on_disk, loaded_in_part])
@pytest.mark.parametrize("name", NAMES)
def test_offloaded_weights(name: str, place: Callable, tmp_path: Path, kernel_calls) -> None:
    model, given = model_of(name)
    with torch.no_grad():
        wanted = visible(model(**given), given)
        patch(model)
        model = place(model, tmp_path).eval()
        assert any(weight.is_meta for weight in model.parameters())
        kernel_calls.clear()
        found = visible(model(**given), given)
    assert kernel_calls and len(found) == len(wanted)
    for got, want in zip(found, wanted, strict=True):
        assert_close(got, want)


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_offloaded_models_keep_documents_apart(name: str) -> None:
    model, _ = model_of(name)
    ids = tokens(1, LENGTH)
    with torch.no_grad():
        expected = alone(model, ids)
        patch(model)
        on_cpu(model, Path())
        assert_close(model(ids, **boundaries(*LENGTHS)).logits, expected)


class OneTensor(nn.Module):
    """What a model computes for tokens that are no padding, or for whole inputs, in one tensor."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, **given: Tensor) -> Tensor:
        outputs = self.model(**given, **({} if "pixel_values" in given else {"use_cache": False}))
        if "logits" not in outputs:
            return outputs.text_embeds + outputs.image_embeds
        mask = given.get("decoder_attention_mask", given.get("attention_mask"))
        return outputs.logits * mask[..., None]


def run_in_threads(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    """As `nn.DataParallel` runs its replicas: a row of the batch each, all inside at once."""
    rows = given["attention_mask"].shape[0]
    meet, found = threading.Barrier(rows, timeout=60), {}

    def wait(*_) -> None:
        meet.wait()

    for module in model.modules():
        if attention_kind(type(module)) is not None:
            module.register_forward_pre_hook(wait)

    def run(row: int, copied: nn.Module) -> None:
        found[row] = copied(**{name: x[row, None] for name, x in given.items()})

    copies = [replica(model, 1.0, trains=True) for _ in range(rows)]
    threads = [threading.Thread(target=run, args=each) for each in enumerate(copies)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return torch.cat([found[row] for row in range(rows)])


def _drop_zeros(parameter: nn.Parameter) -> None:
    assert parameter.grad is not None
    if not parameter.grad.any():
        parameter.grad = None


def run_on_gpus(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    shared = nn.DataParallel(model.cuda())
    # Replicas give parameters that no output depends on a gradient of 0.
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(_drop_zeros)
    return shared(**{name: x.cuda() for name, x in given.items()}).cpu()


needs_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.mark.parametrize("run", [run_in_threads, pytest.param(run_on_gpus, marks=needs_gpus)])
@pytest.mark.parametrize("name", ["t5", "clip", "bloom", "gptj"])
def test_replicas_train_as_one_model(name: str, run: Callable, kernel_calls) -> None:
    """Hand-written attention and the interface, a decoder with its encoder, two towers."""
    model, given = model_of(name)
    whole = OneTensor(model)
    expected = whole(**given)
    backward(expected)
    gradients = {name: grad.cpu() for name, grad in gradients_of(whole).items()}
    whole.zero_grad()
    patch(model)
    found = run(whole, given)
    assert_close(found, expected, 1e-4)
    backward(found)
    assert kernel_calls
    assert_same_gradients(whole.cpu(), gradients, 1e-3)
