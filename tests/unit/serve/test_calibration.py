"""What codecs learn of a model before its cache is opened, and where it is kept."""

from __future__ import annotations

import pytest
import torch

from penstock.core.errors import UsageError
from penstock.core.files import cache_folder
from penstock.models import hub
from penstock.ops.paged.codecs.coupled import Coupled
from penstock.ops.paged.codecs.fp8 import Fp8
from penstock.ops.paged.codecs.int8 import Int8
from penstock.serve.build import build_runner
from penstock.serve.calibration import keys_and_values, learned_tables, pieces_of_text
from penstock.serve.config import EngineConfig
from penstock.testing.serve_model import SHAPE, small_model


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return cache_folder("codecs")


PIECES = torch.randint(SHAPE.vocabulary, (3, 30), generator=torch.Generator().manual_seed(0))


def test_scales_are_twice_the_largest_of_each_head():
    tables = learned_tables(small_model(), Fp8(tokens=64), PIECES)
    samples = keys_and_values(small_model(), PIECES)
    assert tables.shape == (SHAPE.layers, 2, SHAPE.kv_heads)
    for layer, part, head in ((0, 0, 0), (1, 1, 1), (1, 0, 1)):
        assert float(tables[layer, part, head]) == pytest.approx(
            2 * float(samples[layer][part][:, head].abs().max()) / 448
        )


def test_what_is_learned_of_a_text_is_kept_and_what_is_damaged_is_learned_again(own_cache, monkeypatch):
    codec = Coupled(channels=4, bits=4, steps=2, tokens=64)
    first = learned_tables(small_model(), codec, PIECES)
    (file,) = own_cache.iterdir()
    with monkeypatch.context() as patched:
        patched.setattr(Coupled, "learn", lambda *_: pytest.fail("it is learned again"))
        assert torch.equal(learned_tables(small_model(), codec, PIECES), first)
    file.write_bytes(file.read_bytes()[:40])
    assert torch.equal(learned_tables(small_model(), codec, PIECES), first)
    learned_tables(small_model(), codec.model_copy(update={"steps": 1}), PIECES)
    learned_tables(small_model(), codec, PIECES[:2])
    assert len(list(own_cache.iterdir())) == 3


def test_a_folder_that_cannot_be_written_to_costs_the_next_start_only(own_cache, caplog):
    own_cache.parent.mkdir()
    own_cache.write_text("no folder")
    assert learned_tables(small_model(), Fp8(tokens=64), PIECES) is not None
    assert "learned again at the next start" in caplog.text


def test_nothing_is_learned_for_a_codec_that_needs_nothing():
    assert learned_tables(small_model(), Int8(), PIECES) is None
    assert build_runner(small_model(), EngineConfig(codec="int8", cache_tokens=100)).cache.shape.learned is None


def test_text_of_a_file_is_cut_into_pieces_of_tokens(tmp_path):
    file, tokenizer = tmp_path / "text.txt", hub.load_tokenizer(hub.resolve("python-1m"))
    file.write_text("".join(f"line {number} = {number} ** 2\n" for number in range(2000)))
    pieces = pieces_of_text(tokenizer, Fp8(tokens=500, text=file), 100)
    assert pieces.shape == (5, 100) and tokenizer.decode(pieces[0]).startswith("line 0 = 0 ** 2")
    with pytest.raises(UsageError, match="of 100 pieces of 256 tokens"):
        pieces_of_text(tokenizer, Fp8(tokens=25600, text=file), 1000)
    with pytest.raises(UsageError, match="nowhere"):
        pieces_of_text(tokenizer, Fp8(text=tmp_path / "nowhere"), 1000)
