"""The training loop: what an update is, that a run can stop anywhere and go on bit for bit, and what it reports."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from penstock.core.config import build
from penstock.core.errors import CheckpointError, ConfigError, ModelError, PenstockError
from penstock.core.metrics import read_metrics
from penstock.data.loader import Batch, Loader
from penstock.data.samplers.shuffle import Shuffle
from penstock.data.store import TokenStore
from penstock.models.attention import CausalRows
from penstock.models.decoder import Decoder
from penstock.ops.cross_entropy import IGNORE
from penstock.train.batches import rows_of_each
from penstock.train.config import TrainConfig
from penstock.train.loop import Trainer
from penstock.train.report import Report
from penstock.train.run import Run
from tiny_runs import MODEL, VOCABULARY, assert_same_bits, config, tensors

STAGES = {"tokens": 128, "micro_tokens": 64, "stages": [{"length": 8, "share": 3}, {"length": 32, "share": 2}]}
EVERY = {"batch": STAGES, "average": {"name": "ema", "decay": 0.9}, "activation_checkpointing": True}
MOE = {**MODEL, "vocabulary": VOCABULARY, "moe": {"experts": 4, "ffn": 24, "router": "softmax"}, "init_std": 0.08}

#: How runs differ in what they keep: every precision with both optimizers, and with and without everything else.
KINDS = {
    f"{precision} {optim}{' with all' if every else ''}": {
        "precision": precision,
        "optim": {"name": optim, "lr": 5e-3},
        **(
            {"batch": STAGES, "average": {"name": "ema", "decay": 0.9}, "activation_checkpointing": True}
            if every
            else {}
        ),
    }
    for precision in ("fp32", "autocast", "bf16")
    for optim, every in (("adamw", False), ("adamw", True), ("muon", True))
} | {"experts": {"model": MOE, "precision": "bf16", "average": "aswa", "batch": STAGES}}


def stop_at(step: int):
    """A listener that stops the run as a person would, during that step."""

    def listen(report: Report) -> None:
        if report.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return listen


def crash_at(step: int):
    """A listener that fails at that step."""

    def listen(report: Report) -> None:
        if report.step == step:
            raise ZeroDivisionError

    return listen


def short(store: Path, kind: str) -> TrainConfig:
    """A run of 10 updates, with a checkpoint every 3."""
    return config(store, steps=10, checkpoint_steps=3, **KINDS[kind])


@pytest.fixture(scope="module")
def straight(store, tmp_path_factory):
    """The last checkpoint of a run that was never stopped, by kind; each is trained once."""
    done: dict[str, Path] = {}

    def run(kind: str) -> Path:
        if kind not in done:
            folder = tmp_path_factory.mktemp("straight") / "run"
            assert Run.create(short(store, kind), folder).trainer.train()
            done[kind] = folder / "checkpoints" / "step-00000010"
        return done[kind]

    return run


#: Each precision, optimizer and option at least twice; the others are for ``-m slow``.
TRIED = ("fp32 adamw", "fp32 muon with all", "autocast adamw with all", "bf16 adamw", "bf16 muon with all", "experts")


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[pytest.mark.slow] * (k not in TRIED)) for k in KINDS])
def test_a_stopped_run_goes_on_bit_for_bit(store, tmp_path, straight, kind):
    """10 updates at once equal 4 and 6, with a crash at 8 that lost 2: weights, averages, optimizer."""
    assert not Run.create(short(store, kind), tmp_path / "run").trainer.train(stop_at(4))
    again = Run.reopen(tmp_path / "run")
    assert again.trainer.position.step == 4
    with pytest.raises(ZeroDivisionError):
        again.trainer.train(crash_at(8))
    last = Run.reopen(tmp_path / "run")
    assert last.trainer.position.step == 6
    assert last.trainer.train()
    assert_same_bits(tmp_path / "run" / "checkpoints" / "step-00000010", straight(kind))


def test_the_kinds_differ(straight):
    """What the test above compares is not all the same run."""
    weights = [tensors(straight(kind))["model/model.embed_tokens.weight"] for kind in TRIED]
    assert all(not torch.equal(a, b) for i, a in enumerate(weights) for b in weights[:i])


@pytest.mark.parametrize("kind", ["fp32 adamw", "bf16 muon with all"])
def test_the_average_leads_the_finished_model_and_not_the_run(store, tmp_path, kind):
    run = Run.create(config(store, steps=5, **KINDS[kind]), tmp_path / "run")
    run.trainer.train()
    before = run.trainer.model.embedding.weight.detach().clone()
    run.finish()
    after = run.trainer.model.embedding.weight
    if kind == "fp32 adamw":
        assert torch.equal(after, before)
    else:
        average = tensors(tmp_path / "run" / "checkpoints" / "step-00000005")["average/embedding.weight"]
        assert torch.equal(after, average.to(after.dtype))
        assert not torch.equal(after, before)


def test_the_average_is_over_the_weights_after_each_update(store, tmp_path):
    """Those of the masters, and over a stop too."""
    seen: list[torch.Tensor] = []

    def train(run: Run, stop: int) -> None:
        def listen(report: Report) -> None:
            seen.append(run.trainer.weights.masters["embedding.weight"].detach().clone())
            stop_at(stop)(report)

        run.trainer.train(listen)

    train(Run.create(config(store, steps=6, average="aswa", precision="bf16"), tmp_path / "run"), 3)
    again = Run.reopen(tmp_path / "run")
    train(again, 6)
    torch.testing.assert_close(again.trainer.updater.averages[0], torch.stack(seen).mean(0))
    assert (seen[0] - seen[-1]).abs().max() > 1e-3


def test_the_decay_of_wsd_branches_from_the_stable_phase(store, tmp_path):
    """A long run's checkpoint, decayed early, equals the run that was short from the beginning, bit for bit."""
    options = {"schedule": {"name": "wsd", "warmup_steps": 4, "decay": 0.25}, "average": "ema"}
    long = Run.create(config(store, steps=200, checkpoint_steps=8, **options), tmp_path / "long")
    assert not long.trainer.train(stop_at(24))
    assert Run.create(config(store, steps=32, **options), tmp_path / "short").trainer.train()
    branch = Run.branch(
        tmp_path / "long" / "checkpoints" / "step-00000024", tmp_path / "branch", overrides=["steps=32"]
    )
    assert branch.trainer.train()
    assert_same_bits(
        tmp_path / "branch" / "checkpoints" / "step-00000032", tmp_path / "short" / "checkpoints" / "step-00000032"
    )
    assert min(record["lr_factor"] for record in read_metrics(tmp_path / "branch" / "metrics.jsonl")) < 0.2


# One update.


def double_trainer(store: Path, folder: Path, **changes) -> Trainer:
    """A trainer in float64, so that sums in another order agree to a dozen digits."""
    options = config(store, **changes)
    assert options.model is not None
    loader = Loader(TokenStore.open(store).split("train"), length=options.batch.length, sampler=Shuffle(), seed=0)
    return Trainer(options, Decoder(options.model).initialize(0).double(), loader, store / "tokenizer", folder)


def gradients(trainer: Trainer, length: int = 32) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What one update measured, and the gradients before clipping."""
    caught: dict[str, torch.Tensor] = {}

    def catch(*_) -> None:
        caught.update({name: master.grad.clone() for name, master in trainer.weights.masters.items()})

    hook = trainer.updater.optimizer.register_step_pre_hook(catch)
    measured = trainer.update(masked_batch(trainer), length, 1.0)
    hook.remove()
    return measured, caught


def masked_batch(trainer: Trainer) -> Batch:
    """A batch of which some targets are not predicted, unequally many in its rows."""
    whole = trainer.loader.batch(0, trainer.rows)
    targets = whole.targets.clone()
    targets[0, :20] = IGNORE
    targets[-1, 5] = IGNORE
    return Batch(whole.tokens, targets, whole.documents)


@pytest.mark.parametrize("length", [32, 8])
@pytest.mark.parametrize("micro_tokens", [None, 32, 64])
def test_an_update_follows_the_gradient_of_the_mean_loss(store, tmp_path, micro_tokens, length):
    """However the batch is cut: each document run alone, its tokens' losses averaged over the whole batch."""
    batch = {"tokens": 128, "micro_tokens": micro_tokens, "stages": [{"length": 32}, {"length": 8}]}
    trainer = double_trainer(store, tmp_path, batch=batch, clip=None)
    plain = Decoder(trainer.model.config).initialize(0).double()
    measured, caught = gradients(trainer, length)
    whole = masked_batch(trainer)
    losses = []
    for tokens, targets, documents in zip(
        *(x.reshape(-1, length) for x in (whole.tokens, whole.targets, whole.documents)), strict=True
    ):
        for document in documents.unique():
            own = documents == document
            hidden = plain(tokens[own].unsqueeze(0), CausalRows.of(int(own.sum()))).hidden[0]
            losses.append(F.cross_entropy(plain.logits(hidden), targets[own], reduction="none")[targets[own] >= 0])
    mean = torch.cat(losses).mean()
    mean.backward()
    wanted = {name: parameter.grad for name, parameter in plain.named_parameters()}
    torch.testing.assert_close(caught, wanted, rtol=0, atol=1e-13)
    torch.testing.assert_close(measured["loss"].double(), mean.detach(), rtol=1e-6, atol=0)
    flat = torch.cat([gradient.flatten() for gradient in wanted.values()])
    torch.testing.assert_close(measured["grad_norm"].double(), flat.norm())
    torch.testing.assert_close(measured["grad_l1"].double(), flat.abs().sum())


def test_experts_are_balanced_over_the_whole_update(store, tmp_path):
    """However the batch is cut, also where activations are computed twice: the loads are those of the update before."""

    def caught(weight: float, micro_tokens: int | None, recomputes: bool = False) -> dict[str, torch.Tensor]:
        model = {**MOE, "moe": {**MOE["moe"], "balance_weight": weight}}
        batch = {"tokens": 128, "micro_tokens": micro_tokens, "stages": [{"length": 32}]}
        trainer = double_trainer(
            store, tmp_path, model=model, batch=batch, clip=None, activation_checkpointing=recomputes
        )
        gradients(trainer)
        assert all(
            load.sum() == pytest.approx(1) and load.std() > 0 for load in trainer.updater.loads.tensors().values()
        )
        return gradients(trainer)[1]

    whole = caught(1.0, None)
    for micro_tokens, recomputes in ((32, False), (64, True)):
        torch.testing.assert_close(caught(1.0, micro_tokens, recomputes), whole, rtol=0, atol=1e-12)
    router = "layers.0.mlp.router.weight"
    assert (whole[router] - caught(0.0, None)[router]).abs().max() > 0.1 * whole[router].abs().max()


@pytest.mark.parametrize("precision", ["fp32", "autocast", "bf16"])
@pytest.mark.parametrize("model", [{**MODEL, "vocabulary": VOCABULARY}, MOE], ids=["dense", "experts"])
def test_recomputing_activations_changes_no_bit(store, tmp_path, precision, model):
    def caught(recomputes: bool) -> dict[str, torch.Tensor]:
        options = config(store, model=model, precision=precision, activation_checkpointing=recomputes)
        return gradients(Run.create(options, tmp_path / str(recomputes)).trainer)[1]

    one, other = caught(False), caught(True)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert any(gradient.abs().max() > 0 for gradient in one.values())


def test_recomputing_activations_keeps_fewer_of_them(store, tmp_path):
    def kept(recomputes: bool) -> int:
        trainer = Run.create(config(store, activation_checkpointing=recomputes), tmp_path / str(recomputes)).trainer
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            trainer.update(trainer.loader.batch(0, 4), 32, 0.0)
        return sum(sizes)

    assert kept(True) < kept(False) / 2


def test_clipping_bounds_the_gradient(store, tmp_path):
    """The norm that is reported is the one before."""
    trainer = double_trainer(store, tmp_path, clip=0.01)
    measured, caught = gradients(trainer)
    assert measured["grad_norm"] > 0.1
    torch.testing.assert_close(
        torch.cat([g.flatten() for g in caught.values()]).norm(), torch.tensor(0.01).double(), rtol=1e-3, atol=0
    )


def test_the_rate_is_the_peak_times_the_schedule(store, tmp_path):
    run = Run.create(config(store, optim={"name": "muon", "lr": 0.01, "adam_lr": 0.002}, steps=10), tmp_path / "run")
    seen = []
    run.trainer.train(lambda _: seen.append([group["lr"] for group in run.trainer.updater.optimizer.param_groups]))
    factors = [record["lr_factor"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert factors == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    peaks = [rate / 0.2 for rate in seen[0]]
    assert sorted({round(peak, 9) for peak in peaks}) == [0.002, 0.01]
    for rates, factor in zip(seen, factors, strict=True):
        assert rates == pytest.approx([peak * factor for peak in peaks])


# What is reported and kept.


def test_each_update_has_one_record_however_often_the_run_was_stopped(store, tmp_path):
    folder = tmp_path / "run"
    Run.create(config(store, batch=STAGES), folder).trainer.train(stop_at(13))
    with pytest.raises(ZeroDivisionError):
        Run.reopen(folder).trainer.train(crash_at(27))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 28, "lo')
    assert [record["step"] for record in read_metrics(folder / "metrics.jsonl")] == [*range(1, 28)]
    Run.reopen(folder).trainer.train()
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [*range(1, 41)]
    assert [record["length"] for record in records] == [8] * 24 + [32] * 16
    assert [record["progress"] for record in records] == pytest.approx([step / 40 for step in range(1, 41)])
    assert all(0 < record["loss"] < 7 and record["tokens_per_s"] > 0 for record in records)
    assert records[-1]["loss"] < records[0]["loss"]


def test_only_time_in_updates_counts(store, tmp_path, monkeypatch):
    """A clock that stands still but for 2 s an update, 1 s a batch, and 100 s a checkpoint."""
    now = [0.0]

    def taking(seconds: float, function):
        def timed(*arguments, **keywords):
            now[0] += seconds
            return function(*arguments, **keywords)

        return timed

    trainer = Run.create(config(store, steps=10, checkpoint_steps=3), tmp_path / "run").trainer
    monkeypatch.setattr("penstock.train.loop.time.monotonic", lambda: now[0])
    monkeypatch.setattr("penstock.train.checkpoint.save", taking(100, lambda *_, **__: None))
    monkeypatch.setattr(trainer, "update", taking(2, trainer.update))
    monkeypatch.setattr("penstock.train.loop.next", taking(1, next), raising=False)
    trainer.train()
    assert trainer.position.seconds == 30
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert {record["tokens_per_s"] for record in records} == {128 / 3}
    flops = 3 * trainer.model.config.flops_per_token(32)
    assert records[0]["flops_per_s"] == pytest.approx(flops * 128 / 3)


def test_reading_late_changes_nothing_but_when_it_is_known(store, tmp_path, monkeypatch):
    """As on a device that works by itself: every update is read once and in order, and before its checkpoint."""
    now = [0.0]
    monkeypatch.setattr("penstock.train.loop.time.monotonic", lambda: now[0])
    monkeypatch.setattr(Trainer, "_behind", 1)
    run = Run.create(config(store, steps=10, checkpoint_steps=4), tmp_path / "run")
    update, lead = run.trainer.update, []

    def timed(*arguments):
        now[0] += 2.0
        return update(*arguments)

    monkeypatch.setattr(run.trainer, "update", timed)
    run.trainer.train(lambda report: lead.append(run.trainer.position.step - report.step))
    assert lead == [1, 1, 1, 0, 1, 1, 1, 0, 1, 0]
    assert run.trainer.position.seconds == 20
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [record["progress"] for record in records] == [step / 10 for step in range(1, 11)]
    plain = Run.create(config(store, steps=10, checkpoint_steps=4), tmp_path / "plain")
    monkeypatch.undo()
    plain.trainer.train()
    ends = [tmp_path / name / "checkpoints" / "step-00000010" for name in ("run", "plain")]
    assert_same_bits(*ends)
    values = [
        [record["loss"] for record in read_metrics(tmp_path / name / "metrics.jsonl")] for name in ("run", "plain")
    ]
    assert values[0] == values[1]


def test_minutes_end_a_run_and_steer_its_schedule(store, tmp_path, monkeypatch):
    now = [0.0]
    trainer = Run.create(config(store, steps=None, minutes=1.0, schedule="linear"), tmp_path / "run").trainer
    update = trainer.update

    def timed(*arguments):
        now[0] += 6.0
        return update(*arguments)

    monkeypatch.setattr("penstock.train.loop.time.monotonic", lambda: now[0])
    monkeypatch.setattr(trainer, "update", timed)
    assert trainer.train()
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [record["step"] for record in records] == [*range(1, 11)]
    assert [record["lr_factor"] for record in records] == pytest.approx([1 - i / 10 for i in range(10)])


def test_a_checkpoint_is_due_by_the_clock_too(store, tmp_path, monkeypatch):
    saved = []
    options = config(store, checkpoint_steps=None, checkpoint_minutes=1e-9, steps=4)
    trainer = Run.create(options, tmp_path / "run").trainer
    monkeypatch.setattr("penstock.train.checkpoint.save", lambda folder, step, *_, **__: saved.append(step))
    trainer.train()
    assert saved == [1, 2, 3, 4]


@pytest.mark.parametrize("value", ["loss", "grad_norm"])
def test_what_is_not_finite_ends_the_run_before_it_is_saved(store, tmp_path, monkeypatch, value):
    run = Run.create(config(store, checkpoint_steps=1), tmp_path / "run")
    update = run.trainer.update

    def failing(*arguments):
        bad = {value: torch.tensor(torch.nan)} if run.trainer.position.step == 6 else {}
        return update(*arguments) | bad

    monkeypatch.setattr(run.trainer, "update", failing)
    with pytest.raises(PenstockError, match=r"nan at step 7\n.*--resume"):
        run.trainer.train()
    assert [path.name for path in sorted((tmp_path / "run" / "checkpoints").iterdir())] == [
        "step-00000005",
        "step-00000006",
    ]
    assert Run.reopen(tmp_path / "run").trainer.position.step == 6


def test_a_diverging_run_leaves_finite_checkpoints_to_go_on_from(store, tmp_path):
    run = Run.create(config(store, optim={"name": "adamw", "lr": 1e38}, checkpoint_steps=1), tmp_path / "run")
    with pytest.raises(PenstockError, match=r" is (nan|inf) at step \d+\n"):
        run.trainer.train()
    for checkpoint in (tmp_path / "run").glob("checkpoints/*"):
        assert all(tensor.isfinite().all() for tensor in tensors(checkpoint).values())
    assert Run.reopen(tmp_path / "run", overrides=["optim.lr=1e-3", "steps=3"]).trainer.train()


def test_lack_of_memory_is_explained(store, tmp_path, monkeypatch):
    trainer = Run.create(config(store), tmp_path / "run").trainer

    def failing(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(trainer, "update", failing)
    with pytest.raises(PenstockError, match=r"memory of cpu does not suffice\n.*micro_tokens"):
        trainer.train()


# What does not fit is refused.


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"optim": "muon"}, CheckpointError, "was written with adamw"),
        ({"average": "ema"}, CheckpointError, "has no average"),
        ({"precision": "bf16"}, CheckpointError, "has no masters"),
        ({"average": "ema", "precision": "bf16"}, CheckpointError, "has no average and no masters"),
        ({"model": {**MODEL, "vocabulary": VOCABULARY, "hidden": 16}}, ModelError, "differ in hidden, init_std"),
    ],
)
def test_a_checkpoint_of_another_kind_of_run_is_refused(store, tmp_path, changes, error, message):
    Run.create(config(store, steps=2), tmp_path / "run").trainer.train()
    other = Run.create(config(store, **changes), tmp_path / "other").trainer
    before = [master.detach().clone() for master in other.updater.masters]
    with pytest.raises(error, match=message):
        other.resume(tmp_path / "run" / "checkpoints" / "step-00000002")
    assert all(torch.equal(a, b) for a, b in zip(before, other.updater.masters, strict=True))
    assert other.position.step == 0


def test_a_bf16_run_can_go_on_in_fp32_from_its_masters(store, tmp_path):
    Run.create(config(store, steps=2, precision="bf16"), tmp_path / "run").trainer.train()
    masters = tensors(tmp_path / "run" / "checkpoints" / "step-00000002")
    trainer = Run.reopen(tmp_path / "run", overrides=["precision=fp32", "steps=3"]).trainer
    assert torch.equal(trainer.model.norm.weight, masters["masters/norm.weight"])
    assert trainer.train()


def test_processes_that_cannot_share_a_batch_are_refused(store):
    batch = config(store).batch
    assert rows_of_each(batch, 2, "processes") == 2
    with pytest.raises(ConfigError, match=r"3 processes cannot share 4 rows of 32 .*\n.* multiple of 96"):
        rows_of_each(batch, 3, "processes")


def test_a_model_that_no_folder_can_hold_is_refused_before_the_work(store, tmp_path):
    moe = {"experts": 4, "ffn": 24, "router": "sigmoid"}
    shape = {**MODEL, "vocabulary": VOCABULARY, "moe": moe, "window": 8, "windowed_layers": [1]}
    options = build(TrainConfig, config(store).model_dump(mode="json") | {"model": shape})
    with pytest.raises(ModelError, match="no Hugging Face folder can express this model"):
        Run.create(options, tmp_path / "run")
    assert not (tmp_path / "run").exists()
