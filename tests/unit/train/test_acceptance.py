"""What a target accepts of a draft is learnt, stored beside the draft, and asked for where the engine drafts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from penstock.core.config import build, read_toml
from penstock.core.errors import ConfigError, ModelError, UsageError
from penstock.core.progress import silent
from penstock.models.acceptance import folder as acceptance
from penstock.models.acceptance.head import Pair
from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.messages import Request
from penstock.serve.opening import open_engine
from penstock.train import presets
from penstock.train.config import TrainConfig
from penstock.train.objectives.acceptance import Acceptance
from penstock.train.run import Run
from penstock.train.session import train_to_the_end
from tiny_runs import MODEL, assert_same_bits, tree


@pytest.fixture(scope="module")
def models(store, tmp_path_factory):
    """The folders of a draft and of a target, of a few steps' training each."""
    folder = tmp_path_factory.mktemp("acceptance")
    for name, changes in (("draft", {"steps": 10}), ("target", {"steps": 20})):
        train_to_the_end(Run.create(build(TrainConfig, tree(store, **changes)), folder / name), silent, 0.1)
    return folder / "draft", folder / "target"


def options(store, models, **changes) -> TrainConfig:
    given = tree(store, draft=str(models[0]), target=str(models[1]), objective="acceptance")
    del given["model"]
    return build(TrainConfig, {**given, **changes})


def test_a_head_learns_what_is_accepted_and_decides_how_much_is_drafted(store, models, tmp_path, capsys):
    draft, target = models
    beside = draft / "model" / acceptance.BESIDE
    summary = train_to_the_end(
        Run.create(options(store, models, steps=30, optim={"name": "adamw", "lr": 1e-2}), beside), silent, 0.5
    )
    told = summary["acceptance"]
    assert told["cross_entropy"] < told["constant"]
    assert told["predicted"] == pytest.approx(told["accepted"], abs=0.05)
    assert "the target accepts" in capsys.readouterr().out

    texts = []
    for controller in ("fixed", "specdec_pp"):
        config = {"draft": str(draft), "controller": controller, "cache_tokens": 400}
        engine = open_engine(target, EngineConfig.model_validate(config))
        engine.add(Request("one", [1, 2, 3], SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)))
        tokens = []
        while engine.busy:
            tokens += [token for delta in engine.step() for token in delta.tokens]
        texts.append(tokens)
    assert texts[0] == texts[1]
    assert engine.snapshot().drafted_tokens > 0

    elsewhere = {"name": "specdec_pp", "head": str(tmp_path)}
    with pytest.raises(UsageError) as missing:
        open_engine(target, EngineConfig.model_validate({**config, "controller": elsewhere}))
    said = str(missing.value)
    assert "there is no acceptance head in" in said
    assert f"penstock train --preset acceptance --set target={target} --set draft={draft}" in said


@pytest.mark.slow
def test_training_goes_on_bit_for_bit(store, models, tmp_path):
    whole = options(store, models, steps=20, checkpoint_background=True)
    Run.create(whole, tmp_path / "whole").trainer.train()
    part = Run.create(options(store, models, steps=20), tmp_path / "part")
    part.trainer.train(lambda report: report.step == 10 and part.trainer.save())
    for path in (tmp_path / "part" / "checkpoints").glob("step-00000020/*"):
        path.unlink() if path.is_file() else None  # damaged: it goes on from the one before
    Run.reopen(tmp_path / "part").trainer.train()
    assert_same_bits(*(tmp_path / name / "checkpoints" / "step-00000020" for name in ("whole", "part")))


def small_pair() -> Pair:
    shape = DecoderConfig(**{**MODEL, "vocabulary": 11, "init_std": 0.5})
    return Pair.new(*(Decoder(shape).initialize(seed).double() for seed in (0, 1)), seed=0)


def test_a_head_comes_back_bit_for_bit_and_not_for_other_models(tmp_path):
    pair = small_pair()
    acceptance.save(pair, tmp_path)
    again = acceptance.load(tmp_path, pair.draft, pair.target, ("a", "b"))
    assert all(torch.equal(one, other) for one, other in zip(again.parameters(), pair.head.parameters(), strict=True))
    shifted = small_pair()
    with torch.no_grad():
        for model in (shifted.draft, shifted.target):
            model.norm.weight.mul_(1.5)
    with pytest.raises(UsageError, match="was trained for the draft") as wrong:
        acceptance.load(tmp_path, shifted.draft, pair.target, ("a", "b"))
    assert "--preset acceptance --set target=b --set draft=a" in str(wrong.value)
    with pytest.raises(UsageError, match="was trained for the target"):
        acceptance.load(tmp_path, pair.draft, shifted.target, ("a", "b"))
    with pytest.raises(UsageError, match="is an acceptance head, which drafts nothing"):
        EngineConfig.model_validate({"draft": str(tmp_path)})
    (tmp_path / "acceptance.json").write_text("{}")
    with pytest.raises(ModelError, match="does not describe an acceptance head"):
        acceptance.load(tmp_path, pair.draft, pair.target, ("a", "b"))


def test_what_is_accepted_is_what_both_have_in_common():
    """In the mean over what the draft may say, the sum of the smaller probabilities; at temperature 0, whether both say
    the same."""
    pair = small_pair()
    draw = torch.Generator().manual_seed(0)
    drafted, said = torch.randn(2, 64, MODEL["hidden"], generator=draw, dtype=torch.float64)
    logits = pair.draft.logits(drafted), pair.target.logits(said)
    for temperature in (0.7, 1.0):
        share, accepted, _ = Acceptance(temperature=temperature, drafts=11).predicted(pair, drafted, said)
        proposal, target = ((each / temperature).softmax(-1) for each in logits)
        torch.testing.assert_close((share * accepted).sum(-1), torch.minimum(proposal, target).sum(-1))
    share, accepted, _ = Acceptance(temperature=0).predicted(pair, drafted, said)
    same = logits[0].argmax(-1) == logits[1].argmax(-1)
    assert 0 < same.sum() < 64
    torch.testing.assert_close((share * accepted).sum(-1), same.double())


def test_a_prediction_is_of_the_token_that_was_drafted():
    pair = small_pair()
    with torch.no_grad():
        pair.head.out.weight.normal_(generator=torch.Generator().manual_seed(1))
    hidden = torch.ones(11, MODEL["hidden"], dtype=torch.float64)
    found = pair.head(pair.draft, hidden, torch.arange(11))
    assert len(set(found.tolist())) == 11
    score = hidden @ pair.draft.head.weight.T
    embedded = F.rms_norm(pair.draft.embedding.weight, hidden.shape[1:])
    x = F.linear(
        torch.cat([hidden, embedded, score.diagonal().unsqueeze(1)], 1), pair.head.fuse.weight, pair.head.fuse.bias
    )
    for block in pair.head.blocks:
        x = x + F.silu(F.linear(x, block.weight, block.bias))
    torch.testing.assert_close(found, F.linear(x, pair.head.out.weight, pair.head.out.bias)[:, 0])


def test_the_preset_says_what_it_wants():
    given = read_toml(presets.path_of("acceptance"))
    with pytest.raises(ConfigError, match="--set target=MODEL"):
        build(TrainConfig, given)
    with pytest.raises(ConfigError, match="--set draft=DRAFT"):
        build(TrainConfig, {**given, "target": "python-6m"})
    assert build(TrainConfig, {**given, "target": "python-6m", "draft": "python-1m"}).objective.of_pairs


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"head": {"name": "medusa"}}, "has a head of its own"),
        ({"objective": "self_distillation"}, "knows of no draft"),
        ({"validation": {"every": 5}}, "no validation.every"),
    ],
)
def test_what_does_not_go_with_a_pair_is_refused(store, models, changes, said):
    with pytest.raises(ConfigError, match=said):
        options(store, models, **changes)


def test_models_with_other_tokens_are_no_pair(store, models, tmp_path):
    with pytest.raises(UsageError, match="has a vocabulary of"):
        Run.create(options(store, ("python-1m", models[1])), tmp_path / "run")
    assert not (tmp_path / "run").exists()
