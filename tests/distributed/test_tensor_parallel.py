"""Two processes that share the heads of a model compute what one computes, or refuse by name."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from checks import assert_close
from hand_written_models import FAMILIES
from helpers import assert_same_gradients
from models import DECODERS, SEQUENCE_MODELS, Family, right_padded, sequence_inputs, text, tokens
from packaging.version import Version
from ranks import assert_passed, launch, run
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.experimental import implicit_replication
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from transformers import PreTrainedModel
from transformers.distributed import DistributedConfig
from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES

from hf_flash_two import max_logits

WORLD = 2
LENGTH = 20
FAMILY = {family.name: family for family in [*DECODERS, *SEQUENCE_MODELS]}
EIGHT = {"num_attention_heads": 8, "num_key_value_heads": 4}
LLAMA = Family("llama", "LlamaForCausalLM", lambda: text("LlamaConfig", **EIGHT))
LAYER = "model.layers.*."
ATTENTION = LAYER + "self_attn"
QUERIES, KEYS = [ATTENTION + ".q_proj"], [ATTENTION + ".k_proj", ATTENTION + ".v_proj"]
OUT = ATTENTION + ".o_proj"
HEADS = {**dict.fromkeys(QUERIES + KEYS, "colwise"), OUT: "rowwise"}


def inputs() -> dict[str, Tensor]:
    return {"input_ids": tokens(2, LENGTH), "attention_mask": right_padded(2, LENGTH, 4)}


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def step(model: PreTrainedModel) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and the gradients of the loss by name of parameter."""
    given = inputs()
    logits = whole(model(**given, use_cache=False).logits)
    F.cross_entropy(logits[:, :-1].flatten(0, 1), given["input_ids"][:, 1:].flatten()).backward()
    gradients = {
        name.replace("._bias", ".bias"): whole(parameter.grad)
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return logits.detach(), gradients


def check(
    model: PreTrainedModel,
    alone: PreTrainedModel,
    around: Callable[[], AbstractContextManager] = nullcontext,
) -> None:
    """One training step of ``model``, which both processes share, is that of ``alone``."""
    logits, expected = step(alone)
    with around():
        found, gradients = step(model)
    assert_close(found, logits)
    for name, gradient in gradients.items():
        # Older versions of Transformers hold plain tensors, which are shards.
        for dim, size in enumerate(gradient.shape):
            if size < expected[name].shape[dim]:
                expected[name] = expected[name].chunk(WORLD, dim)[dist.get_rank()]
    assert_same_gradients(gradients, expected)


# Plans of Transformers


def load(alone: PreTrainedModel, plan: dict[str, str] | str = "auto") -> PreTrainedModel:
    """``alone`` under flash_two, spread over the processes."""
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)
    if dist.get_rank() == 0:
        alone.save_pretrained(folder[0])
    dist.barrier()
    how = {"tp_plan": plan}
    if "tp_plan" in {field.name for field in fields(DistributedConfig)}:
        how = {"distributed_config": DistributedConfig(tp_plan=plan, tp_size=WORLD)}
    loaded = type(alone).from_pretrained(folder[0], attn_implementation="flash_two", **how)
    return loaded.eval()


def check_plan(family: Family, plan: dict[str, str] | str = "auto", **changes: int) -> None:
    alone = family.build("eager", **changes)
    check(load(alone, plan), alone)


def grouped_heads(mesh: DeviceMesh) -> None:
    check_plan(LLAMA)


def window(mesh: DeviceMesh) -> None:
    check_plan(FAMILY["mistral"], **EIGHT)


def softcap(mesh: DeviceMesh) -> None:
    check_plan(FAMILY["gemma2"], **EIGHT)


def norms_of_heads(mesh: DeviceMesh) -> None:
    check_plan(FAMILY["qwen3"], **EIGHT)


def latent_keys(mesh: DeviceMesh) -> None:
    check_plan(FAMILY["deepseek-v3"], first_k_dense_replace=2)


def plan_that_leaves_attention_whole(mesh: DeviceMesh) -> None:
    check_plan(FAMILY["gpt-oss"])


def sinks(mesh: DeviceMesh) -> None:
    plan = HEADS | {ATTENTION + ".sinks": "colwise"}
    if "local_params" in ALL_PARALLEL_STYLES:
        plan[ATTENTION] = "local_params"
    check_plan(FAMILY["gpt-oss"], plan)


def hand_written(mesh: DeviceMesh) -> None:
    """BLOOM has no plan of its own, and its attention fits none: the rest is split."""
    alone = next(family for family in FAMILIES if family.name == "bloom").build()
    mlp = "transformer.h.*.mlp."
    check(load(alone, {mlp + "dense_h_to_4h": "colwise", mlp + "dense_4h_to_h": "rowwise"}), alone)


def largest_scores(mesh: DeviceMesh) -> None:
    """Of a rank's own heads; where these are DTensors, of all."""
    alone = LLAMA.build("flash_two")
    with max_logits(alone) as want:
        alone(**inputs(), use_cache=False)
    with max_logits(model := load(alone)) as got:
        model(**inputs(), use_cache=False)
    own = {name: x.chunk(WORLD)[mesh.get_local_rank()] for name, x in want.items()}
    torch.testing.assert_close(got, own)
    split = {name: ColwiseParallel(use_local_output=False) for name in QUERIES + KEYS}
    model = parallelize_module(alone, mesh, split | {OUT: RowwiseParallel()})
    with implicit_replication(), max_logits(model) as got:
        model(**inputs(), use_cache=False)
    torch.testing.assert_close({name: x.full_tensor() for name, x in got.items()}, want)


def generation(mesh: DeviceMesh) -> None:
    alone = LLAMA.build("eager")
    asked = {"inputs": tokens(2, 9), "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(load(alone).generate(**asked), alone.generate(**asked))


def refuse(family: Family, plan: dict[str, str], match: str) -> None:
    model = load(family.build("eager"), plan)
    given = sequence_inputs() if family.name == "t5" else inputs()
    with pytest.raises(ValueError, match=match):
        model(**given)


def whole_keys_are_refused(mesh: DeviceMesh) -> None:
    """Four of eight queries would find as many keys to share as all eight."""
    plan = HEADS | dict.fromkeys(KEYS, "colwise_gather_output")
    refuse(LLAMA, plan, "key: got 4 heads, each for 2 of the query's, and a query of 4")


def whole_sinks_are_refused(mesh: DeviceMesh) -> None:
    refuse(FAMILY["gpt-oss"], HEADS, "s_aux: got 4 heads, and a query of 2")


def whole_position_bias_is_refused(mesh: DeviceMesh) -> None:
    layer = "{}.block.*.layer.*.{}.{}"
    layers = [("encoder", "SelfAttention"), ("decoder", "SelfAttention")]
    layers.append(("decoder", "EncDecAttention"))
    plan = {
        layer.format(*at, name): "rowwise" if name == "o" else "colwise"
        for at in layers
        for name in "qkvo"
    }
    refuse(FAMILY["t5"], plan, "position_bias: got 4 heads, and a query of 2")


# Plans of PyTorch


def check_styles(
    mesh: DeviceMesh,
    styles: dict[str, ParallelStyle],
    around: Callable[[], AbstractContextManager] = nullcontext,
) -> None:
    model, alone = LLAMA.pair("flash_two")
    check(parallelize_module(model, mesh, styles), alone, around)


def sequence_styles(local: bool) -> dict[str, ParallelStyle]:
    """Whatever stands between attention and MLP has its own part of each sequence.

    Args:
        local: whether the model sees that part as a plain tensor.
    """
    split = {"output_layouts": Shard(1), "use_local_output": local}
    gather = {"hidden_states": Shard(1)}, {"hidden_states": Replicate()}
    norms = ("model.norm", LAYER + "input_layernorm", LAYER + "post_attention_layernorm")
    return {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate(), **split),
        **{name: SequenceParallel() for name in norms},
        ATTENTION: PrepareModuleInput(
            input_kwarg_layouts=gather[0], desired_input_kwarg_layouts=gather[1]
        ),
        **{name: ColwiseParallel() for name in QUERIES + KEYS},
        OUT: RowwiseParallel(**split),
        LAYER + "mlp": PrepareModuleInput(
            input_layouts=Shard(1), desired_input_layouts=Replicate()
        ),
        LAYER + "mlp.gate_proj": ColwiseParallel(),
        LAYER + "mlp.up_proj": ColwiseParallel(),
        LAYER + "mlp.down_proj": RowwiseParallel(**split),
        "lm_head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }


def heads_as_dtensors(mesh: DeviceMesh) -> None:
    split = {name: ColwiseParallel(use_local_output=False) for name in QUERIES + KEYS}
    check_styles(mesh, split | {OUT: RowwiseParallel()}, implicit_replication)


def tokens_as_dtensors(mesh: DeviceMesh) -> None:
    """Their sequences are gathered."""
    parts = ColwiseParallel(output_layouts=Shard(1), use_local_output=False)
    out = ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate())
    styles = {**dict.fromkeys(QUERIES + KEYS, parts), OUT: out}
    check_styles(mesh, styles, implicit_replication)


def sequence_parallel(mesh: DeviceMesh) -> None:
    check_styles(mesh, sequence_styles(local=False))


def mask_of_a_part_is_refused(mesh: DeviceMesh) -> None:
    model = LLAMA.build("flash_two")
    parallelize_module(model, mesh, sequence_styles(local=True))
    at = torch.arange(LENGTH)[None]
    match = r"made for \[10, 10\] queries and keys, but the layer attends with 20 to 20; under seq"
    with pytest.raises(ValueError, match=match):
        model(tokens(2, LENGTH), position_ids=at)


CHECKS = [
    grouped_heads,
    window,
    softcap,
    norms_of_heads,
    latent_keys,
    plan_that_leaves_attention_whole,
    sinks,
    hand_written,
    largest_scores,
    generation,
    whole_keys_are_refused,
    whole_sinks_are_refused,
    heads_as_dtensors,
    tokens_as_dtensors,
    sequence_parallel,
    mask_of_a_part_is_refused,
]
if Version(transformers.__version__) >= Version(FAMILY["t5"].since):
    CHECKS.append(whole_position_bias_is_refused)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str | None]]:
    return launch(__file__, WORLD, tmp_path_factory.mktemp("tensor_parallel"))


@pytest.mark.parametrize("name", [check.__name__ for check in CHECKS])
def test_two_processes(outcomes: list[dict[str, str | None]], name: str) -> None:
    assert_passed(outcomes, name)


if __name__ == "__main__":
    run(CHECKS, Path(sys.argv[1]))
