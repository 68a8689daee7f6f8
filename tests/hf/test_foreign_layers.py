"""Attention of classes that Transformers does not ship: listed, switched on request, or refused."""

from __future__ import annotations

import copy
import sys
import textwrap

import pytest
import torch
import transformers
from checks import assert_close
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    apply_rotary_pos_emb,
    repeat_kv,
)

import hf_flash_two
from hf_flash_two import check_parity, patch, patched, register_attention, unpatch
from hf_flash_two.hf import families
from hf_flash_two.hf.families import attention_kind


def heads(layer, x, positions, cache):
    shape = (*x.shape[:2], -1, layer.head_dim)
    parts = (p(x).view(shape).transpose(1, 2) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    q, k, v = parts
    q, k = apply_rotary_pos_emb(q, k, *positions)
    if cache is not None:
        k, v = cache.update(k, v, layer.layer_idx)
    return q, *(repeat_kv(part, layer.num_key_value_groups) for part in (k, v))


def weigh(q, k, scale, mask):
    scores = (q @ k.transpose(2, 3)) * scale
    return (scores if mask is None else scores + mask).float().softmax(-1).to(q.dtype)


class Written(LlamaAttention):
    """Overrides a forward that goes through the interface."""

    def forward(
        self, hidden_states, position_embeddings=None, attention_mask=None, cache=None,
        past_key_values=None, **kwargs,
    ):  # fmt: skip
        cache = past_key_values if cache is None else cache  # before transformers 5.24
        q, k, v = heads(self, hidden_states, position_embeddings, cache)
        weights = (q @ k.transpose(2, 3)) * self.scaling
        if attention_mask is not None:
            weights = weights + attention_mask
        weights = weights.float().softmax(-1).to(q.dtype)
        out = (weights @ v).transpose(1, 2).reshape(*hidden_states.shape[:2], -1)
        return self.o_proj(out), weights


class ByHelper(LlamaAttention):
    """The softmax is in a function of the module."""

    def forward(
        self, hidden_states, position_embeddings=None, attention_mask=None, cache=None,
        past_key_values=None, **kwargs,
    ):  # fmt: skip
        cache = past_key_values if cache is None else cache  # before transformers 5.24
        q, k, v = heads(self, hidden_states, position_embeddings, cache)
        weights = weigh(q, k, self.scaling, attention_mask)
        return self.o_proj((weights @ v).transpose(1, 2).flatten(2)), None


class Mixer(LlamaAttention):
    """Its name does not say it; PyTorch's function does the whole."""

    def forward(
        self, hidden_states, position_embeddings=None, attention_mask=None, cache=None,
        past_key_values=None, **kwargs,
    ):  # fmt: skip
        cache = past_key_values if cache is None else cache  # before transformers 5.24
        q, k, v = heads(self, hidden_states, position_embeddings, cache)
        out = F.scaled_dot_product_attention(q, k, v, attention_mask, scale=self.scaling)
        return self.o_proj(out.transpose(1, 2).flatten(2)), None


class Scaled(LlamaAttention):
    """Calls the forward it overrides, which goes through the interface."""

    def forward(self, hidden_states, *args, **kwargs):
        out, weights = super().forward(hidden_states, *args, **kwargs)
        return 2 * out, weights


class Router(nn.Module):
    """A softmax and a product, and no attention."""

    def forward(self, tokens, experts):
        return (tokens @ self.weight).softmax(-1) @ experts


FOREIGN = [Written, ByHelper, Mixer]


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch):
    """What a test registers is forgotten."""
    monkeypatch.setattr(families, "_registered", set())
    attention_kind.cache_clear()
    yield
    attention_kind.cache_clear()


def llama(cls: type | None = None, layers: tuple[int, ...] = (0, 1), attention: str = "eager"):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=64, pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    for i in layers if cls else ():
        old, new = model.model.layers[i].self_attn, cls(model.config, i).eval()
        new.load_state_dict(old.state_dict())
        model.model.layers[i].self_attn = new
    return model


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 97, (2, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("cls", FOREIGN)
def test_listed_and_not_said_to_be_ours(cls, batch) -> None:
    report = patch(llama(cls, (0,)))
    assert len(report.layers) == 2 and not report.ok
    (layer,) = (layer for layer in report.layers if not layer.ok)
    assert (layer.kind, layer.uses) == (cls.__name__, "its own code")
    assert f"register_attention({cls.__name__})" in layer.reason
    with pytest.raises(ValueError, match=f"no layer for flash_two[^$]*{cls.__name__}"):
        patch(llama(cls))
    parity = check_parity(llama(cls, (0,)), batch)
    assert [row.uses.partition(",")[0] for row in parity.layers] == ["its own code", "flash_two"]


@pytest.mark.parametrize("cls", FOREIGN)
def test_registered_it_is_switched_and_proved(cls, batch, kernel_calls) -> None:
    model, visible = llama(cls), batch["attention_mask"].bool()
    wanted = model(**batch).logits[visible]
    assert register_attention(cls) is cls
    assert not kernel_calls
    with patched(model) as report:
        assert report.ok and len(report.layers) == 2
        assert_close(model(**batch).logits[visible], wanted)
        assert len(kernel_calls) == 2
    assert torch.equal(model(**batch).logits[visible], wanted)
    parity = check_parity(model, batch)
    assert parity.ok and all(row.output and row.gradient for row in parity.layers), str(parity)
    tokens = model.generate(**batch, max_new_tokens=4, do_sample=False)
    with patched(model):
        assert torch.equal(model.generate(**batch, max_new_tokens=4, do_sample=False), tokens)


def test_registered_what_has_no_counterpart_is_refused(batch) -> None:
    @register_attention
    class Sharpened(Written):
        def forward(self, hidden_states, *args, attention_mask=None, **kwargs):
            q = self.q_proj(hidden_states)[:, None]
            weights = (q @ q.transpose(2, 3)).softmax(-1)
            return hidden_states + (weights**2 @ q)[:, 0], None

    model = llama(Sharpened)
    assert patch(model).ok
    refusal = r"Sharpened\): flash_two has no counterpart for `pow`"
    with pytest.raises(NotImplementedError, match=refusal):
        model(**batch)


def test_registered_by_its_subclass() -> None:
    class Further(Written):
        pass

    register_attention(Further)
    assert patch(llama(Written)).ok and patch(llama(Further)).ok


@pytest.mark.parametrize(
    "cls, error, message",
    [
        (LlamaAttention, ValueError, "through Transformers' attention interface"),
        (Scaled, ValueError, "through Transformers' attention interface"),
        (
            transformers.models.big_bird.modeling_big_bird.BigBirdBlockSparseAttention,
            ValueError,
            "cannot be switched: a fixed sparse pattern",
        ),
        ("LlamaAttention", TypeError, "expected a subclass of torch.nn.Module"),
        (dict, TypeError, "expected a subclass of torch.nn.Module"),
        (nn.Linear(1, 1), TypeError, "expected a subclass of torch.nn.Module"),
    ],
)
def test_what_cannot_be_registered(cls, error, message) -> None:
    with pytest.raises(error, match=message):
        register_attention(cls)


def test_what_a_class_overrides_does_not_count() -> None:
    assert attention_kind(LlamaAttention) == attention_kind(Scaled) == "interface"
    assert [attention_kind(cls) for cls in FOREIGN] == ["hand-written"] * 3
    assert attention_kind(Router) is None


def test_classes_whose_source_is_not_there() -> None:
    text = """
    class Attend(nn.Module):
        def forward(self, q, k, v):
            return (q @ k.mT).softmax(-1) @ v
    class Not(nn.Module):
        def forward(self, q):
            return q.softmax(-1)
    """
    scope = {"nn": nn, "__name__": "nowhere"}
    exec(textwrap.dedent(text), scope)
    assert attention_kind(scope["Attend"]) == "hand-written"
    assert attention_kind(scope["Not"]) is None
    compiled = type("SomeAttention", (nn.Module,), {"forward": dict.get, "__module__": "nowhere"})
    assert attention_kind(compiled) == "hand-written"


def test_vendored_files_are_not_taken_for_the_family_they_copy() -> None:
    bloom = transformers.models.bloom.modeling_bloom.BloomAttention
    copied = type("BloomAttention", (bloom,), {"forward": Written.forward, "__module__": "bloom"})
    assert families.name_of(copied) not in families.HAND_WRITTEN


@torch.no_grad()
def test_layers_that_are_compiled_or_parametrised(batch, kernel_calls) -> None:
    for cls in (None, Written):
        model = llama(cls)
        wanted = model(**batch).logits
        if cls is not None:
            register_attention(cls)
        first, second = (layer.self_attn for layer in model.model.layers)
        model.model.layers[0].self_attn = torch.compile(first, backend="eager")
        second.scale = nn.Parameter(torch.ones(1))
        torch.nn.utils.parametrize.register_parametrization(second, "scale", nn.Identity())
        report = patch(model)
        assert report.ok and len(report.layers) == 2, str(report)
        kernel_calls.clear()
        visible = batch["attention_mask"].bool()
        assert_close(model(**batch).logits[visible], wanted[visible])
        assert len(kernel_calls) == 2
        unpatch(model)
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
@pytest.mark.parametrize("family", ["llama", "gptj"])
def test_layers_that_are_sharded_by_themselves(family, batch, kernel_calls) -> None:
    torch.manual_seed(0)
    if family == "llama":
        model = llama()
    else:
        config = transformers.GPTJConfig(
            vocab_size=97, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=64
        )
        model = transformers.GPTJForCausalLM(config).eval()
    wanted = model(**batch).logits
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        for module in list(model.modules()):
            if attention_kind(type(module)):
                fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
        report = patch(model)
        assert report.ok and len(report.layers) == 2
        assert all(layer.kind.startswith("FSDP") for layer in report.layers)
        got = model(**batch).logits
        assert len(kernel_calls) == 2
    finally:
        torch.distributed.destroy_process_group()
    visible = batch["attention_mask"].bool()
    assert_close(got[visible], wanted[visible])


REMOTE = """
import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class FarConfig(PreTrainedConfig):
    model_type = "far"

    def __init__(self, hidden_size=32, vocab_size=97, **kwargs):
        self.hidden_size, self.vocab_size = hidden_size, vocab_size
        super().__init__(**kwargs)


class FarAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)

    def forward(self, x):
        q, k, v = (y.unflatten(-1, (4, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        seen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        weights = torch.matmul(q, k.transpose(-1, -2)) * q.shape[-1] ** -0.5
        weights = weights.masked_fill(~seen, float("-inf")).softmax(-1)
        return torch.matmul(weights, v).transpose(1, 2).flatten(2)


class FarForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = FarConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.attn = FarAttention(config)
        self.head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, **kwargs):
        x = self.embed(input_ids)
        return CausalLMOutput(logits=self.head(x + self.attn(x)))
"""


@pytest.mark.parametrize("name", ["flash_two", "fa_two"])
def test_remote_code(name, tmp_path, monkeypatch, batch, kernel_calls) -> None:
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "m"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    folder = tmp_path / "far"
    folder.mkdir()
    (folder / "modeling_far.py").write_text(REMOTE)
    (folder / "config.json").write_text(
        '{"model_type": "far", "architectures": ["FarForCausalLM"], "auto_map": {"AutoConfig": '
        '"modeling_far.FarConfig", "AutoModelForCausalLM": "modeling_far.FarForCausalLM"}}'
    )
    options = {"trust_remote_code": True}
    config = transformers.AutoConfig.from_pretrained(folder, **options)
    AutoModelForCausalLM.from_config(config, **options).save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder, **options)
    wanted = loaded(**batch).logits
    asked = {**options, "attn_implementation": name}
    with pytest.raises(ValueError, match=r"no effect on[^$]*FarAttention.*register_attention"):
        AutoModelForCausalLM.from_pretrained(folder, **asked)
    register_attention(type(loaded.attn))
    assert patch(copy.deepcopy(loaded)).ok
    switched = AutoModelForCausalLM.from_pretrained(folder, **asked)
    kernel_calls.clear()
    assert_close(switched(**batch).logits, wanted)
    assert len(kernel_calls) == 1
    assert check_parity(switched, batch).ok


def test_it_is_public() -> None:
    assert "register_attention" in hf_flash_two.__all__
