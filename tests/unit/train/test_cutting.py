"""Which layers make which stage."""

from __future__ import annotations

import json

import pytest

from penstock.core.errors import ConfigError, PenstockError, UsageError
from penstock.models.config import DecoderConfig
from penstock.pipeline.partition.balanced import balanced
from penstock.pipeline.partition.pipedream import Layer, partition
from penstock.pipeline.simulate.times import Piece, StagesError, Times
from penstock.policy import create
from penstock.testing.pipeline_training import options
from penstock.train.pipeline.cutting import ranges_of


def written(tmp_path, *stages):
    """A partition file; stages are (first, last, replicas)."""
    named = [dict(zip(("first", "last", "replicas"), stage, strict=True)) for stage in stages]
    path = tmp_path / "partition.json"
    path.write_text(json.dumps({"layers": {}, "stages": named, "seconds": 1.0}))
    return str(path)


def ranges(devices, layers, pipeline, schedule="1f1b"):
    config = options(devices, 2 * devices, layers, pipeline)
    built = (config.pipeline.route or create("pipeline.schedule", schedule)).build(devices, 2 * devices)
    shape = config.model
    assert isinstance(shape, DecoderConfig)
    return [(own.start, own.stop) for own in ranges_of(config, shape, built)]


def test_a_partition_counts_the_embedding_and_the_head_as_pieces(tmp_path):
    assert ranges(2, 4, {"partition": written(tmp_path, (0, 2, 1), (2, 6, 1))}) == [(0, 1), (1, 4)]
    assert ranges(3, 4, {"partition": written(tmp_path, (0, 1, 1), (1, 5, 1), (5, 6, 1))}) == [(0, 0), (0, 4), (4, 4)]
    # The same number of devices for each stage: as many pipelines.
    assert ranges(2, 4, {"partition": written(tmp_path, (0, 3, 2), (3, 6, 2))}) == [(0, 2), (2, 4)]


def test_half_as_fast_a_device_gets_half_the_work():
    assert [len(own) for own in balanced([1.0] * 12, 3, speeds=[1.0, 1.0, 2.0])] == [3, 3, 6]
    assert [len(own) for own in balanced([1.0] * 12, 2, last=4.0, speeds=[3.0, 1.0])] == [11, 1]
    # A stage with replicas is as fast as the slower of them; a device with two stages is as fast for both.
    assert ranges(2, 12, {"speeds": [1.0, 3.0], "schedule": "chimera"}, "chimera") == [(0, 6), (6, 12)]


def test_a_route_that_recovers_has_equal_stages():
    assert ranges(4, 8, {"route": "checkfree"}) == [(0, 2), (2, 4), (4, 6), (6, 8)]
    with pytest.raises(ConfigError, match="6 layers are no 4 equal stages"):
        ranges(4, 6, {"route": "checkfree"})
    assert ranges(4, 6, {"route": "checkfree", "cuts": [2, 4, 5]}) == [(0, 2), (2, 4), (4, 5), (5, 6)]


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([(0, 3, 2), (3, 6, 1)], "has stages on 2, 1 devices.*\n.*--straight"),
        ([(0, 6, 1)], "cuts 4 layers into 1 stages, and this schedule has 2.*\n.*--stages 2"),
        ([(0, 3, 1), (3, 8, 1)], "cuts 6 layers into 2 stages, and this schedule has 2, for 4 layers"),
    ],
)
def test_partitions_that_do_not_fit(tmp_path, stages, message):
    with pytest.raises(ConfigError, match=message):
        ranges(2, 4, {"partition": written(tmp_path, *stages)})


def test_what_is_no_partition_is_an_error_that_names_the_file(tmp_path):
    with pytest.raises(PenstockError, match=r"nowhere\.json"):
        ranges(2, 4, {"partition": str(tmp_path / "nowhere.json")})
    (tmp_path / "other.json").write_text('{"stages": []}')
    with pytest.raises(ConfigError, match=r"other\.json"):
        ranges(2, 4, {"partition": str(tmp_path / "other.json")})


@pytest.mark.parametrize(
    ("pipeline", "message"),
    [
        ({"cuts": [1], "speeds": [1.0, 1.0]}, "cuts and speeds each say where to cut"),
        ({"route": "skippipe", "schedule": "gpipe"}, "a route orders the microbatches itself"),
        ({"cuts": [-1]}, "greater than or equal to 0"),
    ],
)
def test_what_contradicts_itself(pipeline, message):
    with pytest.raises(ConfigError, match=message):
        options(2, 4, 4, pipeline)


def test_a_route_needs_a_pipeline():
    with pytest.raises(ConfigError, match="the route skippipe leads through the stages of a pipeline"):
        options(1, 4, 4, {"route": "skippipe"})


def test_one_device_for_each_stage():
    """Replicas would be faster here; without them, the best of all cuts is found."""
    layers = [Layer(seconds, 0.0, 0.0) for seconds in (1.0, 8.0, 1.0, 1.0)]
    assert max(stage.replicas for stage in partition(layers, 3, 1e9).stages) > 1
    straight = partition(layers, 3, 1e9, 1)
    assert [(stage.first, stage.last, stage.replicas) for stage in straight.stages] == [(0, 1, 1), (1, 2, 1), (2, 4, 1)]
    assert straight.seconds == 8.0
    with pytest.raises(UsageError, match="4 layers cannot be cut into stages for 5 devices, at most 1 each"):
        partition(layers, 5, 1e9, 1)


def test_a_sharded_vocabulary_has_the_work_of_the_head_that_was_measured():
    layers = [Piece(forward=1.0, input_grad=1.0, weight_grad=1.0)] * 2
    head = Piece(forward=6.0, input_grad=0.0, weight_grad=0.0)
    nothing = Piece(forward=0.0, input_grad=0.0, weight_grad=0.0)
    times = Times(forward=(1.0, 7.0), input_grad=1.0, weight_grad=1.0, pieces=(nothing, *layers, head))
    schedule = create("pipeline.schedule", "1f1b").build(2, 4)
    sharded = create("pipeline.transform", "vocabulary", barriers=2, times=times).apply(schedule)
    assert sharded.barriers == 2
    costs = times.costs(sharded)
    assert costs.forward == (1.0, 1.0)
    assert {kind.name: seconds for kind, seconds in costs.shards.items()} == {"S": 1.0, "T": 2.0}  # 6 on two devices
    assert times.costs(schedule).forward == (1.0, 7.0)


def test_times_of_other_numbers_of_stages_are_put_together_from_pieces():
    """The embedding with the first stage, the head with the last one; the slowest as fast as it can be."""
    layers = [Piece(forward=1.0, input_grad=2.0, weight_grad=1.0)] * 4
    ends = Piece(forward=0.5, input_grad=0.0, weight_grad=0.5), Piece(forward=4.0, input_grad=0.0, weight_grad=0.0)
    times = Times(forward=(3.0, 5.5), input_grad=(5.0, 3.0), weight_grad=(2.0, 2.5), pieces=(ends[0], *layers, ends[1]))
    assert times.each("forward", 2) == (3.0, 5.5)
    assert times.each("forward", 3) in ((2.5, 1.0, 5.0), (1.5, 2.0, 5.0))  # no stage of more than 9 in all
    assert sum(times.each("forward", 4)) == pytest.approx(8.5)
    assert times.each("input_grad", 4) == (2.0, 2.0, 2.0, 2.0)
    with pytest.raises(StagesError):
        times.each("forward", 5)
