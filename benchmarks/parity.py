"""How near a loaded model is to Hugging Face's, and what loading costs.

    python benchmarks/parity.py --out docs/parity.md --json docs/parity.json
    python benchmarks/parity.py --real "SmolLM2 135M" FOLDER FILE.gguf --out docs/parity.md

Architectures are random models of moderate size, made on the spot. Real models are given as a
folder and as a GGUF file of the same weights; a pickle of them, and LoRA adapters trained for a few
steps with peft, are made on the spot as well. Each load is measured in a process of its own.
"""

import argparse
import json
import multiprocessing
import os
import platform
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

VOCABULARY, LENGTH = 2000, 384
SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
THETA = {"rope_theta": 10000.0}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("llama", {}),
    "Llama, grouped-query": ("llama", {"num_key_value_heads": 2}),
    "Llama, multi-query, tied": ("llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "Llama, heads wider than d_model / n": ("llama", {"head_dim": 64, "num_key_value_heads": 4}),
    "Llama, attention biases": ("llama", {"attention_bias": True}),
    "Llama, RoPE llama3": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 128,
                **THETA,
            }
        },
    ),
    "Llama, RoPE linear": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, **THETA}},
    ),
    "Llama, RoPE yarn": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 128,
                **THETA,
            }
        },
    ),
    "Mistral": ("mistral", {"num_key_value_heads": 2, "sliding_window": None}),
    "Mistral, window of 64": ("mistral", {"num_key_value_heads": 2, "sliding_window": 64}),
    "Qwen2": ("qwen2", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "Qwen2, window of 64 in two layers": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2},
    ),
    "Qwen3": ("qwen3", {"num_key_value_heads": 2, "head_dim": 64}),
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "LoRA": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    "rank-stabilised LoRA": {"target_modules": ["q_proj", "v_proj"], "use_rslora": True},
    "DoRA": {"target_modules": "all-linear", "use_dora": True},
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        model: architecture, or the real model's name.
        source: what it was loaded from.
        dtype: of weights and activations, in both libraries.
        difference: largest difference of a log-probability to Hugging Face's model with its
            default attention (sdpa).
        eager_sdpa: the same between Hugging Face's two attention implementations.
        peak: highest memory of the process's own while loading, over the size of the weights;
            mapped files are not counted. None where it was not measured.
        seconds: to load weights and tokenizer.
    """

    model: str
    source: str
    dtype: str
    difference: float
    eager_sdpa: float
    peak: float | None = None
    seconds: float | None = None


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--real", nargs=3, action="append", default=[], metavar=("LABEL", "FOLDER", "GGUF")
    )
    parser.add_argument("--prompts", type=int, default=4, help="of the box task, for real models")
    parser.add_argument("--steps", type=int, default=5, help="of training an adapter")
    parser.add_argument("--json", type=Path, help="the rows; written after each of a real model")
    parser.add_argument("--resume", action="store_true", help="keep the rows that --json has")
    parser.add_argument("--out", type=Path, help="the page, in Markdown")
    options = parser.parse_args(arguments)
    _quieten()
    rows: list[Row] = []
    if options.resume and options.json and options.json.exists():
        rows = [Row(**row) for row in json.loads(options.json.read_text())]
    with tempfile.TemporaryDirectory() as scratch:
        for name, (kind, changes) in ARCHITECTURES.items():
            if any(row.model == name for row in rows):
                continue
            rows += _architecture(name, kind, changes, Path(scratch) / name.replace(" ", "-"))
            _say(rows[-1])
        for index, (label, folder, gguf) in enumerate(options.real):
            place = Path(scratch) / f"real-{index}"
            done = {(row.source, row.dtype) for row in rows if row.model == label}
            for row in _real(label, Path(folder), Path(gguf), place, options, done):
                rows.append(row)
                _say(row)
                if options.json:  # as far as it has come
                    _write(options.json, rows)
    if options.json:
        _write(options.json, rows)
    page = _page(rows, options)
    if options.out:
        options.out.write_text(page)
    else:
        sys.stdout.write(page)


def _write(file: Path, rows: list[Row]) -> None:
    file.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def _architecture(name: str, kind: str, changes: dict[str, Any], folder: Path) -> list[Row]:
    from transformers import AutoConfig, AutoModelForCausalLM

    from tl_entity import load_model

    config = AutoConfig.for_model(kind, **{**SIZES, **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            # Large enough that every part matters.
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + 0.1 * noise if "norm" in key else 0.05 * noise)
    model.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    tokens = torch.randint(0, VOCABULARY, (2, LENGTH))
    rows = []
    for name_of_dtype, dtype in DTYPES.items():
        expected, gap = _both(_auto(folder, dtype, "sdpa"), tokens)
        ours = load_model(folder, dtype=dtype, device="cpu")
        with torch.no_grad():
            difference = _largest(_log_probabilities(ours(tokens)), expected)
        rows.append(Row(name, "folder", name_of_dtype, difference, gap))
    return rows


def _real(
    label: str,
    folder: Path,
    gguf: Path,
    place: Path,
    options: argparse.Namespace,
    done: set[tuple[str, str]],
) -> Iterator[Row]:
    from tl_entity import box_prompts, load_tokenizer

    if len(done) == len(DTYPES) * (5 + len(ADAPTERS)):
        return
    place.mkdir()
    prompts = box_prompts(load_tokenizer(folder), options.prompts, seed=0)
    tokens = prompts.tokens
    assert prompts.attention_mask is None or bool(prompts.attention_mask.all())
    for name, settings in ADAPTERS.items():
        _apart(_train, folder, place / name, settings, tokens, options.steps)
    pickled = _apart(_pickle, folder, place / "pickled")
    sources: list[tuple[str, Path, dict[str, Any], str]] = [
        ("folder (safetensors)", folder, {}, "folder"),
        ("folder (.bin)", pickled, {}, "folder"),
        ("GGUF", gguf, {}, "gguf"),
        ("model in memory", folder, {"in_memory": True}, "folder"),
        ("folder, as TransformerBridge", folder, {"backend": "bridge"}, "folder"),
        *((f"folder + {name}", folder, {"adapter": place / name}, name) for name in ADAPTERS),
    ]
    for dtype in DTYPES:
        # The model of the GGUF file as transformers itself reads it, and of adapters as peft does.
        references: dict[str, Any] = {}
        for source, path, keywords, reference in sources:
            if (source, dtype) in done:
                continue
            if reference not in references:
                path_of_reference = gguf if reference == "gguf" else folder
                references[reference] = _apart(
                    _reference, path_of_reference, keywords.get("adapter"), dtype, tokens
                )
            expected, gap = references[reference]
            ours, peak, seconds = _apart(_ours, path, keywords, dtype, tokens)
            yield Row(label, source, dtype, _largest(ours, expected), gap, peak, seconds)


def _ours(source: Path, keywords: dict[str, Any], dtype: str, tokens: torch.Tensor) -> Any:
    """Log-probabilities, peak memory over the weights' size, and seconds, of one load."""
    from tl_entity import load_model

    load_model("default-base", device="cpu")  # what is imported and allocated once
    keywords = dict(keywords)
    given: Any = source
    if keywords.pop("in_memory", False):
        given = _auto(source, DTYPES[dtype], "sdpa")
    highest, done = [0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            highest[0] = max(highest[0], _own_memory())
            time.sleep(0.001)

    before = _own_memory()
    thread = threading.Thread(target=watch)
    thread.start()
    start = time.perf_counter()
    model: Any = load_model(given, dtype=dtype, device="cpu", **keywords)
    seconds = time.perf_counter() - start
    done.set()
    thread.join()
    unique = {p.data_ptr(): p.numel() * p.element_size() for p in model.parameters()}
    with torch.no_grad():
        ours = _log_probabilities(model(tokens))
    return ours, (highest[0] - before) / sum(unique.values()), seconds


def _reference(
    path: Path, adapter: Path | None, dtype: str, tokens: torch.Tensor
) -> tuple[torch.Tensor, float]:
    """Hugging Face's log-probabilities, and how far its two attention implementations differ."""
    if path.suffix == ".gguf":
        model = _auto(path.parent, DTYPES[dtype], "sdpa", gguf_file=path.name)
    elif adapter is None:
        model = _auto(path, DTYPES[dtype], "sdpa")
    else:
        import peft

        model = peft.PeftModel.from_pretrained(_auto(path, torch.float32, "sdpa"), adapter)
        model = model.merge_and_unload()
        # Merged in float32 and rounded then; the rotary frequencies stay as they are.
        for parameter in model.parameters():
            parameter.data = parameter.data.to(DTYPES[dtype])
    return _both(model, tokens)


def _train(
    folder: Path, out: Path, settings: dict[str, Any], tokens: torch.Tensor, steps: int
) -> None:
    """A LoRA adapter, trained for a few steps on the prompts."""
    import peft

    torch.manual_seed(0)
    model = peft.get_peft_model(
        _auto(folder, torch.float32, "sdpa"),
        peft.LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, **settings),
    )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-3)
    for _ in range(steps):
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(str(out))


def _pickle(folder: Path, out: Path) -> Path:
    from safetensors.torch import load_file

    out.mkdir()
    for file in folder.iterdir():
        if file.suffix == ".safetensors":
            torch.save(load_file(file), out / "pytorch_model.bin")
        elif file.is_file():
            (out / file.name).write_bytes(file.read_bytes())
    return out


def _auto(folder: Path, dtype: torch.dtype, attention: str, **keywords: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation=attention, local_files_only=True, **keywords
    ).eval()


def _both(model: Any, tokens: torch.Tensor) -> tuple[torch.Tensor, float]:
    with torch.no_grad():
        sdpa = _log_probabilities(model(tokens).logits)
        model.set_attn_implementation("eager")
        return sdpa, _largest(_log_probabilities(model(tokens).logits), sdpa)


def _log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    return logits.detach().float().log_softmax(-1)


def _largest(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one - other).abs().max().item()


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, **{f"w{i}": i for i in range(1, VOCABULARY)}}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")), unk_token="<unk>"
    )


def _own_memory() -> int:
    """Bytes of memory in use that no file stands for (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    return 0


def _apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a fresh process; large results come back through a file."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.pt"
        process = multiprocessing.get_context("spawn").Process(
            target=_call, args=(file, function, arguments)
        )
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(f"{function.__name__} failed")
        return torch.load(file, weights_only=False)


def _call(file: Path, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    _quieten()
    torch.set_num_threads(1)
    torch.save(function(*arguments), file)


def _quieten() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.simplefilter("ignore")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _say(row: Row) -> None:
    sys.stderr.write(f"{row}\n")


def _page(rows: list[Row], options: argparse.Namespace) -> str:
    from importlib.metadata import version

    libraries = ", ".join(
        f"{name} {version(name)}"
        for name in ("torch", "transformers", "transformer_lens", "peft", "gguf")
    )
    made = [row for row in rows if row.peak is None]
    real = [row for row in rows if row.peak is not None]
    parts = [
        "# Parity with Hugging Face",
        "Made by `benchmarks/parity.py`. *Difference* is the largest difference of a "
        "log-probability, over all positions and tokens of the vocabulary, between the loaded "
        "model and Hugging Face's in the same dtype. *eager-sdpa* is the same between Hugging "
        "Face's own two attention implementations, on the same tokens: the noise of the arithmetic "
        "itself. "
        f"One thread of a CPU ({platform.machine()}); {libraries}.",
        "## Architectures",
        f"Random models (4 layers, width 256, {VOCABULARY} tokens), 2 by {LENGTH} random tokens, "
        "loaded from a folder of safetensors.",
        _table(
            ["architecture", *(f"{d}: {what}" for d in DTYPES for what in _COLUMNS)],
            [
                [name, *(cell for dtype in DTYPES for cell in _pair(made, name, dtype))]
                for name in dict.fromkeys(row.model for row in made)
            ],
        ),
    ]
    if real:
        parts += [
            "## Real models, by source",
            f"{options.prompts} prompts of the box task. The folder holds the numbers of the "
            "quantised GGUF file in float32; Hugging Face's model of the GGUF row is read from the "
            "GGUF file by transformers, that of the adapter "
            "rows is merged by peft in float32. Adapters were "
            f"trained for {options.steps} steps with peft (rank 8). *Peak memory* is the highest "
            "memory of the process's own while loading, over the size of the weights in the dtype "
            "asked for: 0.0 is views of the mapped file alone, 1.0 one copy. *Load* is weights and "
            "tokenizer, with the file in the system's cache.",
            _table(
                ["model", "source", "dtype", *_COLUMNS, "peak memory / weights", "load"],
                [
                    [
                        row.model,
                        row.source,
                        row.dtype,
                        _number(row.difference),
                        _number(row.eager_sdpa),
                        f"{row.peak:.2f}",
                        f"{row.seconds:.1f} s",
                    ]
                    for row in real
                ],
            ),
        ]
    return "\n\n".join([*parts, _READING]) + "\n"


_READING = """## Reading the tables

- In float32 the loaded model should differ from Hugging Face's about as much as that differs from
  itself with the other attention. In bfloat16 a number has 8 significant bits: a logit of 16 to 32
  is known to 1/8 only, and a log-probability, taken from the largest of many, to no better.
- A checkpoint in the dtype that is asked for, on the CPU, is not copied: the parameters are views
  of its mapped files, and what is left of the peak is the tokenizer and the rotary tables. Another
  dtype or device makes one copy, and holds one matrix beside it at a time. So does a quantised
  GGUF file. An adapter copies the matrices that it changes, and holds one in float32 beside.
- Every tensor is read once while it is loaded, to see that its numbers are finite. For the 538 MB
  of SmolLM2 that takes 0.1 s of one core's time, and no memory of the process's own.
- On a GPU the weights' copy lies there; `n_devices` spreads the layers."""

_COLUMNS = ("difference", "eager-sdpa")


def _pair(rows: list[Row], name: str, dtype: str) -> list[str]:
    (row,) = (row for row in rows if row.model == name and row.dtype == dtype)
    return [_number(row.difference), _number(row.eager_sdpa)]


def _number(value: float) -> str:
    return f"{value:.1e}" if value else "0"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
