"""Attention layers of families that are hard to build whole: each layer, and arguments for it."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
import torch
import transformers
from hand_written_models import random, tiny
from torch import Tensor, nn

Built = tuple[nn.Module, dict[str, object]]


def _class(path: str) -> type[nn.Module]:
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(f"transformers.models.{module}"), name)
    except (AttributeError, ImportError):
        pytest.skip(f"transformers {transformers.__version__} has no {path}")


def _config(name: str, **changes):
    return tiny(getattr(transformers, name), **changes)


def _padding(queries: int, keys: int) -> Tensor:
    """Additive, [2, 1, queries, keys]."""
    hidden = torch.arange(keys) >= torch.tensor([[keys], [keys - 3]])
    return hidden[:, None, None].expand(-1, -1, queries, -1) * torch.finfo(torch.float32).min


def _sequence(length: int = 9) -> Tensor:
    return random(2, length, 32)


def _bros() -> Built:
    layer = _class("bros.modeling_bros.BrosSelfAttention")(_config("BrosConfig"))
    return layer, {
        "hidden_states": _sequence(),
        "bbox_pos_emb": random(9, 9, 2, 8),
        "attention_mask": _padding(9, 9),
    }


def _clap() -> Built:
    config = _config("ClapAudioConfig")
    layer = _class("clap.modeling_clap.ClapAudioSelfAttention")(config, 32, 4, 3)
    shifted = torch.where(random(2, 9, 9) > 1, -100.0, 0.0)
    return layer, {"hidden_states": random(4, 9, 32), "attention_mask": shifted}


def _clvp() -> Built:
    config = _config("ClvpEncoderConfig")
    layer = _class("clvp.modeling_clvp.ClvpSelfAttention")(config)
    return layer, {"hidden_states": _sequence(), "attention_mask": _padding(9, 9)}


def _cpmant() -> Built:
    layer = _class("cpmant.modeling_cpmant.CpmAntAttention")(_config("CpmAntConfig"))
    return layer, {
        "hidden_q": _sequence(), "hidden_kv": _sequence(), "position_bias": random(4, 9, 9),
        "attention_mask": _padding(9, 9)[:, 0] == 0,
    }  # fmt: skip


def _dab_detr_config():
    backbone = transformers.ResNetConfig()
    return _config("DabDetrConfig", use_timm_backbone=False, backbone_config=backbone)


def _dab_detr() -> Built:
    config = _dab_detr_config()
    layer = _class("dab_detr.modeling_dab_detr.DabDetrAttention")(config, is_cross=True)
    keys = random(2, 9, 64)
    return layer, {
        "hidden_states": random(2, 7, 64), "key_states": keys, "value_states": _sequence(),
        "attention_mask": _padding(7, 9),
    }  # fmt: skip


def _detr_of_dab_detr() -> Built:
    config = _dab_detr_config()
    layer = _class("dab_detr.modeling_dab_detr.DetrAttention")(config)
    return layer, {
        "hidden_states": _sequence(), "attention_mask": _padding(9, 9),
        "object_queries": random(2, 9, 32),
    }  # fmt: skip


def _esmfold() -> Built:
    layer = _class("esm.modeling_esmfold.EsmFoldAttention")(32, 32, 32, 8, 4)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = random(2, 5, 9, 32)
    return layer, {"q_x": x, "kv_x": x, "biases": [random(2, 5, 1, 1, 9), random(2, 1, 4, 9, 9)]}


def _esmfold_sequence() -> Built:
    layer = _class("esm.modeling_esmfold.EsmFoldSelfAttention")(32, 4, 8, gated=True)
    return layer, {
        "x": _sequence(),
        "mask": _padding(9, 9)[:, 0, 0] == 0,
        "bias": random(2, 9, 9, 4),
    }


def _evolla_aligner() -> Built:
    config = _config("EvollaConfig")
    layer = _class("evolla.modeling_evolla.EvollaSequenceAlignerCrossAttention")(config, 16)
    nn.init.ones_(layer.gate_attention)
    return layer, {
        "query_states": _sequence(), "protein_kv_states": random(2, 7, 16),
        "structure_kv_states": None, "msa_kv_states": None,
        "query_attn_mask": torch.ones(2, 9), "protein_kv_attn_mask": torch.ones(2, 7),
    }  # fmt: skip


def _evolla_compressor() -> Built:
    layer = _class("evolla.modeling_evolla.EvollaSequenceCompressorAttention")(32, 8, 4)
    return layer, {"x": _sequence(), "latents": random(2, 5, 32), "mask": torch.ones(2, 14)}


def _granite_speech(family: str, prefix: str) -> Callable[[], Built]:
    def build() -> Built:
        layer = _class(f"{family}.modeling_{family}.{prefix}ConformerAttention")
        config = _config(f"{prefix}EncoderConfig", context_size=6, max_pos_emb=8, num_heads=4)
        layer = layer(config)
        distance = torch.arange(6)[:, None] - torch.arange(6)[None] + 8
        return layer, {"hidden_states": _sequence(), "attention_dists": distance}

    return build


def _queries_keys_values(path: str, *args, **settings) -> Callable[[], Built]:
    def build() -> Built:
        layer = _class(path)(*(_config(x) if isinstance(x, str) else x for x in args), **settings)
        keys = random(2, 7, 32)
        return layer, {"queries": _sequence(), "keys": keys, "values": keys}

    return build


def _both_ways(path: str, config: str) -> Callable[[], Built]:
    def build() -> Built:
        settings = _config(config, d_model=32, encoder_ffn_dim=64, encoder_attention_heads=8)
        hidden = torch.arange(7) >= torch.tensor([[7], [4]])
        return _class(path)(settings), {
            "vision_features": _sequence(), "text_features": random(2, 7, 32),
            "vision_attention_mask": torch.arange(9) >= torch.tensor([[6], [9]]),
            "text_attention_mask": hidden,
        }  # fmt: skip

    return build


def _image_block(path: str) -> Callable[[], Built]:
    return lambda: (_class(path)(32), {"hidden_states": random(2, 32, 3, 5)})


def _informer() -> Built:
    torch.manual_seed(0)
    layer = _class("informer.modeling_informer.InformerProbSparseAttention")(32, 4)
    return layer, {"hidden_states": _sequence(29), "attention_mask": _padding(29, 29)}


def _layoutlmv2() -> Built:
    config = _config("LayoutLMv2Config", convert_sync_batchnorm=False)
    layer = _class("layoutlmv2.modeling_layoutlmv2.LayoutLMv2SelfAttention")(config)
    return layer, {
        "hidden_states": _sequence(), "attention_mask": _padding(9, 9),
        "rel_pos": random(2, 4, 9, 9), "rel_2d_pos": random(2, 4, 9, 9) * 2,
    }  # fmt: skip


def _led_decoder() -> Built:
    layer = _class("led.modeling_led.LEDDecoderAttention")(32, 4, is_decoder=True)
    return layer, {"hidden_states": _sequence(), "attention_mask": _padding(9, 9)}


def _levit() -> Built:
    layer = _class("levit.modeling_levit.LevitAttention")(32, 8, 4, 2, 3)
    nn.init.normal_(layer.attention_biases)
    return layer, {"hidden_state": _sequence()}


def _levit_subsample() -> Built:
    layer = _class("levit.modeling_levit.LevitAttentionSubsample")(32, 24, 8, 4, 2, 2, 4, 2)
    nn.init.normal_(layer.attention_biases)
    return layer, {"hidden_state": _sequence(16)}


def _longt5_global() -> Built:
    config = _config("LongT5Config", local_radius=3, global_block_size=3)
    layer = _class("longt5.modeling_longt5.LongT5TransientGlobalAttention")(config, True)
    return layer, {"hidden_states": random(2, 12, 32), "mask": torch.ones(2, 12)}


def _mask2former(path: str) -> Callable[[], Built]:
    def build() -> Built:
        layer = _class(path)(32, 4)
        return layer, {
            "hidden_states": random(7, 2, 32), "position_embeddings": random(7, 2, 32),
            "attention_mask": _padding(7, 7).expand(-1, 4, -1, -1).reshape(8, 7, 7),
        }  # fmt: skip

    return build


def _mgp_str() -> Built:
    layer = _class("mgp_str.modeling_mgp_str.MgpstrAttention")(_config("MgpstrConfig"))
    return layer, {"hidden_states": _sequence()}


def _oneformer_text() -> Built:
    layer = _class("oneformer.modeling_oneformer.OneFormerTextMapperAttention")(32, 4)
    keys = random(2, 7, 32)
    return layer, {"q": _sequence(), "k": keys, "v": keys}


def _reading_order() -> Built:
    path = "pp_doclayout_v2.modeling_pp_doclayout_v2.PPDocLayoutV2ReadingOrderSelfAttention"
    config = _config("LayoutLMv3Config")
    config.has_relative_attention_bias = config.has_spatial_attention_bias = True
    return _class(path)(config), {
        "hidden_states": _sequence(), "attention_mask": _padding(9, 9),
        "rel_pos": random(2, 4, 9, 9), "rel_2d_pos": random(2, 4, 9, 9) * 2,
    }  # fmt: skip


def _sam_like(path: str) -> Callable[[], Built]:
    def build() -> Built:
        settings = _config("SamVisionConfig", use_rel_pos=True)
        layer = _class(path)(settings, 3)
        for name in ("rel_pos_h", "rel_pos_w"):
            nn.init.normal_(getattr(layer, name))
        return layer, {"hidden_states": random(2, 3, 3, 32)}

    return build


def _table_transformer() -> Built:
    path = "table_transformer.modeling_table_transformer.TableTransformerAttention"
    return _class(path)(32, 4), {
        "hidden_states": _sequence(), "attention_mask": _padding(9, 9),
        "object_queries": random(2, 9, 32),
    }  # fmt: skip


def _tvp() -> Built:
    config = _config("TvpConfig", backbone_config=None)
    layer = _class("tvp.modeling_tvp.TvpAttention")(config)
    return layer, {"hidden_states": _sequence(), "attention_mask": _padding(9, 9)}


def _wavtokenizer() -> Built:
    layer = _class("wavtokenizer.modeling_wavtokenizer.WavTokenizerVocosAttention")
    config = transformers.WavTokenizerConfig(decoder_hidden_size=32, decoder_attention_num_groups=4)
    return layer(config), {"hidden_states": random(2, 32, 9)}


LAYERS: dict[str, Callable[[], Built]] = {
    "apertus1p5_tokenizer": _image_block(
        "apertus1p5.modeling_apertus1p5.Apertus1p5VisionTokenizerAttnBlock"
    ),
    "bros": _bros,
    "chameleon_vqvae": _image_block("chameleon.modeling_chameleon.ChameleonVQVAEEncoderAttnBlock"),
    "clap_audio": _clap,
    "clvp": _clvp,
    "cpmant": _cpmant,
    "dab_detr": _dab_detr,
    "dab_detr_encoder": _detr_of_dab_detr,
    "deepseek_ocr2": _sam_like(
        "deepseek_ocr2.modeling_deepseek_ocr2.DeepseekOcr2SamVisionAttention"
    ),
    "deepseek_ocr2_sdpa": _sam_like(
        "deepseek_ocr2.modeling_deepseek_ocr2.DeepseekOcr2SamVisionSdpaAttention"
    ),
    "esmfold": _esmfold,
    "esmfold_sequence": _esmfold_sequence,
    "evolla_aligner": _evolla_aligner,
    "evolla_compressor": _evolla_compressor,
    "got_ocr2": _sam_like("got_ocr2.modeling_got_ocr2.GotOcr2VisionAttention"),
    "granite_speech": _granite_speech("granite_speech", "GraniteSpeech"),
    "granite_speech_plus": _granite_speech("granite_speech_plus", "GraniteSpeechPlus"),
    "grounding_dino_both_ways": _both_ways(
        "grounding_dino.modeling_grounding_dino.GroundingDinoBiMultiHeadAttention",
        "GroundingDinoConfig",
    ),
    "mm_grounding_dino_both_ways": _both_ways(
        "mm_grounding_dino.modeling_mm_grounding_dino.MMGroundingDinoBiMultiHeadAttention",
        "MMGroundingDinoConfig",
    ),
    "grounding_dino": _queries_keys_values(
        "grounding_dino.modeling_grounding_dino.GroundingDinoMultiheadAttention",
        "GroundingDinoConfig",
        num_attention_heads=4,
    ),
    "informer": _informer,
    "janus_vqvae": _image_block("janus.modeling_janus.JanusVQVAEAttnBlock"),
    "layoutlmv2": _layoutlmv2,
    "led_decoder": _led_decoder,
    "levit": _levit,
    "levit_subsample": _levit_subsample,
    "longt5_global": _longt5_global,
    "mask2former": _mask2former("mask2former.modeling_mask2former.Mask2FormerAttention"),
    "mgp_str": _mgp_str,
    "mm_grounding_dino": _queries_keys_values(
        "mm_grounding_dino.modeling_mm_grounding_dino.MMGroundingDinoMultiheadAttention",
        "MMGroundingDinoConfig",
        num_attention_heads=4,
    ),
    "omdet_turbo": _queries_keys_values(
        "omdet_turbo.modeling_omdet_turbo.OmDetTurboMultiheadAttention",
        "OmDetTurboConfig", 32, 4, 0.0,
    ),
    "oneformer": _mask2former("oneformer.modeling_oneformer.OneFormerAttention"),
    "oneformer_text": _oneformer_text,
    "pp_doclayout_v2": _reading_order,
    "pp_formulanet": _sam_like(
        "pp_formulanet.modeling_pp_formulanet.PPFormulaNetVisionAttention"
    ),
    "slanext": _sam_like("slanext.modeling_slanext.SLANeXtVisionAttention"),
    "table_transformer": _table_transformer,
    "tvp": _tvp,
    "unlimited_ocr": _sam_like(
        "unlimited_ocr.modeling_unlimited_ocr.UnlimitedOcrSamVisionAttention"
    ),
    "unlimited_ocr_sdpa": _sam_like(
        "unlimited_ocr.modeling_unlimited_ocr.UnlimitedOcrSamVisionSdpaAttention"
    ),
    "zoedepth": _queries_keys_values(
        "zoedepth.modeling_zoedepth.ZoeDepthMultiheadAttention", 32, 4, 0.0
    ),
    "wavtokenizer": _wavtokenizer,
}  # fmt: skip
