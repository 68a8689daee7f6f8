"""The mask on its way: it passes where Transformers looks, and stands for its dense tensor."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate.utils import send_to_device
from models import CACHE
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers import CanineConfig, LlamaConfig
from transformers.masking_utils import causal_mask_function, create_causal_mask
from transformers.models.canine import modeling_canine  # noqa: F401  (hand-written attention)
from transformers.models.llama import modeling_llama  # noqa: F401  (interface)

from hf_flash_two import AttentionMask
from hf_flash_two.hf.mask_function import make_mask
from hf_flash_two.hf.mask_proxy import MaskProxy

QUERIES, KEYS = 7, 19


def proxy(kind: str, dtype: torch.dtype = torch.bool) -> MaskProxy:
    generator = torch.Generator().manual_seed(0)
    keep = torch.rand(3, KEYS, generator=generator) > 0.3
    masks = {
        "band": AttentionMask.causal(window=5),
        "intervals": AttentionMask.causal(query_offset=9) & AttentionMask.from_padding(keep),
        "dense": AttentionMask.from_dense(
            torch.rand(3, 1, QUERIES, KEYS, generator=generator) > 0.5
        ),
    }
    shape = (3, 1, QUERIES, KEYS)
    return MaskProxy(masks[kind], shape, "cpu", dtype, causal=kind != "dense", packed=True)


KINDS = pytest.mark.parametrize("kind", ["band", "intervals", "dense"])


@KINDS
def test_looks_like_a_mask(kind: str) -> None:
    """What masking_utils and generate ask of a mask that was made before."""
    mask = proxy(kind)
    assert isinstance(mask, BlockMask) and len(mask.shape) == mask.ndim == mask.dim() == 4
    assert mask.shape == mask.size() == (3, 1, QUERIES, KEYS) and mask.size(-1) == KEYS
    assert mask.contiguous() is mask
    assert (mask.dtype, mask.device) == (torch.bool, torch.device("cpu"))
    assert str(mask.shape[0]) in repr(mask) and "MaskProxy" in str(mask)
    ids = torch.zeros(3, QUERIES, 8)
    config = LlamaConfig()
    config._attn_implementation = "flash_two"
    given = {"inputs_embeds": ids, "attention_mask": mask, CACHE: None}
    assert create_causal_mask(config=config, **given) is mask


@KINDS
def test_copies_and_moves_stay_masks(kind: str) -> None:
    mask = proxy(kind)
    assert mask.to("cpu") is mask and mask.to(torch.device("cpu"), non_blocking=True) is mask
    sent = send_to_device({"mask": [mask]}, "cpu", non_blocking=True)["mask"][0]
    assert isinstance(sent, MaskProxy) and torch.equal(sent.as_bool(), mask.as_bool())
    assert torch.equal(copy.deepcopy(mask).as_bool(), mask.as_bool())
    moved = mask.to("meta")
    assert moved.device.type == "meta" and isinstance(moved, MaskProxy)
    assert all(
        part is None or part.device.type == "meta"
        for part in (moved.mask.query_start, moved.mask.query_stop, moved.mask.dense)
    )


def test_moves_to_a_gpu_by_its_number() -> None:
    """As hooks of a device map say it: what a tensor does with a number, the mask does."""
    mask = proxy("intervals")
    try:
        expected = mask.mask.query_start.to(0).device
    except Exception as error:  # without a GPU, of a kind that depends on the build of PyTorch
        with pytest.raises(type(error)):
            mask.to(0, non_blocking=True)
    else:
        assert mask.to(0, non_blocking=True).device == expected


@KINDS
@pytest.mark.parametrize(
    "index",
    [
        (slice(None), slice(None), slice(-2, None), slice(None)),
        (slice(None), slice(None), slice(None), slice(0, 11)),
        (slice(1, 3), slice(None), slice(2, 6), slice(4, 18)),
        (Ellipsis, slice(3, 12)),
        (slice(0, 1),),
        slice(1, 2),
    ],
    ids=str,
)
def test_slices_stay_masks(kind: str, index) -> None:
    mask = proxy(kind)
    part = mask[index]
    assert isinstance(part, MaskProxy)
    assert torch.equal(part.as_bool(), mask.as_bool()[index])
    assert part.shape == mask.as_bool()[index].shape


@KINDS
@pytest.mark.parametrize(
    "index",
    [0, (slice(None), 0), (0, 0, 3, 4), (slice(None), slice(None), slice(None, None, 2)), None],
    ids=str,
)
def test_other_indices_give_tensors(kind: str, index) -> None:
    mask = proxy(kind)
    assert torch.equal(mask[index], mask.as_bool()[index])
    chosen = torch.tensor([2, 0, 0])
    assert torch.equal(mask[chosen], mask.as_bool()[chosen])


@KINDS
def test_intersection(kind: str) -> None:
    mask, other = proxy(kind), proxy("intervals")
    expected = mask.as_bool() & other.as_bool()
    both = mask & other
    assert torch.equal(both.as_bool() if isinstance(both, MaskProxy) else both, expected)
    assert isinstance(proxy("band") & proxy("band"), MaskProxy)
    tensor = torch.rand(3, 1, QUERIES, KEYS) > 0.5
    assert torch.equal(mask & tensor, mask.as_bool() & tensor)
    assert torch.equal(tensor & mask, mask.as_bool() & tensor)


def use_as_bool(mask: MaskProxy | Tensor, scores: Tensor) -> list[Tensor]:
    return [
        ~mask,
        mask | (scores > 0),
        mask == 0,
        mask != 0,
        mask.logical_not(),
        torch.logical_not(mask),
        scores.masked_fill(~mask, -1.0),
        torch.where(mask, scores, 0.0),
        torch.cat([mask, mask], dim=-1),
        mask.repeat(1, 2, 1, 1),
        mask.expand(3, 4, QUERIES, KEYS),
        mask.flip(-1),
        mask.unsqueeze(0),
        mask.any(-1),
        mask.sum(),
        torch.nn.functional.pad(mask, (0, 2)),
    ]


@KINDS
def test_stands_for_its_bool_tensor(kind: str) -> None:
    mask, scores = proxy(kind), torch.randn(3, 4, QUERIES, KEYS)
    for actual, expected in zip(
        use_as_bool(mask, scores), use_as_bool(mask.as_bool(), scores), strict=True
    ):
        assert type(actual) is Tensor and torch.equal(actual, expected)


def use_in_sums(mask: MaskProxy | Tensor, scores: Tensor) -> list[Tensor]:
    return [
        scores + mask,
        mask + scores,
        torch.add(scores, mask),
        scores.add(mask),
        scores.clone().add_(mask),
        scores + mask.to(scores.dtype),
        scores + mask[:, :, :, :KEYS],
    ]


def additive(mask: MaskProxy, dtype: torch.dtype) -> Tensor:
    visible = mask.as_bool()
    return torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)


@KINDS
@pytest.mark.parametrize("scores", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_is_additive_in_a_sum(kind: str, scores: torch.dtype) -> None:
    mask, scores = proxy(kind), torch.randn(3, 4, QUERIES, KEYS).to(scores)
    expected = use_in_sums(additive(mask, scores.dtype), scores)
    for actual, wanted in zip(use_in_sums(mask, scores), expected, strict=True):
        assert torch.equal(actual, wanted)


@KINDS
def test_the_float_kind_keeps_its_dtype_in_a_sum(kind: str) -> None:
    mask, scores = proxy(kind, torch.float32), torch.randn(3, 4, QUERIES, KEYS)
    for dtype in (torch.float32, torch.bfloat16):
        actual = mask + scores.to(dtype)
        assert torch.equal(actual, additive(mask, torch.float32) + scores.to(dtype))
        assert actual.dtype == torch.float32


@KINDS
def test_stands_for_the_float_tensor_of_eager(kind: str) -> None:
    mask = proxy(kind, torch.float32)
    expected = additive(mask, torch.float32)
    assert mask.dtype == torch.float32
    for use in (lambda m: m.squeeze(1), lambda m: m[:, 0], lambda m: m < 0, lambda m: m.float()):
        assert torch.equal(use(mask), use(expected))


def test_families_with_hand_written_attention_get_the_float_kind() -> None:
    shapes = {"batch_size": 2, "q_length": 5, "kv_length": 5}
    for config, dtype in ((CanineConfig(), torch.float32), (LlamaConfig(), torch.bool)):
        mask = make_mask(**shapes, mask_function=causal_mask_function, config=config)
        assert mask.dtype == dtype


def test_no_attribute_that_a_tensor_lacks() -> None:
    with pytest.raises(AttributeError, match="no attribute 'kv_indices'"):
        _ = proxy("band").kv_indices


def test_hashes_by_identity() -> None:
    mask = proxy("band")
    assert {mask: 1}[mask] == 1


@KINDS
def test_additive_mask_as_bool_is_where_it_is_not_zero(kind: str) -> None:
    """MPT takes the mask as the places to fill, by converting the float mask of eager."""
    mask = proxy(kind, torch.float32)
    assert torch.equal(mask.to(torch.bool), mask.as_additive(torch.float32).to(torch.bool))
    assert torch.equal(mask.bool(), mask.to(torch.bool))
