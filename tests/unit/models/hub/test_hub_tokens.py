"""The tokenizer beside a model, and the tokens that end its texts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from penstock.core.errors import DataError, ModelError
from penstock.models import hub


def test_tokenizer(folder: Path) -> None:
    with pytest.raises(DataError, match="has no tokenizer"):
        hub.load_tokenizer(folder)
    model = tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?")
    words = tokenizers.Tokenizer(model)
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="?").save_pretrained(folder)
    loaded = hub.load_tokenizer(str(folder))
    assert loaded.encode("b a c") == [1, 0, 2]
    assert loaded.eos_token_id == 2
    assert hub.end_tokens(folder, loaded) == {2}
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    (folder / "config.json").write_text(
        json.dumps(json.loads((folder / "config.json").read_text()) | {"eos_token_id": 9})
    )
    assert hub.end_tokens(folder, loaded) == {2, 7, 9}
    (folder / "tokenizer.json").write_text('{"model"')
    with pytest.raises(DataError, match="cannot be read"):
        hub.load_tokenizer(folder)


@pytest.mark.parametrize("named", ["x", [1, None], 1.5, True, {"a": 1}])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_an_end_that_is_no_token_is_refused(folder: Path, file: str, named: object) -> None:
    path = folder / file
    told = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(told | {"eos_token_id": named}))
    with pytest.raises(ModelError, match=f"{file}: the eos_token_id .* is no token"):
        hub.config_end_tokens(folder)


def test_a_tokenizer_that_is_all_in_its_file_is_read_without_knowledge_of_models(folder: Path, monkeypatch) -> None:
    """As transformers reads it that looks for a class; one that names its class is left to it."""
    hub.load_tokenizer("python-6m").save_pretrained(folder)
    wanted, asked = AutoTokenizer.from_pretrained(folder), []
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *given, **more: asked.append(given) or wanted)
    found, text = hub.load_tokenizer(folder), "def f(x):\n    return 'é' * x  # <|endoftext|>"
    assert not asked and type(found) is type(wanted)
    assert found(text)["input_ids"] == wanted(text)["input_ids"]
    assert found.special_tokens_map == wanted.special_tokens_map
    told = json.loads((folder / "tokenizer_config.json").read_text())
    for change in ({"tokenizer_class": "Qwen2Tokenizer"}, {"auto_map": {}}):
        (folder / "tokenizer_config.json").write_text(json.dumps(told | change))
        asked.clear()
        hub.load_tokenizer(folder)
        assert asked
