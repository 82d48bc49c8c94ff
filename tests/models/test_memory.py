"""Loading holds the weights once: peaks are measured in a process of their own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file

from tests.models.gguf_helpers import write_gguf
from tests.models.helpers import llama, save
from tests.models.test_adapters import adapt

# 24 M numbers, no matrix more than a twentieth of them.
SIZES = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}

CHILD = """
import gc, json, sys, threading, time
from pathlib import Path
from tl_entity.models.load import load_model

load_model("default-base", device="cpu")  # what is imported and allocated once

def anonymous():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

def peak(source, keywords):
    gc.collect()
    highest, done = [0], threading.Event()
    def watch():
        while not done.is_set():
            highest[0] = max(highest[0], anonymous())
            time.sleep(0.0005)
    before = anonymous()
    thread = threading.Thread(target=watch)
    thread.start()
    model = load_model(source, device="cpu", **keywords)
    done.set()
    thread.join()
    return (highest[0] - before) / sum(p.numel() * p.element_size() for p in model.parameters())

print(json.dumps([peak(*case) for case in json.loads(sys.argv[1])]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_over_the_size_of_the_weights(tmp_path: Path) -> None:
    folder = save(llama(**SIZES, **HEADS), tmp_path / "folder")
    tensors = load_file(folder / "model.safetensors")
    assert sum(tensor.numel() for tensor in tensors.values()) > 20e6
    pickled = save(llama(**SIZES, **HEADS), tmp_path / "pickled")
    torch.save(tensors, pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    write_gguf(llama(**SIZES, **HEADS), tmp_path / "m.gguf", kind=Kind.Q8_0)
    adapt(folder, tmp_path / "adapter", target_modules=["q_proj", "v_proj"])
    cases = [
        (folder, {}, 0.1),  # views of the mapped file
        (pickled, {}, 0.1),
        (folder, {"adapter": str(tmp_path / "adapter")}, 0.25),  # what it changes
        (folder, {"dtype": "float64"}, 1.15),  # one copy, and one matrix in work
        (tmp_path / "m.gguf", {}, 1.25),
    ]
    given = json.dumps([(str(source), keywords) for source, keywords, _ in cases])
    child = subprocess.run(
        [sys.executable, "-c", CHILD, given], capture_output=True, text=True, check=True
    )
    peaks = json.loads(child.stdout.splitlines()[-1])
    for (source, keywords, most), peak in zip(cases, peaks, strict=True):
        assert peak < most, (source.name, keywords, peaks)
    assert peaks[3] > 0.9  # the measurement sees a copy where there is one
