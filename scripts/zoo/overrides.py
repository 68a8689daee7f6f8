"""What the rules of `build` and `inputs` cannot know, as data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Override:
    """Of one family.

    Attributes:
        model: name of the class to test.
        config: values of the configuration; a dict goes into the sub-config of that name.
        inputs: per argument a shape (normal numbers), a list (exact integers) or a function that
            gets a `torch.Generator`; None takes the argument out.
    """

    model: str = ""
    config: dict = field(default_factory=dict)
    inputs: dict[str, tuple | list | Callable | None] = field(default_factory=dict)


def _table(*groups: tuple[str, object]) -> dict[str, object]:
    return {name: value for names, value in groups for name in names.split()}


SMALL = _table(
    (
        "hidden_size d_model n_embd dim embed_dim decoder_embed_dim model_dim emb_dim embedding_size "
        "word_embed_proj_dim hidden_dim output_size out_hidden_size encoder_hidden_size "
        "decoder_hidden_size lru_width attention_hidden_size cross_attention_hidden_size "
        "mask_feature_size fpn_feature_size text_hidden_size vision_hidden_size projection_dim "
        "hidden_sizes input_embedding_size output_embedding_size entity_emb_size "
        "visual_embedding_dim proj_dim embed_dims decoder_dim text_dim codebook_dim",
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
        "num_hidden_layers n_layer num_layers encoder_layers decoder_layers n_layers depth "
        "num_decoder_layers num_encoder_layers decoder_depth encoder_num_hidden_layers "
        "decoder_num_hidden_layers num_blocks r_layers x_layers l_layers num_attention_layers "
        "decoder_num_layers encoder_num_layers num_layers_per_block",
        2,
    ),
    ("depths", 1),
    (
        "num_attention_heads n_head num_heads encoder_attention_heads decoder_attention_heads "
        "n_heads num_attn_heads encoder_num_attention_heads decoder_num_attention_heads "
        "swa_num_attention_heads decoder_num_heads encoder_num_heads",
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
    ("attention_chunk_size", 8),
    ("num_mel_bins hidden_size_per_layer_input v_head_dim rel_extent index_head_dim", 16),
    ("q_lora_rank", 24),
    ("kv_lora_rank qk_nope_head_dim", 16),
    ("qk_rope_head_dim rotary_dim", 8),
    ("qk_head_dim", 24),
    ("n_group topk_group n_shared_experts first_k_dense_replace", 1),
    ("index_topk index_block_size", 4),
    ("index_n_heads index_topk_blocks", 2),
    ("num_queries num_latents num_query_tokens decoder_num_queries", 7),
    ("conv_dim", 32),
    ("num_conv_pos_embeddings", 8),
    ("num_conv_pos_embedding_groups", 2),
    ("pad_token_id decoder_start_token_id", 0),
    ("bos_token_id", 1),
    ("eos_token_id", 2),
    (
        "dropout attention_dropout hidden_dropout hidden_dropout_prob resid_pdrop attn_pdrop "
        "attention_probs_dropout_prob embd_pdrop activation_dropout layerdrop encoder_layerdrop "
        "decoder_layerdrop drop_path_rate resid_dropout embed_dropout dropout_rate",
        0,
    ),
)

OVERRIDES: dict[str, Override] = {}

NOT_SOFTMAX: dict[str, str] = {}
