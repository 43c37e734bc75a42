"""Transforms of a pipeline's schedule in the trainer: the updates of one device, to the last digits of fp64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from penstock.core.errors import UsageError
from penstock.core.files import read_json
from penstock.core.randomness import torch_generator
from penstock.data.loader import Batch
from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder
from penstock.ops.cross_entropy import IGNORE
from penstock.parallel.world import World
from penstock.pipeline.ir.schedule import Kind
from penstock.pipeline.run.offload import HostLink
from penstock.testing.ranks import ranks
from penstock.train.config import TrainConfig
from penstock.train.loop import Trainer
from penstock.train.pipeline.pipeline import PROFILED, Pipeline
from tiny_runs import MODEL, VOCABULARY, config

SHAPE = {**MODEL, "layers": 4, "vocabulary": VOCABULARY, "init_std": 0.08, "tied": True}
ROWS, LENGTH = 6, 16
#: So many that a schedule that is planned from the first ones is planned, and runs.
UPDATES = 2 * PROFILED + 1

#: Copies to the host that hide behind the work for certain, and are not planned anew.
QUICK = {"name": "pipeoffload", "times": {"host": 0.1}}
COMBINATIONS: list[tuple[Any, list[Any]]] = [
    ("gpipe", ["pipeoffload"]),
    ("interleaved-1f1b", ["2bp", {**QUICK, "share": 0.5}]),
]


def options(devices: int, schedule: Any, transforms: list[Any], **changes: Any) -> TrainConfig:
    batch = {"tokens": ROWS * LENGTH, "micro_tokens": LENGTH, "stages": [{"length": LENGTH}]}
    pipeline = {"schedule": schedule, "transforms": transforms}
    everything = {"model": SHAPE, "batch": batch, "parallel": {"pipeline": devices}, "pipeline": pipeline, **changes}
    return config(Path("unread"), **everything)


def batch(step: int) -> Batch:
    """The same in all processes: of two documents a row, some targets not counted."""
    tokens, targets = torch.randint(VOCABULARY, (2, ROWS, LENGTH), generator=torch_generator(0, "batch", step))
    documents = (torch.arange(LENGTH) > 4).long().expand(ROWS, LENGTH)
    return Batch(tokens, targets.masked_fill(targets % 5 == 0, IGNORE), documents)


def updates(trainer: Trainer) -> list[float]:
    """The losses."""
    return [trainer.update(batch(step), LENGTH, 1.0)["loss"].item() for step in range(UPDATES)]


def pipelined(options: TrainConfig, folder: Path, world: World) -> tuple[Trainer, Pipeline]:
    """A trainer in fp64 that reads no data."""
    pipeline = Pipeline(options, DecoderConfig(**SHAPE), folder, world)
    part = pipeline.part.initialize(0).double()
    return Trainer(options, part, None, None, folder, world, pipeline), pipeline


@pytest.fixture(scope="module")
def alone() -> tuple[list[float], dict[str, Tensor]]:
    """Losses and weights of one device."""
    torch.set_num_threads(1)
    model = Decoder(DecoderConfig(**SHAPE)).initialize(0).double()
    losses = updates(Trainer(options(1, "1f1b", []), model, None, None, Path("unwritten")))
    assert losses[-1] < losses[0]
    return losses, {name: p.detach() for name, p in model.named_parameters()}


def test_transforms_change_nothing_but_the_order(alone, tmp_path):
    """Losses and all weights after some updates on two devices, with and without times of their own."""
    losses, weights = alone

    def work(world: World) -> list[Any]:
        torch.set_num_threads(1)
        found = []
        for number, (schedule, transforms) in enumerate(COMBINATIONS):
            folder = tmp_path / str(number)
            folder.mkdir(exist_ok=True)
            trainer, pipeline = pipelined(options(2, schedule, transforms), folder, world)
            seen = updates(trainer)
            error = max((m.detach() - weights[name]).abs().max().item() for name, m in trainer.weights.masters.items())
            kinds = {task.kind.name for task in pipeline.schedule.orders[world.rank]}
            found.append([seen, error, sorted(kinds), len(pipeline.schedule.offloaded)])
        return found

    for result in ranks(2, work):
        assert "returned" in result, result
        for (_, transforms), (seen, error, kinds, offloaded) in zip(COMBINATIONS, result["returned"], strict=True):
            assert seen == pytest.approx(losses, rel=1e-6)  # which the trainer reports in fp32
            assert error < 1e-9
            assert kinds == (["F", "I", "W"] if "2bp" in transforms else ["B", "F"])
            assert offloaded or not any(isinstance(transform, dict) for transform in transforms)
    planned, (_, given) = (read_json(tmp_path / number / "pipeline.json")["transforms"] for number in "01")
    assert planned[0]["name"] == given["name"] == "pipeoffload"
    assert planned[0]["times"]["host"] > 0
    assert len(planned[0]["times"]["forward"]) == 2
    assert given["times"] == QUICK["times"] | {key: value for key, value in given["times"].items() if key != "host"}
    assert given["times"]["forward"] == 1


def test_weights_of_another_precision_than_the_masters_stay(tmp_path, monkeypatch):
    """Activations leave for the host, and none of the weights that the forward passes read."""
    chosen = options(1, "gpipe", [QUICK], precision="bf16")
    pipeline = Pipeline(chosen, DecoderConfig(**SHAPE), tmp_path, World())
    part = pipeline.part.initialize(0)
    trainer = Trainer(chosen, part, None, None, tmp_path, World(), pipeline)
    sent: list[int] = []
    send = HostLink.send

    def spied(link: HostLink, tensors: list[Tensor]) -> Any:
        sent.extend(tensor.untyped_storage().data_ptr() for tensor in tensors)
        return send(link, tensors)

    monkeypatch.setattr(HostLink, "send", spied)
    trainer.update(batch(0), LENGTH, 1.0)
    assert sent
    assert not set(sent) & {parameter.untyped_storage().data_ptr() for parameter in part.parameters()}


def test_the_way_to_the_host_is_measured():
    assert 1e7 < HostLink(torch.device("cpu")).bandwidth() < 1e13


@pytest.mark.parametrize(
    ("transforms", "changes", "message"),
    [
        (
            ["pipeoffload", "2bp"],
            {"activation_checkpointing": True},
            "2bp defers weight gradients.*\n.*activation_checkpointing=false, or leave 2bp out of pipeline.transforms",
        ),
        (["2pb"], {}, "pipeline.transform has no policy '2pb': did you mean '2bp'"),
    ],
)
def test_what_cannot_be_trained_is_refused_with_a_way_out(tmp_path, transforms, changes, message):
    with pytest.raises(UsageError, match=message):
        Pipeline(options(2, "1f1b", transforms, **changes), DecoderConfig(**SHAPE), tmp_path, World(rank=0, size=2))


def test_transforms_without_a_flush_are_refused(tmp_path):
    with pytest.raises(UsageError, match="2bp transforms schedules with one version of the weights"):
        Pipeline(options(1, "pipedream", ["2bp"], clip=None), DecoderConfig(**SHAPE), tmp_path, World())


def test_checkpointed_activations_may_wait_on_the_host(tmp_path):
    """Then it is the inputs of layers that leave."""
    results = []
    for transforms in ([], [QUICK]):
        chosen = options(1, "gpipe", transforms, activation_checkpointing=True)
        trainer, pipeline = pipelined(chosen, tmp_path, World())
        results.append((updates(trainer), [m.detach() for m in trainer.weights.masters.values()]))
    assert pipeline.schedule.offloaded
    assert results[0][0] == results[1][0]
    assert all(map(torch.equal, results[0][1], results[1][1]))
    assert Kind.W not in {task.kind for order in pipeline.schedule.orders for task in order}
