"""A head is trained like a model: it learns, stops, goes on, and drafts for the model that it was trained for."""

from __future__ import annotations

import shutil

import pytest
import torch

from penstock.core.config import build, read_toml
from penstock.core.errors import ConfigError, ModelError, UsageError
from penstock.core.progress import silent
from penstock.data.loader import Batch
from penstock.models import hub
from penstock.models.attention import CausalRows, PackedRows
from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder
from penstock.models.heads import folder as heads
from penstock.models.heads.headed import Headed
from penstock.models.heads.medusa import Medusa
from penstock.ops.cross_entropy import IGNORE
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.messages import Request
from penstock.serve.opening import open_engine
from penstock.train import presets
from penstock.train.config import TrainConfig
from penstock.train.objectives.self_distillation import SelfDistillation
from penstock.train.run import Run
from penstock.train.session import train_to_the_end
from tiny_runs import MODEL, VOCABULARY, assert_same_bits, tree


@pytest.fixture(scope="module")
def target(store, tmp_path_factory):
    """A model folder, of a few steps' training."""
    run = tmp_path_factory.mktemp("heads") / "target"
    train_to_the_end(Run.create(build(TrainConfig, tree(store, steps=30)), run), silent)
    return run


def options(store, model, **changes) -> TrainConfig:
    given = tree(store, target=str(model), objective="self_distillation", head={"name": "medusa", "heads": 2})
    del given["model"]
    return build(TrainConfig, {**given, **changes})


@pytest.mark.parametrize(
    "head",
    [
        {"name": "medusa", "heads": 2},
        {"name": "early_exit", "layers": 1},
        {"name": "eagle"},
        {"name": "hidden_transfer", "left": 1, "tokens": 2},
        {"name": "ppd", "tokens": 3},
    ],
)
def test_a_head_is_trained_for_a_model_and_drafts_for_it(store, target, tmp_path, head, capsys):
    run = Run.create(options(store, target, head=head, steps=20), tmp_path / "run")
    before = Headed.new(hub.load(target), run.config.head, 0)
    summary = train_to_the_end(run, silent)
    assert summary is not None
    assert len(summary["agreement"]) == head.get("heads", head.get("tokens", 1)) and all(
        0 < each < 1 for each in summary["agreement"]
    )
    assert "likeliest tokens on held-out documents the head has" in capsys.readouterr().out

    described = heads.describe(tmp_path / "run" / "model")
    assert described.target == str(target) and described.kind == run.config.head
    learnt = heads.load(tmp_path / "run", hub.load(target))
    moved = zip(learnt.parameters(), before.head.parameters(), strict=True)
    assert any(not torch.equal(one, other) for one, other in moved)

    texts = []
    for drafting in ({}, {"draft": str(tmp_path / "run"), "controller": "fixed"}):
        config = EngineConfig.model_validate({"cache_tokens": 400, **drafting})
        engine = open_engine(target, config)
        engine.add(Request("one", [1, 2, 3], SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)))
        tokens = [token for delta in _played(engine) for token in delta.tokens]
        texts.append(tokens)
    assert texts[0] == texts[1]
    assert engine.snapshot().drafted_tokens > 0


def _played(engine):
    while engine.busy:
        yield from engine.step()


@pytest.mark.parametrize("background", [False, True])
def test_training_of_a_head_goes_on_bit_for_bit(store, target, tmp_path, background):
    whole = options(store, target, steps=20, checkpoint_background=background)
    Run.create(whole, tmp_path / "whole").trainer.train()
    part = Run.create(options(store, target, steps=20), tmp_path / "part")
    part.trainer.train(lambda report: report.step == 10 and part.trainer.save())
    for path in (tmp_path / "part" / "checkpoints").glob("step-00000020/*"):
        path.unlink() if path.is_file() else None  # damaged: it goes on from the one before
    again = Run.reopen(tmp_path / "part")
    assert again.trainer.position.step == 10
    again.trainer.train()
    assert_same_bits(*(tmp_path / name / "checkpoints" / "step-00000020" for name in ("whole", "part")))


@pytest.mark.parametrize("precision", ["autocast", "bf16"])
def test_a_head_is_trained_in_other_precisions(store, target, tmp_path, precision):
    run = Run.create(options(store, target, steps=3, precision=precision), tmp_path / "run")
    assert run.trainer.train()
    assert next(run.trainer.model.target.parameters()).dtype == next(run.trainer.model.parameters()).dtype


def test_a_preset_for_every_head_says_what_it_wants():
    for name in presets.names():
        if name.startswith("drafter-"):
            given = read_toml(presets.path_of(name))
            with pytest.raises(ConfigError, match="--set target=MODEL"):
                build(TrainConfig, given)
            config = build(TrainConfig, {**given, "target": "python-6m"})
            assert config.head is not None
            assert name == f"drafter-{config.head.policy_name.replace('_', '-')}"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"head": None}, "say which head"),
        ({"target": None, "start_from": "python-1m"}, "say which model the head is for"),
        ({"objective": "next_token"}, "trains models, not heads"),
        ({"validation": {"every": 5}}, "no validation.every"),
        ({"start_from": "python-1m"}, "not start_from and target"),
    ],
)
def test_what_does_not_go_with_a_head_is_refused(store, target, changes, said):
    with pytest.raises(ConfigError, match=said):
        options(store, target, **changes)


def test_guesses_over_the_end_of_a_document_count_nothing():
    """The loss of a row with two documents is that of two rows with one each."""
    shape = DecoderConfig(vocabulary=11, hidden=8, layers=1, heads=1, kv_heads=1, head_dim=8, ffn=8, init_std=0.5)
    model = Headed.new(Decoder(shape).initialize(0).double(), Medusa(heads=3), 0)
    tokens = torch.tensor([[1, 4, 2, 8, 5, 7, 1, 4]])
    targets, documents = tokens.roll(-1, 1), torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
    targets[0, [2, 7]] = IGNORE
    both = Batch(tokens, targets, documents)
    each = [Batch(*(part[:, cut] for part in (tokens, targets, documents))) for cut in (slice(3), slice(3, 8))]
    objective = SelfDistillation()
    whole = objective.loss(model, both, PackedRows.of(documents))
    parts = [objective.loss(model, part, CausalRows.of(part.tokens.shape[1])) for part in each]
    torch.testing.assert_close(whole, sum(parts))


def test_a_head_does_not_draft_where_the_cache_is_compressed():
    with pytest.raises(ConfigError, match="draft with 'ngram', or serve with the full cache"):
        build(EngineConfig, {"draft": {"name": "head", "source": "runs/drafter"}, "kv": "h2o"})


def test_an_exit_behind_more_layers_than_there_are_is_refused(store, target, tmp_path):
    with pytest.raises(UsageError, match="an exit behind 7 layers"):
        Run.create(options(store, target, head={"name": "early_exit", "layers": 7}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_transfer_that_leaves_no_layer_before_it_is_refused(store, target, tmp_path):
    with pytest.raises(UsageError, match="a transfer before the last 2 layers is not for a model that has 2"):
        Run.create(options(store, target, head={"name": "hidden_transfer", "left": 2}), tmp_path / "run")


def test_a_missing_head_and_one_for_another_model_name_the_command(target, tmp_path):
    model = hub.load(target)
    with pytest.raises(UsageError) as missing:
        heads.load(tmp_path, model, "runs/demo")
    assert "penstock train --preset drafter-early-exit --set target=runs/demo" in str(missing.value)
    other = Decoder(DecoderConfig(**{**MODEL, "layers": 3}, vocabulary=VOCABULARY)).initialize(0)
    heads.save(Headed.new(other, Medusa(heads=1), 0, "runs/other"), tmp_path)
    with pytest.raises(
        UsageError, match=r"trained for runs/other, not for this model: layers is 2, and was 3"
    ) as wrong:
        heads.load(tmp_path, model, "runs/demo")
    assert "--preset drafter-medusa --set target=runs/demo" in str(wrong.value)


def test_damaged_heads_are_told_by_their_files(target, tmp_path):
    model = hub.load(target)
    heads.save(Headed.new(model, Medusa(heads=1), 0), tmp_path)
    (tmp_path / "head.safetensors").write_bytes(b"nothing")
    with pytest.raises(Exception, match=r"head\.safetensors cannot be read"):
        heads.load(tmp_path, model)
    (tmp_path / "head.safetensors").unlink()
    with pytest.raises(ModelError, match=r"has no weights: head\.safetensors is missing") as gone:
        heads.load(tmp_path, model)
    assert "Copy the folder again" in str(gone.value)
    (other := tmp_path / "other").mkdir()
    heads.save(Headed.new(model, Medusa(heads=2), 0), other)
    shutil.copy(other / "head.safetensors", tmp_path)
    with pytest.raises(ModelError, match="not those of its head: 2 unknown, such as blocks"):
        heads.load(tmp_path, model)
    (tmp_path / "head.json").write_text('{"head": {"name": "medusa"}}')
    with pytest.raises(Exception, match=r"head\.json does not describe a head"):
        heads.load(tmp_path, model)


def test_a_folder_without_a_head_names_the_command_where_it_is_to_draft(target, tmp_path):
    with pytest.raises(UsageError, match="there is no model in") as caught:
        open_engine(target, EngineConfig.model_validate({"draft": str(tmp_path), "cache_tokens": 400}))
    assert f"penstock train --preset drafter-early-exit --set target={target}" in str(caught.value)
