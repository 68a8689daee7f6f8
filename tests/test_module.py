"""`FlashAttentionTwo` against a dense formula written out here, with its own masks."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings

import pytest
import torch
from torch import nn

from hf_flash_two import AttentionMask, FlashAttentionTwo


def dense(module, x, context=None, keep=None, visible=None, causal=False):
    """The document's formula in float64, with heads as consecutive runs of features."""
    context = x if context is None else context
    x, context = x.double(), context.double()
    weights = {name: p.double() for name, p in module.named_parameters()}
    q = x @ weights["to_q.weight"].T
    kv = context @ weights["to_kv.weight"].T
    k, v = kv[..., : kv.shape[-1] // 2], kv[..., kv.shape[-1] // 2 :]

    def split(t):
        return t.unflatten(-1, (module.heads, -1)).transpose(1, 2)

    q, k, v = split(q), split(k), split(v)
    scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
    queries, keys = scores.shape[2:]
    allowed = torch.ones(1, 1, queries, keys, dtype=torch.bool)
    if causal:
        allowed = allowed.tril(keys - queries)
    if keep is not None:
        allowed = allowed & keep[:, None, None, :].bool()
    if visible is not None:
        allowed = allowed & visible
    p = scores.masked_fill(~allowed, -torch.inf).softmax(-1).nan_to_num(0.0)
    return (p @ v).transpose(1, 2).flatten(2) @ weights["to_out.weight"].T


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_signature_is_the_documents():
    constructor = inspect.signature(FlashAttentionTwo.__init__).parameters
    expected = {
        "dim": inspect.Parameter.empty, "heads": 8, "dim_head": 64, "causal": False,
        "q_bucket_size": 512, "k_bucket_size": 1024, "parallel": False, "mixed_precision": False,
    }  # fmt: skip
    found = list(constructor.values())[1:9]
    assert {p.name: p.default for p in found} == expected
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in found)
    forward = inspect.signature(FlashAttentionTwo.forward).parameters
    assert list(forward) == ["self", "x", "context", "mask", "q_bucket_size", "k_bucket_size"]
    assert all(forward[name].default is None for name in list(forward)[2:])


def test_basic_usage():
    model = FlashAttentionTwo(dim=512)
    x = torch.randn(1, 10, 512)
    torch.testing.assert_close(model(x).double(), dense(model, x), atol=1e-5, rtol=1e-5)


def test_mask_of_float_ones():
    model = FlashAttentionTwo(dim=512)
    x = torch.randn(1, 10, 512)
    assert torch.equal(model(x, mask=torch.ones(1, 10)), model(x))


def test_context():
    model = FlashAttentionTwo(dim=512)
    x, context = torch.randn(1, 10, 512), torch.randn(1, 10, 512)
    torch.testing.assert_close(
        model(x, context=context).double(), dense(model, x, context), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("kind", ["padding", "dense", "value"])
@pytest.mark.parametrize("tokens, others", [(7, 7), (5, 9)], ids=["self", "context"])
def test_masks_hold_together_with_gradients(causal, kind, tokens, others):
    model = FlashAttentionTwo(dim=24, heads=3, dim_head=8, causal=causal)
    x = torch.randn(2, tokens, 24, requires_grad=True)
    context = None if tokens == others else torch.randn(2, others, 24, requires_grad=True)
    keep = torch.ones(2, others, dtype=torch.long)
    keep[0, :2] = 0
    visible = torch.rand(2, 3, tokens, others) > 0.4
    masks = {"padding": keep, "dense": visible, "value": AttentionMask.from_padding(keep)}
    ours = model(x, context=context, mask=masks[kind])
    if kind == "dense":
        theirs = dense(model, x, context, visible=visible, causal=causal)
    else:
        theirs = dense(model, x, context, keep=keep, causal=causal)
    torch.testing.assert_close(ours.double(), theirs, atol=1e-5, rtol=1e-5)
    inputs = [x, *model.parameters()] + ([] if context is None else [context])
    d_out = torch.randn_like(ours)
    got = torch.autograd.grad(ours, inputs, d_out)
    want = torch.autograd.grad(theirs, inputs, d_out.double())
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), atol=1e-4, rtol=1e-4)


def test_bucket_sizes_change_no_result():
    model = FlashAttentionTwo(dim=16, heads=2, dim_head=8, causal=True, q_bucket_size=32)
    x = torch.randn(2, 200, 16)
    expected = dense(model, x, causal=True)
    for sizes in ({}, {"q_bucket_size": 7}, {"k_bucket_size": 64}, dict(q_bucket_size=1000)):
        torch.testing.assert_close(model(x, **sizes).double(), expected, atol=1e-5, rtol=1e-5)


def test_weights_have_the_public_layout():
    """One linear for queries, one for keys then values, one out; no biases."""
    model = FlashAttentionTwo(dim=32, heads=4, dim_head=8)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert shapes == {"to_q.weight": (32, 32), "to_kv.weight": (64, 32), "to_out.weight": (32, 32)}
    peer = nn.ModuleDict(
        {
            "to_q": nn.Linear(32, 32, bias=False),
            "to_kv": nn.Linear(32, 64, bias=False),
            "to_out": nn.Linear(32, 32, bias=False),
        }
    )
    model.load_state_dict(peer.state_dict())
    peer.load_state_dict(model.state_dict())


@pytest.mark.parametrize("setting", [True, "bf16"])
def test_mixed_precision_casts_and_returns(setting):
    model = FlashAttentionTwo(dim=32, heads=2, dim_head=16, mixed_precision=setting)
    x = torch.randn(2, 50, 32, requires_grad=True)
    out = model(x)
    exact = dense(model, x)
    assert out.dtype == torch.float32
    error = (out.double() - exact).norm() / exact.norm()
    assert 1e-4 < error < 2e-2, "bfloat16 was not used, or something else is wrong"
    out.sum().backward()
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
    assert x.grad.dtype == torch.float32


def test_mixed_precision_yields_to_autocast_and_to_float64():
    model = FlashAttentionTwo(dim=32, heads=2, dim_head=16, mixed_precision="fp16")
    x = torch.randn(2, 9, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(x).dtype == torch.bfloat16
    model.double()
    out = model(x.double())
    torch.testing.assert_close(out, dense(model, x), atol=1e-12, rtol=1e-12)


def test_half_inputs_meet_float_parameters():
    model = FlashAttentionTwo(dim=32, heads=2, dim_head=16, mixed_precision=True)
    assert model(torch.randn(1, 4, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16
    off = FlashAttentionTwo(dim=32, heads=2, dim_head=16)
    with pytest.raises(RuntimeError):
        off(torch.randn(1, 4, 32, dtype=torch.bfloat16))


def test_float16_training_warns():
    model = FlashAttentionTwo(dim=16, heads=1, dim_head=16, mixed_precision="fp16")
    with pytest.warns(UserWarning, match="GradScaler"):
        model(torch.randn(1, 4, 16))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(1, 4, 16))


@pytest.mark.parametrize("heads, batch", [(4, 1), (1, 5)], ids=["by_heads", "by_batch"])
def test_split_over_devices_is_exact(heads, batch):
    single = FlashAttentionTwo(dim=32, heads=heads, dim_head=8, causal=True)
    split = FlashAttentionTwo(
        dim=32, heads=heads, dim_head=8, causal=True, parallel=True, devices=["cpu", "cpu", "cpu"]
    )
    split.load_state_dict(single.state_dict())
    x = torch.randn(batch, 33, 32)
    keep = torch.rand(batch, 33) > 0.3
    visible = torch.rand(batch, heads, 33, 33) > 0.2
    for mask in (None, keep, visible):
        outs = [model(x, mask=mask) for model in (single, split)]
        torch.testing.assert_close(*outs, atol=1e-6, rtol=1e-5)
        grads = [
            torch.autograd.grad(out.square().sum(), list(model.parameters()))
            for out, model in zip(outs, (single, split), strict=True)
        ]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert split.parallel_plan().kind == "devices"
    assert "over 3 devices" in repr(split)


def test_one_device_computes_locally_and_says_so():
    model = FlashAttentionTwo(dim=16, heads=2, dim_head=8, parallel=True)
    assert model.parallel_plan() is None
    with pytest.warns(UserWarning, match="computes locally: cpu is the only device"):
        model(torch.randn(1, 4, 16))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(1, 4, 16))
    assert model.parallel_plan().kind == "local"


def test_copies_pickles_and_compiles():
    model = FlashAttentionTwo(dim=16, heads=2, dim_head=8, causal=True)
    x = torch.randn(2, 12, 16)
    expected = model(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"dim": 0}, "dim: expected at least 1, got 0"),
        ({"heads": 0}, "heads: expected"),
        ({"mixed_precision": "fp8"}, "mixed_precision: expected a bool.*'fp8'"),
        ({"layout": "zigzag"}, "layout: expected one of"),
        ({"devices": ["cpu"]}, "only with parallel=True"),
    ],
)
def test_constructor_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        FlashAttentionTwo(**({"dim": 16} | settings))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"x": torch.randn(4, 16)}, r"x: expected shape \[4, length, 16\]"),
        ({"x": torch.randn(1, 4, 8)}, "x: expected shape"),
        ({"context": torch.randn(3, 4, 16)}, "context: expected shape"),
        ({"mask": torch.ones(1, 5)}, r"mask: expected \[2, 4\]"),
        ({"mask": torch.ones(2, 1, 4, 4)}, "mask: expected"),
        ({"q_bucket_size": -1}, "q_bucket_size: expected"),
    ],
)
def test_forward_refuses(arguments, message):
    model = FlashAttentionTwo(dim=16, heads=2, dim_head=8)
    with pytest.raises(ValueError, match=message):
        model(**({"x": torch.randn(2, 4, 16)} | arguments))
