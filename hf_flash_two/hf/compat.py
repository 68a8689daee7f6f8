"""Every name of Transformers that is not public, in one place, and checked before use.

Nothing here fails at import. `NAMES` lists what each feature needs. A missing or changed name is
noted, and `require` refuses the feature when somebody asks for it. `HOOKS` lists what is replaced
in Transformers.

Tested with transformers 5.4 to 5.24. They differ:

* 5.4 alone: assisted decoding and prompt lookup fail without an end token.
* up to 5.12 caches with windows take no tokens back, which those two need.
* up to 5.13 encoders of the T5 line take no ``position_bias`` through the interface; a static cache
  with a window tells its place as a number (seen up to 5.12), later as a tensor, which costs the
  compiler one graph more.
* up to 5.15 the paged cache of continuous batching is wrong for sliding windows.
* up to 5.18 continuous batching calls the implementation ``paged|NAME``, and its cache takes and
  gives other shapes; from 5.19 it calls the ordinary one, if that has "flash" in its name.
* up to 5.22 masks of packed documents come without their positions: chunks count from the start of
  the row.
* up to 5.23 the attention function writes to the paged cache, and caches are ``past_key_values``;
  from 5.24 the layers do, and caches are ``cache``. GPT-J, CodeGen and LayoutLMv3 use the interface
  only from 5.24.

Transformers takes a name with "flash" in it for Tri Dao's package: three library modules then load
a kernel, re-route models that list the kernels they like, and refuse chunked attention and
fullgraph compilation. But models hand over ``cu_seq_lens`` only to such names. So the reference of
each of the three modules to the test is replaced, and that of the models is not.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from types import FrameType, ModuleType
from typing import Any, NamedTuple, NoReturn

import torch
import transformers
from packaging.version import Version
from transformers import PreTrainedConfig, PreTrainedModel

from hf_flash_two.hf import families


def _find(path: str) -> Any:
    """The module, class or function of this name, an instance of the class if it ends in "()".

    None if there is none.
    """
    path, makes, _ = path.partition("()")
    try:
        found = pkgutil.resolve_name(path)
        return found() if makes else found
    except Exception:
        return None


_MASKING = "transformers.masking_utils"
_CONFIG = "transformers.PreTrainedConfig"
_MODEL = "transformers.PreTrainedModel"
_GENERATION = "transformers.GenerationMixin"
_SERVING = "transformers.generation.continuous_batching"
_TRAINER = "transformers.trainer"
_FLASH_ATTENTION = "transformers.modeling_flash_attention_utils"
_FLASH_TEST_MODULES = (
    "transformers.modeling_utils",
    "transformers.masking_utils",
    "transformers.generation.utils",
)
_FLASH_TEST = "is_flash_attention_requested"

masking_utils = _find(_MASKING)
output_capturing = _find("transformers.utils.output_capturing")
# None stands for no function that a model may hand over.
causal_mask_function: Any = getattr(masking_utils, "causal_mask_function", None)
bidirectional_mask_function = getattr(masking_utils, "bidirectional_mask_function", None)
# The class of the cache of continuous batching.
PagedCache: type = getattr(_find(_SERVING), "PagedAttentionCache", object)

FLASH_TWO = "flash_two"
FA_TWO = "fa_two"
PAGED = "paged|"
RIGHT_PAGED_WINDOWS = Version("5.16.0")

_DESCRIPTION = "flash_two_description"
# Attention functions of Transformers that need nothing installed.
_IMPLEMENTATIONS = ("sdpa", "flash_attention_2", "flex_attention")
# The functions that make mask functions, with their arguments, which those close over.
_BUILDERS = {
    "and_masks": ("mask_functions",),
    "or_masks": ("mask_functions",),
    "sliding_window_overlay": ("sliding_window",),
    "sliding_window_bidirectional_overlay": ("sliding_window",),
    "chunked_overlay": ("chunk_size", "left_padding"),
    "blockwise_overlay": ("block_sequence_ids",),
    "padding_mask_function": ("padding_mask",),
    "packed_sequence_mask_function": ("packed_sequence_mask",),
    "remap_positions_for_packed_sequence": ("mask_function", "position_ids"),
}
# Those that older versions lack.
_NEWER_BUILDERS = ("blockwise_overlay", "remap_positions_for_packed_sequence")
_TABLES = "_ATTENTION_CLASSES"


# Features and the names they need


class Name(NamedTuple):
    """A name that ``owner`` has, see `_find`; of a function also its first arguments."""

    owner: str
    name: str
    arguments: tuple[str, ...] = ()

    @property
    def path(self) -> str:
        return f"{self.owner.removesuffix('()')}.{self.name}"

    def problem(self) -> str | None:
        """Why it cannot be used; None if it can."""
        owner = _find(self.owner)
        if not hasattr(owner, self.name):
            return f"{self.path} is missing"
        if self.arguments:
            signature = inspect.signature(getattr(owner, self.name))
            if tuple(signature.parameters)[: len(self.arguments)] != self.arguments:
                return f"{self.path} takes other arguments: {signature}"
        return None


NAMES: dict[str, tuple[Name, ...]] = {
    "arguments": (Name(_FLASH_ATTENTION, "_flash_attention_forward"),),
    "configs": (
        Name(_CONFIG, "_attn_implementation"),
        Name(_CONFIG, "sub_configs"),
        Name(_CONFIG + "()", "_attn_implementation_internal"),
        Name(_MODEL, "_can_set_attn_implementation"),
        Name("transformers.modeling_utils", families.INTERFACE),
    ),
    "flash_two": tuple(
        Name(module, _FLASH_TEST, ("config", "requested_attention_implementation"))
        for module in _FLASH_TEST_MODULES
    ),
    "loading": (
        Name(_MODEL, "_check_and_adjust_attn_implementation", ("self", "attn_implementation")),
        Name(_MODEL, "post_init", ("self",)),
        Name(_MODEL, "set_attn_implementation", ("self", "attn_implementation")),
    ),
    "masks": (
        Name(_MASKING, "causal_mask_function"),
        Name(_MASKING, "bidirectional_mask_function"),
        Name(_MASKING, "sdpa_mask"),
        *(
            Name(_MASKING, name, arguments)
            for name, arguments in _BUILDERS.items()
            if name not in _NEWER_BUILDERS
        ),
    ),
    "serving": (
        Name(_GENERATION, "init_continuous_batching"),
        Name(_SERVING, "PagedAttentionCache"),
    ),
}
"""By feature; what is not found makes the feature impossible."""

_FEATURES = {
    "arguments": (
        "an argument of the attention function that flash_two does not know",
        "drop it from the call of the model, or use attn_implementation='eager'",
    ),
    "configs": (
        "switching the attention of a model",
        "use a version of transformers that docs/versions.md lists",
    ),
    "flash_two": (
        "attn_implementation='flash_two'",
        "use 'fa_two', the same attention under a name that Transformers does not treat specially",
    ),
    "loading": (
        "attn_implementation of a model with hand-written attention",
        "load it as it is and call hf_flash_two.patch(model)",
    ),
    "masks": ("an attention mask of this kind", "load the model with attn_implementation='eager'"),
    "serving": ("continuous batching", "use `generate`"),
}
_missing: dict[str, str] = {}


def check_names() -> None:
    """Note for each feature whether this version of Transformers has what it needs."""
    for feature, names in NAMES.items():
        note(feature, next((x for x in (name.problem() for name in names) if x), None))
    if not offers("configs"):
        note("loading", _missing["configs"])


def note(feature: str, reason: str | None) -> None:
    """Remember why ``feature``, a key of `NAMES`, is impossible; None if it is possible."""
    if reason is None:
        _missing.pop(feature, None)
    else:
        _missing[feature] = reason


def offers(feature: str) -> bool:
    """Whether `require` lets ``feature`` pass."""
    return feature not in _missing


def require(feature: str) -> None:
    """Refuse ``feature`` where Transformers lacks what it needs.

    Raises:
        NotImplementedError: it was noted as impossible.
    """
    if feature in _missing:
        what, instead = _FEATURES[feature]
        raise NotImplementedError(
            f"{what}: not possible with transformers {transformers.__version__}, where "
            f"{_missing[feature]}; {instead}"
        )


def preferred_name() -> str:
    """The name under which a loaded model is switched."""
    return FLASH_TWO if offers("flash_two") else FA_TWO


def is_ours(implementation: str | None) -> bool:
    """Whether this is one of our names, for continuous batching or not."""
    return (implementation or "").removeprefix(PAGED) in (FLASH_TWO, FA_TWO)


def uses_ours(config: transformers.PreTrainedConfig) -> bool:
    """Whether the layers of a watched model with this config use flash_two."""
    return is_ours(implementation(config)) or families.needs_its_sdpa(config)


def with_paged_names(names: list[str]) -> list[str]:
    """``names``, and those under which continuous batching calls them, where it has its own."""
    paged = PAGED + "sdpa" in transformers.AttentionInterface()
    return names + [PAGED + name for name in names] if paged else names


def refuse_serving(module: torch.nn.Module, reason: str) -> NoReturn:
    raise NotImplementedError(
        f"continuous batching: {type(module).__name__} {reason}; use `generate`"
    )


def update_paged_cache(
    cache, key: torch.Tensor, value: torch.Tensor, module: torch.nn.Module, paged: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int | None]:
    """Write to the cache of continuous batching and read all that this layer's queries may need.

    Args:
        cache: None where the layer has written to it; ``key`` and ``value`` are then what it read.
        key, value: [1, Hk, Tq, D or Dv], of all requests of this step end to end.
        paged: ``cu_seq_lens_k``, ``max_length_k``, ``read_index`` and ``write_index``; changed.

    Returns:
        key, value [1, Hk, Tk, D or Dv], the boundaries of the requests in them [N + 1], and the
        layer's window in tokens, None if it has none.

    Raises:
        NotImplementedError: the layer does not use the cache, or its window is read wrongly.
    """
    if cache is None:
        ends = paged["cu_seq_lens_k"]
        if isinstance(ends, dict):  # the cache puts those of the layer's kind in their place
            refuse_serving(module, "does not use the paged cache")
        return key, value, ends, _paged_window(module)
    layer: Any = module.layer_idx
    if hasattr(cache, "layer_to_allocator"):
        key, value = cache.update(key, value, layer, kwargs=paged)
        window = getattr(cache.layer_to_allocator[layer], "sliding_window", None)
        return key, value, paged["cu_seq_lens_k"], window
    if not hasattr(cache, "sliding_windows"):
        raise TypeError(
            "cache: expected the paged cache of continuous batching, got "
            f"{type(cache).__name__}, which {type(module).__name__} does not use; a model takes "
            "its cache as `cache` from transformers 5.24, as `past_key_values` before"
        )
    window = cache.sliding_windows[layer]
    if window != 1 and Version(transformers.__version__) < RIGHT_PAGED_WINDOWS:
        raise NotImplementedError(
            f"continuous batching: layer {layer} has a sliding window, and the paged cache of "
            f"transformers {transformers.__version__} loses the newest token of a full window; "
            f"use `generate`, or transformers {RIGHT_PAGED_WINDOWS} or newer"
        )
    key, value = cache.update(
        key, value, layer, read_index=paged["read_index"], write_index=paged["write_index"]
    )
    ends = paged["cu_seq_lens_k"]
    if isinstance(ends, dict):
        ends = ends["full_attention" if window == 1 else "sliding_attention"]
    key, value = (x.transpose(0, 1)[None] for x in (key, value))
    return key, value, ends, None if window == 1 else window


def _paged_window(module: torch.nn.Module) -> int | None:
    """The window that the paged cache keeps for a layer: it reads the same of the config."""
    kinds = getattr(module.config, "layer_types", None)
    if kinds is not None and kinds[module.layer_idx] != "sliding_attention":
        return None
    return getattr(module.config, "sliding_window", None)


# What is replaced in Transformers


class Listeners(NamedTuple):
    """What the hooks call.

    Attributes:
        built: takes each model at the end of its construction.
        requested: takes a model and the names requested by id of config, None for all others:
            before ``set_attn_implementation`` those not ours, after it ours.
        serving: takes each model that begins to batch continuously.
        begun: only where "loading" is not offered: takes each model that is built or set, before
            its parts are, and whether ours was requested.
    """

    built: Callable[[PreTrainedModel], None]
    requested: Callable[[PreTrainedModel, dict[int | None, str]], None]
    serving: Callable[[PreTrainedModel], None]
    begun: Callable[[PreTrainedModel, bool], None]


def install_hooks(listeners: Listeners) -> None:
    """Install `HOOKS` of what is offered, `FALLBACKS` of the rest; a second call does nothing."""
    for feature, hooks in HOOKS.items():
        for name, wrap in hooks if offers(feature) else FALLBACKS.get(feature, ()):
            if name.problem() is None:
                _hook(_find(name.owner), name.name, partial(wrap, listeners))


def _hook(owner: Any, name: str, wrap: Callable[[Callable], Callable]) -> None:
    before = getattr(owner, name)
    if not hasattr(before, FLASH_TWO):
        hook = functools.wraps(before)(wrap(before))
        setattr(hook, FLASH_TWO, True)
        setattr(owner, name, hook)


def _false_for_flash_two(_: Listeners | None, test: Callable) -> Callable:
    """The test says that ``flash_two`` is no name of Tri Dao's package."""

    def is_flash_attention_requested(
        config=None, requested_attention_implementation=None, *args, **kwargs
    ) -> bool:
        name = requested_attention_implementation
        asked = name if config is None else config._attn_implementation
        if asked in (FLASH_TWO, PAGED + FLASH_TWO):
            return False
        return test(config, name, *args, **kwargs)

    return is_flash_attention_requested


def _hide_flash_in_name(module: ModuleType) -> None:
    _hook(module, _FLASH_TEST, partial(_false_for_flash_two, None))


def _entering_in_tables(_: Listeners, check: Callable) -> Callable:
    """A family that looks up classes by the implementation's name finds ours."""

    def _check_and_adjust_attn_implementation(self, attn_implementation, *args, **kwargs):
        if is_ours(attn_implementation):
            if attn_implementation.removeprefix(PAGED) == FLASH_TWO:
                require("flash_two")
            _enter_in_tables(type(self))
        return check(self, attn_implementation, *args, **kwargs)

    return _check_and_adjust_attn_implementation


def _telling_what_is_built(listeners: Listeners, end: Callable) -> Callable:
    def post_init(self, *args, **kwargs):
        end(self, *args, **kwargs)
        name = type(self).__module__
        if name.rpartition("modeling_")[2] in families.TURN_TO_SDPA:
            _hide_flash_in_name(sys.modules[name])
        if not _is_part_of_another(self):
            listeners.built(self)

    return post_init


def _telling_what_is_requested(listeners: Listeners, choose: Callable) -> Callable:
    def set_attn_implementation(self, attn_implementation, *args, **kwargs):
        names: dict[int | None, str] = dict(requested(self.config, attn_implementation))
        if isinstance(attn_implementation, str):
            names[None] = attn_implementation
        listeners.requested(self, {at: name for at, name in names.items() if not is_ours(name)})
        # Transformers would say of hand-written attention that it cannot be set.
        if uses_interface(self) or self.config.sub_configs or not is_ours(attn_implementation):
            choose(self, attn_implementation, *args, **kwargs)
        listeners.requested(self, {at: name for at, name in names.items() if is_ours(name)})

    return set_attn_implementation


def _telling_what_is_begun(listeners: Listeners, build: Callable) -> Callable:
    def __init__(self, config, *args, **kwargs):
        build(self, config, *args, **kwargs)
        listeners.begun(self, is_ours(name_in(self.config)))

    return __init__


def _telling_what_is_chosen(listeners: Listeners, choose: Callable) -> Callable:
    def set_attn_implementation(self, attn_implementation, *args, **kwargs):
        several = isinstance(attn_implementation, dict)
        names = attn_implementation.values() if several else [attn_implementation]
        for part in self.modules():
            if isinstance(part, PreTrainedModel):
                listeners.begun(part, any(map(is_ours, names)))
        choose(self, attn_implementation, *args, **kwargs)

    return set_attn_implementation


def _telling_what_serves(listeners: Listeners, start: Callable) -> Callable:
    def init_continuous_batching(self, *args, **kwargs):
        listeners.serving(self)
        return start(self, *args, **kwargs)

    return init_continuous_batching


def _passing_for_sdpa(prepare: Callable) -> Callable:
    """`Trainer` refuses to shard batches for any other name."""

    def _prepare_context_parallel_inputs(self, model, inputs, *args, **kwargs):
        config = getattr(model, "config", None)
        if config is None or not is_ours(implementation(config)):
            return prepare(self, model, inputs, *args, **kwargs)
        parallel = getattr(self.accelerator, "parallelism_config", None)
        shifts = getattr(self, "label_smoother", None) or getattr(self, "compute_loss_func", None)
        if shifts and parallel is not None and parallel.cp_enabled:
            raise NotImplementedError(
                "label_smoothing_factor, compute_loss_func: they would shift labels within a shard "
                "of each row; use the model's own loss with cp_size"
            )
        name = implementation(config)
        set_implementation(config, "sdpa")
        try:
            return prepare(self, model, inputs, *args, **kwargs)
        finally:
            set_implementation(config, name)

    return _prepare_context_parallel_inputs


def _describing(_: Listeners, builder: Callable) -> Callable:
    """Mask functions say what they are: while torch.compile traces, closures cannot be read."""
    name = builder.__name__
    variadic = _BUILDERS[name] == ("mask_functions",)

    def describing(*args, **kwargs):
        function = builder(*args, **kwargs)
        if not kwargs:
            setattr(function, _DESCRIPTION, (name, (args,) if variadic else args))
        return function

    return describing


Hook = tuple[Name, Callable[[Listeners, Callable], Callable]]
HOOKS: dict[str, tuple[Hook, ...]] = {
    "flash_two": tuple((name, _false_for_flash_two) for name in NAMES["flash_two"]),
    "loading": (
        (NAMES["loading"][0], _entering_in_tables),
        (NAMES["loading"][1], _telling_what_is_built),
        (NAMES["loading"][2], _telling_what_is_requested),
    ),
    "masks": tuple((Name(_MASKING, *item), _describing) for item in _BUILDERS.items()),
    "serving": ((NAMES["serving"][0], _telling_what_serves),),
}
"""By feature: what is replaced, and what makes the replacement."""
FALLBACKS: dict[str, tuple[Hook, ...]] = {
    "loading": (
        (Name(_MODEL, "__init__"), _telling_what_is_begun),
        (Name(_MODEL, "set_attn_implementation"), _telling_what_is_chosen),
    ),
    "masks": HOOKS["masks"],
}
"""The same where the feature is not offered."""
TRAINER = Name(
    _TRAINER + ".Trainer", "_prepare_context_parallel_inputs", ("self", "model", "inputs")
)
"""Replaced once it is imported, which is slow. Where it has changed, Trainer refuses our names."""


def hook_trainer() -> None:
    """Let `Trainer`, if it is imported, shard batches for our names; again does nothing."""
    if _TRAINER in sys.modules and TRAINER.problem() is None:
        _hook(_find(TRAINER.owner), TRAINER.name, _passing_for_sdpa)


def _enter_in_tables(model: type[PreTrainedModel]) -> None:
    """Let our names stand for "eager" where a family picks attention classes by name."""
    module = sys.modules.get(model.__module__)
    if module is None:  # loaded from a file, by hand
        return
    tables = [table for name, table in vars(module).items() if name.endswith(_TABLES)]
    for table in tables:
        for name in (FLASH_TWO, FA_TWO):
            table.setdefault(name, table["eager"])
    if tables and hasattr(module, _FLASH_TEST) and not model._can_set_attn_implementation():
        _hide_flash_in_name(module)


def requested(config: PreTrainedConfig, name: str | dict | None) -> Iterator[tuple[int, str]]:
    """(id of config, name) that ``name`` asks for, down through the sub-configs."""
    own = name.get("") if isinstance(name, dict) else name
    if own is not None:
        yield id(config), own
    for key in config.sub_configs:
        sub = getattr(config, key, None)
        below = name.get(key) if isinstance(name, dict) else name
        if isinstance(sub, PreTrainedConfig) and below is not None:
            yield from requested(sub, below)


def _is_part_of_another(model: PreTrainedModel) -> bool:
    """Whether ``model`` is being built by the constructor of another Transformers model."""
    for frame in callers(sys._getframe()):
        builder = frame.f_locals.get("self") if frame.f_code.co_name == "__init__" else None
        if isinstance(builder, PreTrainedModel) and builder is not model:
            return True
    return False


def callers(frame: FrameType | None) -> Iterator[FrameType]:
    """``frame`` and those that called it."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def only_inlined(function: Callable) -> Callable:
    """Let torch.compile trace into ``function`` from what it compiles, but not start with it."""
    torch._dynamo.eval_frame.skip_code(function.__code__)
    return function


@torch.compiler.assume_constant_result
def is_read_by_attention(name: str, modeling: str) -> bool:
    """Whether an attention function of Transformers reads the argument ``name``.

    Args:
        modeling: name of a layer's Python module, whose own attention functions count as well.
    """
    require("arguments")
    return name in _arguments_of_attention(modeling)


@functools.cache
def _arguments_of_attention(modeling: str) -> frozenset[str]:
    functions = [transformers.AttentionInterface()[name] for name in _IMPLEMENTATIONS]
    for module, pattern in (
        (modeling, "attention_forward"),
        (_FLASH_ATTENTION, "_flash_attention"),
    ):
        members = vars(importlib.import_module(module)).items()
        functions += [f for n, f in members if pattern in n and inspect.isfunction(f)]
    return frozenset().union(*map(_read_by, functions))


def _read_by(function: Callable) -> set[str]:
    """The names that a function takes, or looks up among its keyword arguments."""
    function = inspect.unwrap(function)
    named = inspect.signature(function).parameters.values()
    return {p.name for p in named if p.kind is not p.VAR_KEYWORD} | {
        text for text in function.__code__.co_consts if isinstance(text, str)
    }


def remaps_positions() -> bool:
    """Whether masks of packed documents come with their positions, as in newer versions."""
    return hasattr(masking_utils, "remap_positions_for_packed_sequence")


def describe(mask_function: Callable) -> tuple[str, tuple[Any, ...]]:
    """(builder, its arguments) of a mask function of masking_utils; ("", ()) of any other.

    Of the two plain ones the builder is "causal" and "bidirectional".
    """
    unknown = "", ()
    if mask_function is causal_mask_function:
        return "causal", ()
    if mask_function is bidirectional_mask_function:
        return "bidirectional", ()
    description = getattr(mask_function, _DESCRIPTION, None)
    if description is not None or torch.compiler.is_compiling():
        return description or unknown
    if getattr(mask_function, "__module__", None) != _MASKING:
        return unknown
    builder = mask_function.__qualname__.partition(".")[0]
    variables = mask_function.__code__.co_freevars
    if sorted(variables) != sorted(_BUILDERS.get(builder, ())) or not variables:
        return unknown
    cells = (cell.cell_contents for cell in mask_function.__closure__ or ())
    values = dict(zip(variables, cells, strict=True))
    return builder, tuple(values[name] for name in _BUILDERS[builder])


def makes_masks(module: torch.nn.Module) -> bool:
    """Whether the implementation that ``module`` is set to has a mask function."""
    name = getattr(getattr(module, "config", None), "_attn_implementation", FLASH_TWO)
    return name in transformers.AttentionMaskInterface()


def uses_interface(model: transformers.PreTrainedModel) -> bool:
    """Whether the layers of this very model (not of others in it) go through the interface."""
    require("configs")
    return model._can_set_attn_implementation()


def records_attentions() -> bool:
    """Whether a model is collecting the attention weights that its layers return."""
    collector = getattr(output_capturing, "_active_collector", None)
    if collector is None:
        return False
    compiling = torch.compiler.is_compiling()  # the compiler cannot read context variables
    collected = getattr(collector, "global_var", None) if compiling else collector.get()
    return any("attentions" in name for name in collected or ())


def name_in(config: PreTrainedConfig) -> str | None:
    """The implementation that ``config`` asks for, as far as that can be read; else ours."""
    names = ("_attn_implementation_internal", "_attn_implementation")
    return next((getattr(config, name) for name in names if hasattr(config, name)), FLASH_TWO)


def implementation(config: transformers.PretrainedConfig) -> str | None:
    require("configs")
    return config._attn_implementation_internal


def set_implementation(config: transformers.PretrainedConfig, name: str | None) -> None:
    """Set it for this config alone, without the checks and the recursion of the public setter."""
    require("configs")
    config._attn_implementation_internal = name
