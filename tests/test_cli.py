"""The command line: help without torch, and bad input as one sentence."""

import dataclasses
import errno
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.study.helpers import save_random_model
from tl_entity.cli import METHODS, main
from tl_entity.cli.ending import Signals, explain
from tl_entity.cli.program import parse, parser
from tl_entity.cli.study import settings_of
from tl_entity.study.settings import EXPERIMENTS, Settings
from tl_entity.training.finetune_settings import FinetuneSettings


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
    assert set(results["settings"]["only"]) == {"knockout", "dcm"}
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


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["reproduce", "--only", "knockot"], "did you mean knockout?"),
        (["reproduce", "--base", "default-bas"], "did you mean default-base"),
        (["reproduce", "--base", "/"], "has no config.json"),
        (["reproduce", "--base-adapter", "/"], "has no adapter_config.json"),
        (["reproduce", "--prompts", "1000000000"], "prompts must be at most 100000"),
        (["reproduce", "--memory", "1e-9"], "Memory must be at least 1e-06 GiB"),
        (["plan", "--memory", "1e-9"], "Memory must be at least 1e-06 GiB"),
        (["plan", "--circuits", "1000000000"], "must be at most 10001"),
        (["plan", "--circuits", "1e9"], "'1e9' is not a whole number"),
        (
            ["finetune", "--base", "default-base", "--out", "x", "--prompts", "1000000000"],
            "prompts",
        ),
        (["finetune", "--base", "no/such/folder", "--out", "x"], "no/such/folder"),
        (["reproduce", "--device", "cpu:999"], "there is one CPU"),
        (["reproduce", "--device", ""], "write it like cpu, cuda or cuda:1"),
        (["reproduce", "--out", ""], "an empty name is no folder"),
        (["reproduce", "--out", "a\ud800"], "holds characters that no text has"),
        (["reproduce", "--tuned", ""], "an empty name stands for no model"),
        (["reproduce", "--gguf", "model.gguf", "--base", "nothing"], "There is no folder nothing"),
        (["study", "--task", "captals"], "There is no task 'captals'"),
        (["study", "--task", "/dev/null"], "/dev/null is no plain file"),
        (["study", "--task", "capitals", "--recipe", "no.json"], "no.json: no such recipe file"),
        (["study", "--task", "capitals", "--only", "dcm"], "There can be no dcm"),
        (["study", "--task", "years", "--recipe", "paper"], "is for the task boxes, not years"),
        (["reprodce"], "there is no command 'reprodce'; did you mean reproduce?"),
        (["reproduce", "--promts", "8"], "there is no option --promts; did you mean --prompts"),
        (["reproduce", "8"], "'8' belongs to no option"),
    ],
)
def test_what_can_be_refused_at_once_needs_no_torch(arguments, expected):
    code = (
        "import sys; from tl_entity.cli import main; "
        f"assert main({arguments!a}) == 2; assert 'torch' not in sys.modules"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("tl-entity: ") and expected in line


def test_every_setting_has_an_option_that_says_what_it_is_and_its_default():
    for command, settings in (("reproduce", Settings), ("finetune", FinetuneSettings)):
        shown = {action.dest: action for action in parser()[1].choices[command]._actions}
        for field in dataclasses.fields(settings):
            action = shown[field.name]
            assert action.help and len(action.help) > 10, field.name
            if isinstance(field.default, int | float | str) and action.nargs != 0:
                assert f"default: {field.default}" in action.help
            assert "`" not in action.help


def test_a_gguf_file_is_part_of_a_models_name(tmp_path):
    def base(*arguments: str) -> str:
        return settings_of(parse(["reproduce", "--tuned-adapter", "a/b", *arguments])).base

    assert base("--base", "qwen2.5-0.5b", "--gguf", "q8.gguf") == "Qwen/Qwen2.5-0.5B/q8.gguf"
    assert base("--base", "some/one", "--gguf", "in/q8.gguf") == "some/one/in/q8.gguf"
    assert base("--base", str(tmp_path), "--gguf", "q8.gguf") == f"{tmp_path}/q8.gguf"
    given = settings_of(parse(["reproduce", "--base", "x/y", "--gguf", "z.gguf", "--tuned", "t/u"]))
    assert (given.base, given.tuned) == ("x/y/z.gguf", "t/u")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("module", ["argparse", "tl_entity.study.settings", "torch"])
def test_a_signal_before_the_start_is_one_line(number, module):
    # The signal comes while this module is imported.
    code = f"""
import os, sys
import tl_entity.cli
def interrupt(event, arguments):
    if event == "import" and arguments[0] == {module!r}:
        os.kill(os.getpid(), {int(number)})
for name in [name for name in sys.modules if name == {module!r}]:
    del sys.modules[name]
sys.addaudithook(interrupt)
sys.exit(tl_entity.cli.main(["reproduce", "--device", "cuda:77"]))
"""
    done = run_python(code)
    assert done.returncode == 128 + number
    (line,) = done.stderr.splitlines()
    assert line.startswith("tl-entity: interrupted")


def test_termination_says_what_an_interrupt_says(model, tmp_path):
    arguments = ["reproduce", "--base", str(model), "--tuned", "none", "--prompts", "100"]
    arguments += ["--all-pairs", "--no-png", "--out", str(tmp_path / "out")]
    command = [sys.executable, "-m", "tl_entity", *arguments, "--verbose"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as run:
        for line in run.stderr:
            if "base_accuracy" in line:
                break
        run.terminate()
        said = run.stderr.read()
    assert run.returncode == 143
    assert said.splitlines()[-1].startswith("tl-entity: interrupted. Finished steps are kept")


def ended(capsys, error: BaseException, out: Path | None) -> tuple[int, str]:
    try:
        raise error
    except BaseException as caught:
        code = explain(caught, Signals(), out)
    (line,) = capsys.readouterr().err.splitlines()
    return code, line


def test_a_fault_of_ours_is_one_line_and_its_traceback_a_file(capsys, tmp_path):
    code, line = ended(capsys, KeyError("lost\nand found"), tmp_path)
    assert code == 1
    assert "a fault of tl-entity" in line and "KeyError" in line
    (file,) = tmp_path.iterdir()
    assert str(file) in line
    assert "Traceback" in file.read_text() and "in ended" in file.read_text()
    # Where the folder is not there yet, it is not made.
    code, line = ended(capsys, ValueError("bad"), tmp_path / "out")
    assert code == 1 and not (tmp_path / "out").exists()
    elsewhere = Path(re.search(r"The traceback is in (\S+)\.", line)[1])
    assert "ValueError: bad" in elsewhere.read_text()
    elsewhere.unlink()


def test_too_little_memory_is_one_line_with_what_takes_less(capsys, tmp_path):
    errors: list[BaseException] = [MemoryError(), OSError(errno.ENOMEM, "no room")]
    for sizes in ((10**15,), (10**9, 10**6)):
        with pytest.raises(RuntimeError) as refused:
            torch.empty(sizes)
        errors.append(refused.value)
    errors.append(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 TiB"))
    for error in errors:
        code, line = ended(capsys, error, tmp_path)
        assert code == 1 and "out of memory" in line and "--batch-size 1" in line


def test_names_with_line_ends_stay_in_one_line(capsys):
    assert "no/\x0bsuch" not in refused(capsys, "reproduce", "--base", "no\nsuch\x0b/folder")


def test_output_that_nobody_reads_on_is_no_error():
    code = "import os, sys; os.close(1); os.open(os.devnull, os.O_WRONLY); "
    code += "r, w = os.pipe(); os.dup2(w, 1); os.close(r); from tl_entity.cli import main; "
    code += "sys.exit(main(['models']) and 3)"
    done = run_python(code)
    assert "Traceback" not in done.stderr and "Broken" not in done.stderr
