"""The forward on Hopper, as the compiler makes it, without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hf_flash_two import AttentionMask

pytest.importorskip("triton", reason="the Hopper kernels need Triton")

from compiling import compile_launch, params  # noqa: E402
from test_hopper_compile import HOPPER, SHARED_MEMORY, assemble  # noqa: E402
from test_triton_compile import Recorder  # noqa: E402

from hf_flash_two.kernels.hopper import config, forward  # noqa: E402
from hf_flash_two.kernels.triton import launch, ranges  # noqa: E402


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list:
    """The kernels that are launched, with their arguments, instead of running them."""
    launches: list = []
    monkeypatch.setattr(forward, "attend_kernel", Recorder(forward.attend_kernel, launches))
    monkeypatch.setattr(ranges, "_ranges_kernel", Recorder(ranges._ranges_kernel, []))
    monkeypatch.setattr(launch, "plans", {})
    return launches


# (head dim of queries and keys, of values); bytes that may be spilled: hidden NaN cost registers
# in the code that computes tiles again, which hardly ever runs.
HEAD_DIMS = [(64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256), (64, 128)]
SPILLED = {"full": 256, "causal": 1800, "padded": 2600}


@pytest.mark.parametrize("mask", SPILLED)
@pytest.mark.parametrize("head_dim, value_dim", HEAD_DIMS)
def test_forward_fits_a_processor(launches, tmp_path: Path, head_dim, value_dim, mask) -> None:
    """Registers, shared memory; products that overlap."""
    masks = {"full": AttentionMask.full(), "causal": AttentionMask.causal()}
    masks["padded"] = masks["causal"] & AttentionMask.from_padding(torch.ones(2, 512))
    query, key = (torch.empty(2, heads, 512, head_dim, dtype=torch.bfloat16) for heads in (4, 2))
    value = torch.empty(2, 2, 512, value_dim, dtype=torch.bfloat16)
    described = params(masks[mask], 512)
    assert config.forward_declines(query, key, value, described) is None
    forward.forward(query, key, value, described)
    ((kernel, _, args, options),) = launches
    compiled = compile_launch(kernel, args, options, HOPPER)
    assert compiled.metadata.shared <= SHARED_MEMORY
    found = assemble(compiled.asm["ptx"], tmp_path)
    assert not found.serialised
    assert found.spilled <= SPILLED[mask]
