"""Tiny random models of the families under test: two layers, grouped heads, odd sizes."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import PreTrainedModel
from transformers.masking_utils import create_causal_mask

from hf_flash_two import patch

VOCABULARY = 89
# What models and mask functions call the cache that they are given.
CACHE = "cache"
if CACHE not in inspect.signature(create_causal_mask).parameters:  # up to transformers 5.23
    CACHE = "past_key_values"


@dataclass(frozen=True)
class Family:
    """A model class and a configuration of it, with ``layers`` calls of the attention."""

    name: str
    model: str
    config: Callable[[], transformers.PreTrainedConfig]
    layers: int = 2
    inputs: Callable[[], dict[str, torch.Tensor]] | None = None
    since: str = "5.4"

    def build(self, implementation: str, seed: int = 0, **changes) -> PreTrainedModel:
        config = self.config()
        for name, value in changes.items():
            setattr(config, name, value)
        torch.manual_seed(seed)
        model = getattr(transformers, self.model)._from_config(
            config, attn_implementation=implementation
        )
        spread_out(model)
        return model.eval()

    def pair(self, implementation: str, **changes) -> tuple[PreTrainedModel, PreTrainedModel]:
        """The model under ``implementation`` and under eager, with the same weights."""
        return self.build(implementation, **changes), self.build("eager", **changes)


def named(families: list[Family]) -> list:
    """Parameters for pytest with readable ids."""
    return [pytest.param(family, id=family.name) for family in families]


def supported(family: Family) -> None:
    """Skip a family that the installed Transformers does not bring to the attention interface."""
    if Version(transformers.__version__) < Version(family.since):
        pytest.skip(f"{family.name} uses the attention interface from transformers {family.since}")


# Their attention is hand-written in the lowest supported Transformers, where nothing here knows it,
# and uses the interface in the newest.
_LATE = frozenset({"ctrl", "nemotron", "pix2struct", "t5"})
NOT_KNOWN = "computes attention itself in a way not known"


def is_not_known(model: PreTrainedModel) -> bool:
    """Whether the installed Transformers has not yet brought ``model`` to its interface."""
    module = sys.modules[type(model).__module__]
    return model.config.model_type in _LATE and not hasattr(module, "ALL_ATTENTION_FUNCTIONS")


def patched_where_known(model: PreTrainedModel) -> None:
    """`patch`; what is not known in the installed Transformers is refused, and then skipped."""
    if not is_not_known(model):
        patch(model)
        return
    with pytest.raises(ValueError, match=NOT_KNOWN):
        patch(model)
    name, version = model.config.model_type, transformers.__version__
    pytest.skip(f"{name} in transformers {version} {NOT_KNOWN}, and patch says so")


def spread_out(model: PreTrainedModel) -> None:
    """Weights large enough for attention to prefer some keys, so that a wrong mask shows."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.6 * parameter.shape[-1] ** -0.5 * 2)
            elif "sinks" in name:
                parameter.normal_(0, 1)


def text(name: str, **special) -> transformers.PreTrainedConfig:
    """A decoder's configuration in the names that most families share."""
    common = dict(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        tie_word_embeddings=False,
    )
    return getattr(transformers, name)(**{**common, **special})


MIXED_LAYERS = dict(sliding_window=5, layer_types=["sliding_attention", "full_attention"])


def gpt_oss():
    return text(
        "GptOssConfig", head_dim=16, num_local_experts=3, num_experts_per_tok=2, **MIXED_LAYERS
    )


def llama4():
    return text(
        "Llama4TextConfig",
        head_dim=16,
        intermediate_size_mlp=56,
        attention_chunk_size=8,
        num_local_experts=2,
        num_experts_per_tok=1,
        layer_types=["chunked_attention", "full_attention"],
        no_rope_layers=[1, 0],
        attn_temperature_tuning=False,
    )


def deepseek_v3():
    return text(
        "DeepseekV3Config",
        num_key_value_heads=4,
        q_lora_rank=24,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=12,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        moe_intermediate_size=32,
        first_k_dense_replace=1,
    )


def gemma2():
    return text(
        "Gemma2Config",
        head_dim=16,
        query_pre_attn_scalar=16,
        attn_logit_softcapping=3.0,
        final_logit_softcapping=None,
        **MIXED_LAYERS,
    )


def gemma3_text():
    return text("Gemma3TextConfig", head_dim=16, query_pre_attn_scalar=16, **MIXED_LAYERS)


DECODERS = [
    Family("llama", "LlamaForCausalLM", lambda: text("LlamaConfig")),
    Family("mistral", "MistralForCausalLM", lambda: text("MistralConfig", sliding_window=5)),
    Family("qwen2", "Qwen2ForCausalLM", lambda: text("Qwen2Config")),
    Family("qwen3", "Qwen3ForCausalLM", lambda: text("Qwen3Config", head_dim=24)),
    Family("gemma2", "Gemma2ForCausalLM", gemma2),
    Family("gemma3", "Gemma3ForCausalLM", gemma3_text),
    Family("gpt-oss", "GptOssForCausalLM", gpt_oss),
    Family("llama4", "Llama4ForCausalLM", llama4),
    Family("phi3", "Phi3ForCausalLM", lambda: text("Phi3Config")),
    Family(
        "mixtral",
        "MixtralForCausalLM",
        lambda: text("MixtralConfig", num_local_experts=3, sliding_window=None),
    ),
    Family("deepseek-v3", "DeepseekV3ForCausalLM", deepseek_v3),
]


def vision(name: str, **special) -> transformers.PreTrainedConfig:
    common = dict(
        hidden_size=48,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=28,
        patch_size=4,
    )
    return getattr(transformers, name)(**{**common, **special})


def t5():
    return transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=48,
        d_kv=12,
        d_ff=56,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=20,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        eos_token_id=None,
    )


def bart():
    return transformers.BartConfig(
        vocab_size=VOCABULARY,
        d_model=48,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=56,
        decoder_ffn_dim=56,
        max_position_embeddings=64,
        eos_token_id=None,
        forced_eos_token_id=None,
        dropout=0.0,
    )


def whisper():
    return transformers.WhisperConfig(
        vocab_size=VOCABULARY,
        d_model=48,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=56,
        decoder_ffn_dim=56,
        num_mel_bins=16,
        max_source_positions=37,
        max_target_positions=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        dropout=0.0,
    )


def bert():
    return transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


def modernbert():
    return text(
        "ModernBertConfig",
        num_hidden_layers=4,
        local_attention=6,
        global_attn_every_n_layers=2,
        sep_token_id=2,
        cls_token_id=1,
        eos_token_id=2,
    )


def two_towers(name: str) -> transformers.PreTrainedConfig:
    part = dict(hidden_size=48, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4)
    words = dict(part, vocab_size=VOCABULARY, max_position_embeddings=32, eos_token_id=2)
    images = dict(part, image_size=28, patch_size=4)
    return getattr(transformers, name)(text_config=words, vision_config=images)


def gemma3_images():
    tower = vision("SiglipVisionConfig", patch_size=7)
    return transformers.Gemma3Config(
        text_config=gemma3_text().to_dict(),
        vision_config=tower.to_dict(),
        mm_tokens_per_image=4,
        boi_token_index=80,
        eoi_token_index=81,
        image_token_index=82,
    )


def qwen2_5_vl():
    words = text("Qwen2_5_VLTextConfig").to_dict()
    words["rope_parameters"] = {
        "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2],
    }  # fmt: skip
    tower = dict(
        depth=2,
        hidden_size=48,
        intermediate_size=56,
        num_heads=4,
        out_hidden_size=48,
        patch_size=4,
        spatial_merge_size=2,
        temporal_patch_size=2,
        window_size=16,
        fullatt_block_indexes=[1],
    )
    return transformers.Qwen2_5_VLConfig(
        text_config=words,
        vision_config=tower,
        image_token_id=82,
        video_token_id=83,
        vision_start_token_id=80,
        vision_end_token_id=81,
    )


def tokens(batch: int, length: int, seed: int = 0, highest: int = 80) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, highest, (batch, length), generator=generator)


def left_padded(batch: int, length: int, missing: int) -> torch.Tensor:
    """1 for real tokens; the first row lacks ``missing`` at its start."""
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, :missing] = 0
    return mask


def right_padded(batch: int, length: int, missing: int) -> torch.Tensor:
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, length - missing :] = 0
    return mask


def pixels(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def encoder_inputs() -> dict[str, torch.Tensor]:
    return {"input_ids": tokens(2, 19), "attention_mask": right_padded(2, 19, 6)}


def sequence_inputs() -> dict[str, torch.Tensor]:
    decoder = right_padded(2, 11, 3)
    return {
        **encoder_inputs(),
        "decoder_input_ids": tokens(2, 11, seed=1),
        "decoder_attention_mask": decoder,
    }


def whisper_inputs() -> dict[str, torch.Tensor]:
    return {"input_features": pixels(2, 16, 74), "decoder_input_ids": tokens(2, 11)}


def image_inputs() -> dict[str, torch.Tensor]:
    return {"pixel_values": pixels(2, 3, 28, 28)}


def two_tower_inputs() -> dict[str, torch.Tensor]:
    ids = tokens(2, 19)
    ids[:, 12] = 2
    return {**image_inputs(), "input_ids": ids, "attention_mask": right_padded(2, 19, 6)}


def gemma3_image_inputs() -> dict[str, torch.Tensor]:
    """Two images of four tokens in row 0, one in row 1; the images straddle the window of 5."""
    ids = tokens(2, 23)
    ids[0, 3:7] = ids[0, 12:16] = ids[1, 9:13] = 82
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "token_type_ids": (ids == 82).long(),
        "pixel_values": pixels(3, 3, 28, 28),
    }


def qwen2_5_vl_inputs() -> dict[str, torch.Tensor]:
    """An image of 6 x 8 patches (12 tokens after merging) in row 0, one of 4 x 8 in row 1."""
    ids = tokens(2, 21)
    ids[0, 2], ids[0, 3:15] = 80, 82
    ids[1, 6], ids[1, 7:15] = 80, 82
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "mm_token_type_ids": (ids == 82).long(),
        "pixel_values": pixels(48 + 32, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 6, 8], [1, 4, 8]]),
    }


SEQUENCE_MODELS = [
    Family("t5", "T5ForConditionalGeneration", t5, 6, sequence_inputs, since="5.14"),
    Family("bart", "BartForConditionalGeneration", bart, 6, sequence_inputs),
    Family("whisper", "WhisperForConditionalGeneration", whisper, 6, whisper_inputs),
]
ENCODERS = [
    Family("bert", "BertForMaskedLM", bert, 2, encoder_inputs),
    Family("modernbert", "ModernBertForMaskedLM", modernbert, 4, encoder_inputs),
    Family("vit", "ViTModel", lambda: vision("ViTConfig"), 2, image_inputs),
    Family(
        "siglip-vision", "SiglipVisionModel", lambda: vision("SiglipVisionConfig"), 3, image_inputs
    ),
    Family("clip", "CLIPModel", lambda: two_towers("CLIPConfig"), 4, two_tower_inputs),
    Family("siglip", "SiglipModel", lambda: two_towers("SiglipConfig"), 5, two_tower_inputs),
]
MULTIMODAL = [
    Family(
        "gemma3-images", "Gemma3ForConditionalGeneration", gemma3_images, 5, gemma3_image_inputs
    ),
    Family("qwen2.5-vl", "Qwen2_5_VLForConditionalGeneration", qwen2_5_vl, 4, qwen2_5_vl_inputs),
]
