"""From a folder to a model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from penstock.core.errors import ModelError
from penstock.models import hub
from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder
from small_folders import edit, rewrite, same, tiny


def test_dtype_is_the_one_asked_for_or_stated_or_stored(folder: Path) -> None:
    config = folder / "config.json"
    assert hub.load(folder).norm.weight.dtype == torch.float32
    assert hub.load(folder, dtype=torch.float64).norm.weight.dtype == torch.float64
    edit(config, lambda hub: hub.update(torch_dtype="bfloat16"))
    loaded = hub.load(folder)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert same(loaded, tiny().to(torch.bfloat16))
    assert loaded.rotary[0].frequencies.dtype == torch.float32
    edit(config, lambda hub: hub.update(dtype="float16"))
    assert hub.load(folder).norm.weight.dtype == torch.float16
    edit(config, lambda hub: (hub.pop("dtype"), hub.pop("torch_dtype")))
    assert hub.load(folder).norm.weight.dtype == torch.float32


MEASURE = """
import sys, torch
from pathlib import Path
from penstock.models import hub

def memory(which):  # from /proc, since getrusage's peak counts the parent too
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(which))

torch.set_num_threads(1)
before = memory("VmRSS")
decoder = hub.load(sys.argv[1])
print(memory("VmHWM") - before)
assert all(bool((p == 1).all()) for p in decoder.parameters())
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to measure memory")
def test_loading_takes_the_memory_of_the_model_and_one_shard(tmp_path: Path) -> None:
    config = DecoderConfig(vocabulary=512, hidden=512, layers=10, heads=8, kv_heads=4, head_dim=64, ffn=1536)
    decoder, shard = Decoder(config), 12_000_000
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.fill_(1)
    hub.save(decoder, tmp_path / "model", shard_bytes=shard)
    size = 4 * decoder.parameter_count()
    assert size > 100e6
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 8
    run = subprocess.run([sys.executable, "-c", MEASURE, tmp_path / "model"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert size < int(run.stdout) < size + shard + 12e6


def test_import_in_place(folder: Path) -> None:
    """Importing keeps the parameters that an optimizer holds."""
    decoder, before = tiny(), tiny()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.zero_()
    held = list(decoder.parameters())
    hub.import_state(decoder, folder)
    assert same(decoder, before)
    assert all(one is other for one, other in zip(held, decoder.parameters(), strict=True))


def test_importing_another_model_is_refused(folder: Path) -> None:
    decoder = tiny(window=3, layers=3)
    before = {name: tensor.clone() for name, tensor in decoder.state_dict().items()}
    with pytest.raises(ModelError, match="differ in layers, sparse, window"):
        hub.import_state(decoder, folder)
    rewrite(folder, lambda tensors: tensors.pop("model.layers.1.self_attn.k_proj.weight"))
    with pytest.raises(ModelError, match="lacks"):
        hub.import_state(tiny(), folder)
    assert all(torch.equal(tensor, before[name]) for name, tensor in decoder.state_dict().items())
