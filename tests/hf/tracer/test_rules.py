"""What a layer may do with its scores, on plain tensors: the same numbers, or a refusal."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from hf_flash_two.hf.tracer.mode import tracing


@pytest.fixture
def qkv():
    torch.manual_seed(0)
    shapes = ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 4))
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def run(layer, tensors):
    """The result and the gradients of ``tensors``."""
    for tensor in tensors:
        tensor.grad = None
    out = layer(*tensors)
    out.square().sum().backward()
    return out.detach(), [tensor.grad.clone() for tensor in tensors]


def assert_same(layer, tensors, kernel_calls, calls: int = 1):
    want = run(layer, tensors)
    assert not kernel_calls
    with tracing("layer"):
        out = layer(*tensors)
    assert len(kernel_calls) == calls
    kernel_calls.clear()

    def lowered(*tensors):
        with tracing("layer"):
            return layer(*tensors)

    got = run(lowered, tensors)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    assert out.shape == want[0].shape


def product(q, k):
    return q @ k.transpose(-1, -2)


SEEN = torch.rand(2, 1, 5, 7, generator=torch.Generator().manual_seed(1)) > 0.3
SEEN[..., 0] = True
BIAS = torch.randn(1, 3, 5, 7, generator=torch.Generator().manual_seed(2))
MINIMUM = torch.finfo(torch.float32).min


def filled(s):
    return s.masked_fill(~SEEN, MINIMUM)


def blocks(q, k, v):
    s = product(q, k)
    s = s.view(6, 5, 7) + BIAS.expand(2, -1, -1, -1).reshape(6, 5, 7)
    s = s.view(2, 3, 5, 7) + torch.where(SEEN, 0.0, MINIMUM)
    return torch.bmm(s.view(6, 5, 7).softmax(-1), v.reshape(6, 7, 4)).view(2, 3, 5, 4)


def in_place(q, k, v):
    s = product(q, k)
    s /= 3
    s += BIAS
    s.masked_fill_(~SEEN, MINIMUM)
    return s.softmax(-1) @ v


def gated(q, k, v):
    causal = torch.ones(5, 7).tril()
    return F.softmax(product(q, k) * causal - 1e4 * (1 - causal), -1) @ v


def relative(q, k, v):
    position = torch.randn(9, 8, generator=torch.Generator().manual_seed(3))
    shifted = torch.einsum("bhqd,rd->bhqr", q, position)
    index = (torch.arange(7)[None] - torch.arange(5)[:, None]).clamp(0, 8)
    s = product(q, k) + shifted.gather(-1, index.expand(2, 3, -1, -1))
    return s.softmax(-1) @ v


def einsums(q, k, v):
    s = torch.einsum("bnqd,bnkd->bnqk", q, k) + torch.einsum("bnqd,qkd->bnqk", q, POSITIONS)
    return torch.einsum("bnqk,bnkd->bqnd", s.softmax(-1), v)


POSITIONS = torch.randn(5, 7, 8, generator=torch.Generator().manual_seed(4))
LOWERED = {
    "scaled": lambda q, k, v: (product(q, k) / 3).softmax(-1) @ v,
    "factor_tensor": lambda q, k, v: (product(q, k) * torch.tensor(0.3)).softmax(-1) @ v,
    "factor_per_head": lambda q, k, v: (product(q, k) * BIAS[:, :, :1, :1]).softmax(-1) @ v,
    "bias": lambda q, k, v: (product(q, k) + BIAS).softmax(-1) @ v,
    "bias_before_scale": lambda q, k, v: ((product(q, k) + BIAS) * 0.5).softmax(-1) @ v,
    "negative_factor": lambda q, k, v: (product(q, k) * -0.5).softmax(-1) @ v,
    "number": lambda q, k, v: (product(q, k) + 3.0).softmax(-1) @ v,
    "filled": lambda q, k, v: filled(product(q, k)).softmax(-1) @ v,
    "additive": lambda q, k, v: (product(q, k) + (1 - SEEN.float()) * -1e9).softmax(-1) @ v,
    "where": lambda q, k, v: torch.where(SEEN, product(q, k), MINIMUM).softmax(-1) @ v,
    "where_not": lambda q, k, v: torch.where(~SEEN, MINIMUM, product(q, k)).softmax(-1) @ v,
    "bias_and_mask_in_one": lambda q, k, v: (
        (product(q, k) + BIAS.masked_fill(~SEEN, MINIMUM)).softmax(-1) @ v
    ),
    "clamped": lambda q, k, v: filled(product(q, k)).clamp(min=MINIMUM).softmax(-1) @ v,
    "row_max": lambda q, k, v: (
        (s := product(q, k)) - s.amax(-1, keepdim=True).detach()
    ).softmax(-1) @ v,
    "dropped_at_zero": lambda q, k, v: F.dropout(product(q, k).softmax(-1), 0.0) @ v,
    "casts": lambda q, k, v: product(q, k).float().softmax(-1).type_as(q).to(v.dtype) @ v,
    "baddbmm": lambda q, k, v: torch.baddbmm(
        BIAS.expand(2, -1, -1, -1).reshape(6, 5, 7), q.reshape(6, 5, 8),
        k.reshape(6, 7, 8).mT, beta=0.5, alpha=0.3,
    ).softmax(-1) @ v.reshape(6, 7, 4),
    "sdpa": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, SEEN),
    "sdpa_causal": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    "columns_side_by_side": lambda q, k, v: torch.cat(
        [product(q, k[:, :, :3]) * 2, product(q + 1, k[:, :, 3:])], -1
    ).softmax(-1) @ v,
    "rows_on_top": lambda q, k, v: torch.cat(
        [product(q[:, :, :2], k), product(q[:, :, 2:], k * 2)], -2
    ).softmax(-1) @ v,
    "values_from_the_left": lambda q, k, v: (
        v.mT @ product(q, k).softmax(-1).transpose(-1, -2)
    ).mT,
    "shifted_by_all": lambda q, k, v: (
        (s := product(q, k)) - s.max()
    ).clamp(min=-50000, max=50000).softmax(-1) @ v,
    "shifted_by_max": lambda q, k, v: (
        (s := product(q, k)) - torch.max(s, dim=-1, keepdim=True)[0]
    ).softmax(-1) @ v,
    "shifted_by_values": lambda q, k, v: (
        (s := product(q, k)) - s.max(-1, keepdim=True).values
    ).softmax(-1) @ v,
    "keys_to_queries": lambda q, k, v: (
        (s := product(k, q) - product(k, q).max()).transpose(-1, -2) - s.mT.amax(-1, keepdim=True)
    ).softmax(-1) @ v,
    "blocks": blocks, "in_place": in_place, "gated": gated, "relative": relative,
    "einsums": einsums,
}  # fmt: skip


@pytest.mark.parametrize("layer", LOWERED.values(), ids=LOWERED)
def test_same_numbers_and_gradients(layer, qkv, kernel_calls):
    assert_same(layer, qkv, kernel_calls)


def test_gradient_of_a_bias(qkv, kernel_calls):
    bias = BIAS.clone().requires_grad_()
    assert_same(lambda q, k, v, b: (product(q, k) + b).softmax(-1) @ v, [*qkv, bias], kernel_calls)


def test_probabilities_used_twice_are_dropped_once(qkv):
    q, k, v = qkv
    with tracing("layer"):
        p = F.dropout(product(q, k).softmax(-1), 0.5)
        assert torch.equal(p @ v, p @ v)


def test_a_softmax_over_either_side_of_shared_scores(qkv, kernel_calls):
    def layer(q, k, v):
        s = product(q, k)
        s = s - s.max()
        turned = s.transpose(-1, -2)
        turned = turned - torch.max(turned, dim=-1, keepdim=True)[0]
        s = s.masked_fill(~SEEN, float("-inf"))
        return torch.cat([s.softmax(-1) @ v, (turned.softmax(-1) @ q)[..., :4]], -2)

    assert_same(layer, qkv, kernel_calls, calls=2)


def test_a_layer_may_have_nothing_to_do(qkv):
    with tracing("layer"):
        out = qkv[0] + 1.0
    assert torch.equal(out, torch.add(qkv[0], 1.0))


COMPUTED = {
    "exp": lambda s: s.exp(),
    "part": lambda s: s[0],
    "transpose": lambda s: s.transpose(1, 2),
    "transpose_after_rows": lambda s: (s - s.amax(-1, keepdim=True)).mT.transpose(-1, -2).mT,
    "tanh": lambda s: 1.0 - s.tanh() * 3,
    "largest": lambda s: s.max(),
    "argmax": lambda s: s.max(-1).indices,
    "a_near_limit": lambda s: s.clamp(max=1.0),
}


@pytest.mark.parametrize("change", COMPUTED.values(), ids=COMPUTED)
def test_what_is_not_known_on_scores_computes_them(change, qkv):
    q, k, v = qkv
    with tracing("layer"):
        s = product(q, k)
        changed = change(s)
        s.softmax(-1) @ v
        changed = changed + 0
    assert torch.equal(changed, change(product(q, k)) + 0)


NOT_ON_PROBABILITIES = {
    "a factor": lambda p, v: p * 2,
    "a sum": lambda p, v: p.sum(),
    "a part": lambda p, v: p[:, :1],
    "a product from the left": lambda p, v: v.mT @ p.mT,
    "other keys": lambda p, v: p @ torch.ones(2, 3, 6, 4),
    "softmax again": lambda p, v: p.softmax(-1) @ v,
    "padding": lambda p, v: F.pad(p, (1, 1)),
    "a fill with 0": lambda p, v: p.masked_fill(~SEEN, 0.0) @ v,
    "another head's": lambda p, v: p.transpose(0, 1) @ v,
    "a view of the keys": lambda p, v: p.view(2, 3, 35) + 1.0,
    "in place": lambda p, v: p.mul_(2),
}


@pytest.mark.parametrize("change", NOT_ON_PROBABILITIES.values(), ids=NOT_ON_PROBABILITIES)
def test_what_is_not_known_on_probabilities_raises(change, qkv):
    q, k, v = qkv
    with pytest.raises(NotImplementedError, match="layer 7.*unpatch"), tracing("layer 7"):
        change(product(q, k).softmax(-1), v)


NOT_ATTENTION = {
    "rows shifted, then columns": lambda q, k, v: (
        ((s := product(k, q)) - s.amax(-1, keepdim=True)).transpose(-1, -2).softmax(-1) @ v
    ),
    "softmax over queries": lambda q, k, v: product(q, k).softmax(-2) @ v,
    "no softmax": lambda q, k, v: product(q, k) @ v,
    "softmax of something else": lambda q, k, v: product(q, k).tanh().softmax(-1) @ v,
    "a mild fill": lambda q, k, v: product(q, k).masked_fill(~SEEN, -10.0).softmax(-1) @ v,
    "an open gate": lambda q, k, v: (product(q, k) * SEEN.float()).softmax(-1) @ v,
}


@pytest.mark.parametrize("layer", NOT_ATTENTION.values(), ids=NOT_ATTENTION)
def test_a_layer_without_attention_raises(layer, qkv):
    raises = pytest.raises(NotImplementedError, match="layer 7.*what this layer does")
    with raises, tracing("layer 7"):
        layer(*qkv)


def test_a_change_in_place_of_the_queries_raises(qkv):
    q, k, v = (x.detach() for x in qkv)
    with pytest.raises(NotImplementedError, match="layer 7.*in place"), tracing("layer 7"):
        s = product(q, k)
        q.mul_(2)
        s.softmax(-1) @ v


def test_a_change_in_place_of_a_view_raises(qkv):
    q, k, v = qkv
    with pytest.raises(NotImplementedError, match="through a view"), tracing("layer 7"):
        s = product(q, k)
        view = s.view(6, 5, 7)
        s += 1.0
        view.softmax(-1)


def test_nested_attention_through_the_interface(qkv, kernel_calls):
    from hf_flash_two import flash_attention

    q, k, v = qkv
    want = flash_attention(q, k, v)
    with tracing("layer"):
        got = flash_attention(q, k, v)
        product(q, k).softmax(-1) @ v
    assert torch.equal(got, want)
    assert len(kernel_calls) == 3


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1, 1)])
def test_a_learned_temperature(shape: tuple[int, ...], qkv, kernel_calls) -> None:
    temperature = torch.full(shape, 0.3, requires_grad=True)

    def layer(q, k, v, temperature):
        return (product(q, k) * temperature).softmax(-1) @ v

    assert_same(layer, [*qkv, temperature], kernel_calls)


def assign(s, index, number):
    s[index] = number


WRITES = {
    "clamp_": lambda s: s.clamp_(-0.1, 0.1),
    "relu": lambda s: F.relu(s, inplace=True),
    "relu by place": lambda s: F.relu(s, True),
    "tanh_": torch.tanh_,
    "fill_": lambda s: s.fill_(0.0),
    "copy_": lambda s: s.copy_(torch.zeros(s.shape)),
    "tril_": lambda s: s.tril_(),
    "index_fill_": lambda s: s.index_fill_(-1, torch.tensor([0]), MINIMUM),
    "masked_scatter_": lambda s: s.masked_scatter_(SEEN, torch.zeros(s.shape)),
    "out": lambda s: torch.clamp(s, -0.1, 0.1, out=s),
    "power": lambda s: s.__ipow__(2),
    "item": lambda s: assign(s, (..., 0), MINIMUM),
    "items": lambda s: assign(s, ~SEEN.expand(s.shape), MINIMUM),
    "part": lambda s: s[..., :3].clamp_(-0.1, 0.1),
    "item of a part": lambda s: assign(s[0], (..., 0), MINIMUM),
    "data": lambda s: s.data.clamp_(-0.1, 0.1),
    "detached": lambda s: s.detach().clamp_(-0.1, 0.1),
    "each": lambda s: [x.clamp_(-0.1, 0.1) for x in s],
}


@pytest.mark.parametrize(
    "mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference"]
)
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_writes_without_a_rule_raise(write, mode, qkv):
    """Scores are not computed: what is written into a tensor that stands for them would be lost."""
    q, k, v = (x.detach() for x in qkv)
    with mode(), pytest.raises(NotImplementedError, match="layer 7.*in place"), tracing("layer 7"):
        s = product(q, k)
        write(s)
        s.softmax(-1) @ v


COMPARED = {
    "equal": lambda s: s.masked_fill(s == s.max(), MINIMUM),
    "not equal": lambda s: s.masked_fill((s != s.max()) & ~SEEN, MINIMUM),
    "length": lambda s: s / len(s),
    "truth": lambda s: s if (s > 1e9).any() else s * 2,
    "number": lambda s: s / float(s.detach().abs().max()),
}


@pytest.mark.parametrize("change", COMPARED.values(), ids=COMPARED)
def test_operators_give_what_they_give_on_tensors(change, qkv, kernel_calls):
    assert_same(lambda q, k, v: change(product(q, k)).softmax(-1) @ v, qkv, kernel_calls)
