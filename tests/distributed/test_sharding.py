"""Two processes on one CPU compute what one computes: DTensor, DDP and FSDP."""

from __future__ import annotations

import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import assert_passed, launch, run
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.experimental import implicit_replication
from torch.nn.parallel import DistributedDataParallel

from hf_flash_two import AttentionMask, flash_attention

WORLD = 2


def check_split(
    mesh: DeviceMesh,
    split: tuple[Shard | Replicate, Shard | Replicate],
    *,
    key_heads: int = 2,
    batch: int = 4,
    stays: bool = True,
    need_d_bias: bool = True,
    sinks_shape: tuple[int, ...] = (4,),
    bias_shape: tuple[int, ...] = (1, 4, 1, 70),
    **arguments,
) -> None:
    """Results and gradients equal those of plain tensors; a split that suits needs no message.

    Args:
        split: placement of the query and of key and value.
        stays: the output keeps the query's placement.
    """
    torch.manual_seed(0)
    plain = [
        torch.randn(batch, 4, 33, 8),
        torch.randn(batch, key_heads, 70, 8),
        torch.randn(batch, key_heads, 70, 8),
        torch.randn(bias_shape),
        torch.randn(sinks_shape),
    ]
    keep = torch.rand(batch, 70) > 0.3
    mask = AttentionMask.causal() & AttentionMask.from_padding(keep)
    weight = torch.randn(batch, 4, 33, 8)

    def run(query, key, value, bias, sinks, weight):
        tensors = [query, key, value, *([bias] if need_d_bias else []), sinks]
        bias = bias if need_d_bias else bias.detach()
        out, lse, largest = flash_attention(
            query, key, value, mask=mask, bias=bias, sinks=sinks, return_lse=True,
            return_max_logits=True, **arguments,
        )  # fmt: skip
        # The loss on each shard is a part of the whole: no message belongs to it.
        return (
            out,
            largest,
            torch.autograd.grad((out, lse), tensors, (weight, torch.ones_like(lse))),
        )

    leaves = [tensor.clone().requires_grad_() for tensor in plain]
    want_out, want_largest, want = run(*leaves, weight)
    placements = (split[0], split[1], split[1], Replicate(), Replicate())
    sharded = [
        distribute_tensor(tensor, mesh, [placement]).requires_grad_()
        for tensor, placement in zip(plain, placements, strict=True)
    ]
    weight = distribute_tensor(weight, mesh, [split[0]])
    with implicit_replication(), CommDebugMode() as messages:
        out, largest, got = run(*sharded, weight)
    if stays:
        assert out.placements == (split[0],), out.placements
        assert messages.get_total_counts() == 0, messages.get_comm_counts()
    torch.testing.assert_close(out.full_tensor(), want_out)
    torch.testing.assert_close(largest.full_tensor(), want_largest)
    for have, expected in zip(got, want, strict=True):
        assert have.shape == expected.shape
        torch.testing.assert_close(have.full_tensor(), expected, rtol=1e-4, atol=1e-5)


def dtensor_whole(mesh: DeviceMesh) -> None:
    check_split(mesh, (Replicate(), Replicate()))


def dtensor_batch(mesh: DeviceMesh) -> None:
    check_split(mesh, (Shard(0), Shard(0)))


def dtensor_uneven_batch(mesh: DeviceMesh) -> None:
    check_split(mesh, (Shard(0), Shard(0)), batch=3)


def dtensor_heads(mesh: DeviceMesh) -> None:
    """Two key heads for four query heads: each process keeps one group."""
    check_split(mesh, (Shard(1), Shard(1)))


def dtensor_heads_all_different(mesh: DeviceMesh) -> None:
    check_split(mesh, (Shard(1), Shard(1)), key_heads=4)


def dtensor_one_key_head(mesh: DeviceMesh) -> None:
    """Multi-query: the query heads are split, the key head is whole."""
    check_split(mesh, (Shard(1), Replicate()), key_heads=1)


def dtensor_bias_without_gradient(mesh: DeviceMesh) -> None:
    """Before and after the same call with one: the decisions are cached."""
    for need in (False, True, False):
        check_split(mesh, (Shard(0), Shard(0)), need_d_bias=need)


def dtensor_per_batch_bias_and_sinks(mesh: DeviceMesh) -> None:
    for split in ((Shard(0), Shard(0)), (Shard(1), Shard(1))):
        check_split(
            mesh, split, bias_shape=(4, 1, 33, 70), sinks_shape=(4, 4), stays=False
        )  # fmt: skip


def dtensor_sequence_is_gathered(mesh: DeviceMesh) -> None:
    check_split(mesh, (Shard(2), Shard(2)), stays=False)


def dtensor_dropout_is_gathered(mesh: DeviceMesh) -> None:
    """Its bits count batch rows and heads from the first of all."""
    for split in ((Shard(0), Shard(0)), (Shard(1), Shard(1))):
        check_split(mesh, split, stays=False, dropout_p=0.5, dropout_seed=torch.tensor([3]))


class Model(torch.nn.Module):
    """Two attention layers with learnable sinks and a relative bias."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(50, 32)
        self.project = torch.nn.ModuleList(torch.nn.Linear(32, 96) for _ in range(2))
        self.sinks = torch.nn.Parameter(torch.randn(4))
        self.bias = torch.nn.Parameter(torch.randn(1, 4, 1, 40))
        self.head = torch.nn.Linear(32, 50)

    def forward(self, tokens: Tensor, keep: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        mask = AttentionMask.causal() & AttentionMask.from_padding(keep)
        for project in self.project:
            query, key, value = project(hidden).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
            out = flash_attention(query, key, value, mask=mask, bias=self.bias, sinks=self.sinks)
            hidden = hidden + out.transpose(1, 2).flatten(2)
        return self.head(hidden)


def training_step(model: torch.nn.Module, tokens: Tensor, keep: Tensor) -> None:
    logits = model(tokens, keep)[:, :-1]
    F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten()).backward()


def check_data_parallel(wrap: Callable, rtol: float = 1e-4, atol: float = 1e-6) -> None:
    """The gradient of half a batch each, averaged, is that of the whole batch."""
    torch.manual_seed(0)
    model = Model()
    tokens, keep = torch.randint(50, (4, 40)), torch.rand(4, 40) > 0.2
    twin = deepcopy(model)
    training_step(twin, tokens, keep)
    half = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    wrapped = wrap(model)
    training_step(wrapped, tokens[half], keep[half])
    gradients = dict(twin.named_parameters())
    for name, parameter in wrapped.named_parameters():
        grad, want = parameter.grad, gradients[name.removeprefix("module.")].grad
        grad = grad.full_tensor() if isinstance(grad, DTensor) else grad
        torch.testing.assert_close(
            grad, want, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


def data_parallel(mesh: DeviceMesh) -> None:
    check_data_parallel(DistributedDataParallel)


def shard_all(model: Model, mesh: DeviceMesh, **options) -> Model:
    for project in model.project:
        fully_shard(project, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def fsdp(mesh: DeviceMesh) -> None:
    check_data_parallel(lambda model: shard_all(model, mesh))


def fsdp_in_bfloat16(mesh: DeviceMesh) -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    check_data_parallel(lambda model: shard_all(model, mesh, mp_policy=policy), 0.1, 5e-3)


CHECKS = [
    dtensor_whole,
    dtensor_batch,
    dtensor_uneven_batch,
    dtensor_heads,
    dtensor_heads_all_different,
    dtensor_one_key_head,
    dtensor_bias_without_gradient,
    dtensor_per_batch_bias_and_sinks,
    dtensor_sequence_is_gathered,
    dtensor_dropout_is_gathered,
    data_parallel,
    fsdp,
    fsdp_in_bfloat16,
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str | None]]:
    return launch(__file__, WORLD, tmp_path_factory.mktemp("sharding"))


@pytest.mark.parametrize("name", [check.__name__ for check in CHECKS])
def test_two_processes(outcomes: list[dict[str, str | None]], name: str) -> None:
    assert_passed(outcomes, name)


if __name__ == "__main__":
    run(CHECKS, Path(sys.argv[1]))
