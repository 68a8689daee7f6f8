"""The op under everything that traces, transforms or recomputes it."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from helpers import Watched, inputs
from machine import GPU, KERNELS
from oracle import dense_attention
from torch import Tensor
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import BaseTorchFunctionMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from hf_flash_two import AttentionMask, attention, flash_attention
from hf_flash_two.op import FORWARD_NAMES, is_eager
from hf_flash_two.testing import KernelCall, kernel_calls

FORWARD = torch.ops.hf_flash_two.flash_attn_fwd
BACKWARD = torch.ops.hf_flash_two.flash_attn_bwd
FORWARD_JVP = torch.ops.hf_flash_two.flash_attn_fwd_jvp
BACKWARD_JVP = torch.ops.hf_flash_two.flash_attn_bwd_jvp


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def transposed(query_length: int, key_length: int, **options) -> list[Tensor]:
    """As Transformers hands them over: [B, T, H, D] seen as [B, H, T, D]."""
    return [
        x.transpose(1, 2).contiguous().transpose(1, 2)
        for x in inputs(query_length, key_length, **options)
    ]


def op_arguments(monkeypatch: pytest.MonkeyPatch, tensors: list[Tensor], **arguments) -> tuple:
    """What `flash_attention` passes to the forward op."""
    seen = []

    def record(query, key, value, params, kernel, return_lse, *_):
        seen.extend([query, key, value, *params, kernel])
        return query

    with monkeypatch.context() as patch:
        patch.setattr(attention, "flash_attn", record)
        flash_attention(*tensors, kernel="blockwise", **arguments)
    return tuple(seen)


OP_CASES = {
    "plain": lambda: {},
    "causal": lambda: {"mask": AttentionMask.causal(window=5)},
    "padding": lambda: {"mask": AttentionMask.from_padding(torch.rand(2, 20) > 0.3)},
    "dense": lambda: {"mask": torch.rand(9, 20) > 0.3},
    "bias": lambda: {"bias": torch.randn(1, 6, 9, 20)},
    "bias-transposed": lambda: {"bias": torch.randn(1, 20, 9, 6).transpose(1, 3)},
    "bias-expanded": lambda: {"bias": torch.randn(1, 1, 9, 20).expand(2, 6, 9, 20)},
    "sinks": lambda: {"sinks": torch.randn(6), "alibi_slopes": torch.rand(6), "softcap": 3.0},
    "dropout": lambda: {"dropout_p": 0.2, "dropout_seed": 5},
    "max-logits": lambda: {"return_max_logits": True},
    "buckets": lambda: {"q_bucket_size": 4, "k_bucket_size": 64},
}

CHECKS = ("test_schema", "test_faketensor", "test_autograd_registration")


@pytest.mark.parametrize("case", OP_CASES.values(), ids=OP_CASES)
@pytest.mark.parametrize("make", [inputs, transposed], ids=["contiguous", "transposed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_opcheck(monkeypatch, make: Callable, dtype: torch.dtype, case: Callable) -> None:
    """Schema, shapes and strides of the fakes, and in float32 the tracing of both ops."""
    checks = CHECKS + (("test_aot_dispatch_dynamic",) if dtype == torch.float32 else ())
    tensors = make(9, 20, dtype=dtype, value_dim=24)
    arguments = op_arguments(monkeypatch, tensors, **case())
    torch.library.opcheck(FORWARD, arguments, test_utils=checks)
    out, lse, _ = FORWARD(*arguments)
    d_out, d_lse = torch.randn_like(out), torch.randn_like(lse)
    backward = (*arguments[:3], out, lse, *arguments[3:], "bias" in case())
    torch.library.opcheck(BACKWARD, (d_out, d_lse, *backward), test_utils=checks)
    torch.library.opcheck(BACKWARD, (d_out, None, *backward), test_utils=CHECKS)
    torch.library.opcheck(BACKWARD, (None, d_lse, *backward), test_utils=CHECKS)


@pytest.mark.parametrize("case", OP_CASES.values(), ids=OP_CASES)
def test_opcheck_of_derivatives(monkeypatch, case: Callable) -> None:
    arguments = op_arguments(monkeypatch, transposed(9, 20, value_dim=24), **case())
    inputs, settings = arguments[:3], arguments[3:]
    results = FORWARD(*arguments)[:2]
    given = case()
    along = (*map(torch.randn_like, inputs), given.get("bias"), None)
    torch.library.opcheck(FORWARD_JVP, (*inputs, *results, *along, *settings), test_utils=CHECKS)
    upstream = (torch.randn_like(results[0]), None)
    for more in ((upstream[0], results[1]), (None, None)):
        call = (*upstream, *inputs, *results, *more, *along, *settings, "bias" in given)
        torch.library.opcheck(BACKWARD_JVP, call, test_utils=CHECKS)


def test_max_logits_is_a_constant() -> None:
    """To every derivative, forward, backward and mapped."""
    query, key, value = inputs(9, 20)
    along = torch.randn_like(query)

    def both(query: Tensor) -> tuple[Tensor, Tensor]:
        return flash_attention(query, key, value, return_max_logits=True)

    def total(query: Tensor) -> Tensor:
        return sum(x.sum() for x in both(query))

    def alone(query: Tensor) -> Tensor:
        return flash_attention(query, key, value)

    (_, largest), (got, tangent) = torch.func.jvp(both, (query,), (along,))
    torch.testing.assert_close(got, torch.func.jvp(alone, (query,), (along,))[1])
    assert largest.any() and not tangent.any()
    queries = torch.stack([query, along])
    got = torch.vmap(torch.func.grad(total))(queries)
    torch.testing.assert_close(got, torch.vmap(torch.func.grad(lambda x: alone(x).sum()))(queries))


# The thin path of eager mode


def with_gradients(tensors: list[Tensor], **arguments) -> tuple[str, list[Tensor]]:
    """The name of the node that autograd recorded; out, lse and all gradients."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    extras = {
        name: arguments[name].detach().requires_grad_()
        for name in ("bias", "sinks")
        if name in arguments
    }
    out, lse, *rest = flash_attention(*leaves, return_lse=True, **(arguments | extras))
    torch.manual_seed(1)
    upstream = [torch.randn_like(x) for x in (out, lse)]
    grads = torch.autograd.grad((out, lse), [*leaves, *extras.values()], upstream)
    return out.grad_fn.name(), [out.detach(), lse.detach(), *rest, *grads]


@pytest.mark.parametrize("case", OP_CASES.values(), ids=OP_CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_eager_mode_equals_the_op(dtype: torch.dtype, case: Callable) -> None:
    """Bit for bit; a mode that watches operations sees the ops, and nothing else does."""
    tensors, arguments = inputs(9, 20, dtype=dtype), case()
    node, thin = with_gradients(tensors, **arguments)
    assert node == "_EagerBackward"
    with Watched() as watched:
        node, through_op = with_gradients(tensors, **arguments)
    assert node == "_ForwardBackward"
    calls = [name for name in watched.seen if "flash_attn" in name]
    assert calls == ["hf_flash_two.flash_attn_fwd.default", "hf_flash_two.flash_attn_bwd.default"]
    for got, want in zip(thin, through_op, strict=True):
        assert torch.equal(got, want)
    with torch.no_grad():
        alone = flash_attention(*tensors, return_lse=True, **arguments)
    for got, want in zip(alone, thin, strict=False):
        assert torch.equal(got, want)


class Subclass(Tensor):
    pass


WATCHERS = {
    "dispatch mode": Watched,
    "function mode": BaseTorchFunctionMode,
    "fake tensors": FakeTensorMode,
    "forward-mode derivatives": forward_ad.dual_level,
}


@pytest.mark.parametrize("watcher", WATCHERS.values(), ids=WATCHERS)
def test_whoever_watches_meets_the_op(watcher: Callable) -> None:
    tensors = inputs(9, 20)
    assert is_eager(*tensors)
    with watcher():
        assert not is_eager(*tensors)


@pytest.mark.parametrize("kernel", ["blockwise", "fused_cpu"])
@pytest.mark.parametrize("default", ["cpu", "meta"])
def test_a_default_device_is_no_watcher(default: str, kernel: str) -> None:
    """`torch.set_default_device`: the same bits by the thin path, wherever new tensors would be."""
    tensors = [x.requires_grad_() for x in inputs(40, 60)]
    mask = AttentionMask.causal(window=30) & AttentionMask.from_padding(torch.ones(2, 60))
    upstream = torch.randn(2, 6, 40, 16)

    def run() -> tuple[Tensor, ...]:
        out = flash_attention(*tensors, mask=mask, kernel=kernel)
        with torch.no_grad():
            assert torch.equal(flash_attention(*tensors, mask=mask, kernel=kernel), out)
        return out, *torch.autograd.grad(out, tensors, upstream)

    want = run()
    with torch.device(default):
        assert is_eager(*tensors)
        for a, b in zip(run(), want, strict=True):
            assert torch.equal(a, b)


def test_subclasses_and_transforms_meet_the_op() -> None:
    tensors = inputs(9, 20)
    found = []
    assert is_eager(*map(torch.nn.Parameter, tensors), None)
    assert not is_eager(tensors[0].as_subclass(Subclass))
    assert not is_eager(tensors[0].to("meta"))
    torch.vmap(lambda x: found.append(is_eager(x)) or x)(tensors[0])
    torch.func.grad(lambda x: found.append(is_eager(x)) or x.sum())(tensors[0])
    torch.jit.trace(lambda x: found.append(is_eager(x)) or x + 1, tensors[0], check_trace=False)
    assert found == [False, False, False]


def test_the_backward_alone_may_be_watched() -> None:
    """The forward took the thin path; a mode around the backward sees the op, same bits."""
    tensors = [x.requires_grad_() for x in inputs(9, 20)]
    upstream = torch.randn(2, 6, 9, 16)
    out = flash_attention(*tensors)
    want = torch.autograd.grad(out, tensors, upstream[..., : out.shape[3]], retain_graph=True)
    with Watched() as watched:
        got = torch.autograd.grad(out, tensors, upstream[..., : out.shape[3]])
    assert "hf_flash_two.flash_attn_bwd.default" in watched.seen
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_a_kind_of_call_is_checked_once_and_again_when_it_changes() -> None:
    """What was checked for one call is not taken for another."""
    query, key, value = inputs(9, 20)
    for _ in range(2):
        flash_attention(query, key, value, scale=1.0)
        with pytest.raises(ValueError, match="key: expected"):
            flash_attention(query, key[:1], value)
        with pytest.raises(ValueError, match="dropout_p: expected"):
            flash_attention(query, key, value, dropout_p=1)
        with pytest.raises(ValueError, match="q_bucket_size: expected"):
            flash_attention(query, key, value, q_bucket_size=64.0)
        flash_attention(query, key, value, q_bucket_size=64)
    scale = torch.tensor(0.5)
    first = flash_attention(query, key, value, scale=scale)
    scale.fill_(2.0)
    second = flash_attention(query, key, value, scale=scale)
    assert not torch.equal(first, second)
    assert torch.equal(second, flash_attention(query, key, value, scale=2.0))


def test_what_is_known_of_a_kind_of_call_is_not_taken_for_another(kernel: str, device: str) -> None:
    """Calls of one shape whose masks and settings differ, and masks whose values do."""
    query, key, value = inputs(9, 20, heads=(2, 1), dtype=torch.float16, device=device)
    keep = [torch.rand(2, 20, device=device) > 0.4 for _ in range(2)]
    masks = [
        None, AttentionMask.causal(), AttentionMask.causal(3), AttentionMask.causal(5),
        AttentionMask.causal(query_offset=2), AttentionMask.window(2, 4),
        *map(AttentionMask.from_padding, keep), AttentionMask.from_padding(keep[0][:1]),
    ]  # fmt: skip
    settings: list[dict] = [{}, {"scale": 0.5}, {"softcap": 2.0}, {"scale": 0.0}]
    calls = [{"mask": mask, **given} for mask in masks for given in settings]

    def run(**given) -> Tensor:
        return flash_attention(query, key, value, kernel=kernel, **given)

    want = []
    for call in calls:
        attention._calls.clear()
        want.append(run(**call))
    for _ in range(2):
        for call, out in zip(calls, want, strict=True):
            assert torch.equal(run(**call), out)
    assert len({tuple(out.flatten().tolist()) for out in want}) == len(want)


def test_a_known_backward_takes_every_layout(kernel: str, device: str) -> None:
    """Gradients and saved tensors come in layouts of their own; each is as if it were the first."""
    made = inputs(9, 20, heads=(2, 1), dtype=torch.float16, device=device)
    tensors = [x.requires_grad_() for x in made]
    upstream = torch.randn_like(flash_attention(*tensors, kernel=kernel))
    rows = upstream[:, :, :1].expand_as(upstream)
    room = upstream.new_empty(upstream.numel() + 1)[1:].view_as(upstream)
    strided = upstream.mT.contiguous().mT
    gradients = [upstream, upstream.transpose(1, 2).contiguous().transpose(1, 2), strided]
    gradients += [rows, room.copy_(upstream), upstream]

    def turned(x: Tensor) -> Tensor:
        return x.mT.contiguous().mT if x.dim() == 4 else x.clone()

    def run(d_out: Tensor, hooks: bool = False) -> tuple[Tensor, ...]:
        with saved_tensors_hooks(turned, lambda x: x) if hooks else nullcontext():
            out = flash_attention(*tensors, mask=AttentionMask.causal(), kernel=kernel)
        return torch.autograd.grad(out, tensors, d_out)

    want = []
    for d_out in gradients:
        attention._calls.clear()
        want.append(run(d_out))
    attention._calls.clear()
    for hooks in (False, True, False):
        for d_out, expected in zip(gradients, want, strict=True):
            for got, one in zip(run(d_out, hooks), expected, strict=True):
                assert torch.equal(got, one)


def test_torch_may_insist_on_determinism(monkeypatch: pytest.MonkeyPatch) -> None:
    """What kernels are told, call by call; the default never asks for less."""
    at = FORWARD_NAMES.index("deterministic")

    def told(**given) -> bool:
        return op_arguments(monkeypatch, inputs(9, 20), **given)[at]

    assert told() and told(deterministic=True) and not told(deterministic=False)
    torch.use_deterministic_algorithms(True)
    try:
        assert told(deterministic=False)
    finally:
        torch.use_deterministic_algorithms(False)
    with pytest.raises(ValueError, match="deterministic: expected True or False, got None"):
        told(deterministic=None)


# torch.compile


class Layer(torch.nn.Module):
    """Projections around the attention, with a mask made outside as Transformers makes it."""

    def __init__(self) -> None:
        super().__init__()
        self.project = torch.nn.Linear(24, 3 * 24)

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        query, key, value = self.project(x).unflatten(-1, (3, 4, 6)).permute(2, 0, 3, 1, 4)
        mask = AttentionMask.causal()
        if keep is not None:
            mask = mask & AttentionMask.from_padding(keep)
        out = flash_attention(query, key[:, :2], value[:, :2], mask=mask)
        return out.transpose(1, 2).flatten(2)


def train(layer: Callable, parameters: list[Tensor], *arguments) -> list[Tensor]:
    out = layer(*arguments)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), parameters)]


def check_compiled(backend, padded: bool, lengths: tuple[int, ...], **options) -> list[int]:
    """Results and gradients equal the layer's own; how many graphs there were after each length."""
    layer = Layer()
    compiled = torch.compile(layer, backend=backend, fullgraph=True, **options)
    parameters = list(layer.parameters())
    counts = []
    for length in lengths:
        x = torch.randn(2, length, 24)
        keep = (torch.rand(2, length) > 0.3,) if padded else ()
        got, want = train(compiled, parameters, x, *keep), train(layer, parameters, x, *keep)
        torch.testing.assert_close(got, want)
        counts.append(getattr(backend, "frame_count", 0))
    return counts


@pytest.mark.parametrize("padded", [False, True], ids=["causal", "padded"])
def test_compile_fullgraph(padded: bool) -> None:
    check_compiled("aot_eager", padded, (40,))


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_compile_with_inductor() -> None:
    """The strides it was promised are asserted at run time."""
    check_compiled("inductor", True, (40,))


@pytest.mark.parametrize("padded", [False, True], ids=["causal", "padded"])
def test_one_graph_for_every_length(padded: bool) -> None:
    """With dynamic shapes the first compilation serves all lengths, by default the second."""
    lengths = (80, 81, 150, 128, 333)
    assert check_compiled(CompileCounter(), padded, lengths, dynamic=True) == [1, 1, 1, 1, 1]
    torch._dynamo.reset()
    assert check_compiled(CompileCounter(), padded, lengths) == [1, 2, 2, 2, 2]
    torch._dynamo.reset()
    short = check_compiled(CompileCounter(), padded, (80, 40, 33, 64, 81), dynamic=True)
    assert short == [1, 1, 1, 1, 1]


def test_backward_compiles_once_for_every_length() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    first, *later = check_compiled(counter, True, (80, 150, 128), dynamic=True)
    assert later == [first, first]


def test_no_graph_break_with_every_argument() -> None:
    def function(query, key, value, bias, sinks, slopes, seed):
        mask = AttentionMask.causal(window=11) & AttentionMask.chunked(16, key.shape[2])
        out, lse = flash_attention(
            query,
            key,
            value,
            mask=mask,
            bias=bias,
            sinks=sinks,
            alibi_slopes=slopes,
            softcap=5.0,
            scale=0.2,
            dropout_p=0.3,
            dropout_seed=seed,
            return_lse=True,
            q_bucket_size=16,
        )
        return out.sum() + lse.sum()

    leaves = transposed(30, 40) + [torch.randn(1, 6, 1, 40), torch.randn(6)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    others = (torch.rand(6), torch.tensor([7]))
    explanation = torch._dynamo.explain(function)(*leaves, *others)
    assert explanation.graph_break_count == 0 and explanation.graph_count == 1
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    got = torch.autograd.grad(compiled(*leaves, *others), leaves)
    torch.testing.assert_close(got, torch.autograd.grad(function(*leaves, *others), leaves))


def test_compile_draws_its_own_seeds() -> None:
    def function(*tensors):
        return flash_attention(*tensors, dropout_p=0.5)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    tensors = inputs(9, 20)
    assert not torch.equal(compiled(*tensors), compiled(*tensors))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_compile_under_autocast(dtype: torch.dtype) -> None:
    """Query and key arrive in float32, value in the lower dtype, as after rotary embeddings."""

    def function(query, key, value):
        with torch.autocast("cpu", dtype=dtype):
            return flash_attention(query, key, value.to(dtype), mask=AttentionMask.causal())

    leaves = [leaf.requires_grad_() for leaf in transposed(9, 20)]
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    got, want = compiled(*leaves), function(*leaves)
    assert got.dtype == dtype
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(
        torch.autograd.grad(got.float().sum(), leaves),
        torch.autograd.grad(want.float().sum(), leaves),
    )


@pytest.mark.parametrize("example", [20, 80])
@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
def test_export(strict: bool, example: int) -> None:
    """One op in the graph, for any length."""
    length = torch.export.Dim("length", min=2, max=4096)
    program = torch.export.export(
        Layer(),
        (torch.randn(2, example, 24), torch.rand(2, example) > 0.3),
        dynamic_shapes=({1: length}, {1: length}),
        strict=strict,
    )
    graphs = [
        m.graph for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)
    ]
    targets = [str(node.target) for graph in graphs for node in graph.nodes]
    assert sum("flash_attn" in target for target in targets) == 1
    layer = Layer()
    module = program.module()
    module.load_state_dict(layer.state_dict())
    for size in (5, 64, 65, 80, 177):
        x, keep = torch.randn(2, size, 24), torch.rand(2, size) > 0.3
        torch.testing.assert_close(module(x, keep), layer(x, keep))


# Recomputation


@pytest.fixture
def calls() -> Iterator[list[KernelCall]]:
    """The kernels' runs, in order."""
    with kernel_calls(backward=True) as calls:
        yield calls


def check_recomputed(wrap: Callable, **arguments) -> None:
    """The gradients under ``wrap`` are those without it, bit for bit."""
    leaves = [leaf.requires_grad_() for leaf in inputs(30, 40)]

    def block(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        torch.manual_seed(1)
        return flash_attention(
            query * 2, key, value, mask=AttentionMask.causal(), **arguments
        ).sin()

    plain = torch.autograd.grad(block(*leaves).sum(), leaves)
    wrap(block, *leaves).sum().backward()
    for leaf, want in zip(leaves, plain, strict=True):
        assert torch.equal(leaf.grad, want)


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_checkpoint(calls: list[KernelCall], reentrant: bool, dropout_p: float) -> None:
    check_recomputed(
        lambda block, *leaves: checkpoint(block, *leaves, use_reentrant=reentrant),
        dropout_p=dropout_p,
    )
    directions = [call.direction for call in calls]
    assert directions == ["forward", "backward", "forward", "forward", "backward"]


def test_selective_checkpoint_saves_the_attention(calls: list[KernelCall]) -> None:
    """A policy that knows the op by its name, as TRL's does, spares the second forward."""

    def policy(context, function, *arguments, **options) -> CheckpointPolicy:
        save = "flash_attn" in str(function)
        return CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.PREFER_RECOMPUTE

    def wrap(block: Callable, *leaves: Tensor) -> Tensor:
        def contexts():
            return create_selective_checkpoint_contexts(policy)

        return checkpoint(block, *leaves, use_reentrant=False, context_fn=contexts)

    check_recomputed(wrap)
    assert [call.direction for call in calls] == ["forward", "backward", "forward", "backward"]


# torch.func


MAPPED = {
    "query": (0, None, None),
    "query-key-value": (0, 0, 0),
    "key-value": (None, 0, 0),
    "last-axis": (3, 0, None),
}


@pytest.mark.parametrize("in_dims", MAPPED.values(), ids=MAPPED)
def test_vmap(in_dims: tuple) -> None:
    """Over any of the tensors, along any axis, equal to a loop."""
    query, key, value = inputs(9, 20)
    tensors = [
        tensor if dim is None else torch.randn(*tensor.shape[:dim], 3, *tensor.shape[dim:])
        for tensor, dim in zip((query, key, value), in_dims, strict=True)
    ]
    mask = AttentionMask.causal() & AttentionMask.from_padding(torch.rand(2, 20) > 0.3)

    def function(*tensors):
        return flash_attention(*tensors, mask=mask, return_lse=True, return_max_logits=True)

    got = torch.vmap(function, in_dims=in_dims)(*tensors)
    for n in range(3):
        chosen = [
            tensor if dim is None else tensor.select(dim, n)
            for tensor, dim in zip(tensors, in_dims, strict=True)
        ]
        for mapped, single in zip(got, function(*chosen), strict=True):
            torch.testing.assert_close(mapped[n], single)


BIASES = {
    "1111": (1, 1, 1, 1),
    "head": (1, 6, 9, 20),
    "batch": (2, 1, 1, 20),
    "whole": (2, 6, 9, 20),
}


@pytest.mark.parametrize("mapped", [False, True], ids=["shared", "mapped"])
@pytest.mark.parametrize("shape", BIASES.values(), ids=BIASES)
def test_vmap_of_grad_with_bias(shape: tuple, mapped: bool) -> None:
    """Per-sample gradients of query, bias and sinks, the bias shared by the samples or not."""
    queries, key, value = torch.randn(3, 2, 6, 9, 16), *inputs(9, 20)[1:]
    bias = torch.randn(*([3] if mapped else []), *shape)
    sinks = torch.randn(*([3] if mapped else []), 6)
    dim = 0 if mapped else None

    def loss(query, bias, sinks):
        return flash_attention(query, key, value, bias=bias, sinks=sinks).sin().sum()

    per_sample = torch.func.grad(loss, argnums=(0, 1, 2))
    got = torch.vmap(per_sample, in_dims=(0, dim, dim))(queries, bias, sinks)
    for n in range(3):
        own = (bias[n], sinks[n]) if mapped else (bias, sinks)
        for name, a, b in zip("qbs", got, per_sample(queries[n], *own), strict=True):
            torch.testing.assert_close(a[n], b, msg=lambda text, name=name: f"d{name}: {text}")


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("which", ["intervals", "dense"])
def test_vmap_over_masks(which: str, rows: int) -> None:
    tensors = inputs(9, 20)

    def function(keep):
        if which == "dense":
            mask = AttentionMask.from_dense(keep[:, None, None])
        else:
            mask = AttentionMask.from_padding(keep)
        return flash_attention(*tensors, mask=mask & AttentionMask.causal())

    keep = torch.rand(3, rows, 20) > 0.4
    got = torch.vmap(function)(keep)
    for n in range(3):
        torch.testing.assert_close(got[n], function(keep[n]))


def test_func_grad_equals_autograd() -> None:
    tensors = inputs(9, 20)
    mask = AttentionMask.causal()

    def loss(*tensors):
        out, lse = flash_attention(*tensors, mask=mask, return_lse=True)
        return out.sin().sum() + lse.sum()

    got = torch.func.grad(loss, argnums=(0, 1, 2))(*tensors)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    torch.testing.assert_close(got, torch.autograd.grad(loss(*leaves), leaves))


def test_vmap_over_dropout_seeds_is_refused() -> None:
    tensors = inputs(9, 20)
    with pytest.raises(ValueError, match="dropout_seed: vmap over seeds is not supported"):
        torch.vmap(lambda seed: flash_attention(*tensors, dropout_p=0.5, dropout_seed=seed))(
            torch.arange(3)
        )


# Second derivatives


DIFFERENTIABLE = ("query", "key", "value", "bias", "sinks")


def attention_of(name: str) -> tuple[Callable, Callable, Tensor]:
    """The attention and the dense formula as functions of one of their inputs, and that input."""
    given = dict(zip(DIFFERENTIABLE, inputs(9, 20), strict=False))
    given |= {"bias": torch.randn(1, 6, 9, 20), "sinks": torch.randn(6)}

    def dense(x: Tensor) -> Tensor:
        return dense_attention(**(given | {name: x}))[0]

    return lambda x: flash_attention(**(given | {name: x})), dense, given[name]


def penalty(function: Callable, x: Tensor) -> tuple[Tensor, ...]:
    """Of |d sum / dx|^2: the gradient that arrives at the attention needs none itself."""
    x.requires_grad_()
    (grad,) = torch.autograd.grad(function(x).sum(), x, create_graph=True)
    # The first of value does not depend on it.
    return torch.autograd.grad(grad.square().sum() + 0 * x.sum(), x)


def loss_of(function: Callable) -> Callable:
    return lambda x: function(x).sin().sum()


func = torch.func
AGAIN = {
    "penalty": penalty,
    "checkpoint": lambda f, x: penalty(lambda y: checkpoint(f, y, use_reentrant=False), x),
    "compiled": lambda f, x: penalty(torch.compile(f, backend="eager", fullgraph=True), x),
    "vhp": lambda f, x: torch.autograd.functional.vhp(loss_of(f), x, x.cos()),
    "hvp": lambda f, x: func.jvp(func.grad(loss_of(f)), (x,), (x.cos(),)),
    "jvp": lambda f, x: func.jvp(f, (x,), (x.cos(),)),
    "dual": lambda f, x: dual(f, x, x.cos()),
    "linearize": lambda f, x: func.linearize(f, x)[1](x.cos()),
    "grad of grad": lambda f, x: func.grad(loss_of(func.grad(loss_of(f))))(x),
    "grad of jvp": lambda f, x: func.grad(
        lambda y: func.jvp(f, (y,), (y.cos(),))[1].sin().sum()
    )(x),
    "vmap of grad of grad": lambda f, x: torch.vmap(func.grad(loss_of(func.grad(loss_of(f)))))(
        torch.stack([x, 2 * x])
    ),
    "vmap of jvp": lambda f, x: torch.vmap(lambda t: func.jvp(f, (x,), (t,)))(
        torch.stack([x.cos(), x])
    ),
    "vmap of hvp": lambda f, x: torch.vmap(
        lambda y: func.jvp(func.grad(loss_of(f)), (y,), (x.cos(),))
    )(torch.stack([x, 2 * x])),
}  # fmt: skip


def dual(function: Callable, x: Tensor, tangent: Tensor) -> tuple[Tensor, ...]:
    with forward_ad.dual_level():
        return tuple(forward_ad.unpack_dual(function(forward_ad.make_dual(x, tangent))))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize("again", AGAIN.values(), ids=AGAIN)
def test_forward_mode_and_second_derivatives(again: Callable, name: str) -> None:
    """Of each input, also where nothing but that input needs one."""
    function, dense, x = attention_of(name)
    wanted = again(dense, x.clone())
    torch.testing.assert_close(again(function, x), wanted, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_hessian(name: str) -> None:
    function, dense, x = attention_of(name)
    x = x.detach().narrow(-1, 0, 2)

    def of_some(f: Callable) -> Callable:
        return lambda y: loss_of(f)(torch.cat([y, given.narrow(-1, 2, given.shape[-1] - 2)], -1))

    _, _, given = attention_of(name)
    first, second = (func.hessian(of_some(f))(x[..., :2]) for f in (function, dense))
    torch.testing.assert_close(first, second, atol=2e-5, rtol=1e-4)


TOO_OFTEN = {
    "reverse": lambda f, x: func.grad(loss_of(func.grad(loss_of(func.grad(loss_of(f))))))(x),
    "forward over reverse": lambda f, x: func.jvp(
        func.grad(loss_of(func.grad(loss_of(f)))), (x,), (x,)
    ),
    "reverse over both": lambda f, x: func.grad(
        lambda y: func.jvp(func.grad(loss_of(f)), (y,), (x,))[1].sum()
    )(x),
    "forward over forward": lambda f, x: func.jvp(lambda y: func.jvp(f, (y,), (x,))[1], (x,), (x,)),
    "functional.hvp": lambda f, x: torch.autograd.functional.hvp(loss_of(f), x, x),
}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize("again", TOO_OFTEN.values(), ids=TOO_OFTEN)
def test_further_derivatives_raise(again: Callable, name: str) -> None:
    function, _, x = attention_of(name)
    with pytest.raises(NotImplementedError, match="differentiated twice at most"):
        again(function, x)


def test_kernels_without_further_derivatives_are_not_replaced() -> None:
    query, key, value = inputs(9, 20)

    def function(x: Tensor) -> Tensor:
        return flash_attention(x, key, value, kernel="fused_cpu")

    with pytest.raises(ValueError, match="kernel: 'fused_cpu' cannot run, it has no second"):
        func.jvp(function, (query,), (query,))
    with pytest.raises(ValueError, match="kernel: 'fused_cpu' cannot run, it has no second"):
        penalty(function, query)


@pytest.mark.parametrize("name", ["scale", "softcap", "alibi_slopes"])
def test_constants_refuse_tangents(name: str) -> None:
    """At whatever level: a tangent that is dropped would be a wrong answer."""
    query, key, value = inputs(9, 20)
    x = torch.rand(6) if name == "alibi_slopes" else torch.tensor(0.5)

    def of(x: Tensor, query: Tensor = query) -> Tensor:
        return flash_attention(query, key, value, **{name: x}).sum()

    ways = [
        lambda: func.jvp(of, (x,), (x,)),
        lambda: func.jvp(lambda y: func.grad(lambda q: of(y, q))(query), (x,), (x,)),
        lambda: torch.vmap(lambda t: func.jvp(of, (x,), (t,)))(torch.stack([x, x])),
        lambda: func.grad(lambda y: func.jvp(lambda q: of(y, q), (query,), (query,))[1])(x),
        lambda: func.grad(lambda y: func.grad(lambda q: of(y, q))(query).sum())(x),
        lambda: dual(of, x, x),
    ]
    for way in ways:
        with pytest.raises(ValueError, match=f"{name}: no gradient is computed"):
            way()


def test_nothing_but_inputs_and_results_waits_for_the_backward() -> None:
    """Probabilities are computed again."""
    query, key, value = (x.requires_grad_() for x in inputs(30, 40))
    bias, sinks = torch.randn(1, 6, 1, 40, requires_grad=True), torch.randn(1, 6)
    seed = torch.tensor([3])
    mask = AttentionMask.causal() & AttentionMask.from_padding(torch.rand(2, 40) > 0.3)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        results = flash_attention(
            query, key, value, mask=mask, bias=bias, sinks=sinks.requires_grad_(), return_lse=True,
            dropout_p=0.1, dropout_seed=seed,
        )  # fmt: skip
    given = (query, key, value, bias, sinks, seed, *mask.tensors(), mask.key_bounds(), *results)
    assert {x.data_ptr() for x in kept} == {x.data_ptr() for x in given}


@pytest.mark.filterwarnings("ignore")
def test_onnx_export_raises() -> None:
    class Model(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return flash_attention(x, x, x)

    with pytest.raises(RuntimeError, match="_Forward|flash_attn_fwd"):
        torch.onnx.export(Model(), (torch.randn(1, 2, 9, 8),), io.BytesIO(), dynamo=False)


@pytest.mark.parametrize("again", ["jvp", "hvp", "grad of grad"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_forward_mode_and_second_derivatives_in_compiled_code(backend: str, again: str) -> None:
    function, _, x = attention_of("query")
    compiled = torch.compile(partial(AGAIN[again], function), backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(x), AGAIN[again](function, x))


def test_the_compiler_refuses_a_second_backward() -> None:
    """That of what it compiled as a whole."""
    function, _, x = attention_of("query")
    with pytest.raises(RuntimeError, match="double backward"):
        penalty(torch.compile(function, backend="aot_eager", fullgraph=True), x)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_a_graph_nobody_differentiates_does_no_harm(name: str) -> None:
    function, _, x = attention_of(name)
    x.requires_grad_()
    (want,) = torch.autograd.grad(function(x).sin().sum(), x)
    (got,) = torch.autograd.grad(function(x).sin().sum(), x, create_graph=True)
    assert torch.equal(got, want)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_batched_gradients(name: str) -> None:
    """Many gradients at once are vmap over the backward: of one input, the others as they are."""
    function, _, x = attention_of(name)
    x.requires_grad_()
    out = function(x)
    upstream = torch.randn(3, *out.shape)
    (got,) = torch.autograd.grad(out, x, upstream, is_grads_batched=True, retain_graph=True)
    for n in range(3):
        (want,) = torch.autograd.grad(out, x, upstream[n], retain_graph=True)
        torch.testing.assert_close(got[n], want)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_vmap_of_grad_for_one_input(name: str) -> None:
    function, _, x = attention_of(name)
    grad = torch.func.grad(lambda y: function(y).sin().sum())
    xs = torch.stack([x, x.flip(-1), 2 * x])
    for got, one in zip(torch.vmap(grad)(xs), xs, strict=True):
        torch.testing.assert_close(got, grad(one))


@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
def test_an_exported_program_trains(strict: bool) -> None:
    """It calls the op itself, whose own kernel has the gradient."""
    layer, x = Layer(), torch.randn(2, 80, 24)
    program = torch.export.export(layer, (x,), strict=strict).module()
    want = train(layer, list(layer.parameters()), x)
    for got, right in zip(train(program, list(program.parameters()), x), want, strict=True):
        torch.testing.assert_close(got, right)


# Layouts


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_op_takes_any_strides(monkeypatch: pytest.MonkeyPatch, kernel: str) -> None:
    device = "cuda" if GPU else "cpu"
    mask = AttentionMask.causal() & AttentionMask.from_padding(torch.rand(2, 20) > 0.3)
    given = {"sinks": torch.randn(2, 6), "alibi_slopes": torch.rand(2, 6), "mask": mask}
    arguments = op_arguments(monkeypatch, inputs(9, 20), **given)
    arguments = [x.to(device) if isinstance(x, Tensor) else x for x in arguments[:-1]]

    def gradients(*arguments):
        out, lse, _ = FORWARD(*arguments, kernel)
        upstream = (torch.ones_like(out), torch.ones_like(lse))
        results = (out, lse) if arguments[0].stride(3) == 1 else (strided(out), strided(lse))
        settings = (*arguments[3:], kernel, False)
        return out, lse, *BACKWARD(*upstream, *arguments[:3], *results, *settings)

    def strided(x):
        spread = torch.full((*x.shape, 2), -7).to(x)
        spread[..., 0] = x
        return spread[..., 0]

    apart = [strided(x) if isinstance(x, Tensor) else x for x in arguments]
    for got, want in zip(gradients(*apart), gradients(*arguments), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dim", [0, 1])
def test_vmap_over_strided_sinks(kernel: str, device: str, dim: int) -> None:
    """What comes back through vmap is laid out as the caller's axes are."""
    tensors = inputs(9, 20, device=device)
    sinks = torch.randn(3, 6, device=device).movedim(0, dim)

    def function(sinks):
        return flash_attention(*tensors, sinks=sinks, kernel=kernel)

    got = torch.vmap(function, in_dims=dim)(sinks)
    for n in range(3):
        torch.testing.assert_close(got[n], function(sinks.select(dim, n)))


# Autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_settles_the_dtype(dtype: torch.dtype) -> None:
    """Its dtype wins, gradients keep each tensor's, and backward needs no autocast."""
    query, key, value = inputs(9, 20)
    leaves = [leaf.requires_grad_() for leaf in (query, key, value.to(dtype))]
    bias = torch.randn(1, 6, 9, 20, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        out, lse = flash_attention(*leaves, bias=bias, return_lse=True)
    assert out.dtype == dtype and lse.dtype == torch.float32
    grads = torch.autograd.grad(out.float().square().sum(), [*leaves, bias])
    assert [g.dtype for g in grads] == [torch.float32, torch.float32, dtype, torch.float32]
    same = [leaf.detach().to(dtype) for leaf in leaves]
    assert torch.equal(out, flash_attention(*same, bias=bias))
    exact = dense_attention(*(leaf.double() for leaf in same), bias=bias.double())[0]
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=0.02)


def test_autocast_does_not_reach_into_the_kernel() -> None:
    """The arithmetic is the same with autocast on, in the forward and in the backward."""
    leaves = [leaf.bfloat16().requires_grad_() for leaf in inputs(9, 20)]
    out = flash_attention(*leaves)
    grads = torch.autograd.grad(out.float().sum(), leaves)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        same = flash_attention(*leaves)
        same_grads = torch.autograd.grad(same.float().sum(), leaves)
    assert torch.equal(out, same)
    assert all(torch.equal(a, b) for a, b in zip(grads, same_grads, strict=True))


def test_autocast_leaves_float64_alone() -> None:
    tensors = inputs(9, 20, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert flash_attention(*tensors).dtype == torch.float64


# Tensors without data


def test_meta_tensors_give_shapes() -> None:
    query, key, value = inputs(9, 20, value_dim=24, device="meta")
    out, lse = flash_attention(query, key, value, mask=AttentionMask.causal(), return_lse=True)
    assert out.shape == (2, 6, 9, 24) and lse.shape == (2, 6, 9)
    assert out.device.type == "meta"


def test_masks_of_one_compiled_graph_are_not_taken_for_each_other() -> None:
    """The compiler may write the bounds of the second into the memory of the first."""
    query, key, value = (torch.randn(2, 2, 100, 16) for _ in range(3))
    first, second = (
        torch.arange(100) >= torch.tensor(starts)[:, None] for starts in ([0, 90], [60, 3])
    )

    def attend(query, key, value, first, second):
        for keep in (first, second):
            mask = AttentionMask.causal() & AttentionMask.from_padding(keep)
            query = flash_attention(query, key, value, mask=mask)
        return query

    given = (query, key, value, first, second)
    torch.testing.assert_close(torch.compile(attend, fullgraph=True)(*given), attend(*given))
