"""`FlashAttentionTwo` against the formula of its document, written out with masks of its own."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_flash_two import AttentionMask, FlashAttentionTwo
from hf_flash_two import module as module_file
from hf_flash_two.parallel import plan as plan_file


class Formula(nn.Module):
    """softmax(Q K^T / sqrt(d)) V with the public parameters: heads are runs of features, keys come
    before values, nothing has a bias. A row that sees nothing gives 0."""

    def __init__(self, dim: int, heads: int, dim_head: int):
        super().__init__()
        self.heads, self.dim_head = heads, dim_head
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(dim, 2 * heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)

    def forward(self, x: Tensor, context: Tensor | None = None, visible: Tensor | None = None):
        projected = self.to_kv(x if context is None else context)
        inner = self.heads * self.dim_head
        outs = []
        for head in range(self.heads):
            mine = slice(head * self.dim_head, (head + 1) * self.dim_head)
            query, key = self.to_q(x)[..., mine], projected[..., :inner][..., mine]
            scores = query @ key.transpose(1, 2) / self.dim_head**0.5
            if visible is not None:
                seen = visible[:, head if visible.shape[1] > 1 else 0]
                scores = scores.masked_fill(~seen, -torch.inf)
            weights = scores.softmax(-1).nan_to_num(0.0)
            outs.append(weights @ projected[..., inner:][..., mine])
        return self.to_out(torch.cat(outs, dim=-1))


def formula_of(model: FlashAttentionTwo) -> Formula:
    """The formula in float64 with the weights of ``model``, loaded as a checkpoint is."""
    inner, dim = model.to_q.weight.shape
    formula = Formula(dim, model.heads, inner // model.heads)
    formula.load_state_dict(model.state_dict())
    return formula.double()


def lower_triangle(queries: int, keys: int) -> Tensor:
    """bool [1, 1, Tq, Tk]: the last query is at the last key."""
    row, column = torch.arange(queries)[:, None], torch.arange(keys)
    return (column <= row + keys - queries)[None, None]


def assert_equals_formula(model: FlashAttentionTwo, x, context=None, mask=None, visible=None):
    """Output, gradients of the inputs and of the parameters."""
    formula = formula_of(model)
    ours = [None if t is None else t.clone().requires_grad_() for t in (x, context)]
    theirs = [None if t is None else t.double().requires_grad_() for t in (x, context)]
    got = model(*ours, mask=mask)
    want = formula(*theirs, visible=visible)
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)
    weight = torch.randn_like(got)
    leaves = [
        [*(t for t in inputs if t is not None), *peer.parameters()]
        for inputs, peer in ((ours, model), (theirs, formula))
    ]
    got = torch.autograd.grad(got, leaves[0], weight)
    want = torch.autograd.grad(want, leaves[1], weight.double())
    for mine, other in zip(got, want, strict=True):
        torch.testing.assert_close(mine.double(), other, atol=1e-4, rtol=1e-4)


# The document


def test_signature_is_the_documents() -> None:
    constructor = inspect.signature(FlashAttentionTwo.__init__).parameters
    expected = {
        "dim": inspect.Parameter.empty, "heads": 8, "dim_head": 64, "causal": False,
        "q_bucket_size": 512, "k_bucket_size": 1024, "parallel": False, "mixed_precision": False,
    }  # fmt: skip
    documented = list(constructor.values())[1 : 1 + len(expected)]
    assert {p.name: p.default for p in documented} == expected
    *extras, unknown = list(constructor.values())[1 + len(expected) :]
    assert unknown.kind is inspect.Parameter.VAR_KEYWORD
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in documented + extras)
    assert all(p.default is not inspect.Parameter.empty for p in extras)
    forward = inspect.signature(FlashAttentionTwo.forward).parameters
    assert list(forward) == ["self", "x", "context", "mask", "q_bucket_size", "k_bucket_size"]
    assert all(forward[name].default is None for name in list(forward)[2:])


def test_names_of_other_modules() -> None:
    for name, here in (("num_heads", "; here it is heads"), ("colour", "$")):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'{here}"):
            FlashAttentionTwo(dim=8, **{name: 2})


def test_example_of_basic_usage() -> None:
    model = FlashAttentionTwo(dim=512)
    x = torch.randn(1, 10, 512)
    out = model(x)
    torch.testing.assert_close(out.double(), formula_of(model)(x.double()), atol=1e-5, rtol=1e-5)


def test_example_of_a_mask() -> None:
    model = FlashAttentionTwo(dim=512)
    x = torch.randn(1, 10, 512)
    mask = torch.ones(1, 10)
    out = model(x, mask=mask)
    assert torch.equal(out, model(x))


def test_example_of_a_context() -> None:
    model = FlashAttentionTwo(dim=512)
    x = torch.randn(1, 10, 512)
    context = torch.randn(1, 10, 512)
    out = model(x, context=context)
    want = formula_of(model)(x.double(), context.double())
    torch.testing.assert_close(out.double(), want, atol=1e-5, rtol=1e-5)


# Masks


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("kind", ["none", "padding", "one_padding", "dense", "value"])
@pytest.mark.parametrize(("tokens", "others"), [(7, 7), (5, 9)], ids=["self", "context"])
def test_causal_and_mask_hold_together(causal: bool, kind: str, tokens: int, others: int) -> None:
    model = FlashAttentionTwo(dim=24, heads=3, dim_head=10, causal=causal)
    x = torch.randn(2, tokens, 24)
    context = None if tokens == others else torch.randn(2, others, 24)
    keep = torch.ones(2, others, dtype=torch.bool)
    keep[0, :2], keep[1, 3] = False, False
    scattered = torch.rand(2, 3, tokens, others) > 0.4
    mask, visible = {
        "none": (None, torch.ones(1, 1, tokens, others, dtype=torch.bool)),
        "padding": (keep, keep[:, None, None, :]),
        "one_padding": (keep[:1], keep[:1, None, None, :]),
        "dense": (scattered, scattered),
        "value": (AttentionMask.window(3, None), lower_triangle(tokens, others).logical_not()),
    }[kind]
    if kind == "value":
        position = torch.arange(tokens)[:, None] + others - tokens
        visible = (position - torch.arange(others) <= 3)[None, None]
    if causal:
        visible = visible & lower_triangle(tokens, others)
    visible = visible.expand(2, -1, tokens, others)
    assert_equals_formula(model, x, context, mask, visible)


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int64, torch.float64, torch.bfloat16], ids=str
)
def test_padding_mask_of_any_dtype(dtype: torch.dtype) -> None:
    model = FlashAttentionTwo(dim=16, heads=2, dim_head=8)
    x, keep = torch.randn(2, 6, 16), torch.rand(2, 6) > 0.5
    keep[:, 0] = True
    assert_equals_formula(model, x, mask=keep.to(dtype), visible=keep[:, None, None])


def test_a_sequence_that_is_all_padding_gives_zeros() -> None:
    model = FlashAttentionTwo(dim=16, heads=2, dim_head=8, causal=True)
    x = torch.randn(2, 5, 16, requires_grad=True)
    out = model(x, mask=torch.tensor([[0] * 5, [1] * 5]))
    out.square().sum().backward()
    assert out[0].count_nonzero() == 0 and x.grad[0].count_nonzero() == 0
    assert out[1].count_nonzero() and x.grad.isfinite().all()


@pytest.mark.parametrize("tokens", [1, 300])
def test_bucket_sizes_change_no_result(tokens: int) -> None:
    model = FlashAttentionTwo(dim=16, heads=2, dim_head=8, causal=True, q_bucket_size=32)
    x = torch.randn(2, tokens, 16)
    want = formula_of(model)(x.double(), visible=lower_triangle(tokens, tokens))
    small, large = {"q_bucket_size": 7, "k_bucket_size": 64}, {"q_bucket_size": 1000}
    for sizes in ({}, small, large):
        torch.testing.assert_close(model(x, **sizes).double(), want, atol=1e-5, rtol=1e-5)


def test_bucket_sizes_reach_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def spy(*tensors, mask, q_bucket_size, k_bucket_size):
        seen.append((q_bucket_size, k_bucket_size))
        return tensors[0]

    monkeypatch.setattr(plan_file, "flash_attention", spy)
    model = FlashAttentionTwo(dim=16, heads=2, dim_head=8, k_bucket_size=96)
    model(torch.randn(1, 3, 16))
    model(torch.randn(1, 3, 16), q_bucket_size=33, k_bucket_size=44)
    assert seen == [(512, 96), (33, 44)]


# Weights


def test_weights_interchange_with_the_public_layout() -> None:
    model, peer = FlashAttentionTwo(dim=32, heads=4, dim_head=6), Formula(32, 4, 6)
    assert {name: weight.shape for name, weight in model.state_dict().items()} == {
        "to_q.weight": (24, 32),
        "to_kv.weight": (48, 32),
        "to_out.weight": (32, 24),
    }
    x = torch.randn(2, 9, 32)
    before = model(x)
    model.load_state_dict(peer.state_dict())
    torch.testing.assert_close(model(x), peer(x), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(model(x), before)


def test_copies_and_pickles() -> None:
    model = FlashAttentionTwo(dim=16, heads=2, dim_head=8, parallel=True, devices=["cpu", "cpu"])
    x = torch.randn(2, 12, 16)
    expected = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), expected)
        assert twin.parallel_plan() == model.parallel_plan()
        assert twin.to_q.weight is not model.to_q.weight


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"mixed_precision": True},
        {"mixed_precision": "fp16"},
        {"parallel": True},
        {"parallel": True, "devices": ["cpu", "cpu"]},
    ],
    ids=["plain", "bf16", "fp16", "parallel", "devices"],
)
def test_compiles_without_a_break(settings: dict) -> None:
    torch._dynamo.reset()
    model = FlashAttentionTwo(dim=16, heads=2, dim_head=8, causal=True, **settings)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    arguments = (torch.randn(2, 9, 16), torch.randn(2, 11, 16), torch.rand(2, 11) > 0.3)
    got = compiled(*arguments)
    grads = torch.autograd.grad(got.sum(), list(model.parameters()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = model(*arguments)
    torch.testing.assert_close(got, want)
    for mine, other in zip(
        grads, torch.autograd.grad(want.sum(), list(model.parameters())), strict=True
    ):
        torch.testing.assert_close(mine, other)


# Mixed precision


@pytest.mark.parametrize(
    ("setting", "dtype"),
    [(True, torch.bfloat16), ("bf16", torch.bfloat16), ("fp16", torch.float16)],
    ids=["true", "bf16", "fp16"],
)
def test_mixed_precision_computes_low_and_returns_high(setting, dtype: torch.dtype) -> None:
    model = FlashAttentionTwo(dim=32, heads=2, dim_head=16, mixed_precision=setting)
    if dtype == torch.float16:
        model.eval()
    x = torch.randn(2, 50, 32, requires_grad=True)
    seen = []
    for linear in (model.to_q, model.to_kv, model.to_out):
        linear.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    out = model(x)
    assert seen == [dtype] * 3 and out.dtype == torch.float32
    exact = formula_of(model)(x.double())
    assert (out - exact).norm() < 2e-2 * exact.norm()
    out.sum().backward()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {t.grad.dtype for t in (x, *model.parameters())} == {torch.float32}


@pytest.mark.parametrize("setting", [False, True, "fp16"])
def test_an_autocast_region_wins(setting) -> None:
    model = FlashAttentionTwo(dim=32, heads=2, dim_head=16, mixed_precision=setting)
    plain = FlashAttentionTwo(dim=32, heads=2, dim_head=16)
    plain.load_state_dict(model.state_dict())
    x = torch.randn(2, 9, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x)
        assert out.dtype == torch.bfloat16
        assert torch.equal(out, plain(x))


@pytest.mark.parametrize("setting", [False, True, "no", "bf16", "fp16"])
def test_float64_is_left_alone(setting) -> None:
    model = FlashAttentionTwo(dim=32, heads=2, dim_head=16, mixed_precision=setting).double()
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    out = model(x)
    torch.testing.assert_close(out, formula_of(model)(x), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("setting", [False, "no"])
def test_without_mixed_precision_nothing_is_cast(setting) -> None:
    model = FlashAttentionTwo(dim=32, heads=2, dim_head=16, mixed_precision=setting)
    x = torch.randn(1, 4, 32)
    assert model(x).dtype == torch.float32
    with pytest.raises(RuntimeError):
        model(x.bfloat16())
    assert model.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_half_inputs_meet_float_parameters() -> None:
    model = FlashAttentionTwo(dim=32, heads=2, dim_head=16, mixed_precision=True)
    assert model(torch.randn(1, 4, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_float16_training_warns_once() -> None:
    model = FlashAttentionTwo(dim=16, heads=1, dim_head=16, mixed_precision="fp16")
    x = torch.randn(1, 4, 16)
    with torch.no_grad():
        model(x)
    with pytest.warns(UserWarning, match="GradScaler"):
        model(x)
    model(x)
    copy.deepcopy(model)(x)


@pytest.mark.parametrize(
    ("device", "capability", "expected"),
    [("cpu", None, True), ("cuda", (7, 5), False), ("cuda", (8, 0), True), ("cuda", (9, 0), True)],
    ids=["cpu", "t4", "a100", "h100"],
)
def test_bfloat16_where_it_is_fast(
    monkeypatch: pytest.MonkeyPatch, device: str, capability: tuple | None, expected: bool
) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert module_file._has_bfloat16(torch.device(device)) is expected


def test_shapes_are_computed_without_data() -> None:
    with torch.device("meta"):
        model = FlashAttentionTwo(dim=16, heads=2, dim_head=8, causal=True, mixed_precision=True)
        out = model(torch.randn(2, 5, 16), mask=torch.ones(2, 5))
    assert out.shape == (2, 5, 16) and out.is_meta


# Parallel


@pytest.mark.parametrize("devices", [2, 3])
@pytest.mark.parametrize(
    ("heads", "batch"), [(4, 2), (2, 1), (1, 5)], ids=["heads", "few_heads", "batch_rows"]
)
def test_split_over_devices_equals_one_device(heads: int, batch: int, devices: int) -> None:
    """Up to rounding: fewer batch rows or heads at once take another matrix product."""
    settings = {"dim": 32, "heads": heads, "dim_head": 8, "causal": True}
    single = FlashAttentionTwo(**settings)
    split = FlashAttentionTwo(**settings, parallel=True, devices=["cpu"] * devices)
    split.load_state_dict(single.state_dict())
    x = torch.randn(batch, 133, 32, requires_grad=True)
    keep = torch.rand(batch, 133) > 0.3
    dense = torch.rand(batch, heads, 133, 133) > 0.2
    tolerance = {"atol": 1e-5, "rtol": 1e-5}
    for mask in (None, keep, keep[:1], dense, dense[:1], dense[:, :1]):
        outs = [model(x, mask=mask) for model in (single, split)]
        torch.testing.assert_close(*outs, **tolerance)
        grads = [
            torch.autograd.grad(out.square().sum(), [x, *model.parameters()])
            for out, model in zip(outs, (single, split), strict=True)
        ]
        for pair in zip(*grads, strict=True):
            torch.testing.assert_close(*pair, **tolerance)
    plan = split.parallel_plan()
    assert plan.kind == "devices" and plan.devices == (torch.device("cpu"),) * devices
    assert f"plan=devices (over {devices} devices)" in repr(split)


def test_the_split_really_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_flash_two.parallel import devices as devices_file

    calls, attention = [], devices_file.flash_attention

    def spy(query, *rest, **settings):
        calls.append(tuple(query.shape[:2]))
        return attention(query, *rest, **settings)

    monkeypatch.setattr(devices_file, "flash_attention", spy)
    model = FlashAttentionTwo(dim=16, heads=5, dim_head=8, parallel=True, devices=["cpu", "cpu"])
    model(torch.randn(2, 3, 16))
    assert calls == [(2, 2), (2, 3)]


def test_all_visible_devices_if_the_work_is_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_file, "_visible_devices", lambda device: [device, device])
    model = FlashAttentionTwo(dim=16, heads=2, dim_head=8, parallel=True)
    x = torch.randn(2, 5, 16)
    expected = model(x)
    assert model.parallel_plan().reason == "too little work to send to other devices"
    monkeypatch.setattr(plan_file, "_WORTH_SPLITTING", 2 * 5 * 16 * 5)
    torch.testing.assert_close(model(x), expected)
    assert model.parallel_plan().kind == "devices"
    model(x[:1])
    assert model.parallel_plan().kind == "local"


def test_one_device_computes_locally_and_says_so_once() -> None:
    model = FlashAttentionTwo(dim=16, heads=2, dim_head=8, parallel=True)
    assert model.parallel_plan() is None and "plan" not in repr(model)
    with pytest.warns(UserWarning, match="computes locally: there is no device but cpu"):
        model(torch.randn(1, 4, 16))
    model(torch.randn(1, 4, 16))
    assert model.parallel_plan().kind == "local"
    assert "plan=local (there is no device but cpu)" in repr(model)


def test_without_parallel_everything_is_local() -> None:
    model = FlashAttentionTwo(dim=16, heads=2, dim_head=8)
    model(torch.randn(1, 4, 16))
    assert (model.parallel_plan().kind, model.parallel_plan().reason) == ("local", "parallel=False")


# Errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dim": 0}, "^dim: expected an integer of at least 1, got 0"),
        ({"heads": 0}, "^heads: expected an integer of at least 1"),
        ({"dim_head": -1}, "^dim_head: expected an integer of at least 1, got -1"),
        ({"q_bucket_size": 0}, "^q_bucket_size: expected an integer of at least 1"),
        ({"k_bucket_size": 0}, "^k_bucket_size: expected an integer of at least 1"),
        ({"q_bucket_size": 2.5}, "^q_bucket_size: expected an integer of at least 1, got 2.5"),
        ({"dim": "8"}, "^dim: expected an integer of at least 1, got '8'"),
        ({"mixed_precision": "fp8"}, "^mixed_precision: expected a bool.*got 'fp8'"),
        ({"mixed_precision": torch.bfloat16}, "^mixed_precision: .*got torch.bfloat16"),
        ({"parallel": True, "layout": "zigzag"}, "^layout: expected one of.*got 'zigzag'"),
        ({"devices": ["cpu"]}, "^mesh, devices: expected None without parallel=True"),
        ({"parallel": True, "devices": []}, "^devices: expected at least one"),
        ({"parallel": True, "devices": "cuda"}, r"^devices: expected several.*got 'cuda'"),
        ({"parallel": True, "devices": 2}, r"^devices: expected several.*got 2"),
        ({"parallel": 2}, "^parallel: expected True or False, got 2"),
        ({"causal": "yes"}, "^causal: expected True or False, got 'yes'"),
        ({"dim_head": 600}, "^dim_head: expected at most 576, got 600"),
        ({"parallel": True, "mesh": object()}, "^mesh: expected a DeviceMesh.*from_group"),
        ({"parallel": True, "mesh": object(), "devices": ["cpu"]}, "at most one"),
        ({"parallel": True, "devices": ["nonsense"]}, "^devices: expected .*got 'nonsense'"),
        ({"layout": "head_tail"}, "^layout: expected 'contiguous' without a mesh, got 'head_tail'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_constructor_refuses(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FlashAttentionTwo(**({"dim": 16} | settings))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": [[1.0]]}, "^x: expected a tensor, got list"),
        ({"context": [[1.0]]}, "^context: expected a tensor, got list"),
        ({"x": torch.randn(4, 16)}, r"^x: expected shape \[batch, length, 16\].*got \[4, 16\]"),
        ({"x": torch.randn(())}, r"^x: expected shape \[batch, length, 16\].*got \[\]"),
        ({"x": torch.randn(1, 4, 8)}, r"^x: expected .*got \[1, 4, 8\]"),
        ({"context": torch.randn(3, 4, 16)}, r"^context: expected shape \[2, length, 16\]"),
        ({"mask": torch.ones(1, 5)}, r"^mask: expected \[2, 4\].*got torch.float32 \[1, 5\]"),
        ({"mask": torch.ones(4, 4, dtype=torch.bool)}, r"^mask: .*mask\[None, None\]"),
        ({"mask": torch.ones(2, 4, 4, dtype=torch.bool)}, "^mask: expected"),
        ({"mask": torch.ones(2, 1, 4, 4)}, "^mask: expected .*got torch.float32"),
        ({"mask": torch.ones(2, 3, 4, 4, dtype=torch.bool)}, "^mask: expected a tensor broadcast"),
        ({"mask": torch.tensor([[0.0, 0.0, 0.0, -1e9]])}, "^mask: expected 0 and 1"),
        ({"mask": torch.tensor([[1, 1, 2, 2]])}, "^mask: .*from_documents"),
        ({"mask": torch.tensor([[1.0, 1.0, torch.nan, 1.0]])}, "^mask: expected 0 and 1"),
        ({"mask": [[1, 1, 1, 1]]}, "^mask: expected a tensor.*got list"),
        ({"q_bucket_size": 0}, "^q_bucket_size: expected None or an integer of at least 1, got 0"),
        (
            {"k_bucket_size": -1},
            "^k_bucket_size: expected None or an integer of at least 1, got -1",
        ),
        (
            {"k_bucket_size": 2.5},
            "^k_bucket_size: expected None or an integer of at least 1, got 2.5",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_forward_refuses(arguments: dict, message: str) -> None:
    model = FlashAttentionTwo(dim=16, heads=2, dim_head=8)
    with pytest.raises(ValueError, match=message):
        model(**({"x": torch.randn(2, 4, 16)} | arguments))


MASKS = {
    "bool": torch.rand(3, 2, 6) > 0.3,
    "int": (torch.rand(3, 2, 6) > 0.3).long(),
    "float": (torch.rand(3, 2, 6) > 0.3).float(),
    "dense": torch.rand(3, 1, 1, 6, 6) > 0.3,
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_masks_under_vmap_export_and_without_data(mask: torch.Tensor) -> None:
    model = FlashAttentionTwo(dim=16, heads=2, dim_head=8, causal=True)
    x = torch.randn(3, 2, 6, 16)
    got = torch.vmap(lambda x, mask: model(x, mask=mask))(x, mask)
    for n in range(3):
        torch.testing.assert_close(got[n], model(x[n], mask=mask[n]))
    one, own = x[0].clone(), mask[0].clone()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert model(mode.from_tensor(one), mask=mode.from_tensor(own)).shape == (2, 6, 16)
    length = torch.export.Dim("length", min=2, max=500)
    shapes = {"x": {1: length}, "mask": {1: length} if mask.dim() == 3 else {2: length, 3: length}}
    program = torch.export.export(model, (one,), {"mask": own}, dynamic_shapes=shapes).module()
    for size in (3, 64, 65, 200):
        x = torch.randn(2, size, 16)
        shape = (2, size) if mask.dim() == 3 else (1, 1, size, size)
        longer = (torch.rand(shape) > 0.3).to(mask.dtype)
        torch.testing.assert_close(program(x, mask=longer), model(x, mask=longer))


def test_bucket_sizes_of_numpy_are_integers() -> None:
    model = FlashAttentionTwo(dim=32, heads=2, dim_head=16, q_bucket_size=np.int64(16))
    x = torch.randn(1, 40, 32)
    torch.testing.assert_close(model(x), model(x, k_bucket_size=np.int32(8)))
