"""The Triton kernels go through the real compiler for GPUs that this machine does not have.

The interpreter proves what the kernels compute; it accepts code that no GPU backend does, and knows
nothing of registers and shared memory.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter

import pytest
import torch

from hf_flash_two import AttentionMask

triton = pytest.importorskip("triton", reason="the Triton kernels need triton")

from compiling import compile_launch, params  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

from hf_flash_two.documents import TILE  # noqa: E402
from hf_flash_two.kernels.triton import (  # noqa: E402
    backward,
    config,
    decode,
    forward,
    launch,
    ranges,
)
from hf_flash_two.kernels.triton.args import Rows  # noqa: E402


def gpu(kib: int, *engines: str) -> config.Device:
    """A GPU of so much shared memory for a program."""
    return config.Device(132, kib * 2**10, **dict.fromkeys(engines, True))


TARGETS = {
    "turing": (GPUTarget("cuda", 75, 32), gpu(64)),
    "ampere": (GPUTarget("cuda", 80, 32), gpu(163)),
    "ada": (GPUTarget("cuda", 89, 32), gpu(99)),
    "hopper": (GPUTarget("cuda", 90, 32), gpu(227, "tma")),
    "blackwell": (GPUTarget("cuda", 100, 32), gpu(227, "tma", "tensor_memory")),
    "rtx-blackwell": (GPUTarget("cuda", 120, 32), gpu(99, "tma")),
    "mi300": (GPUTarget("hip", "gfx942", 64), gpu(64)),
}


class Recorder:
    """Stands for a kernel and keeps what it was launched with."""

    def __init__(self, kernel, launches: list):
        self.kernel, self.launches = kernel, launches
        self.arg_names = kernel.arg_names

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launches.append((self.kernel, grid, args, kwargs))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list:
    """The kernels that are launched, with their grids and arguments, instead of running them."""
    launches: list = []
    for module, names in (
        (forward, ("attend_kernel",)),
        (decode, ("attend_kernel",)),
        (ranges, ("_ranges_kernel",)),
        (backward, ("_dkdv_kernel", "_dq_kernel", "_dbias_kernel")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, Recorder(getattr(module, name), launches))
    monkeypatch.setattr(launch, "plans", {})
    return launches


def pretend(monkeypatch: pytest.MonkeyPatch, device: config.Device) -> None:
    monkeypatch.setattr(config, "device_of", lambda index: device)


FEATURES = ("causal", "padded", "everything", "decode", "large", "invariant")
ALWAYS = {
    ("hopper", "causal"), ("hopper", "everything"), ("hopper", "decode"), ("ampere", "decode"),
    ("ada", "large"), ("turing", "decode"), ("mi300", "padded"), ("blackwell", "padded"),
    ("rtx-blackwell", "decode"), ("hopper", "invariant"),
}  # fmt: skip


@pytest.mark.parametrize(
    "target, feature",
    [
        pytest.param(*pair, marks=() if pair in ALWAYS else pytest.mark.sweep)
        for pair in itertools.product(TARGETS, FEATURES)
    ],
)
def test_compiles(monkeypatch, launches, target, feature):
    gpu, device = TARGETS[target]
    pretend(monkeypatch, device)
    length, head_dim = 512, {"large": 320}.get(feature, 128)
    # Turing has no bfloat16.
    dtype = torch.float16 if target == "turing" else torch.bfloat16
    query, key, value = (
        torch.empty(1, heads, length, head_dim, dtype=dtype) for heads in (4, 2, 2)
    )
    mask, changes = AttentionMask.causal(), {}
    if feature == "invariant":
        changes = dict(batch_invariant=True)
    if feature in ("padded", "invariant"):
        mask = mask & AttentionMask.from_padding(torch.ones(1, length))
    if feature == "everything":
        mask = AttentionMask.from_dense(torch.ones(1, 1, length, length, dtype=torch.bool))
        mask = mask & AttentionMask.from_padding(torch.ones(1, length))
        changes = dict(
            bias=torch.empty(1, 4, length, length), alibi_slopes=torch.empty(1, 4),
            sinks=torch.empty(1, 4), seed=torch.empty(1, dtype=torch.int64),
            softcap=30.0, dropout_p=0.1, max_logits=True,
        )  # fmt: skip
    if feature == "decode":
        query, changes = query[:, :, :1], dict(max_logits=True)
    described = params(mask, length, **changes)
    out, lse, *_ = forward.forward(query, key, value, described)
    if feature != "decode":
        need_d_bias = described.bias is not None
        backward.backward(out, None, query, key, value, out, lse, described, need_d_bias)
    assert launches
    for kernel, _, args, kwargs in launches:
        assert kwargs["enable_fp_fusion"] is True, "the default is not that of every version"
        compiled = compile_launch(kernel, args, kwargs, gpu)
        assert compiled.metadata.shared <= device.shared_memory, kernel.__name__
        # Programs that split keys count who has come; no result is added up in order of arrival.
        added = [line for line in compiled.asm["ttir"].splitlines() if "atomic" in line]
        assert all(": (!tt.ptr<i32>, i32, i1) -> i32" in line for line in added), kernel.__name__
        assert len(added) == (feature == "decode"), kernel.__name__


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("query_length", [1, 512])
def test_only_small_buckets_change_tiles(monkeypatch, target: str, query_length: int) -> None:
    """They limit tiles of the forward and the backward, to 16 at least, and not in decoding."""
    pretend(monkeypatch, TARGETS[target][1])
    tensors = [torch.empty(1, 4, length, 64).half() for length in (query_length, 512, 512)]

    def tiles(bucket: int | None) -> list[config.Tiles]:
        described = params(AttentionMask.causal(), 512, block_q=bucket, block_k=bucket)
        both = config.backward_tiles(*tensors, described)
        of_forward = config.forward_tiles(*tensors[:3], described)
        if query_length == 1:
            of_forward = config.decode_tiles(*tensors, described).tiles
        return [of_forward, *(x for x in (both.dkdv, both.dq, both.dv) if x is not None)]

    assert tiles(10_000) == tiles(None)
    of_forward, *others = tiles(1)
    assert {(x.block_q, x.block_k) for x in others} == {(16, 16)}
    if query_length > 1:
        assert (of_forward.block_q, of_forward.block_k) == (16, 16)
    else:
        assert of_forward == tiles(None)[0]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_batch_invariant_tiles_follow_from_heads_alone(monkeypatch, target: str, dtype) -> None:
    pretend(monkeypatch, TARGETS[target][1])
    described = params(AttentionMask.causal(), 1, batch_invariant=True)
    for dim in (16, 64, 128, 256, 512):
        found = set()
        for batch, queries, keys in ((1, 1, 1), (8, 1, 4096), (1, 70, 70), (3, 4096, 4096)):
            query = torch.empty(batch, 12, queries, dim, dtype=dtype, device="meta")
            key = torch.empty(batch, 3, keys, dim, dtype=dtype, device="meta")
            both = config.backward_tiles(query, key, key, described)
            found.add((config.forward_tiles(query, key, key, described), both))
        ((of_forward, both),) = found
        assert of_forward.pack_gqa == 4
        for tiles in (of_forward, both.dkdv, both.dq, both.dv or both.dq):
            assert TILE % tiles.block_q == TILE % tiles.block_k == 0


@pytest.mark.sweep
@pytest.mark.parametrize("target", ["ampere", "hopper"])
def test_batch_invariant_calls_compute_with_the_same_instructions(
    monkeypatch, launches, target: str
) -> None:
    gpu, device = TARGETS[target]
    pretend(monkeypatch, device)
    padded = AttentionMask.causal() & AttentionMask.from_padding(torch.ones(1, 301))
    calls = (
        (AttentionMask.full(), 512), (AttentionMask.causal(window=77), 301), (padded, 301),
        (padded, 1),
    )  # fmt: skip
    found: dict[str, list] = {}
    for mask, queries in calls:
        keys = 301 if mask is padded else 512
        query, key, value = (
            torch.empty(1, heads, length, 128, dtype=torch.bfloat16)
            for heads, length in ((4, queries), (2, keys), (2, keys))
        )
        described = params(mask, keys, batch_invariant=True)
        out, lse, *_ = forward.forward(query, key, value, described)
        backward.backward(out, None, query, key, value, out, lse, described, False)
    for kernel, _, args, kwargs in launches:
        if "ranges" in kernel.__name__:
            continue
        code = compile_launch(kernel, args, kwargs, gpu).asm["ptx"]
        floats = r"^\s*((?:fma|mul|add|sub|ex2|div|max|min|cvt|mma|wgmma\.mma)\S*)"
        used = Counter(x for x in re.findall(floats, code, re.M) if "f32" in x)
        found.setdefault(kernel.__name__, []).append(used)
    assert len(found) == 3
    for name, counts in found.items():
        assert all(count == counts[0] for count in counts) and len(counts) > 2, name


def test_any_number_of_heads_fits_the_grid(launches):
    """The second and third axis of a CUDA grid end at 65535: windows of images are many rows."""
    batch, length = 70000, 4
    query, key, value = (torch.empty(batch, 2, length, 16) for _ in range(3))
    mask = AttentionMask.causal() & AttentionMask.from_padding(torch.ones(batch, length))
    bias = torch.empty(batch, 2, length, length)
    described = params(mask, length, bias=bias)
    out, lse = forward.forward(query, key, value, described)
    backward.backward(out, None, query, key, value, out, lse, described, True)
    assert {kernel.__name__ for kernel, *_ in launches} == {
        "_ranges_kernel", "attend_kernel", "_dkdv_kernel", "_dq_kernel",
        "_dbias_kernel",
    }  # fmt: skip
    for kernel, (_, *others), *_ in launches:
        assert max(others, default=1) < 2**16, kernel.__name__


@pytest.fixture
def no_code(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """Kernels are compiled until their shared memory is known, and kept by nobody."""

    def nothing(*args, **_):
        next(x for x in args if isinstance(x, dict))["name"] = "kernel"
        return ""

    nvidia = pytest.importorskip("triton.backends.nvidia.compiler")
    amd = pytest.importorskip("triton.backends.amd.compiler")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(nvidia.CUDABackend, "make_ptx", nothing)
    monkeypatch.setattr(nvidia.CUDABackend, "make_cubin", lambda *args, **_: b"")
    monkeypatch.setattr(amd.HIPBackend, "make_amdgcn", staticmethod(nothing))
    monkeypatch.setattr(amd.HIPBackend, "make_hsaco", staticmethod(lambda *args, **_: b""))
    monkeypatch.setattr(nvidia.llvm, "optimize_module", lambda *args, **_: None)


EXTREMES = {
    "plain": "",
    "bias": "bias",
    "everything": "bias dense alibi softcap dropout sinks",
    "half-bias": "half-bias",
}
SAMPLED = {("blackwell", torch.float16, (256, 256), "plain", 512)}


def extremes() -> list:
    dims = ((64, 64), (128, 128), (192, 128), (256, 256), (576, 512))
    cases = itertools.product(TARGETS, (torch.float16, torch.float32), dims, EXTREMES, (512, 30, 1))
    return [
        pytest.param(*case, marks=() if case in SAMPLED else pytest.mark.sweep) for case in cases
    ]


@pytest.mark.usefixtures("no_code")
@pytest.mark.parametrize(
    ("target", "dtype", "dims", "extreme", "query_length"), extremes(), ids=str
)
def test_shared_memory_suffices(
    monkeypatch: pytest.MonkeyPatch,
    launches: list,
    target: str,
    dtype: torch.dtype,
    dims: tuple[int, int],
    extreme: str,
    query_length: int,
) -> None:
    """Of every kernel and table row, with everything that wants tiles of its own."""
    compiler, device = TARGETS[target]
    pretend(monkeypatch, device)
    words, length = EXTREMES[extreme].split(), 512
    query, key, value = (
        torch.empty(1, heads, tokens, dim, dtype=dtype)
        for heads, tokens, dim in ((4, query_length, dims[0]), (2, length, dims[0]),
                                   (2, length, dims[1]))
    )  # fmt: skip
    shape = (1, 4, query_length, length)
    given = {
        "bias": dict(bias=torch.empty(shape)),
        "half-bias": dict(bias=torch.empty(shape, dtype=dtype)),
        "alibi": dict(alibi_slopes=torch.empty(1, 4)),
        "softcap": dict(softcap=30.0),
        "dropout": dict(seed=torch.empty(1, dtype=torch.int64), dropout_p=0.1),
        "sinks": dict(sinks=torch.empty(1, 4)),
    }
    changes = {name: x for word in words for name, x in given.get(word, {}).items()}
    for band in (True, False):
        mask = AttentionMask.causal()
        if not band:
            mask = mask & AttentionMask.from_padding(torch.ones(1, length))
        if "dense" in words:
            mask = mask & AttentionMask.from_dense(torch.ones(shape, dtype=torch.bool))
        described = params(mask, length, **changes)
        out, lse = forward.forward(query, key, value, described)
        backward.backward(
            out, None, query, key, value, out, lse, described, described.bias is not None
        )
    for kernel, _, args, kwargs in launches:
        shared = compile_launch(kernel, args, kwargs, compiler).metadata.shared
        assert shared <= device.shared_memory, (kernel.__name__, shared, kwargs)


def unguarded(ptx: str) -> list[str]:
    """What is written to shared memory after products were waited for, and no barrier between."""
    events, labels = [], {}
    for line in map(str.strip, ptx.splitlines()):
        if label := re.match(r"(\$L__BB\w+):", line):
            labels[label[1]] = len(events)
        for kind, pattern in (
            ("wait", r"wgmma\.wait_group"),
            ("barrier", r"bar\.sync|barrier\.sync"),
            ("write", r"cp\.async\.(bulk\.tensor|c[ag])|st\.shared|stmatrix"),
            ("branch", r"\bbra(?:\.uni)?\s+(\$L__BB\w+)"),
        ):
            if match := re.search(pattern, line):
                events.append((kind, match[1] if kind == "branch" else line))
    found = []
    for wait in (at for at, (kind, _) in enumerate(events) if kind == "wait"):
        ahead, known = [wait + 1], set()
        while ahead:
            at = ahead.pop()
            if at in known or at == len(events) or events[at][0] == "barrier":
                continue
            known.add(at)
            kind, what = events[at]
            if kind == "write":
                found.append(what)
                continue
            ahead += [at + 1, *([labels[what]] if kind == "branch" and what in labels else [])]
    return found


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.sweep)], ids=str
)
@pytest.mark.parametrize("feature", ["causal", "padded", "terms", "everything"])
@pytest.mark.parametrize(
    "length",
    [pytest.param(512, id="tma"), pytest.param(128, id="pointers", marks=pytest.mark.sweep)],
)
def test_warps_wait_for_each_other_before_a_tile_is_overwritten(
    monkeypatch: pytest.MonkeyPatch,
    launches: list,
    length: int,
    feature: str,
    dtype: torch.dtype,
) -> None:
    """Before 3.9 Triton may forget that where 8 warps multiply on Hopper; not in our launches.

    4 warps need no barrier, and spill: only the dQ pass at head dims above 128 has 8.
    """
    compiler, device = TARGETS["hopper"]
    pretend(monkeypatch, device)
    query, key, value = (torch.empty(1, heads, length, 256, dtype=dtype) for heads in (4, 2, 2))
    mask, changes = AttentionMask.causal(), {}
    if feature != "causal":
        mask = mask & AttentionMask.from_padding(torch.ones(1, length))
    if feature in ("terms", "everything"):
        changes = dict(
            alibi_slopes=torch.empty(1, 4), sinks=torch.empty(1, 4), softcap=30.0,
            seed=torch.empty(1, dtype=torch.int64), dropout_p=0.1,
        )  # fmt: skip
    if feature == "everything":
        mask = mask & AttentionMask.from_dense(torch.ones(1, 1, length, length, dtype=torch.bool))
        changes |= dict(bias=torch.empty(1, 4, length, length))
    described = params(mask, length, **changes)
    out, lse = forward.forward(query, key, value, described)
    backward.backward(out, None, query, key, value, out, lse, described, described.bias is not None)
    many = [launch for launch in launches if launch[3]["num_warps"] > 4]
    if feature != "everything" or config._WARPGROUPS_WAIT:
        assert {kernel.__name__ for kernel, *_ in many} >= {"_dq_kernel"}
    else:
        assert not many, "before 3.9 these would overwrite without waiting"
    for kernel, _, args, kwargs in many:
        ptx = compile_launch(kernel, args, kwargs, compiler).asm["ptx"]
        assert not unguarded(ptx), kernel.__name__


def test_programs_that_look_for_marks_are_few(monkeypatch, launches) -> None:
    """One a processor; each computes tile after tile, and as many warps wait for each other."""
    compiler, device = TARGETS["hopper"]
    pretend(monkeypatch, device)
    batch, length = 8, 512
    query, key, value = (
        torch.empty(batch, heads, length, 256, dtype=torch.bfloat16) for heads in (8, 8, 8)
    )
    mask = AttentionMask.causal() & AttentionMask.from_padding(torch.ones(batch, length))
    marked = torch.empty(batch, 8, length, dtype=torch.int8)
    rows = torch.empty(2, batch, 8, length)
    backward.replace_marked(
        (marked, marked), Rows(*rows, None), query, None, query, key, value, query, rows[0],
        params(mask, length), query, key, value,
    )  # fmt: skip
    passes = [launch for launch in launches if launch[0].__name__ != "_ranges_kernel"]
    assert len(passes) == 2
    for kernel, grid, given, kwargs in passes:
        assert grid == (device.processors, 1, 1)
        compiled = compile_launch(kernel, given, kwargs, compiler)
        assert compiled.metadata.shared <= device.shared_memory
        assert kwargs["num_warps"] == 4 or not unguarded(compiled.asm["ptx"]), kernel.__name__


def test_a_missing_barrier_is_found() -> None:
    loop = "$L__BB0_1:\n{}\nwgmma.wait_group.sync.aligned 0;\n{}\n@%p1 bra $L__BB0_1;"
    copy, barrier = "cp.async.bulk.tensor.4d [%r1];", "bar.sync 0;"
    assert not unguarded(loop.format(copy, barrier))
    assert not unguarded(loop.format(barrier + "\n" + copy, ""))
    assert unguarded(loop.format(copy, ""))
    assert unguarded(loop.format(barrier, copy))
