"""Classes that compute attention themselves instead of through Transformers' interface.

All are carried out by one mechanism, `own_attention`. Listed are those that tests prove to give the
same numbers, as ``family.class``, and those that cannot, with the reason.
"""

from __future__ import annotations

import inspect
import re
from functools import cache

from torch import nn
from transformers import PreTrainedModel

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
OWN_ATTENTION = frozenset(
    f"{family}.{name}" for family, names in _BY_FAMILY.items() for name in names.split()
)
"""Tested to give what they give unpatched."""

_SPARSE = "a fixed sparse pattern over blocks, whose probabilities are computed piece by piece"
_WEIGHTS = "its result are the probabilities themselves"
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

ALWAYS_ASKED = frozenset(
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
"""Asked for their probabilities in every call, though only the model's caller may want them."""

UNLESS = {
    "deberta.DisentangledSelfAttention": ("talking_head", "mixes the probabilities of its heads"),
    "ibert.IBertSelfAttention": ("quant_mode", "computes in integers"),
}
"""Layers of classes in OWN_ATTENTION that cannot: (attribute that tells, reason)."""

_PRODUCT = re.compile(r"matmul|bmm\(|einsum\(| @ |scaled_dot_product_attention\(")


def why_not(layer: nn.Module) -> str | None:
    """Why a layer that computes attention itself cannot be carried out; None if it can."""
    name = key(type(layer))
    if name in NOT_POSSIBLE:
        return NOT_POSSIBLE[name]
    if name not in OWN_ATTENTION:
        return "computes attention itself in a way not known"
    attribute, reason = UNLESS.get(name, ("", ""))
    return reason if attribute and getattr(layer, attribute) else None


@cache
def attention_kind(cls: type[nn.Module]) -> str | None:
    """ "interface", "own" or None for a class that is no attention layer."""
    name = key(cls)
    text = "" if issubclass(cls, PreTrainedModel) else _source(cls)
    # Before the lists: some classes in them use the interface in newer versions.
    if "ALL_ATTENTION_FUNCTIONS" in text:
        return "interface"
    if name in OWN_ATTENTION or name in NOT_POSSIBLE:
        return "own"
    softmax = re.search("softmax|scaled_dot_product_attention", text, re.IGNORECASE)
    named = re.search("att(ention|n)", cls.__name__, re.IGNORECASE)
    return "own" if named and softmax and _PRODUCT.search(text) else None


def _source(cls: type[nn.Module]) -> str:
    """The methods of a class of Transformers' models; empty of others, and where it is missing."""
    try:
        return "\n".join(
            inspect.getsource(member)
            for owner in cls.__mro__
            if owner.__module__.startswith("transformers.models.")
            for member in vars(owner).values()
            if inspect.isfunction(member)
        )
    except OSError:
        return ""


def key(cls: type) -> str:
    """``family.class`` of the class that defines ``forward``; PyTorch's own family is ``torch``."""
    cls = next((owner for owner in cls.__mro__ if "forward" in vars(owner)), cls)
    family = cls.__module__.removeprefix("transformers.models.").partition(".")[0]
    return f"{family}.{cls.__qualname__}"
