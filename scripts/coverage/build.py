"""Every model family of the installed Transformers, and a tiny random model of it.

A configuration starts from the family's defaults; numbers whose names say what they are become
small ones, and `overrides` holds what the rule cannot know.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from hf_flash_two.hf.families import NOT_POSSIBLE, attention_kind, name_of
from scripts.coverage.overrides import OVERRIDES, SMALL, Override

LARGEST = 40_000_000
# Endings of class names, the most telling model first.
_PREFERRED = (
    "ForConditionalGeneration", "ForCausalLM", "ForMaskedLM", "LMHeadModel", "Model",
    "Encoder", "Backbone",
)  # fmt: skip
# Without a default, but the model does not do without.
_NEEDED = (
    "num_key_value_heads", "head_dim", "num_experts_per_tok", "n_routed_experts", "image_token_id",
    "n_shared_experts",
)  # fmt: skip
# What it is about a layer that may change what attention is given.
_TELLING = re.compile("Attention|Moe|MoE|Expert|Router|(Encoder|Decoder)Layer$|Block$")
_DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


@dataclass(frozen=True)
class Family:
    """A file ``transformers/models/<folder>/modeling_<name>.py``.

    Attributes:
        borrowed: where there is none, the model class of another family that stands for this one.
    """

    folder: str
    name: str
    borrowed: str = ""

    @property
    def module(self) -> ModuleType:
        if self.borrowed:
            return sys.modules[getattr(transformers, self.borrowed).__module__]
        return importlib.import_module(f"transformers.models.{self.folder}.modeling_{self.name}")

    @property
    def kind(self) -> str:
        """ "interface", or its attention classes are its "own" or "not softmax", or "none"."""
        if hasattr(self.module, "ALL_ATTENTION_FUNCTIONS"):
            return "interface"
        names = {
            name_of(value)
            for value in vars(self.module).values()
            if inspect.isclass(value)
            and value.__module__ == self.module.__name__
            and attention_kind(value) == "hand-written"
        }
        return "none" if not names else "not softmax" if names <= NOT_POSSIBLE.keys() else "own"

    @property
    def override(self) -> Override:
        return OVERRIDES.get(self.name, Override())

    @property
    def model_class(self) -> type[PreTrainedModel] | None:
        """The class that stands for the family: the named one, or the one with the most in it."""
        if self.borrowed:
            return getattr(transformers, self.borrowed)
        if self.override.model:
            return getattr(self.module, self.override.model)
        found = [
            value
            for value in vars(self.module).values()
            if inspect.isclass(value)
            and issubclass(value, PreTrainedModel)
            and value.__module__ == self.module.__name__
            and value.config_class is not None
            and value.forward.__name__ != "_forward_unimplemented"
        ]
        for ending in _PREFERRED:
            named = [x for x in found if x.__name__.endswith(ending)]
            named = [x for x in named if not x.__name__.endswith("PreTrainedModel")]
            if named:
                # the base model has the shortest name: CLIPModel, not CLIPTextModel
                return min(named, key=lambda x: len(x.__name__))
        return found[0] if found else None

    def config(self, model_class: type[PreTrainedModel]) -> PreTrainedConfig:
        return shrunk(self.config_class(model_class), self.override.config)

    def config_class(self, model_class: type[PreTrainedModel]) -> type[PreTrainedConfig]:
        return type(AutoConfig.for_model(self.name)) if self.borrowed else model_class.config_class

    def build(self, implementation: str | dict[str, str]) -> PreTrainedModel:
        """The same weights for every implementation; float32, not training."""
        if self.override.without is not None:
            self.override.without(self.module)
        cls = self.model_class
        with torch.device("meta"):
            size = sum(p.numel() for p in cls(self.config(cls)).parameters())
        if size > LARGEST:
            raise TooLarge(f"{cls.__name__} has {size:,} parameters after shrinking")
        torch.manual_seed(0)
        model = cls._from_config(self.config(cls), attn_implementation=implementation)
        spread_out(model)
        return model.eval()

    def left_out(self) -> set[str]:
        """Classes of layers with attention or experts that only the usual sizes have.

        Empty also where a model of the usual configuration cannot be made.
        """
        cls = self.model_class
        with torch.device("meta"):
            small = _kinds(cls(self.config(cls)))
            try:
                usual = _kinds(cls(self.config_class(cls)()))
            except Exception:  # some configurations have no usual values
                return set()
        return {name for name in usual - small if _TELLING.search(name)}


class TooLarge(ValueError):
    """The rule for small configurations does not know some name."""


def _kinds(model: nn.Module) -> set[str]:
    names = {type(module) for module in model.modules()}
    return {x.__name__ for x in names if x.__module__.startswith("transformers.models.")}


def families() -> list[Family]:
    """All of them, by name."""
    root = Path(transformers.models.__file__).parent
    found = [
        Family(path.parent.name, path.stem.removeprefix("modeling_"))
        for path in root.glob("*/modeling_*.py")
    ]
    written = {family.folder for family in found}
    borrowing = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES | (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    )
    found += [
        Family(folder, folder, borrowing[folder])
        for folder in sorted(path.parent.name for path in root.glob("*/configuration_*.py"))
        if folder not in written and folder in borrowing
    ]
    return sorted(found, key=lambda family: family.name)


def shrunk(config_class: type[PreTrainedConfig], changes: dict) -> PreTrainedConfig:
    """The default configuration with small numbers; ``changes`` win, and go into sub-configs."""
    return _shrunk(config_class(), copy.deepcopy(changes))


def _shrunk(config: PreTrainedConfig, changes: dict) -> PreTrainedConfig:
    usual = type(config)().to_dict()
    values = {
        name: value
        for name, value in config.to_dict().items()
        if isinstance(value, (bool, str)) and name in usual and usual[name] != value
    }
    values |= _small_values(config)
    for name in config.sub_configs:
        part = getattr(config, name, None)
        wanted = changes.get(name, {})
        if isinstance(part, PreTrainedConfig) and isinstance(wanted, dict):
            values[name] = _shrunk(part, wanted)
    parts = {k: v for k, v in changes.items() if not (isinstance(v, dict) and k in values)}
    return type(config)(**{**values, **parts})


def _small_values(config: PreTrainedConfig) -> Iterator[tuple[str, object]]:
    given = config.to_dict()
    latent = given.get("qk_rope_head_dim") is not None
    depth = next((given[name] for name in _DEPTHS if isinstance(given.get(name), int)), 0)
    kinds = given.get("layer_types") or ()
    layers = max(2, len(set(kinds)))
    for name, default in given.items():
        small = layers if name in _DEPTHS else SMALL.get(name)
        if isinstance(default, (list, tuple)):
            if depth > 1 and len(default) == depth:  # one entry per layer
                if isinstance(default[0], str):
                    default = list(dict.fromkeys(default)) * layers
                elif small is not None and isinstance(default[0], (int, float)):
                    default = [type(x)(small) for x in default]
                yield name, default[:layers]
            elif small is not None and all(type(x) in (int, float) for x in default):
                yield name, type(default)(type(x)(small) for x in default)
        elif small is None or isinstance(default, (dict, str, bool)):
            continue
        elif default is not None:
            yield name, type(default)(small)
        elif name in _NEEDED and not (latent and name in ("num_key_value_heads", "head_dim")):
            yield name, small
    if latent:
        yield "num_key_value_heads", SMALL["num_attention_heads"]
        if "head_dim" in given:
            yield "head_dim", SMALL["qk_rope_head_dim"]


def spread_out(model: nn.Module) -> None:
    """Weights with which attention prefers some keys and nothing is switched off.

    So that a wrong mask shows: large matrices, and no gate, scale of a layer or bias of zero.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point():
                continue
            if parameter.dim() >= 2:
                if parameter.numel():
                    parameter.normal_(0, 1.2 * parameter[0].numel() ** -0.5)
            elif parameter.numel() and parameter.abs().max() <= 1e-3:
                parameter.normal_(0, 0.3)
