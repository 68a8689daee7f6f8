"""scripts/finetune.py: what it learns, resumes, shares out over processes, and refuses."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import multiprocessing
import os
import pickle
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from safetensors import SafetensorError
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    ByT5Tokenizer,
)

SCRIPT = Path(__file__).parent.parent / "scripts" / "finetune.py"
sys.path.insert(0, str(SCRIPT.parent))
import finetune  # noqa: E402
import finetune_checkpoints  # noqa: E402

TEXT = Path(__file__).parent / "data" / "ferry.txt"
SMALL = "--max-length 64 --batch-size 4 --steps 12 --warmup-steps 2 --save-every 3".split()
SMALL += "--eval-fraction 0.01 --sample-tokens 5".split()
WEIGHTS = "__0_0.distcp"  # of a checkpoint, the file of the first process

# A server that has imported what takes long and then forks: each run is a fresh process.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["accelerate", "hf_flash_two", "transformers.models.llama.modeling_llama", "pytest"]
)


# The reducer of a model that outlives its process group may wait for ever as it is freed.
NOTHING_PARALLEL_OUTLIVES_THE_GROUP = f"""
import gc, sys
sys.path.insert(0, {str(SCRIPT.parent)!r})
import finetune
end = finetune.Accelerator.end_training
def checked(self):
    kinds = {{type(x).__name__ for x in gc.get_objects()}}
    left = [kind for kind in kinds if kind.startswith(("DistributedDataParallel", "FSDP"))]
    assert not left, left
    end(self)
finetune.Accelerator.end_training = checked
finetune.main()
"""


def kill_half_way_through_a_checkpoint() -> None:
    save, calls = dcp.save, []

    def save_half(state, checkpoint_id: Path) -> None:
        calls.append(checkpoint_id)
        save(state, checkpoint_id=checkpoint_id)
        if len(calls) == 2:
            truncate(checkpoint_id / WEIGHTS)
            os.kill(os.getpid(), signal.SIGKILL)

    dcp.save = save_half


def kill_before(owner: type, name: str, call: int) -> None:
    original, calls = getattr(owner, name), []

    def method(*args, **kwargs):
        calls.append(args)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, method)


def kill_before_a_checkpoint_gets_its_name() -> None:
    # Call 1 gives the log its name, calls 2 and 3 the checkpoints of steps 3 and 6.
    kill_before(Path, "replace", 3)


def kill_half_way_through_removing_a_checkpoint() -> None:
    def remove_half(path: Path) -> None:
        (path / WEIGHTS).unlink()
        os.kill(os.getpid(), signal.SIGKILL)

    shutil.rmtree = remove_half


def kill_between_accumulation_and_update() -> None:
    kill_before(torch.optim.AdamW, "step", 8)


def kill_while_the_model_is_saved() -> None:
    kill_before(finetune.PreTrainedTokenizerBase, "save_pretrained", 1)


def wait_before_the_fifth_update() -> None:
    original, calls = torch.optim.AdamW.step, []

    def step(*args, **kwargs):
        calls.append(args)
        if len(calls) == 5:
            signal.pause()
        return original(*args, **kwargs)

    torch.optim.AdamW.step = step


def allow_files_of(limit: int) -> None:
    """In what a run writes, but for its words: as on a disk that is nearly full."""
    writing = finetune.writing

    @contextlib.contextmanager
    def limited(path: Path):
        with writing(path):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            try:
                yield
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)

    finetune.writing = finetune_checkpoints.writing = limited


def fill_the_disk() -> None:
    allow_files_of(100)


def fill_the_disk_but_for_the_log() -> None:
    allow_files_of(10_000)


def register_a_broken_attention() -> None:
    def broken(*args, **kwargs):
        raise KeyError("no such kernel")

    AttentionInterface.register("broken", broken)


def call(arguments: list[str], output: Path, sabotage: Callable[[], None] | None) -> None:
    sys.stdout = sys.stderr = open(output, "a", buffering=1)
    sys.argv = [str(SCRIPT), *arguments]
    torch.set_num_threads(1)
    if sabotage:
        sabotage()
    finetune.main()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents shorter and longer than a row, so that rows differ in their number of targets."""
    path = tmp_path_factory.mktemp("data") / "paragraphs.jsonl"
    paragraphs = [{"text": part} for part in TEXT.read_text(encoding="utf-8").split("\n\n")]
    path.write_text("".join(json.dumps(record) + "\n" for record in paragraphs))
    return path


@pytest.fixture(scope="module")
def run(data: Path) -> Callable[..., int]:
    """The exit code of a run in a process of its own; its words go to ``folder``.txt."""

    def run(folder: Path, *arguments: str, sabotage: Callable[[], None] | None = None) -> int:
        arguments = ["--output-dir", str(folder), "--data", str(data), *SMALL, *arguments]
        output = folder.with_suffix(".txt")
        process = PROCESSES.Process(target=call, args=(arguments, output, sabotage))
        process.start()
        process.join()
        return process.exitcode

    return run


@pytest.fixture(scope="module")
def rows(data: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """tokens, positions that those runs train on, and that they hold out."""
    documents = finetune.load_documents(str(data), "text")
    packed = finetune.pack(finetune.tokenize(documents, ByT5Tokenizer()), 64)
    return dict(zip(("training", "held out"), finetune.split(*packed, 0.01), strict=True))


def untrained(**changes) -> finetune.PreTrainedModel:
    """The small model that those runs begin with."""
    settings = {
        "model": None, "seed": 0, "attn_implementation": "eager", "max_length": 64,
        "precision": "no", "lora_rank": 0, "gradient_checkpointing": False,
    }  # fmt: skip
    return finetune.load_model(SimpleNamespace(**settings | changes), ByT5Tokenizer())


def log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [entry["loss"] for entry in log(folder)[1:]]


def words(folder: Path) -> str:
    return folder.with_suffix(".txt").read_text()


@pytest.fixture(scope="module")
def finished(run: Callable[..., int], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("finetune") / "finished"
    assert run(folder, "--compare", "eager") == 0, words(folder)
    return folder


def separate_losses(model, rows: torch.Tensor, positions: torch.Tensor) -> list[torch.Tensor]:
    """The losses of every document piece of packed rows, each computed on its own."""
    pieces = []
    for tokens, position in zip(rows, positions, strict=True):
        starts = [i for i, p in enumerate(position.tolist()) if p == 0] + [len(tokens)]
        for begin, end in zip(starts[:-1], starts[1:], strict=True):
            if end - begin > 1:
                piece = tokens[None, begin:end]
                logits = model(input_ids=piece, use_cache=False).logits[0, :-1]
                pieces.append(F.cross_entropy(logits, piece[0, 1:], reduction="none"))
    return pieces


# What a run does


def test_loss_falls_and_all_steps_are_logged(finished: Path) -> None:
    entries = log(finished)
    assert [entry["step"] for entry in entries] == list(range(13))
    assert sum(losses(finished)[-3:]) / 3 < losses(finished)[0] - 1.5
    assert entries[-1]["perplexity"] < entries[0]["perplexity"] / 4


def test_first_loss_is_the_mean_over_documents_taken_alone(finished: Path, rows) -> None:
    model = untrained().eval()
    tokens, positions = rows["training"]
    chosen = finetune.rows_of_step(0, 4, len(tokens), seed=0)
    assert (positions[chosen][:, 1:] == 0).any(), "no document begins inside these rows"
    expected = torch.cat(separate_losses(model, tokens[chosen], positions[chosen])).mean()
    expected.backward()
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters()))
    assert log(finished)[1]["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert log(finished)[1]["grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_saved_model_reloads_with_the_logged_perplexity(finished: Path, rows) -> None:
    model = AutoModelForCausalLM.from_pretrained(finished / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(finished / "model")
    assert tokenizer("Reloads.").input_ids == ByT5Tokenizer()("Reloads.").input_ids
    with torch.no_grad():
        pieces = separate_losses(model, *rows["held out"])
    expected = torch.cat(pieces).mean().exp()
    assert log(finished)[-1]["perplexity"] == pytest.approx(expected.item(), rel=1e-4)


def test_comparison_with_eager_is_shown(finished: Path) -> None:
    for quantity in ("loss", "logits", "gradients"):
        found = re.search(rf"^{quantity} .* (\S+) +1e-04$", words(finished), re.MULTILINE)
        assert found and float(found[1]) < 1e-4
    assert re.search(r"^greedy sample +equal +equal$", words(finished), re.MULTILINE)


def test_comparison_fails_loudly_when_the_attentions_differ(finished: Path) -> None:
    def without_mask(module, query, key, value, attention_mask, **kwargs):
        out = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register("without_mask", without_mask)
    model = AutoModelForCausalLM.from_pretrained(finished / "model")
    documents = finetune.tokenize(["A first text.", "A second one, longer."], ByT5Tokenizer())
    setting = (ByT5Tokenizer(), finetune.pack(documents, 36), "The ", model.device)
    with pytest.raises(SystemExit, match="flash_two and without_mask disagree"):
        finetune.compare(("flash_two", "without_mask"), finished / "model", *setting)


def test_only_the_newest_checkpoints_stay(finished: Path) -> None:
    names = sorted(path.name for path in finished.iterdir())
    assert names == ["losses.jsonl", "model", "step-00000009", "step-00000012"]


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["--micro-batch-size", "1"], id="accumulation"),
        pytest.param(["--gradient-checkpointing"], id="gradient-checkpointing"),
        pytest.param(["--attn-implementation", "eager"], id="eager"),
    ],
)
def test_losses_do_not_depend_on(run, arguments: list[str], finished: Path, tmp_path: Path):
    assert run(tmp_path / "run", *arguments) == 0, words(tmp_path / "run")
    assert losses(tmp_path / "run") == pytest.approx(losses(finished), rel=1e-4)


def test_bfloat16_learns_the_same_within_its_precision(run, finished: Path, tmp_path: Path):
    assert run(tmp_path / "run", "--precision", "bf16") == 0, words(tmp_path / "run")
    # Single steps part by as much as their rows differ; what is learnt does not.
    found, exact = losses(tmp_path / "run"), losses(finished)
    assert statistics.mean(found) == pytest.approx(statistics.mean(exact), rel=2e-2)
    assert found == pytest.approx(exact, rel=0.1) and found != exact


@pytest.mark.parametrize(
    "launch",
    [
        pytest.param("torch.distributed.run --standalone --nproc_per_node=2", id="torchrun"),
        pytest.param("accelerate.commands.launch --cpu --num_processes 2", id="accelerate"),
    ],
)
def test_two_processes_give_the_losses_of_one(
    launch: str, data: Path, finished: Path, tmp_path: Path
) -> None:
    folder, script = tmp_path / "two", tmp_path / "script.py"
    script.write_text(NOTHING_PARALLEL_OUTLIVES_THE_GROUP)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            *launch.split(),
            str(script),
            "--output-dir",
            str(folder),
            "--data",
            str(data),
            *SMALL,
        ]
        + ["--micro-batch-size", "1"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "2 x cpu" in done.stdout
    for key in ("loss", "grad_norm"):
        ours, theirs = ([entry[key] for entry in log(f)[1:]] for f in (folder, finished))
        assert ours == pytest.approx(theirs, rel=1e-4), key
    ours, theirs = log(folder)[-1]["perplexity"], log(finished)[-1]["perplexity"]
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_lora_trains_adapters_and_saves_them_merged(run, tmp_path: Path) -> None:
    base, folder = tmp_path / "base", tmp_path / "lora"
    arguments = ["--model", str(base), "--lora-rank", "4", "--learning-rate", "1e-2"]
    model = untrained()
    model.config.attention_dropout = 0.3
    model.save_pretrained(base)
    ByT5Tokenizer().save_pretrained(base)

    assert run(tmp_path / "whole", *arguments) == 0, words(tmp_path / "whole")
    assert run(folder, *arguments, sabotage=kill_between_accumulation_and_update) == -9
    assert run(folder, *arguments, "--resume") == 0, words(folder)
    assert log(folder) == log(tmp_path / "whole")
    assert log(folder)[-1]["perplexity"] < log(folder)[0]["perplexity"]
    saved = dcp.FileSystemReader(folder / "step-00000012").read_metadata().state_dict_metadata
    assert saved and all("lora_" in name for name in saved)
    before = AutoModelForCausalLM.from_pretrained(base).state_dict()
    after = AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "_proj" in name}


# Kill and resume


@pytest.mark.parametrize(
    ("sabotage", "resumed_at"),
    [
        (kill_half_way_through_a_checkpoint, 3),
        (kill_before_a_checkpoint_gets_its_name, 3),
        (kill_half_way_through_removing_a_checkpoint, 6),
        (kill_between_accumulation_and_update, 6),
        (kill_while_the_model_is_saved, 12),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_resume_continues_to_the_same_losses(
    run, sabotage: Callable[[], None], resumed_at: int, finished: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    assert run(folder, "--keep", "1", sabotage=sabotage) == -signal.SIGKILL
    assert run(folder, "--keep", "1", "--resume") == 0, words(folder)
    assert re.findall(r"steps  (\d+) to 12", words(folder)) == ["0", str(resumed_at)]
    assert log(folder) == log(finished)
    assert sorted(p.name for p in folder.iterdir()) == ["losses.jsonl", "model", "step-00000012"]
    ours, theirs = (
        AutoModelForCausalLM.from_pretrained(path / "model").state_dict()
        for path in (folder, finished)
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_resume_after_a_kill_from_outside(run, data: Path, finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    arguments = ["--output-dir", str(folder), "--data", str(data), *SMALL]
    sabotage = wait_before_the_fifth_update
    process = PROCESSES.Process(target=call, args=(arguments, tmp_path / "run.txt", sabotage))
    process.start()
    while process.is_alive() and not ((folder / "losses.jsonl").exists() and len(log(folder)) == 5):
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL and len(losses(folder)) == 4
    assert run(folder, "--resume") == 0, words(folder)
    assert log(folder) == log(finished)


def test_resume_without_a_checkpoint_starts_at_the_beginning(
    run, finished: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "step-00000003.partial").mkdir()
    (folder / "step-00000003.partial" / WEIGHTS).write_bytes(b"half")
    (folder / "losses.partial").write_bytes(b"half")
    (folder / "losses.jsonl").write_text('{"step": 0, "perpl')
    assert run(folder, "--resume") == 0, words(folder)
    assert log(folder) == log(finished)
    assert not list(folder.glob("*.partial"))


def test_resume_refuses_another_run(run, finished: Path) -> None:
    before = (finished / "losses.jsonl").read_bytes()
    assert run(finished, "--resume", "--seed", "1") == 1
    assert re.search(r"--resume: .*step-00000012 was written with seed 0, not 1", words(finished))
    assert (finished / "losses.jsonl").read_bytes() == before


def test_every_option_identifies_a_run_unless_it_may_change(monkeypatch, tmp_path) -> None:
    args = parsed(monkeypatch, tmp_path)
    assert vars(args).keys() >= set(finetune.CHANGEABLE)
    args.brand_new = "one that nobody thought of"
    assert finetune.identity_of(args, torch.ones(2, 3)).keys() == {
        "model", "max_length", "batch_size", "steps", "learning_rate", "warmup_steps", "seed",
        "weight_decay", "max_grad_norm", "eval_fraction", "precision", "lora_rank", "text",
        "brand_new",
    }  # fmt: skip


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path: Path) -> None:
    """Of the weights, at which torch.distributed.checkpoint does not look."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def replace_by_a_file(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("Remember the milk.")


def replace_by_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES = {
    "truncated": lambda folder: truncate(folder / WEIGHTS),
    "empty": lambda folder: (folder / WEIGHTS).write_bytes(b""),
    "bit flipped": lambda folder: flip_a_bit(folder / WEIGHTS),
    "missing": lambda folder: (folder / WEIGHTS).unlink(),
    "index missing": lambda folder: (folder / ".metadata").unlink(),
    "another index": lambda folder: (folder / ".metadata").write_bytes(pickle.dumps({})),
    "another run": lambda folder: (folder / "run.json").write_text('{"step": 12}'),
    "checksums truncated": lambda folder: truncate(folder / "SHA256SUMS"),
    "checksums missing": lambda folder: (folder / "SHA256SUMS").unlink(),
    "checksums are no text": lambda folder: (folder / "SHA256SUMS").write_bytes(b"\xff"),
    "one file too many": lambda folder: (folder / "__1_0.distcp").write_bytes(b"more"),
    "a folder for a file": lambda folder: replace_by_a_folder(folder / WEIGHTS),
    "a file": replace_by_a_file,
    "empty folder": lambda folder: [path.unlink() for path in folder.iterdir()],
}
DAMAGED = pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)


def copied(finished: Path, folder: Path) -> tuple[Path, dict]:
    """A run's folder to damage, and what says that it is the same run."""
    shutil.copytree(finished, folder)
    return folder, json.loads((folder / "step-00000012" / "run.json").read_text())["identity"]


class TouchesWhenUnpickled:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


@DAMAGED
def test_a_damaged_checkpoint_is_named_and_an_older_one_is_taken(
    damage: Callable[[Path], None], finished: Path, capsys, tmp_path: Path
) -> None:
    folder, identity = copied(finished, tmp_path / "run")
    newest, run = finetune.newest_checkpoint(folder, identity)
    assert newest == folder / "step-00000012" and run["step"] == 12
    assert not capsys.readouterr().err
    damage(newest)
    older, run = finetune.newest_checkpoint(folder, identity)
    assert older == folder / "step-00000009" and run["step"] == 9
    assert f"warning: {newest} is no whole checkpoint" in capsys.readouterr().err


@DAMAGED
def test_where_no_checkpoint_is_whole_nothing_is_written_over(
    damage: Callable[[Path], None], finished: Path, tmp_path: Path
) -> None:
    folder, identity = copied(finished, tmp_path / "run")
    for path in (folder / "step-00000012", folder / "step-00000009"):
        damage(path)
    with pytest.raises(ValueError, match="no checkpoint in .* is whole; name another"):
        finetune.newest_checkpoint(folder, identity)


def test_the_checksums_are_those_of_sha256sum(finished: Path) -> None:
    folder = finished / "step-00000012"
    listed = (folder / "SHA256SUMS").read_text().splitlines()
    for name in (WEIGHTS, "run.json", ".metadata"):
        assert f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}" in listed


def test_no_object_of_a_damaged_checkpoint_is_unpickled(finished: Path, tmp_path: Path) -> None:
    folder, identity = copied(finished, tmp_path / "run")
    trap = pickle.dumps(TouchesWhenUnpickled(tmp_path / "touched"))
    (folder / "step-00000012" / ".metadata").write_bytes(trap)
    assert finetune.newest_checkpoint(folder, identity)[1]["step"] == 9
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    ("log_is", "damage"), [("missing", "truncated"), ("short", "a file")], ids=["missing", "short"]
)
def test_resume_mends_the_log_and_replaces_the_damaged_checkpoint(
    run, log_is: str, damage: str, finished: Path, tmp_path: Path
) -> None:
    folder, _ = copied(finished, tmp_path / "run")
    DAMAGES[damage](folder / "step-00000012")
    (folder / "step-00000012 of friday").write_text("a file of the user's own")
    truncate(folder / "losses.jsonl") if log_is == "short" else (folder / "losses.jsonl").unlink()
    assert run(folder, "--resume", "--keep", "1") == 0, words(folder)
    assert "steps  9 to 12" in words(folder) and log(folder) == log(finished)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["losses.jsonl", "model", "step-00000012", "step-00000012 of friday"]


def small_training() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """Two weights, of which only one has had a gradient."""
    model = torch.nn.ParameterDict({"used": torch.ones(2, 3), "unused": torch.ones(4)})
    optimizer = torch.optim.AdamW(model.parameters())
    model["used"].sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def test_a_damaged_checkpoint_does_not_push_out_a_whole_one(finished: Path, tmp_path: Path) -> None:
    folder, identity = copied(finished, tmp_path / "run")
    truncate(folder / "step-00000012" / WEIGHTS)
    run = json.loads((folder / "step-00000009" / "run.json").read_text()) | {"step": 10}
    finetune.save_checkpoint(folder, run, *small_training(), keep=1)
    assert finetune.newest_checkpoint(folder, identity)[1]["step"] == 10


def test_a_weight_without_a_gradient_is_resumed_without_moments(tmp_path: Path) -> None:
    model, optimizer = small_training()
    finetune.save_checkpoint(tmp_path, {"step": 1}, model, optimizer, keep=1)
    resumed = torch.nn.ParameterDict({"used": torch.zeros(2, 3), "unused": torch.zeros(4)})
    other = torch.optim.AdamW(resumed.parameters())
    finetune.load_checkpoint(tmp_path / "step-00000001", resumed, other)
    for name, weight in model.items():
        assert torch.equal(weight, resumed[name])
    assert optimizer.state[model["used"]].keys() == other.state[resumed["used"]].keys()
    for name, moment in optimizer.state[model["used"]].items():
        assert torch.equal(moment, other.state[resumed["used"]][name])
    assert resumed["unused"] not in other.state


@pytest.mark.parametrize(
    ("sabotage", "name"),
    [(fill_the_disk_but_for_the_log, "step-00000003"), (fill_the_disk, "losses.jsonl")],
    ids=["checkpoint", "log"],
)
def test_a_full_disk_is_told_and_resumed_from(
    run, sabotage: Callable[[], None], name: str, finished: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    assert run(folder, sabotage=sabotage) == 1
    assert f"error: cannot write {folder / name}: " in words(folder)
    assert run(folder, "--resume") == 0, words(folder)
    assert log(folder) == log(finished)


@pytest.mark.parametrize(
    "error",
    [
        OSError("the disk is full"),
        RuntimeError("the disk is full"),
        SafetensorError("the disk is full"),
        dcp.CheckpointException("saving", {1: (OSError("the disk is full"), None)}),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_cannot_be_written_is_named(error: BaseException, tmp_path: Path) -> None:
    """By Python, by torch.save, by save_pretrained or by one of several processes."""
    with pytest.raises(
        SystemExit, match=f"error: cannot write {tmp_path}/model: the disk is full; "
    ):
        with finetune.writing(tmp_path / "model"):
            raise error


# Packing


def test_pack_matches_a_loop_over_the_tokens() -> None:
    documents = [[5, 6, 7], [8], [], [9] * 11, [10, 11]]
    tokens, positions = finetune.pack(documents, 4)
    flat, position = [], []
    for document in documents:
        place = 0
        for token in document:
            place = 0 if len(flat) % 4 == 0 else place
            flat.append(token)
            position.append(place)
            place += 1
    assert tokens.shape == positions.shape == (5, 4)
    assert tokens.flatten().tolist() == [*flat, 0, 0, 0]
    assert positions.flatten().tolist() == [*position, 0, 0, 0]


def test_rows_without_a_target_are_neither_trained_on_nor_held_out() -> None:
    """The last row of this text is the end of its only document."""
    text = finetune.tokenize(["hello world " * 40], ByT5Tokenizer())
    tokens, positions = finetune.pack(text, 32)
    assert not positions[-1].any()
    (training, _), (held_out, places) = finetune.split(tokens, positions, 0.05)
    assert torch.equal(training, tokens[:14])
    assert torch.equal(held_out, tokens[14:15]) and torch.equal(places, positions[14:15])


@pytest.mark.parametrize(
    ("documents", "found"),
    [([], "no row"), ([[1]] * 99, "no row"), ([[5] * 33, *[[1]] * 99], "one row")],
    ids=["no text", "tokens alone", "one row"],
)
def test_texts_that_teach_nothing_are_refused(documents: list[list[int]], found: str) -> None:
    with pytest.raises(SystemExit, match=f"--data: the text fills {found} of 32 tokens"):
        finetune.split(*finetune.pack(documents, 32), 0.05)


def test_a_document_does_not_change_the_losses_of_others(finished: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        finished / "model", attn_implementation="flash_two"
    ).eval()

    def token_losses(first: str) -> torch.Tensor:
        texts = [first, "The second one.", "A third."]
        tokens, positions = finetune.pack(finetune.tokenize(texts, ByT5Tokenizer()), 37)
        logits = finetune.logits_of(model, tokens, positions)[:, :-1]
        labels = tokens.masked_fill(positions == 0, -100)[:, 1:]
        return F.cross_entropy(logits.mT, labels, reduction="none")[0]

    with torch.no_grad():
        ours, other = token_losses("The first.."), token_losses("Another one")
    # The first document is 12 tokens long with its end; the second has no loss for its first.
    assert not torch.isclose(ours[:11], other[:11]).all()
    assert ours[11] == other[11] == 0
    torch.testing.assert_close(ours[12:], other[12:], rtol=1e-6, atol=1e-6)


def test_attention_that_leaks_between_documents_is_refused(finished: Path) -> None:
    def leaking(module, query, key, value, attention_mask, **kwargs):
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register("leaking", leaking)
    for attention in ("flash_two", "sdpa", "eager"):
        model = AutoModelForCausalLM.from_pretrained(
            finished / "model", attn_implementation=attention
        )
        finetune.check_model(model, 384)
    model = AutoModelForCausalLM.from_pretrained(finished / "model", attn_implementation="leaking")
    with pytest.raises(SystemExit, match="documents see each other in LlamaForCausalLM"):
        finetune.check_model(model, 384)


@pytest.mark.parametrize("attention", ["flash_two", "eager"])
def test_models_that_are_not_causal_are_refused(attention: str) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    config = BertConfig(num_attention_heads=2, **sizes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with pytest.raises(SystemExit, match="--model: BertLMHeadModel is not causal"):
        finetune.check_model(model, 384)


def test_a_bert_that_decodes_is_causal() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    config = BertConfig(num_attention_heads=2, is_decoder=True, **sizes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="flash_two")
    finetune.check_model(model, 384)


def test_every_epoch_visits_every_row_once_in_a_new_order() -> None:
    rows = torch.cat([finetune.rows_of_step(step, 6, 9, seed=0) for step in range(6)])
    epochs = rows.view(4, 9).tolist()
    assert all(sorted(epoch) == list(range(9)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_learning_rate_warms_up_and_falls_to_zero() -> None:
    args = SimpleNamespace(learning_rate=2.0, warmup_steps=4, steps=12)
    rates = [finetune.learning_rate(step, args) for step in range(12)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates[8] == pytest.approx(1.0)
    assert rates[4:] == sorted(rates[4:], reverse=True) and 0 < rates[-1] < 0.1


# What is refused


def refusal(capsys: pytest.CaptureFixture, monkeypatch, *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["finetune.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        finetune.check_names(finetune.parse_arguments())
    return f"{stop.value} {capsys.readouterr().err}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--steps 0", "--steps: expected int of at least 1, got '0'"),
        ("--batch-size two", "--batch-size: expected int of at least 1, got 'two'"),
        ("--learning-rate nan", "--learning-rate: expected float of at least 0, got 'nan'"),
        ("--eval-fraction 0.6", "--eval-fraction: expected float from 0 to 0.5, got '0.6'"),
        ("--precision fp8", "argument --precision: "),
        ("--warmup-steps 500", "--warmup-steps: expected fewer than --steps 500, got 500"),
        ("--attn-implementation flash", "--attn-implementation: expected one of eager, "),
        ("--compare sdap", "--compare: expected one of eager, "),
        ("--data missing.txt", "--data: there is no file missing.txt"),
        (f"--data {__file__}", "--data: expected a .txt or .jsonl file, or a data set, got "),
        (f"--seed {2**32}", "--seed: expected int from 0 to 4294967295, got '4294967296'"),
        ("--model /missing", "--model: there is no folder /missing"),
        ("--model ./missing", "--model: there is no folder ./missing"),
        (f"--model {__file__}", "--model: there is no folder "),
        ("--prompt \ud800", "--prompt: it is no Unicode text: "),
        ("--steps 1 --warmup-steps 1", "--warmup-steps: expected fewer than --steps 1, got 1"),
    ],
)
def test_bad_arguments_are_refused(arguments, message, capsys, monkeypatch, tmp_path) -> None:
    folder = str(tmp_path / "run")
    assert message in refusal(capsys, monkeypatch, "--output-dir", folder, *arguments.split())
    assert not Path(folder).exists()


def test_a_mistake_is_told_before_the_libraries_are_imported(tmp_path: Path) -> None:
    for name in ("torch", "transformers", "accelerate"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('imported')")
    finished = subprocess.run(
        [sys.executable, str(SCRIPT), "--output-dir", str(tmp_path), "--model", "./nowhere"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert finished.stderr == "error: argument --model: there is no folder ./nowhere\n"
    assert finished.returncode == 1


def parsed(monkeypatch, folder: Path, *arguments: str):
    monkeypatch.setattr(sys, "argv", ["finetune.py", "--output-dir", str(folder), *arguments])
    return finetune.parse_arguments()


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (6, 0), (50, 5), (200, 20), (1000, 20)])
def test_few_steps_warm_up_in_a_tenth_of_them(steps, warmup, monkeypatch, tmp_path) -> None:
    args = parsed(monkeypatch, tmp_path, "--steps", str(steps))
    assert args.warmup_steps == warmup
    assert finetune.learning_rate(0, args) > 0


def test_the_precision_of_the_launcher_is_the_default(monkeypatch, tmp_path) -> None:
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    assert parsed(monkeypatch, tmp_path).precision == "no"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert parsed(monkeypatch, tmp_path).precision == "bf16"
    assert parsed(monkeypatch, tmp_path, "--precision", "no").precision == "no"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(SystemExit, match="--precision: accelerate is set up for fp8; pass"):
        parsed(monkeypatch, tmp_path)


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        ("flash_attention_2", "flash_attention_2"),
        ("broken", "--compare: broken cannot run LlamaForCausalLM in float32 on .*no such kernel"),
    ],
)
def test_a_comparison_that_cannot_be_is_refused_before_training(
    run, attention: str, message: str, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    assert run(folder, "--compare", attention, sabotage=register_a_broken_attention) == 1
    assert re.search(f"error: argument .*{message}", words(folder))
    assert not folder.exists()


def test_tokens_that_the_model_does_not_know_are_refused(run, tmp_path: Path) -> None:
    base = tmp_path / "base"
    model = untrained()
    model.resize_token_embeddings(100)
    model.save_pretrained(base)
    ByT5Tokenizer().save_pretrained(base)
    assert run(tmp_path / "run", "--model", str(base)) == 1
    message = r"--model: its tokenizer gives token 1\d\d, and it knows 100"
    assert re.search(message, words(tmp_path / "run"))


def test_an_output_folder_is_needed(capsys, monkeypatch) -> None:
    message = refusal(capsys, monkeypatch)
    assert "--output-dir" in message


def test_an_output_folder_that_cannot_be_is_refused(capsys, monkeypatch) -> None:
    for folder in (__file__, f"{__file__}/run"):
        message = refusal(capsys, monkeypatch, "--output-dir", folder)
        assert f"--output-dir: {__file__} is no folder" in message


def test_an_empty_prompt_is_refused(capsys, monkeypatch, tmp_path) -> None:
    message = refusal(capsys, monkeypatch, "--output-dir", str(tmp_path), "--prompt", "")
    assert "--prompt: expected some text" in message


def test_a_used_output_folder_is_refused(finished, capsys, monkeypatch) -> None:
    message = refusal(capsys, monkeypatch, "--output-dir", str(finished))
    assert "is not empty; pass --resume" in message


def test_rows_longer_than_the_model_are_refused(finished, capsys, monkeypatch, tmp_path) -> None:
    arguments = ["--model", str(finished / "model"), "--max-length", "2049"]
    message = refusal(capsys, monkeypatch, "--output-dir", str(tmp_path), *arguments)
    assert "takes at most 2048, got 2049" in message


@pytest.mark.parametrize(
    ("package", "arguments"),
    [("peft", ["--lora-rank", "2"]), ("datasets", ["--data", "owner/name"])],
    ids=["peft", "datasets"],
)
def test_a_missing_package_is_named(package, arguments, capsys, monkeypatch, tmp_path) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(finetune.importlib.util, "find_spec", lambda name: None)
    message = refusal(capsys, monkeypatch, "--output-dir", str(tmp_path), *arguments)
    assert f"pip install {package}" in message


def test_half_precision_without_a_gpu_is_refused(capsys, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    arguments = ["--output-dir", str(tmp_path), "--precision", "fp16"]
    assert "fp16 needs a GPU" in refusal(capsys, monkeypatch, *arguments)


@pytest.mark.parametrize(
    ("batch_size", "micro_batch_size", "message"),
    [
        (3, None, "a multiple of the 2 processes, got 3"),
        (8, 3, "a divisor of 4, each process's rows in a step, got 3"),
    ],
    ids=["batch", "micro-batch"],
)
def test_batches_that_do_not_divide_are_refused(batch_size, micro_batch_size, message):
    given = {"batch_size": batch_size, "micro_batch_size": micro_batch_size}
    args = SimpleNamespace(**given, precision="no", context_parallel=1)
    accelerator = SimpleNamespace(num_processes=2, process_index=0)
    with pytest.raises(SystemExit, match=re.escape(message)):
        finetune.check_processes(args, accelerator)


def test_one_process_where_several_were_asked_for_is_told(capsys, monkeypatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    args = SimpleNamespace(batch_size=8, micro_batch_size=None, precision="no", context_parallel=1)
    accelerator = SimpleNamespace(num_processes=1, process_index=0)
    finetune.check_processes(args, accelerator)
    assert "one process only" in capsys.readouterr().err and args.micro_batch_size == 8


def test_text_too_short_for_two_rows_is_refused(run, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Short.")
    folder = tmp_path / "run"
    assert run(folder, "--data", str(tmp_path / "short.txt")) == 1
    assert "--data: the text fills one row of 64 tokens and two are needed" in words(folder)
    assert not folder.exists()


def test_without_data_there_is_the_text_of_this_python() -> None:
    documents = finetune.load_documents(None, "text")
    assert len(documents) > 10 and all(isinstance(document, str) for document in documents)


def test_records_without_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "good"}\n\n{"body": "bad", "title": 1}\n')
    with pytest.raises(SystemExit, match="record 1 of .* no text under 'text'.* body, title"):
        finetune.load_documents(str(path), "text")
    path.write_text('{"body": "one"}\n{"body": "two"}\n')
    assert finetune.load_documents(str(path), "body") == ["one", "two"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "good"}\n\n{"text": bad}', "--data: line 3 of .* is no JSON: "),
        (b'["good"]', "--text-field: record 0 of .* its fields are none"),
        (b'{"text": "\xff"}', "--data: cannot read .*"),
        (b'{"text": "a"}\n{"text": "b\\ud800"}', "--data: record 1 of .* is no Unicode text: "),
        (b"", "--data: there is no text in .*data.jsonl"),
        (b'{"text": ""}\n{"text": ""}', "--data: there is no text in .*data.jsonl"),
    ],
    ids=["no JSON", "a list", "no UTF-8", "half a character", "empty", "empty documents"],
)
def test_files_that_cannot_be_read_are_refused(content, message, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    with pytest.raises(SystemExit, match=message):
        finetune.load_documents(str(path), "text")


def test_a_record_ends_at_the_end_of_its_line_alone(tmp_path: Path) -> None:
    """JSON allows other separators of lines within a text."""
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "one\u2028two"}\r\n{"text": "three\x85"}\n', encoding="utf-8")
    assert finetune.load_documents(str(path), "text") == ["one\u2028two", "three\x85"]


def test_a_folder_without_a_model_is_refused(finished: Path, tmp_path: Path) -> None:
    shutil.copy(finished / "model" / "config.json", tmp_path)
    with pytest.raises(SystemExit, match="--model: cannot load the tokenizer of "):
        finetune.load_tokenizer(str(tmp_path / "missing"))
    with pytest.raises(SystemExit, match="--model: cannot load .* with eager: "):
        untrained(model=str(tmp_path))
    shutil.copy(finished / "model" / "model.safetensors", tmp_path)
    truncate(tmp_path / "model.safetensors")
    with pytest.raises(SystemExit, match="--model: cannot load .* with eager: "):
        untrained(model=str(tmp_path))


def test_models_without_position_ids_are_refused(tmp_path: Path) -> None:
    from transformers import BloomConfig

    config = BloomConfig(vocab_size=384, hidden_size=16, n_layer=1, n_head=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "bloom")
    with pytest.raises(SystemExit, match="BloomForCausalLM takes no position_ids"):
        untrained(model=str(tmp_path / "bloom"))
