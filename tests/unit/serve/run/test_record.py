"""Steps as data: recorded, read and computed again."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from penstock.core.errors import UsageError
from penstock.models.decoder import Decoder
from penstock.serve.build import build_engine, build_runner
from penstock.serve.config import EngineConfig
from penstock.serve.run.record import flatten, read_header, read_steps, unflatten
from penstock.serve.run.replay import replay
from penstock.speculate.drafters.ngram import Ngram
from penstock.testing.drafting_engines import played
from penstock.testing.serve_model import SHAPE, small_model

SIZES = {"attention": "reference", "tokens": 40, "sequences": 8, "block_size": 4, "cache_tokens": 400}


@pytest.fixture(scope="module", params=[("plain", "2,2"), ("overlapped", "")])
def recording(request, tmp_path_factory):
    """Requests of all kinds, drafted and not."""
    path = tmp_path_factory.mktemp("steps") / "steps.bin"
    loop, tree = request.param
    options = {"loop": loop, "record": str(path), "draft": Ngram(shortest=1), "draft_tree": tree}
    config = EngineConfig.model_validate({**SIZES, **options})
    engine = build_engine(small_model(), config, source="small")
    played(engine, 0)
    engine.close()
    return path


def test_a_recording_computed_again_chooses_the_same_tokens(recording):
    config = EngineConfig.model_validate(read_header(recording)["engine"])
    found = replay(recording, build_runner(small_model(), config))
    assert found.steps > 20 and found.chosen == found.equal > 100


def test_other_weights_compute_the_same_steps(recording):
    config = EngineConfig.model_validate(read_header(recording)["engine"])
    found = replay(recording, build_runner(Decoder(SHAPE).initialize(5).eval(), config))
    assert 0 < found.equal < found.chosen


def test_a_step_is_what_it_was_written_as(recording):
    for number, (step, _) in enumerate(read_steps(recording)):
        arrays, more = flatten(dataclasses.replace(step, lead=number % 2))
        again, rest = flatten(unflatten(arrays, more))
        assert rest == more and again.keys() == arrays.keys()
        assert all(np.array_equal(again[name], arrays[name]) for name in arrays)


@pytest.mark.parametrize("cut", [1, 9, 400])
def test_a_recording_that_was_cut_off_ends_with_its_last_whole_step(recording, tmp_path, cut):
    whole = recording.read_bytes()
    torn = tmp_path / "torn.bin"
    torn.write_bytes(whole[:-cut])
    steps = len(list(read_steps(recording)))
    assert steps - 4 <= len(list(read_steps(torn))) <= steps


def test_what_is_no_recording_is_refused(tmp_path):
    path = tmp_path / "other"
    path.write_bytes(b"\x08\0\0\0\0\0\0\0nonsense")
    with pytest.raises(UsageError, match="no recording"):
        read_header(path)
    with pytest.raises(UsageError, match="cannot be read"):
        read_header(tmp_path / "none")
