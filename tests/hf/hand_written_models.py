"""Tiny random models of the families that compute attention themselves, and inputs for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

VOCABULARY = 99
# The value of every field of that name that a configuration has.
_SIZES = (
    (
        32,
        """hidden_size d_model n_embd dim embed_dim decoder_embed_dim model_dim emb_dim
        embedding_size output_size encoder_hidden_size decoder_hidden_size attention_hidden_size
        input_embedding_size projection_dim entity_emb_size text_hidden_size intermediate_size d_ff
        ffn_dim encoder_ffn_dim decoder_ffn_dim d_inner mlp_dim dim_feedforward
        encoder_feedforward_dim image_size embedding_hidden_size hidden_dim mask_feature_size
        feature_size encoder_linear_units decoder_linear_units dim_ff""",
    ),
    (
        2,
        """num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers depth
        num_decoder_layers num_encoder_layers r_layers x_layers l_layers num_attention_layers
        num_key_value_heads eos_token_id""",
    ),
    (
        4,
        """num_attention_heads n_head n_heads num_heads num_kv_heads encoder_attention_heads
        decoder_attention_heads window_size rotary_dim""",
    ),
    (8, "head_dim attention_head_dim d_kv d_head dim_head patch_size"),
    (64, "max_position_embeddings n_positions max_source_positions max_target_positions"),
    (VOCABULARY, "vocab_size src_vocab_size tgt_vocab_size"),
    (0, "pad_token_id"),
    (1, "bos_token_id decoder_start_token_id"),
    (
        0.0,
        """dropout attention_dropout hidden_dropout hidden_dropout_prob resid_dropout
        attention_probs_dropout_prob resid_pdrop attn_pdrop embd_pdrop activation_dropout layerdrop
        encoder_layerdrop decoder_layerdrop embed_dropout drop_path_rate dropout_rate
        classifier_dropout dropout_p embd_dropout""",
    ),
)
_TINY = {name: value for value, names in _SIZES for name in names.split()}


def floats(outputs) -> list[Tensor]:
    """All float tensors in what a model returns."""
    if isinstance(outputs, Tensor):
        return [outputs] if outputs.is_floating_point() and outputs.numel() else []
    if isinstance(outputs, dict):
        outputs = list(outputs.values())
    if not isinstance(outputs, (list, tuple)):
        return []
    return [tensor for part in outputs for tensor in floats(part)]


def tiny(config_class: type[PreTrainedConfig], **changes) -> PreTrainedConfig:
    """A configuration of two layers and few channels."""
    settings = {}
    for name, value in config_class().to_dict().items():
        if name in _TINY and isinstance(value, (int, float)) and not isinstance(value, bool):
            settings[name] = type(value)(_TINY[name])
    return config_class(**(settings | changes))


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def tokens(*shape: int) -> Tensor:
    return torch.randint(5, 90, shape, generator=torch.Generator().manual_seed(4))


def text(length: int = 17, padding: int = 5, left: bool = False) -> dict[str, Tensor]:
    ids = tokens(2, length)
    mask = torch.ones_like(ids)
    mask[0, slice(None, padding) if left else slice(length - padding, None)] = 0
    return {"input_ids": ids, "attention_mask": mask}


def prompt() -> dict[str, Tensor]:
    return text(left=True)


def two_texts() -> dict[str, Tensor]:
    return text() | {"decoder_input_ids": tokens(2, 9)}


def image(size: int = 32) -> dict[str, Tensor]:
    return {"pixel_values": random(2, 3, size, size)}


def large_image() -> dict[str, Tensor]:
    return image(64)


def speech() -> dict[str, Tensor]:
    return {"input_values": random(2, 400)}


@dataclass(frozen=True)
class OwnFamily:
    """A model whose attention does not go through Transformers' interface.

    Attributes:
        reference: the implementation to compare with.
        asleep: parts of names of layers that this model does not call.
        since: the Transformers from which its other layers use the interface.
    """

    name: str
    model: str
    changes: dict = field(default_factory=dict)
    inputs: Callable[[], dict[str, Tensor]] = text
    reference: str = "eager"
    asleep: tuple[str, ...] = ()
    since: str = "5.4"

    def build(self, implementation: str | None = None, **changes) -> PreTrainedModel:
        """In eval mode, with weights that make attention prefer some keys."""
        model_class = getattr(transformers, self.model)
        config = tiny(model_class.config_class, **(self.changes | changes))
        torch.manual_seed(0)
        model = model_class._from_config(
            config, attn_implementation=implementation or self.reference
        )
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.normal_(0, parameter.shape[-1] ** -0.5)
                elif parameter.dim() > 2:
                    parameter.normal_(0, 0.2)
        return model.eval()


_VISION = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip
_SWIN = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "patch_size": 2}
_PYRAMID = {
    "hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 4],
    "image_size": 64, "mlp_ratios": [2, 2, 2, 2],
}  # fmt: skip
_CONV = {
    "conv_dim": [16, 16], "conv_stride": [5, 4], "conv_kernel": [5, 4],
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0,
}  # fmt: skip
_LAYOUT = {"hidden_size": 48, "max_2d_position_embeddings": 64}
_FALCON = {"num_kv_heads": 4, "multi_query": False, "new_decoder_architecture": False}
_C2P = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 16}
_SAM = {
    "window_size": 3, "global_attn_indexes": [1], "num_pos_feats": 8, "output_channels": 16,
}  # fmt: skip
_FAST_SPEECH = {
    "encoder_num_attention_heads": 4, "decoder_num_attention_heads": 4, "num_mel_bins": 8,
    "encoder_layers": 1, "decoder_layers": 1, "speech_decoder_postnet_units": 8,
    "duration_predictor_channels": 8, "energy_predictor_channels": 8,
    "pitch_predictor_channels": 8, "encoder_kernel_size": 3,
    "decoder_kernel_size": 3, "convolution_bias": True,
}  # fmt: skip
_SUPERPOINT = {
    "model_type": "superpoint", "encoder_hidden_sizes": [8, 8, 16], "decoder_hidden_size": 16,
    "keypoint_decoder_dim": 65, "descriptor_decoder_dim": 16,
}  # fmt: skip
_BARK = {"block_size": 64, "input_vocab_size": VOCABULARY, "output_vocab_size": VOCABULARY}
_LONG = {"attention_window": [4, 4], "max_encoder_position_embeddings": 64,
         "max_decoder_position_embeddings": 64}  # fmt: skip


def _boxes(corners: int = 4) -> dict[str, Tensor]:
    return text() | {"bbox": tokens(2, 17, 1).expand(-1, -1, corners).clone() // 4}


def _with(more: Callable[[], dict[str, Tensor]], **names) -> Callable[[], dict[str, Tensor]]:
    return lambda: more() | {name: make() for name, make in names.items()}


ENCODERS = [
    OwnFamily("big_bird_full", "BigBirdModel", {"attention_type": "original_full"}),
    OwnFamily("blip_text", "BlipTextModel", asleep=("crossattention",)),
    OwnFamily("canine", "CanineModel", {"local_transformer_stride": 8, "num_hash_buckets": 64},
              lambda: text(40)),
    OwnFamily("convbert", "ConvBertModel"),
    OwnFamily("deberta", "DebertaModel", _C2P),
    OwnFamily("deberta_plain", "DebertaModel"),
    OwnFamily("deberta_v2", "DebertaV2Model", _C2P | {"position_buckets": 8}),
    OwnFamily("flaubert", "FlaubertModel"),
    OwnFamily("flava_text", "FlavaTextModel"),
    OwnFamily("funnel", "FunnelModel"),
    OwnFamily("git", "GitModel", {"vision_config": _VISION},
              _with(text, pixel_values=lambda: random(2, 3, 32, 32))),
    OwnFamily("groupvit_text", "GroupViTTextModel"),
    OwnFamily("ibert", "IBertModel"),
    OwnFamily("layoutlmv3", "LayoutLMv3Model",
              {"input_size": 32, "coordinate_size": 4, "shape_size": 6, "hidden_size": 28,
               "max_2d_position_embeddings": 64, "rel_pos_bins": 8, "max_rel_pos": 16,
               "rel_2d_pos_bins": 8, "max_rel_2d_pos": 16},
              _with(_boxes, pixel_values=lambda: random(2, 3, 32, 32))),
    OwnFamily("lilt", "LiltModel", _LAYOUT | {"channel_shrink_ratio": 2}, _boxes),
    OwnFamily("luke", "LukeModel", {"entity_vocab_size": 9}),
    OwnFamily("luke_entities", "LukeModel", {"entity_vocab_size": 9},
              _with(text, entity_ids=lambda: tokens(2, 3) % 9,
                    entity_position_ids=lambda: tokens(2, 3, 4) % 9,
                    entity_attention_mask=lambda: torch.ones(2, 3, dtype=torch.long))),
    OwnFamily("lxmert", "LxmertModel", {"visual_feat_dim": 8},
              _with(text, visual_feats=lambda: random(2, 6, 8),
                    visual_pos=lambda: random(2, 6, 4))),
    OwnFamily("megatron_bert", "MegatronBertModel"),
    OwnFamily("mpnet", "MPNetModel"),
    OwnFamily("perceiver", "PerceiverModel",
              {"d_model": 32, "d_latents": 32, "num_latents": 8, "num_self_attends_per_block": 2,
               "num_cross_attention_heads": 2, "num_self_attention_heads": 2, "qk_channels": 16,
               "v_channels": 32},
              lambda: {"inputs": random(2, 17, 32), "attention_mask": text()["attention_mask"]}),
    OwnFamily("rembert", "RemBertModel"),
    OwnFamily("roformer", "RoFormerModel"),
    OwnFamily("squeezebert", "SqueezeBertModel"),
    OwnFamily("tapas", "TapasModel"),
    OwnFamily("vilt", "ViltModel",
              inputs=_with(text, pixel_values=lambda: random(2, 3, 32, 32))),
    OwnFamily("visual_bert", "VisualBertModel"),
    OwnFamily("xlm", "XLMModel", {"use_lang_emb": False}),
    OwnFamily("xlm_causal", "XLMWithLMHeadModel", {"use_lang_emb": False, "causal": True}),
    OwnFamily("xlnet", "XLNetModel"),
]  # fmt: skip
DECODERS = [
    OwnFamily("bark", "BarkSemanticModel", _BARK, prompt),
    OwnFamily("bloom", "BloomForCausalLM", inputs=prompt),
    OwnFamily("codegen", "CodeGenForCausalLM", inputs=prompt),
    OwnFamily("falcon_rotary", "FalconForCausalLM", _FALCON, prompt),
    OwnFamily("falcon_new", "FalconForCausalLM",
              {"new_decoder_architecture": True, "num_kv_heads": 2}, prompt),
    # Under eager Falcon adds its ALiBi twice.
    OwnFamily("falcon_alibi", "FalconForCausalLM", _FALCON | {"alibi": True}, prompt, "sdpa"),
    OwnFamily("falcon_alibi_mqa", "FalconForCausalLM",
              _FALCON | {"alibi": True, "multi_query": True}, prompt, "sdpa"),
    OwnFamily("gpt_neo", "GPTNeoForCausalLM",
              {"attention_types": [[["global", "local"], 1]], "window_size": 5}, prompt),
    OwnFamily("gpt_neox_japanese", "GPTNeoXJapaneseForCausalLM", inputs=prompt),
    OwnFamily("gptj", "GPTJForCausalLM", inputs=prompt),
    OwnFamily("imagegpt", "ImageGPTForCausalImageModeling", inputs=prompt),
    OwnFamily("imagegpt_upcast", "ImageGPTForCausalImageModeling",
              {"reorder_and_upcast_attn": True, "scale_attn_by_inverse_layer_idx": True}, prompt),
    OwnFamily("mpt", "MptForCausalLM", {"max_seq_len": 64, "expansion_ratio": 2}, prompt),
    OwnFamily("openai_gpt", "OpenAIGPTLMHeadModel", inputs=prompt),
    OwnFamily("trocr", "TrOCRForCausalLM", inputs=prompt, asleep=("encoder_attn",)),
    OwnFamily("xglm", "XGLMForCausalLM", inputs=prompt),
]  # fmt: skip
SEQ2SEQ = [
    OwnFamily("bigbird_pegasus_full", "BigBirdPegasusForConditionalGeneration",
              {"attention_type": "original_full"}, two_texts),
    OwnFamily("fsmt", "FSMTForConditionalGeneration", {"langs": ["a", "b"]}, two_texts),
    OwnFamily("longt5_local", "LongT5ForConditionalGeneration", inputs=two_texts, since="5.14"),
    OwnFamily("mvp", "MvpForConditionalGeneration", inputs=two_texts),
    OwnFamily("mvp_prompt", "MvpForConditionalGeneration",
              {"use_prompt": True, "prompt_length": 5, "prompt_mid_dim": 16}, two_texts),
    OwnFamily("pegasus_x", "PegasusXForConditionalGeneration", inputs=two_texts),
    OwnFamily("prophetnet", "ProphetNetForConditionalGeneration", inputs=two_texts),
]  # fmt: skip
VISION = [
    OwnFamily("aimv2_head", "Aimv2VisionModel", {"use_head": True}, image, "sdpa"),
    OwnFamily("blip_vision", "BlipVisionModel", inputs=image),
    OwnFamily("cvt", "CvtModel",
              {"embed_dim": [8, 16, 16], "num_heads": [1, 2, 4], "depth": [1, 2, 3],
               "drop_path_rate": [0.0, 0.0, 0.0]}, large_image),
    OwnFamily("data2vec_vision", "Data2VecVisionModel", {"use_relative_position_bias": True},
              image),
    OwnFamily("data2vec_vision_sdpa", "Data2VecVisionModel",
              {"use_shared_relative_position_bias": True}, image, "sdpa"),
    OwnFamily("donut", "DonutSwinModel", _SWIN, image),
    OwnFamily("flava_image", "FlavaImageModel", inputs=image),
    OwnFamily("glpn", "GLPNModel", _PYRAMID | {"sr_ratios": [4, 2, 1, 1]}, large_image),
    OwnFamily("hiera", "HieraModel",
              {"embed_dim": 16, "image_size": [32, 32], "patch_size": [7, 7],
               "patch_stride": [4, 4], "patch_padding": [3, 3], "depths": [1, 1, 1, 1],
               "num_heads": [1, 2, 4, 8], "num_query_pool": 2, "masked_unit_size": [8, 8],
               "mlp_ratio": 2.0}, image),
    OwnFamily("maskformer_swin", "MaskFormerSwinModel", _SWIN, image),
    OwnFamily("mobilevit", "MobileViTModel",
              {"hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 24, 32, 32, 64],
               "image_size": 64, "patch_size": 2}, large_image),
    OwnFamily("pvt", "PvtModel",
              _PYRAMID | {"patch_sizes": [4, 2, 2, 2], "sequence_reduction_ratios": [4, 2, 1, 1]},
              large_image),
    OwnFamily("pvt_v2", "PvtV2Model", _PYRAMID | {"sr_ratios": [4, 2, 1, 1]}, large_image),
    OwnFamily("pvt_v2_linear", "PvtV2Model",
              _PYRAMID | {"sr_ratios": [4, 2, 1, 1], "linear_attention": True}, large_image),
    OwnFamily("sam_vision", "SamVisionModel", _SAM, image),
    OwnFamily("sam_vision_sdpa", "SamVisionModel", _SAM, image, "sdpa"),
    OwnFamily("sam_hq_vision", "SamHQVisionModel", _SAM, image),
    OwnFamily("sam_hq_vision_sdpa", "SamHQVisionModel", _SAM, image, "sdpa"),
    OwnFamily("seggpt", "SegGptModel",
              {"image_size": [32, 16], "merge_index": 1, "intermediate_hidden_state_indices": [1],
               "pretrain_image_size": 16, "num_hidden_layers": 3},
              lambda: {name: random(1, 3, 16, 16)
                       for name in ("pixel_values", "prompt_pixel_values", "prompt_masks")}),
    OwnFamily("siglip_head", "SiglipVisionModel", inputs=image),
    OwnFamily("superglue", "SuperGlueForKeypointMatching",
              {"hidden_size": 16, "keypoint_encoder_sizes": [8, 16],
               "gnn_layers_types": ["self", "cross"], "num_attention_heads": 2,
               "keypoint_detector_config": _SUPERPOINT},
              lambda: {"pixel_values": random(1, 2, 3, 48, 48)}),
    OwnFamily("swin2sr", "Swin2SRForImageSuperResolution",
              {"embed_dim": 16, "depths": [2], "num_heads": [2], "patch_size": 1, "upscale": 2},
              image),
    OwnFamily("swinv2", "Swinv2Model", _SWIN, image),
    OwnFamily("timesformer", "TimesformerModel", {"num_frames": 2},
              lambda: {"pixel_values": random(2, 2, 3, 32, 32)}),
    OwnFamily("vitdet", "VitDetModel",
              {"window_block_indices": [0], "window_size": 3, "pretrain_image_size": 32,
               "use_relative_position_embeddings": True}, image),
]  # fmt: skip
AUDIO = [
    OwnFamily("bark_fine", "BarkFineModel", _BARK | {"n_codes_total": 4, "n_codes_given": 1},
              lambda: {"codebook_idx": 2, "input_ids": tokens(2, 9, 4)}),
    OwnFamily("fastspeech2_conformer", "FastSpeech2ConformerModel", _FAST_SPEECH),
    OwnFamily("sew_d", "SEWDModel",
              _CONV | {"squeeze_factor": 2, "position_buckets": 8, "max_position_embeddings": 16},
              speech),
    OwnFamily("speecht5", "SpeechT5ForSpeechToText",
              _CONV | {"encoder_max_relative_position": 8, "speech_decoder_prenet_units": 16},
              lambda: speech() | {"decoder_input_ids": tokens(2, 7)}),
    OwnFamily("wavlm", "WavLMModel",
              _CONV | {"num_buckets": 16, "max_bucket_distance": 32, "mask_feature_prob": 0.0},
              speech),
]  # fmt: skip
FAMILIES = [*ENCODERS, *DECODERS, *SEQ2SEQ, *VISION, *AUDIO]
