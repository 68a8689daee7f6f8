"""The Triton kernels go through the real compiler for GPUs that this machine does not have.

The interpreter proves what the kernels compute; it accepts code that no GPU backend does, and knows
nothing of registers and shared memory.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from hf_flash_two import AttentionMask
from hf_flash_two.kernels.problem import Problem

triton = pytest.importorskip("triton", reason="the Triton kernels need triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

from hf_flash_two.kernels import (  # noqa: E402
    triton_backward,
    triton_config,
    triton_forward,
    triton_launch,
    triton_ranges,
)

TARGETS = {
    "turing": (GPUTarget("cuda", 75, 32), 2**16),
    "ampere": (GPUTarget("cuda", 80, 32), 163 * 2**10),
    "ada": (GPUTarget("cuda", 89, 32), 99 * 2**10),
    "hopper": (GPUTarget("cuda", 90, 32), 227 * 2**10),
    "mi300": (GPUTarget("hip", "gfx942", 64), 2**16),
}
TYPES = {
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32",
    torch.int32: "*i32", torch.int64: "*i64", torch.bool: "*i1",
}  # fmt: skip


class Recorder:
    """Stands for a kernel and keeps what it was launched with."""

    def __init__(self, kernel, launches: list):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launches.append((self.kernel, grid, args, kwargs))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list:
    """The kernels that are launched, with their grids and arguments, instead of running them."""
    launches: list = []
    for module, names in (
        (triton_forward, ("_forward_kernel", "_merge_kernel")),
        (triton_ranges, ("_ranges_kernel",)),
        (triton_backward, ("_keys_kernel", "_queries_kernel", "_bias_kernel", "_stats_kernel")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, Recorder(getattr(module, name), launches))
    monkeypatch.setattr(triton_launch, "plans", {})
    return launches


def compile_launch(kernel, args, kwargs, target):
    options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages") if name in kwargs}
    signature, constants = {}, {}
    for name, value in [*zip(kernel.arg_names, args, strict=False), *kwargs.items()]:
        is_constexpr = kernel.params[kernel.arg_names.index(name)].is_constexpr
        if is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
        elif isinstance(value, TensorDescriptor):
            kind = TYPES[value.base.dtype].removeprefix("*")
            signature[name] = f"tensordesc<{kind}{value.block_shape}>".replace(" ", "")
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
    signature = {name: signature[name] for name in kernel.arg_names}
    # Pointers and strides are multiples of 16 in practice; without that nothing is vectorised.
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or name.endswith(("_st", "_sh", "_sb"))
        if name not in constants
    }
    source = ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=target, options=options)


def problem(mask: AttentionMask, length: int, **changes) -> Problem:
    settings = dict.fromkeys(("bias", "alibi_slopes", "sinks", "seed", "block_q", "block_k"))
    settings |= dict(
        first_query=mask.first_query, last_query=mask.last_query, key_bounds=mask.key_bounds(),
        dense=mask.dense, query_offset=0, window_left=mask.window_left,
        window_right=mask.window_right, scale=0.1, softcap=0.0, dropout_p=0.0,
    )  # fmt: skip
    return Problem(**(settings | changes))


FEATURES = ("causal", "padded", "everything", "decode", "wide")
ALWAYS = {
    ("hopper", "causal"), ("hopper", "everything"), ("hopper", "decode"), ("ampere", "padded"),
    ("ada", "wide"), ("turing", "causal"), ("mi300", "padded"),
}  # fmt: skip


@pytest.mark.parametrize(
    "target, feature",
    [
        pytest.param(*pair, marks=() if pair in ALWAYS else pytest.mark.sweep)
        for pair in itertools.product(TARGETS, FEATURES)
    ],
)
def test_compiles(monkeypatch, launches, target, feature):
    gpu, shared_memory = TARGETS[target]
    device = triton_config.Device(132, shared_memory, bulk_copy=target == "hopper")
    for module in (triton_config, triton_launch):
        monkeypatch.setattr(module, "device_of", lambda index: device)
    length, head_dim = 512, {"wide": 320}.get(feature, 128)
    # Turing has no bfloat16.
    dtype = torch.float16 if target == "turing" else torch.bfloat16
    query, key, value = (
        torch.empty(1, heads, length, head_dim, dtype=dtype) for heads in (4, 2, 2)
    )
    mask, changes = AttentionMask.causal(), {}
    if feature == "padded":
        mask = mask & AttentionMask.from_padding(torch.ones(1, length))
    if feature == "everything":
        mask = AttentionMask.from_dense(torch.ones(1, 1, length, length, dtype=torch.bool))
        mask = mask & AttentionMask.from_padding(torch.ones(1, length))
        changes = dict(
            bias=torch.empty(1, 4, length, length), alibi_slopes=torch.empty(1, 4),
            sinks=torch.empty(1, 4), seed=torch.empty(1, dtype=torch.int64),
            softcap=30.0, dropout_p=0.1,
        )  # fmt: skip
    if feature == "decode":
        query = query[:, :, :1]
    described = problem(mask, length, **changes)
    out, lse = triton_forward.forward(query, key, value, described)
    if feature != "decode":
        need_d_bias = described.bias is not None
        triton_backward.backward(out, None, query, key, value, out, lse, described, need_d_bias)
    assert launches
    for kernel, _, args, kwargs in launches:
        compiled = compile_launch(kernel, args, kwargs, gpu)
        assert compiled.metadata.shared <= shared_memory, kernel.__name__


def test_any_number_of_heads_fits_the_grid(launches):
    """The second and third axis of a CUDA grid end at 65535: windows of images are many rows."""
    batch, length = 70000, 4
    query, key, value = (torch.empty(batch, 2, length, 16) for _ in range(3))
    mask = AttentionMask.causal() & AttentionMask.from_padding(torch.ones(batch, length))
    bias = torch.empty(batch, 2, length, length)
    described = problem(mask, length, bias=bias)
    out, lse = triton_forward.forward(query, key, value, described)
    triton_backward.backward(out, None, query, key, value, out, lse, described, True)
    assert {kernel.__name__ for kernel, *_ in launches} == {
        "_ranges_kernel", "_forward_kernel", "_stats_kernel", "_keys_kernel", "_queries_kernel",
        "_bias_kernel",
    }  # fmt: skip
    for kernel, (_, *others), *_ in launches:
        assert max(others, default=1) < 2**16, kernel.__name__
