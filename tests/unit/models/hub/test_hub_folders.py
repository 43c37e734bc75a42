"""Which folder is meant."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.utils import filter_repo_objects

from penstock.core.errors import PenstockError, UsageError
from penstock.models import hub
from penstock.models.hub import folders
from small_folders import same, tiny


def test_a_folder_resolves_to_itself(folder: Path) -> None:
    assert hub.resolve(folder) == hub.resolve(str(folder)) == folder


def test_a_model_is_called_by_its_folder_or_as_it_was_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir(exist_ok=True)
    assert hub.name_of(str(folder)) == hub.name_of(f"{folder}/") == folder.name
    monkeypatch.chdir(folder)
    assert hub.name_of(".") == folder.name
    assert hub.name_of("python-6m") == "python-6m"
    assert hub.name_of("org/name") == "org/name"


def test_a_run_resolves_to_its_newest_checkpoint_and_then_to_its_model(tmp_path: Path) -> None:
    for name in ("step-00000100", "step-00000020", "step-1000000000", "step-zzz", ".step-2000000000.partial"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    with pytest.raises(UsageError, match="there is no model in"):
        hub.resolve(tmp_path)
    for name in ("step-00000100", "step-00000020", "step-zzz", ".step-2000000000.partial"):
        (tmp_path / "checkpoints" / name / "config.json").write_text("{}")
    assert hub.resolve(tmp_path) == tmp_path / "checkpoints" / "step-00000100"
    (tmp_path / "checkpoints" / "step-1000000000" / "config.json").write_text("{}")
    assert hub.resolve(tmp_path) == tmp_path / "checkpoints" / "step-1000000000"
    hub.save(tiny(), tmp_path / "model")
    assert hub.resolve(tmp_path) == tmp_path / "model"


def test_boxed_models(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By bare name, unless a folder here has that name."""
    monkeypatch.setattr(folders, "BOXED", folder.parent)
    assert hub.resolve(folder.name) == folder
    with pytest.raises(UsageError, match="did you mean 'model-folder'"):
        hub.resolve("model-foldr")
    (tmp_path / "here" / folder.name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UsageError, match=r"neither config\.json nor"):
        hub.resolve(folder.name)


def test_a_hub_name_is_downloaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(name: str, *, allow_patterns: list[str]) -> str:
        asked.append(name)
        listed = ["config.json", "generation_config.json", "model.safetensors.index.json", "chat_template.jinja"]
        listed += ["model-00001-of-00002.safetensors", "tokenizer.json", "tokenizer.model", "merges.txt", "vocab.json"]
        useless = ["consolidated.safetensors", "pytorch_model.bin", "original/consolidated.00.pth", "README.md"]
        assert list(filter_repo_objects(listed + useless, allow_patterns=allow_patterns)) == listed
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert same(hub.load("org/name-1.5_b"), tiny())
    assert asked == ["org/name-1.5_b"]


def test_a_hub_name_without_a_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The real client, told to be offline, with an empty cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UsageError, match="no folder org/name here, and the Hugging Face hub") as caught:
        hub.resolve("org/name")
    assert "spelling and the network" in caught.value.hint


@pytest.mark.parametrize("name", ["nothing", "./nothing", "a/b/c", "/nothing/at/all", "", "x" * 5000, "nul\0"])
def test_no_such_model(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PenstockError, match="model"):
        hub.resolve(name)


def test_a_file_is_no_model(folder: Path) -> None:
    with pytest.raises(UsageError, match="is a file"):
        hub.load(folder / "model.safetensors")
