"""What is wrong with a config.json."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from penstock.core.errors import ModelError, PenstockError, UsageError
from penstock.models import hub


def test_config_errors(folder: Path) -> None:
    path = folder / "config.json"
    original = path.read_text()
    for change, message in (
        (
            {"model_type": "ours"},
            "model_type 'ours' is not supported\nIts weights are those of 'llama': if it computes",
        ),
        ({"model_type": ["llama"]}, "model_type"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "quantized, it says, but none has a qweight"),
        ({"hidden_act": "relu"}, "hidden_act 'relu'"),
        ({"torch_dtype": "int8"}, "dtype 'int8'"),
    ):
        path.write_text(json.dumps(json.loads(original) | change))
        with pytest.raises(ModelError, match=message) as caught:
            hub.load(folder)
        assert str(path) in str(caught.value)
    for text, message in (("{", "not valid JSON"), ("[1]", "not a table"), ("{}", "model_type None")):
        path.write_text(text)
        with pytest.raises(PenstockError, match=message):
            hub.load(folder)
    path.unlink()
    with pytest.raises(UsageError, match=r"config\.json does not exist"):
        hub.read_config(folder)
