"""One family under flash_two and under eager, from the same weights: what differs, and how much."""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn

import hf_flash_two
from hf_flash_two.hf.families import NOT_POSSIBLE, attention_kind, name_of, why_not
from hf_flash_two.testing import kernel_calls
from hf_flash_two.testing.errors import gradient_errors, relative_error
from scripts.coverage import inputs as given
from scripts.coverage.build import Family
from scripts.coverage.inputs import padded, run

FORWARD, GRADIENT = 2e-5, 1e-4
WEIGHTS = 1e-4  # computed from scores, of which some models have large ones
DOCUMENTS = (7, 1, 5, 8)
NEW_TOKENS = 5
_MOVES = 4
_CACHES = ("cache", "past_key_values")
# Gradients may be off by the rounding of the model's largest one, as far as float32 tells.
_FLOOR = 4 * torch.finfo(torch.float32).eps / GRADIENT


@dataclass
class Row:
    """What was found about a family.

    Attributes:
        kind: of the family, as `Family.kind`; "none" where its module cannot be imported.
        status: "equal"; "partly", equal, but layers that ran used code of their own although they
            are softmax attention, or all did; "differs"; "error"; "not built", something is missing
            here; or "" where there is nothing to compare.
        layers: attention layers that ran; ours: those of them that called our kernel.
        forward, gradient: largest error by case, relative to the largest entry.
        generation: by cache whether the tokens are equal; a reason where eager cannot.
        notes: causes.
    """

    family: str
    model: str = ""
    kind: str = "none"
    status: str = ""
    patched: bool = False
    layers: int = 0
    ours: int = 0
    calls: int = 0
    forward: dict[str, float | str] = field(default_factory=dict)
    gradient: dict[str, float | str] = field(default_factory=dict)
    generation: dict[str, bool | str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def as_dict(self) -> dict:
        return asdict(self)


def check(family: Family) -> Row:
    """Build, compare, and say everything in a row; never raises."""
    row, start = Row(family.name), time.perf_counter()
    try:
        row.kind = family.kind
        _check(family, row)
    except ImportError as error:
        row.status = "not built"
        row.notes.append(brief(error).partition(" library but")[0])
    except Exception as error:
        row.status = "error"
        row.notes.append(brief(error))
    row.seconds = round(time.perf_counter() - start, 2)
    return row


def brief(error: Exception) -> str:
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    where = f" ({frame.tb_frame.f_code.co_filename.rsplit('/', 1)[-1]}:{frame.tb_lineno})"
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:240]}" + (where if frame else "")


def _check(family: Family, row: Row) -> None:
    cls = family.model_class
    if cls is None:
        row.notes.append("no model in this file")
        return
    row.model = cls.__name__
    if family.override.remark:
        row.notes.append(family.override.remark)
    eager = family.build(family.override.reference)
    plain = given.example(eager, family.override)
    layers = attention_layers(eager)
    row.patched = "hand-written" in layers.values() or family.override.patched
    if row.patched:
        ours = family.build("eager")
        with suppress(ValueError):  # of no layer that can be; the remarks will say why
            hf_flash_two.patch(ours)
    else:
        ours = family.build("flash_two")
    ours.load_state_dict(eager.state_dict())
    run(ours, plain)  # as eager was: some models keep what their first run computes
    counter = LayerCalls(ours)
    cases = {"plain": plain, **{side: padded(plain, side) for side in family.override.sides}}
    good = True
    for name, inputs in cases.items():
        if inputs is not None:
            with counter.watch():
                good &= _compare(row, name, eager, ours, inputs)
    left_out, inactive = family.left_out(), counter.inactive
    if left_out:
        row.notes.append(f"not built: {', '.join(sorted(left_out))}")
    if inactive:
        row.notes.append(f"not run by these inputs: {', '.join(sorted(inactive))}")
    row.layers, row.ours, row.calls = counter.ran, counter.reached, counter.calls
    good &= _weights(row, eager, ours, plain)
    good &= _packed(row, eager, ours, plain)
    good &= _generate(row, eager, ours, cases.get("left") or plain, family.override.caches)
    row.notes += sorted({f"{type(x).__name__}: {_reason(x)}" for x in counter.unreached})
    if not good:
        row.status = "differs"
    elif row.layers:
        others = all(name_of(type(layer)) in NOT_POSSIBLE for layer in counter.unreached)
        row.status = "equal" if row.ours and others else "partly"


def _reason(layer: nn.Module) -> str | None:
    if attention_kind(type(layer)) == "interface":
        return f"set to {layer.config._attn_implementation}"
    return why_not(layer)


def attention_layers(model: nn.Module) -> dict[nn.Module, str]:
    """The attention layers of a model, and the kind of each: "interface" or "hand-written"."""
    kinds = {module: attention_kind(type(module)) for module in model.modules()}
    return {module: kind for module, kind in kinds.items() if kind is not None}


class LayerCalls:
    """The calls of our kernels inside each attention layer that runs while it is watched."""

    def __init__(self, model: nn.Module):
        self.found: dict[nn.Module, int] = {}
        self.calls = 0
        self._layers = list(attention_layers(model))

    @contextmanager
    def watch(self) -> Iterator[None]:
        before: dict[nn.Module, int] = {}
        hooks = ExitStack()
        with hooks, kernel_calls() as calls:

            def enter(module, *_):
                before[module] = len(calls)

            def leave(module, *_):
                self.found[module] = self.found.get(module, 0) + len(calls) - before[module]

            for layer in self._layers:
                hooks.callback(layer.register_forward_pre_hook(enter).remove)
                hooks.callback(layer.register_forward_hook(leave).remove)
            yield
            self.calls += len(calls)

    @property
    def ran(self) -> int:
        return len(self.found)

    @property
    def reached(self) -> int:
        return sum(calls > 0 for calls in self.found.values())

    @property
    def inactive(self) -> set[str]:
        """Classes of attention layers of which none ran."""
        return {type(x).__name__ for x in self._layers} - {type(x).__name__ for x in self.found}

    @property
    def unreached(self) -> list[nn.Module]:
        return [layer for layer, calls in self.found.items() if not calls]


def outputs(result, mask: Tensor | None) -> dict[str, Tensor]:
    """All floating tensors of a model's result by name, those per token only for real tokens."""
    found: dict[str, Tensor] = {}

    def visit(name: str, value) -> None:
        if isinstance(value, Tensor):
            if value.is_floating_point() and value.numel():
                value = _real(value, mask)
                found[name] = value
        elif isinstance(value, dict):
            for key, part in value.items():
                if key not in _CACHES and not key.endswith("attentions"):
                    visit(f"{name}.{key}".lstrip("."), part)
        elif isinstance(value, (list, tuple)):
            for i, part in enumerate(value):
                visit(f"{name}.{i}", part)

    visit("", result)
    return found


def attention_weights(result, name: str = "") -> dict[str, Tensor]:
    """What a model's result holds of attention weights, by name."""
    found: dict[str, Tensor] = {}
    for part_name, part in result.items() if isinstance(result, dict) else enumerate(result):
        at = f"{name}.{part_name}".lstrip(".")
        if isinstance(part, (dict, list, tuple)):
            found |= attention_weights(part, at)
        elif isinstance(part, Tensor) and "attentions" in at:
            found[at] = part
    return found


def _weights(row: Row, eager, ours, plain: dict[str, Tensor]) -> bool:
    """Every entry that eager returns when it is asked is there, and equal."""
    asking = plain | {"output_attentions": True, "return_dict": True}
    try:
        wanted = attention_weights(run(eager, asking))
    except Exception:
        return True  # it takes no such argument
    got = attention_weights(run(ours, asking))
    missing = wanted.keys() - got.keys()
    if missing:
        row.notes.append(f"attention weights: {', '.join(sorted(missing))} missing")
        return False
    name, error = _worst({name: relative_error(got[name], value) for name, value in wanted.items()})
    if error > WEIGHTS:
        row.notes.append(f"attention weights: {name} {error:.0e}")
    return error <= WEIGHTS


def _real(value: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return value
    if value.shape[:2] == mask.shape:
        return value[mask.bool()]
    return value[mask.flatten().bool()] if value.shape[0] == mask.numel() else value


def _backward(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[dict, dict]:
    """(outputs, gradients of their sum with fixed random weights)"""
    model.zero_grad()
    torch.manual_seed(1)
    result = outputs(model(**copy.deepcopy(inputs)), inputs.get("attention_mask"))
    loss = 0.0
    for i, value in enumerate(result.values()):
        if value.requires_grad:
            weights = given.normal(*value.shape, seed=100 + i).to(value.dtype)
            usable = value.isfinite()
            loss = loss + (value.masked_fill(~usable, 0) * weights).sum()
    if isinstance(loss, Tensor):
        loss.backward()
    gradients = {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return {name: value.detach() for name, value in result.items()}, gradients


def _gradient_errors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    return gradient_errors(actual, expected, floor=_FLOOR)


def _worst(errors: dict[str, float]) -> tuple[str, float]:
    name = max(
        errors, key=lambda n: errors[n] if errors[n] == errors[n] else float("inf"), default=""
    )
    return name, errors.get(name, 0.0)


def _compare(row: Row, case: str, eager, ours, inputs: dict[str, Tensor]) -> bool:
    wanted, wanted_gradients = _backward(eager, inputs)
    got, got_gradients = _backward(ours, inputs)
    missing = wanted.keys() ^ got.keys()
    if missing:
        row.notes.append(f"{case}: only one gives {', '.join(sorted(missing))}")
        return False
    name, error = _worst({n: relative_error(got[n], wanted[n]) for n in wanted})
    parameter, gradient = _worst(_gradient_errors(got_gradients, wanted_gradients))
    row.forward[case], row.gradient[case] = error, gradient
    if error <= FORWARD and gradient <= GRADIENT:
        return True
    row.notes.append(f"{case}: {name} {error:.0e}, gradient of {parameter} {gradient:.0e}")
    return _explained(row, case, eager, inputs, (wanted, wanted_gradients), (got, got_gradients))


def _explained(row: Row, case: str, eager, inputs, wanted, got) -> bool:
    """Whether eager moves half as far by itself: weights moved by their last bit, or float64."""
    again = _distance(_backward(eager, inputs), wanted)
    if max(again) > 0:
        row.notes.append(f"{case}: eager differs from itself by {again[0]:.0e} and {again[1]:.0e}")
    moves = [_distance(_backward(_moved(eager, seed), inputs), wanted) for seed in range(_MOVES)]
    forward, gradient = (max(errors) for errors in zip(*moves, strict=True))
    row.notes.append(
        f"{case}: eager moves by {forward:.0e} and {gradient:.0e} where its weights do by one bit"
    )
    with suppress(Exception):  # some models compute in float32 whatever their weights are
        exact = _in_float32(_backward(copy.deepcopy(eager).double(), _doubled(inputs)))
        error = _distance(exact, wanted)
        row.notes.append(f"{case}: eager moves by {error[0]:.0e} and {error[1]:.0e} in float64")
        forward, gradient = max(forward, error[0]), max(gradient, error[1])
    ours = _distance(got, wanted)
    return ours[0] <= max(FORWARD, 2 * forward) and ours[1] <= max(GRADIENT, 2 * gradient)


def _moved(model: nn.Module, seed: int) -> nn.Module:
    """A copy with each weight up or down by its last bit."""
    moved, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in moved.parameters():
            signs = torch.randint(0, 2, weight.shape, generator=generator) * 2 - 1
            if weight.is_floating_point():
                weight.mul_(1 + signs * torch.finfo(weight.dtype).eps)
    return moved


def _doubled(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    floats = (x for x in inputs.items() if isinstance(x[1], Tensor) and x[1].is_floating_point())
    return inputs | {name: value.double() for name, value in floats}


def _in_float32(results: tuple[dict, dict]) -> tuple[dict, dict]:
    return tuple({name: x.float() for name, x in part.items()} for part in results)


def _distance(of, wanted) -> tuple[float, float]:
    """Largest errors (of the outputs, of the gradients)."""
    forward = _worst({n: relative_error(of[0][n], wanted[0][n]) for n in wanted[0]})[1]
    return forward, _worst(_gradient_errors(of[1], wanted[1]))[1]


def _packed(row: Row, eager, ours, plain: dict[str, Tensor]) -> bool:
    """Documents end to end, told apart by positions alone: each as if it were by itself."""
    names = inspect.signature(eager.forward).parameters
    config = eager.config.get_text_config(decoder=True)
    if "position_ids" not in names or not eager.can_generate() or config.is_encoder_decoder:
        return True
    ids = given.tokens(2, sum(DOCUMENTS), seed=4)
    positions = torch.cat([torch.arange(n) for n in DOCUMENTS])[None].expand(2, -1)

    def together(model) -> Tensor:
        return _logits(
            run(model, {"input_ids": ids, "position_ids": positions, "use_cache": False})
        )

    try:
        alone = [_logits(run(eager, {"input_ids": part})) for part in ids.split(DOCUMENTS, 1)]
        wanted = torch.cat(alone, dim=1)
        theirs = relative_error(together(eager), wanted)
    except Exception as error:
        row.forward["packed"] = f"eager: {brief(error)}"
        return True
    try:
        error = relative_error(together(ours), wanted)
    except NotImplementedError as refusal:
        if theirs <= FORWARD:
            raise
        row.forward["packed"] = f"refused: {brief(refusal)}"
        return True
    row.forward["packed"] = error
    if error <= FORWARD:
        return True
    if theirs > FORWARD:
        row.forward["packed"] = f"the model mixes documents, under eager too ({theirs:.0e})"
        return True
    row.notes.append(f"packed: {error:.0e}")
    return False


def _logits(result) -> Tensor:
    return result["logits"] if "logits" in result else result["last_hidden_state"]


def _generate(row: Row, eager, ours, inputs: dict[str, Tensor], caches: tuple[str, ...]) -> bool:
    if not eager.can_generate():
        return True
    inputs = {k: v for k, v in inputs.items() if not k.startswith("decoder_")}
    good = True
    for cache in caches:
        options = {"cache_implementation": "static", "disable_compile": True}
        options = options if cache == "static" else {}
        try:
            wanted = _greedy(eager, inputs, **options)
        except Exception as error:
            row.generation[cache] = f"eager: {brief(error)}"
            continue
        try:
            got = _greedy(ours, inputs, **options)
        except Exception as error:
            row.generation[cache] = False
            row.notes.append(f"{cache} cache: {brief(error)}")
            good = False
            continue
        row.generation[cache] = got.shape == wanted.shape and bool((got == wanted).all())
        good &= row.generation[cache]
    return good


def _greedy(model, inputs: dict[str, Tensor], **options) -> Tensor:
    model.generation_config.eos_token_id = None
    torch.manual_seed(1)
    options |= {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    if model.config.is_encoder_decoder:
        options["decoder_start_token_id"] = 0
    result = model.generate(**copy.deepcopy(inputs), **options)
    return result if isinstance(result, Tensor) else result["sequences"]
