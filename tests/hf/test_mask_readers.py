"""Every model that reads its attention mask itself is known, and gets what it takes it for."""

from __future__ import annotations

import ast
import textwrap
from pathlib import Path

import pytest
import torch
import transformers
from mask_readers import _File, reads

# Families that use the interface: the functions that read a mask, and why that is right with ours.
# Those with hand-written attention get exactly the tensor that eager gets.
EXAMINED = {
    "a mask of bool that one may attend, as it takes it for by its dtype": """
        axk2 AXK2Attention.forward AXK2Indexer.forward
        deepseek_v32 DeepseekV32Attention.forward DeepseekV32Indexer.forward
        dots3_note Dots3NoteTextAttention.forward Dots3NoteTextIndexer.forward
        glm_moe_dsa GlmMoeDsaAttention.forward GlmMoeDsaIndexer.forward
        hy_v4 HYV4Attention.forward HYV4Indexer.forward
        hy_v4_vl HYV4VLAttention.forward HYV4VLIndexer.forward
        lasr LasrEncoderConvolutionModule.forward
        mistral_large4 MistralLarge4TextAttention.forward MistralLarge4TextIndexer.forward
        nemotron_asr_streaming NemotronAsrStreamingEncoder.forward
        qwen4_exp Qwen4ExpTextAttention.forward Qwen4ExpTextQSAIndexer.forward
        sam3 Sam3Attention.forward
        sam3_lite_text Sam3LiteTextAttention.forward
        siglip2 Siglip2MultiheadAttentionPoolingHead.forward
    """,
    "a plain additive tensor (families.WANTS_TENSOR)": """
        deepseek_v4 DeepseekV4Attention.forward
        doge DogeAttention.prepare_dynamic_mask
        gemma4 Gemma4AudioAttention.forward Gemma4AudioModel._convert_4d_mask_to_blocked_5d
        informer InformerProbSparseAttention.forward
    """,
    "an additive mask (families.READS_ADDITIVE)": """
        nllb_moe NllbMoeTop2Router.route_tokens
    """,
    "an additive one in sums, whose other part are scores or biases": """
        beit BeitLayer.forward BeitModel.forward
        bigbird_pegasus BigBirdPegasusSelfAttention.forward
        decision_transformer DecisionTransformerGPT2Attention._upcast_and_reordered_attn
        git GitSelfAttention.forward
        gpt2 GPT2Attention._upcast_and_reordered_attn
        pp_doclayout_v2 PPDocLayoutV2ReadingOrderSelfAttention.forward
    """,
    "a slice or two masks side by side, which stay what they are": """
        pix2struct Pix2StructTextAttention.forward
        t5gemma2 T5Gemma2Decoder.forward
    """,
    "no mask of ours: [batch, tokens], or made by the model itself under every implementation": """
        bailing_hybrid apply_mask_to_padding_states
        bamba apply_mask_to_padding_states
        bigbird_pegasus BigBirdPegasusBlockSparseAttention._create_rand_mask_from_inputs
        bigbird_pegasus BigBirdPegasusBlockSparseAttention.bigbird_block_sparse_attention
        bridgetower BridgeTowerResidualAttention.attention
        esm EsmEmbeddings.forward
        esmfold2 EsmFold2ConfidenceHead._build_pair_and_single
        esmfold2 EsmFold2DiffusionModule.prepare_conditioning
        esmfold2 EsmFold2RowAttentionPooling.forward scatter_atom_to_token
        evolla EvollaSequenceAlignerCrossAttention.cross_attention
        falcon_h1 apply_mask_to_padding_states
        gemma3n Gemma3nAudioAttention.__init__ Gemma3nAudioAttention.forward
        gemma3n Gemma3nAudioConformerBlock.forward
        granitemoehybrid apply_mask_to_padding_states
        inkling apply_mask_to_padding_states
        inkling2 apply_mask_to_padding_states
        inkling2_loop apply_mask_to_padding_states
        jamba apply_mask_to_padding_states
        kimi_linear apply_mask_to_padding_states
        lara_mini apply_mask_to_padding_states
        lfm2 apply_mask_to_padding_states
        lfm2_moe apply_mask_to_padding_states
        lfm3 apply_mask_to_padding_states
        minimax apply_mask_to_padding_states
        mllama MllamaCrossAttentionDecoderLayer.forward
        nemotron_asr_streaming NemotronAsrStreamingEncoderAttention.forward
        nemotron_h apply_mask_to_padding_states
        olmo_hybrid apply_mask_to_padding_states
        phi4_multimodal Phi4MultimodalAudioModel.forward
        phi4_multimodal Phi4MultimodalAudioModel.forward_embeddings
        phi4_multimodal Phi4MultimodalAudioNemoConvSubsampling.forward
        phi4_multimodal Phi4MultimodalImageEmbedding.forward
        pix2struct Pix2StructTextModel.forward
        qwen3_5 apply_mask_to_padding_states
        qwen3_5_moe apply_mask_to_padding_states
        qwen3_next apply_mask_to_padding_states
        qwen4_exp Qwen4ExpTextModel.forward apply_mask_to_padding_states
        seamless_m4t SeamlessM4TConformerConvolutionModule.forward
        seamless_m4t_v2 SeamlessM4Tv2ConformerConvolutionModule.forward
        seamless_m4t_v2 SeamlessM4Tv2VariancePredictor.forward
        switch_transformers SwitchTransformersStack.forward
        zamba apply_mask_to_padding_states
        zamba2 apply_mask_to_padding_states
        zaya ZayaCCAProjection.forward
        bamba BambaMixer.forward
        falcon_h1 FalconH1Mixer.cuda_kernels_forward FalconH1Mixer.forward
        granitemoehybrid GraniteMoeHybridMambaLayer.forward
        jamba JambaMambaMixer.cuda_kernels_forward JambaMambaMixer.slow_forward
        minimax MiniMaxLightningAttention.forward
        nemotron_h NemotronHMamba2Mixer.cuda_kernels_forward NemotronHMamba2Mixer.torch_forward
        zamba ZambaMambaMixer.cuda_kernels_forward ZambaMambaMixer.slow_forward
        zamba2 Zamba2MambaMixer.cuda_kernels_forward Zamba2MambaMixer.torch_forward
    """,
}


def examined() -> set[tuple[str, str]]:
    lines = (line.split() for lines in EXAMINED.values() for line in lines.strip().splitlines())
    return {(family, function) for family, *functions in lines for function in functions}


def test_no_other_model_reads_its_mask() -> None:
    """A family that fails here is to be examined: what does it take the mask for?"""
    root = Path(transformers.models.__file__).parent
    found = {}
    for path in root.glob("*/modeling_*.py"):
        if "ALL_ATTENTION_FUNCTIONS" in path.read_text():
            for line in reads(path):
                function = line.partition(":")[0]
                found[path.stem.removeprefix("modeling_"), function] = line
    new = found.keys() - examined()
    assert not new, [found[at] for at in sorted(new)]
    assert ("nllb_moe", "NllbMoeTop2Router.route_tokens") in found
    assert len(found) > 30


@pytest.mark.parametrize(
    ("use", "read"),
    [
        ("hidden * mask", True),
        ("~mask", True),
        ("mask[:, :, -1]", True),
        ("mask.dtype", True),
        ("torch.where(mask, hidden, 0)", True),
        ("isinstance(mask, torch.Tensor)", True),
        ("isinstance(mask, dict)", False),
        ("mask is not None", False),
        ("mask['full_attention']", False),
        ("self.attention(hidden, mask)", False),
        ("(hidden, mask)", False),
    ],
)
def test_what_reads_and_what_hands_on(use: str, read: bool) -> None:
    """Through a container, a loop over layers, ``**kwargs`` and a second module."""
    source = f"""
    class Router(nn.Module):
        def forward(self, hidden, mask=None):
            return {use}

    class Layer(nn.Module):
        def __init__(self):
            self.router = Router()

        def forward(self, hidden, **kwargs):
            return self.router(hidden, **kwargs)

    class Model(PreTrainedModel):
        def __init__(self):
            self.layers = nn.ModuleList([Layer() for _ in range(2)])

        def forward(self, hidden, attention_mask=None):
            hidden = hidden * attention_mask[:, :, None]
            attention_mask = create_causal_mask(attention_mask=attention_mask)
            masks = {{"full_attention": attention_mask}}
            for layer in self.layers:
                hidden = layer(hidden, mask=masks["full_attention"])
            return hidden
    """
    found = list(_File(ast.parse(textwrap.dedent(source))).reads())
    assert [line.partition(":")[0] for line in found] == ["Router.forward"] * read


@pytest.mark.parametrize("name", ["flash_two", "fa_two"])
@pytest.mark.parametrize("mask", [None, "ones", "padded"])
def test_tokens_reach_the_experts_of_nllb_moe(name: str, mask: str | None) -> None:
    config = transformers.NllbMoeConfig(
        vocab_size=99, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=16, decoder_ffn_dim=16, num_experts=4,
        encoder_sparse_step=2, decoder_sparse_step=2, max_position_embeddings=50, dropout=0.0,
        attention_dropout=0.0, activation_dropout=0.0,
    )  # fmt: skip
    ids = torch.randint(3, 99, (2, 9), generator=torch.Generator().manual_seed(0))
    visible = None if mask is None else torch.ones_like(ids)
    if mask == "padded":
        visible[0, -2:] = 0
    results = []
    for implementation in ("eager", name):
        torch.manual_seed(0)
        model = transformers.NllbMoeModel._from_config(config, attn_implementation=implementation)
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.data.normal_(0, parameter.shape[1] ** -0.5)
        routed = []
        for module in model.modules():
            if type(module).__name__ == "NllbMoeTop2Router":
                module.register_forward_hook(lambda _, __, out, at=routed: at.append(out[0].sum()))
        with torch.no_grad():
            out = model.eval()(ids, attention_mask=visible, decoder_input_ids=ids)
        results.append((out.last_hidden_state, [int(count) for count in routed]))
    (want, expected), (got, routed) = results
    assert routed == expected and min(expected) > 9
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
