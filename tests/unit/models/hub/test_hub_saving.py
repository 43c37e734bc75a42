"""From a model to a folder."""

from __future__ import annotations

import contextlib
import json
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from durability import durable
from penstock.core.errors import PenstockError, UsageError
from penstock.models import hub
from penstock.testing.transformers_peer import peer, published
from small_folders import same, tiny


@pytest.mark.parametrize("limit", [1, 3000, 10**9])
def test_shards(limit: int, tmp_path: Path) -> None:
    decoder, path = tiny(), tmp_path / "model"
    hub.save(decoder, path, shard_bytes=limit, dtype=torch.bfloat16)
    files = sorted(path.glob("*.safetensors"))
    sizes = [[t.nbytes for t in load_file(file).values()] for file in files]
    assert all(len(tensors) == 1 or sum(tensors) <= limit for tensors in sizes)
    if len(files) == 1:
        assert files[0].name == "model.safetensors"
        assert not (path / "model.safetensors.index.json").exists()
    else:
        assert [file.name for file in files] == [
            f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)
        ]
        index = json.loads((path / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(map(sum, sizes)) == 2 * decoder.parameter_count()
        assert index["weight_map"] == {name: file.name for file in files for name in load_file(file)}
    assert same(hub.load(path), tiny().to(torch.bfloat16))
    reference = published(path)
    assert reference.dtype == torch.bfloat16
    assert torch.equal(reference.lm_head.weight, decoder.head.weight.to(torch.bfloat16))


def test_token_ids_survive_and_are_not_invented(tmp_path: Path) -> None:
    """transformers gives Llama the ids 1 and 2 where config.json is silent."""
    peer("llama", bos_token_id=5, eos_token_id=[6, 7]).save_pretrained(tmp_path / "theirs")
    hub.save(hub.load(tmp_path / "theirs"), tmp_path / "ours")
    config = published(tmp_path / "ours").config
    assert (config.bos_token_id, config.eos_token_id) == (5, [6, 7])
    hub.save(tiny(), tmp_path / "new")
    config = published(tmp_path / "new").config
    assert config.bos_token_id is config.eos_token_id is None


def test_saving_into_an_existing_folder(tmp_path: Path) -> None:
    """Adds its files to what is there, and never mixes with another model."""
    (tmp_path / "trainer.json").write_text("{}")
    with durable() as placed:
        hub.save(tiny(), tmp_path, shard_bytes=3000)
    assert placed[-1] == tmp_path / "config.json"  # without which the folder is no model
    assert (tmp_path / "trainer.json").read_text() == "{}"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert same(hub.load(tmp_path), tiny())
    with pytest.raises(UsageError, match=r"already holds a model \(config\.json\)"):
        hub.save(tiny(), tmp_path)


def test_a_save_that_is_cut_short_is_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder that exists, config.json comes last, so that whatever stops the process leaves no half of a model."""
    replace, moved = Path.replace, []

    def record(path: Path, target: Path) -> Path:
        if target.parent == tmp_path:
            with pytest.raises(UsageError, match="there is no model"):
                hub.resolve(tmp_path)
            moved.append(target.name)
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", record)
    hub.save(tiny(), tmp_path, shard_bytes=3000)
    assert moved[-1] == "config.json"
    assert len(moved) > 3


@contextlib.contextmanager
def small_files() -> Iterator[None]:
    """The system refuses to write beyond 4 kB of a file, as it does on a full disk.

    Not a fixture: the limit would hold while the report of the test is written, to a file perhaps.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    for target in (tmp_path / "new", tmp_path):
        with pytest.raises(PenstockError, match=r"cannot write .*model\.safetensors"), small_files():
            hub.save(tiny(), target)
        assert not list(tmp_path.iterdir())


def test_matrices_with_inputs_as_rows_are_not_quantized(tmp_path: Path) -> None:
    """transformers would find no scales for them."""
    peer("gpt2", n_embd=32, n_layer=2, n_head=4, n_positions=64).save_pretrained(tmp_path / "plain")
    with pytest.raises(UsageError, match="the matrices of gpt2 stand on disk with inputs as rows"):
        hub.save(hub.load(tmp_path / "plain"), tmp_path / "fp8", scheme="fp8")
    assert not (tmp_path / "fp8").exists()
