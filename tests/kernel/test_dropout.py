"""Dropout: the bits are those written down here, they look random, and both passes use them."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import BATCH, check, dtype_id, inputs, padded
from torch import Tensor

from hf_flash_two import flash_attention
from hf_flash_two.kernels import dropout

pytestmark = pytest.mark.usefixtures("poisoned_memory")

WORD = 2**32


def mix(x: int) -> int:
    """lowbias32."""
    x ^= x >> 16
    x = x * 0x7FEB352D % WORD
    x ^= x >> 15
    x = x * 0x846CA68B % WORD
    return x ^ x >> 16


def kept(seed: int, batch: int, head: int, row: int, col: int, dropout_p: float) -> bool:
    """One bit, by whole-number arithmetic: the definition every kernel must repeat."""
    low, high = seed % WORD, seed // WORD % WORD
    stream = mix((mix(low) ^ high) + (batch + 1) * 0x9E3779B9 & WORD - 1)
    stream = mix(stream ^ head)
    row_bits = mix((mix(low ^ row) + stream) % WORD)
    return mix(row_bits ^ mix(col)) >= int(dropout_p * WORD)


def keep_mask(seed: int, shape: tuple[int, int, int, int], dropout_p: float) -> Tensor:
    batch, heads, rows, cols = shape
    return torch.tensor(
        [
            [
                [[kept(seed, b, h, i, j, dropout_p) for j in range(cols)] for i in range(rows)]
                for h in range(heads)
            ]
            for b in range(batch)
        ]
    )


def bits_of(
    kernel: str,
    device: str,
    seed: int | Tensor,
    shape: tuple[int, int, int, int],
    dropout_p: float,
    **buckets,
) -> Tensor:
    """The bits a kernel used: with equal scores and the identity as values, out shows each one."""
    batch, heads, rows, cols = shape
    query = torch.zeros(batch, heads, rows, 8, device=device)
    key = torch.zeros(batch, heads, cols, 8, device=device)
    value = torch.eye(cols, device=device).expand(batch, heads, cols, cols)
    out = flash_attention(
        query, key, value, dropout_p=dropout_p, dropout_seed=seed, kernel=kernel, **buckets
    )
    torch.testing.assert_close(out[out != 0] * cols * (1 - dropout_p), torch.ones(
        (), device=device
    ).expand(int((out != 0).sum())))  # fmt: skip
    return (out != 0).cpu()


SEEDS = [0, 1, 2**31, 2**32, 2**40 + 3, 2**62 - 1, -1, -(2**63)]


@pytest.mark.parametrize("seed", SEEDS)
def test_bits_are_as_defined(kernel: str, device: str, seed: int) -> None:
    shape = (2, 3, 9, 70)
    assert torch.equal(bits_of(kernel, device, seed, shape, 0.3), keep_mask(seed, shape, 0.3))


def test_bits_do_not_depend_on_the_tiles(kernel: str, device: str) -> None:
    shape = (1, 2, 70, 150)
    default = bits_of(kernel, device, 7, shape, 0.4)
    for block_q, block_k in ((1, 150), (16, 64), (33, 16), (128, 128)):
        sized = bits_of(kernel, device, 7, shape, 0.4, q_bucket_size=block_q, k_bucket_size=block_k)
        assert torch.equal(sized, default)


@pytest.mark.long
def test_bits_of_a_large_problem(kernel: str, device: str) -> None:
    """More rows, keys and heads than go through a kernel at once."""
    large = bits_of(kernel, device, 7, (2, 9, 300, 576), 0.4)
    assert torch.equal(large[:, :, :3, :100], keep_mask(7, (2, 9, 3, 100), 0.4))
    last = [kept(7, 1, 8, 299, col, 0.4) for col in range(576)]
    assert large[1, 8, 299].tolist() == last


def test_seed_as_a_tensor(kernel: str, device: str) -> None:
    shape = (1, 2, 9, 64)
    expected = bits_of(kernel, device, 2**40 + 1, shape, 0.5)
    for seed in (torch.tensor(2**40 + 1, device=device), torch.tensor([2**40 + 1], device=device)):
        assert torch.equal(bits_of(kernel, device, seed, shape, 0.5), expected)


def test_seed_is_drawn_from_the_generator(kernel: str, device: str) -> None:
    """Two calls differ; the same manual seed repeats both."""
    tensors = inputs(9, 64, device=device)

    def draw() -> list[Tensor]:
        torch.manual_seed(5)
        return [flash_attention(*tensors, dropout_p=0.5, kernel=kernel) for _ in range(2)]

    first, second = draw()
    assert not torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip(draw(), (first, second), strict=True))


def test_no_dropout_draws_no_seed(kernel: str, device: str) -> None:
    state = torch.get_rng_state()
    tensors = inputs(9, 64, device=device)
    torch.set_rng_state(state)
    flash_attention(*tensors, dropout_p=0.0, kernel=kernel)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("dropout_p", [0.1, pytest.param(0.9, marks=pytest.mark.long)])
def test_forward_and_backward_use_the_bits(
    kernel: str, device: str, dropout_p: float, heads: tuple[int, int], dtype: torch.dtype
) -> None:
    tensors = inputs(17, 40, heads=heads, value_dim=24, dtype=dtype, device=device)
    keep = keep_mask(2**33 + 5, (BATCH, 4, 17, 40), dropout_p).to(device)
    mask, visible = padded(17, 40)
    arguments = {"dropout_p": dropout_p, "dropout_seed": 2**33 + 5, "keep": keep}
    check(kernel, *tensors, mask=mask, visible=visible, **arguments)


def test_with_everything_else(kernel: str, device: str) -> None:
    tensors = inputs(17, 70, heads=(4, 2), device=device)
    keep = keep_mask(3, (BATCH, 4, 17, 70), 0.25).to(device)
    mask, visible = padded(17, 70)
    check(
        kernel,
        *tensors,
        mask=mask,
        visible=visible,
        bias=torch.randn(1, 4, 17, 1, device=device),
        alibi_slopes=torch.rand(4, device=device),
        softcap=3.0,
        sinks=torch.randn(4, device=device),
        dropout_p=0.25,
        dropout_seed=3,
        keep=keep,
        buckets=(8, 64),
    )


def test_expectation_is_the_output_without_dropout() -> None:
    """The mean over seeds comes within five standard errors, element by element."""
    tensors = inputs(8, 40, heads=(2, 1), batch=1, dtype=torch.float64)
    runs = torch.stack(
        [flash_attention(*tensors, dropout_p=0.5, dropout_seed=seed) for seed in range(600)]
    )
    error = runs.mean(0) - flash_attention(*tensors)
    assert (error.abs() < 5 * runs.std(0) / math.sqrt(600)).all()


# Statistics of the generator. `agreement` of independent fair bits is normal with deviation 1.


def sample(seed: int, batch: int = 0, size: tuple[int, int, int] = (4, 512, 512)) -> Tensor:
    heads, rows, cols = (torch.arange(n) for n in size)
    return dropout.keep(torch.tensor([seed]), batch, heads, rows, cols, 0.5)


def agreement(a: Tensor, b: Tensor) -> float:
    """How far from chance two sets of bits agree, in standard deviations."""
    return ((a == b).double().mean().item() - 0.5) * 2 * math.sqrt(a.numel())


@pytest.mark.parametrize("dropout_p", [0.001, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_keep_rate(seed: int, dropout_p: float) -> None:
    """Over all, in each row and in each column: the counts spread as binomials do."""
    index = torch.arange(1024)
    keep = dropout.keep(torch.tensor([seed]), 0, index[:1], index, index, dropout_p)[0].double()
    variance = dropout_p * (1 - dropout_p)
    assert abs(keep.mean() - (1 - dropout_p)) < 4 * math.sqrt(variance / keep.numel())
    for counts in (keep.sum(0), keep.sum(1)):
        spread = (counts.var() / (variance * 1024)).item()
        assert abs(spread - 1) < 5 * math.sqrt(2 / 1024)


@pytest.mark.parametrize("step", [1, 2, 3, 64, 128])
def test_rows_columns_and_heads_are_independent(step: int) -> None:
    for seed in (0, 1, 2**32):
        bits = sample(seed)
        assert abs(agreement(bits[:, step:], bits[:, :-step])) < 4.5
        assert abs(agreement(bits[..., step:], bits[..., :-step])) < 4.5
        assert abs(agreement(bits[:, step:, step:], bits[:, :-step, :-step])) < 4.5
        if step < 4:
            assert abs(agreement(bits[step:], bits[:-step])) < 4.5


def test_rows_and_columns_do_not_swap() -> None:
    bits = sample(3)
    upper = torch.triu(torch.ones(512, 512, dtype=torch.bool), 1)
    assert abs(agreement(bits[:, upper], bits.transpose(1, 2)[:, upper])) < 4.5


NEIGHBOURS = [(0, 1), (6, 7), (7, 8), (0, 2**32), (1, 2**33 + 1), (2**32, 2**32 + 1), (0, -1)]


@pytest.mark.parametrize(("seed", "other"), NEIGHBOURS)
def test_seeds_are_independent(seed: int, other: int) -> None:
    assert abs(agreement(sample(seed), sample(other))) < 4.5


@pytest.mark.parametrize(("seed", "other"), NEIGHBOURS)
def test_seeds_share_no_row(seed: int, other: int) -> None:
    """Nor two batch rows, nor two heads: each row of bits occurs once."""
    rows = torch.cat(
        [sample(s, batch, (3, 300, 256)).flatten(0, 1) for s in (seed, other) for batch in (0, 1)]
    )
    assert len(rows.unique(dim=0)) == len(rows)


def test_batch_rows_are_independent() -> None:
    assert abs(agreement(sample(0, batch=0), sample(0, batch=1))) < 4.5
