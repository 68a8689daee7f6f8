"""`patch`, `unpatch` and `patched`: switch a loaded model to flash_two and back.

Layers that go through Transformers' attention interface are switched by their configs. Layers with
hand-written attention run under `tracer`: the layer object gets a ``forward`` that calls the
class's. No class is edited; modules and state_dict stay as they are.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from hf_flash_two.hf import compat, families, layer_forward
from hf_flash_two.hf.families import ALWAYS_REQUESTED, attention_kind, name_of, why_not
from hf_flash_two.hf.forward_pass import unwatch
from hf_flash_two.hf.layer_forward import LayerForward
from hf_flash_two.hf.packing import watch

logger = logging.get_logger(__name__)

_UNDO = "_flash_two_before"


@dataclass(frozen=True)
class Layer:
    """An attention layer: its name in the model, its class, what it uses, why not flash_two."""

    name: str
    kind: str
    uses: str | None
    reason: str = ""

    @property
    def ok(self) -> bool:
        return not self.reason


@dataclass(frozen=True)
class PatchReport:
    """What each attention layer of a model uses now; ``str`` of it is a table."""

    layers: tuple[Layer, ...]

    @property
    def ok(self) -> bool:
        """Every attention layer uses flash_two."""
        return bool(self.layers) and all(layer.ok for layer in self.layers)

    def __str__(self) -> str:
        if not self.layers:
            return "no attention layer found"
        groups: dict[tuple[str, str | None, str], list[str]] = {}
        for layer in self.layers:
            groups.setdefault((layer.kind, layer.uses, layer.reason), []).append(layer.name)
        lines = [f"{'layers':>6}  {'class':32} uses"]
        for (kind, uses, reason), names in groups.items():
            reason = f"  ({reason})" if reason else ""
            lines.append(f"{len(names):6}  {kind:32} {uses}{reason}")
            lines.append(f"{'':8}{names[0]}" + (f" ... {names[-1]}" if len(names) > 1 else ""))
        return "\n".join(lines)


def patch(model: nn.Module) -> PatchReport:
    """Switch every attention layer that can be switched; a second call does nothing.

    Args:
        model: a Transformers model, bare or inside PEFT, DDP, FSDP or any other module.

    Raises:
        TypeError: not a module.
        ValueError: there is no Transformers model in it, or nothing in it can be switched.
    """
    check_model(model)
    parts = list(_parts(model))
    if not parts:
        raise ValueError(
            "model: expected a Transformers model or a module around one, got "
            f"{type(model).__name__}"
        )
    before = _patched_modules(model)
    for part in parts:
        _patch_part(part)
    report = PatchReport(tuple(report_layers(model)))
    if not any(layer.ok for layer in report.layers):
        _restore_but(before, model)
        raise ValueError(f"model: {type(model).__name__} has no layer for flash_two:\n{report}")
    return report


def unpatch(model: nn.Module) -> None:
    """Undo `patch` to the letter; a model that is not patched stays as it is."""
    check_model(model)
    _restore_but(frozenset(), model)


@contextmanager
def patched(model: nn.Module) -> Iterator[PatchReport]:
    """`patch` for the length of a block, yielding the report; undone also after an exception."""
    check_model(model)
    before = _patched_modules(model)
    report = patch(model)
    try:
        yield report
    finally:
        _restore_but(before, model)


def check_model(model: object) -> None:
    """Raise TypeError unless ``model`` is a loaded model; the message says how to get one."""
    if isinstance(model, nn.Module):
        return
    got, instead = type(model).__name__, "pass the model"
    if isinstance(model, str):
        got, instead = repr(model), "load it: AutoModelForCausalLM.from_pretrained(...)"
    elif isinstance(model, PreTrainedConfig):
        instead = "build the model: AutoModelForCausalLM.from_config(config)"
    elif inspect.isclass(model):
        got, instead = f"the class {model.__name__}", "load or build a model of it"
    elif isinstance(getattr(model, "model", None), nn.Module):
        instead = "pass its `.model`"
    raise TypeError(f"model: expected a loaded model (torch.nn.Module), got {got}; {instead}")


def patch_built(model: PreTrainedModel) -> None:
    """Patch the parts of a new model whose configs ask for it, and warn of layers left out.

    Raises:
        ValueError: no attention layer of the model can be switched.
    """
    asking = [part for part in _parts(model) if compat.is_ours(compat.implementation(part.config))]
    names: dict[int | None, str | None] = {
        id(part.config): compat.implementation(part.config) for part in asking
    }
    for part in asking:
        if not compat.uses_interface(part):
            compat.set_implementation(part.config, families.default_implementation(part.config))
    unreached = []
    if model in asking:  # Transformers hands the name on to sub-configs, but not to others
        reached = dict(compat.requested(model.config, compat.FLASH_TWO)).keys() | names.keys()
        unreached = [part for part in _parts(model) if id(part.config) not in reached]
    patch_requested(model, names, unreached)


def patch_requested(
    model: PreTrainedModel,
    names: Mapping[int | None, str | None],
    unreached: Iterable[PreTrainedModel] = (),
) -> None:
    """Switch each part of ``model`` to the name that its config is asked to use, or back.

    Args:
        names: by id of config; None for all others.
        unreached: parts whose configs Transformers did not set though it should have.

    Raises:
        ValueError: as `patch_built`.
    """
    asking = []
    for part in _parts(model):
        name = names.get(id(part.config), names.get(None))
        if compat.is_ours(name):
            _patch_part(part, name)
            asking.append(part)
        elif name is not None:
            _restore_part(part)
    left = tuple(
        layer for part in (*asking, *unreached) for layer in _report_part(part) if not layer.ok
    )
    if not left:
        return
    reason = f"{PatchReport(left)}\n`hf_flash_two.patch` reports the same of any loaded model."
    if not any(layer.ok for layer in report_layers(model)):
        for part in asking:
            _restore_part(part)
        raise ValueError(f"attn_implementation: no effect on {type(model).__name__}:\n{reason}")
    logger.warning(
        f"attn_implementation: without effect on parts of {type(model).__name__}:\n{reason}"
    )


def check_built(model: PreTrainedModel, asks: bool) -> None:
    """Where the feature "loading" is missing: watch a model that ``asks`` for flash_two.

    Raises:
        NotImplementedError: its family has hand-written attention.
    """
    if asks:
        watch(model)
    module = sys.modules[type(model).__module__]
    classes = [x for x in vars(module).values() if inspect.isclass(x) and issubclass(x, nn.Module)]
    kinds = {attention_kind(x) for x in classes if x.__module__ == module.__name__}
    if asks and "hand-written" in kinds and "interface" not in kinds:
        compat.require("loading")


def _patch_part(part: PreTrainedModel, name: str | None = None) -> None:
    """Switch the layers that are ``part``'s own, not those of other models in it, to ``name``."""
    name = compat.preferred_name() if name is None else name
    ours, configs = [], []
    for at, layer in _layers_of(part):
        if attention_kind(type(layer)) == "interface":
            configs.append(getattr(layer, "config", None))
        elif why_not(layer) is None:
            ours.append((at, layer))
    if ours or compat.uses_interface(part):
        configs.append(part.config)
    for config in filter(None, configs):
        _switch(part, config, "sdpa" if ours and families.needs_its_sdpa(config) else name)
    if configs:
        watch(part)
    for at, layer in ours:
        if layer_forward.of(layer) is None:
            believed = name_of(type(layer)) not in ALWAYS_REQUESTED
            LayerForward(layer, f"{at} ({type(layer).__name__})", believed=believed)


def _switch(part: PreTrainedModel, config: PreTrainedConfig, name: str) -> None:
    before = compat.implementation(config)
    if before != name:
        part.__dict__.setdefault(_UNDO, []).append((config, before))
        compat.set_implementation(config, name)


def _restore(modules: Iterable[nn.Module]) -> None:
    for module in modules:
        forward = layer_forward.of(module)
        if forward is not None:
            forward.remove(module)
        for config, before in reversed(vars(module).pop(_UNDO, ())):
            compat.set_implementation(config, before)
        if isinstance(module, PreTrainedModel) and not compat.uses_ours(module.config):
            unwatch(module)


def _restore_but(patched: frozenset[int], model: nn.Module) -> None:
    _restore(module for module in model.modules() if id(module) not in patched)


def _restore_part(part: PreTrainedModel) -> None:
    _restore([part, *(layer for _, layer in _layers_of(part))])
    unwatch(part)


def _patched_modules(model: nn.Module) -> frozenset[int]:
    return frozenset(
        id(module)
        for module in model.modules()
        if _UNDO in vars(module) or layer_forward.of(module) is not None
    )


def _parts(model: nn.Module) -> Iterable[PreTrainedModel]:
    return (module for module in model.modules() if isinstance(module, PreTrainedModel))


def _layers_of(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The attention layers below ``module``, down to the next Transformers model."""
    for at, child in module.named_children():
        at = f"{name}.{at}" if name else at
        if isinstance(child, PreTrainedModel):
            continue
        if attention_kind(type(child)) is not None:
            yield at, child
        yield from _layers_of(child, at)


def report_layers(model: nn.Module) -> Iterator[Layer]:
    """What each attention layer of ``model`` uses now."""
    for name, part in model.named_modules():
        if isinstance(part, PreTrainedModel):
            yield from _report_part(part, name)


def _report_part(part: PreTrainedModel, name: str = "") -> Iterator[Layer]:
    for at, layer in _layers_of(part, name):
        kind = type(layer).__name__
        if attention_kind(type(layer)) == "interface":
            uses = compat.implementation(getattr(layer, "config", None) or part.config)
            yield Layer(at, kind, uses, "" if compat.is_ours(uses) else f"its config says {uses!r}")
        elif layer_forward.of(layer) is not None:
            yield Layer(at, kind, compat.FLASH_TWO)
        else:
            yield Layer(at, kind, "its own code", why_not(layer) or "not patched")
