"""Fine-tuning: it learns, it can be killed, and `load_model` takes its adapters."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from tl_entity import evaluate, load_model
from tl_entity.cli import main
from tl_entity.errors import InputError
from tl_entity.output import sole_worker
from tl_entity.tasks.boxes import LABELS
from tl_entity.tasks.nouns import OBJECTS
from tl_entity.training import finetune as module
from tl_entity.training import skills
from tl_entity.training.box_task import BoxTask
from tl_entity.training.finetune import finetune
from tl_entity.training.finetune_settings import LAYERS, FinetuneSettings
from tl_entity.training.finetune_state import TIMES

SMALL = {"prompts": 12, "boxes": 3, "texts": 6, "rank": 4, "targets": LAYERS}
SHORT = FinetuneSettings(
    **SMALL, steps=5, evaluate_every=2, checkpoint_every=2, learning_rate=0.02, seed=3
)


def words_of(*constants) -> set[str]:
    return set(re.findall(r"[A-Za-z]+|[^\w\s]", " ".join(constants)))


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A tiny Llama that has a token for every word and digit of texts and prompts."""
    folder = tmp_path_factory.mktemp("somewhere") / "tiny-llama"
    words = words_of(
        *OBJECTS,
        *LABELS,
        "The the is in Box contains , . abcdefghijklmnopqrstuvwxyz",
        *"abcdefghijklmnopqrstuvwxyz0123456789'",
        *(x for name in vars(skills) if name.isupper() for x in flat(getattr(skills, name))),
        *(
            x
            for name in ("_PEOPLE", "_TIMES", "_MOVES", "_PLACES", "_SIGHTS", "_FEELINGS")
            for x in getattr(skills, name)
        ),
        *skills._ENDINGS,
        "to R",
    ) | set("0123456789")
    vocabulary = {word: i for i, word in enumerate(["<s>", "<unk>", "<pad>", *sorted(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Punctuation(),
            pre_tokenizers.Digits(individual_digits=True),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>", pad_token="<pad>"
    ).save_pretrained(folder)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(vocabulary),
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=2,
    )
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return folder


def flat(value) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for held in value.values() for text in flat(held)]
    return [text for held in value for text in flat(held)] if isinstance(value, tuple) else []


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory) -> Path:
    """A run of `SHORT` that nothing stopped."""
    return finetune(base, tmp_path_factory.mktemp("out") / "whole", SHORT, device="cpu").folder


def contents(folder: Path) -> dict[str, bytes]:
    """All files but the one that says how long it took."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != TIMES
    }


def test_learning_lowers_the_loss(base, tmp_path):
    settings = FinetuneSettings(
        **{**SMALL, "texts": 12, "rank": 16},
        steps=60,
        evaluate_every=60,
        checkpoint_every=60,
        learning_rate=0.005,
    )
    found = finetune(base, tmp_path / "out", settings, device="cpu")
    record = json.loads((tmp_path / "out" / "finetune.json").read_text())
    assert len(found.losses) == len(record["losses_by_kind"]) == 60
    # Looking up is beyond so small a model in so few steps; the other two have words to learn.
    for kind in ("arithmetic", "stories"):
        losses = [step[kind] for step in record["losses_by_kind"]]
        assert sum(losses[-15:]) < 0.92 * sum(losses[:15])


def test_what_is_left_in_the_folder(whole):
    assert sorted(entry.name for entry in whole.iterdir()) == [
        *("finetune.json", "step-0002", "step-0004", "step-0005", "times.json")
    ]
    for name in ("step-0002", "step-0004", "step-0005"):
        assert sorted(file.name for file in (whole / name).iterdir()) == [
            *("adapter_config.json", "adapter_model.safetensors")
        ]
    record = json.loads((whole / "finetune.json").read_text())
    assert record["finished"] and record["checkpoints"] == [2, 4, 5]
    assert [evaluation["step"] for evaluation in record["evaluations"]] == [0, 2, 4, 5]
    assert record["settings"]["learning_rate"] == 0.02 and record["settings"]["alpha"] == 8
    assert record["settings"]["base"] == "tiny-llama"
    assert {"torch", "transformers", "peft"} <= set(record["versions"])
    # No path of this machine, whatever the base was called there.
    assert not any(b"somewhere" in content for content in contents(whole).values())


def test_the_adapter_loads_to_the_same_logits(base, whole):
    loaded = load_model(base, adapter=whole / "step-0005", device="cpu")
    task = BoxTask.sample(loaded.tokenizer, 12, n_boxes=3)
    adapted = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), whole / "step-0005"
    )
    with torch.no_grad():
        expected = adapted(task.batch.tokens).logits
        plain = load_model(base, device="cpu")(task.batch.tokens)
        found = loaded(task.batch.tokens)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert (plain - expected).abs().max() > 0.05
    last = expected[torch.arange(12), task.batch.positions["last"]]
    torch.testing.assert_close(task.answer_logits(adapted.get_base_model()), last)


def test_evaluations_are_those_of_the_kept_adapters(base, whole):
    record = json.loads((whole / "finetune.json").read_text())
    for kept in record["evaluations"]:
        adapter = whole / f"step-{kept['step']:04d}" if kept["step"] else None
        loaded = load_model(base, adapter=adapter, device="cpu")
        task = BoxTask.sample(loaded.tokenizer, 12, n_boxes=3)
        assert evaluate(loaded, task.batch).accuracy == kept["accuracy"]
        with torch.no_grad():
            logits = loaded(task.batch.tokens)[torch.arange(12), task.batch.positions["last"]]
        right = 0
        for row, answer in enumerate(task.batch.answers.tolist()):
            text = loaded.tokenizer.decode(task.batch.tokens[row])
            nouns = [word for word in re.findall(r"\w+", text) if word in OBJECTS]
            ids = loaded.tokenizer.convert_tokens_to_ids(nouns)
            assert len(ids) == 3 and answer in ids
            right += max(ids, key=lambda token: logits[row, token].item()) == answer
        assert right == kept["correct_among_objects"]
        assert kept["interval"][0] <= kept["accuracy"] <= kept["interval"][1]


def test_killed_and_resumed_it_ends_with_the_same_bytes(base, whole, tmp_path):
    out = tmp_path / "killed"
    # So many prompts that each step lasts, and it is killed long before the end.
    arguments = [
        *("finetune", "--base", base, "--out", out, "--device", "cpu", "--quiet", "--seed", "3"),
        *("--steps", "16", "--evaluate-every", "1", "--checkpoint-every", "2", "--prompts", "80"),
        *("--boxes", "3", "--texts", "6", "--rank", "4", "--learning-rate", "0.02"),
    ]
    process = subprocess.Popen([sys.executable, "-m", "tl_entity", *map(str, arguments)])
    end = time.monotonic() + 120
    while not (out / "step-0002").exists() and time.monotonic() < end:
        assert process.poll() is None
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = json.loads((out / "finetune.json").read_text())
    assert not kept["finished"] and 1 <= kept["step"] < 16
    settings = FinetuneSettings(
        steps=16, evaluate_every=1, checkpoint_every=2, prompts=80, boxes=3, texts=6, rank=4,
        learning_rate=0.02, seed=3,
    )  # fmt: skip
    finetune(base, out, settings, device="cpu")
    uninterrupted = finetune(base, tmp_path / "not killed", settings, device="cpu").folder
    assert contents(out) == contents(uninterrupted)


@pytest.mark.parametrize("seconds_at_risk", [0, 30])
@pytest.mark.parametrize("steps_before", [1, 3])
def test_interrupted_at_any_step(base, whole, tmp_path, monkeypatch, steps_before, seconds_at_risk):
    monkeypatch.setattr(module, "SECONDS_AT_RISK", seconds_at_risk)
    done = 0

    def stop(steps: int, note: str) -> None:
        nonlocal done
        done += steps
        if done == steps_before and steps:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(base, tmp_path / "out", SHORT, device="cpu", progress=stop)
    told = []
    finetune(base, tmp_path / "out", SHORT, device="cpu", progress=lambda n, note: told.append(n))
    # Steps of the first call are told first; with nothing at risk all of them are there.
    assert told[0] == (steps_before if seconds_at_risk == 0 else steps_before // 2 * 2)
    assert sum(told) == 5
    assert contents(tmp_path / "out") == contents(whole)


def test_a_finished_run_is_only_read(base, whole):
    before = {file: file.stat().st_mtime_ns for file in whole.rglob("*")}
    found = finetune(base, whole, SHORT, device="cpu")
    assert found.adapter == whole / "step-0005" and len(found.evaluations) == 4
    assert {file: file.stat().st_mtime_ns for file in whole.rglob("*")} == before


def test_another_seed_gives_another_adapter(base, whole, tmp_path):
    settings = FinetuneSettings(
        **SMALL, steps=2, evaluate_every=2, checkpoint_every=2, learning_rate=0.02, seed=4
    )
    finetune(base, tmp_path / "out", settings, device="cpu")
    file = Path("step-0002") / "adapter_model.safetensors"
    assert (tmp_path / "out" / file).read_bytes() != (whole / file).read_bytes()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"mix": {"boxes": 1.0}}, "'boxes' is no kind of text; there are lookup, arith"),
        ({"mix": {"lookup": 0.0}}, "share of lookup is 0"),
        ({"mix": {}}, "mix is empty"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"learning_rate": -1.0}, "learning_rate must be above 0"),
        ({"targets": ("qkv",)}, "'qkv' is no layer to adapt"),
        ({"targets": ()}, "at least one"),
        ({"dtype": "int8"}, "dtype int8 is none of"),
    ],
)
def test_settings_that_cannot_be(changes, expected):
    with pytest.raises(InputError, match=expected):
        FinetuneSettings(**changes)


def refused(capsys, *arguments) -> str:
    """The one line that the command says about these arguments."""
    assert main(["finetune", "--device", "cpu", *map(str, arguments)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_second_run_in_a_folder_is_told_who_is_at_work(base, tmp_path):
    said = f"Process {os.getpid()}, since .* is at work in"
    with sole_worker(tmp_path), pytest.raises(InputError, match=said):
        finetune(base, tmp_path, SHORT, device="cpu")
    assert not list(tmp_path.iterdir())


def test_refusals_are_one_line(base, whole, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    line = refused(capsys, "--base", base, "--out", whole, "--seed", "9")
    assert "whole holds a run with" in line and "seed 3 and not 9" in line
    (tmp_path / "file").touch()
    assert "is a file" in refused(capsys, "--base", base, "--out", tmp_path / "file" / "out")
    assert "no/such" in refused(capsys, "--base", "no/such", "--out", out)
    assert "takes 128 tokens; prompts of 20 boxes have" in refused(
        capsys, "--base", base, "--out", out, "--boxes", "20"
    )
    assert "must be above 0" in refused(capsys, "--base", base, "--out", out, "--mix", "lookup=-1")
    assert "'x' is not a number" in refused(
        capsys, "--base", base, "--out", out, "--mix", "lookup=x"
    )
    monkeypatch.setitem(sys.modules, "peft", None)
    assert "pip install peft" in refused(capsys, "--base", base, "--out", out)
    assert not out.exists()


def test_a_model_without_the_words_is_refused(tmp_path, capsys):
    line = refused(capsys, "--base", "default-base", "--out", tmp_path / "out")
    assert "The tokenizer has no token for" in line
    assert not (tmp_path / "out").exists()


def test_the_command_says_what_it_found(base, whole, capsys):
    arguments = [
        *("finetune", "--base", base, "--out", whole, "--device", "cpu", "--steps", "5"),
        *("--texts", "6", "--rank", "4", "--seed", "3", "--prompts", "12", "--boxes", "3"),
        *("--evaluate-every", "2", "--checkpoint-every", "2", "--learning-rate", "0.02"),
        *("--targets", ",".join(LAYERS)),
    ]
    assert main([str(argument) for argument in arguments]) == 0
    said = capsys.readouterr()
    *evaluations, where = said.out.splitlines()
    assert len(evaluations) == 4 and "of 12 box prompts" in evaluations[0]
    assert where == f"The adapter is in {whole / 'step-0005'}."
    assert "5/5" in said.err and "loss" in said.err and "boxes" in said.err
