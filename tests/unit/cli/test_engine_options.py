"""What commands say of an engine: by options of their own, by ``--set``, or by both."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from penstock.cli import build_app
from penstock.cli._engine import FLAGS, Asked
from penstock.cli._help import named
from penstock.core.errors import UsageError
from penstock.policy import index
from penstock.serve.config import EngineConfig
from penstock.speculate.drafters.model import Model

COMMANDS = ("serve", "batch", "generate")

#: Options that name a policy, and of which contract.
NAMING = {
    "draft": "speculate.drafter",
    "controller": "speculate.controller",
    "verifier": "speculate.verifier",
    "kv": "kv.policy",
    "kv_eviction": "kv.eviction",
    "kv_codec": "kv.codec",
    "kv_reuse": "kv.reuse",
    "overrides": "serve.batching",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_all_of_them_are_there_and_name_what_is_registered(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    found = build_app_command(command)
    texts = {parameter.name: str(parameter.help) for parameter in found.params if parameter.name in {*FLAGS, *NAMING}}
    assert texts.keys() == {*FLAGS, *NAMING}
    told = CliRunner().invoke(build_app(), [command, "--help"])
    assert told.exit_code == 0
    assert "{" not in told.output.replace("{{", "").partition("Options")[2]
    for name, contract in NAMING.items():
        assert ", ".join(index().names(contract)) in named(texts[name])


def build_app_command(name: str):
    """The command ``name`` of the program."""
    import typer

    return typer.main.get_command(build_app()).commands[name]


@pytest.mark.parametrize(
    ("given", "overrides", "wanted"),
    [
        ({"draft": "python-1m"}, ["draft.tokens=3"], {"draft": Model(source="python-1m", tokens=3)}),
        ({}, ["draft=python-1m", "draft.tokens=3"], {"draft": Model(source="python-1m", tokens=3)}),
        ({"draft": "ngram"}, ["draft.tokens=2"], {"draft": {"name": "ngram", "tokens": 2}}),
        ({"kv": "h2o"}, ["kv.budget=0.5"], {"kv": {"name": "h2o", "budget": 0.5}}),
        ({"kv_budget": 0.5}, ["kv=h2o"], {"kv": {"name": "h2o", "budget": 0.5}}),
        ({"kv": "h2o", "kv_budget": 0.5}, ["kv=h2o", "kv.budget=0.50"], {"kv": {"name": "h2o", "budget": 0.5}}),
        ({"resident_weights": "8GB"}, ["resident_weights=8GB"], {"resident_weights": 8 * 10**9}),
        ({"kv_codec": "int8"}, ["sequences=4"], {"codec": "int8", "sequences": 4}),
        ({"kv_codec": "int4", "kv_residual": 64}, [], {"codec": {"name": "int4", "residual": 64}}),
        ({"kv_residual": 64}, ["codec=int4"], {"codec": {"name": "int4", "residual": 64}}),
        ({"tensor_parallel": 2}, ["tensor_parallel=2"], {"tensor_parallel": 2}),
        ({"deterministic": True}, ["deterministic=true"], {"deterministic": True}),
    ],
)
def test_both_add_up(given, overrides, wanted):
    assert Asked(given, overrides).config() == EngineConfig.model_validate(wanted)


@pytest.mark.parametrize(
    ("given", "overrides", "said"),
    [
        (
            {"resident_weights": "8GB"},
            ["resident_weights=4GB"],
            "--resident-weights 8GB and --set resident_weights=4GB",
        ),
        ({"kv": "h2o"}, ["kv=snapkv"], "--kv h2o and --set kv=snapkv"),
        ({"kv": "h2o"}, ["kv.name=snapkv"], "--kv h2o and --set kv.name=snapkv"),
        ({"kv": "h2o", "kv_budget": 0.5}, ['kv={name="h2o"}'], "--kv-budget 0.5 and --set kv="),
        ({"kv": "h2o", "kv_budget": 0.5}, ["kv.budget=0.25"], "--kv-budget 0.5 and --set kv.budget=0.25"),
        ({"draft": "ngram"}, ["draft=python-1m"], "--draft ngram and --set draft=python-1m"),
        ({"draft": "python-1m"}, ["draft.name=ngram"], "--draft python-1m and --set draft.name=ngram"),
        ({"kv_codec": "int8"}, ["codec=int4"], "--kv-codec int8 and --set codec=int4"),
        ({"tensor_parallel": 2}, ["tensor_parallel=4"], "--tensor-parallel 2 and --set tensor_parallel=4"),
        ({"deterministic": True}, ["deterministic=false"], "--deterministic and --set deterministic=false"),
    ],
)
def test_what_contradicts_is_told_by_both_names(given, overrides, said):
    with pytest.raises(UsageError) as raised:
        Asked(given, overrides).config()
    assert said in str(raised.value)


def test_a_command_s_own_choice_gives_way():
    assert Asked({}, ["batching=orca"]).config({"batching": "batchllm"}).batching.policy_name == "orca"
    assert Asked({}, []).config({"batching": "batchllm"}).batching.policy_name == "batchllm"
