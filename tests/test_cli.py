"""The command line: help without torch, and bad input as one sentence."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.study.helpers import save_random_model
from tl_entity.cli import METHODS, main
from tl_entity.study.settings import EXPERIMENTS


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_random_model(tmp_path_factory.mktemp("model"), seed=1)


def refused(capsys, *arguments) -> str:
    """The one line that is said about these arguments."""
    assert main([str(argument) for argument in arguments]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert line.startswith("tl-entity: ")
    return line


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--sizes", "4,2,1"], "'4,2,1' is not 4 positive whole numbers"),
        (["--sizes", "4,two,1,1"], "'4,two,1,1'"),
        (["--sizes", "4,0,1,1"], "'4,0,1,1'"),
        (["--receiver-sizes", "1,1,1,1"], "3 positive whole numbers"),
        (["--prompts", "many"], "'many' is not a whole number"),
        (["--prompts", "0"], "at least 2"),
        (["--engine", "fast"], "'fast'"),
        (["--sparsity", "0.01,much"], "'0.01,much' is not numbers such as 0.01,0.03"),
        (["--sparsity=-1"], "Sparsities are prices of 0 or more, not -1.0"),
        (["--pairs", "1"], "at least 2"),
        (["--control", "default-base"], "beside a fine-tuned model, and there is none"),
        (["--sizes", "13,1,1,1"], "value_fetcher can't be 13 heads: the model has 12"),
        (["--boxes", "27"], "27 boxes need"),
        (["--boxes", "10"], "takes prompts of 64 tokens; 10 boxes need"),
        (["--base", "no/such/folder"], "no/such/folder"),
        (["--device", "abacus"], "abacus"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(
    capsys, model, tmp_path, arguments, expected
):
    out = tmp_path / "out"
    given = ["reproduce", "--base", model, "--tuned", "none", "--out", out, *arguments]
    assert expected in refused(capsys, *given)
    assert not out.exists()


def test_a_missing_tuned_model_is_found_before_any_work(capsys, model, tmp_path):
    out = tmp_path / "out"
    line = refused(capsys, "reproduce", "--base", model, "--tuned", tmp_path / "gone", "--out", out)
    assert "gone" in line
    assert not out.exists()


def test_an_output_folder_that_is_a_file(capsys, model, tmp_path):
    out = tmp_path / "out"
    out.write_text("mine")
    line = refused(capsys, "reproduce", "--base", model, "--tuned", "none", "--out", out)
    assert "is a file" in line
    assert out.read_text() == "mine"


def test_a_model_that_can_not_do_the_task_gets_a_report_that_says_so(capsys, model, tmp_path):
    arguments = ["--prompts", "8", "--boxes", "2", "--no-png", "--out", tmp_path / "out"]
    assert main(["reproduce", "--base", str(model), "--tuned", "none", *map(str, arguments)]) == 0
    said = capsys.readouterr().out
    assert "no circuit was looked for" in said and "--all-pairs" in said
    assert "No circuit was looked for" in (tmp_path / "out" / "report.html").read_text()


def test_a_command_must_be_given(capsys):
    assert "--help" in refused(capsys)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs a timer that interrupts")
def test_interrupted(capsys, model, tmp_path):
    steps = tmp_path / "out" / "steps"

    # Python drops an interrupt that arrives in a destructor, so it comes again until it is heard.
    def interrupt(*_):
        if steps.is_dir() and any(steps.iterdir()):
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
    # All pairs: of those answered right there are too few, which would end the run by itself.
    arguments = ["--tuned", "none", "--prompts", "100", "--all-pairs", "--no-png"]
    arguments += ["--out", str(tmp_path / "out")]
    try:
        assert main(["reproduce", "--base", str(model), *arguments]) == 130
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    said = capsys.readouterr().err
    assert said.splitlines()[-1].startswith("tl-entity: interrupted")
    assert not (tmp_path / "out" / "results.json").exists()


def test_each_method_has_a_command_that_shares_what_is_finished(capsys, model, tmp_path):
    given = ["--base", str(model), "--tuned", "none", "--prompts", "4", "--boxes", "2"]
    given += ["--all-pairs", "--no-png", "--out", str(tmp_path / "out")]
    assert set(EXPERIMENTS) | {"discover"} == set(METHODS)
    assert main(["discover", *given]) == 0
    assert "base: struct_reader" in capsys.readouterr().err
    assert main(["knockout", *given]) == 0
    said = capsys.readouterr().err
    assert "base: knockout" in said and "base: struct_reader" not in said
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["settings"]["only"] == ["knockout"]
    assert main(["reproduce", *given, "--only", "base_heatmaps,masks"]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["settings"]["only"] == ["knockout", "dcm"]
    assert {"knockout", "dcm"} <= results["models"]["base"].keys()
    capsys.readouterr()
    for wrong, why in ((",", "Say which"), ("heat", "no experiment, figure or table heat")):
        assert main(["reproduce", *given, "--only", wrong]) == 2
        assert why in capsys.readouterr().err


def test_a_run_says_what_it_found_and_where(capsys, model, tmp_path):
    arguments = ["--prompts", "4", "--boxes", "2", "--random-circuits", "1", "--all-pairs"]
    arguments += ["--only", "faithfulness", "--no-png"]
    out = tmp_path / "out"
    given = ["reproduce", "--base", str(model), "--tuned", "none", *arguments, "--out", str(out)]
    assert main(given) == 0
    said = capsys.readouterr()
    assert f"report: {out / 'report.html'}" in said.out
    assert "accuracy" in said.out and "faithfulness" in said.out
    assert "base: struct_reader" in said.err
    assert (out / "report.html").is_file()


def test_quiet_verbose_and_json(capsys, model, tmp_path):
    given = ["discover", "--base", str(model), "--tuned", "none", "--prompts", "4", "--boxes", "2"]
    given += ["--all-pairs", "--no-png", "--out", str(tmp_path / "out")]
    assert main([*given, "--quiet"]) == 0
    said = capsys.readouterr()
    assert said.err == "" and "report:" in said.out
    assert main([*given, "--verbose", "--json"]) == 0
    said = capsys.readouterr()
    assert "tl-entity: base_accuracy: found finished" in said.err.splitlines()
    results = json.loads(said.out)
    assert results == json.loads((tmp_path / "out" / "results.json").read_text())
    (tmp_path / "out" / "steps" / "base_accuracy.safetensors").unlink()
    assert main([*given, "--verbose"]) == 0
    said = capsys.readouterr().err
    assert re.search(r"^tl-entity: base_accuracy: \d+\.\d s$", said, re.MULTILINE)
    assert main([*given, "--quiet", "--verbose"]) == 2


def test_named_models_as_json(capsys):
    assert main(["models", "--json"]) == 0
    listed = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert listed["default-base"]["parameters"] < 1e6
    assert listed["goat-7b"]["adapter"]


def test_help_has_examples_and_needs_no_torch():
    code = (
        "import sys; from tl_entity.cli import main; "
        "assert main(['reproduce', '--help']) == 0; assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "examples:" in done.stdout


def test_run_as_a_module_says_its_version():
    done = subprocess.run(
        [sys.executable, "-m", "tl_entity", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("tl-entity ")
