"""The Triton kernels as launched: copies, key ranges, remembered launches, far offsets, graphs."""

from __future__ import annotations

import dataclasses
import itertools
import math
import operator
import sys
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from helpers import BATCH, check, inputs
from machine import GPU, INTERPRETED
from oracle import dense_attention
from torch import Tensor

from hf_flash_two import AttentionMask, attention, flash_attention, tensor_cache
from hf_flash_two.kernels.params import AttentionParams
from hf_flash_two.masks import KEY_GROUP

if not (INTERPRETED or GPU):
    pytest.skip(
        "Triton's kernels need a GPU or its interpreter: TRITON_INTERPRET=1 makes a process use it",
        allow_module_level=True,
    )

from hf_flash_two.kernels.triton import (  # noqa: E402
    args,
    backward,
    config,
    decode,
    forward,
    launch,
    ranges,
)

needs_gpu = pytest.mark.skipif(INTERPRETED, reason="the interpreter has neither streams nor code")


@pytest.fixture(autouse=True)
def forget_launches():
    launch.plans.clear()
    attention._calls.clear()
    yield
    launch.plans.clear()
    attention._calls.clear()


def attend(*tensors: Tensor, **arguments) -> Tensor:
    return flash_attention(*tensors, kernel="triton", **arguments)


def results(tensors: list[Tensor], upstream: Tensor, **arguments) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    out, lse = attend(*leaves, return_lse=True, **arguments)
    return [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, upstream)]


def masks(length: int, device: str) -> dict[str, AttentionMask]:
    keep = torch.ones(BATCH, length, device=device)
    keep[0, : length // 3] = 0
    ids = torch.arange(length, device=device) // 40
    return {
        "full": AttentionMask.full(),
        "window": AttentionMask.causal(window=50),
        "padded": AttentionMask.causal() & AttentionMask.from_padding(keep),
        "packed": AttentionMask.from_documents(segment_ids=ids, causal=True),
    }


@pytest.mark.parametrize("name", ["full", "window", "padded", "packed"])
@pytest.mark.parametrize(("head_dim", "value_dim"), [(64, 64), (40, 16)], ids=str)
def test_tma_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, device: str, name: str, head_dim: int, value_dim: int
) -> None:
    """Bit for bit; a tensor whose rows do not start on 16 bytes is left to pointers."""
    if not INTERPRETED and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("TMA came with Hopper")
    if INTERPRETED:
        hopper = config.Device(8, 2**20, tma=True)
        monkeypatch.setattr(config, "device_of", lambda index: hopper)
    copied = []
    for module in (forward, backward):
        monkeypatch.setattr(module, "tma_tiles", lambda *a: copied.append(make(*a)) or copied[-1])
    make = config.tma_tiles
    shapes = dict(heads=(2, 1), head_dim=head_dim, value_dim=value_dim)
    tensors = inputs(132, 132, **shapes, dtype=torch.float16, device=device)
    upstream = torch.randn(BATCH, 2, 132, value_dim, dtype=torch.float16, device=device)
    mask = masks(132, device)[name]
    found = []
    for least in (64, 1000):
        monkeypatch.setattr(config, "_TMA_LENGTH", least)
        launch.plans.clear()
        attention._calls.clear()
        copied.clear()
        found.append(results(tensors, upstream, mask=mask))
        assert copied and all(bool(tma.block) == (least == 64) for tma in copied)
    for by_tma, by_pointer in zip(*found, strict=True):
        assert torch.equal(by_tma, by_pointer)


@pytest.mark.parametrize(("block_q", "block_k"), [(16, 16), (32, 128), (64, 64)], ids=str)
@pytest.mark.parametrize(("query_length", "key_length"), [(300, 300), (70, 413), (1, 200)], ids=str)
def test_key_ranges(
    device: str, query_length: int, key_length: int, block_q: int, block_k: int
) -> None:
    """Every visible key is visited, what counts as whole is, and not much else is looked at."""
    keep = torch.rand(BATCH, key_length, device=device) > 0.02
    keep[0, : key_length // 3] = False
    keep[1] = False
    starts = torch.tensor([0, key_length // 2, key_length // 2 + 1, key_length], device=device)
    for mask in (
        AttentionMask.causal() & AttentionMask.from_padding(keep),
        AttentionMask.from_documents(
            starts, query_cu_seqlens=starts.clamp(max=query_length), causal=True
        ),
        AttentionMask.from_prefix(torch.tensor([7, key_length // 2], device=device), key_length),
    ):
        params = SimpleNamespace(
            key_bounds=mask.key_bounds(), query_offset=mask.resolve_offset(query_length, key_length)
        )
        tiles = config.Tiles(block_q, block_k, 16, 16, 4, 1)
        found = ranges.key_ranges(params, tiles, query_length, key_length)
        visible = mask.to_dense(query_length, key_length, device)[:, 0]
        for batch, tile in itertools.product(*map(range, found.shape[:2])):
            first, last, full, full_end = found[batch, tile].tolist()
            seen = visible[batch, tile * block_q : (tile + 1) * block_q]
            assert not seen[:, : first * block_k].any()
            assert not seen[:, max(first, last) * block_k :].any()
            assert seen[:, full * block_k : full_end * block_k].all()
            keys = seen.any(0).nonzero()
            slack = block_k + KEY_GROUP
            if len(keys):
                assert keys[0] - slack < first * block_k and last * block_k < keys[-1] + slack
            else:
                assert (last - first) * block_k < slack


def test_a_causal_tile_masks_only_its_diagonal(device: str) -> None:
    mask = AttentionMask.causal() & AttentionMask.from_padding(torch.ones(1, 512, device=device))
    params = SimpleNamespace(key_bounds=mask.key_bounds(), query_offset=0)
    tiles = config.Tiles(64, 64, 16, 16, 4, 1)
    first, last, full, full_end = ranges.key_ranges(params, tiles, 512, 512)[0].T.tolist()
    assert first == [0] * 8 and last == list(range(1, 9))
    assert full[1:] == [0] * 7 and full_end[1:] == list(range(1, 8))


def test_remembered_launches_take_new_values(device: str) -> None:
    """Same layout, other tensors, other mask: the second call is computed from its own."""
    for seed in range(3):
        torch.manual_seed(seed)
        tensors = inputs(33, 70, heads=(2, 1), device=device)
        keep = torch.rand(BATCH, 70, device=device) > 0.3
        mask = AttentionMask.causal() & AttentionMask.from_padding(keep)
        causal = torch.arange(70)[None] <= torch.arange(33)[:, None] + 37
        visible = keep.cpu()[:, None, None] & causal
        check("triton", *tensors, mask=mask, visible=visible, softcap=float(seed + 1))
    assert launch.plans


@pytest.fixture(params=["backends", "backends.cuda.matmul"])
def precision(request: pytest.FixtureRequest) -> Iterator[Callable[[str], None]]:
    """Sets what float32 products may use, in either of PyTorch's ways."""
    owner = operator.attrgetter(request.param)(torch)
    yield lambda value: setattr(owner, "fp32_precision", value)
    owner.fp32_precision = "none"


def test_tf32_is_used_where_pytorch_uses_it(
    monkeypatch: pytest.MonkeyPatch, device: str, precision: Callable[[str], None]
) -> None:
    """Not on ROCm. One of the two ways makes PyTorch's older switch raise when it is read."""
    tensors = inputs(20, 70, heads=(2, 1), device=device)
    upstream = torch.ones_like(tensors[0])
    query = SimpleNamespace(dtype=torch.float32, is_cuda=True)
    params = AttentionParams(*[0] * len(AttentionParams._fields))
    exact = results(tensors, upstream)
    assert config.launch_flags(query, query, params).PRECISION == "ieee"
    precision("tf32")
    wanted = "ieee" if torch.version.hip else "tf32"
    assert config.launch_flags(query, query, params).PRECISION == wanted
    for got, want in zip(results(tensors, upstream), exact, strict=True):
        torch.testing.assert_close(got, want, rtol=2**-8, atol=2**-8)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert config.launch_flags(query, query, params).PRECISION == "ieee"


def test_few_launches_are_remembered(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr(launch, "_MOST_PLANS", 3)
    for length in range(70, 78):
        query, key, value = inputs(length, 20, heads=(2, 1), device=device)
        expected = dense_attention(query, key, value)[0]
        torch.testing.assert_close(attend(query, key, value), expected, rtol=1e-4, atol=1e-5)
        assert 0 < len(launch.plans) <= 3


def test_descriptors_are_encoded_once() -> None:
    """A launch that Triton wraps to encode descriptors is given them encoded, and not wrapped."""
    encoded, launched = [], []

    def make_tensordesc_arg(argument, tiles, _):
        encoded.append((argument.data_ptr(), tiles))
        return [f"map {tiles}", *argument.shape]

    def wrap(launcher):
        return lambda *given: launcher(*given[:1], *make_tensordesc_arg(*given[1:], None))

    class Launcher:
        launch = staticmethod(wrap(lambda *given: launched.append(given)))

        def __call__(self, *given):
            self.launch(*given)

    driver = SimpleNamespace(make_tensordesc_arg=make_tensordesc_arg)
    Launcher.__module__ = "a_driver"
    compiled = SimpleNamespace(run=Launcher(), metadata=SimpleNamespace(tensordesc_meta=["first"]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "a_driver", driver)
        run, encode = launch._encoded(compiled)
        x = torch.zeros(64, dtype=torch.float16)
        tma = args.Tma((64,), (1,), (16,))
        call = launch._caller(run, (), (), (x,), [tma], (), encode)
        for _ in range(2):
            call(0, x)
        assert encoded == [(x.data_ptr(), "first")]
        assert launched == [(0, "map first", 64)] * 2
        del driver.make_tensordesc_arg
        assert launch._encoded(compiled) == (compiled.run, None)
    compiled.metadata.tensordesc_meta = []
    assert launch._encoded(compiled) == (compiled.run, None)


def test_a_growing_cache_makes_no_new_plan(device: str) -> None:
    """Nor is anything compiled anew, where lengths are numbers of one kind."""
    for name, kinds in (("full", 1), ("left-padded", 3)):
        launch.plans.clear()
        query, key, value = inputs(1, 340, head_dim=16, value_dim=16, device=device)
        for length in range(300, 309):
            mask = AttentionMask.causal()
            if name == "left-padded":
                keep = torch.arange(length, device=device) >= torch.tensor(
                    [[0], [130]], device=device
                )
                mask = mask & AttentionMask.from_padding(keep)
            keys, values = (x[:, :, :length].contiguous() for x in (key, value))
            got = attend(query, keys, values, mask=mask)
            visible = mask.to_dense(1, length, device)
            expected = dense_attention(query, keys, values, visible=visible)[0]
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        # Rows of intervals start on 16 bytes for every fourth length; one plan more is of ranges.
        assert len(launch.plans) == kinds


def test_a_known_launch_skips_the_jit_unless_a_profiler_watches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []

    class Compiled:
        function, packed_metadata, metadata = "function", "metadata", None

        class Launcher:
            launch = None

            def __call__(self, *given):
                calls.append(given)

        run = Launcher()

    class Kernel:
        arg_names = ("x", "y", "scalar", "SIZE")

        def __getitem__(self, grid):
            def jit(x, y, scalar, **options):
                assert isinstance(y, args.PerHead) and y[1:] == (8, 9)
                calls.append("jit")
                return Compiled()

            return jit

    gpu = SimpleNamespace(
        get_current_device=lambda: 1, get_current_stream=lambda device: 10 + device
    )
    hooks = SimpleNamespace(launch_enter_hook=None, launch_exit_hook=SimpleNamespace(calls=[]))
    monkeypatch.setattr(launch, "CompiledKernel", Compiled)
    monkeypatch.setattr(launch, "driver", SimpleNamespace(active=gpu))
    monkeypatch.setattr(launch, "knobs", SimpleNamespace(runtime=hooks))
    tiles = config.Tiles(16, 16, 16, 16, 4, 1)
    templates = {"y": args.PerHead(None, 8, 9)}
    run = launch.Launch(Kernel(), (7,), templates, (5,), {"SIZE": 3}, tiles)
    tensors = [torch.zeros(1) for _ in range(2)]
    for tensor in tensors:
        run(tensor, tensor)
    address = tensors[1].data_ptr()
    known = (7, 1, 1, 11, "function", "metadata", None, None, None, address, (address, 8, 9), 5, 3)
    assert calls == ["jit", known]
    hooks.launch_exit_hook.calls.append(print)
    run(*tensors)
    assert calls == ["jit", known, "jit"]
    hooks.launch_exit_hook.calls.clear()
    monkeypatch.setattr(launch, "_DIRECT", False)
    run = launch.Launch(Kernel(), (7,), templates, (5,), {"SIZE": 3}, tiles)
    for tensor in tensors:
        run(tensor, tensor)
    assert calls == ["jit", known, *["jit"] * 3]


@pytest.mark.parametrize("layout", [None, "that of a kernel in Gluon"])
def test_descriptors_are_remembered_and_keep_no_tensor_alive(layout: str | None) -> None:
    """What a direct launch is given in place of a tensor that TMA copies."""
    calls = []
    tma = args.Tma((2, 3, 64, 32), (6144, 2048, 32, 1), (1, 1, 16, 32), layout)
    x = torch.zeros(2, 3, 64, 32, dtype=torch.float16)
    template = {"x": tma, "y": args.Tma()}
    run = launch._caller(
        lambda *given: calls.append(given), (), (), (x, x), [*template.values()], ()
    )
    for _ in range(2):
        run(0, x, x)
    (_, first, no_tma), (_, second, _) = calls
    assert first is second and no_tma is None
    assert (first.base.data_ptr(), first.base.dtype) == (x.data_ptr(), x.dtype)
    assert (first.shape, first.block_shape) == ([2, 3, 64, 32], [1, 1, 16, 32])
    kept = weakref.ref(x)
    del x
    calls.clear()
    assert kept() is None


def test_a_missing_compiler_is_named() -> None:
    class Kernel:
        arg_names = ()

        def __getitem__(self, grid):
            def launch(*args, **kwargs):
                raise RuntimeError("Failed to find C compiler. Please specify via CC")

            return launch

    tiles = config.Tiles(16, 16, 16, 16, 4, 1)
    with pytest.raises(RuntimeError, match="no C compiler.*install gcc or clang.*'blockwise'"):
        launch.Launch(Kernel(), (1,), {}, (), {}, tiles)()


@pytest.mark.parametrize("group", [65, 71, 128])
def test_many_heads_to_a_key_decode_together(device: str, group: int) -> None:
    """More than one tile of queries; keys are still read once for all of a tile's heads."""
    tensors = inputs(1, 300, heads=(group, 1), device=device)
    params = SimpleNamespace(bias=None, dense=None, block_q=None, block_k=None)
    assert config.decode_tiles(*tensors, params).tiles.pack_gqa == group
    expected = dense_attention(*tensors)[0]
    torch.testing.assert_close(attend(*tensors), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["causal", "window", "requests", "left-padded"])
def test_the_keys_of_a_part_of_a_prompt_are_split(
    monkeypatch: pytest.MonkeyPatch, device: str, name: str
) -> None:
    """Also those of a server's requests, where tiles of queries would leave processors idle."""
    monkeypatch.setattr(config, "_LONG", (256, 4))
    if INTERPRETED:
        monkeypatch.setattr(config, "device_of", lambda index: config.Device(32, 2**17))
    queries, keys = 70, 333
    tensors = inputs(queries, keys, heads=(2, 1), head_dim=16, value_dim=16, device=device)
    if name == "requests":
        tensors = [x[:1] for x in tensors]
        of_keys = torch.tensor([0, 5, 130, 131, keys], device=device)
        of_queries = torch.tensor([0, 5, 30, 31, queries], device=device)
        mask = AttentionMask.from_documents(
            of_keys, query_cu_seqlens=of_queries, key_length=keys, causal=True
        )
    elif name == "left-padded":
        start = torch.tensor([[0], [290]], device=device)
        keep = torch.arange(keys, device=device) >= start
        mask = AttentionMask.causal() & AttentionMask.from_padding(keep)
    else:
        mask = AttentionMask.causal(window=40 if name == "window" else None)
    query, key, value = tensors
    assert config.decodes(*tensors) and not config.decodes(query, key[:, :, :256], value)
    params = SimpleNamespace(bias=None, dense=None, block_q=None, block_k=None)
    assert config.decode_tiles(*tensors, params).splits(keys) > 1
    check("triton", *tensors, mask=mask, visible=mask.to_dense(queries, keys, device))


@pytest.mark.parametrize("programs", [1, 8, 70, 100, 128, 133, 512, 4096])
def test_decode_keeps_the_processors_busy(programs: int) -> None:
    splits = config._splits(programs, 132, 128)
    waves = programs * splits / 132
    assert waves / math.ceil(waves) > 0.85
    assert config._splits(programs, 132, 1) == config._splits(programs, 132, 0) == 1


def far_apart(length: int, heads: int, dtype: torch.dtype, device: str) -> Tensor:
    """[2, heads, length, 16] whose second row starts past 2^31 elements, most of them untouched."""
    far = 2**31 + 64
    memory = torch.empty(far + heads * length * 16, dtype=dtype, device=device)
    view = memory.as_strided((2, heads, length, 16), (far, length * 16, 16, 1))
    return view.copy_(torch.randn(view.shape, device=device))


@pytest.mark.parametrize("query_length", [1, 40])
def test_offsets_past_32_bits(device: str, query_length: int) -> None:
    if not INTERPRETED and torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of GPU memory")
    shapes = ((query_length, 4), (70, 2), (70, 2))
    tensors = [far_apart(length, heads, torch.float16, device) for length, heads in shapes]
    mask = AttentionMask.causal()
    near = results([tensor.contiguous() for tensor in tensors], upstream := torch.randn(
        2, 4, query_length, 16, dtype=torch.float16, device=device
    ), mask=mask)  # fmt: skip
    for got, want in zip(results(tensors, upstream, mask=mask), near, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-3, atol=2e-3)


def test_one_row_past_32_bits(device: str) -> None:
    """Steps between tokens so large that the last lie past 2^31 elements."""
    if not INTERPRETED and torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of GPU memory")
    step = 2**31 // 64
    memory = torch.empty(70 * step, dtype=torch.float16, device=device)
    far = memory.as_strided((1, 2, 70, 16), (0, 16, step, 1))
    far.copy_(torch.randn(1, 2, 70, 16, device=device))
    near, query = far.contiguous(), torch.randn(1, 2, 33, 16, dtype=torch.float16, device=device)
    for got, want in zip(
        results([query, far, far], torch.ones_like(query)),
        results([query, near, near], torch.ones_like(query)),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=2e-3, atol=2e-3)


def test_a_mask_keeps_nothing_made_while_a_graph_is_captured(
    monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """The graph's memory holds it only once the graph was replayed."""
    tensors = inputs(33, 70, device=device)
    mask = masks(70, device)["padded"]
    bounds = mask.key_bounds()
    monkeypatch.setattr(tensor_cache, "may_be_kept", lambda tensor: False)
    attend(*tensors, mask=mask)
    assert mask.key_bounds() is bounds
    assert not tensor_cache._cache(bounds)._entries
    fresh = masks(70, device)["padded"]
    assert torch.equal(attend(*tensors, mask=fresh), attend(*tensors, mask=mask))
    assert fresh.key_bounds() is not fresh.key_bounds()


@needs_gpu
@pytest.mark.parametrize("query_length", [1, 64])
def test_cuda_graph(device: str, query_length: int) -> None:
    """Nothing in a call waits for the GPU, so a graph takes it and replays it on other values."""
    heads, length = 8, 1000
    query, key, value = inputs(
        query_length, length, heads=(heads, 2), head_dim=64, dtype=torch.bfloat16, device=device
    )
    keep = torch.rand(BATCH, length, device=device) > 0.1
    mask = AttentionMask.causal() & AttentionMask.from_padding(keep)
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    upstream = torch.randn(BATCH, heads, query_length, 64, dtype=torch.bfloat16, device=device)

    def step() -> list[Tensor]:
        out = attend(*leaves, mask=mask)
        return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = step()
    with torch.no_grad():
        for leaf in leaves:
            leaf.normal_()
    graph.replay()
    for got, want in zip(replayed, step(), strict=True):
        assert torch.equal(got, want)


@needs_gpu
def test_nothing_is_compiled_as_the_cache_grows(device: str) -> None:
    import triton

    query, key, value = inputs(1, 700, head_dim=64, dtype=torch.bfloat16, device=device)
    compiled = []

    def decode(lengths: range) -> None:
        for length in lengths:
            attend(query, key[:, :, :length], value[:, :, :length])

    decode(range(250, 300))
    before = triton.knobs.runtime.jit_post_compile_hook
    triton.knobs.runtime.jit_post_compile_hook = lambda **given: compiled.append(given)
    try:
        decode(range(300, 700))
    finally:
        triton.knobs.runtime.jit_post_compile_hook = before
    # From all keys in one program to several programs is one kernel more.
    assert len(compiled) <= 1


def split_call(rows: int, device: str, dtype: torch.dtype = torch.float16) -> list[Tensor]:
    """Few queries over so many keys that programs share them."""
    return inputs(rows, 700, heads=(4, 2), head_dim=32, dtype=dtype, device=device)


@pytest.mark.parametrize("rows", [1, 3])
def test_programs_that_share_keys_find_and_leave_zeros(device: str, rows: int) -> None:
    tensors = split_call(rows, device)
    with torch.no_grad():
        first, _ = attend(*tensors, mask=AttentionMask.causal(), return_lse=True)
        again = attend(*tensors, mask=AttentionMask.causal())
    assert decode._ZEROS
    assert all(not zeros.any() for zeros in decode._ZEROS.values())
    assert torch.equal(first, again)


@needs_gpu
def test_programs_that_share_keys_on_several_streams(device: str) -> None:
    """Each stream counts apart, and so does each graph, wherever it is replayed."""
    calls = [split_call(1, device) for _ in range(4)]
    with torch.no_grad():
        want = [attend(*tensors) for tensors in calls]
        streams = [torch.cuda.Stream() for _ in calls]
        graphs, replayed = [torch.cuda.CUDAGraph() for _ in calls], []
        torch.cuda.synchronize()
        for graph, tensors in zip(graphs, calls, strict=True):
            with torch.cuda.graph(graph):
                replayed.append([attend(*tensors) for _ in range(20)])
        made = []
        for _ in range(5):
            for stream, graph, tensors in zip(streams, graphs, calls, strict=True):
                with torch.cuda.stream(stream):
                    graph.replay()
                    made.append([attend(*tensors) for _ in range(20)])
        torch.cuda.synchronize()
    for index, outs in enumerate([*made, *replayed]):
        assert all(torch.equal(out, want[index % len(calls)]) for out in outs)


# Hidden pairs, whatever they hold


def hiding(name: str, query_length: int, length: int, device: str) -> AttentionMask:
    """Masks whose tiles hold hidden pairs beside visible ones."""
    keep = torch.ones(BATCH, length, device=device)
    keep[0, : length // 3] = 0
    keep[1, length // 2 : length // 2 + 10] = 0
    some = torch.rand(BATCH, 1, query_length, length).to(device) > 0.4
    some[:, :, 1] = some[..., 5] = False
    if name == "packed":
        ids = torch.arange(length, device=device) // 25
        return AttentionMask.from_documents(segment_ids=ids, causal=True)
    return {
        "causal": AttentionMask.causal(),
        "window": AttentionMask.causal(window=20),
        "padded": AttentionMask.causal() & AttentionMask.from_padding(keep),
        "dense": AttentionMask.from_dense(some),
    }[name]


class Hidden:
    """One call with a mask, to be repeated with some of its numbers replaced."""

    def __init__(self, name: str, query_length: int, length: int, device: str, **given) -> None:
        self.mask = hiding(name, query_length, length, device)
        visible = self.mask.to_dense(query_length, length, device)[:, 0]
        self.visible = visible.expand(BATCH, -1, -1)
        query, key, value = inputs(query_length, length, heads=(2, 1), device=device, **given)
        d_out = torch.randn(query.shape, dtype=query.dtype).to(device)
        self.tensors = {"query": query, "key": key, "value": value, "d_out": d_out}
        if name == "dense":
            self.tensors["bias"] = torch.randn(1, 2, query_length, length).to(device)

    def run(self, change: Callable[[dict[str, Tensor]], None]) -> dict[str, Tensor]:
        tensors = {name: tensor.clone() for name, tensor in self.tensors.items()}
        change(tensors)
        d_out = tensors.pop("d_out")
        leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
        # Small tiles: some are whole, some are hidden in part.
        out, lse = attend(
            **leaves, mask=self.mask, return_lse=True, q_bucket_size=32, k_bucket_size=32
        )
        grads = torch.autograd.grad(out, list(leaves.values()), d_out)
        found = {f"d_{name}": grad for name, grad in zip(leaves, grads, strict=True)}
        return found | {"out": out.detach(), "lse": lse.detach()}


SQUARE = [("padded", 70, 70), ("dense", 70, 70), ("packed", 70, 70), ("causal", 70, 70)]
SPLIT = [("padded", 2, 400), ("dense", 2, 400)]
BIG = [
    pytest.param(name, 300, 300, dtype, dim, marks=needs_gpu)
    for name, dtype, dim in itertools.product(
        ("padded", "dense", "packed", "causal", "window"),
        (torch.bfloat16, torch.float16, torch.float32),
        (64, 128, 256),
    )
]


def of_few(cases: list) -> list:
    return [(*case, torch.float32, 16) for case in cases]


@pytest.mark.parametrize("poison", [math.nan, pytest.param(math.inf, marks=needs_gpu)])
@pytest.mark.parametrize(
    ("name", "query_length", "length", "dtype", "dim"), of_few(SQUARE[:1] + SPLIT) + BIG, ids=str
)
def test_who_is_seen_by_nobody_does_not_matter(
    device: str,
    name: str,
    query_length: int,
    length: int,
    dtype,
    dim: int,
    poison: float,
) -> None:
    """Padding keys and rows that see nothing: bit for bit what finite numbers give there."""
    call = Hidden(name, query_length, length, device, dtype=dtype, head_dim=dim)

    def change(tensors: dict[str, Tensor]) -> None:
        for names, axis in ((("key", "value"), 1), (("query", "d_out"), 2)):
            alone = ~call.visible.any(axis)
            for each in names:
                tensors[each].masked_fill_(alone[:, None, :, None], poison)

    clean, found = call.run(lambda tensors: None), call.run(change)
    for what, tensor in found.items():
        assert torch.equal(tensor, clean[what]), what


@pytest.mark.parametrize(
    ("name", "query_length", "length", "dtype", "dim"), of_few(SQUARE[1:3] + SPLIT) + BIG, ids=str
)
def test_what_is_not_finite_reaches_only_who_sees_it(
    device: str, name: str, query_length: int, length: int, dtype, dim: int
) -> None:
    """One key, one value or one row: all others that do not meet it stay bit for bit the same."""
    call = Hidden(name, query_length, length, device, dtype=dtype, head_dim=dim)
    visible, clean = call.visible, call.run(lambda tensors: None)
    key, row = (30, 40) if query_length > 2 else (length - 1, 0)
    its_own = torch.zeros_like(visible[..., 0])
    its_own[:, row] = True

    def bad_key(tensors: dict[str, Tensor]) -> None:
        tensors["key"][:, :, key] = math.nan

    def bad_value(tensors: dict[str, Tensor]) -> None:
        tensors["value"][:, :, key, 3] = math.nan
        tensors["value"][:, :, key, 5] = math.inf

    def bad_row(tensors: dict[str, Tensor]) -> None:
        tensors["query"][:, :, row] = math.inf
        tensors["d_out"][:, :, row] = math.nan

    seers = visible[..., key]
    for change, rows in ((bad_key, seers), (bad_value, seers), (bad_row, its_own)):
        assert rows.any() and not rows.all()
        found = call.run(change)
        keys = (visible & rows[..., None]).any(1)  # that share a row with it
        for names, apart in (
            (("out", "lse", "d_query"), ~rows), (("d_key", "d_value"), ~keys),
        ):  # fmt: skip
            for each in names:
                same = found[each].eq(clean[each]) | ~apart.reshape(
                    BATCH, 1, -1, *[1] * (found[each].dim() - 3)
                )
                assert same.all(), (change.__name__, each)
        if change is bad_value:
            seen = rows[:, None].expand(-1, 2, -1)
            assert torch.equal(found["out"][..., 3].isnan(), seen)
            assert torch.equal(~found["out"][..., 5].isfinite(), seen)
            others = [column for column in range(dim) if column not in (3, 5)]
            assert torch.equal(found["out"][..., others], clean["out"][..., others])


@pytest.mark.parametrize(("name", "processors"), [("causal", 1), ("padded", 3)])
def test_what_another_kernel_marks_is_computed_anew(
    monkeypatch: pytest.MonkeyPatch, device: str, name: str, processors: int
) -> None:
    """Whole tiles with a marked row, and no others, where programs share many tiles."""
    length, mask = 100, masks(100, device) | {"causal": AttentionMask.causal()}
    query, key, value = inputs(length, length, heads=(4, 2), device=device)
    few = dataclasses.replace(config.device_of(query.device.index), processors=processors)
    monkeypatch.setattr(config, "device_of", lambda index: few)
    params = AttentionParams(
        *mask[name].intervals or (None, None), mask[name].key_bounds(), None, None, None, None,
        None, 0, mask[name].window_left, mask[name].window_right, 0.25, 0.0, 0.0, 16, 16,
    )  # fmt: skip
    out, lse = forward.forward(query, key, value, params)
    d_out = torch.randn_like(out)
    call = (d_out, None, query, key, value, out, lse, params)
    *expected, _, _ = backward.backward(*call, False)
    padded = torch.zeros(2, *lse.shape[:2], 128, device=device)
    padded[0, ..., :length] = torch.where(lse.isinf(), 0, lse / math.log(2))
    padded[1, ..., :length] = (out * d_out).sum(-1)
    marked = [torch.zeros(x.shape[:3], dtype=torch.int8, device=device) for x in (query, key)]
    rows, keys = [(0, 0, 31), (1, 0, 40), (1, 0, 64), (1, 3, 99)], [(0, 1, 99), (1, 1, 0)]
    for flags, places in zip(marked, (rows, keys), strict=True):
        for place in places:
            flags[place] = 1
    found = [torch.randn_like(x) for x in expected]
    wanted = [x.clone() for x in found]
    backward.replace_marked(tuple(marked), args.Rows(*padded, None), *call, *found)
    tiles = config.marked_tiles(query, value)
    of_keys = keys, tiles.dkdv.block_k
    passes = [(rows, tiles.dq.block_q), of_keys, of_keys]
    for want, got, right, (places, block) in zip(wanted, found, expected, passes, strict=True):
        for batch, head, at in places:
            tile = batch, head, slice(at // block * block, at // block * block + block)
            torch.testing.assert_close(got[tile], right[tile])
            want[tile] = got[tile]
        assert torch.equal(got, want)


@pytest.mark.parametrize(("query_length", "key_length"), [(70, 150), (2, 300)])
@pytest.mark.parametrize("low", [torch.finfo(torch.float32).min, -1e9])
def test_a_bias_that_is_low_everywhere_hides_nothing(
    device: str, low: float, query_length: int, key_length: int
) -> None:
    """It shifts all scores of a row alike, as in the dense formula, and what it rounds away."""
    query, key, value = inputs(query_length, key_length, heads=(2, 1), device=device)
    bias = torch.zeros(1, 1, query_length, key_length, device=device)
    bias[:, :, 0] = low
    bias[:, :, 1, 50:] = low
    upstream = torch.randn_like(query)
    results = []
    for function in (lambda *t, bias: attend(*t, bias=bias, return_lse=True), dense_attention):
        leaves = [x.clone().requires_grad_() for x in (query, key, value, bias)]
        out, lse = function(*leaves[:3], bias=leaves[3])
        results.append([out, lse, *torch.autograd.grad(out, leaves, upstream)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    ("heads", "query_length", "key_length", "batch"), [((0, 2), 5, 7, 2), ((4, 2), 0, 7, 2)],
    ids=["Hq0", "Tq0"],
)  # fmt: skip
def test_no_queries_leave_gradients_of_zero(
    device: str, heads: tuple[int, int], query_length: int, key_length: int, batch: int
) -> None:
    tensors = inputs(query_length, key_length, heads=heads, batch=batch, device=device)
    leaves = [x.requires_grad_() for x in (*tensors, torch.ones(1, 1, 1, 1, device=device))]
    out = attend(*leaves[:3], bias=leaves[3])
    for leaf, grad in zip(leaves, torch.autograd.grad(out.sum(), leaves), strict=True):
        assert torch.equal(grad, torch.zeros_like(leaf))


@pytest.mark.parametrize("query_length", [40, 1])
def test_per_head_tensors_are_read_by_their_strides(device: str, query_length: int) -> None:
    """Also where they are given to the op itself, which makes no copies."""
    tensors = inputs(query_length, 300, heads=(2, 1), device=device)
    fields = dict.fromkeys(AttentionParams._fields) | dict(
        query_offset=300 - query_length, scale=0.25, softcap=0.0, dropout_p=0.0
    )
    columns = torch.randn(2, 3).to(device)
    outs = []
    for lay_out in (lambda x: x, Tensor.contiguous):
        slopes, sinks = (lay_out(columns[None, :, index]) for index in (0, 2))
        params = AttentionParams(**fields | {"alibi_slopes": slopes, "sinks": sinks})
        leaves = [x.clone().requires_grad_() for x in tensors]
        out, lse, _ = torch.ops.hf_flash_two.flash_attn_fwd(*leaves, *params, "triton")
        grads = torch.ops.hf_flash_two.flash_attn_bwd(
            torch.ones_like(out), None, *leaves, out, lse, *params, "triton", False
        )
        outs.append([out, lse, *grads])
    for strided, contiguous in zip(*outs, strict=True):
        assert torch.equal(strided, contiguous)


@needs_gpu
def test_what_a_mask_keeps_is_read_on_any_stream(device: str) -> None:
    """Key ranges still being made on one stream, when another wants them."""
    tensors = inputs(300, 300, dtype=torch.float16, device=device)
    expected = attend(*tensors, mask=masks(300, device)["padded"])
    mask = masks(300, device)["padded"]
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(2 * 10**9)
        attend(*tensors, mask=mask)
    with torch.cuda.stream(torch.cuda.Stream()):
        found = attend(*tensors, mask=mask)
    torch.cuda.synchronize()
    assert torch.equal(found, expected)
