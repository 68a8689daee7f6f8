"""`FlashAttentionTwo` over a sharded sequence: several processes compute what one computes.

All checks run in one set of processes for each number of ranks; a test for each reads how it went.
"""

from __future__ import annotations

import copy
import pickle
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import assert_passed, launch, run
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from hf_flash_two import AttentionMask, FlashAttentionTwo

TOKENS = 48
WORLDS = (2,)


def shard(x: Tensor | None, mesh: DeviceMesh, layout: str) -> Tensor | None:
    """This rank's part of [B, T, ...]."""
    rank, ranks = mesh.get_local_rank(), mesh.size()
    if x is None:
        return None
    if layout == "contiguous":
        return x.chunk(ranks, dim=1)[rank]
    parts = x.chunk(2 * ranks, dim=1)
    return torch.cat([parts[rank], parts[2 * ranks - 1 - rank]], dim=1)


def pair(mesh: DeviceMesh, layout: str, **settings):
    """A module of one process and one over ``mesh``, of equal weights."""
    torch.manual_seed(0)
    settings = {"dim": 16, "heads": 2, "dim_head": 8} | settings
    single = FlashAttentionTwo(**settings)
    sharded = FlashAttentionTwo(**settings, parallel=True, mesh=mesh, layout=layout)
    sharded.load_state_dict(single.state_dict())
    return single, sharded


def check_equal(
    mesh: DeviceMesh, layout: str, *, causal: bool, mask: str = "none", cross: bool = False
) -> None:
    """Output, gradient of the input, and gradients of the parameters summed over the ranks."""
    single, sharded = pair(mesh, layout, causal=causal)
    keys = 2 * TOKENS if cross else TOKENS
    x, context = torch.randn(2, TOKENS, 16), torch.randn(2, keys, 16) if cross else None
    keep = torch.rand(2, keys) > 0.3
    dense = torch.rand(2, 2, TOKENS, keys) > 0.3
    window = AttentionMask.window(7, 9) & AttentionMask.from_padding(keep)
    masks = {"none": None, "padding": keep, "float": keep.float()[:1], "dense": dense}
    whole_mask = (masks | {"value": window})[mask]
    is_shard = mask in ("padding", "float")
    part_mask = shard(whole_mask, mesh, layout) if is_shard else whole_mask

    whole = x.clone().requires_grad_()
    out = single(whole, context, whole_mask)
    weight = torch.randn_like(out)
    want = torch.autograd.grad(out, [whole, *single.parameters()], weight)

    part = shard(x, mesh, layout).clone().requires_grad_()
    got = sharded(part, shard(context, mesh, layout), part_mask)
    part_weight = shard(weight, mesh, layout)
    grads = torch.autograd.grad(got, [part, *sharded.parameters()], part_weight)
    torch.testing.assert_close(got, shard(out, mesh, layout), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(grads[0], shard(want[0], mesh, layout), atol=1e-5, rtol=1e-4)
    for grad, expected in zip(grads[1:], want[1:], strict=True):
        dist.all_reduce(grad, group=mesh.get_group())
        torch.testing.assert_close(grad, expected, atol=1e-4, rtol=1e-4)
    plan = sharded.parallel_plan()
    assert (plan.kind, plan.mesh, plan.layout) == ("sequence", mesh, layout)


def check_layout(mesh: DeviceMesh, layout: str) -> None:
    check_equal(mesh, layout, causal=True)
    check_equal(mesh, layout, causal=True, cross=True)
    for mask in ("padding", "float", "dense", "value"):
        check_equal(mesh, layout, causal=True, mask=mask)
    check_equal(mesh, layout, causal=False, mask="padding")
    check_equal(mesh, layout, causal=False, mask="padding", cross=True)


def check_contiguous(mesh: DeviceMesh) -> None:
    check_layout(mesh, "contiguous")


def check_head_tail(mesh: DeviceMesh) -> None:
    check_layout(mesh, "head_tail")


def check_mixed_precision(mesh: DeviceMesh) -> None:
    single, sharded = pair(mesh, "contiguous", causal=True, mixed_precision=True)
    x = torch.randn(2, TOKENS, 16)
    part = shard(x, mesh, "contiguous").clone().requires_grad_()
    out = sharded(part)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, shard(single(x), mesh, "contiguous"), atol=2e-2, rtol=2e-2)
    out.sum().backward()
    assert {p.grad.dtype for p in sharded.parameters()} == {part.grad.dtype} == {torch.float32}


def check_copies(mesh: DeviceMesh) -> None:
    _, sharded = pair(mesh, "head_tail", causal=True)
    part = shard(torch.randn(1, TOKENS, 16), mesh, "head_tail")
    expected = sharded(part)
    for twin in (copy.deepcopy(sharded), pickle.loads(pickle.dumps(sharded))):
        assert torch.equal(twin(part), expected)


def check_compiles(mesh: DeviceMesh) -> None:
    _, sharded = pair(mesh, "head_tail", causal=True)
    part = shard(torch.randn(2, TOKENS, 16), mesh, "head_tail").requires_grad_()
    keep = torch.ones(2, part.shape[1], dtype=torch.bool)
    compiled = torch.compile(sharded, fullgraph=True, backend="aot_eager")
    grads = []
    for model in (compiled, sharded):
        out = model(part, mask=keep)
        grads.append((out, *torch.autograd.grad(out.sum(), [part, *sharded.parameters()])))
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want)


def check_one_dimension_of_several(mesh: DeviceMesh) -> None:
    """Half of the ranks, or each alone, as one dimension of a larger mesh."""
    grid = init_device_mesh("cpu", (2, mesh.size() // 2), mesh_dim_names=("data", "sequence"))
    check_equal(grid["sequence"], "head_tail", causal=True, mask="padding")
    with pytest.raises(ValueError, match="mesh: expected a DeviceMesh of one dimension"):
        FlashAttentionTwo(dim=16, parallel=True, mesh=grid)
    with pytest.raises(ValueError, match="from_group"):
        FlashAttentionTwo(dim=16, parallel=True, mesh=dist.group.WORLD)
    made = DeviceMesh.from_group(dist.group.WORLD, "cpu")
    check_equal(made, "contiguous", causal=True)


def check_every_rank_refuses(mesh: DeviceMesh) -> None:
    head_tail = FlashAttentionTwo(dim=16, parallel=True, mesh=mesh, layout="head_tail")
    with pytest.raises(ValueError, match="shards of even length with 'head_tail', got 3"):
        head_tail(torch.randn(1, 3, 16))
    contiguous = FlashAttentionTwo(dim=16, parallel=True, mesh=mesh)
    total = 4 * mesh.size()
    for shape in ((1, 1, 4, total), (1, 1, total, 4), (1, 1, 4, 4)):
        with pytest.raises(ValueError, match=rf"broadcastable to .* = \[1, 8, {total}, {total}\]"):
            contiguous(torch.randn(1, 4, 16), mask=torch.ones(shape, dtype=torch.bool))


def check_ranks_compute_their_own_batches(mesh: DeviceMesh) -> None:
    """In a distributed run, parallel=True by itself sends nothing."""
    torch.manual_seed(dist.get_rank())
    model = FlashAttentionTwo(dim=16, parallel=True)
    local = FlashAttentionTwo(dim=16)
    local.load_state_dict(model.state_dict())
    x = torch.randn(1 + dist.get_rank(), 3, 16)
    assert torch.equal(model(x), local(x))
    assert model.parallel_plan().kind == "local"
    assert model.parallel_plan().reason.startswith("the ranks of the distributed run")
    split = FlashAttentionTwo(dim=16, parallel=True, devices=["cpu", "cpu"])
    split(x)
    assert split.parallel_plan().kind == "devices"


CHECKS = (
    check_contiguous,
    check_head_tail,
    check_mixed_precision,
    check_copies,
    check_compiles,
    check_one_dimension_of_several,
    check_every_rank_refuses,
    check_ranks_compute_their_own_batches,
)


@pytest.fixture(scope="module", params=WORLDS, ids=[f"{world}_processes" for world in WORLDS])
def outcomes(request, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str | None]]:
    return launch(__file__, request.param, tmp_path_factory.mktemp("module"))


@pytest.mark.parametrize("name", [check.__name__ for check in CHECKS])
def test_processes(outcomes: list[dict[str, str | None]], name: str) -> None:
    assert_passed(outcomes, name)


if __name__ == "__main__":
    run(CHECKS, Path(sys.argv[1]))
