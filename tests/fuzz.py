"""Random attention calls against the dense formula: masks x arguments x layouts x dtypes.

    python tests/fuzz.py --first 0 --count 3000 --kernel blockwise

A case is a function of its seed alone. What fails is printed with the seed that repeats it, and
``test_fuzz.py`` keeps the seeds that ever failed.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from oracle import dense_attention, dense_mask, rms
from torch import Tensor

from hf_flash_two import AttentionMask, flash_attention
from hf_flash_two.kernels import dropout

DTYPES = (torch.float64, torch.float32, torch.float32, torch.bfloat16, torch.float16)
FAR = 10**6


@dataclass
class Case:
    """One call: what the kernel gets, and what the dense formula needs to know beside it."""

    tensors: dict[str, Tensor]
    mask: AttentionMask | Tensor | None
    visible: Tensor
    offset: int
    arguments: dict
    settings: dict = field(default_factory=dict)
    keep: Tensor | None = None
    dirt: float | None = None
    words: list[str] = field(default_factory=list)


@dataclass
class Draw:
    """Chances of one case."""

    chance: random.Random
    batch: int
    heads: int
    rows: int
    keys: int
    offset: int | None = None

    def lengths(self, total: int) -> list[int]:
        """Lengths of documents that fill ``total``."""
        cuts = sorted(self.chance.randrange(total + 1) for _ in range(self.chance.randrange(1, 5)))
        return [b - a for a, b in zip([0, *cuts], [*cuts, total], strict=True) if b > a]

    def numbers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape)


# Each returns a mask and either `sees(b, i, j)` over positions or the bool tensor it stands for.


def full(draw: Draw):
    return AttentionMask.full(), lambda b, i, j: j >= 0


def causal(draw: Draw):
    window = draw.chance.choice((None, 1, 2, draw.keys, draw.chance.randrange(1, draw.keys + 9)))
    reach = FAR if window is None else window
    mask = AttentionMask.causal(window, query_offset=draw.offset)
    return mask, lambda b, i, j: (j <= i) & (i - j < reach)


def band(draw: Draw):
    left, right = (draw.chance.choice((None, 0, 1, 5, draw.keys)) for _ in range(2))
    mask = AttentionMask.window(left, right, query_offset=draw.offset)
    ahead, behind = (FAR if size is None else size for size in (right, left))
    return mask, lambda b, i, j: (i - j <= behind) & (j - i <= ahead)


def padding(draw: Draw):
    keep = torch.rand(draw.chance.choice((1, draw.batch)), draw.keys) < draw.chance.random()
    given = keep if draw.chance.random() < 0.5 else keep.to(torch.int64)
    return AttentionMask.from_padding(given), lambda b, i, j: keep.expand(draw.batch, -1)[b, j]


def intervals(draw: Draw):
    rows = draw.chance.choice((1, draw.batch))
    first = draw.numbers(-3, draw.keys + 3, rows, draw.keys)
    last = draw.numbers(-3, draw.keys + 9, rows, draw.keys)
    mask = AttentionMask.from_intervals(first, last, query_offset=draw.offset)
    first, last = first.expand(draw.batch, -1), last.expand(draw.batch, -1)
    return mask, lambda b, i, j: (first[b, j] <= i) & (i < last[b, j])


def documents(draw: Draw):
    """Boundaries, ids or positions; their queries are counted from the first key."""
    draw.offset = 0
    is_causal = draw.chance.random() < 0.5
    window = draw.chance.choice((None, 1, 4, 40)) if is_causal else None
    lengths = draw.lengths(draw.keys)
    document = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    begin = torch.tensor([0, *lengths]).cumsum(0)
    how = draw.chance.choice(("boundaries", "ids", "positions"))
    limits = {"causal": is_causal, "window": window}
    reach = FAR if window is None else window
    length = draw.keys
    if how == "boundaries":
        # The last document may be padding instead.
        kept = len(lengths) if len(lengths) == 1 or draw.chance.random() < 0.6 else len(lengths) - 1
        mask = AttentionMask.from_documents(begin[: kept + 1], key_length=length, **limits)
        length = int(begin[kept])
    elif how == "ids":
        mask = AttentionMask.from_documents(segment_ids=document * 3 % 7, **limits)
    else:
        positions = torch.arange(draw.keys) - begin[document] + 5 * document
        starts = torch.ones(draw.keys, dtype=torch.bool)
        starts[1:] = positions[1:] != positions[:-1] + 1
        document = starts.cumsum(0) - 1
        mask = AttentionMask.from_documents(position_ids=positions, **limits)

    def sees(b, i, j):
        inside = (i >= 0) & (i < draw.keys)
        same = inside & (document[i.clamp(0, draw.keys - 1)] == document[j]) & (j < length)
        return same & ((j <= i) & (i - j < reach) if is_causal else True)

    return mask, sees


def prefix(draw: Draw):
    lengths = draw.numbers(0, draw.keys + 2, draw.batch)
    mask = AttentionMask.from_prefix(lengths, draw.keys)
    return mask, lambda b, i, j: (j <= i) | (j < lengths[b])


def blocks(draw: Draw):
    runs = draw.lengths(draw.keys)
    ids = torch.tensor([draw.chance.randrange(-1, 2) for _ in runs])
    ids = ids.repeat_interleave(torch.tensor(runs))
    changes = torch.ones(draw.keys, dtype=torch.bool)
    changes[1:] = ids[1:] != ids[:-1]
    run = changes.cumsum(0)

    def sees(b, i, j):
        at = i.clamp(0, draw.keys - 1)
        together = (run[at] == run[j]) & (ids[j] >= 0) & (i >= 0)
        # A block is seen from its first token on: also by queries past the last key.
        return (j <= i) | together

    return AttentionMask.from_blocks(ids), sees


def chunks(draw: Draw):
    size = draw.chance.choice((1, 3, 16, 100))
    starts = draw.numbers(0, 9, draw.batch) if draw.chance.random() < 0.5 else None
    mask = AttentionMask.chunked(size, draw.keys, starts=starts)
    start = torch.zeros(draw.batch, dtype=torch.int64) if starts is None else starts

    def chunk(b, x):
        return torch.div(x - start[b], size, rounding_mode="floor")

    return mask, lambda b, i, j: (j <= i) & (chunk(b, i) == chunk(b, j))


def tree(draw: Draw):
    draw.offset = 0
    lengths = draw.lengths(draw.keys)
    parents, path = [], []
    for node in range(len(lengths)):
        path = path[: draw.chance.randrange(len(path) + 1)]
        parents.append(path[-1] if path else -1)
        path.append(node)
    node = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    above = torch.eye(len(lengths), dtype=torch.bool)
    for child, parent in enumerate(parents):
        if parent >= 0:
            above[child] |= above[parent]

    def sees(b, i, j):
        at = i.clamp(0, draw.keys - 1)
        return (j <= i) & (i < draw.keys) & above[node[at], node[j]]

    return AttentionMask.from_tree(lengths, parents), sees


def dense(draw: Draw):
    shape = [
        draw.chance.choice((1, size)) for size in (draw.batch, draw.heads, draw.rows, draw.keys)
    ]
    visible = torch.rand(shape) < draw.chance.choice((0.1, 0.5, 0.9))
    given = visible
    if draw.chance.random() < 0.3:
        given = visible.expand(draw.batch, draw.heads, draw.rows, draw.keys)
    return AttentionMask.from_dense(given), visible


MASKS: tuple[Callable, ...] = (
    full, causal, band, padding, intervals, documents, prefix, blocks, chunks, tree, dense,
)  # fmt: skip


@dataclass(frozen=True)
class Range:
    """What cases are drawn from.

    Attributes:
        long: lengths of the few cases of several tiles and blocks of the default sizes.
        same_dim, bias, buckets, any_order: the chances of D = Dv, of a bias, of limits on tile
            sizes and of a backward that may add up in any order.
        alike: so many cases in a row share what kernels are compiled for: dtype, head dims, heads,
            batch rows, layouts, kinds of masks and terms; lengths and values differ.
    """

    lengths: tuple[int, ...] = (1, 2, 3, 7, 16, 33, 63, 64, 65, 100, 127, 130, 200)
    long: tuple[int, ...] = (300, 513, 600)
    head_dims: tuple[int, ...] = (1, 3, 8, 16, 17, 32, 40)
    masks: tuple[Callable, ...] = MASKS
    same_dim: float = 0.6
    bias: float = 0.3
    buckets: float = 0.4
    any_order: float = 0.0
    alike: int = 1


SMALL = Range()


def draw_mask(
    draw: Draw, masks: tuple[Callable, ...], kind: random.Random, words: list[str]
) -> tuple[AttentionMask | Tensor | None, Tensor]:
    """A mask, or several intersected, and bool [B, H or 1, Tq, Tk]."""
    kinds = kind.sample(masks, kind.choice((1, 1, 1, 2, 2, 3)))
    words.append("&".join(make_one.__name__ for make_one in kinds))
    # Documents and trees count from the first key; whatever meets them must, too.
    if draw.chance.random() < 0.3:
        draw.offset = draw.chance.randrange(-9, draw.keys + 9)
    if documents in kinds or tree in kinds:
        draw.offset = 0
    drawn = [make_one(draw) for make_one in kinds]
    mask = drawn[0][0]
    for other, _ in drawn[1:]:
        mask = mask & other
    offset = mask.resolve_offset(draw.rows, draw.keys)
    visible = torch.ones(draw.batch, 1, draw.rows, draw.keys, dtype=torch.bool)
    for _, sees in drawn:
        if isinstance(sees, Tensor):
            visible = visible & sees
        else:
            visible = visible & dense_mask(draw.batch, draw.rows, draw.keys, sees, offset)
    if kinds == [full] and draw.chance.random() < 0.5:
        mask = None
    if kinds == [dense] and draw.chance.random() < 0.5:
        mask = mask.dense
    return mask, visible


def laid_out(chance: random.Random, x: Tensor) -> Tensor:
    """The same numbers in another layout."""
    how = chance.choice(("plain", "plain", "transposed", "sliced", "spread", "expanded"))
    if how == "transposed":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if how == "sliced":
        return torch.cat([x, x], dim=3)[..., : x.shape[3]]
    if how == "spread":
        return torch.stack([x, x], dim=4)[..., 0]
    if how == "expanded":
        axis = chance.choice((0, 1))
        return x.narrow(axis, 0, 1).expand(x.shape)
    return x


def make(seed: int, dtypes: tuple[torch.dtype, ...] = DTYPES, among: Range = SMALL) -> Case:
    """The case of a seed."""
    chance = random.Random(seed)
    kind = chance if among.alike == 1 else random.Random(f"kind {seed // among.alike}")
    torch.manual_seed(seed)
    dtype, words = kind.choice(dtypes), []
    group = kind.choice((1, 1, 2, 3, 8))
    key_heads = kind.choice((1, 2, 3))
    batch, heads = kind.choice((1, 2, 3)), group * key_heads
    rows, keys = chance.choice(among.lengths), chance.choice(among.lengths)
    if chance.random() < 0.06:
        batch, group, heads = 1, 1, key_heads
        rows, keys = chance.choice((rows, *among.long)), chance.choice(among.long)
    if chance.random() < 0.5:
        rows = keys
    head_dim = kind.choice(among.head_dims)
    value_dim = head_dim if kind.random() < among.same_dim else kind.choice(among.head_dims)
    draw = Draw(chance, batch, heads, rows, keys)
    shapes = {
        "query": (batch, heads, rows, head_dim),
        "key": (batch, key_heads, keys, head_dim),
        "value": (batch, key_heads, keys, value_dim),
    }
    size = chance.choice((0.3, 1.0, 1.0, 3.0))
    tensors = {
        name: laid_out(kind, (torch.randn(shape) * size).to(dtype))
        for name, shape in shapes.items()
    }
    mask, visible = draw_mask(draw, among.masks, kind, words)
    offset = keys - rows if mask is None or isinstance(mask, Tensor) else mask.resolve_offset(
        rows, keys
    )  # fmt: skip
    arguments: dict = {}
    if kind.random() < among.bias:
        shape = [chance.choice((1, n)) for n in (batch, heads, rows, keys)]
        bias = torch.randn(shape[chance.randrange(0, 3) :])
        bias = bias.to(chance.choice((dtype, torch.float32)))
        holds = chance.choice(("plain", "plain", "-inf", "least"))
        if holds != "plain":
            value = -math.inf if holds == "-inf" else torch.finfo(bias.dtype).min
            bias = bias.masked_fill(torch.rand(bias.shape) < chance.choice((0.2, 1.0)), value)
        words.append(f"bias {holds}")
        tensors["bias"] = bias
    if kind.random() < 0.2:
        shape = kind.choice(((heads,), (1, heads), (batch, heads)))
        tensors["sinks"] = torch.randn(shape)
    if kind.random() < 0.2:
        arguments["alibi_slopes"] = torch.rand(kind.choice(((heads,), (batch, heads)))) / 2
    if kind.random() < 0.2:
        arguments["softcap"] = chance.choice((0.5, 5.0, 50.0))
    if kind.random() < 0.3:
        arguments["scale"] = kind.choice((0.0, -0.7, 0.01, 1.0))
    keep = None
    if kind.random() < 0.2:
        p, number = kind.choice((0.1, 0.5)), chance.randrange(2**62)
        arguments |= {"dropout_p": p, "dropout_seed": number}
        index = [torch.arange(n) for n in (heads, rows, keys)]
        keep = torch.stack(
            [dropout.keep(torch.tensor([number]), b, *index, p) for b in range(batch)]
        )
    settings = {}
    if kind.random() < among.buckets:
        settings["q_bucket_size"] = chance.choice((1, 5, 16, 64, 100))
        settings["k_bucket_size"] = chance.choice((1, 16, 64, 65, 128))
        if rows * keys > 5000:
            settings = {name: max(16, size) for name, size in settings.items()}
    if among.any_order and kind.random() < among.any_order:
        settings["deterministic"] = False
    dirt = chance.choice((math.nan, math.inf, -math.inf)) if chance.random() < 0.3 else None
    words += [f"{name} {list(x.shape)}" for name, x in tensors.items()]
    words += [
        str(dtype),
        *(f"{k}={v}" for k, v in (arguments | settings).items() if k != "alibi_slopes"),
    ]
    words += ["alibi"] if "alibi_slopes" in arguments else []
    words += [f"dirt {dirt}"] if dirt is not None else []
    return Case(tensors, mask, visible, offset, arguments, settings, keep, dirt, words)


def soil(case: Case, d_out: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors and the upstream gradient with dirt wherever nobody looks."""
    tensors, d_out = dict(case.tensors), d_out.clone()
    batch, heads, rows = tensors["query"].shape[:3]
    visible = case.visible.expand(batch, heads, -1, -1)
    blind = ~visible.any(3)
    unseen = ~visible.unflatten(1, (tensors["key"].shape[1], -1)).any(2).any(2)
    for name, where in (("query", blind), ("key", unseen), ("value", unseen)):
        tensors[name] = tensors[name].masked_fill(where[..., None], case.dirt)
    return tensors, d_out.masked_fill(blind[..., None], case.dirt)


def dense_results(
    case: Case, dtype: torch.dtype | None, d_out: Tensor, d_lse: Tensor
) -> list[Tensor]:
    """out, lse and gradients by the dense formula, where ``d_out`` is."""
    device = d_out.device
    leaves = {
        name: x.detach().clone().to(device, dtype or x.dtype).requires_grad_()
        for name, x in case.tensors.items()
    }
    given = {
        name: x.to(device, dtype or x.dtype) if isinstance(x, Tensor) else x
        for name, x in case.arguments.items()
        if name != "dropout_seed"
    }
    keep = None if case.keep is None else case.keep.to(device)
    out, lse = dense_attention(
        **leaves, visible=case.visible.to(device), alibi_offset=case.offset, keep=keep, **given
    )
    upstream = (d_out.to(out.dtype), d_lse.to(lse.dtype))
    grads = torch.autograd.grad((out, lse), list(leaves.values()), upstream)
    return [x.detach().cpu() for x in (out, lse, *grads)]


def results(case: Case, kernel: str, device: str, d_out: Tensor, d_lse: Tensor) -> list[Tensor]:
    """The same by one of our kernels, with dirt wherever nobody looks."""
    tensors, upstream = case.tensors, d_out.cpu()
    if case.dirt is not None:
        tensors, upstream = soil(case, upstream)
    leaves = {name: x.detach().to(device).requires_grad_() for name, x in tensors.items()}
    arguments = {
        name: x.to(device) if isinstance(x, Tensor) else x for name, x in case.arguments.items()
    }
    mask = case.mask if case.mask is None else case.mask.to(device)
    out, lse = flash_attention(
        **leaves, mask=mask, **arguments, **case.settings, kernel=kernel, return_lse=True
    )
    grads = torch.autograd.grad(
        (out, lse), list(leaves.values()), (upstream.to(device), d_lse.to(lse))
    )
    return [x.detach().cpu() for x in (out, lse, *grads)]


def run(case: Case, kernel: str, device: str = "cpu", peer: str | None = None) -> None:
    """Raise AssertionError unless output, lse and every gradient are right.

    Args:
        peer: a kernel that is to be as good; None holds them to the dense formula in their dtype.
    """
    batch, heads, rows, _ = case.tensors["query"].shape
    value_dim = case.tensors["value"].shape[3]
    d_out = torch.randn(batch, heads, rows, value_dim).to(case.tensors["value"].dtype)
    d_lse = torch.randn(batch, heads, rows)
    got = results(case, kernel, device, d_out, d_lse)
    if peer is None:
        same = dense_results(case, None, d_out, d_lse)
    else:
        same = results(case, peer, device, d_out, d_lse)
        d_out, d_lse = d_out.to(device), d_lse.to(device)
    exact = dense_results(case, torch.float64, d_out, d_lse)
    floors = natural_errors(case, exact, d_out)
    names = ("out", "lse", *case.tensors)
    for name, *found in zip(names, got, exact, same, strict=True):
        compare(name, *found, floors[name])


def natural_errors(case: Case, exact: list[Tensor], d_out: Tensor) -> dict[str, float]:
    """What rounding alone does to each result, from the size of what is added up in it."""
    query, key, value = (case.tensors[name] for name in ("query", "key", "value"))
    eps = torch.finfo(query.dtype).eps
    scale = abs(case.arguments.get("scale", query.shape[3] ** -0.5))
    finite = exact[1].masked_fill(~exact[1].isfinite(), 0)
    # A score is as wrong as it is large, and so is what is made of it.
    largest = 1 + float(finite.abs().clamp(max=1e4).amax()) * torch.finfo(torch.float32).eps / eps
    largest += scale * rms(query) * rms(key) * query.shape[3] ** 0.5
    rate = 1 + case.arguments.get("dropout_p", 0) / (1 - case.arguments.get("dropout_p", 0))
    d_score = rate * rms(d_out) * rms(value) * value.shape[3] ** 0.5 + 1
    rows = (query.shape[2] * query.shape[1] / key.shape[1]) ** 0.5
    # Few keys have large shares of all rows, which add up.
    shares = max(rows**0.5, rows / max(1, key.shape[2]))
    names = ("bias", "sinks")
    pairs = query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2]
    summed = {n: (pairs / case.tensors[n].numel()) ** 0.5 for n in names if n in case.tensors}
    floors = {
        "out": rms(value), "lse": largest, "query": d_score * scale * rms(key),
        "key": d_score * scale * rms(query) * shares, "value": rms(d_out) * shares,
        **{name: d_score * count for name, count in summed.items()},
    }  # fmt: skip
    return {name: eps * largest * floor for name, floor in floors.items()}


def compare(name: str, got: Tensor, right: Tensor, peer: Tensor, floor: float) -> None:
    assert got.shape == right.shape, f"{name}: shape {list(got.shape)}, not {list(right.shape)}"
    if name == "lse":
        empty = right == -math.inf
        assert torch.equal(got == -math.inf, empty), "lse: -inf exactly where nothing is seen"
        got, right, peer = (x.masked_fill(empty, 0) for x in (got, right, peer))
    assert got.isfinite().all(), f"{name}: {(~got.isfinite()).sum()} of {got.numel()} not finite"
    count = max(1, got.numel()) ** 0.5
    error, allowed = rms(got.double() - right), rms(peer.double() - right)
    # One result that is wrong among many that are right shows in the largest, not in the mean.
    worst = (got.double() - right).abs().amax().item() if got.numel() else 0.0
    limit = 3 * max(allowed, floor)
    assert error <= limit, f"{name}: rms error {error:.2e} > {limit:.2e}, dense {allowed:.2e}"
    most = max(10 * limit, 3 * limit * count**0.5)
    assert worst <= most, f"{name}: largest error {worst:.2e} > {most:.2e}, dense {allowed:.2e}"


def dtypes_of(kernel: str, device: str) -> tuple[torch.dtype, ...]:
    """Triton has no float64; its interpreter multiplies bfloat16 as integers."""
    lacking = [] if kernel in ("auto", "blockwise") else [torch.float64]
    lacking += [torch.bfloat16] if lacking and device == "cpu" else []
    return tuple(dtype for dtype in DTYPES if dtype not in lacking)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--first", type=int, default=None, help="first seed; a random one if unset")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--kernel", default="auto")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    first = random.SystemRandom().randrange(10**9) if options.first is None else options.first
    dtypes = dtypes_of(options.kernel, options.device)
    failed = declined = 0
    print(f"seeds {first} to {first + options.count - 1}, {options.kernel} on {options.device}")
    for seed in range(first, first + options.count):
        case = make(seed, dtypes)
        try:
            run(case, options.kernel, options.device)
        except Exception as error:
            if isinstance(error, ValueError) and "cannot run" in str(error):
                declined += 1
                continue
            failed += 1
            print(f"seed {seed}: {type(error).__name__}: {error}\n    {', '.join(case.words)}")
            sys.stdout.flush()
    print(f"{options.count} cases, {failed} failed, {declined} declined")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
