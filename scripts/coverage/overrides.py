"""What the rules of `build` and `inputs` cannot know, as data."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace

import torch
import transformers
from torch import nn
from transformers import (
    BartConfig,
    DPRConfig,
    ResNetConfig,
    Sam2VisionConfig,
    SwinConfig,
    ViTConfig,
)


@dataclass(frozen=True)
class Override:
    """Of one family.

    Attributes:
        model: name of the class to test.
        config: values of the configuration; a dict goes into the sub-config of that name.
        inputs: per argument a shape (normal numbers), a list (exact integers) or a function that
            gets a `torch.Generator`; None takes the argument out.
        reference: the implementation to compare with, where eager itself is wrong.
        sides: of padding that the family can take.
        caches: with which the family generates.
        patched: whether it is patched although it uses the interface.
        without: does without a package that PyPI has not, in the family's module.
        remark: why any of these five are not the usual ones, or why there is nothing to compare.
    """

    model: str = ""
    config: dict = field(default_factory=dict)
    inputs: dict[str, tuple | list | Callable | None] = field(default_factory=dict)
    reference: str | dict[str, str] = "eager"
    sides: tuple[str, ...] = ("left", "right")
    caches: tuple[str, ...] = ("dynamic", "static")
    patched: bool = False
    without: Callable[[ModuleType], None] | None = None
    remark: str = ""


def _table(*groups: tuple[str, object]) -> dict[str, object]:
    return {name: value for names, value in groups for name in names.split()}


SMALL = _table(
    (
        "hidden_size d_model n_embd dim embed_dim decoder_embed_dim model_dim emb_dim "
        "embedding_size word_embed_proj_dim hidden_dim output_size out_hidden_size "
        "encoder_hidden_size decoder_hidden_size lru_width attention_hidden_size "
        "cross_attention_hidden_size audio_hidden_size fpn_hidden_size "
        "memory_attention_hidden_size memory_encoder_hidden_size mask_downsampler_embed_dim "
        "memory_attention_mlp_hidden_size memory_fuser_embed_dim memory_fuser_intermediate_dim "
        "mask_feature_size fpn_feature_size text_hidden_size "
        "vision_hidden_size projection_dim hidden_sizes input_embedding_size "
        "output_embedding_size entity_emb_size visual_embedding_dim proj_dim embed_dims "
        "decoder_dim text_dim codebook_dim",
        64,
    ),
    (
        "intermediate_size d_ff ffn_dim n_inner ffn_hidden_size moe_intermediate_size "
        "shared_expert_intermediate_size encoder_ffn_dim decoder_ffn_dim intermediate_size_mlp "
        "feed_forward_hidden_size inner_dim shared_intermediate_size expert_ffn_hidden_size "
        "dense_intermediate_size moe_shared_expert_intermediate_size block_ff_dim mlp_hidden_size "
        "expert_intermediate_size d_inner ff_dim dim_feedforward encoder_feedforward_dim "
        "dim_ff mlp_dim",
        64,
    ),
    (
        "encoder_layers decoder_layers depth "
        "num_decoder_layers num_encoder_layers decoder_depth encoder_num_hidden_layers "
        "decoder_num_hidden_layers num_blocks r_layers x_layers l_layers num_attention_layers "
        "decoder_num_layers encoder_num_layers num_layers_per_block",
        2,
    ),
    ("depths", 1),
    (
        "num_attention_heads n_head num_heads encoder_attention_heads decoder_attention_heads "
        "n_heads num_attn_heads encoder_num_attention_heads decoder_num_attention_heads "
        "swa_num_attention_heads linear_num_heads decoder_num_heads encoder_num_heads",
        4,
    ),
    ("num_key_value_heads multi_query_group_num num_kv_heads swa_num_key_value_heads", 2),
    (
        "head_dim attention_head_dim d_kv attn_head_size global_head_dim swa_head_dim v_head_dim "
        "d_head dim_head",
        16,
    ),
    (
        "num_experts num_local_experts n_routed_experts moe_num_experts num_routed_experts "
        "n_experts",
        4,
    ),
    ("num_experts_per_tok moe_k top_k_experts moe_topk num_experts_per_token top_k", 2),
    (
        "vocab_size vocab_size_per_layer_input src_vocab_size tgt_vocab_size entity_vocab_size "
        "speech_vocab_size text_vocab_size",
        99,
    ),
    ("max_position_embeddings n_positions n_ctx max_seq_len block_size", 128),
    ("max_source_positions max_target_positions original_max_position_embeddings", 64),
    ("image_size pretrain_image_size", 32),
    ("patch_size", 8),
    ("sliding_window attention_window sliding_window_size global_window_size local_attention", 6),
    ("attention_chunk_size mamba_chunk_size mamba_n_heads", 8),
    ("num_mel_bins hidden_size_per_layer_input v_head_dim rel_extent index_head_dim", 16),
    ("q_lora_rank", 24),
    ("kv_lora_rank qk_nope_head_dim linear_head_dim mamba_d_state mamba_d_head", 16),
    ("qk_rope_head_dim rotary_dim", 8),
    ("qk_head_dim", 24),
    ("n_group topk_group num_expert_group n_shared_experts first_k_dense_replace", 1),
    ("index_topk index_block_size", 4),
    ("index_n_heads index_topk_blocks", 2),
    ("num_queries num_latents num_query_tokens decoder_num_queries", 7),
    ("conv_dim", 32),
    ("num_conv_pos_embeddings", 8),
    ("num_conv_pos_embedding_groups", 2),
    ("pad_token_id decoder_start_token_id", 0),
    ("bos_token_id", 1),
    ("image_token_id image_token_index im_patch_id image_patch_id", 91),
    ("video_token_id video_token_index", 92),
    ("audio_token_id audio_token_index", 93),
    ("vision_start_token_id boi_token_id image_start_token_id", 94),
    ("vision_end_token_id eoi_token_id image_end_token_id", 95),
    ("codebook_size num_embeddings num_quantizers num_codebooks n_codebooks", 8),
    ("base_channels latent_channels reassemble_hidden_size fusion_hidden_size resolution", 32),
    ("output_channels encoder_hidden_dim d_latents embedding_dim", 64),
    ("max_2d_position_embeddings", 128),
    ("window_size", 4),
    ("upsample_groups", 1),
    ("eos_token_id", 98),
    (
        "dropout attention_dropout hidden_dropout hidden_dropout_prob resid_pdrop attn_pdrop "
        "attention_probs_dropout_prob embd_pdrop activation_dropout layerdrop encoder_layerdrop "
        "decoder_layerdrop drop_path_rate resid_dropout embed_dropout dropout_rate",
        0,
    ),
)


def _integers(below: int, *shape: int, least: int = 0) -> Callable:
    def draw(generator: torch.Generator) -> torch.Tensor:
        return torch.randint(least, below, shape, generator=generator)

    return draw


def _ones(*shape: int) -> Callable:
    return lambda _: torch.ones(*shape, dtype=torch.long)


# Three axes of positions over the 8 frequencies of heads of 16.
MROPE = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
}
_IMAGE = {"pixel_values": (2, 3, 32, 32)}
_IMAGE_64 = {"pixel_values": (2, 3, 64, 64)}
_FOUR_STAGES = {
    "hidden_size": 32, "num_hidden_layers": 4, "out_indices": [1, 2, 3, 4], "out_features": None,
}  # fmt: skip
_SERIES = {
    "prediction_length": 4, "context_length": 12, "lags_sequence": [1, 2],
    "num_time_features": 2, "input_size": 1,
}  # fmt: skip
_SERIES_INPUTS = {
    "past_values": (2, 14),
    "past_time_features": (2, 14, 2),
    "past_observed_mask": _ones(2, 14),
    "future_values": (2, 4),
    "future_time_features": (2, 4, 2),
}
_QUESTION = {
    "qformer_input_ids": _integers(90, 2, 5, least=3),
    "qformer_attention_mask": _ones(2, 5),
}
_HGNET = {
    "hidden_sizes": [16, 16, 16, 16],
    "stem_channels": [3, 8, 16], "stage_in_channels": [16, 16, 16, 16],
    "stage_mid_channels": [8, 8, 8, 8], "stage_out_channels": [16, 16, 16, 16],
    "stage_num_blocks": [1, 1, 1, 1], "stage_numb_of_layers": [1, 1, 1, 1],
    "out_indices": [2, 3, 4], "out_features": None,
}  # fmt: skip
_DETR_FAMILY = {
    "encoder_in_channels": [16, 16, 16],
    "decoder_in_channels": [64, 64, 64],
    "encoder_hidden_dim": 64,
    "num_denoising": 0,
}
_ADDS_BOOL = {
    "reference": {"": "eager", "text_config": "sdpa"},
    "remark": "compared with sdpa in the text part, since eager adds its bool mask as 0 and 1",
}
_INVERTED = {
    "reference": "sdpa",
    "remark": "compared with sdpa, since eager takes the encoder's float mask for a bool one",
}
_TEXT_IN_5_24 = {}
if transformers.__version__.startswith("5.24."):
    _TEXT_IN_5_24 = {
        "model": "Llama4ForCausalLM",
        "remark": "its text model: that with pictures asks for `image_outputs`, which its outputs "
        "lack in transformers 5.24, under every implementation",
    }
_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 16}


def _boxes(generator: torch.Generator) -> torch.Tensor:
    """Left, top, right, bottom of 21 words in two rows."""
    corner = torch.randint(0, 30, (2, 21, 2), generator=generator)
    return torch.cat([corner, corner + 7], dim=2)


_SWIN = {
    "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 4], "patch_size": 4,
    "window_size": 4, "out_indices": [1, 2, 3, 4], "out_features": None,
}  # fmt: skip
_SWIN_OF_TWO = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "patch_size": 2}
_SAM2 = {
    "vision_config": {
        "backbone_config": {
            "hidden_size": 8, "image_size": [64, 64], "blocks_per_stage": [1, 1, 2, 1],
            "embed_dim_per_stage": [8, 16, 32, 64], "num_attention_heads_per_stage": [1, 2, 2, 4],
            "window_size_per_stage": [4, 4, 4, 4], "global_attention_blocks": [3],
        },
        "backbone_channel_list": [64, 32, 16, 8],
        "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
    },
    "prompt_encoder_config": {"image_size": 64, "patch_size": 16},
}  # fmt: skip


def _session(family: str, name: str, size: int) -> Callable:
    """A video of three frames with a point in the first."""

    def make(generator: torch.Generator):
        module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        session = getattr(module, f"{name}InferenceSession")(
            video=torch.randn(3, 3, size, size, generator=generator),
            video_height=size,
            video_width=size,
            dtype=torch.float32,
        )
        points = {
            "point_coords": torch.tensor([[[[20.0, 13.0]]]]),
            "point_labels": torch.ones(1, 1, 1, dtype=torch.int32),
        }
        session.add_point_inputs(session.obj_id_to_idx(1), 0, points)
        session.obj_with_new_inputs = [1]
        return session

    return make


_PROTEIN = (
    "token_index", "residue_index", "asym_id", "sym_id", "entity_id", "mol_type", "res_type",
    "token_bonds", "attention_mask", "atom_inputs", "input_ids",
)  # fmt: skip


def _protein(name: str) -> Callable:
    def feature(_: torch.Generator):
        from transformers.models.esmfold2 import modeling_esmfold2, protein_utils

        features = protein_utils.prepare_protein_features("MKTAYIAKQRQISFVK")
        if name != "atom_inputs":
            return features[name]
        atoms = modeling_esmfold2.EsmFold2AtomInputs
        return atoms(**{x: features[x] for x in atoms.__dataclass_fields__})

    return feature


_UNBUILDABLE = Override(
    remark="cannot be built: it shares the keys of all its layers, which its text model refuses"
)


class _Pictures(nn.Module):
    """Two by three features of 8 numbers."""

    cfg = SimpleNamespace(MODEL=SimpleNamespace(PIXEL_MEAN=[0.0] * 3, PIXEL_STD=[1.0] * 3))

    def __init__(self, _):
        super().__init__()
        self.pixel_mean = nn.Buffer(torch.zeros(3, 1, 1))
        self.pixel_std = nn.Buffer(torch.ones(3, 1, 1))
        self.convolution = nn.Conv2d(3, 8, kernel_size=8, stride=8)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.convolution(images).flatten(2).mT


def _without_detectron2(module: ModuleType) -> None:
    module.requires_backends = lambda *_: None
    module.detectron2 = SimpleNamespace(layers=SimpleNamespace(FrozenBatchNorm2d=nn.BatchNorm2d))
    module.LayoutLMv2VisualBackbone = _Pictures


_SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
_VIT = ViTConfig(
    **_SIZES,
    image_size=32,
    patch_size=8,
    num_labels=64,
    model_args={"embed_dim": 64},
)
_DPR = DPRConfig(
    **_SIZES,
    vocab_size=99,
    max_position_embeddings=64,
)
_BART = BartConfig(
    d_model=64,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=64,
    decoder_ffn_dim=64,
    vocab_size=99,
    max_position_embeddings=64,
)
_TEXT_ALONE = Override(
    config={"vision_config": _VIT},
    inputs={"pixel_values": None},
    remark="the text alone, since the tower for pictures is of the timm package",
)
# In place of one from the timm package.
_RESNET = {
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "backbone": None,
    "backbone_config": ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 16, 16], depths=[1] * 4, out_indices=[1, 2, 3, 4]
    ),
}

OVERRIDES: dict[str, Override] = {
    "flint": Override(config={"mlp_only_layers": [0]}),
    "inkling2_loop": Override(
        config={
            "text_config": {
                "num_hidden_layers": 4,
                "layer_types": ["hybrid_sliding", "hybrid_sliding", "hybrid", "hybrid"],
                "n_layers_per_attn_res_block": 1,
                "loop_layer_index_start": 1,
                "loop_layer_index_end": 3,
                "loop_num_passes": 2,
            }
        },
    ),
    "mllama": Override(
        config={
            "text_config": {"cross_attention_layers": [1]},
            "vision_config": {"intermediate_layers_indices": [0], "vision_output_dim": 128},
        },
        inputs={
            "pixel_values": (2, 1, 4, 3, 32, 32),
            "aspect_ratio_ids": [[1], [2]],
            "aspect_ratio_mask": [[[1, 1, 1, 0]], [[1, 1, 0, 0]]],
            "cross_attention_mask": _ones(2, 21, 1, 4),
        },
    ),
    "nllb_moe": Override(config={"encoder_sparse_step": 2, "decoder_sparse_step": 2}),
    "sam3_lite_text": Override(config={"text_config": {"num_hidden_layers": 3}}),
    "switch_transformers": Override(
        config={"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
    ),
    "apertus1p5": Override(
        config={
            "image_token_id": 95,
            "audio_token_id": 96,
            "image_token_offset": 60,
            "audio_token_offset": 68,
            "text_config": {"vocab_size": 99},
            "vision_config": {"codebook_size": 8, "base_channels": 32, "num_res_blocks": 1},
            "audio_config": {"codebook_size": 8},
        },
        inputs={"image_sizes": [[32, 32], [32, 32]], "input_values": None},
    ),
    "dory": Override(
        config={
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "n_input_layers": 1,
            "n_recurrent_layers": 2,
            "n_output_layers": 1,
        },
    ),
    "llama4": Override(**_TEXT_IN_5_24),
    "hy_v4_vl": Override(
        config={
            "text_config": {
                "rope_parameters": {**MROPE["rope_parameters"], "mrope_section": [1, 1, 2]}
            }
        },
        inputs={"pixel_values": (32, 192), "image_grid_thw": [[1, 4, 4], [1, 4, 4]]},
    ),
    "vibevoice_asr": Override(
        config={
            "acoustic_tokenizer_encoder_config": {"num_filters": 2, "depths": [1] * 7},
            "semantic_tokenizer_encoder_config": {"num_filters": 2, "depths": [1] * 7},
        }
    ),
    "shieldgemma2": Override(
        config={
            "mm_tokens_per_image": 4,
            "image_token_index": 91,
            "yes_token_index": 10,
            "no_token_index": 11,
        }
    ),
    "nemotron_h_omni": Override(
        config={
            "vision_config": {"video_temporal_patch_size": 2},
            "vision_hidden_size": 64,
            "projector_hidden_size": 64,
        },
        inputs={"pixel_values": None},
    ),
    "align": Override(
        config={
            "vision_config": {
                "width_coefficient": 1.0,
                "depth_coefficient": 1.0,
                "in_channels": [32, 8],
                "out_channels": [8, 64],
                "kernel_sizes": [3, 3],
                "strides": [1, 2],
                "num_block_repeats": [1, 1],
                "expand_ratios": [1, 1],
            }
        },
        inputs=_IMAGE,
    ),
    "audio_spectrogram_transformer": Override(
        config={"max_length": 64}, inputs={"input_values": (2, 64, 16)}
    ),
    "autoformer": Override(config=_SERIES, inputs=_SERIES_INPUTS),
    "bamba": Override(config={"attn_layer_indices": [1], **_MAMBA2}),
    "bark": Override(
        model="BarkFineModel",
        config={"n_codes_total": 4, "input_vocab_size": 99, "output_vocab_size": 99},
        inputs={"codebook_idx": lambda _: 2, "input_ids": _integers(90, 2, 13, 4)},
    ),
    "big_bird": Override(config={"attention_type": "original_full"}),
    "bigbird_pegasus": Override(config={"attention_type": "original_full"}),
    "bit": Override(config={"num_groups": 8}, inputs=_IMAGE_64),
    "blip_2": Override(
        config={"image_token_index": 91, "qformer_config": {"cross_attention_frequency": 1}},
        inputs=_IMAGE,
    ),
    "blt": Override(
        config={
            "encoder_hash_byte_group_vocab": 50,
            "encoder_hash_byte_group_size": [3],
            "encoder_config": {"hidden_size_global": 64, "sliding_window": 6},
            "decoder_config": {"hidden_size_global": 64},
            "global_config": {"encoder_cross_output_size": None},
        },
        inputs={"use_cache": lambda _: False},
        sides=("right",),
        remark="no left padding: patches hold what padding makes of itself",
    ),
    "bros": Override(inputs={"bbox": (2, 21, 8)}),
    "chameleon": Override(
        config={
            "vq_config": {
                "channel_multiplier": [1, 2],
                "attn_resolutions": None,
                "base_channels": 32,
            },
            "vocabulary_map": {
                "<image>": 91,
                **{f"IMGIMG{x}Z": 10 + i for i, x in enumerate("ABCDEFGH")},
            },
        },
        inputs=_IMAGE,
    ),
    "chmv2": Override(
        config={
            "backbone_config": {
                "num_hidden_layers": 4,
                "out_indices": [1, 2, 3, 4],
                "out_features": None,
                "reshape_hidden_states": True,
                "return_class_token": True,
            },
            "post_process_channels": [16, 16, 16, 16],
            "fusion_hidden_size": 16,
            "head_hidden_size": 8,
            "number_output_channels": 8,
        },
        inputs=_IMAGE,
    ),
    "clap": Override(
        config={
            "audio_config": {
                "spec_size": 32,
                "patch_embeds_hidden_size": 16,
                "num_attention_heads": [2, 4],
                "hidden_size": 32,
                "patch_stride": [4, 4],
                "patch_size": 4,
                "num_mel_bins": 16,
            }
        },
        inputs={"input_features": (2, 1, 32, 16)},
    ),
    "clvp": Override(
        config={
            "text_config": {"num_attention_heads": 2},
            "speech_config": {"num_attention_heads": 2},
            "decoder_config": {"feature_size": 16, "max_text_tokens": 99},
        },
        inputs={"input_features": (2, 16, 30)},
    ),
    "cohere_compass": Override(
        config={
            "text_config": {
                "layer_types": ["sliding_attention", "full_attention"],
                "rope_parameters": {
                    "full_attention": MROPE["rope_parameters"],
                    "sliding_attention": MROPE["rope_parameters"],
                },
            },
            "vision_config": {"deepstack_visual_indexes": [1], "num_position_embeddings": 16},
        }
    ),
    "colqwen2": Override(
        config={"vlm_config": {"text_config": MROPE, "vision_config": {"hidden_size": 64}}}
    ),
    "conditional_detr": Override(config=_RESNET, inputs=_IMAGE_64),
    "cosmos3_edge": Override(config={"text_config": MROPE}),
    "csm": Override(
        config={
            "depth_decoder_config": {"backbone_hidden_size": 64},
            "codec_config": {"upsampling_ratios": [4, 2], "num_filters": 8},
        },
        inputs={"input_ids": _integers(90, 2, 21, 8, least=3)},
    ),
    "cvt": Override(
        config={"embed_dim": [16, 16, 16], "num_heads": [1, 2, 4], "depth": [1, 2, 3]},
        inputs=_IMAGE_64,
    ),
    "d_fine": Override(config={**_DETR_FAMILY, "backbone_config": _HGNET}, inputs=_IMAGE_64),
    "dab_detr": Override(config=_RESNET, inputs=_IMAGE_64),
    "dbrx": Override(
        config={"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}}
    ),
    "decision_transformer": Override(
        inputs={
            "states": (2, 7, 17),
            "actions": (2, 7, 4),
            "rewards": (2, 7, 1),
            "returns_to_go": (2, 7, 1),
            "timesteps": _integers(90, 2, 7),
            "attention_mask": _ones(2, 7),
        },
    ),
    "deepseek_ocr2": Override(
        config={
            "vision_config": {
                "sam_config": {
                    "global_attn_indexes": [1],
                    "downsample_channels": [32, 64],
                    "output_channels": 32,
                }
            },
            "text_config": {"num_experts_per_tok": 2, "mlp_layer_types": ["dense", "sparse"]},
        }
    ),
    "deepseek_v2": Override(config={"num_experts_per_tok": 2}),
    "deepseek_vl_hybrid": Override(
        config={"image_token_id": 91, "high_res_vision_config": {"global_attn_indexes": [1]}},
        inputs={**_IMAGE, "high_res_pixel_values": (2, 3, 32, 32)},
    ),
    "deformable_detr": Override(config=_RESNET, inputs=_IMAGE_64),
    "deimv2": Override(config={**_DETR_FAMILY, "backbone_config": _HGNET}, inputs=_IMAGE_64),
    "depth_anything": Override(
        config={
            "backbone_config": _FOUR_STAGES,
            "reassemble_hidden_size": 32,
            "neck_hidden_sizes": [8, 8, 8, 8],
            "fusion_hidden_size": 8,
        },
        inputs=_IMAGE,
    ),
    "depth_pro": Override(
        config={
            "patch_size": 32,
            "intermediate_hook_ids": [1, 0],
            "intermediate_feature_dims": [16, 16],
            "scaled_images_feature_dims": [16, 16, 16],
            "fusion_hidden_size": 16,
        },
        inputs={"pixel_values": (1, 3, 128, 128)},
    ),
    "detr": Override(config=_RESNET, inputs=_IMAGE_64),
    "dia": Override(
        config={
            "decoder_config": {
                "cross_num_attention_heads": 4,
                "cross_head_dim": 16,
                "cross_num_key_value_heads": 2,
                "cross_hidden_size": 64,
                "num_channels": 3,
            },
            "delay_pattern": [0, 1, 2],
        },
        inputs={"decoder_input_ids": _integers(90, 2, 9, 3)},
    ),
    "diffusion_gemma": Override(
        config={
            "text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 64},
            "canvas_length": 7,
        },
        sides=("right",),
        remark="no left padding: the decoder sees what padding makes of itself",
    ),
    "donut_swin": Override(config=_SWIN_OF_TWO, inputs=_IMAGE),
    "dots1": Override(config={"num_experts_per_tok": 2}),
    "dots3_note": Override(
        config={
            "vision_config": {"adapter_in_dim": 64, "adapter_out_dim": 64},
            "audio_config": {
                "adapter_input_size": 64,
                "adapter_out_dim": 64,
                "downsample_hidden_size": 16,
            },
        }
    ),
    "edgetam": Override(
        config={
            "vision_config": Sam2VisionConfig(
                fpn_hidden_size=64,
                **{
                    **_SAM2["vision_config"],
                    "backbone_config": {
                        "model_type": "sam2_hiera_det_model",
                        **_SAM2["vision_config"]["backbone_config"],
                    },
                },
            )
        },
        inputs={**_IMAGE_64, "input_points": (2, 1, 2, 2)},
    ),
    "edgetam_video": Override(
        config={**_SAM2, "image_size": 64, "perceiver_resampler_num_latents_2d": 4},
        inputs={
            "inference_session": _session("edgetam_video", "EdgeTamVideo", 64),
            "frame_idx": lambda _: 0,
        },
    ),
    "efficientloftr": Override(
        config={
            "out_features": [16, 16, 32, 64],
            "stage_num_blocks": [1, 1, 1, 1],
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
        },
        inputs={"pixel_values": (2, 2, 3, 64, 64)},
    ),
    "efficientnet": Override(
        config={
            "width_coefficient": 1.0,
            "depth_coefficient": 1.0,
            "in_channels": [32, 8],
            "out_channels": [8, 64],
            "kernel_sizes": [3, 3],
            "strides": [1, 2],
            "num_block_repeats": [1, 1],
            "expand_ratios": [1, 1],
            "hidden_dim": 1280,
        },
        inputs=_IMAGE,
    ),
    "emu3": Override(
        config={
            "vq_config": {"base_channels": 32, "channel_multiplier": [1, 2]},
            "vocabulary_map": {"<image>": 91},
        },
        inputs={"pixel_values": None},
    ),
    "ernie4_5_vl_moe": Override(
        config={
            "text_config": {
                "moe_intermediate_size": [32, 16],
                "moe_num_experts": 4,
                "moe_k": 2,
                "head_dim": 16,
                "rope_parameters": {**MROPE["rope_parameters"], "mrope_section": [2, 2, 4]},
            }
        }
    ),
    "esm": Override(
        config={
            "vocab_size": 99,
            "mask_token_id": 97,
            "pad_token_id": 0,
            "position_embedding_type": "rotary",
        }
    ),
    "esmc": Override(config={"num_key_value_heads": 4}),
    "esmfold": Override(
        config={
            "vocab_size": 33,
            "pad_token_id": 1,
            "mask_token_id": 32,
            "is_folding_model": True,
            "position_embedding_type": "rotary",
            "token_dropout": True,
            "esmfold_config": {
                "fp16_esm": False,
                "lddt_head_hid_dim": 16,
                "trunk": {
                    "num_blocks": 1,
                    "sequence_state_dim": 32,
                    "pairwise_state_dim": 16,
                    "sequence_head_width": 8,
                    "pairwise_head_width": 8,
                    "max_recycles": 1,
                    "structure_module": {
                        "sequence_dim": 32,
                        "pairwise_dim": 16,
                        "ipa_dim": 8,
                        "resnet_dim": 16,
                        "num_blocks": 1,
                        "num_heads_ipa": 2,
                    },
                },
            },
        },
        inputs={"input_ids": _integers(20, 1, 9, least=4)},
        sides=(),
        remark="one protein, not padded",
    ),
    "esmfold2": Override(
        config={
            "esmc_config": {"num_key_value_heads": 4},
            "num_loops": 1,
            "folding_trunk_num_hidden_layers": 1,
            "parcae_num_coda_layers": 1,
            "lm_encoder": {"num_hidden_layers": 1},
            "pairwise_hidden_size": 64,
            "pair_transition_intermediate_size": 64,
            "atom_encoder": {"head_dim": 32, "num_attention_heads": 2, "output_dim": 64},
            "single_inputs_size": 131,
            "structure_head": {
                "diffusion_module": {
                    "atom_encoder": {"head_dim": 32, "num_attention_heads": 2, "output_dim": 64}
                }
            },
        },
        inputs={name: _protein(name) for name in _PROTEIN},
        sides=(),
        remark="one protein, not padded",
    ),
    "evolla": Override(
        inputs={
            "protein_input_ids": _integers(90, 2, 13, least=5),
            "protein_attention_mask": _ones(2, 13),
        }
    ),
    "falcon_h1": Override(config={"mamba_d_ssm": 128}),
    "fast_vlm": _TEXT_ALONE,
    "fastspeech2_conformer": Override(
        config={"encoder_linear_units": 64, "decoder_linear_units": 64}
    ),
    "fun_asr_nano": Override(config={"adaptor_config": {"intermediate_size": 16}}),
    "gemma3n": Override(
        model="Gemma3nForCausalLM",
        config={
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
            "intermediate_size": [64] * 4,
            "activation_sparsity_pattern": [0.0] * 4,
        },
    ),
    "gemma4_assistant": _UNBUILDABLE,
    "gemma4_unified_assistant": _UNBUILDABLE,
    "git": Override(inputs={"pixel_values": (2, 3, 32, 32)}),
    "glm46v": Override(config={"text_config": MROPE}),
    "glmga": Override(config={"text_config": MROPE}),
    "glm4v": Override(config={"text_config": MROPE}),
    "glm4v_moe": Override(
        config={
            "text_config": {
                "rope_parameters": {
                    **MROPE["rope_parameters"],
                    "mrope_section": [1, 1, 2],
                    "partial_rotary_factor": 0.5,
                }
            }
        }
    ),
    "glm5_next": Override(
        config={
            "text_config": {"index_topk": 4, "index_kpool": 2, "qk_rope_head_dim": 0, "head_dim": 0}
        }
    ),
    "glm_image": Override(config={"text_config": MROPE}),
    "glm_ocr": Override(config={"text_config": MROPE}),
    "glpn": Override(
        config={
            "hidden_sizes": [8, 16, 16, 16],
            "num_attention_heads": [1, 2, 2, 4],
            "decoder_hidden_size": 16,
        },
        inputs=_IMAGE_64,
    ),
    "gpt_neo": Override(
        config={"attention_types": [[["global", "local"], 1]], "num_layers": 2, "window_size": 5}
    ),
    "gradium_phonon_tts": Override(config={"flow_head_config": {"condition_dim": 64}}),
    "granite4_vision": Override(
        config={
            "deepstack_layer_map": [[1, 0]],
            "downsample_rate": "1/2",
            "use_spatial_sampling": False,
            "qformer_config": {"cross_attention_frequency": 1},
            "image_grid_pinpoints": [[32, 32]],
        },
        inputs={"pixel_values": (2, 2, 3, 32, 32), "image_sizes": [[32, 32], [32, 32]]},
    ),
    "granite_speech5": Override(
        config={"num_key_value_heads": 4}, inputs={"input_features": (2, 64, 64)}
    ),
    "granitemoehybrid": Override(
        config={
            "layer_types": ["linear_attention", "full_attention"],
            **_MAMBA2,
            "position_embedding_type": "rope",
        }
    ),
    "grounding_dino": Override(**_ADDS_BOOL),
    "hiera": Override(
        config={
            "embed_dim": 16,
            "image_size": [32, 32],
            "patch_size": [7, 7],
            "patch_stride": [4, 4],
            "patch_padding": [3, 3],
            "depths": [1, 1, 1, 1],
            "num_heads": [1, 2, 4, 8],
            "num_query_pool": 2,
            "masked_unit_size": [8, 8],
            "mlp_ratio": 2.0,
        },
        inputs=_IMAGE,
    ),
    "hrm_text": Override(config={"prefix_lm": False}),
    "hunyuan_vl": Override(config={"text_config": MROPE}),
    "idefics": Override(
        inputs={"pixel_values": (2, 1, 3, 32, 32), "image_attention_mask": _ones(2, 21, 1)}
    ),
    "informer": Override(config=_SERIES, inputs=_SERIES_INPUTS),
    "instructblip": Override(config={"image_token_index": 91}, inputs={**_IMAGE, **_QUESTION}),
    "instructblipvideo": Override(
        config={"video_token_index": 92}, inputs={"pixel_values": (2, 4, 3, 32, 32), **_QUESTION}
    ),
    "jamba": Override(
        config={"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False}
    ),
    "janus": Override(config={"vq_config": {"base_channels": 32, "channel_multiplier": [1, 2]}}),
    "jev": Override(
        config={"hidden_size": 64},
        inputs={
            "input_ids": _integers(90, 1, 21, least=3),
            "marks": [[9, 20]],
            "num_options": [[2, 3]],
            "question_type_ids": [[0, 1]],
        },
    ),
    "kosmos2": Override(
        config={"latent_query_num": 4, "text_config": {"layers": 2, "attention_heads": 4}},
        inputs={
            **_IMAGE,
            "image_embeds_position_mask": lambda _: (
                (torch.arange(21) // 4 == 2).long().expand(2, 21)
            ),
        },
    ),
    "kyutai_speech_to_text": Override(
        config={
            "codebook_vocab_size": 17,
            "audio_bos_token_id": 16,
            "audio_pad_token_id": 99,
            "codec_config": {"upsampling_ratios": [4, 2], "num_filters": 8},
        },
        inputs={"input_ids": _integers(16, 2, 21, 9, least=3)},
    ),
    "layoutlmv2": Override(
        config={
            "image_feature_pool_shape": [2, 3, 8],
            "max_2d_position_embeddings": 1024,
            "coordinate_size": 12,
            "shape_size": 8,
        },
        inputs={"bbox": _boxes, "image": (2, 3, 16, 24)},
        without=_without_detectron2,
        remark="a convolution in place of the detectron2 package's, which PyPI has not",
    ),
    "layoutlmv3": Override(
        config={
            "coordinate_size": 12,
            "shape_size": 8,
            "hidden_size": 64,
            "input_size": 32,
            "rel_pos_bins": 8,
            "max_rel_pos": 16,
            "rel_2d_pos_bins": 8,
            "max_rel_2d_pos": 16,
        },
        inputs={"bbox": _integers(30, 2, 21, 4), **_IMAGE},
    ),
    "levit": Override(
        config={
            "image_size": 64,
            "patch_size": 16,
            "hidden_sizes": [16, 24, 32],
            "num_attention_heads": [2, 3, 4],
            "depths": [1, 1, 1],
            "key_dim": [8, 8, 8],
            "attention_ratio": [2, 2, 2],
            "down_ops": [["Subsample", 8, 2, 4, 2, 2], ["Subsample", 8, 3, 4, 2, 2]],
        },
        inputs=_IMAGE_64,
    ),
    "lfm2_moe": Override(config={"layer_types": ["conv", "full_attention"], "num_dense_layers": 1}),
    "lightglue": Override(
        config={
            "descriptor_dim": 64,
            "keypoint_detector_config": {
                "encoder_hidden_sizes": [16, 16, 16, 16],
                "decoder_hidden_size": 16,
                "descriptor_decoder_dim": 64,
                "max_keypoints": 20,
            },
        },
        inputs={"pixel_values": (2, 2, 3, 64, 64)},
    ),
    "lilt": Override(
        config={"hidden_size": 96, "channel_shrink_ratio": 2}, inputs={"bbox": _boxes}
    ),
    "lw_detr": Override(
        config={
            "projector_scale_factors": [1.0],
            "backbone_config": {
                "num_windows": 4,
                "window_block_indices": [0],
                "out_indices": [1, 2],
                "out_features": None,
            },
        }
    ),
    "lxmert": Override(
        config={"visual_feat_dim": 16}, inputs={"visual_feats": (2, 6, 16), "visual_pos": (2, 6, 4)}
    ),
    "mamba2": Override(config={"num_heads": 8, "head_dim": 16, "n_groups": 1}),
    "mask2former": Override(
        config={"feature_size": 32, "backbone_config": _SWIN}, inputs=_IMAGE_64
    ),
    "maskformer": Override(config={"backbone_config": SwinConfig(**_SWIN)}, inputs=_IMAGE_64),
    "maskformer_swin": Override(config=_SWIN_OF_TWO, inputs=_IMAGE),
    "mimi": Override(
        config={
            "upsampling_ratios": [4, 2],
            "num_filters": 8,
            "frame_rate": None,
            "vector_quantization_hidden_dimension": 64,
        },
        inputs={"input_values": (2, 1, 400)},
    ),
    "mm_grounding_dino": Override(**_ADDS_BOOL),
    "mobilevit": Override(
        config={
            "hidden_sizes": [16, 24, 32],
            "neck_hidden_sizes": [8, 8, 16, 24, 32, 32, 64],
            "image_size": 64,
            "patch_size": 2,
        },
        inputs=_IMAGE_64,
    ),
    "mobilevitv2": Override(
        config={
            "image_size": 64,
            "patch_size": 2,
            "base_attn_unit_dims": [16, 24, 32],
            "n_attn_blocks": [1, 1, 1],
        },
        inputs=_IMAGE_64,
    ),
    "molmo2": Override(config={"adapter_config": {"vision_feature_layer": [1, 0]}}),
    "moonshine_streaming": Override(
        config={
            "num_key_value_heads": 4,
            "encoder_config": {"sliding_windows": [[4, 2], [4, 0]], "num_key_value_heads": 4},
        }
    ),
    "moshi": Override(
        inputs={
            "user_audio_codes": _integers(8, 2, 8, 21),
            "moshi_audio_codes": _integers(8, 2, 8, 21),
        },
        config={
            "audio_encoder_config": {
                "upsampling_ratios": [4, 2],
                "num_filters": 8,
                "vector_quantization_hidden_dimension": 64,
            }
        },
    ),
    "muse_glimmer_assistant": Override(
        config={"block_size": 4, "target_layer_ids": [1]},
        inputs={
            "noise_embeds": (2, 4, 64),
            "context_hidden_states": (2, 21, 64),
            "attention_mask": _ones(2, 25),
        },
    ),
    "muse_spark": Override(
        config={"out_hidden_size": 256},
        inputs={
            "pixel_values": (20, 384),
            "image_grid_thw": [[1, 4, 4], [1, 2, 2]],
            "input_values": None,
        },
    ),
    "musicgen": Override(
        inputs={"decoder_input_ids": _integers(8, 16, 9), "input_values": None},
        config={
            "audio_encoder": {"hidden_size": 64},
            "decoder": {"vocab_size": 8, "pad_token_id": 8, "bos_token_id": 8},
        },
    ),
    "musicgen_melody": Override(
        inputs={"decoder_input_ids": _integers(8, 16, 9), "input_features": (2, 5, 12)},
        config={
            "audio_encoder": {"hidden_size": 64},
            "decoder": {"vocab_size": 8, "pad_token_id": 8, "bos_token_id": 8},
        },
    ),
    "nemotron3_5_asr": Override(**_INVERTED),
    "nemotron3_5_transcribe": Override(
        config={
            "word_timestamp_config": {"blank_token_id": 98},
            "audio_config": {
                "asr_config": {"num_key_value_heads": 4},
                "diarization_config": {"audio_config": {"num_key_value_heads": 4}},
            },
        },
        inputs={"input_features": (2, 128, 16), "input_features_mask": _ones(2, 128)},
    ),
    "nemotron3_diarization": Override(
        config={"audio_config": {"num_key_value_heads": 4}}, inputs={"input_features": (2, 128, 16)}
    ),
    "nemotron_asr_streaming": Override(**_INVERTED),
    "neucodec": Override(
        config={
            "encoder_hidden_size": 4,
            "quantization_dim": 128,
            "num_key_value_heads": 4,
            "semantic_model_config": {"feature_projection_input_dim": 16},
        },
        inputs={"input_values": (2, 1, 3200), "input_features": (2, 10, 16)},
    ),
    "omdet_turbo": Override(
        model="OmDetTurboForObjectDetection",
        config={
            **_RESNET,
            "backbone_config": ResNetConfig(
                embedding_size=8,
                hidden_sizes=[8, 16, 16, 16],
                depths=[1] * 4,
                out_indices=[2, 3, 4],
            ),
            "encoder_in_channels": [16, 16, 16],
            "vision_features_channels": [64, 64, 64],
            "text_config": {"hidden_size": 32},
            "text_projection_in_dim": 32,
            "text_projection_out_dim": 32,
            "class_embed_dim": 32,
            "task_encoder_hidden_dim": 64,
            "apply_layernorm_after_vision_backbone": False,
            "decoder_hidden_dim": 64,
            "encoder_hidden_dim": 64,
            "encoder_dim_feedforward": 64,
            "decoder_dim_feedforward": 64,
        },
        inputs={
            **_IMAGE_64,
            "classes_input_ids": _integers(90, 4, 5, least=3),
            "classes_attention_mask": _ones(4, 5),
            "tasks_input_ids": _integers(90, 2, 7, least=3),
            "tasks_attention_mask": _ones(2, 7),
            "classes_structure": [2, 2],
        },
    ),
    "oneformer": Override(
        config={
            "hidden_dim": 32,
            "mask_dim": 32,
            "conv_dim": 32,
            "text_encoder_width": 32,
            "text_encoder_num_layers": 1,
            "text_encoder_vocab_size": 99,
            "text_encoder_context_length": 9,
            "text_encoder_n_ctx": 4,
            "task_seq_len": 9,
            "backbone_config": _SWIN,
        },
        inputs={**_IMAGE_64, "task_inputs": _integers(90, 2, 9)},
    ),
    "paddleocr_vl": Override(
        config={"text_config": MROPE},
        inputs={"pixel_values": (32, 3, 8, 8), "image_grid_thw": [[1, 4, 4], [1, 4, 4]]},
    ),
    "patchtsmixer": Override(
        config={"context_length": 32, "self_attn": True, "num_input_channels": 2},
        inputs={"past_values": (2, 32, 2)},
    ),
    "patchtst": Override(
        config={"num_input_channels": 2, "patch_length": 4, "patch_stride": 4},
        inputs={"past_values": (2, 32, 2)},
    ),
    "pe_audio": Override(
        sides=("right",), remark="no left padding: the text is read off its first token"
    ),
    "pe_audio_video": Override(
        config={"audio_video_config": {"video_config": {"vision_config": _VIT}}},
        inputs={"pixel_values_videos": (2, 4, 3, 32, 32), "input_values": (2, 1, 4000)},
        patched=True,
        sides=("right",),
        remark="patched: the name does not reach its parts, which make their own configurations; "
        "no left padding: the text is read off its first token",
    ),
    "pe_video": Override(
        config={"video_config": {"vision_config": _VIT}},
        inputs={"pixel_values_videos": (2, 4, 3, 32, 32)},
        sides=("right",),
        remark="no left padding: the text is read off its first token",
    ),
    "perceiver": Override(
        config={
            "num_self_attends_per_block": 2,
            "num_self_attention_heads": 4,
            "num_cross_attention_heads": 4,
            "d_latents": 32,
            "d_model": 64,
        }
    ),
    "perception_lm": _TEXT_ALONE,
    "pi0": Override(
        inputs={
            "input_ids": lambda _: torch.tensor([[91] * 16 + [5, 6, 7, 8, 9]] * 2),
            "state": (2, 32),
            "timestep": (2,),
            "noise": (2, 50, 32),
            "pixel_values": (2, 1, 3, 32, 32),
            "pixel_attention_mask": lambda _: torch.ones(2, 1, dtype=torch.bool),
        }
    ),
    "pix2struct": Override(
        config={"vision_config": {"patch_embed_hidden_size": 12, "seq_len": 32}},
        inputs={
            "flattened_patches": lambda g: torch.cat(
                [
                    torch.arange(1, 11).view(1, 10, 1).expand(2, 10, 2).float(),
                    torch.randn(2, 10, 12, generator=g),
                ],
                2,
            ),
            "decoder_input_ids": _integers(90, 2, 9, least=3),
        },
    ),
    "pocket_tts": Override(config={"flow_head_config": {"condition_dim": 64}}),
    "pp_doclayout_v2": Override(
        config={**_DETR_FAMILY, "backbone_config": _HGNET}, inputs=_IMAGE_64
    ),
    "pp_doclayout_v3": Override(
        config={
            **_DETR_FAMILY,
            "x4_feat_dim": 16,
            "backbone_config": {**_HGNET, "out_indices": [1, 2, 3, 4]},
        },
        inputs=_IMAGE_64,
    ),
    "pp_doclayout_v4": Override(
        config={**_DETR_FAMILY, "backbone_config": _HGNET}, inputs=_IMAGE_64
    ),
    "pp_formulanet": Override(
        config={
            "vision_config": {
                "global_attn_indexes": [1],
                "post_conv_in_channels": 64,
                "post_conv_mid_channels": 64,
                "post_conv_out_channels": 64,
                "decoder_hidden_size": 64,
            }
        },
        inputs={**_IMAGE, "decoder_input_ids": _integers(90, 2, 9, least=3)},
        caches=("dynamic",),
        remark="no static cache: eager attends to its slots beyond the picture",
    ),
    "pp_ocrv5_mobile_rec": Override(
        model="PPOCRV5MobileRecForTextRecognition", inputs={"pixel_values": (2, 3, 96, 96)}
    ),
    "pp_ocrv5_server_rec": Override(
        model="PPOCRV5ServerRecForTextRecognition", inputs={"pixel_values": (2, 3, 96, 96)}
    ),
    "pp_ocrv6_small_rec": Override(
        model="PPOCRV6SmallRecForTextRecognition", inputs={"pixel_values": (2, 3, 48, 96)}
    ),
    "prompt_depth_anything": Override(
        config={
            "backbone_config": _FOUR_STAGES,
            "reassemble_hidden_size": 32,
            "neck_hidden_sizes": [8, 8, 8, 8],
            "fusion_hidden_size": 8,
        },
        inputs=_IMAGE,
    ),
    "pvt": Override(
        config={
            "hidden_sizes": [8, 16, 16, 16],
            "num_attention_heads": [1, 2, 2, 4],
            "patch_sizes": [4, 2, 2, 2],
            "image_size": 64,
            "sequence_reduction_ratios": [4, 2, 1, 1],
            "mlp_ratios": [2, 2, 2, 2],
        },
        inputs=_IMAGE_64,
    ),
    "pvt_v2": Override(
        config={
            "hidden_sizes": [8, 16, 16, 16],
            "num_attention_heads": [1, 2, 2, 4],
            "image_size": 64,
            "sr_ratios": [4, 2, 1, 1],
            "mlp_ratios": [2, 2, 2, 2],
        },
        inputs=_IMAGE_64,
    ),
    "qwen2_5_omni": Override(
        model="Qwen2_5OmniThinkerForConditionalGeneration",
        config={
            "vision_start_token_id": 94,
            "vision_end_token_id": 95,
            "audio_start_token_id": 96,
            "text_config": MROPE,
        },
    ),
    "qwen2_5_vl": Override(
        config={
            "text_config": MROPE,
            "vision_config": {"fullatt_block_indexes": [1], "window_size": 32},
        }
    ),
    "qwen2_vl": Override(config={"text_config": MROPE, "vision_config": {"hidden_size": 64}}),
    "qwen3_omni_moe": Override(
        model="Qwen3OmniMoeThinkerForConditionalGeneration",
        config={"vision_start_token_id": 94, "vision_end_token_id": 95, "audio_start_token_id": 96},
    ),
    "qwen4_exp": Override(
        config={
            "text_config": {
                "indexer_n_heads": 2,
                "indexer_kv_heads": 1,
                "indexer_head_dim": 16,
                "indexer_budget": 8,
                "indexer_compress_ratio": 4,
                "hc_lowrank": 8,
                "ple_embed_dim": 16,
                "rope_parameters": MROPE["rope_parameters"],
            }
        }
    ),
    "rag": Override(
        config={
            "question_encoder": _DPR.to_dict(),
            "generator": _BART.to_dict(),
            "n_docs": 2,
        },
        inputs={
            "context_input_ids": _integers(90, 4, 13, least=3),
            "context_attention_mask": _ones(4, 13),
            "doc_scores": (2, 2),
            "decoder_input_ids": _integers(90, 2, 9, least=3),
        },
        patched=True,
        remark="patched: the name does not reach its parts",
    ),
    "recurrent_gemma": Override(config={"num_hidden_layers": 3, "attention_window_size": 6}),
    "reformer": Override(
        config={
            "is_decoder": False,
            "axial_pos_shape": [8, 8],
            "axial_pos_embds_dim": [32, 32],
            "local_attn_chunk_length": 4,
            "lsh_attn_chunk_length": 4,
            "num_buckets": 4,
            "feed_forward_size": 32,
            "max_position_embeddings": 64,
        },
        inputs={"input_ids": _integers(90, 2, 32, least=3)},
    ),
    "rt_detr": Override(
        config={
            **_DETR_FAMILY,
            "encoder_in_channels": [64, 64, 64],
            "backbone_config": {"out_indices": [2, 3, 4], "out_features": None},
        },
        inputs=_IMAGE_64,
    ),
    "rt_detr_v2": Override(
        config={
            **_DETR_FAMILY,
            "encoder_in_channels": [64, 64, 64],
            "backbone_config": {"out_indices": [2, 3, 4], "out_features": None},
        },
        inputs=_IMAGE_64,
    ),
    "sam": Override(
        config={
            "vision_config": {"global_attn_indexes": [1], "num_pos_feats": 32},
            "mask_decoder_config": {"iou_head_hidden_dim": 32},
        },
        inputs={**_IMAGE, "input_points": (2, 1, 2, 2)},
    ),
    "sam2": Override(config=_SAM2, inputs={**_IMAGE_64, "input_points": (2, 1, 2, 2)}),
    "sam2_video": Override(
        config=_SAM2,
        inputs={
            "inference_session": _session("sam2_video", "Sam2Video", 64),
            "frame_idx": lambda _: 0,
        },
    ),
    "sam3_video": Override(
        remark="its detector and its tracker are compared as sam3 and sam3_tracker_video"
    ),
    "sam3_tracker": Override(
        config={"vision_config": {"backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]}},
        inputs={**_IMAGE, "input_points": (2, 1, 2, 2)},
    ),
    "sam3_tracker_video": Override(
        config={"vision_config": {"backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]}},
        inputs={
            "inference_session": _session("sam3_tracker_video", "Sam3TrackerVideo", 32),
            "frame_idx": lambda _: 0,
        },
    ),
    "sam_hq": Override(
        config={
            "vision_config": {"global_attn_indexes": [1], "num_pos_feats": 32},
            "mask_decoder_config": {"iou_head_hidden_dim": 32, "vit_dim": 64},
        },
        inputs={**_IMAGE, "input_points": (2, 1, 2, 2)},
    ),
    "sapiens2": Override(config={"num_key_value_heads_per_layer": [4, 2]}),
    "seamless_m4t": Override(model="SeamlessM4TForTextToText"),
    "seamless_m4t_v2": Override(model="SeamlessM4Tv2ForTextToText"),
    "seggpt": Override(
        config={
            "image_size": [32, 16],
            "merge_index": 1,
            "intermediate_hidden_state_indices": [1],
            "pretrain_image_size": 16,
            "num_hidden_layers": 3,
        },
        inputs={
            "pixel_values": (1, 3, 16, 16),
            "prompt_pixel_values": (1, 3, 16, 16),
            "prompt_masks": (1, 3, 16, 16),
        },
    ),
    "siglip2": Override(
        inputs={
            "pixel_values": (2, 16, 192),
            "pixel_attention_mask": _ones(2, 16),
            "spatial_shapes": [[4, 4], [4, 4]],
        }
    ),
    "slanet": Override(
        model="SLANetForTableRecognition",
        config={
            "backbone_config": {
                "out_features": ["stage2", "stage3", "stage4", "stage5"],
                "out_indices": None,
            },
            "max_text_length": 4,
        },
        inputs=_IMAGE_64,
    ),
    "slanext": Override(),
    "speecht5": Override(
        model="SpeechT5ForSpeechToText",
        config={
            "conv_dim": [16, 16],
            "conv_stride": [5, 4],
            "conv_kernel": [5, 4],
            "num_conv_pos_embeddings": 4,
            "encoder_max_relative_position": 8,
            "mask_time_prob": 0.0,
            "speech_decoder_prenet_units": 16,
        },
        inputs={"input_values": (2, 400), "decoder_input_ids": _integers(90, 2, 7, least=3)},
    ),
    "step3p7": Override(
        config={"text_config": {"sliding_window": 6, "num_sliding_attention_heads": 4}}
    ),
    "superglue": Override(
        config={
            "hidden_size": 64,
            "keypoint_encoder_sizes": [16, 32],
            "gnn_layers_types": ["self", "cross"],
            "keypoint_detector_config": {
                "encoder_hidden_sizes": [16, 16, 16, 16],
                "decoder_hidden_size": 16,
                "descriptor_decoder_dim": 64,
                "max_keypoints": 20,
            },
        },
        inputs={"pixel_values": (2, 2, 3, 64, 64)},
    ),
    "swin": Override(config=_SWIN_OF_TWO, inputs=_IMAGE),
    "swin2sr": Override(
        config={"embed_dim": 16, "depths": [2], "num_heads": [2], "patch_size": 1, "upscale": 2},
        inputs=_IMAGE,
    ),
    "swinv2": Override(config=_SWIN_OF_TWO, inputs=_IMAGE),
    "table_transformer": Override(config=_RESNET, inputs=_IMAGE_64),
    "time_series_transformer": Override(config=_SERIES, inputs=_SERIES_INPUTS),
    "timesfm": Override(
        config={"patch_length": 8, "horizon_length": 8},
        inputs={
            "past_values": (2, 32),
            "past_values_padding": lambda _: torch.zeros(2, 32),
            "freq": [[0], [1]],
        },
    ),
    "timesfm2_5": Override(
        config={"patch_length": 8, "horizon_length": 8, "output_quantile_len": 8},
        inputs={"past_values": (2, 32)},
    ),
    "tipsv2_dpt": Override(
        config={
            "backbone_config": _FOUR_STAGES,
            "neck_hidden_sizes": [8, 8, 8, 8],
            "fusion_hidden_size": 8,
            "num_depth_bins": 8,
        },
        inputs=_IMAGE,
    ),
    "tvp": Override(
        config={
            "max_img_size": 64,
            "visual_prompt_size": 8,
            "num_frames": 2,
            "max_grid_col_position_embeddings": 8,
            "max_grid_row_position_embeddings": 8,
        },
        inputs={"pixel_values": (1, 2, 3, 64, 64), "input_ids": _integers(90, 1, 21, least=3)},
    ),
    "udop": Override(inputs={"bbox": (2, 21, 4), **_IMAGE}),
    "univnet": Override(config={"model_hidden_channels": 8}),
    "unlimited_ocr": Override(
        config={
            "vision_config": {
                "sam_config": {
                    "global_attn_indexes": [1],
                    "downsample_channels": [32, 64],
                    "output_channels": 32,
                }
            },
            "text_config": {"num_key_value_heads": 4},
        }
    ),
    "upernet": Override(
        config={
            "backbone_config": SwinConfig(
                embed_dim=8,
                depths=[1] * 4,
                num_heads=[1, 2, 2, 4],
                window_size=4,
                image_size=64,
                out_features=["stage1", "stage2", "stage3", "stage4"],
            ),
            "auxiliary_in_channels": 32,
            "hidden_size": 16,
        },
        inputs=_IMAGE_64,
    ),
    "vibevoice": Override(
        config={
            "audio_config": {"num_filters": 2, "depths": [1] * 7},
            "semantic_model_config": {"num_filters": 2, "depths": [1] * 7},
        },
        inputs={"input_values": None},
    ),
    "videomt": Override(inputs={"pixel_values_videos": (2, 2, 3, 32, 32)}),
    "videoprism": Override(
        sides=("right",), remark="no left padding: the result holds what padding makes of itself"
    ),
    "vitdet": Override(
        config={
            "window_block_indices": [0],
            "window_size": 3,
            "use_relative_position_embeddings": True,
            "pretrain_image_size": 32,
        },
        inputs=_IMAGE,
    ),
    "vitmatte": Override(
        config={
            "backbone_config": {
                "hidden_size": 32,
                "num_channels": 4,
                "residual_block_indices": [],
                "window_block_indices": [],
                "out_indices": [2],
                "out_features": None,
                "patch_size": 16,
            },
            "hidden_size": 32,
            "convstream_hidden_sizes": [8, 8, 8],
            "fusion_hidden_sizes": [8, 8, 8, 8],
        },
        inputs={"pixel_values": (2, 4, 64, 64)},
    ),
    "vitpose": Override(
        config={
            "backbone_config": {"image_size": [32, 24], "patch_size": [8, 8], "num_experts": 1}
        },
        inputs={"pixel_values": (2, 3, 32, 24)},
    ),
    "vitpose_backbone": Override(
        model="VitPoseBackbone",
        config={"image_size": [32, 24], "patch_size": [8, 8], "num_experts": 1},
        inputs={"pixel_values": (2, 3, 32, 24)},
    ),
    "vits": Override(
        config={
            "hidden_size": 32,
            "num_attention_heads": 2,
            "flow_size": 16,
            "spectrogram_bins": 9,
            "upsample_initial_channel": 16,
            "upsample_rates": [2],
            "upsample_kernel_sizes": [4],
            "resblock_kernel_sizes": [3],
            "resblock_dilation_sizes": [[1]],
            "duration_predictor_filter_channels": 16,
        }
    ),
    "vjepa2": Override(
        config={
            "crop_size": 32,
            "frames_per_clip": 4,
            "pred_hidden_size": 32,
            "pred_num_attention_heads": 4,
            "pred_num_hidden_layers": 2,
            "num_pooler_layers": 1,
        },
        inputs={"pixel_values_videos": (2, 4, 3, 32, 32)},
    ),
    "voxtral_realtime": Override(inputs={"input_features": (2, 16, 168)}),
    "wav2vec2_bert": Override(
        config={"feature_projection_input_dim": 16}, inputs={"input_features": (2, 40, 16)}
    ),
    "x_clip": Override(
        config={
            "prompt_num_attention_heads": 4,
            "vision_config": {
                "mit_hidden_size": 64,
                "mit_intermediate_size": 64,
                "mit_num_attention_heads": 4,
                "num_frames": 2,
            },
        },
        inputs={"pixel_values": (2, 2, 3, 32, 32)},
    ),
    "xcodec": Override(
        config={
            "codebook_dim": 128,
            "acoustic_model_config": {
                "downsampling_ratios": [8, 5, 4, 2],
                "upsampling_ratios": [8, 5, 4, 2],
            },
        },
        inputs={"input_values": (2, 1, 3200)},
    ),
    "xcodec2": Override(
        config={
            "encoder_hidden_size": 4,
            "quantization_dim": 128,
            "num_key_value_heads": 4,
            "semantic_model_config": {"feature_projection_input_dim": 16},
        },
        inputs={"input_values": (2, 1, 3200), "input_features": (2, 10, 16)},
    ),
    "xlstm": Override(config={"head_dim": None}),
    "xmod": Override(config={"languages": ["en_XX"], "default_language": "en_XX"}),
    "zamba": Override(
        config={
            "attention_head_dim": 32,
            "attention_hidden_size": 128,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
            "num_hidden_layers": 4,
            "layers_block_type": ["linear_attention", "hybrid"] * 2,
        }
    ),
    "zamba2": Override(
        config={
            "layers_block_type": ["linear_attention", "hybrid"],
            "attention_hidden_size": 128,
            "mamba_headdim": 16,
            "num_query_groups": 4,
            "attention_head_dim": 32,
        }
    ),
    "zaya": Override(config={"num_experts_per_tok": 1}),
    "zoedepth": Override(
        config={
            "backbone_config": {
                "num_hidden_layers": 4,
                "out_indices": [1, 2, 3, 4],
                "out_features": None,
                "reshape_hidden_states": False,
            },
            "neck_hidden_sizes": [8, 8, 8, 8],
            "fusion_hidden_size": 8,
            "bottleneck_features": 8,
            "bin_embedding_dim": 8,
            "num_attractors": [2, 2, 2, 2],
        },
        inputs=_IMAGE,
    ),
}
