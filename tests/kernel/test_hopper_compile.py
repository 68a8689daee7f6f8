"""The Hopper kernels go through the real compiler, without a GPU.

Nothing else runs them on a CPU: Triton's interpreter knows no Gluon, and triton-viz 3.0 on PyPI
does not simulate it. So here is what the compiler makes of them, and tests/kernel/test_hopper.py
runs them on a GPU.
"""

from __future__ import annotations

import itertools
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

triton = pytest.importorskip("triton", reason="the Hopper kernels need Triton")

from compiling import compile_launch, params  # noqa: E402
from sass import disassembled, read_before_written  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.nvidia.compiler import get_ptxas  # noqa: E402

from hf_flash_two import AttentionMask  # noqa: E402
from hf_flash_two.kernels import hopper  # noqa: E402
from hf_flash_two.kernels.hopper import backward, forward  # noqa: E402
from hf_flash_two.kernels.hopper import config as hopper_config  # noqa: E402
from hf_flash_two.kernels.hopper.gluon import (  # noqa: E402
    allocate_barriers,
    barrier,
    fence_async_shared,
    gl,
    jit,
    mbarrier,
    reinterpret,
    shared_layout,
    tma_add,
    tma_load,
    tma_store,
    tma_store_done,
    tma_store_read,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from hf_flash_two.kernels.triton import config, launch  # noqa: E402
from hf_flash_two.kernels.triton.args import Tma  # noqa: E402
from hf_flash_two.kernels.triton.config import Tiles, tma_of  # noqa: E402
from hf_flash_two.kernels.triton.launch import Launch  # noqa: E402

HOPPER = GPUTarget("cuda", 90, 32)
SHARED_MEMORY = 227 * 2**10


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list:
    """The kernels that are launched, with their arguments, instead of running them."""
    found: list = []

    def record(kernel, grid):
        return lambda *args, **options: found.append((kernel, args, options))

    monkeypatch.setattr(triton.runtime.jit.KernelInterface, "__getitem__", record)
    return found


class Resources(NamedTuple):
    """What ptxas says of a kernel: registers of a thread and bytes that they spill, in all."""

    registers: int
    spilled: int
    serialised: bool


def resources(report: str) -> Resources:
    """Of what ``ptxas --verbose`` prints.

    Products are serialised where ptxas does not trust their registers: half the speed, in silence.
    """
    (registers,) = re.findall(r"Used (\d+) registers", report)
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill", report)))
    return Resources(
        int(registers), spilled, "wgmma.mma_async instructions are serialized" in report
    )


def assemble(ptx: str, folder: Path) -> Resources:
    source = folder / "kernel.ptx"
    source.write_text(ptx)
    command = [
        get_ptxas(90).path,
        "--verbose",
        "--gpu-name=sm_90a",
        source,
        "-o",
        folder / "kernel.cubin",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return resources(done.stderr)


@jit
def _load(tile, memory, loaded):
    mbarrier.expect(loaded.index(0), tile.block_type.nbytes)
    at = reinterpret(memory, tile.dtype, [1, 1, 64, 64], tile.layout)
    tma_load(tile, [0, 0, 0, 0], loaded.index(0), at)


@jit
def _multiply(sums, memory, loaded, result):
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    mbarrier.wait(loaded.index(0), 0)
    product = warpgroup_mma(
        memory, memory.permute((1, 0)), gl.zeros((64, 64), gl.float32, layout), use_acc=False,
        is_async=True,
    )  # fmt: skip
    result.store(warpgroup_mma_wait(0, deps=(product,)))
    fence_async_shared()
    barrier()
    tma_store(sums, [0, 0], result)
    tma_store_done(0, 4)
    tma_add(sums, [0, 0], result)
    tma_store_read(0)
    tma_store_done(1, 4)


@jit
def _square_kernel(tile, sums):
    memory = gl.allocate_shared_memory(tile.dtype, [64, 64], gl.NVMMASharedLayout(128, 16, 2))
    result = gl.allocate_shared_memory(sums.dtype, [64, 64], sums.layout)
    loaded = allocate_barriers(1, 1)
    gl.warp_specialize(
        [(_multiply, (sums, memory, loaded, result)), (_load, (tile, memory, loaded))], [1], [24]
    )


def test_every_name_means_the_same_in_this_version(launches: list, tmp_path: Path) -> None:
    """One small kernel with all that `gluon` gives a name to; launched as the kernels are."""
    x, sums = torch.empty(1, 1, 64, 64, dtype=torch.bfloat16), torch.empty(1, 1, 64, 64)
    templates = {
        "tile": tma_of(x, 64, 64, shared_layout((1, 1, 64, 64), x.dtype)),
        "sums": Tma((64, 64), (64, 1), (64, 64), shared_layout((64, 64), sums.dtype)),
    }
    tiles = Tiles(64, 64, 64, 64, warps=4, stages=1)
    Launch(_square_kernel, (1,), templates, (), {}, tiles, maxnreg=168)(x, sums)
    ((kernel, args, options),) = launches
    assert options["maxnreg"] == 168 and options["enable_fp_fusion"] is True
    compiled = compile_launch(kernel, args, options, HOPPER)
    ptx = compiled.asm["ptx"]
    assert ptx.count("wgmma.mma_async") == 4
    assert len(re.findall(r"cp\.async\.bulk\.tensor\.4d\.shared", ptx)) == 1
    of_sums = r"cp\.async\.bulk\.tensor\.2d\.global|cp\.reduce|wait_group(?:\.read)?\s+\d"
    events = [
        re.sub(r"\s+", " ", event) for event in re.findall(of_sums, ptx.replace("wgmma.wait", ""))
    ]
    assert [kind for kind, _ in itertools.groupby(events)] == [
        "cp.async.bulk.tensor.2d.global", "wait_group 0",
        "cp.reduce", "wait_group.read 0", "wait_group 1",
    ]  # fmt: skip
    assert not assemble(ptx, tmp_path).serialised


def test_a_report_of_the_assembler_is_read() -> None:
    report = """
ptxas info    : (C7512) Potential Performance Loss: wgmma.mma_async instructions are serialized due
ptxas info    : Function properties for kernel
    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 16 bytes cumulative stack size
"""
    assert resources(report) == (168, 20, True)
    assert resources(report.replace("serialized", "fine").replace("12 b", "0 b")) == (168, 8, False)


SKIPPED_LOOP = """
.text.kernel:
        /*0000*/                   ULDC.64 UR4, c[0x0][0x210] ;
        /*0010*/              @!P1 BRA `(.L_x_1) ;
        /*0020*/                   UIADD3 UR8, UP0, UR4, 0x2, URZ ;
.L_x_1:
        /*0030*/                   HGMMA.64x128x16.F32.BF16 R88, R152, gdesc[UR6].tnspB, R88 ;
        /*0040*/                   EXIT ;
"""


def test_a_register_that_one_way_leaves_unwritten_is_found() -> None:
    (found,) = read_before_written(SKIPPED_LOOP)
    assert "gdesc[UR6]" in found
    always = SKIPPED_LOOP.replace("@!P1 BRA `(.L_x_1)", "NOP")
    assert len(read_before_written(always)) == 1
    assert not read_before_written(always.replace("UIADD3", "UIADD3.64"))


MASKS = {
    "full": AttentionMask.full,
    "causal": AttentionMask.causal,
    "window": lambda: AttentionMask.causal(window=300),
    "padded": lambda: AttentionMask.causal() & AttentionMask.from_padding(torch.ones(1, LENGTH)),
}
LENGTH = 1024
DIMS = ((64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256), (64, 128))
MOST_SPILLED = {
    "attend_kernel": 400, "attend_again_kernel": 300, "gradients_kernel": 450,
    "wide_keys_kernel": 100, "queries_kernel": 100,
}  # fmt: skip
"""Bytes that all parts of a kernel spill, stores and loads together; others spill nothing.

What is spilled is mostly what a kernel knows outside of its loop, and what it computes again where
a result holds NaN. The assemblers of Triton 3.8 and 3.9 spill more than those before.
"""
WITH_TERMS = {
    "attend_kernel": 12000, "attend_again_kernel": 12000, "gradients_kernel": 3500,
    "wide_keys_kernel": 200, "queries_kernel": 700,
}  # fmt: skip
"""The same with a softcap, slopes and sinks at once: most at head dim 64, with padding."""


def cases() -> list:
    """Every mask at every head dim, of which some are compiled each time."""
    found = list(itertools.product(("forward", "backward"), DIMS, MASKS, ("", "terms")))
    found += itertools.product(("backward",), DIMS, MASKS, ("any order",))
    often = (
        ((128, 128), "causal", ""), ((64, 64), "padded", ""), ((256, 256), "full", ""),
        ((128, 128), "causal", "any order"), ((128, 128), "padded", ""),
        ((64, 64), "window", "terms"),
    )  # fmt: skip
    return [
        pytest.param(
            *case, id=f"{case[0]}-D{case[1][0]}-{case[2]}{case[3] and '-' + case[3]}",
            marks=() if case[1:] in often else pytest.mark.sweep,
        )
        for case in found
    ]  # fmt: skip


@pytest.mark.parametrize(("direction", "dims", "mask", "terms"), cases())
def test_it_fits(
    monkeypatch: pytest.MonkeyPatch,
    launches: list,
    tmp_path: Path,
    direction: str,
    dims: tuple[int, int],
    mask: str,
    terms: str,
) -> None:
    """Registers, what is spilled, shared memory, and products that run beside each other."""
    monkeypatch.setattr(config, "device_of", lambda index: config.Device(132, SHARED_MEMORY, True))
    monkeypatch.setattr(launch, "plans", {})
    query, key, value = (
        torch.empty(1, heads, LENGTH, dim, dtype=torch.bfloat16)
        for heads, dim in ((4, dims[0]), (2, dims[0]), (2, dims[1]))
    )
    out, lse = torch.empty(1, 4, LENGTH, dims[1], dtype=torch.bfloat16), torch.empty(1, 4, LENGTH)
    given: dict = {"deterministic": terms != "any order"}
    if terms == "terms":
        given |= dict(softcap=30.0, alibi_slopes=torch.empty(1, 4), sinks=torch.empty(1, 4))
    described = params(MASKS[mask](), LENGTH, **given)
    if direction == "forward":
        assert hopper_config.forward_declines(query, key, value, described) is None
        forward.forward(query, key, value, described)
    else:
        assert hopper_config.backward_declines(query, key, value, described) is None
        backward.backward(out, None, query, key, value, out, lse, described, False)
    ours = [call for call in launches if call[0].fn.__module__.startswith(hopper.__name__)]
    assert ours
    for kernel, args, options in ours:
        name = kernel.fn.__name__
        compiled = compile_launch(kernel, args, options, HOPPER)
        used = assemble(compiled.asm["ptx"], tmp_path)
        assert not used.serialised, name
        assert compiled.metadata.shared <= SHARED_MEMORY, name
        # Registers of all parts come out of the 64 Ki of a processor; this kernel has one part.
        assert used.registers <= (255 if name == "attend_again_kernel" else 168), name
        most = WITH_TERMS if terms == "terms" else MOST_SPILLED
        assert used.spilled <= most.get(name, 0), name
        assert not read_before_written(disassembled(tmp_path / "kernel.cubin")), name
