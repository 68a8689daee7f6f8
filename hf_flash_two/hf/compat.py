"""Every name of Transformers that is no public interface, in one place, and checked before use.

Nothing here fails at import. What a missing or renamed name makes impossible is noted, and whoever
needs it calls `require`, which then refuses by name.

Tested with transformers 5.4 to 5.24; what differs there:

* 5.4 alone: assisted decoding and prompt lookup fail without an end token.
* up to 5.12 caches with windows take no tokens back, which those two need.
* up to 5.13 encoders of the T5 line take no ``position_bias`` through the interface, and a static
  cache with a window tells its place as a number (seen up to 5.12), later as a tensor: compiled, it
  makes one graph more.
* up to 5.15 the paged cache of continuous batching is wrong for sliding windows.
* up to 5.18 continuous batching calls the implementation ``paged|NAME``, and its cache takes and
  gives other shapes; from 5.19 it calls the ordinary one, if that has "flash" in its name.
* up to 5.22 masks of packed documents come without their positions: chunks count from the start of
  the row.
* up to 5.23 the attention function writes to the paged cache, and caches are ``past_key_values``;
  from 5.24 the layers do, and caches are ``cache``. GPT-J, CodeGen and LayoutLMv3 compute attention
  themselves, from 5.24 they use the interface.

"flash" in a name makes Transformers take it for Tri Dao's package: three library modules then load
a kernel, re-route models that list the kernels they like, and refuse chunked attention and
fullgraph compilation. Models, on the other hand, hand over ``cu_seq_lens`` only to such names. So
the three modules, each through its own reference to the test, are told that ``flash_two`` is no
such name, while models go on believing it.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers import PreTrainedConfig, PreTrainedModel


def _module(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


masking_utils = _module("transformers.masking_utils")
output_capturing = _module("transformers.utils.output_capturing")
_continuous_batching = _module("transformers.generation.continuous_batching")

# None stands for no function that a model may hand over.
causal_mask_function = getattr(masking_utils, "causal_mask_function", None)
bidirectional_mask_function = getattr(masking_utils, "bidirectional_mask_function", None)
sdpa_mask = getattr(masking_utils, "sdpa_mask", None)

FLASH_TWO = "flash_two"
FA_TWO = "fa_two"
PAGED = "paged|"
RIGHT_PAGED_WINDOWS = Version("5.16.0")

_FLASH_TEST = "is_flash_attention_requested"
_FLASH_TEST_ARGUMENTS = ["config", "requested_attention_implementation"]
_FLASH_TEST_MODULES = (
    "transformers.modeling_utils",
    "transformers.masking_utils",
    "transformers.generation.utils",
)
_DESCRIPTION = "flash_two_description"
# Those of Transformers that need nothing installed.
_IMPLEMENTATIONS = ("sdpa", "flash_attention_2", "flex_attention")
# The functions that make mask functions, and the variables that those close over.
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

# Methods of PreTrainedModel, and the arguments they begin with.
_LOADING = {
    "_check_and_adjust_attn_implementation": ["self", "attn_implementation"],
    "post_init": ["self"],
    "set_attn_implementation": ["self", "attn_implementation"],
}
_CHOOSE = "set_attn_implementation"
_TABLES = "_ATTENTION_CLASSES"
_SERVING = "init_continuous_batching"

# The class of the cache of continuous batching.
PagedCache: type = getattr(_continuous_batching, "PagedAttentionCache", object)

# Families that ask whether the mask is a tensor, by model_type: bool where they know it.
WANTS_BOOL_TENSOR = frozenset({"doge"})
WANTS_FLOAT_TENSOR = frozenset({"deepseek_v4", "gemma4_audio", "glm_moe_dsa", "informer"})
# Families that read the mask as additive, without a look at its dtype: to route tokens to experts.
READS_ADDITIVE = frozenset({"nllb-moe"})
# Families whose masks are causal though their configs do not say so.
CAUSAL = frozenset({"openai-gpt"})
# Families that hand zeros for positions to a decoder, since they add embeddings of time.
WITHOUT_POSITIONS = frozenset({"decision_transformer"})
# Families with bidirectional layers that say is_causal, or nothing, which no mask bears out.
NOT_CAUSAL_WITHOUT_MASK = frozenset(
    {
        "bridgetower",
        "bridgetower_text_model",
        "chinese_clip_vision_model",
        "kosmos_2_text_model",
    }
)
# Families whose causal layers say is_causal=False where a mask came, which holds causality.
CAUSALITY_IN_MASK = frozenset({"moonshine", "moonshine_streaming"})
# Families that turn to sdpa under a name with "flash" where a float mask comes, which is a bias.
_TURN_TO_SDPA = frozenset(
    "edgetam edgetam_video sam2 sam2_video sam3 sam3_lite_text sam3_tracker "
    "sam3_tracker_video".split()
)
# Families whose bidirectional layers name a window that only their cache keeps.
NO_WINDOW_WITHOUT_MASK = frozenset({"diffusion_gemma_text"})

# Families whose models return the weights of layers that are no decoder's in every call.
RETURNS_WEIGHTS = frozenset({"kosmos_2_text_model", "kosmos_2_5_text_model"})
# Families whose weights leave out what goes to the sinks.
WEIGHTS_WITHOUT_SINKS = frozenset({"granite_swa", "granitemoe_swa"})


# What needs names of Transformers that are no public interface, and what does without.
_FEATURES = {
    "configs": (
        "switching the attention of a model",
        "use a version of transformers that docs/versions.md lists",
    ),
    "flash_two": (
        "attn_implementation='flash_two'",
        "use 'fa_two', the same attention under a name that Transformers does not treat specially",
    ),
    "loading": (
        "attn_implementation of a model that computes attention itself",
        "load it as it is and call hf_flash_two.patch(model)",
    ),
    "masks": ("an attention mask of this kind", "load the model with attn_implementation='eager'"),
    "serving": ("continuous batching", "use `generate`"),
}
_missing: dict[str, str] = {}


def note(feature: str, reason: str | None) -> None:
    """Remember why ``feature`` is impossible with this version of Transformers; None if it is not.

    Args:
        feature: "configs", "flash_two", "loading", "masks" or "serving".
    """
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
        NotImplementedError: it was noted as impossible; names it, the reason and what to do.
    """
    if feature in _missing:
        what, instead = _FEATURES[feature]
        raise NotImplementedError(
            f"{what}: not possible with transformers {transformers.__version__}, where "
            f"{_missing[feature]}; {instead}"
        )


def neutral_if_needed() -> str:
    """The name under which a loaded model is switched."""
    return FLASH_TWO if offers("flash_two") else FA_TWO


def is_ours(implementation: str | None) -> bool:
    """Whether this is one of our names, for continuous batching or not."""
    return (implementation or "").removeprefix(PAGED) in (FLASH_TWO, FA_TWO)


def uses_ours(config: transformers.PreTrainedConfig) -> bool:
    """Whether the layers of a watched model with this config use flash_two."""
    return is_ours(implementation(config)) or needs_its_sdpa(config)


def with_paged_names(names: list[str]) -> list[str]:
    """Also the names under which continuous batching calls them, where it has its own."""
    paged = PAGED + "sdpa" in transformers.AttentionInterface()
    return names + [PAGED + name for name in names] if paged else names


def update_paged_cache(
    cache, key: torch.Tensor, value: torch.Tensor, module: torch.nn.Module, paged: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int | None]:
    """Write to the cache of continuous batching and read all that this layer's queries may need.

    Args:
        cache: None where the layer has done so itself.
        key, value: [1, Hk, Tq, D or Dv], of all requests of this step end to end; all that is
            read, without ``cache``.
        paged: ``cu_seq_lens_k``, ``max_length_k``, ``read_index`` and ``write_index``; changed.

    Returns:
        key, value [1, Hk, Tk, D or Dv], the boundaries of the requests in them [N + 1], and the
        layer's window in tokens, None if it has none.

    Raises:
        NotImplementedError: the layer does not use the cache; or it has a window, and this cache
            gives it the wrong tokens.
    """
    if cache is None:
        ends = paged["cu_seq_lens_k"]
        if isinstance(ends, dict):  # the cache puts those of the layer's kind in their place
            raise NotImplementedError(
                f"continuous batching: {type(module).__name__} does not use the paged cache; use "
                "`generate`"
            )
        return key, value, ends, _paged_window(module)
    layer: int = module.layer_idx
    states = {"key_states": key, "value_states": value, "layer_idx": layer}
    allocators = getattr(cache, "layer_to_allocator", None)
    if allocators is not None:
        key, value = cache.update(**states, kwargs=paged)
        window = getattr(allocators[layer], "sliding_window", None)
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
        **states, read_index=paged["read_index"], write_index=paged["write_index"]
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


def allow_flash_two() -> str | None:
    """Let ``flash_two`` load and behave as any registered name; the reason if impossible."""
    found = []
    for name in _FLASH_TEST_MODULES:
        module = _module(name)
        test = getattr(module, _FLASH_TEST, None)
        if test is None:
            return f"{name}.{_FLASH_TEST} is missing"
        if list(inspect.signature(test).parameters)[:2] != _FLASH_TEST_ARGUMENTS:
            return f"{name}.{_FLASH_TEST} takes other arguments: {inspect.signature(test)}"
        found.append(module)
    for module in found:
        _hide_flash_in_name(module)
    return None


def _hide_flash_in_name(module: ModuleType) -> None:
    test = getattr(module, _FLASH_TEST)
    if not hasattr(test, FLASH_TWO):
        setattr(module, _FLASH_TEST, _false_for_flash_two(test))


def _false_for_flash_two(test: Callable) -> Callable:
    @functools.wraps(test)
    def is_flash_attention_requested(
        config=None, requested_attention_implementation=None, *args, **kwargs
    ) -> bool:
        name = requested_attention_implementation
        asked = name if config is None else config._attn_implementation
        if asked in (FLASH_TWO, PAGED + FLASH_TWO):
            return False
        return test(config, name, *args, **kwargs)

    setattr(is_flash_attention_requested, FLASH_TWO, True)
    return is_flash_attention_requested


def check_names() -> None:
    """Note what is impossible for want of names that are only read."""
    config = PreTrainedConfig()
    names = ("_attn_implementation", "_attn_implementation_internal")
    reason = next(
        (f"PreTrainedConfig.{x} is missing" for x in names if not hasattr(config, x)), None
    )
    if not hasattr(PreTrainedModel, "_can_set_attn_implementation"):
        reason = "PreTrainedModel._can_set_attn_implementation is missing"
    note("configs", reason)
    known = {
        "causal_mask_function": causal_mask_function,
        "bidirectional_mask_function": bidirectional_mask_function,
        "sdpa_mask": sdpa_mask,
    }
    lost = [name for name, found in known.items() if found is None]
    note("masks", f"transformers.masking_utils.{lost[0]} is missing" if lost else None)


def patch_at_load(
    built: Callable[[PreTrainedModel], None],
    asked: Callable[[PreTrainedModel, dict[int | None, str]], None],
) -> str | None:
    """Tell when a model is asked for under our names, however that is done; why not if impossible.

    Args:
        built: called with each model at the end of its construction, its parts done.
        asked: called with a model and the names asked for by id of config, None for all others:
            before ``set_attn_implementation`` with those not ours, after it with ours.
    """
    if not offers("configs"):
        return _missing["configs"]
    for name, arguments in _LOADING.items():
        method = getattr(PreTrainedModel, name, None)
        if method is None:
            return f"PreTrainedModel.{name} is missing"
        if list(inspect.signature(method).parameters)[: len(arguments)] != arguments:
            return f"PreTrainedModel.{name} takes other arguments: {inspect.signature(method)}"
    if hasattr(PreTrainedModel.post_init, FLASH_TWO):
        return None
    check, end, choose = (getattr(PreTrainedModel, name) for name in _LOADING)

    @functools.wraps(check)
    def _check_and_adjust_attn_implementation(self, attn_implementation, *args, **kwargs):
        if is_ours(attn_implementation):
            if attn_implementation.removeprefix(PAGED) == FLASH_TWO:
                require("flash_two")
            _enter_in_tables(type(self))
        return check(self, attn_implementation, *args, **kwargs)

    @functools.wraps(end)
    def post_init(self, *args, **kwargs):
        end(self, *args, **kwargs)
        name = type(self).__module__
        if name.rpartition("modeling_")[2] in _TURN_TO_SDPA:
            _hide_flash_in_name(sys.modules[name])
        if not _is_part_of_another(self):
            built(self)

    @functools.wraps(choose)
    def set_attn_implementation(self, attn_implementation, *args, **kwargs):
        names = dict(_asked_for(self.config, attn_implementation))
        if isinstance(attn_implementation, str):
            names[None] = attn_implementation
        asked(self, {at: name for at, name in names.items() if not is_ours(name)})
        # Of a family that computes attention itself it would say that it cannot be set.
        if uses_interface(self) or self.config.sub_configs or not is_ours(attn_implementation):
            choose(self, attn_implementation, *args, **kwargs)
        asked(self, {at: name for at, name in names.items() if is_ours(name)})

    for method in (_check_and_adjust_attn_implementation, post_init, set_attn_implementation):
        setattr(method, FLASH_TWO, True)
        setattr(PreTrainedModel, method.__name__, method)
    return None


def check_at_load(check: Callable[[PreTrainedModel, bool], None]) -> None:
    """Where `patch_at_load` is impossible: tell at least of each model that is built or changed.

    Args:
        check: called with each model before its parts are built, and with each part of one whose
            implementation is to be set, and whether one of our names was asked for.
    """
    build, choose = PreTrainedModel.__init__, getattr(PreTrainedModel, _CHOOSE, None)
    if hasattr(build, FLASH_TWO):
        return

    @functools.wraps(build)
    def __init__(self, config, *args, **kwargs):
        build(self, config, *args, **kwargs)
        check(self, is_ours(name_in(self.config)))

    setattr(__init__, FLASH_TWO, True)
    PreTrainedModel.__init__ = __init__
    if choose is None or hasattr(choose, FLASH_TWO):
        return

    @functools.wraps(choose)
    def set_attn_implementation(self, attn_implementation, *args, **kwargs):
        several = isinstance(attn_implementation, dict)
        names = attn_implementation.values() if several else [attn_implementation]
        for part in self.modules():
            if isinstance(part, PreTrainedModel):
                check(part, any(map(is_ours, names)))
        choose(self, attn_implementation, *args, **kwargs)

    setattr(PreTrainedModel, _CHOOSE, set_attn_implementation)


def check_before_serving(check: Callable[[PreTrainedModel], None]) -> str | None:
    """Call ``check`` with each model that begins to batch continuously; why not if impossible."""
    start = getattr(transformers.GenerationMixin, _SERVING, None)
    if start is None:
        return f"GenerationMixin.{_SERVING} is missing"
    if PagedCache is object:
        return "transformers.generation.continuous_batching.PagedAttentionCache is missing"
    if hasattr(start, FLASH_TWO):
        return None

    @functools.wraps(start)
    def init_continuous_batching(self, *args, **kwargs):
        check(self)
        return start(self, *args, **kwargs)

    setattr(init_continuous_batching, FLASH_TWO, True)
    setattr(transformers.GenerationMixin, _SERVING, init_continuous_batching)
    return None


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


def _asked_for(config: PreTrainedConfig, name: str | dict | None) -> Iterator[tuple[int, str]]:
    """(id of config, name) that ``name`` asks for, down through the sub-configs."""
    own = name.get("") if isinstance(name, dict) else name
    if own is not None:
        yield id(config), own
    for key in config.sub_configs:
        sub = getattr(config, key, None)
        below = name.get(key) if isinstance(name, dict) else name
        if sub is not None and below is not None:
            yield from _asked_for(sub, below)


def _is_part_of_another(model: PreTrainedModel) -> bool:
    """Whether ``model`` is being built by the constructor of another Transformers model."""
    frame = sys._getframe(1)
    while frame is not None:
        builder = frame.f_locals.get("self") if frame.f_code.co_name == "__init__" else None
        if isinstance(builder, PreTrainedModel) and builder is not model:
            return True
        frame = frame.f_back
    return False


def only_inlined(function: Callable) -> Callable:
    """Let torch.compile trace into ``function`` from what it compiles, but not start with it."""
    torch._dynamo.eval_frame.skip_code(function.__code__)
    return function


def has_cross_attention(model: transformers.PreTrainedModel) -> bool:
    """Whether a bidirectional mask of this model may be one from a decoder to an encoder."""
    names = ("is_decoder", "is_encoder_decoder", "add_cross_attention")
    return any(getattr(model.config, name, False) for name in names)


def has_positions(model: transformers.PreTrainedModel) -> bool:
    """Whether the ``position_ids`` that a model is given tell where its tokens stand."""
    return model.config.model_type not in WITHOUT_POSITIONS


def is_causal_model(model: transformers.PreTrainedModel) -> bool:
    """Whether a model that makes its own masks makes causal ones."""
    config = model.config
    return config.model_type in CAUSAL or any(
        getattr(config, name, False) for name in ("is_decoder", "causal")
    )


@torch.compiler.assume_constant_result
def is_read_by_attention(name: str, modeling: str) -> bool:
    """Whether an attention function of Transformers reads the argument ``name``.

    Args:
        modeling: name of a layer's Python module, whose own attention functions count as well.
    """
    return name in _arguments_of_attention(modeling)


@functools.cache
def _arguments_of_attention(modeling: str) -> frozenset[str]:
    functions = [transformers.AttentionInterface()[name] for name in _IMPLEMENTATIONS]
    for module, pattern in (
        (modeling, "attention_forward"),
        ("transformers.modeling_flash_attention_utils", "_flash_attention"),
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


def describe_mask_functions() -> None:
    """Let mask functions say what they are: while torch.compile traces, closures cannot be read."""
    for name in _BUILDERS:
        builder = getattr(masking_utils, name, None)
        if builder is not None and not hasattr(builder, FLASH_TWO):
            setattr(masking_utils, name, _describing(builder, name))


def _describing(builder: Callable, name: str) -> Callable:
    variadic = _BUILDERS[name] == ("mask_functions",)

    @functools.wraps(builder)
    def describing(*args, **kwargs):
        function = builder(*args, **kwargs)
        if not kwargs:
            setattr(function, _DESCRIPTION, (name, (args,) if variadic else args))
        return function

    setattr(describing, FLASH_TWO, True)
    return describing


def describe(mask_function: Callable) -> tuple[str, tuple[Any, ...]] | None:
    """(builder, its arguments) of a mask function made by masking_utils; None of any other."""
    description = getattr(mask_function, _DESCRIPTION, None)
    if description is not None or torch.compiler.is_compiling():
        return description
    if getattr(mask_function, "__module__", None) != "transformers.masking_utils":
        return None
    builder = mask_function.__qualname__.partition(".")[0]
    variables = mask_function.__code__.co_freevars
    if sorted(variables) != sorted(_BUILDERS.get(builder, ())) or not variables:
        return None
    cells = (cell.cell_contents for cell in mask_function.__closure__)
    values = dict(zip(variables, cells, strict=True))
    return builder, tuple(values[name] for name in _BUILDERS[builder])


def makes_masks(module: torch.nn.Module) -> bool:
    """Whether the implementation that ``module`` is set to has a mask function."""
    name = getattr(getattr(module, "config", None), "_attn_implementation", FLASH_TWO)
    return name in transformers.AttentionMaskInterface()


def is_causal_without_mask(module: torch.nn.Module) -> bool:
    """Whether ``module.is_causal`` may be believed where no mask came."""
    return _family(module) not in NOT_CAUSAL_WITHOUT_MASK


def leaves_causality_to_mask(module: torch.nn.Module) -> bool:
    """Whether ``is_causal=False`` says nothing once there is a mask."""
    return _family(module) in CAUSALITY_IN_MASK


def has_window_without_mask(module: torch.nn.Module) -> bool:
    """Whether a bidirectional layer that names a window hides keys where no mask came."""
    return _family(module) not in NO_WINDOW_WITHOUT_MASK


def returns_weights(module: torch.nn.Module) -> bool:
    """Whether the model returns the weights of this layer whoever calls it."""
    return _family(module) in RETURNS_WEIGHTS and not getattr(module, "is_decoder", True)


def weights_without_sinks(module: torch.nn.Module) -> bool:
    """Whether eager weights of this layer sum to 1, though it has sinks."""
    return _family(module) in WEIGHTS_WITHOUT_SINKS


def _family(module: torch.nn.Module) -> str | None:
    return getattr(getattr(module, "config", None), "model_type", None)


def has_own_attention(config: transformers.PreTrainedConfig) -> bool:
    """Whether the family computes attention itself, and so wants the float mask that eager gets."""
    name = type(config).__module__.replace(".configuration_", ".modeling_")
    return not hasattr(
        sys.modules.get(name, transformers.modeling_utils), "ALL_ATTENTION_FUNCTIONS"
    )


def uses_interface(model: transformers.PreTrainedModel) -> bool:
    """Whether the layers of this very model (not of others in it) go through the interface."""
    require("configs")
    return model._can_set_attn_implementation()


def default_implementation(config: transformers.PretrainedConfig) -> str:
    """What a family that computes attention itself may always be set to."""
    return "sdpa" if needs_its_sdpa(config) else "eager"


def needs_its_sdpa(config: transformers.PretrainedConfig) -> bool:
    """Whether the family is right under "sdpa" only: Falcon's eager code adds its ALiBi twice."""
    return config.model_type == "falcon" and config.alibi


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
