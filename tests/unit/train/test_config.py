"""The configuration of a run: what does not fit together is refused, with the key at fault."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.config import apply_overrides, build, read_toml
from penstock.core.errors import ConfigError, UsageError
from penstock.data.corpora.folder import Folder
from penstock.train import presets
from penstock.train.config import BatchConfig, DataConfig, Stage, TrainConfig
from tiny_runs import MODEL

SHAPE = {"model": MODEL, "batch": {"tokens": 64, "stages": [{"length": 32}]}, "steps": 5}


def made(**changes) -> TrainConfig:
    return build(TrainConfig, {**SHAPE, **changes})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim.learning_rate=1"], r"optim\.optimizer 'adamw' has no option 'learning_rate'"),
        (["optim.name=muno"], r"optim\.optimizer has no policy 'muno': did you mean 'muon'\?"),
        (["btach.tokens=64"], r"btach: unknown key; did you mean 'batch'\?"),
        (["batch.token=64"], r"batch\.token: unknown key; did you mean 'tokens'"),
        (["model.hiden=64"], r"model\.hiden: unknown key; did you mean 'hidden'\?"),
        (["batch.tokens=many"], r"batch\.tokens: .*integer.* \(got 'many'\)"),
        (["batch.tokens=0"], r"batch\.tokens: .*greater than 0"),
        (["batch.tokens=65"], r"tokens \(65\) must be a multiple of the longest length \(32\)"),
        (["batch.micro_tokens=48"], r"micro_tokens must be a multiple of 32 and divide tokens \(64\)"),
        (["batch.tokens=96", "batch.micro_tokens=64"], "micro_tokens must be a multiple of 32 and divide tokens"),
        (["batch.stages=[]"], "at least one stage"),
        (
            ["batch.stages=[{length=32},{length=24}]"],
            r"the longest length 32 must be a multiple of each stage's \(24\)",
        ),
        (["batch.stages=[{length=32,share=0}]"], r"batch\.stages\.0\.share: .*greater than 0"),
        (["batch.tokens=128", "batch.stages=[{length=128}]"], r"128 tokens are longer than the model's context \(64\)"),
        (["data.vocabulary=512", "model.vocabulary=500"], r"data\.vocabulary \(512\) is larger than model\.vocabulary"),
        (["data.held_out=-1"], r"data\.held_out: .*greater than or equal to 0"),
        (["data.held_out=1"], r"data\.held_out: .*less than 1"),
        (["precision=fp8"], "precision: .*'fp32', 'autocast' or 'bf16'"),
        (["steps=0"], "steps: .*greater than 0"),
        (["minutes=0"], "minutes: .*greater than 0"),
        (["minutes=inf"], "minutes: .*finite"),
        (["optim.lr=inf"], "lr: .*finite"),
        (["optim.lr=-1"], "lr: .*greater than 0"),
        (["clip=0"], "clip: .*greater than 0"),
        (["keep_checkpoints=0"], "keep_checkpoints: .*greater than 0"),
        (["start_from=elsewhere"], "start_from and target, not model and start_from"),
        (["model.heads=3", "model.kv_heads=2"], r"heads \(3\) must be a multiple of kv_heads \(2\)"),
        (["model.head_dim=15"], "must be even"),
        (["schedule.name=linaer"], "did you mean 'linear'"),
    ],
)
def test_a_wrong_value_is_named(overrides, message):
    with pytest.raises(UsageError, match=message):
        build(TrainConfig, apply_overrides(SHAPE, overrides))


def test_a_run_has_a_beginning_and_an_end():
    with pytest.raises(
        ConfigError, match=r"say what to train: a \[model\] section, start_from, or a target for a head"
    ):
        build(TrainConfig, {"steps": 1})
    with pytest.raises(ConfigError, match="say when to stop: steps, tokens, epochs or minutes"):
        build(TrainConfig, {key: value for key, value in SHAPE.items() if key != "steps"})


def test_every_fault_is_told_at_once():
    with pytest.raises(ConfigError) as caught:
        made(steps=-1, clip="tight", compille=True)
    assert [line.split(":")[0].strip() for line in str(caught.value).splitlines()[1:]] == ["steps", "clip", "compille"]


@pytest.mark.parametrize("data", [{"vocabulary": 777}, DataConfig(vocabulary=777)])
def test_the_model_takes_the_vocabulary_of_the_data(data):
    assert made(data=data).model.vocabulary == 777
    assert made(data=data, model={**MODEL, "vocabulary": 800}).model.vocabulary == 800


def test_a_store_that_is_there_may_have_any_vocabulary():
    """What it has is known when it is opened."""
    assert made(data={"store": "somewhere"}, model={**MODEL, "vocabulary": 300}).model.vocabulary == 300


def preset_of(name: str) -> TrainConfig:
    """A preset; of those that train a head, for some model, and of those that need one for what drafts for it."""
    given = read_toml(presets.path_of(name))
    models = {"target": "python-6m"} if "head" in given else {}
    if name == "acceptance":
        models = {"target": "python-6m", "draft": "python-1m"}
    return build(TrainConfig, given | models)


@pytest.mark.parametrize("preset", presets.names())
def test_presets_are_valid_and_survive_being_written_down(preset):
    """``run.json`` and every checkpoint hold the configuration as JSON."""
    config = preset_of(preset)
    assert build(TrainConfig, config.model_dump(mode="json")) == config


@pytest.mark.parametrize("preset", presets.names())
def test_presets_leave_to_the_machine_what_depends_on_it(preset):
    config = preset_of(preset)
    assert (config.precision, config.compile, config.device) == ("auto", "auto", "auto")


def test_policies_survive_being_written_down(tmp_path):
    config = made(
        data={"corpus": {"name": "folder", "path": str(tmp_path), "patterns": ["*.py"]}, "sampler": "sequential"},
        optim={"name": "muon", "momentum": 0.9},
        schedule={"name": "wsd", "decay": 0.2},
        average={"name": "ema", "decay": 0.5},
    )
    again = build(TrainConfig, config.model_dump(mode="json"))
    assert again == config
    assert again.data.corpus == Folder(path=tmp_path, patterns=("*.py",))


@given(st.lists(st.tuples(st.sampled_from([8, 16, 32]), st.floats(0.1, 9)), min_size=1, max_size=5), st.floats(0, 1))
def test_stages_take_their_shares_in_order(stages, progress):
    batch = BatchConfig(tokens=64, stages=tuple(Stage(length=length, share=share) for length, share in stages))
    assert batch.length == max(length for length, _ in stages)
    bounds = [
        sum(share for _, share in stages[: i + 1]) / sum(share for _, share in stages) for i in range(len(stages))
    ]
    within = next((i for i, bound in enumerate(bounds) if progress < bound), len(stages) - 1)
    if all(not math.isclose(progress, bound) for bound in bounds[:-1]):
        assert batch.length_at(progress) == stages[within][0]
    assert batch.length_at(1.0) == stages[-1][0]
