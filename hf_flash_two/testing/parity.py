"""`check_parity`: a user's own model and batch under flash_two, against eager in higher precision.

The model itself runs (see `layerwise`): under flash_two, under eager, and under eager with all
weights in higher precision, which is the reference. Packed documents run together under flash_two
but one by one under eager, so that the reference needs no mask that separates them.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from hf_flash_two.hf import patching
from hf_flash_two.testing.layerwise import (
    OUTPUT,
    Batch,
    LayerwiseRuns,
    Slot,
    as_it_was,
    check_batch,
    configs_of,
    eagerly,
    has_precision,
    raised,
    rms,
)

# FlashAttention's own tests allow its gradients three times the error, too: they recompute.
_OUTPUT_FACTOR, _GRADIENT_FACTOR = 2, 3
# What recomputing probabilities of large scores costs, in epsilons of the sums' float32 or float64.
_ROUNDING = 32


@dataclass(frozen=True)
class Error:
    """Root mean square error of one tensor, relative to the tensor's own root mean square.

    Attributes:
        of: the name of the tensor.
        flash_two, eager: the errors of both in the working precision, against the reference.
        allowed: twice eager's for outputs and three times for gradients, plus the epsilon of
            the working precision; at least what rounding of sums may amount to.
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
        """The error as a share of what is allowed; infinite for NaN."""
        share = self.flash_two / self.allowed
        return share if share == share else torch.inf

    def __str__(self) -> str:
        mark = " " if self.ok else "!"
        return f"{self.flash_two:10.1e}{mark}{self.eager:8.1e}{self.allowed:9.1e}"


@dataclass(frozen=True)
class Parity:
    """The errors of an attention layer by itself, or of the whole model.

    Attributes:
        name: the layer's name in the model.
        uses: the kernel that ran in it; or what it uses instead, and why.
        output: its error; None where there is nothing to compare.
        gradient: of a layer the worst among all inputs and parameters; of the model the gradient
            that arrives at its first attention layer.
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
        nothing = f"{'-':>10}{'-':>9}{'-':>9}"
        return f"{self.output or nothing}  {self.gradient or nothing}  {self.uses}".rstrip()


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
    """Check what ``model`` computes under flash_two, on a batch of the user's own.

    The report has the errors of output and gradients against eager in higher precision, next to
    eager's own, for each attention layer by itself and for the whole model. It also says whether a
    change in one packed document, or in padding, moves anything else, whether all results are
    finite, and whether the kernels ran.

    Args:
        model: a Transformers model on one device, bare or inside PEFT or another module, under any
            implementation, `patch`-ed or not. It runs in evaluation mode and in its own dtype, or
            in that of an enclosing ``torch.autocast``, and is put back as it was. Its weights exist
            twice meanwhile, the second time in higher precision.
        batch: the arguments of its forward, as a collator returns them.

    Returns:
        A `ParityReport`; its ``ok`` is the verdict and its ``str`` a table.

    Raises:
        TypeError: ``model`` is no model, or ``batch`` no batch.
        ValueError: the model cannot run under flash_two or eager, or the batch holds packed
            documents that cannot be taken apart.
    """
    patching.check_model(model)
    check_batch(batch)
    weights = [p for p in model.parameters() if has_precision(p)]
    if not weights:
        raise ValueError(
            f"model: expected floating-point parameters, got {type(model).__name__} without any"
        )
    device = weights[0].device
    working = max((p.dtype for p in weights), key=lambda dtype: torch.finfo(dtype).eps)
    if torch.is_autocast_enabled(device.type):
        working = torch.get_autocast_dtype(device.type)
    exact = torch.float32 if working.itemsize < 4 else torch.float64
    configs = configs_of(model)
    data = Batch(batch, configs, device)

    with as_it_was(model, configs), torch.compiler.set_stance("force_eager"):
        with patching.patched(model) as report:
            layers = {x.name: model.get_submodule(x.name) for x in report.layers if x.ok}
        runs = LayerwiseRuns(model, layers, data, working)
        with eagerly(configs):
            eager = runs.measure(data.apart)
            if any(eager.kernels.values()):
                raise ValueError(
                    f"model: expected one that can be switched to eager, got {type(model).__name__}"
                )
            eager_moved = runs.moved_by_padding()
        with patching.patched(model):
            ours = runs.measure([data.whole], eager.given)
            moved = runs.moved_by_padding()
            documents = runs.moved_by_documents()
        with eagerly(configs), raised(model, exact), torch.autocast(device.type, enabled=False):
            true = runs.measure(data.apart, eager.given, exact)

    epsilon = torch.finfo(working).eps
    rounding = _ROUNDING * torch.finfo(torch.promote_types(working, torch.float32)).eps
    reached = {layer: ours.kernels[layer] for layer, _, _ in ours.tensors if layer}
    tensors = ours.tensors, eager.tensors, true.tensors
    compare = partial(_compare, runs=tensors, epsilon=epsilon, rounding=rounding)
    rows = []
    for layer in report.layers:
        why = layer.reason or "not in this batch"
        if layer.ok and layer.name in reached:
            why = "/".join(sorted(reached[layer.name])) or "none of its kernels"
        rows.append(compare(layer.name, f"{layer.uses}, {why}"))
    whole = compare("", "")
    names = [str(dtype).removeprefix("torch.") for dtype in (working, exact)]
    limit = max(epsilon, 1e-6)
    return ParityReport(
        f"flash_two and eager in {names[0]}, against eager in {names[1]}. Errors are root mean "
        f"squares, relative.\nAllowed: {_OUTPUT_FACTOR} times eager's for outputs, "
        f"{_GRADIENT_FACTOR} times for gradients, plus {epsilon:.0e}; {rounding:.0e} in any case.",
        tuple(rows),
        whole,
        (
            _check_layers(rows),
            Check("whole model", whole.ok, "with the errors of all layers together"),
            _check_documents(documents, limit),
            _check_padding(moved, eager_moved, limit),
            _check_finite(ours.not_finite),
            _check_kernels(reached, len(rows)),
        ),
    )


# Verdicts


def _compare(
    layer: str, uses: str, runs: tuple[dict, dict, dict], epsilon: float, rounding: float
) -> Parity:
    """The errors of a layer: of its output, and of its worst gradient."""
    true = {slot: x for slot, x in runs[2].items() if slot[0] == layer}
    sizes = {slot: rms(x) for slot, x in true.items()}
    errors = {s: [rms(run[s].to(x.dtype) - x) for run in runs[:2]] for s, x in true.items()}
    for slot, x in true.items():
        # A gradient that is zero up to rounding, as that of a key's bias: measured by others.
        if errors[slot][1] >= sizes[slot] / 2:
            sizes[slot] = max(sizes[other] for other, y in true.items() if y.dim() == x.dim())
        errors[slot] = [error / (sizes[slot] or 1.0) for error in errors[slot]]
    # Where there are few numbers eager may be right by luck: then its usual error counts.
    usual = statistics.median(e for _, e in errors.values()) if errors else 0.0
    found: dict[bool, list[Error]] = {True: [], False: []}
    for (_, call, name), (own, of_eager) in errors.items():
        factor = _OUTPUT_FACTOR if name == OUTPUT else _GRADIENT_FACTOR
        allowed = max(factor * max(of_eager, usual) + epsilon, rounding)
        of = f"{name}, call {call + 1}" if call else str(name)
        found[name == OUTPUT].append(Error(of, own, of_eager, allowed))
    worst = [max(found[k], key=lambda e: e.share, default=None) for k in (True, False)]
    return Parity(layer or "whole model", uses, *worst)


def _check_layers(rows: list[Parity]) -> Check:
    compared = [row for row in rows if row.errors]
    wrong = [(e.share, row.name, e.of) for row in compared for e in row.errors if not e.ok]
    detail = f"{len(compared)} of {len(rows)}, each by itself"
    if wrong:
        _, layer, of = max(wrong)
        count = len({name for _, name, _ in wrong})
        detail = f"{count} wrong of {len(compared)} compared; worst is {layer}, {of}"
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


def _check_finite(wrong: list[Slot]) -> Check:
    detail = "no NaN or infinity, including in padding"
    if wrong:
        detail = f"NaN or infinity in {wrong[0][2]} of {wrong[0][0] or 'the whole model'}"
    return Check("finite", not wrong, detail)


def _check_kernels(reached: dict[str, set[str]], layers: int) -> Check:
    inactive = [name for name, kernels in reached.items() if not kernels]
    detail = f"its kernels ran in {len(reached) - len(inactive)} of {layers} attention layers"
    detail += f", not in {inactive[0]}" if inactive else ""
    return Check("flash_two", bool(reached) and not inactive, detail)
