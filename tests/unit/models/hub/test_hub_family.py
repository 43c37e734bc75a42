"""In which family a model is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.core.errors import ModelError, UsageError
from penstock.models import hub
from small_folders import tiny


def test_family_is_the_one_asked_for_or_loaded_from_or_the_first_that_fits(tmp_path: Path) -> None:
    hub.save(tiny(), tmp_path / "as-mistral", family="mistral")
    loaded = hub.load(tmp_path / "as-mistral")
    assert hub.family_of(loaded).policy_name == "mistral"
    assert hub.family_of(loaded, "llama").policy_name == "llama"
    assert hub.family_of(tiny()).policy_name == "llama"
    assert hub.family_of(tiny(window=3)).policy_name == "mistral"
    assert hub.family_of(tiny(qkv_bias=True)).policy_name == "qwen2"
    assert hub.family_of(tiny(qk_norm=True, window=2, windowed_layers=(1,))).policy_name == "qwen3"
    moe = {"experts": 4, "ffn": 8}
    assert hub.family_of(tiny(moe=moe)).policy_name == "mixtral"
    assert hub.family_of(tiny(qk_norm=True, moe=moe | {"dense_layers": (0,)})).policy_name == "qwen3_moe"
    with pytest.raises(UsageError, match="did you mean 'llama'"):
        hub.family_of(loaded, "lama")
    with pytest.raises(ModelError, match=r"as llama, qk_norm; .*as qwen3, mlp_bias"):
        hub.save(tiny(qk_norm=True, mlp_bias=True), tmp_path / "none")
    assert not (tmp_path / "none").exists()
