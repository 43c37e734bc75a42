"""The profile of a Decoder's layers, and what is cut by it."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from penstock.cli import build_app
from penstock.models.decoder import Decoder
from penstock.pipeline.run.layers import profile
from penstock.testing.pipeline_runtime import dense, sparse, untied

CPU = torch.device("cpu")


@pytest.mark.parametrize("config", [untied(3), sparse(3)], ids=["dense", "sparse"])
def test_every_layer_is_measured_and_all_weights_are_counted(config):
    """Embedding, three layers, and head with the last norm; in fp64."""
    found = profile(config, 2, 7, device=CPU, dtype=torch.float64)
    assert len(found) == 5
    assert all(layer.seconds > 0 for layer in found)
    assert [layer.activation for layer in found] == [2.0 * 7 * 8 * config.hidden] * 4 + [0.0]
    assert sum(layer.weights for layer in found) == 8 * Decoder(config).parameter_count()


def test_a_tied_matrix_is_on_both_ends():
    found = profile(dense(1), 1, 3, device=CPU, dtype=torch.float32)
    matrix = 4 * dense(1).vocabulary * dense(1).hidden
    assert (found[0].weights, found[-1].weights) == (matrix, matrix + 4 * dense(1).hidden)


def test_more_work_takes_longer():
    """A larger layer and a longer minibatch: by more than any noise."""
    small = profile(dense(1), 1, 4, device=CPU, dtype=torch.float32)[1].seconds
    large = dense(1).model_copy(update={"hidden": 512, "ffn": 2048, "heads": 8, "head_dim": 64})
    assert profile(large, 4, 128, device=CPU, dtype=torch.float32)[1].seconds > 3 * small


def test_partition_cuts_a_model(tmp_path):
    arguments = ["python-1m", "--stages", "3", "--bandwidth", "5", "--length", "16"]
    done = CliRunner().invoke(build_app(), ["pipeline", "partition", *arguments, "--json"], catch_exceptions=False)
    found = json.loads(done.stdout)
    assert [*found["layers"]][:2] == ["embedding", "layer 0"]
    assert sum(stage["replicas"] for stage in found["stages"]) == 3
    assert found["stages"][-1]["last"] == len(found["layers"])
    drawn = CliRunner().invoke(build_app(), ["pipeline", "partition", *arguments], catch_exceptions=False).stdout
    assert "penstock pipeline show pipedream --stages 3 --set 'replicas=[" in " ".join(drawn.split())
