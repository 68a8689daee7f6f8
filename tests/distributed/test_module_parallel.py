"""`FlashAttentionTwo` over a sharded sequence: several processes compute what one computes."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from hf_flash_two import FlashAttentionTwo

TOKENS = 48


def shard(x, rank: int, ranks: int, layout: str):
    """This rank's part of [B, T, ...]."""
    if layout == "contiguous":
        return x.chunk(ranks, dim=1)[rank]
    parts = x.chunk(2 * ranks, dim=1)
    return torch.cat([parts[rank], parts[2 * ranks - 1 - rank]], dim=1)


def check(layout: str, causal: bool, padded: bool, cross: bool) -> None:
    torch.manual_seed(0)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    single = FlashAttentionTwo(dim=16, heads=2, dim_head=8, causal=causal)
    mesh = init_device_mesh("cpu", (ranks,))
    sharded = FlashAttentionTwo(
        dim=16, heads=2, dim_head=8, causal=causal, parallel=True, mesh=mesh, layout=layout
    )
    sharded.load_state_dict(single.state_dict())
    sharded = copy.deepcopy(sharded)
    pickle.dumps(sharded.state_dict())
    x = torch.randn(2, TOKENS, 16)
    context = torch.randn(2, 2 * TOKENS, 16) if cross else None
    keep = torch.rand(2, 2 * TOKENS if cross else TOKENS) > 0.3 if padded else None
    weight = torch.randn(2, TOKENS, 16)

    whole = x.clone().requires_grad_()
    out = single(whole, context, keep)
    want = torch.autograd.grad((out * weight).sum(), [whole, *single.parameters()])

    def mine(tensor):
        return None if tensor is None else shard(tensor, rank, ranks, layout)

    part = mine(x).clone().requires_grad_()
    got = sharded(part, mine(context), mine(keep))
    torch.testing.assert_close(got, mine(out), atol=1e-6, rtol=1e-5)
    grads = torch.autograd.grad((got * mine(weight)).sum(), [part, *sharded.parameters()])
    torch.testing.assert_close(grads[0], mine(want[0]), atol=1e-5, rtol=1e-4)
    for grad, expected in zip(grads[1:], want[1:], strict=True):
        dist.all_reduce(grad)
        torch.testing.assert_close(grad, expected, atol=1e-4, rtol=1e-4)
    assert sharded.parallel_plan().kind == "sequence"


def check_refusals_and_local() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = FlashAttentionTwo(dim=16, parallel=True, mesh=mesh, layout="head_tail")
    with pytest.raises(ValueError, match="'head_tail' needs shards of even length, got 3"):
        model(torch.randn(1, 3, 16))
    local = FlashAttentionTwo(dim=16, parallel=True)
    local(torch.randn(1, 3, 16))
    assert local.parallel_plan().reason.startswith("the ranks of the distributed run")


@pytest.mark.parametrize("ranks", [2, 4])
def test_sharded_sequence_equals_one_process(ranks):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={ranks}", __file__]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("all equal") == ranks


if __name__ == "__main__":
    dist.init_process_group("gloo")
    for layout in ("contiguous", "head_tail"):
        for causal, padded, cross in (
            (True, False, False), (True, True, False), (False, True, False), (False, True, True),
            (True, False, True),
        ):  # fmt: skip
            check(layout, causal, padded, cross)
    check_refusals_and_local()
    print("all equal", flush=True)
    dist.destroy_process_group()
