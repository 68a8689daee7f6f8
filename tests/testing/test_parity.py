"""`check_parity` and scripts/parity.py: sound models pass, and every way to break them is seen."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
import transformers
from machine import GPU
from models import (
    DECODERS,
    ENCODERS,
    MULTIMODAL,
    SEQUENCE_MODELS,
    Family,
    left_padded,
    named,
    right_padded,
    supported,
    tokens,
)
from transformers import ByT5Tokenizer

from hf_flash_two import AttentionMask, check_parity, patch
from hf_flash_two.hf import interface, patching
from hf_flash_two.hf.packing import document_ids
from hf_flash_two.hf.patching import PatchReport

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")

FAMILIES = {f.name: f for f in DECODERS + SEQUENCE_MODELS + ENCODERS + MULTIMODAL}
LENGTHS = (7, 1, 11, 8)
LENGTH = sum(LENGTHS)
IDS = tokens(2, 7)
PARITY = Path(__file__).parents[2] / "scripts" / "parity.py"
TEXT = ["--text", str(Path(__file__).parents[1] / "data" / "ferry.txt")]


def positions(*lengths: int) -> torch.Tensor:
    return torch.cat([torch.arange(n) for n in lengths])[None]


def left() -> dict[str, torch.Tensor]:
    return {"input_ids": tokens(2, LENGTH), "attention_mask": left_padded(2, LENGTH, 6)}


def right() -> dict[str, torch.Tensor]:
    return {"input_ids": tokens(2, LENGTH), "attention_mask": right_padded(2, LENGTH, 6)}


def packed() -> dict[str, torch.Tensor]:
    return {"input_ids": tokens(2, LENGTH), "position_ids": positions(*LENGTHS).expand(2, -1)}


def rows_packed_differently() -> dict[str, torch.Tensor]:
    rows = [positions(*lengths) for lengths in (LENGTHS, (LENGTH,), (20, 7))]
    return {"input_ids": tokens(3, LENGTH), "position_ids": torch.cat(rows)}


def padded(numbered: bool = False) -> dict[str, torch.Tensor]:
    """Packed rows of one length: three documents and padding, and two documents."""
    rows = [positions(7, 1, 11, 8), positions(20, 7)]
    mask = [[1] * 7 + [2] + [3] * 11 + [0] * 8, [1] * 20 + [2] * 7]
    mask = torch.tensor(mask)
    return {
        "input_ids": tokens(2, LENGTH),
        "position_ids": torch.cat(rows),
        "attention_mask": mask if numbered else (mask != 0).long(),
    }


def boundaries() -> dict[str, torch.Tensor]:
    """Documents by cu_seq_lens alone."""
    ends = torch.tensor((0, *LENGTHS)).cumsum(0).to(torch.int32)
    longest = {"max_length_q": max(LENGTHS), "max_length_k": max(LENGTHS)}
    return {"input_ids": tokens(1, LENGTH), "cu_seq_lens_q": ends, "cu_seq_lens_k": ends, **longest}


def verdicts(report) -> dict[str, bool | None]:
    return {check.name: check.ok for check in report.checks}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [left, right, packed], ids=lambda batch: batch.__name__)
@pytest.mark.parametrize(
    "family", named([FAMILIES[n] for n in ("llama", "qwen2", "gemma2", "gpt-oss", "deepseek-v3")])
)
def test_sound_decoders_pass(family: Family, batch: Callable, dtype: torch.dtype) -> None:
    report = check_parity(
        family.build("sdpa" if family.name == "llama" else "eager").to(dtype), batch()
    )
    assert report.ok, report
    assert len(report.layers) == family.layers
    for layer in report.layers:
        assert layer.uses in ("flash_two, blockwise", "flash_two, fused_cpu")
        limit = 2e-6 if dtype == torch.float32 else 0.1
        for error in layer.errors:
            assert 0 < error.flash_two < limit and 0 < error.eager < limit
    tested = {True: None, False: True}[batch is packed]
    assert verdicts(report)["padding unseen"] is tested
    assert verdicts(report)["documents apart"] is (None if tested else True)


@pytest.mark.parametrize("numbered", [False, True])
@pytest.mark.parametrize("leaks", [False, True])
def test_packed_and_padded(leaks: bool, numbered: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents beside padding are told apart by the check itself, whatever the model does."""
    batch = padded(numbered)
    mask = batch["attention_mask"]
    documents = document_ids(batch["position_ids"], mask).masked_fill(mask == 0, -1)
    same = (documents[:, None, :, None] == documents[:, None, None]) & (documents >= 0)[
        :, None, None
    ]
    seen = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    if leaks:
        same = (batch["attention_mask"] != 0)[:, None, None]
    attention = interface.flash_attention

    def attend(*args, mask, **kwargs):
        return attention(*args, mask=AttentionMask.from_dense(same & seen), **kwargs)

    monkeypatch.setattr(interface, "flash_attention", attend)
    report = check_parity(FAMILIES["llama"].build("eager"), batch)
    assert report.ok is not leaks, report
    assert verdicts(report)["documents apart"] is not leaks
    assert verdicts(report)["padding unseen"]
    check = next(check for check in report.checks if check.name == "documents apart")
    assert "5 documents" in check.detail


@pytest.mark.parametrize(
    "batch", [rows_packed_differently, boundaries], ids=lambda batch: batch.__name__
)
def test_other_ways_to_pack(batch: Callable) -> None:
    report = check_parity(FAMILIES["llama"].build("flash_two"), batch())
    assert report.ok, report
    count = 7 if batch is rows_packed_differently else 4
    check = next(check for check in report.checks if check.name == "documents apart")
    assert check.ok and f"{count} documents" in check.detail


@pytest.mark.parametrize(
    "family",
    named(
        [FAMILIES[n] for n in ("t5", "bart", "bert", "modernbert", "vit", "siglip")] + MULTIMODAL
    ),
)
def test_sound_encoders_and_multimodal_models_pass(family: Family) -> None:
    supported(family)
    report = check_parity(family.build("eager"), family.inputs())
    assert report.ok, report
    assert len(report.layers) == family.layers
    assert all(layer.output and layer.gradient for layer in report.layers), report
    assert verdicts(report)["padding unseen"] is (None if family.name == "vit" else True)


@pytest.mark.parametrize("seed", range(6))
def test_rounding_of_probabilities_is_no_fault(seed: int) -> None:
    """Computed anew in float32, they may cost a gradient more than three times eager's error."""
    model = FAMILIES["bert"].build("eager", seed=seed, vocab_size=384)
    batch = {"input_ids": tokens(4, 60), "attention_mask": right_padded(4, 60, 20)}
    report = check_parity(model, batch)
    assert report.ok, report


def lost_padding(attend, query, key, value, mask, **rest):
    return attend(query, key, value, mask=AttentionMask.causal(), **rest)


def lost_causality(attend, query, key, value, mask, **rest):
    return attend(query, key, value, mask=AttentionMask.full(), **rest)


def one_key_leaks(attend, query, key, value, mask, **rest):
    """The last token of the second document sees one key of the first."""
    visible = mask.to_dense(query.shape[2], key.shape[2]).clone()
    visible[:, :, LENGTHS[0], 2] = True
    return attend(query, key, value, mask=visible, **rest)


def wrong_scale(attend, query, key, value, mask, scale, **rest):
    return attend(query, key, value, mask=mask, scale=1.03 * scale, **rest)


def lost_softcap(attend, query, key, value, softcap, **rest):
    return attend(query, key, value, softcap=None, **rest)


def lost_sinks(attend, query, key, value, sinks, **rest):
    return attend(query, key, value, sinks=None, **rest)


def sinks_without_gradient(attend, query, key, value, sinks, **rest):
    return attend(query, key, value, sinks=sinks.detach(), **rest)


def wrong_gradient_of_keys(attend, query, key, value, **rest):
    return attend(query, 0.1 * key + 0.9 * key.detach(), value, **rest)


def less_precision(attend, query, key, value, **rest):
    rounded = (x.to(torch.bfloat16).to(x.dtype) for x in (query, key, value))
    return attend(*rounded, **rest)


def other_heads(attend, query, key, value, **rest):
    return attend(query, key.flip(1), value.flip(1), **rest)


def nan_in_padding(attend, query, key, value, return_lse, **rest):
    out, lse = attend(query, key, value, return_lse=True, **rest)
    return out.masked_fill((lse == -torch.inf)[..., None], torch.nan)


def nothing_of_ours(attend, query, key, value, mask, scale, **rest):
    visible = mask.to_dense(query.shape[2], key.shape[2])
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, visible, scale=scale, enable_gqa=True
    )


LAYERS, MODEL, APART = "attention layers", "whole model", "documents apart"
PADDING, FINITE, RAN = "padding unseen", "finite", "flash_two"


BROKEN = [
    (lost_padding, "llama", left, {LAYERS, MODEL, PADDING}),
    (lost_padding, "llama", packed, {LAYERS, MODEL, APART}),
    (lost_causality, "llama", packed, {LAYERS, MODEL, APART}),
    (one_key_leaks, "llama", packed, {LAYERS, MODEL, APART}),
    (wrong_scale, "llama", right, {LAYERS, MODEL}),
    (lost_softcap, "gemma2", right, {LAYERS, MODEL}),
    (lost_sinks, "gpt-oss", right, {LAYERS, MODEL}),
    (sinks_without_gradient, "gpt-oss", right, {LAYERS}),
    (wrong_gradient_of_keys, "llama", right, {LAYERS, MODEL}),
    (less_precision, "llama", right, {LAYERS, MODEL}),
    (other_heads, "llama", right, {LAYERS, MODEL}),
    # What is hidden counts nothing, NaN neither: the whole model's real tokens are right.
    (nan_in_padding, "llama", left, {LAYERS, PADDING, FINITE}),
    (nothing_of_ours, "llama", right, {RAN}),
]


@pytest.mark.parametrize(
    ("sabotage", "name", "batch", "failures"),
    [pytest.param(*case, id=f"{case[0].__name__}-{case[2].__name__}") for case in BROKEN],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_broken_attention_is_seen(
    sabotage: Callable, name: str, batch: Callable, failures: set, dtype, monkeypatch
) -> None:
    attend = interface.flash_attention
    monkeypatch.setattr(interface, "flash_attention", lambda *a, **k: sabotage(attend, *a, **k))
    report = check_parity(FAMILIES[name].build("eager").to(dtype), batch())
    failed = {name for name, ok in verdicts(report).items() if ok is False}
    if dtype == torch.bfloat16:  # 3 % is little where every matrix product has lost 0.4
        failures = {wrong_scale: {LAYERS}, less_precision: set()}.get(sabotage, failures)
    assert failed == failures, report
    assert report.ok == (not failures) == ("FAILED" not in str(report))


@pytest.mark.parametrize("name", ["llama", "bloom", "patched bloom"])
def test_the_model_is_left_as_it_was(name: str) -> None:
    if name == "llama":
        model = FAMILIES["llama"].build("sdpa")
    else:
        config = transformers.BloomConfig(vocab_size=89, hidden_size=32, n_layer=2, n_head=4)
        model = transformers.BloomForCausalLM(config)
    if name == "patched bloom":
        patch(model)
    model.train()
    model.get_submodule(next(n for n, m in model.named_modules() if "norm" in n)).eval()
    next(model.parameters()).requires_grad_(False)

    def state():
        modules = [
            (m.training, vars(m).get("forward"), len(m._forward_hooks), len(m._forward_pre_hooks))
            for m in model.modules()
        ]
        weights = [(p.data_ptr(), p.dtype, p.requires_grad, p.grad) for p in model.parameters()]
        return modules, weights, model.config._attn_implementation

    logits = model.eval()(tokens(1, 9)).logits
    model.train()
    assert check_parity(model, left()).ok

    def stop(module: torch.nn.Module, args: tuple) -> None:
        if next(module.parameters()).dtype == torch.float64:
            raise InterruptedError

    handle = model.register_forward_pre_hook(stop)
    before, generator = state(), torch.get_rng_state()
    with pytest.raises(InterruptedError):
        check_parity(model, left())
    assert state() == before
    assert torch.equal(torch.get_rng_state(), generator)
    handle.remove()
    assert torch.equal(model.eval()(tokens(1, 9)).logits, logits)


def test_adapters_under_autocast() -> None:
    """Weights in float32, computation in bfloat16: mixed dtypes arrive at the attention."""
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(FAMILIES["qwen3"].build("flash_two"), config)
    with torch.autocast("cpu", torch.bfloat16):
        report = check_parity(model, left())
    assert report.ok, report
    assert "in bfloat16, against eager in float32" in report.precision
    assert all(1e-4 < layer.output.flash_two < 0.1 for layer in report.layers)
    assert report.layers[0].name == "base_model.model.model.layers.0.self_attn"


def test_checkpointed_and_compiled_models() -> None:
    model = FAMILIES["llama"].build("flash_two").train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    report = check_parity(torch.compile(model), packed())
    assert report.ok, report
    assert len(report.layers) == 2 and model.is_gradient_checkpointing


def test_a_user_s_mask_of_four_dimensions() -> None:
    visible = torch.ones(2, 1, LENGTH, LENGTH, dtype=torch.bool).tril()
    visible[0, :, :, 3:6] &= torch.eye(LENGTH, dtype=torch.bool)[:, 3:6]
    report = check_parity(
        FAMILIES["llama"].build("eager"),
        {"input_ids": tokens(2, LENGTH), "attention_mask": torch.where(visible, 0.0, -1e9)},
    )
    assert report.ok, report
    assert verdicts(report)[PADDING] is verdicts(report)[APART] is None


def test_layers_that_do_not_use_it_are_named(monkeypatch) -> None:
    """They are no failure, but the table says what they use and why."""
    family = FAMILIES["llama"]
    monkeypatch.setattr(
        "hf_flash_two.testing.parity.patching.patched", partly_patched("model.layers.1.self_attn")
    )
    report = check_parity(family.build("eager"), left())
    assert report.ok, report
    assert [layer.output is None for layer in report.layers] == [False, True]
    assert report.layers[1].uses == "eager, left alone"
    assert "1 of 2 attention layers" in report.checks[-1].detail


def partly_patched(left_alone: str):
    @contextlib.contextmanager
    def patched(model):
        with whole(model) as report:
            layers = [
                replace(layer, uses="eager", reason="left alone")
                if layer.name == left_alone
                else layer
                for layer in report.layers
            ]
            yield PatchReport(tuple(layers))

    whole = patching.patched
    return patched


@pytest.mark.parametrize(
    "batch, error, message",
    [
        (IDS, TypeError, r"^batch: expected the arguments of .* by name.*, got Tensor$"),
        ([1, 2], TypeError, r"^batch: expected .*, got list$"),
        (
            {"input_ids": IDS.tolist()},
            TypeError,
            r"^batch\['input_ids'\]: expected a tensor, got list",
        ),
        ({"input_ids": IDS.numpy()}, TypeError, "got ndarray; .*return_tensors='pt'"),
        ({"input_ids": IDS[0]}, ValueError, r"expected \[batch, tokens\], got \[7\]"),
        (
            {"inputs_embeds": torch.ones(2, 7)},
            ValueError,
            r"expected \[batch, tokens, hidden size\], got \[2, 7\]",
        ),
    ],
)
def test_says_what_a_batch_is(batch, error, message):
    with pytest.raises(error, match=message):
        check_parity(FAMILIES["llama"].build("eager"), batch)


def test_says_how_to_come_by_a_model():
    with pytest.raises(TypeError, match="^model: expected a loaded model.*got 'org/name'; load it"):
        check_parity("org/name", {"input_ids": IDS})


def test_what_cannot_be_checked_is_refused() -> None:
    with pytest.raises(ValueError, match="^model: expected a Transformers model"):
        check_parity(torch.nn.Linear(2, 2), {})
    with pytest.raises(
        ValueError, match="^model: expected floating-point parameters, got Identity"
    ):
        check_parity(torch.nn.Identity(), {})
    with pytest.raises(ValueError, match="^pixel_values: expected a batch of text alone"):
        batch = packed() | {"pixel_values": torch.zeros(3, 4, 4)}
        check_parity(FAMILIES["llama"].build("eager"), batch)


# scripts/parity.py


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """The folder of a saved model over bytes."""

    def save(name: str) -> str:
        folder = tmp_path_factory.getbasetemp() / f"parity-{name}"
        if not folder.exists():
            tokenizer = ByT5Tokenizer()
            model = FAMILIES[name].build("eager", vocab_size=len(tokenizer))
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        return str(folder)

    return save


@pytest.fixture(scope="module")
def parity():
    spec = importlib.util.spec_from_file_location("parity", PARITY)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "options", "shown"),
    [
        ("llama", "", "padding unseen    other tokens"),
        ("llama", "--padding-side left --dtype bfloat16", "in bfloat16, against eager in float32"),
        ("llama", "--pack --max-length 100", "4 documents"),
        ("bert", "--max-length 60", "2 of 2 attention layers"),
        ("t5", "--max-length 33", "6 of 6 attention layers"),
    ],
)
def test_script_on_sound_models(name, options, shown, checkpoint, parity, capsys) -> None:
    supported(FAMILIES[name])
    assert parity.main([checkpoint(name), *TEXT, *options.split()]) == 0
    assert shown in capsys.readouterr().out


def test_script_on_a_text_of_one_s_own(checkpoint, parity, tmp_path, capsys) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("Ähnliches gilt für Umlaute. " * 12, encoding="utf-8")
    assert parity.main([checkpoint("llama"), "--text", str(text), "--max-length", "120"]) == 0
    with pytest.raises(SystemExit) as stopped:
        parity.main([checkpoint("llama"), "--text", str(text), "--max-length", "250"])
    assert stopped.value.code == 2
    assert "--text: 579 tokens are needed and it has 361" in capsys.readouterr().err


def test_script_on_a_batch_of_one_s_own(checkpoint, parity, tmp_path, capsys) -> None:
    """From a collator, with its documents, and for a model that has no tokenizer."""
    torch.save(packed(), tmp_path / "batch.pt")
    batch = ["--batch", str(tmp_path / "batch.pt")]
    assert parity.main([checkpoint("llama"), *batch]) == 0
    assert "8 documents" in capsys.readouterr().out
    torch.save(FAMILIES["vit"].inputs(), tmp_path / "batch.pt")
    FAMILIES["vit"].build("eager").save_pretrained(tmp_path / "vit")
    assert parity.main([str(tmp_path / "vit"), *batch]) == 0


@pytest.mark.parametrize("content", [b"hello", b"", [1, 2]], ids=str)
def test_script_refuses_other_files(content, checkpoint, parity, tmp_path, capsys) -> None:
    path = tmp_path / "batch.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(SystemExit) as stopped:
        parity.main([checkpoint("llama"), "--batch", str(path)])
    assert stopped.value.code == 2
    assert "--batch: expected a dict" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"input_ids": tokens(2, 9) + 384}, r"expected tokens from 0 to 383, got \d\d\d$"),
        ({"input_ids": tokens(2, 9) - 384}, r"expected tokens from 0 to 383, got -\d\d\d$"),
        (
            {"input_ids": tokens(2, 9)[:0]},
            r"input_ids of .*batch.pt is empty.* \[0, 9\]",
        ),
        ({"input_ids": tokens(2, 9)[:, :0]}, r"input_ids of .*batch.pt is empty.* \[2, 0\]"),
        ({"ids": tokens(2, 9)}, "LlamaForCausalLM needs input_ids, and .*batch.pt has ids"),
        ({}, "LlamaForCausalLM needs input_ids, and .*batch.pt has nothing"),
    ],
    ids=["too large", "negative", "no rows", "no tokens", "another name", "nothing"],
)
def test_script_refuses_other_batches(batch, message, checkpoint, parity, tmp_path, capsys) -> None:
    path = tmp_path / "batch.pt"
    torch.save(batch, path)
    with pytest.raises(SystemExit) as stopped:
        parity.main([checkpoint("llama"), "--batch", str(path)])
    assert stopped.value.code == 2
    assert re.search(f"--batch: {message}", capsys.readouterr().err, re.MULTILINE)


def test_script_refuses_a_text_in_another_encoding(checkpoint, parity, tmp_path, capsys) -> None:
    (tmp_path / "notes.txt").write_bytes("Ähnliches".encode("latin-1") * 99)
    with pytest.raises(SystemExit) as stopped:
        parity.main([checkpoint("llama"), "--text", str(tmp_path / "notes.txt")])
    assert stopped.value.code == 2
    assert "--text: expected text in UTF-8, and cannot read" in capsys.readouterr().err


def test_script_refuses_what_is_no_model(checkpoint, parity, tmp_path, capsys) -> None:
    damaged = shutil.copytree(checkpoint("llama"), tmp_path / "damaged")
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    for model, message in (
        (damaged, "cannot load .*damaged"),
        (weights, "there is no folder .*model.safetensors"),
        ("./nowhere", "there is no folder ./nowhere"),
        (tmp_path / "nowhere", "there is no folder .*nowhere"),
    ):
        with pytest.raises(SystemExit) as stopped:
            parity.main([str(model), *TEXT])
        assert stopped.value.code == 2
        assert re.search(f"argument MODEL: {message}", capsys.readouterr().err)


def test_script_refuses_a_tokenizer_of_another_model(parity, tmp_path, capsys) -> None:
    FAMILIES["llama"].build("eager", vocab_size=100).save_pretrained(tmp_path)
    ByT5Tokenizer().save_pretrained(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        parity.main([str(tmp_path), *TEXT])
    assert stopped.value.code == 2
    assert "MODEL: expected tokens from 0 to 99, got 1" in capsys.readouterr().err


def test_script_on_broken_attention(checkpoint, parity, monkeypatch, capsys) -> None:
    attend = interface.flash_attention
    monkeypatch.setattr(interface, "flash_attention", lambda *a, **k: wrong_scale(attend, *a, **k))
    assert parity.main([checkpoint("llama"), *TEXT, "--max-length", "50"]) == 1
    assert "FAILED  attention layers" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--dtype float8", "argument --dtype: "),
        ("--max-length 2", "--max-length: expected at least 16, got 2"),
        ("--max-length 300", "--max-length: .* takes at most 256, got 300"),
        ("--max-length x", "argument --max-length: "),
        ("--text nowhere.txt", "--text: there is no file nowhere.txt"),
        ("--pack --padding-side left", "--padding-side: packed documents have no padding"),
        ("--batch nowhere.pt", "--batch: there is no file nowhere.pt"),
        (f"--batch {__file__} --pack", "--batch: it stands instead of"),
        ("--device nowhere", "--device: "),
    ],
)
def test_script_refuses_wrong_usage(options, message, checkpoint, parity, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        parity.main([checkpoint("llama"), *options.split()])
    assert stopped.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_script_refuses_to_pack_what_takes_no_positions(checkpoint, parity, capsys) -> None:
    supported(FAMILIES["t5"])
    with pytest.raises(SystemExit) as stopped:
        parity.main([checkpoint("t5"), "--pack"])
    assert stopped.value.code == 2
    assert "--pack: T5ForConditionalGeneration takes no position_ids" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("batch", "code", "shown"),
    [
        ({"input_ids": tokens(2, 9)}, 0, f"flash_two, {'triton' if GPU else 'fused_cpu'}"),
        ({"input_ids": tokens(2, 9), "window_size": 1}, 2, "TypeError: window_size"),
        (None, 2, "error: argument MODEL: there is no folder"),
    ],
    ids=["sound", "not for this model", "no model"],
)
def test_script_as_a_command(batch, code, shown, checkpoint, tmp_path) -> None:
    """What goes wrong unforeseen is no failed check."""
    model = tmp_path / "nothing" if batch is None else checkpoint("llama")
    torch.save(batch, tmp_path / "batch.pt")
    finished = subprocess.run(
        [sys.executable, PARITY, model, "--batch", tmp_path / "batch.pt"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert finished.returncode == code
    assert shown in finished.stdout + finished.stderr
