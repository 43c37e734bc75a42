"""Tensors that do not fit, or are not there, or not whole."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from penstock.core.errors import ModelError
from penstock.models import hub
from penstock.models.hub import loading
from small_folders import SHAPE, rewrite, same, tiny


def _drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.1.self_attn.k_proj.weight"]


def _add(tensors: dict[str, torch.Tensor]) -> None:
    for layer in range(5):
        tensors[f"model.layers.{layer}.self_attn.q_norm.weight"] = torch.ones(4)


def _reshape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.ones(19, 16)


def _transpose(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.ones(16, 20)


def _integers(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = torch.ones(16, dtype=torch.int64)


def _eighths(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_drop, r"lacks model\.layers\.1\.self_attn\.k_proj\.weight"),
        (_add, r"also has model\.layers\.0\.self_attn\.q_norm\.weight, .* and 2 more"),
        (_reshape, r"mlp\.up_proj\.weight in .*model\.safetensors is \[19, 16\], but config.json implies \[20, 16\]"),
        (_transpose, r"is \[16, 20\]"),
        (_integers, r"model\.norm\.weight in .* holds I64"),
        (_eighths, r"lm_head\.weight in .* holds F8_E4M3"),
    ],
)
def test_tensors_that_do_not_fit(damage: Callable[[dict[str, torch.Tensor]], None], message: str, folder: Path) -> None:
    rewrite(folder, damage)
    with pytest.raises(ModelError, match=message):
        hub.load(folder)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sound") / "model"
    hub.save(tiny(), path)
    return path


@given(share=st.floats(0, 1, exclude_max=True))
def test_truncated_at_any_byte(share: float, sound: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    whole = (sound / "model.safetensors").read_bytes()
    cut = tmp_path_factory.mktemp("cut")
    (cut / "config.json").write_text((sound / "config.json").read_text())
    (cut / "model.safetensors").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ModelError, match=r"model\.safetensors is truncated or no safetensors file"):
        hub.load(cut)


@given(data=st.data())
def test_a_damaged_header_is_an_error_for_people(
    data: st.DataObject, sound: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    contents = bytearray((sound / "model.safetensors").read_bytes())
    header = 8 + int.from_bytes(contents[:8], "little")
    contents[data.draw(st.integers(0, header - 1))] ^= data.draw(st.integers(1, 255))
    damaged = tmp_path_factory.mktemp("damaged")
    (damaged / "config.json").write_text((sound / "config.json").read_text())
    (damaged / "model.safetensors").write_bytes(contents)
    try:
        decoder = hub.load(damaged)
    except ModelError:
        return
    # Damage to the padding, to the metadata or to the order of the tensors leaves a model of the right shape.
    assert decoder.config == SHAPE


def test_shards_that_are_missing_or_overlap(tmp_path: Path) -> None:
    path = tmp_path / "model"
    hub.save(tiny(), path, shard_bytes=2000)
    shards = sorted(path.glob("*.safetensors"))
    assert len(shards) > 2
    duplicate = load_file(shards[0]) | load_file(shards[1])
    save_file(duplicate, shards[0])
    with pytest.raises(ModelError, match=f"is in {shards[0].name} and again in .*{shards[1].name}"):
        hub.load(path)
    shards[1].unlink()
    with pytest.raises(ModelError, match=rf"index\.json names {shards[1].name}, which is missing"):
        hub.load(path)
    for contents in ("{}", "[]", '{"weight_map": {}}', '{"weight_map": "x"}', '{"weight_map": {"a": 3}}'):
        (path / "model.safetensors.index.json").write_text(contents)
        with pytest.raises(ModelError, match="index"):
            hub.load(path)


class _Trap:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


def test_pickles_are_never_opened(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="has no weights"):
        hub.load(folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Trap(tmp_path / "sprung")))
    with pytest.raises(ModelError, match=r"pytorch_model\.bin only, a pickle, which is never read"):
        hub.load(folder)
    assert not (tmp_path / "sprung").exists()


def test_old_frequencies_are_ignored(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}))
    assert same(hub.load(folder), tiny())


def test_a_head_beside_a_tied_embedding(tmp_path: Path) -> None:
    """Left out when saving; when loading accepted if it is the embedding, refused if it is another matrix."""
    path = tmp_path / "model"
    hub.save(tiny(tied=True), path)
    assert "lm_head.weight" not in load_file(path / "model.safetensors")
    decoder = hub.load(path)
    assert decoder.head.weight is decoder.embedding.weight
    rewrite(path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert same(hub.load(path), tiny(tied=True))
    rewrite(path, lambda t: t["lm_head.weight"].add_(1))
    with pytest.raises(ModelError, match=r"lm_head\.weight in .* differs from the embedding"):
        hub.load(path)


def test_more_layers_than_weights_are_refused_before_they_are_made(tmp_path: Path, monkeypatch) -> None:
    hub.save(tiny(), tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 9000}))
    monkeypatch.setattr(loading, "Decoder", None)
    with pytest.raises(ModelError, match=r"weights, and its config\.json implies 9,000 layers"):
        hub.load(tmp_path / "model")
