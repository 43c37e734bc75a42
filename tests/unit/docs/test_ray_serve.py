"""The deployment for Ray Serve that the documents have."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

FILE = Path(__file__).parents[3] / "docs" / "ray_serve.py"


def test_it_can_be_deployed():
    pytest.importorskip("ray.serve")
    spec = importlib.util.spec_from_file_location("ray_serve", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    options = module.deployed("python-1m", 3, 2)._bound_deployment
    assert options.num_replicas == 3
    assert options.ray_actor_options["num_gpus"] == 2
