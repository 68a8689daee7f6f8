"""`patch`, `unpatch` and `patched`: switch a loaded model to flash_two and back.

Models whose layers go through Transformers' attention interface are switched by their configs.
Layers that compute attention themselves run under `scores.own_attention`: the layer object gets a
``forward`` of its own that calls the class's. No class is edited, modules and state_dict stay.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial

from torch import nn
from transformers import PreTrainedModel

from hf_flash_two.hf import compat
from hf_flash_two.hf.scores import Scores, own_attention

_UNDO = "_flash_two_before"

OWN_ATTENTION = frozenset(
    {
        "blip.modeling_blip_text.BlipTextSelfAttention",
        "bloom.modeling_bloom.BloomAttention",
        "codegen.modeling_codegen.CodeGenAttention",
        "fsmt.modeling_fsmt.Attention",
        "gpt_neo.modeling_gpt_neo.GPTNeoSelfAttention",
        "gpt_neox_japanese.modeling_gpt_neox_japanese.GPTNeoXJapaneseAttention",
        "gptj.modeling_gptj.GPTJAttention",
        "ibert.modeling_ibert.IBertSelfAttention",
        "imagegpt.modeling_imagegpt.ImageGPTAttention",
        "luke.modeling_luke.LukeSelfAttention",
        "megatron_bert.modeling_megatron_bert.MegatronBertSelfAttention",
        "mpnet.modeling_mpnet.MPNetSelfAttention",
        "mvp.modeling_mvp.MvpAttention",
        "rembert.modeling_rembert.RemBertSelfAttention",
        "roformer.modeling_roformer.RoFormerSelfAttention",
        "tapas.modeling_tapas.TapasSelfAttention",
        "trocr.modeling_trocr.TrOCRAttention",
        "visual_bert.modeling_visual_bert.VisualBertSelfAttention",
    }
)
"""Classes of transformers.models that compute attention themselves, and that are tested to give the
same under `own_attention`."""


@dataclass(frozen=True)
class Layer:
    """One attention layer: its name in the model, its class, what it uses, and why not ours."""

    name: str
    kind: str
    uses: str
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

    @property
    def unsupported(self) -> tuple[Layer, ...]:
        return tuple(layer for layer in self.layers if not layer.ok)

    def __str__(self) -> str:
        if not self.layers:
            return "no attention layer found"
        groups: dict[tuple[str, str, str], list[str]] = {}
        for layer in self.layers:
            groups.setdefault((layer.kind, layer.uses, layer.reason), []).append(layer.name)
        lines = [f"{'layers':>6}  {'class':32} uses"]
        for (kind, uses, reason), names in groups.items():
            reason = f"  ({reason})" if reason else ""
            lines.append(f"{len(names):6}  {kind:32} {uses}{reason}")
            lines.append(f"{'':8}{names[0]}" + (f" ... {names[-1]}" if len(names) > 1 else ""))
        return "\n".join(lines)


def patch(model: nn.Module) -> PatchReport:
    """Switch every attention layer of a loaded model that can be switched; again is no harm.

    Args:
        model: a Transformers model, bare or inside PEFT, DDP, FSDP or any other module.

    Raises:
        ValueError: there is no Transformers model in it, or nothing in it can be switched.
    """
    parts = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    if not parts:
        raise ValueError(
            "model: expected a Transformers model or a module around one, got "
            f"{type(model).__name__}"
        )
    if not hasattr(model, _UNDO):
        before = {}
        for part in parts:
            for config in compat.configs_of(part.config):
                before.setdefault(id(config), (config, compat.implementation(config)))
        object.__setattr__(model, _UNDO, list(before.values()))
    for part in parts:
        name = compat.FLASH_TWO if compat.uses_interface(part) else compat.FA_TWO
        if compat.uses_interface(part) or any(map(_is_own, part.modules())):
            compat.set_implementation(part.config, name)
    for name, layer in model.named_modules():
        if _is_own(layer) and not _is_patched(layer):
            previous = layer.__dict__.get("forward")
            forward = partial(_forward, layer, f"{name} ({type(layer).__name__})", previous)
            forward.__signature__ = inspect.signature(layer.forward)
            layer.forward = forward
    report = PatchReport(tuple(_layers(model)))
    if not any(layer.ok for layer in report.layers):
        unpatch(model)
        raise ValueError(f"model: {type(model).__name__} has no layer for flash_two:\n{report}")
    return report


def unpatch(model: nn.Module) -> None:
    """Undo `patch` to the letter; a model that is not patched stays as it is."""
    for layer in model.modules():
        if _is_patched(layer):
            previous = layer.forward.args[2]
            del layer.forward
            if previous is not None:
                layer.forward = previous
    for config, before in model.__dict__.pop(_UNDO, ()):
        compat.set_implementation(config, before)


@contextmanager
def patched(model: nn.Module) -> Iterator[PatchReport]:
    """`patch` for the length of a block, yielding the report; undone also after an exception."""
    was_patched = hasattr(model, _UNDO)
    report = patch(model)
    try:
        yield report
    finally:
        if not was_patched:
            unpatch(model)


def _forward(layer: nn.Module, name: str, previous, *args, **kwargs):
    call = type(layer).forward.__get__(layer) if previous is None else previous
    if kwargs.get("output_attentions"):
        raise ValueError(
            f"{name}: attention weights are not computed under flash_two; call "
            "hf_flash_two.unpatch(model) for a forward with output_attentions=True"
        )
    with own_attention(name):
        outputs = call(*args, **kwargs)
    # Layers return their probabilities too: none were computed.
    if isinstance(outputs, tuple):
        return tuple(None if isinstance(part, Scores) else part for part in outputs)
    return outputs


def _is_own(layer: nn.Module) -> bool:
    name = f"{type(layer).__module__}.{type(layer).__qualname__}"
    return name.removeprefix("transformers.models.") in OWN_ATTENTION


def _is_patched(layer: nn.Module) -> bool:
    return getattr(layer.__dict__.get("forward"), "func", None) is _forward


def _layers(model: nn.Module) -> Iterator[Layer]:
    owners: dict[str, PreTrainedModel | None] = {"": None}
    for name, module in model.named_modules():
        owner = module if isinstance(module, PreTrainedModel) else owners[_parent(name)]
        owners[name] = owner
        kind = type(module).__name__
        how = _attention_kind(type(module))
        if _is_patched(module):
            yield Layer(name, kind, "flash_two")
        elif how == "interface":
            config = getattr(module, "config", None) or owner.config
            uses = compat.implementation(config)
            ours = uses in (compat.FLASH_TWO, compat.FA_TWO)
            yield Layer(name, kind, uses, "" if ours else f"its config says {uses!r}")
        elif how == "own":
            yield Layer(name, kind, "its own code", "computes attention itself in a way not known")


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


@cache
def _attention_kind(cls: type) -> str | None:
    """ "interface", "own" or None for a class that is no attention layer."""
    if cls is nn.MultiheadAttention:
        return "own"
    if issubclass(cls, PreTrainedModel) or not cls.__module__.startswith("transformers.models."):
        return None
    try:
        sources = [
            inspect.getsource(member)
            for owner in cls.__mro__
            if owner.__module__.startswith("transformers.models.")
            for member in vars(owner).values()
            if inspect.isfunction(member)
        ]
    except OSError:
        return None
    text = "\n".join(sources)
    if "ALL_ATTENTION_FUNCTIONS" in text:
        return "interface"
    computes = "softmax(" in text.lower() and ("matmul(" in text or "bmm(" in text)
    return "own" if computes or "scaled_dot_product_attention(" in text else None
