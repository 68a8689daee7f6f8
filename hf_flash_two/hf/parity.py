"""`check_parity`: a user's own model and batch under flash_two, against eager in higher precision.

The model itself runs, with hooks on its attention layers: under flash_two, under eager, and under
eager with every weight in higher precision, which is the reference. Packed documents run together
under flash_two but one by one under eager, so that no mask that separates them is in the reference.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedConfig

from hf_flash_two.hf import compat, patching
from hf_flash_two.hf.packing import all_visible, document_ids, falls, may_be_packed
from hf_flash_two.kernels import select

Call = tuple[str, int]
"""An attention layer's name, and which of its calls in one forward it is."""
Place = tuple[slice, slice]
"""Where a packed document is in a batch."""
Results = dict[tuple[str, int, str], Tensor]
"""Outputs and gradients by layer (the whole model is ""), number of the call, and name."""

_OUTPUT, _GRADIENT = "output", "gradient at the first attention layer"
# What patching puts on a module.
_PATCHED = ("forward", "_old_forward", patching._UNDO)
# FlashAttention's own tests allow its gradients three times the error, too: they recompute.
_OUTPUT_FACTOR, _GRADIENT_FACTOR = 2, 3
# Describe packed documents, and are dropped where each document runs by itself.
_BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


@dataclass(frozen=True)
class Error:
    """Root mean square error of one tensor, relative to the tensor's own root mean square.

    Attributes:
        of: which tensor.
        flash_two, eager: the errors of both in the working precision, against the reference.
        allowed: twice eager's for outputs and three times for gradients, plus the epsilon of
            the working precision.
    """

    of: str
    flash_two: float
    eager: float
    allowed: float

    @property
    def ok(self) -> bool:
        return self.flash_two <= self.allowed

    @property
    def share(self) -> float:
        """How much of what is allowed is used; NaN is beyond everything."""
        share = self.flash_two / self.allowed
        return share if share == share else torch.inf

    def __str__(self) -> str:
        mark = " " if self.ok else "!"
        return f"{self.flash_two:10.1e}{mark}{self.eager:8.1e}{self.allowed:9.1e}"


@dataclass(frozen=True)
class Parity:
    """The errors of an attention layer by itself, or of the whole model.

    Attributes:
        name: of the layer in the model.
        uses: the kernel that ran in it; or what it uses instead, and why.
        output: None where there is nothing to compare.
        gradient: of all inputs and parameters of a layer the one that comes off worst; of the
            model the gradient that arrives at its first attention layer.
    """

    name: str
    uses: str
    output: Error | None = None
    gradient: Error | None = None

    @property
    def errors(self) -> tuple[Error, ...]:
        return tuple(error for error in (self.output, self.gradient) if error)

    @property
    def ok(self) -> bool:
        return all(error.ok for error in self.errors)

    def __str__(self) -> str:
        cells = [
            str(e) if e else f"{'-':>10}{'-':>9}{'-':>9}" for e in (self.output, self.gradient)
        ]
        return "  ".join((*cells, self.uses)).rstrip()


@dataclass(frozen=True)
class Check:
    """A statement about the model on this batch; ``ok`` is None where it does not apply."""

    name: str
    ok: bool | None
    detail: str

    def __str__(self) -> str:
        mark = {True: "ok", False: "FAILED", None: "-"}[self.ok]
        return f"{mark:8}{self.name:18}{self.detail}"


@dataclass(frozen=True)
class ParityReport:
    """What `check_parity` found; ``str`` of it is a table."""

    precision: str
    layers: tuple[Parity, ...]
    model: Parity
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """No check failed."""
        return all(check.ok is not False for check in self.checks)

    def __str__(self) -> str:
        rows = (*self.layers, self.model)
        width = max(len(row.name) for row in rows)
        titles = f"{'flash_two':>10}{'eager':>9}{'allowed':>9}"
        return "\n".join(
            [
                self.precision,
                "",
                f"{'':{width}}{'error of output':>28}{'error of gradient':>30}",
                f"{'':{width}}{titles}  {titles}  uses",
                *(f"{row.name:{width}}{row}" for row in rows),
                "",
                *map(str, self.checks),
            ]
        )


def check_parity(model: nn.Module, batch: Mapping[str, Any]) -> ParityReport:
    """Whether ``model`` computes under flash_two what it should, on a batch of the user's own.

    For each attention layer by itself and for the whole model: the errors of output and gradients
    against eager in higher precision, next to eager's own. Then: what changes in one packed
    document, or in padding, must move nothing else; all must be finite; the kernel must have run.

    Args:
        model: a Transformers model on one device, bare or inside PEFT or another module, under any
            implementation, `patch`-ed or not. It runs in evaluation mode and in its own dtype, or
            in that of an enclosing ``torch.autocast``, and is afterwards what it was before. Until
            then its weights exist twice, the second time in higher precision.
        batch: the arguments of its forward, as a collator returns them.

    Returns:
        A `ParityReport`; its ``ok`` says it in one word and its ``str`` in a table.

    Raises:
        ValueError: the model cannot run under flash_two or eager, or the batch holds packed
            documents that cannot be taken apart.
    """
    weights = [p for p in model.parameters() if _has_precision(p)]
    if not weights:
        raise ValueError(f"model: {type(model).__name__} has no floating-point parameters")
    device = weights[0].device
    working = max((p.dtype for p in weights), key=lambda dtype: torch.finfo(dtype).eps)
    if torch.is_autocast_enabled(device.type):
        working = torch.get_autocast_dtype(device.type)
    exact = torch.float32 if working.itemsize < 4 else torch.float64

    with _as_it_was(model), torch.compiler.set_stance("force_eager"):
        with patching.patched(model) as report:
            runs = _Runs(model, [layer.name for layer in report.layers if layer.ok], batch, device)
        with _eager(model):
            eager, given, kernels = runs.measure(runs.apart)
            if any(kernels.values()):
                raise ValueError(f"model: {type(model).__name__} cannot be switched to eager")
            eager_moved = runs.moved_by_padding()
        with patching.patched(model):
            ours, _, kernels = runs.measure([runs.batch], given)
            moved = runs.moved_by_padding()
            documents = runs.moved_by_documents()
        with _eager(model), _raised(model, exact), torch.autocast(device.type, enabled=False):
            true, _, _ = runs.measure(runs.apart, given, exact)

    epsilon = torch.finfo(working).eps
    reached = {layer for layer, _, _ in ours if layer}
    rows = []
    for layer in report.layers:
        uses = f"{layer.uses}, {layer.reason}"
        if layer.ok:
            ran = "/".join(sorted(kernels[layer.name])) or "none of its kernels"
            uses = f"{layer.uses}, {ran if layer.name in reached else 'not in this batch'}"
        rows.append(_compare(layer.name, uses, ours, eager, true, epsilon, runs.real))
    whole = _compare("", "", ours, eager, true, epsilon, runs.real)
    names = [str(dtype).removeprefix("torch.") for dtype in (working, exact)]
    return ParityReport(
        f"flash_two and eager in {names[0]}, against eager in {names[1]}. Errors are root mean "
        f"squares, relative.\nAllowed: {_OUTPUT_FACTOR} times eager's for outputs, "
        f"{_GRADIENT_FACTOR} times for gradients, plus {epsilon:.0e}.",
        tuple(rows),
        whole,
        (
            _check_layers(rows),
            Check("whole model", whole.ok, "with the errors of all layers together"),
            _check_documents(documents, max(epsilon, 1e-6)),
            _check_padding(moved, eager_moved, max(epsilon, 1e-6)),
            _check_finite(ours),
            _check_kernels({layer: kernels[layer] for layer in reached}, len(rows)),
        ),
    )


# Verdicts


def _compare(
    layer: str, uses: str, ours: Results, eager: Results, true: Results, epsilon: float, real
) -> Parity:
    """The errors of a layer: of its output, and of that gradient which comes off worst."""
    tensors = {slot: real(layer, true[slot]) for slot in true if slot[0] == layer}
    sizes = {slot: _rms(x) for slot, x in tensors.items()}
    errors = {
        slot: [_rms(real(layer, run[slot]).to(x.dtype) - x) for run in (ours, eager)]
        for slot, x in tensors.items()
    }
    for slot, x in tensors.items():
        # What is zero but for rounding, as a key's bias has it: measured by others of its kind.
        if errors[slot][1] >= sizes[slot] / 2:
            sizes[slot] = max(sizes[other] for other, y in tensors.items() if y.dim() == x.dim())
        errors[slot] = [error / (sizes[slot] or 1.0) for error in errors[slot]]
    # Of few numbers, eager's may be right by luck: then its usual error counts.
    usual = statistics.median(e for _, e in errors.values()) if errors else 0.0
    found: dict[bool, list[Error]] = {True: [], False: []}
    for (_, call, name), (own, of_eager) in errors.items():
        factor = _OUTPUT_FACTOR if name == _OUTPUT else _GRADIENT_FACTOR
        allowed = factor * max(of_eager, usual) + epsilon
        error = Error(name if call == 0 else f"{name}, call {call + 1}", own, of_eager, allowed)
        found[name == _OUTPUT].append(error)
    worst = [max(found[k], key=lambda e: e.share, default=None) for k in (True, False)]
    return Parity(layer or "whole model", uses, *worst)


def _rms(x: Tensor) -> float:
    return torch.linalg.vector_norm(x, dtype=torch.float64).item() / max(1, x.numel()) ** 0.5


def _check_layers(rows: list[Parity]) -> Check:
    compared = [row for row in rows if row.errors]
    wrong = [row for row in compared if not row.ok]
    detail = f"{len(compared)} of {len(rows)}, each by itself"
    if wrong:
        row = max(wrong, key=lambda row: max(e.share for e in row.errors))
        detail = f"{len(wrong)} of {detail}; worst is {row.name}, "
        detail += max(row.errors, key=lambda e: e.share).of
    return Check("attention layers", bool(compared) and not wrong, detail)


def _check_documents(moved: tuple[float, float, int] | None, limit: float) -> Check:
    if moved is None:
        return Check("documents apart", None, "no packed documents in this batch")
    others, itself, count = moved
    detail = (
        f"{count} documents: other tokens in one move it by {itself:.0e}, the rest by {others:.0e} "
        f"(allowed {limit:.0e})"
    )
    return Check("documents apart", others <= limit < itself, detail)


def _check_padding(moved: float | None, eager: float | None, limit: float) -> Check:
    if moved is None or eager is None:
        return Check("padding unseen", None, "no padding in this batch")
    limit = max(limit, 2 * eager)
    detail = f"other tokens in it move real ones by {moved:.0e} (allowed {limit:.0e})"
    return Check("padding unseen", moved <= limit, detail)


def _check_finite(ours: Results) -> Check:
    wrong = [slot for slot, tensor in ours.items() if not tensor.isfinite().all()]
    detail = "no NaN, no infinity, in padding neither"
    if wrong:
        layer, _, name = wrong[0]
        detail = f"NaN or infinity in {name} of {layer or 'the whole model'}"
    return Check("finite", not wrong, detail)


def _check_kernels(reached: dict[str, set[str]], layers: int) -> Check:
    idle = [name for name, kernels in reached.items() if not kernels]
    detail = f"its kernels ran in {len(reached) - len(idle)} of {layers} attention layers"
    detail += f", not in {idle[0]}" if idle else ""
    return Check("flash_two", bool(reached) and not idle, detail)


# The model, made ready and put back


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Unpatched, in evaluation mode, all weights trained; at the end everything as it was."""
    modules = list(model.modules())
    patches = [{k: vars(m)[k] for k in _PATCHED if k in vars(m)} for m in modules]
    training = [module.training for module in modules]
    trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    configs = [(config, compat.implementation(config)) for config in _configs(model)]
    try:
        patching.unpatch(model)
        model.eval()
        for parameter in trained:
            parameter.requires_grad_(_has_precision(parameter))
        yield
    finally:
        for parameter, was in trained.items():
            parameter.requires_grad_(was)
        for module, patch, was in zip(modules, patches, training, strict=True):
            vars(module).update(patch)
            module.training = was
        _set_implementations(configs)


@contextmanager
def _eager(model: nn.Module) -> Iterator[None]:
    before = [(config, compat.implementation(config)) for config in _configs(model)]
    try:
        _set_implementations(
            (c, "sdpa" if compat.needs_its_sdpa(c) else "eager") for c, _ in before
        )
        yield
    finally:
        _set_implementations(before)


def _set_implementations(names: Iterable[tuple[PreTrainedConfig, str | None]]) -> None:
    for config, name in names:
        compat.set_implementation(config, name)


@contextmanager
def _raised(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Weights and buffers in ``dtype``; at the end in the very memory they were in."""
    tensors = [x for x in (*model.parameters(), *model.buffers()) if _has_precision(x)]
    before = [x.data for x in tensors]
    try:
        for x in tensors:
            x.data = x.data.to(dtype)
        with _NoFloat32():
            yield
    finally:
        for x, data in zip(tensors, before, strict=True):
            x.data = data


class _NoFloat32(TorchFunctionMode):
    """Leaves float64 as it is where a model asks for float32, in softmax and norms.

    Only what has a gradient: rotary angles are to be rounded as they always are.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        x = args[0] if args else None
        if not isinstance(x, Tensor) or x.dtype != torch.float64 or not x.requires_grad:
            return function(*args, **kwargs)
        if function is Tensor.float:
            return x
        if getattr(function, "__name__", "") == "_grouped_mm":  # has no float64
            experts = zip(x.tensor_split(kwargs["offs"][:-1].long().cpu()), args[1], strict=True)
            return torch.cat([tokens @ weight for tokens, weight in experts])
        args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
        kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in kwargs.items()}
        return function(*args, **kwargs)


def _configs(model: nn.Module) -> list[PreTrainedConfig]:
    held = (getattr(module, "config", None) for module in model.modules())
    return list({id(c): c for c in held if isinstance(c, PreTrainedConfig)}.values())


def _has_precision(x: Tensor) -> bool:
    """Not so quantised weights, which only their own modules can compute with."""
    return x.is_floating_point() and x.dtype.itemsize > 1


# Runs


@dataclass
class _Given:
    """What a layer got in one call: inputs by position or name, the cotangent of its output."""

    inputs: dict[int | str, Tensor]
    cotangent: Tensor | None = None


class _Runs:
    """A model and a batch, to be run as it is, as documents one by one, and with other tokens.

    Attributes:
        batch: on the device of the model.
        apart: the batch alone, or one batch for each of its packed documents.
    """

    def __init__(self, model: nn.Module, layers: list[str], batch: Mapping[str, Any], device):
        self.model = model
        self.layers = {name: model.get_submodule(name) for name in layers}
        self.batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        self.configs = _configs(model)
        self.documents = _documents(self.batch)
        self.places = _places(self.documents)
        self.apart = [self._cut(place) for place in self.places] or [self.batch]
        self.cotangent: Tensor | None = None

    def measure(
        self,
        batches: list[dict],
        given: list[dict[Call, _Given]] | None = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[Results, list[dict[Call, _Given]], dict[str, set[str]]]:
        """Run ``batches`` forward and backward, as a whole and then layer by layer.

        Args:
            given: what each layer gets when it is by itself; None: what it gets in the model.
            dtype: to which the numbers in the batch are converted, if at all.

        Returns:
            the results; for each batch what the layers got; by layer the kernels that ran in it.
        """
        parts: dict[tuple[str, int, str], list[Tensor]] = defaultdict(list)
        own, kernels = [], defaultdict(set)
        for index, batch in enumerate(batches):
            with _Calls(self.layers) as calls, _Kernels(calls, kernels):
                output = self._output(batch, dtype)
            place = self.places[index] if len(batches) > 1 else None
            ends = {call: x for call, x in calls.outputs.items() if x.requires_grad}
            start = [x for got in calls.given.values() for x in got.inputs.values()][:1]
            *found, gradient = torch.autograd.grad(
                output,
                [*ends.values(), *(start or [output])],
                self._cotangent(output, place),
                allow_unused=True,
            )
            for call, cotangent in zip(ends, found, strict=True):
                # None: the layer ran, as an image's pooling head may, but the output is without it.
                cotangent = self._random(ends[call], call[0]) if cotangent is None else cotangent
                calls.given[call].cotangent = cotangent
            own.append(calls.given)
            parts["", 0, _OUTPUT].append(output.detach())
            if gradient is not None:
                parts["", 0, _GRADIENT].append(gradient)
        given = own if given is None else given
        given = [self._join_given(given)] if len(batches) < len(given) else given
        for batch, entries in zip(batches, given, strict=True):
            with _Calls(self.layers, entries) as calls:
                self._output(batch, dtype)
            for call, output in calls.outputs.items():
                cotangent = entries[call].cotangent
                if cotangent is not None:
                    parts[*call, _OUTPUT].append(output.detach())
                    leaves = calls.given[call].inputs | self._weights(call[0])
                    gradients = torch.autograd.grad(
                        output,
                        list(leaves.values()),
                        cotangent.to(output.dtype),
                        materialize_grads=True,
                    )
                    for name, gradient in zip(leaves, gradients, strict=True):
                        parts[*call, str(name)].append(gradient)
        results = {}
        for slot, tensors in parts.items():
            sums = slot[2] in self._weights(slot[0])
            results[slot] = sum(x.double() for x in tensors) if sums else self._join(tensors)
        return results, own, kernels

    def moved_by_padding(self) -> float | None:
        """How far other tokens in the padding move real ones at most; None without padding."""
        changed = {}
        for prefix in ("", "decoder_"):
            mask = self._mask(prefix)
            if mask is not None and not mask.all():
                changed |= self._with_other_tokens(prefix, ~mask, special_too=True)
        return self.real("", self._movement(changed)).max().item() if changed else None

    def moved_by_documents(self) -> tuple[float, float, int] | None:
        """How far other tokens in a packed document move other documents at most, itself at least.

        Documents are told apart by the bits of their numbers: those that have a bit change and
        those that do not must stay, then the other way round. Any two of them differ in a bit.
        """
        if self.documents is None:
            return None
        others, itself = [], []
        for bit in range(int(self.documents.max()).bit_length()):
            for value in (0, 1):
                where = (self.documents >> bit) & 1 == value
                moved = self._movement(self._with_other_tokens("", where, special_too=False))
                others.append(moved[~where].max())
                itself.append(moved[where].max())
        return (
            torch.stack(others).max().item(),
            torch.stack(itself).min().item(),
            len(self.places),
        )

    def real(self, layer: str, tensor: Tensor) -> Tensor:
        """``tensor`` without what belongs to padding; ``layer`` is empty for the whole model."""
        mask = self._real_tokens(layer)
        return tensor if mask is None or tensor.shape[:2] != mask.shape else tensor[mask]

    def _real_tokens(self, layer: str) -> Tensor | None:
        decodes = any(getattr(config, "is_encoder_decoder", False) for config in self.configs)
        return self._mask("decoder_" if decodes and (not layer or "decoder" in layer) else "")

    def _weights(self, layer: str) -> dict[int | str, Tensor]:
        module = self.layers.get(layer)
        named = module.named_parameters() if module is not None else ()
        return {name: weight for name, weight in named if weight.requires_grad}

    def _mask(self, prefix: str) -> Tensor | None:
        """bool [B, T], True for real tokens."""
        mask = self.batch.get(f"{prefix}attention_mask")
        return mask != 0 if isinstance(mask, Tensor) and mask.dim() == 2 else None

    def _output(self, batch: dict, dtype: torch.dtype | None = None) -> Tensor:
        """Logits, or else the first tensor of numbers that the model returns."""
        if dtype is not None:
            batch = {
                name: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x
                for name, x in batch.items()
            }
        outputs = self.model(**batch)
        values = outputs.values() if isinstance(outputs, Mapping) else outputs
        values = [getattr(outputs, "logits", None), *values]
        found = [x for x in values if isinstance(x, Tensor) and x.is_floating_point() and x.dim()]
        if not found:
            raise ValueError(f"model: {type(self.model).__name__} returns nothing to compare")
        return found[0]

    def _cotangent(self, output: Tensor, place: Place | None) -> Tensor:
        """Of the model's output, for the batch or the document at ``place``; always the same."""
        if self.cotangent is None:
            shape = output.shape if place is None else (*self.documents.shape, *output.shape[2:])
            self.cotangent = self._random(output.new_empty(shape))
        cotangent = self.cotangent if place is None else self.cotangent[place]
        return cotangent.to(output.dtype)

    def _random(self, like: Tensor, layer: str = "") -> Tensor:
        """Numbers in the shape and dtype of ``like``, 0 in padding."""
        numbers = torch.randn(like.shape, generator=torch.Generator().manual_seed(0)).to(like)
        mask = self._real_tokens(layer)
        if mask is not None and like.shape[:2] == mask.shape:
            numbers[~mask] = 0
        return numbers

    def _movement(self, changed: dict) -> Tensor:
        """Root mean square change of the output per token, relative to the whole output's."""
        with torch.no_grad():
            before, after = self._output(self.batch), self._output(self.batch | changed)
        change = torch.linalg.vector_norm(after.double() - before.double(), dim=-1)
        return change / before.shape[-1] ** 0.5 / _rms(before)

    def _with_other_tokens(self, prefix: str, where: Tensor, *, special_too: bool) -> dict:
        """The input, changed where bool [B, T] says; empty if there is none to change.

        Special tokens stay unless ``special_too``: some of them stand for images and sounds.
        """
        ids = self.batch.get(f"{prefix}input_ids")
        if ids is None:
            embeds = self.batch.get(f"{prefix}inputs_embeds")
            if embeds is None:
                return {}
            return {f"{prefix}inputs_embeds": embeds.where(~where[..., None], 1 - embeds)}
        special = {
            number
            for config in self.configs
            for name, number in vars(config).items()
            if name.endswith(("token_id", "token_index")) and isinstance(number, int)
        }
        special = torch.tensor(sorted(special), dtype=ids.dtype, device=ids.device)
        where = where if special_too else where & ~torch.isin(ids, special)
        ordinary = ids.unique()
        ordinary = ordinary[~torch.isin(ordinary, special)]
        if not len(ordinary):
            return {}
        other = ordinary[(torch.searchsorted(ordinary, ids) + 1) % len(ordinary)]
        return {f"{prefix}input_ids": ids.where(~where, other)}

    def _cut(self, place: Place) -> dict:
        """The packed document at ``place``, as a batch by itself."""
        batch = {}
        for name, x in self.batch.items():
            if not isinstance(x, Tensor) or x.dim() == 0:
                batch[name] = x
            elif x.shape[:2] == self.documents.shape:
                batch[name] = x[place]
            elif x.shape[-2:] == self.documents.shape:
                batch[name] = x[(..., *place)]
            elif name == "position_ids":
                batch[name] = x[..., place[1]]
            elif name not in _BOUNDARIES:
                raise ValueError(
                    f"{name}: expected a batch of text alone where documents are packed, got a "
                    f"tensor {list(x.shape)} that cannot be cut at their boundaries"
                )
        for name in _BOUNDARIES:
            batch.pop(name, None)
        positions = torch.arange(self.documents.shape[1], device=self.documents.device)
        return {"position_ids": positions[None, place[1]]} | batch

    def _join(self, parts: list[Tensor]) -> Tensor:
        """The inverse of `_cut` for what has one entry per token, [1, length, ...]."""
        if len(parts) == 1:
            return parts[0]
        whole = parts[0].new_zeros(*self.documents.shape, *parts[0].shape[2:])
        for place, part in zip(self.places, parts, strict=True):
            whole[place] = part
        return whole

    def _join_given(self, given: list[dict[Call, _Given]]) -> dict[Call, _Given]:
        joined = {}
        for call in given[0]:
            parts = [entries[call] for entries in given]
            inputs = {name: self._join([p.inputs[name] for p in parts]) for name in parts[0].inputs}
            cotangents = [part.cotangent for part in parts]
            reached = all(cotangent is not None for cotangent in cotangents)
            joined[call] = _Given(inputs, self._join(cotangents) if reached else None)
        return joined


class _Calls:
    """Hooks on attention layers, for the length of a block.

    Attributes:
        given: by call, what went into it: tensors with a gradient, so neither masks nor positions.
        outputs: by call, its output.
        running: the calls that have begun and not ended.
    """

    def __init__(self, layers: dict[str, nn.Module], instead: dict[Call, _Given] | None = None):
        """
        Args:
            instead: what is put in, detached, in the dtype of what it takes the place of.
        """
        self.layers = layers
        self.instead = instead
        self.given: dict[Call, _Given] = {}
        self.outputs: dict[Call, Tensor] = {}
        self.running: list[Call] = []

    def __enter__(self) -> _Calls:
        self.hooks = []
        for name, layer in self.layers.items():
            before, after = partial(self._before, name), self._after
            self.hooks.append(layer.register_forward_pre_hook(before, with_kwargs=True))
            self.hooks.append(layer.register_forward_hook(after))
        return self

    def __exit__(self, *_) -> None:
        for hook in self.hooks:
            hook.remove()

    def _before(self, name: str, layer: nn.Module, args: tuple, kwargs: dict):
        call = name, sum(other == name for other, _ in self.given)
        arguments = dict(enumerate(args)) | kwargs
        inputs = {k: x for k, x in arguments.items() if isinstance(x, Tensor) and x.requires_grad}
        if self.instead is not None:
            for k, x in self.instead[call].inputs.items():
                inputs[k] = x.detach().to(arguments[k].dtype).requires_grad_()
        self.given[call] = _Given(inputs)
        self.running.append(call)
        arguments |= inputs
        return tuple(arguments[i] for i in range(len(args))), {k: arguments[k] for k in kwargs}

    def _after(self, layer: nn.Module, args: tuple, output) -> None:
        self.outputs[self.running.pop()] = output[0] if isinstance(output, tuple) else output


class _Kernels(TorchDispatchMode):
    """Notes which kernels of flash_two run in which layer."""

    def __init__(self, calls: _Calls, found: dict[str, set[str]]):
        super().__init__()
        self.calls, self.found = calls, found

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.hf_flash_two.flash_attn_fwd.default and self.calls.running:
            kernel = select(args[-1], args[0]).forward.__module__.rpartition(".")[2]
            self.found[self.calls.running[-1][0]].add(kernel.partition("_")[0])
        return function(*args, **(kwargs or {}))


def _documents(batch: dict) -> Tensor | None:
    """[B, T], the number of the packed document that each token belongs to; None if not packed."""
    tokens = batch.get("input_ids", batch.get("inputs_embeds"))
    if tokens is None:
        return None
    shape = tokens.shape[:2]
    ends, position_ids = batch.get("cu_seq_lens_q"), batch.get("position_ids")
    if ends is not None:
        numbers = torch.zeros(shape, dtype=torch.long, device=tokens.device)
        numbers[0, ends[1:-1].long()] = 1
        numbers = numbers.cumsum(1)
    else:
        if position_ids is not None and position_ids.dim() == 3 and len(position_ids) == 4:
            position_ids = position_ids[
                0
            ]  # the text's, before those of multimodal rotary embedding
        mask = batch.get("attention_mask")
        if not may_be_packed(position_ids, *shape, shape[1]) or not falls(position_ids):
            return None
        if not all_visible(mask):
            return None
        numbers = document_ids(position_ids).expand(shape)
    return numbers if numbers.any() else None


def _places(documents: Tensor | None) -> list[Place]:
    places = []
    for row, numbers in enumerate(documents if documents is not None else ()):
        start = 0
        for length in numbers.unique_consecutive(return_counts=True)[1].tolist():
            places.append((slice(row, row + 1), slice(start, start + length)))
            start += length
    return places
