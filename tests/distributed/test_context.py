"""Models on one shard of each row: several processes give what one gives."""

from __future__ import annotations

import inspect
import os
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers
from packaging.version import Version
from ranks import assert_passed, run
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from hf_flash_two import PrefixTreeCollator, context_parallel, max_logits, watch_attention

VOCABULARY, TOKENS = 64, 64
SIZES = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, vocab_size=VOCABULARY, max_position_embeddings=512,
    pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
CHANGES: dict[str, dict] = {
    "Llama": {},
    "Mistral": {"sliding_window": 12},
    "Gemma2": {"sliding_window": 12, "query_pre_attn_scalar": 8},
    "Gemma3": {
        "sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"],
    },
    "GptOss": {"sliding_window": 12, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Llama4": dict(
        intermediate_size_mlp=48, attention_chunk_size=10, num_local_experts=2,
        num_experts_per_tok=1, interleave_moe_layer_step=2, no_rope_layers=[1, 0],
        layer_types=["chunked_attention", "full_attention"],
    ),
}  # fmt: skip
CONFIGS = {"Gemma3": "Gemma3TextConfig", "Llama4": "Llama4TextConfig"}


@cache
def causal_model(name: str) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config_class = getattr(transformers, CONFIGS.get(name, f"{name}Config"))
    config = config_class(**SIZES, **CHANGES[name])
    cls = getattr(transformers, f"{name}ForCausalLM")
    model = cls._from_config(config, attn_implementation="flash_two").train()
    model.config.use_cache = False
    return model


def batches() -> dict[str, dict[str, Tensor]]:
    """Rows that are plain, of a length that does not fit, padded, packed."""
    torch.manual_seed(5)
    ids = torch.randint(3, VOCABULARY, (2, TOKENS))
    labels = ids.clone()
    labels[:, :7] = -100
    plain = {"input_ids": ids, "labels": labels}
    left, right = torch.ones(2, 2, TOKENS, dtype=torch.int64)
    left[0, :20], right[1, 40:] = 0, 0

    def padded(mask: Tensor) -> dict[str, Tensor]:
        hidden = (mask == 0) | (mask.roll(1, 1) == 0)
        return plain | {"attention_mask": mask, "labels": labels.masked_fill(hidden, -100)}

    ends = torch.tensor([0, 5, 25, 28, TOKENS], dtype=torch.int32)
    lengths = ends.diff().tolist()
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    apart = labels.masked_fill(positions == 0, -100)
    packed = {"input_ids": ids[:1], "position_ids": positions, "labels": apart[:1]}
    others = torch.cat([torch.arange(30), torch.arange(TOKENS - 30)])[None]
    several = torch.cat([positions, others])
    turns = [{"segments": ids[0].split(13), "parents": [-1, 0, 0, 2, 0]}]
    bounds = dict(cu_seq_lens_q=ends, cu_seq_lens_k=ends, max_length_q=36, max_length_k=36)
    return {
        "plain": plain,
        "odd": {name: x[:, :61] for name, x in plain.items()},
        "left": padded(left),
        "right": padded(right),
        "packed": packed,
        "boundaries": packed | bounds,
        "branches": PrefixTreeCollator()(turns),
        "several packed rows": plain
        | {"position_ids": several, "labels": labels.masked_fill(several == 0, -100)},
    }


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        found[name] = (grad.full_tensor() if isinstance(grad, DTensor) else grad).clone()
    model.zero_grad()
    return found


def check_gradients(got: dict[str, Tensor], want: dict[str, Tensor], worst: float = 5e-6) -> None:
    """Relative to each, or to a small share of the largest: keys' biases have none but noise."""
    least = 1e-3 * max(grad.norm() for grad in want.values())
    for name, expected in want.items():
        error = (got[name] - expected).norm() / max(expected.norm(), least)
        assert error < worst, f"{name}: {error}"


def mean(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """Of all ranks."""
    x = x.detach().clone()
    dist.all_reduce(x, group=mesh.get_group())
    return x / mesh.size()


def check_training(
    model: nn.Module, batch: dict[str, Tensor], mesh: DeviceMesh, averaged: bool = False, **options
) -> None:
    """Logits, loss and the gradient of every parameter.

    Args:
        averaged: gradients are means over the ranks already.
    """
    whole = model(**batch)
    whole.loss.backward()
    want = gradients(model)
    with context_parallel(mesh, batch, **options) as shard:
        out = model(**shard.batch)
        out.loss.backward()
        logits = shard.gather(out.logits)
    seen = batch.get("attention_mask", torch.ones(batch["input_ids"].shape))[..., None]
    torch.testing.assert_close(logits * seen, whole.logits * seen, atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(mean(out.loss, mesh), whole.loss, atol=1e-6, rtol=2e-6)
    got = gradients(model)
    check_gradients(got if averaged else {n: mean(x, mesh) for n, x in got.items()}, want)


def check_every_kind_of_batch(mesh: DeviceMesh) -> None:
    """By four ranks, every other kind."""
    for batch in list(batches().values())[:: mesh.size() // 2]:
        check_training(causal_model("Llama"), batch, mesh)


def check_windows_softcaps_sinks_and_chunks(mesh: DeviceMesh) -> None:
    given = batches()
    for name in ("Mistral", "Gemma2", "Gemma3", "GptOss", "Llama4"):
        for kind in ("left", "packed", "branches"):
            check_training(causal_model(name), given[kind], mesh)


def check_layouts_and_exchanges(mesh: DeviceMesh) -> None:
    given = batches()
    for layout, exchange in (
        ("contiguous", "gather"), ("head_tail", "ulysses"), ("balanced", "auto"),
    ):  # fmt: skip
        for kind in ("left", "several packed rows"):
            batch = given[kind]
            check_training(causal_model("GptOss"), batch, mesh, layout=layout, exchange=exchange)


def check_two_dimensions(mesh: DeviceMesh) -> None:
    grid, model = init_device_mesh("cpu", (2, 2)), causal_model("Llama")
    with context_parallel(grid, batches()["left"]) as shard, torch.no_grad():
        with max_logits(model) as got:
            logits = shard.gather(model(**shard.batch).logits)
    with torch.no_grad(), max_logits(model) as want:
        whole = model(**batches()["left"]).logits
    torch.testing.assert_close(logits[1], whole[1], atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(got, want)


def check_max_logits(mesh: DeviceMesh) -> None:
    """Those of whole rows on each rank, filled up or not, also where forwards are recomputed."""
    given = batches()
    for name, kind, exchange, reentrant in (
        ("Llama", "odd", "gather", True), ("Llama", "packed", "ulysses", False),
        ("GptOss", "left", "ulysses", True), ("Gemma2", "odd", "auto", False),
    ):  # fmt: skip
        model, batch = causal_model(name), given[kind]
        with max_logits(model) as want, torch.no_grad():
            model(**batch)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        try:
            with max_logits(model) as got:
                with context_parallel(mesh, batch, exchange=exchange) as shard:
                    model(**shard.batch).loss.backward()
        finally:
            model.gradient_checkpointing_disable()
        assert len(want) == 2
        torch.testing.assert_close(got, want)
        model.zero_grad()


def check_logits(
    model: nn.Module,
    batch: dict[str, Tensor],
    mesh: DeviceMesh,
    rtol: float = 2e-6,
    worst: float = 5e-6,
) -> None:
    """Of a model whose loss is left to the caller."""
    torch.manual_seed(1)
    logits = _logits(model(**batch))
    weights = torch.randn(logits.shape)
    seen = batch.get("attention_mask")
    if seen is not None and seen.shape[1] == logits.shape[1]:
        weights = weights * (seen != 0)[..., None]
    (logits * weights).sum().backward()
    want = gradients(model)
    with context_parallel(mesh, batch) as shard:
        known = {*batch, *inspect.signature(type(model).forward).parameters}
        torch.manual_seed(1)
        mine = _logits(model(**{k: x for k, x in shard.batch.items() if k in known}))
        (mine * shard.spread.layout.split(weights, shard.spread.rank, 1)).sum().backward()
        got = shard.spread.gather(mine.detach(), 1)
    expected = logits.detach() * (weights != 0)
    error = (got * (weights != 0) - expected).norm() / expected.norm()
    assert error < rtol, error
    sums = {name: mean(x, mesh) * mesh.size() for name, x in gradients(model).items()}
    check_gradients(sums, want, worst)


def _logits(output) -> Tensor:
    return output.logits if hasattr(output, "logits") else output[0]


def check_an_encoder(mesh: DeviceMesh) -> None:
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        vocab_size=VOCABULARY, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.BertForMaskedLM._from_config(config, attn_implementation="flash_two")
    for kind in ("plain", "right"):
        batch = {k: x for k, x in batches()[kind].items() if k != "labels"}
        positions = torch.arange(TOKENS).expand(2, -1)
        check_logits(model, batch | {"position_ids": positions}, mesh)


def check_encoder_and_decoder(mesh: DeviceMesh) -> None:
    """Position biases of the whole sequence, and another length for each of the two."""
    if Version(transformers.__version__) < Version("5.14"):
        return  # the interface is given no position bias
    config = transformers.T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=VOCABULARY,
        dropout_rate=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration._from_config(
        config, attn_implementation="flash_two"
    )
    model.config.use_cache = model.decoder.config.use_cache = False
    targets = torch.randint(3, VOCABULARY, (2, 32))
    for kind in ("plain", "right"):
        batch = {k: x for k, x in batches()[kind].items() if k != "labels"}
        check_logits(model, batch | {"decoder_input_ids": targets}, mesh)


def check_hand_written_attention(mesh: DeviceMesh) -> None:
    """BLOOM, whose ALiBi counts positions in the mask."""
    config = transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=VOCABULARY)
    torch.manual_seed(0)
    model = transformers.BloomForCausalLM._from_config(config, attn_implementation="flash_two")
    model.config.use_cache = False
    for kind in ("plain", "left"):
        batch = {k: x for k, x in batches()[kind].items() if k != "labels"}
        check_logits(model, batch, mesh)
    with pytest.raises(NotImplementedError, match="labels: BloomForCausalLM would take"):
        with context_parallel(mesh, batches()["plain"]) as shard:
            model(**{k: x for k, x in shard.batch.items() if k != "position_ids"})


def check_checkpointing(mesh: DeviceMesh) -> None:
    model = causal_model("Gemma2")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        for kind in ("left", "packed"):
            check_training(model, batches()[kind], mesh)
    finally:
        model.gradient_checkpointing_disable()


def check_sharded_parameters(mesh: DeviceMesh) -> None:
    """FSDP2 over the same ranks takes the mean of gradients."""
    torch.manual_seed(0)
    config = transformers.MistralConfig(**SIZES, sliding_window=12)
    model = transformers.MistralForCausalLM._from_config(config, attn_implementation="flash_two")
    model.config.use_cache = False
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    check_training(model, batches()["left"], mesh, averaged=True)


def check_refusals(mesh: DeviceMesh) -> None:
    plain = batches()["plain"]
    model = causal_model("Llama")

    def refused(batch: dict, message: str, model: nn.Module = model, **changes) -> None:
        with pytest.raises((NotImplementedError, ValueError), match=message):
            with context_parallel(mesh, batch) as shard:
                model(**shard.batch | changes)

    refused(plain, "labels: LlamaForCausalLM would take", shift_labels=None)
    refused(plain, "output_attentions: not possible", output_attentions=True)
    with watch_attention(model):
        refused(plain, "watch_attention: not possible")
    refused(plain | {"attention_mask": torch.ones(2, 1, TOKENS, TOKENS)}, "expected .batch, keys.")
    refused(plain | {"pixel_values": torch.ones(2, 3)}, "batch: pixel_values is not known")
    refused({"labels": plain["labels"]}, "batch: expected input_ids or inputs_embeds")
    other = transformers.OPTForCausalLM._from_config(
        transformers.OPTConfig(
            hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2,
            vocab_size=VOCABULARY, word_embed_proj_dim=16,
        ),
        attn_implementation="flash_two",
    )  # fmt: skip
    refused(plain, r"OPTForCausalLM cannot get one shard of a row: opt is not among", other)
    model.config.layer_types = ["full_attention", "linear_attention"]
    try:
        refused(plain, "it has layers of linear_attention")
    finally:
        del model.config.layer_types
    for kind in ("dynamic", "longrope"):
        model.config.rope_parameters |= {"rope_type": kind, "original_max_position_embeddings": 32}
        refused(plain, rf"its rotary embedding \({kind}\) depends on the largest position")
        model.config.rope_parameters["original_max_position_embeddings"] = TOKENS
        with context_parallel(mesh, plain) as shard:
            model(**shard.batch)
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
    refused(plain, "use_cache=True would keep the keys", use_cache=True)
    cache = transformers.DynamicCache(config=model.config)
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    refused(plain, f"{name} holds the keys of a shard alone", **{name: cache})
    refused(plain, "expected the 32 tokens", input_ids=plain["input_ids"][:, :5])
    refused(plain, "output_router_logits adds a loss", output_router_logits=True)
    bert = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48,
        vocab_size=VOCABULARY,
    )  # fmt: skip
    for cls, message in (
        (transformers.BertForMaskedLM, "labels: BertForMaskedLM would take the mean"),
        (transformers.BertForSequenceClassification, "no model that gives something for each"),
        (transformers.BertModel, "its pooler looks at one token"),
    ):
        encoder = cls._from_config(bert, attn_implementation="flash_two")
        given = plain if "Masked" in cls.__name__ else {"input_ids": plain["input_ids"]}
        refused(given, message, encoder)
    tuned = transformers.Llama4TextConfig(
        **SIZES, **CHANGES["Llama4"], attn_temperature_tuning=True, floor_scale=8
    )
    llama4 = transformers.Llama4ForCausalLM._from_config(tuned, attn_implementation="flash_two")
    refused(plain, "its attention temperature counts the tokens that it gets", llama4)
    with pytest.raises(ValueError, match="batch: expected the same on all ranks"):
        own = plain["input_ids"].roll(mesh.get_local_rank(), 1)
        with context_parallel(mesh, plain | {"input_ids": own}):
            pass
    with context_parallel(mesh, plain) as shard:
        with pytest.raises(ValueError, match="gather: expected 32 tokens along dimension 1, got 3"):
            shard.gather(torch.ones(2, 3))
    dropping = transformers.LlamaForCausalLM._from_config(
        transformers.LlamaConfig(**SIZES, attention_dropout=0.1), attn_implementation="flash_two"
    )
    refused(plain, r"LlamaAttention drops probabilities", dropping.train())
    for name, given in (("layout", "ring"), ("exchange", "ring")):
        with pytest.raises(ValueError, match=f"{name}: expected one of"):
            with context_parallel(mesh, plain, **{name: given}):
                pass


def check_a_number_of_labels_is_that_of_the_whole_batch(mesh: DeviceMesh) -> None:
    batch = batches()["plain"]
    count = (batch["labels"][:, 1:] != -100).sum()
    check_training(causal_model("Llama"), batch | {"num_items_in_batch": 2 * count}, mesh)


def check_a_mask_that_numbers_documents(mesh: DeviceMesh) -> None:
    numbers = torch.ones(2, TOKENS, dtype=torch.int64)
    numbers[:, 20:], numbers[1, 50:] = 2, 3
    config = transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=VOCABULARY)
    torch.manual_seed(0)
    bloom = transformers.BloomForCausalLM._from_config(config, attn_implementation="flash_two")
    for model in (causal_model("Llama"), bloom):
        check_logits(
            model, {"input_ids": batches()["plain"]["input_ids"], "attention_mask": numbers}, mesh
        )


def check_a_loss_of_ones_own(mesh: DeviceMesh) -> None:
    """What each token has is split as the batch is, filled rows included."""
    ids, weights = torch.arange(122).view(2, 61), torch.randn(2, 61, 3)
    with context_parallel(mesh, {"input_ids": ids}) as shard:
        assert torch.equal(shard.gather(shard.split(ids)), ids)
        assert torch.equal(shard.gather(shard.split(weights)), weights)
        assert torch.equal(shard.gather(shard.split(weights.mT, 2), 2), weights.mT)
        assert torch.equal(shard.batch["input_ids"], shard.split(ids))
        with pytest.raises(ValueError, match="split: expected 61 tokens along dimension 1, got 60"):
            shard.split(ids[:, 1:])
    assert "no attention was spread" in shard.report()


def check_report(mesh: DeviceMesh) -> None:
    with context_parallel(mesh, batches()["plain"]) as shard, torch.no_grad():
        causal_model("Mistral")(**shard.batch)
    assert "2 x gather: a window reaches few keys of other ranks" in shard.report()


CHECKS = (
    check_every_kind_of_batch,
    check_windows_softcaps_sinks_and_chunks,
    check_layouts_and_exchanges,
    check_an_encoder,
    check_encoder_and_decoder,
    check_hand_written_attention,
    check_checkpointing,
    check_max_logits,
    check_sharded_parameters,
    check_refusals,
    check_a_number_of_labels_is_that_of_the_whole_batch,
    check_a_mask_that_numbers_documents,
    check_a_loss_of_ones_own,
    check_report,
)
OF_FOUR = (check_every_kind_of_batch, check_two_dimensions)


@pytest.mark.parametrize(
    ("world", "name"),
    [(2, check.__name__) for check in CHECKS] + [(4, check.__name__) for check in OF_FOUR],
)
def test_processes(outcomes_of, world: int, name: str) -> None:
    assert_passed(outcomes_of(world), name)


if __name__ == "__main__":
    run(CHECKS if os.environ["WORLD_SIZE"] == "2" else OF_FOUR, Path(sys.argv[1]))
