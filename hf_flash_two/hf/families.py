"""Every table of families: which of them need what, and whose attention is hand-written.

Layers with hand-written attention compute it in their own forward instead of through Transformers'
attention interface; `tracer` runs them all. The tables list the classes that tests prove to give
the same numbers, and those that cannot run, with the reason; users register their own. Other layers
are recognised by the names that their code uses.
"""

from __future__ import annotations

import dis
import inspect
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from types import CodeType, FunctionType
from typing import TypeVar

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

Module = TypeVar("Module", bound=type[nn.Module])

INTERFACE = "ALL_ATTENTION_FUNCTIONS"
"""What code that goes through Transformers' attention interface calls it."""

# Facts by model_type

# Families that ask whether the mask is a tensor.
WANTS_TENSOR = frozenset({"deepseek_v4", "doge", "gemma4_audio", "glm_moe_dsa", "informer"})
# Families that read the mask as additive, without a look at its dtype: to route tokens to experts.
READS_ADDITIVE = frozenset({"nllb-moe"})
# Families that are causal though their configs do not say so. Some make their own masks (OpenAI
# GPT; Falcon with ALiBi, which runs under its own sdpa); the layers of others hide the future
# themselves (Bark, ImageGPT).
CAUSAL = frozenset({"coarse_acoustics", "falcon", "imagegpt", "openai-gpt", "semantic"})
# Families that hand a decoder zeros for positions, since they add embeddings of time.
WITHOUT_POSITIONS = frozenset({"decision_transformer"})
# Families with bidirectional layers that say is_causal, or nothing, and get no mask.
NOT_CAUSAL_WITHOUT_MASK = frozenset(
    {"bridgetower", "bridgetower_text_model", "chinese_clip_vision_model", "kosmos_2_text_model"}
)
# Families whose causal layers say is_causal=False when they hand over a causal mask.
CAUSALITY_IN_MASK = frozenset({"moonshine", "moonshine_streaming"})
# Families that use sdpa for float masks, which are biases, under a name with "flash" in it.
TURN_TO_SDPA = frozenset(
    {
        "edgetam", "edgetam_video", "sam2", "sam2_video", "sam3", "sam3_lite_text", "sam3_tracker",
        "sam3_tracker_video",
    }
)  # fmt: skip
# Families whose bidirectional layers name a window that only their cache applies.
NO_WINDOW_WITHOUT_MASK = frozenset({"diffusion_gemma_text"})
# Families whose models return the weights of layers that are no decoder's in every call.
RETURNS_WEIGHTS = frozenset({"kosmos_2_text_model", "kosmos_2_5_text_model"})
# Families whose weights leave out what goes to the sinks.
WEIGHTS_WITHOUT_SINKS = frozenset({"granite_swa", "granitemoe_swa"})
# Families in which nothing but attention looks at other tokens: they may get a shard of each row.
# tests/distributed/test_families.py has shown each of them.
SHARDABLE = frozenset(
    """
    afmoe albert apertus apertus1p5_text arcee aria_text axk1 beam bert biogpt bitnet bloom
    codegen cohere cohere2 cohere2_moe ctrl cwm dbrx deepseek_v2 deepseek_v3 diffllama distilbert
    dory dots1 electra ernie ernie4_5 ernie4_5_moe eurobert exaone exaone4 exaone_moe falcon
    flex_olmo flint gemma gemma2 gemma3_text gemma4_text gemma4_unified_text glm glm4 glm4_moe
    glm4_moe_lite gpt2 gpt_bigcode gpt_neox gpt_oss gptj granite granite_swa granitemoe
    granitemoe_swa granitemoeshared gte helium hrm_text hunyuan_v1_dense hunyuan_v1_moe hy_v3
    hyperclovax internlm3 iquestcoder jais2 jetmoe jina_embeddings_v3 kolibri1 laguna llama
    llama4_text longcat_flash megatron-bert mellum mimo_v2_flash minicpm3 minimax_m2
    minimax_m3_vl_text ministral ministral3 mistral mixtral modernbert modernbert-decoder mt5
    nanochat nemotron nomic_bert olmo olmo2 olmo3 olmoe persimmon phi phi3 phimoe qwen2 qwen2_moe
    qwen3 qwen3_moe rembert roc_bert sarvam_mla sarvam_moe seed_oss smollm3 solar_open squeezebert
    stablelm starcoder2 t5 t5_gemma_module t5gemma ultrabert ultravbert umt5 vaultgemma youtu
    """.split()
)
# Families in which tokens see what the mask shows, and stand where position_ids say: they may get
# branches in a row. tests/hf/test_branches.py has shown each of them.
BRANCHABLE = frozenset(
    """
    afmoe apertus apertus1p5_text arcee aria_text axk1 beam biogpt bitnet codegen cohere cohere2
    cohere2_moe ctrl cwm dbrx deepseek_v2 deepseek_v3 diffllama dory dots1 ernie4_5 ernie4_5_moe
    exaone exaone4 exaone_moe falcon flex_olmo flint gemma gemma2 gemma3 gemma3_text gemma4
    gemma4_text gemma4_unified gemma4_unified_text glm glm4 glm4_moe glm4_moe_lite gpt2
    gpt_bigcode gpt_neox gpt_neox_japanese gpt_oss gptj granite granite_swa granitemoe
    granitemoe_swa granitemoeshared helium hrm_text hunyuan_v1_dense hunyuan_v1_moe hy_v3
    hyperclovax internlm3 iquestcoder jais2 jetmoe kolibri1 laguna llama llama4_text
    longcat_flash mellum mimo_v2_flash minicpm3 minimax_m2 minimax_m3_vl_text ministral
    ministral3 mistral mixtral modernbert-decoder nanochat nemotron olmo olmo2 olmo3 olmoe opt
    persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe sarvam_mla sarvam_moe seed_oss
    smollm3 solar_open stablelm starcoder2 vaultgemma xglm youtu
    """.split()
)
# Those of them that count positions in the mask, and so need that of the whole row.
MASK_IS_WHOLE = frozenset({"bloom", "falcon"})
# Those of them whose loss drops ``shift_labels``.
SHIFTS_LABELS = frozenset({"bloom", "falcon"})

# Classes with hand-written attention, and those that cannot be run

_BY_FAMILY = {
    "aimv2": "Aimv2AttentionPoolingHead",
    "apertus1p5": "Apertus1p5VisionTokenizerAttnBlock",
    "bark": "BarkSelfAttention",
    "big_bird": "BigBirdSelfAttention",
    "bigbird_pegasus": "BigBirdPegasusSelfAttention",
    "blip": "BlipAttention BlipTextSelfAttention",
    "bloom": "BloomAttention",
    "bros": "BrosSelfAttention",
    "canine": "CanineSelfAttention",
    "chameleon": "ChameleonVQVAEEncoderAttnBlock",
    "clap": "ClapAudioSelfAttention",
    "clvp": "ClvpSelfAttention",
    "codegen": "CodeGenAttention",
    "convbert": "ConvBertSelfAttention",
    "cpmant": "CpmAntAttention",
    "cvt": "CvtSelfAttention",
    "dab_detr": "DabDetrAttention DetrAttention",
    "data2vec": "Data2VecVisionSdpaSelfAttention Data2VecVisionSelfAttention",
    "deberta": "DisentangledSelfAttention",
    "deberta_v2": "DisentangledSelfAttention",
    "deepseek_ocr2": "DeepseekOcr2SamVisionAttention DeepseekOcr2SamVisionSdpaAttention",
    "donut": "DonutSwinSelfAttention",
    "esm": "EsmFoldAttention EsmFoldSelfAttention",
    "evolla": "EvollaSequenceAlignerCrossAttention EvollaSequenceCompressorAttention",
    "falcon": "FalconAttention",
    "fastspeech2_conformer": "FastSpeech2ConformerAttention",
    "flaubert": "MultiHeadAttention",
    "flava": "FlavaSelfAttention",
    "fsmt": "Attention",
    "funnel": "FunnelRelMultiheadAttention",
    "git": "GitSelfAttention",
    "glpn": "GLPNEfficientSelfAttention",
    "got_ocr2": "GotOcr2VisionAttention",
    "gpt_neo": "GPTNeoSelfAttention",
    "gpt_neox_japanese": "GPTNeoXJapaneseAttention",
    "gptj": "GPTJAttention",
    "granite_speech": "GraniteSpeechConformerAttention",
    "granite_speech_plus": "GraniteSpeechPlusConformerAttention",
    "grounding_dino": "GroundingDinoBiMultiHeadAttention GroundingDinoMultiheadAttention",
    "groupvit": "GroupViTAttention",
    "hiera": "HieraMaskUnitAttention",
    "ibert": "IBertSelfAttention",
    "imagegpt": "ImageGPTAttention",
    "informer": "InformerProbSparseAttention",
    "janus": "JanusVQVAEAttnBlock",
    "layoutlmv2": "LayoutLMv2SelfAttention",
    "layoutlmv3": "LayoutLMv3SelfAttention",
    "led": "LEDDecoderAttention",
    "levit": "LevitAttention LevitAttentionSubsample",
    "lilt": "LiltSelfAttention",
    "longt5": "LongT5LocalAttention LongT5TransientGlobalAttention",
    "luke": "LukeSelfAttention",
    "lxmert": "LxmertAttention",
    "mask2former": "Mask2FormerAttention",
    "maskformer": "MaskFormerSwinSelfAttention",
    "megatron_bert": "MegatronBertSelfAttention",
    "mgp_str": "MgpstrAttention",
    "mm_grounding_dino": "MMGroundingDinoBiMultiHeadAttention MMGroundingDinoMultiheadAttention",
    "mobilevit": "MobileViTSelfAttention",
    "mpnet": "MPNetSelfAttention",
    "mpt": "MptAttention",
    "mvp": "MvpAttention",
    "omdet_turbo": "OmDetTurboMultiheadAttention",
    "oneformer": "OneFormerAttention OneFormerTextMapperAttention",
    "openai": "Attention",
    "pegasus_x": "PegasusXGlobalLocalAttention",
    "perceiver": "PerceiverSelfAttention",
    "pp_doclayout_v2": "PPDocLayoutV2ReadingOrderSelfAttention",
    "pp_formulanet": "PPFormulaNetVisionAttention",
    "prophetnet": "ProphetNetAttention ProphetNetNgramSelfAttention",
    "pvt": "PvtEfficientSelfAttention",
    "pvt_v2": "PvtV2SelfAttention",
    "rembert": "RemBertSelfAttention",
    "roformer": "RoFormerSelfAttention",
    "sam": "SamVisionAttention SamVisionSdpaAttention",
    "sam_hq": "SamHQVisionAttention SamHQVisionSdpaAttention",
    "seggpt": "SegGptAttention",
    "sew_d": "DisentangledSelfAttention",
    "slanext": "SLANeXtVisionAttention",
    "speecht5": "SpeechT5Attention",
    "squeezebert": "SqueezeBertSelfAttention",
    "superglue": "SuperGlueSelfAttention",
    "swin2sr": "Swin2SRSelfAttention",
    "swinv2": "Swinv2SelfAttention",
    "table_transformer": "TableTransformerAttention",
    "tapas": "TapasSelfAttention",
    "timesformer": "TimesformerSelfAttention",
    "torch": "MultiheadAttention",
    "trocr": "TrOCRAttention",
    "tvp": "TvpAttention",
    "unlimited_ocr": "UnlimitedOcrSamVisionAttention UnlimitedOcrSamVisionSdpaAttention",
    "vilt": "ViltSelfAttention",
    "visual_bert": "VisualBertSelfAttention",
    "vitdet": "VitDetAttention",
    "wavlm": "WavLMAttention",
    "wavtokenizer": "WavTokenizerVocosAttention",
    "xglm": "XGLMAttention",
    "xlm": "MultiHeadAttention",
    "xlnet": "XLNetRelativeAttention",
    "zoedepth": "ZoeDepthMultiheadAttention",
}
HAND_WRITTEN = frozenset(
    f"{family}.{name}" for family, names in _BY_FAMILY.items() for name in names.split()
)
"""``family.class``, tested to give what they give unpatched."""

_SPARSE = "a fixed sparse pattern over blocks, whose probabilities are computed piece by piece"
_WEIGHTS = "it returns the probabilities themselves"
_ADDITIVE = "additive attention: no product of queries and keys"
_CAPPED = "caps its scores after adding a bias that depends on the queries"
NOT_POSSIBLE = {
    "autoformer.AutoformerAttention": "correlates whole series instead of tokens",
    "big_bird.BigBirdBlockSparseAttention": _SPARSE,
    "bigbird_pegasus.BigBirdPegasusBlockSparseAttention": _SPARSE,
    "conditional_detr.ConditionalDetrMHAttentionMap": _WEIGHTS,
    "dab_detr.DabDetrMHAttentionMap": _WEIGHTS,
    "detr.DetrMHAttentionMap": _WEIGHTS,
    "dinat.NeighborhoodAttention": "attends to a neighbourhood, by a library of its own",
    "esm.EsmFoldInvariantPointAttention": "needs its probabilities, for points and pairs",
    "esmfold2.EsmFold2RowAttentionPooling": _ADDITIVE,
    "gemma3n.Gemma3nAudioAttention": _CAPPED,
    "gemma4.Gemma4AudioAttention": _CAPPED,
    "groupvit.GroupViTAssignAttention": "assigns each token to one group, by a hard softmax",
    "inkling2.Inkling2BlockAttentionResidual": "weighs earlier layers, not tokens",
    "led.LEDEncoderSelfAttention": _SPARSE,
    "longformer.LongformerSelfAttention": _SPARSE,
    "maskformer.MaskFormerDetrMHAttentionMap": _WEIGHTS,
    "mobilevitv2.MobileViTV2LinearSelfAttention": "linear attention, no product of token pairs",
    "mra.MraSelfAttention": "approximates the scores by a kernel of its own",
    "nystromformer.NystromformerSelfAttention": "a low-rank approximation by three softmaxes",
    "reformer.LSHSelfAttention": "attends within buckets of hashes",
    "reformer.LocalSelfAttention": "normalises over chunks by a log-sum-exp of its own",
    "slanet.SLANetAttentionGRUCell": _ADDITIVE,
    "slanext.SLANeXtAttentionGRUCell": _ADDITIVE,
    "swiftformer.SwiftFormerEfficientAdditiveAttention": _ADDITIVE,
    "vits.VitsAttention": "needs its probabilities, for values that depend on the distance",
    "yoso.YosoSelfAttention": "estimates weights by hashing; there is no softmax",
}

ALWAYS_REQUESTED = frozenset(
    {
        "dab_detr.DabDetrAttention",
        "grounding_dino.GroundingDinoBiMultiHeadAttention",
        "grounding_dino.GroundingDinoMultiheadAttention",
        "mask2former.Mask2FormerAttention",
        "mm_grounding_dino.MMGroundingDinoBiMultiHeadAttention",
        "mm_grounding_dino.MMGroundingDinoMultiheadAttention",
        "oneformer.OneFormerAttention",
    }
)
"""Their models request probabilities in every call, whether or not the caller wants them."""

UNLESS = {
    "deberta.DisentangledSelfAttention": ("talking_head", "mixes the probabilities of its heads"),
    "ibert.IBertSelfAttention": ("quant_mode", "computes in integers"),
}
"""Classes in HAND_WRITTEN that cannot run if an attribute is set: (attribute, reason)."""

_TRANSFORMERS = "transformers.models."
_NAMED = re.compile(r"att(ention|n)|mha", re.IGNORECASE)
_QUERY = re.compile(r"^qk?v?$|quer|q_?proj|qkv", re.IGNORECASE)
_WHOLE = re.compile(
    "scaled_dot_product_attention|^_?flash_attn_|flash_attention_forward|flex_attention"
)
_PRODUCT = re.compile("matmul|^(bmm|baddbmm|einsum)$|^@$|scaled_dot_product_attention")

_registered: set[type[nn.Module]] = set()


def register_attention(cls: Module) -> Module:
    """Let `patch` switch a class of your own with hand-written softmax attention.

    Its forward then runs as it is, while the product of queries and keys is recorded and computed
    by the kernels. What they cannot do raises NotImplementedError in the first call. Probabilities
    that it returns are None, unless the model's caller asks for ``output_attentions``. Check the
    layers with `check_parity`. May decorate the class; subclasses that do not override ``forward``
    are registered with it.

    Raises:
        TypeError: not a class of modules.
        ValueError: it is switched without this, or cannot be.
    """
    if not (inspect.isclass(cls) and issubclass(cls, nn.Module)):
        raise TypeError(f"cls: expected a subclass of torch.nn.Module, got {cls!r}")
    name = name_of(cls)
    if name in NOT_POSSIBLE:
        raise ValueError(f"cls: {cls.__name__} cannot be switched: {NOT_POSSIBLE[name]}")
    if name not in HAND_WRITTEN and attention_kind(cls) == "interface":
        raise ValueError(
            f"cls: {cls.__name__} goes through Transformers' attention interface; "
            "attn_implementation='flash_two' or `patch` switch it as it is"
        )
    _registered.add(_defines_forward(cls))
    attention_kind.cache_clear()
    return cls


def why_not(layer: nn.Module) -> str | None:
    """Why a layer with hand-written attention cannot be run; None if it can."""
    cls = type(layer)
    name = name_of(cls)
    if name in NOT_POSSIBLE:
        return NOT_POSSIBLE[name]
    if name not in HAND_WRITTEN and _defines_forward(cls) not in _registered:
        register = f"; hf_flash_two.register_attention({_defines_forward(cls).__name__}) allows it"
        reason = "computes attention itself in a way not known"
        return reason + (register if ":" in name else "")
    attribute, reason = UNLESS.get(name, ("", ""))
    return reason if attribute and getattr(layer, attribute) else None


@cache
def attention_kind(cls: type[nn.Module]) -> str | None:
    """ "interface", "hand-written" or None for a class that is no attention layer."""
    name, owner = name_of(cls), _defines_forward(cls)
    functions = [] if issubclass(cls, PreTrainedModel) else _functions(cls)
    names = {name for function in functions for name in _names(function.__code__)}
    # Before the lists: some classes in them use the interface in newer versions.
    if INTERFACE in names:
        return "interface"
    if name in HAND_WRITTEN or name in NOT_POSSIBLE or owner in _registered:
        return "hand-written"
    if issubclass(cls, PreTrainedModel) or owner.__module__.startswith("torch."):
        return None

    def uses(what: re.Pattern[str]) -> bool:
        return any(map(what.search, names))

    named = _NAMED.search(cls.__name__)
    if ":" in name:
        named = named or uses(_WHOLE) or uses(_QUERY)
    attends = uses(_WHOLE) or any("softmax" in name.lower() for name in names) and uses(_PRODUCT)
    # A compiled class shows nothing but its name.
    return "hand-written" if named and (attends or not functions) else None


def name_of(cls: type) -> str:
    """``family.class`` of the class that defines ``forward``; ``module:class`` of a user's."""
    cls = _defines_forward(cls)
    if not cls.__module__.startswith((_TRANSFORMERS, "torch.")):
        return f"{cls.__module__}:{cls.__qualname__}"
    return f"{cls.__module__.removeprefix(_TRANSFORMERS).partition('.')[0]}.{cls.__qualname__}"


def _defines_forward(cls: type) -> type:
    return next((owner for owner in cls.__mro__ if "forward" in vars(owner)), cls)


def _functions(cls: type) -> list[FunctionType]:
    """The functions that an instance of ``cls`` may run, helpers of the same module included."""
    found: dict[FunctionType, None] = {}
    done: set[str] = set()
    for owner in cls.__mro__:
        if owner is object or owner.__module__.startswith("torch."):
            continue
        for name, member in vars(owner).items():
            function = inspect.unwrap(getattr(member, "__func__", member))
            if inspect.isfunction(function) and name not in done:
                found[function] = None
                if "super" not in function.__code__.co_names:
                    done.add(name)
    waiting = list(found)
    while waiting:
        function = waiting.pop()
        for name in _names(function.__code__):
            helper = function.__globals__.get(name)
            if inspect.isfunction(helper) and helper.__module__ == function.__module__:
                if helper not in found:
                    found[helper] = None
                    waiting.append(helper)
    return list(found)


def _names(code: CodeType) -> Iterator[str]:
    """The names that ``code`` uses, and "@" for that operator."""
    yield from (*code.co_names, *code.co_varnames)
    for step in dis.get_instructions(code):
        if step.opname == "BINARY_OP" and step.argrepr.startswith("@"):
            yield "@"
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


# Questions about one model or layer


def has_cross_attention(model: PreTrainedModel) -> bool:
    """Whether a bidirectional mask of this model may be one from a decoder to an encoder."""
    names = ("is_decoder", "is_encoder_decoder", "add_cross_attention")
    return any(getattr(model.config, name, False) for name in names)


def is_causal_model(model: PreTrainedModel) -> bool:
    """Whether a model that makes its own masks makes causal ones."""
    config = model.config
    return config.model_type in CAUSAL or any(
        getattr(config, name, False) for name in ("is_decoder", "causal")
    )


def hides_future(model: PreTrainedModel) -> bool:
    """Whether the layers of this model are causal, whatever its masks say."""
    return model.config.model_type in CAUSAL and not has_cross_attention(model)


def family_of(module: nn.Module) -> str | None:
    """The ``model_type`` of the layer's config."""
    config = getattr(module, "config", None)
    if not torch.compiler.is_compiling():
        # Past the look-up of Transformers' configs, which every layer would wait for.
        with suppress(AttributeError):
            return object.__getattribute__(config, "model_type")
    return getattr(config, "model_type", None)


def is_hand_written(config: PreTrainedConfig) -> bool:
    """Whether all attention of the family is hand-written, and wants the float mask of eager."""
    name = type(config).__module__.replace(".configuration_", ".modeling_")
    return name in sys.modules and not hasattr(sys.modules[name], INTERFACE)


def default_implementation(config: PreTrainedConfig) -> str:
    """What a family with hand-written attention may always be set to."""
    return "sdpa" if needs_its_sdpa(config) else "eager"


def needs_its_sdpa(config: PreTrainedConfig) -> bool:
    """Whether the family is right under "sdpa" only: Falcon's eager code adds its ALiBi twice."""
    return config.model_type == "falcon" and config.alibi
