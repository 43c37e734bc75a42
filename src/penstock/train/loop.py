"""The training loop: model, objective, optimizer, loader and schedule, one update after another."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import shlex
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

from penstock import __version__
from penstock.core.devices import can_compile, peak_flops, synchronize
from penstock.core.errors import CheckpointError, ConfigError, PenstockError
from penstock.core.metrics import MetricsLog
from penstock.core.signals import StopRequest
from penstock.core.trackers import Tracker, WeightsAndBiases
from penstock.data.loader import Batch, Loader
from penstock.models import hub
from penstock.models.attention import CausalRows, PackedRows, rows_of
from penstock.models.decoder import Decoder
from penstock.ops.cross_entropy import IGNORE
from penstock.parallel.world import World
from penstock.train import checkpoint
from penstock.train.config import BatchConfig, TrainConfig
from penstock.train.guard import Guard
from penstock.train.length import updates
from penstock.train.loads import Loads
from penstock.train.machine import fast_precision, worth_compiling
from penstock.train.order import carry_on
from penstock.train.pipeline.pipeline import Pipeline
from penstock.train.pipeline.post_validated import PostValidated
from penstock.train.precision import Precision, Weights
from penstock.train.report import Position, Report
from penstock.train.saving import Saver
from penstock.train.validation import Validation


@dataclasses.dataclass(frozen=True)
class _Reading:
    """An update that is made or under way; what was ``measured`` (loss and norms) is still on the device."""

    step: int
    lr_factor: float
    length: int
    measured: dict[str, Tensor]


class Trainer:
    """Trains ``model`` as ``config`` says, below the run folder ``folder``.

    Everything that decides the next update is in the configuration, the weights, the optimizer's state and
    :attr:`position`; so a resumed run continues bit for bit (on the same machine and software, and with ``steps``
    rather than ``minutes``, which follow the clock).

    Args:
        config: the run's configuration; what it leaves to the machine is chosen here, and when compiling.
        model: on its device, fp32; cast here as the precision says.
        loader: windows of ``config.batch.length`` tokens.
        tokenizer: the folder with its tokenizer and what else lies beside the weights, copied into every checkpoint.
        folder: the run folder.
        world: this process's place among those of the run.
        pipeline: where processes hold parts of the model, of which ``model`` is this one's.

    Raises:
        ModelError: no checkpoint could hold the model.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: Decoder,
        loader: Loader,
        tokenizer: Path,
        folder: Path,
        world: World | None = None,
        pipeline: Pipeline | None = None,
    ) -> None:
        self.config, self.model, self.loader, self.tokenizer, self.folder = config, model, loader, tokenizer, folder
        self.world, self.pipeline = world or World(), pipeline
        self.device = next(model.parameters()).device
        hub.family_of(model)  # a shape that no checkpoint could hold is refused before the work, not after it
        self.rows = config.batch.tokens // config.batch.length
        self.steps = updates(config, loader.samples if config.epochs else 0)
        self.weights = Weights(model, self._precision())
        self.masters = list(self.weights.masters.values())
        self.optimizer = config.optim.build(self.weights.masters)
        self._peaks = [group["lr"] for group in self.optimizer.param_groups]
        self._names = {id(parameter): name for name, parameter in self.weights.masters.items()}
        self.loads = Loads(model)
        self.averages = [m.detach().clone() for m in self.masters] if config.average else []
        self.position = Position()
        self.order_note = ""  # what the user should know of how the run goes on
        if config.activation_checkpointing:
            # Only each layer's input is kept for the backward pass, which computes the rest again.
            for layer in model.layers:
                layer.forward = functools.partial(
                    recompute, layer.forward, use_reentrant=False, preserve_rng_state=False
                )
        self._validated: PostValidated | None = None
        if pipeline:
            pipeline.attach(self.weights, self.device)
            if config.pipeline.post_validation:
                self._proposed: dict[str, Tensor] = {}  # what the last update measured, once it is settled
                self._validated = pipeline.post_validated(self.optimizer)
        self._loss = config.objective.loss
        self.validation: Validation | None = None  # of the run, which has the held-out documents
        self._saver = Saver(self.checkpoints, tokenizer, config.checkpoint_background, resume_command(folder))
        self._saved: int | None = None
        self._votes: Callable[[], list[float]] = lambda: [0.0, 0.0, self.position.seconds]
        self._clock = self._compiling = 0.0

    # What the configuration leaves to the machine.

    def _precision(self) -> Precision:
        precision = self.config.precision
        if precision != "auto":
            return precision
        answer = fast_precision(self.device, self.world)
        self._choose("precision", answer.choice, answer.reason)
        return answer.choice

    def _choose(self, key: str, value: object, reason: str) -> None:
        """Puts a choice into the configuration, with its reason; run.json and checkpoints keep both."""
        self.config = self.config.model_copy(update={key: value})
        self.note(key, f"{str(value).lower()}: {reason}")

    def note(self, key: str, choice: str) -> None:
        """Adds a choice and its reason to those that are written down."""
        self.config = self.config.model_copy(update={"chosen": {**self.config.chosen, key: choice}})

    def choose_compile(self) -> None:
        """Whether to compile, where the configuration leaves that open: by how long the run will take without."""
        if self.config.compile != "auto":
            return
        if obstacle := self._obstacle():
            self._choose("compile", False, obstacle)
            return
        limits = [60 * self.config.minutes - self.position.seconds] if self.config.minutes else []
        if self.steps:
            limits.append((self.steps - self.position.step) * self.eager_seconds())
        seconds = self.world.largest(min(limits))[0]
        answer = worth_compiling(self.device, self.weights.precision, seconds)
        self._choose("compile", answer.choice, answer.reason)

    def eager_seconds(self) -> float:
        """How long the passes of an update take without compiling: those of a microbatch are timed, after others."""
        length = self.config.batch.length_at(self.progress)
        micros = list(self._microbatches(self.loader.batch(0, self.rows), length))
        seconds = 0.0
        for micro, context in (micros[0],) * 2:
            synchronize(self.device)
            began = time.monotonic()
            self._rehearse(micro, context)
            synchronize(self.device)
            seconds = time.monotonic() - began
        return seconds * len(micros)

    def _rehearse(self, micro: Batch, context: CausalRows | PackedRows) -> None:
        """Forward and backward of a microbatch by what is here of the model, without the other processes."""
        with _explain_memory(self.device):
            if self.pipeline:
                self.pipeline.rehearse(micro, context)
            else:
                with self.weights.arithmetic(self.device):
                    loss = self._loss(self.model, micro, context)
                loss.backward()  # type: ignore[no-untyped-call]
                self.model.zero_grad()

    # One update.

    def _microbatches(self, batch: Batch, length: int) -> Iterator[tuple[Batch, CausalRows | PackedRows]]:
        """``batch`` cut to sequences of ``length`` tokens, at most ``micro_tokens`` at a time, on the device."""
        whole = [x.reshape(-1, length) for x in (batch.tokens, batch.targets, batch.documents)]
        share = self.config.batch.micro_tokens or whole[0].numel()
        rows = max(1, min(share // length, len(whole[0])))
        for parts in zip(*(torch.split(x, rows) for x in whole), strict=True):
            micro = Batch(*parts)
            # On the CPU the gain for whole rows is not worth compiling the loss a second time for them.
            context = rows_of(micro.documents) if self.device.type == "cuda" else PackedRows.of(micro.documents)
            yield micro.to(self.device), context.to(self.device)

    def update(self, batch: Batch, length: int, factor: float) -> dict[str, Tensor]:
        """Forward, backward and optimizer step on this process's part of a global batch.

        Args:
            batch: windows of the longest length, cut here to ``length`` tokens.
            length: of the sequences.
            factor: the schedule's.

        Returns:
            Scalars on the device, over all processes: ``loss``, ``grad_norm`` and ``grad_l1`` of :class:`Report`.
        """
        if self._validated is not None:
            return self._optimistic(batch, length, factor)
        predicted = self._predicted(batch)
        self._set_rates(factor)
        self.loads.begin()
        if self.pipeline and not self.pipeline.flushes:
            measured = self.pipeline.stream(list(self._microbatches(batch, length)), self._apply)
            self.loads.end(self.world)
        else:
            total, norms = self._gradients(batch, length, predicted)
            measured = {"loss": total, **norms}
            self.loads.end(self.world)
            if not self._good(total, norms["grad_norm"]):
                self.optimizer.zero_grad()
                return {**measured, "skipped": torch.ones(())}
            if self.config.clip is not None:
                torch.nn.utils.clip_grads_with_norm_(self.masters, self.config.clip, norms["grad_norm"])
            self._apply()
        self._average(self.position.step + 1)
        return measured

    def _predicted(self, batch: Batch) -> Tensor:
        """How many tokens the update predicts, over all processes."""
        if self.pipeline:
            predicted = self.pipeline.predicted(batch)
        else:
            predicted = (batch.targets != IGNORE).sum().to(self.device, torch.float32)
            self.world.sum_([predicted])
        return predicted.clamp_(min=1)

    def _set_rates(self, factor: float) -> None:
        for group, peak in zip(self.optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * factor

    def _average(self, updates: int) -> None:
        if self.config.average is not None:
            with torch.no_grad():
                self.config.average.update(self.averages, self.masters, updates)

    def _optimistic(self, batch: Batch, length: int, factor: float) -> dict[str, Tensor]:
        """An update that is settled in the next one, or by :meth:`settle`; only then is in the result what it gave."""
        assert self.pipeline is not None and self._validated is not None
        micros, predicted = list(self._microbatches(batch, length)), self._predicted(batch)
        loss = self.pipeline.backward(micros, predicted, confirm=self.settle)
        self._set_rates(factor)  # the update before this one is settled: it may have needed its own until then
        self._validated.propose(self.pipeline.over_pipelines(loss))
        self.weights.publish()
        self._proposed = {}
        return self._proposed

    def settle(self) -> bool:
        """Makes the last update final where it is not, with post-validation; whether the weights were right already."""
        settled = None if self._validated is None else self._validated.settle()
        if settled is None:
            return True
        self._proposed.update(settled.measured)
        self.optimizer.zero_grad()
        if not settled.kept:
            self.weights.publish()
        self._average(self.position.step)
        return settled.kept

    def _apply(self) -> None:
        """Updates the weights by the gradients in the masters, and clears these."""
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.weights.publish()

    def _good(self, loss: Tensor, norm: Tensor) -> bool:
        """Whether to make an update with this gradient."""
        if self.config.on_bad_update == "stop":
            return True
        return self.position.guard.admits(loss.item(), norm.item(), self.config.spike)

    def _gradients(self, batch: Batch, length: int, predicted: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Leaves the gradients over all processes in the masters; returns the loss over all, and the norms."""
        total = torch.zeros((), device=self.device)
        micros = self._microbatches(batch, length)
        if self.pipeline:
            total += self.pipeline.backward(list(micros), predicted)
            self.world.sum_([total])
            return total, self.pipeline.norms()
        for micro, context in micros:
            with self.weights.arithmetic(self.device):
                loss = self._loss(self.model, micro, context) / predicted
            loss.backward()  # type: ignore[no-untyped-call]
            self.weights.collect_gradients()
            total += loss.detach()
        gradients = [m.grad for m in self.masters if m.grad is not None]
        self.world.sum_([*gradients, total])
        return total, {
            "grad_norm": torch.nn.utils.get_total_norm(gradients),
            "grad_l1": torch.nn.utils.get_total_norm(gradients, norm_type=1.0),
        }

    # The run.

    @property
    def parameters(self) -> int:
        """Parameters of the model, all parts of it."""
        return self.pipeline.parameters if self.pipeline else self.model.parameter_count()

    @property
    def progress(self) -> float:
        """The part of the run that is done, 0 to 1."""
        return self._progress_at(self.position.step)

    def _progress_at(self, step: int) -> float:
        by_step = step / self.steps if self.steps else 0.0
        by_time = self.position.seconds / self._seconds if self.config.minutes else 0.0
        return min(1.0, max(by_step, by_time))

    @property
    def _seconds(self) -> float:
        """What ``minutes`` leaves for steps; at least one is made."""
        return max(60 * (self.config.minutes or 0.0) - self._compiling, 1e-3)

    def _total_steps(self) -> float:
        """Updates in the whole run; with a time budget, an estimate from the pace so far."""
        known = float(self.steps or "inf")
        if not self.config.minutes or self.position.seconds == 0.0:
            return known if self.steps else 1e9
        return min(known, self.position.step * self._seconds / self.position.seconds)

    def train(self, on_step: Callable[[Report], None] = lambda report: None) -> bool:
        """Trains to the end, or until Ctrl-C or SIGTERM. Saves a checkpoint either way.

        Args:
            on_step: told of every update, in the leading process.

        Returns:
            Whether the run is complete.

        Raises:
            PenstockError: the loss or its gradient is not finite any more, memory is short, a checkpoint cannot be
                written, or another process has failed. The checkpoints written before stay.
        """
        with contextlib.ExitStack() as stack:
            stop = stack.enter_context(StopRequest())
            # Where another process is lost, this one ends without waiting for threads.
            stack.callback(self._saver.settle)
            stack.enter_context(self._leaving())
            batches = stack.enter_context(contextlib.closing(self.loader.prefetch(self.position.samples, self.rows)))
            log: MetricsLog | None = None
            if self.world.leads:
                log = stack.enter_context(contextlib.closing(self._open_log()))
            unread: deque[_Reading] = deque()
            self._clock = saved = time.monotonic()
            stopped = False
            while self.progress < 1.0 and not stopped:
                unread.append(self._step(next(batches)))
                while len(unread) > self._behind:
                    self._report(unread.popleft(), log, on_step)
                validate = self.validation is not None and self.validation.due(self.position.step)
                if validate:
                    self._report_all(unread, log, on_step)
                improved = validate and self._validate(log)
                stopped, due = self._agree(stop.wanted, saved)
                if due or improved or stopped or self.progress >= 1.0:
                    self._report_all(unread, log, on_step)
                    self.save()
                    self._clock = saved = time.monotonic()
            self._saver.wait()
            self.world.barrier()
        return self.progress >= 1.0

    @contextlib.contextmanager
    def _leaving(self) -> Iterator[None]:
        """Where a failure in the ``with`` block ends the run, a pipeline may leave what it needs to go on."""
        try:
            yield
        except PenstockError:
            if self.pipeline:
                position, groups = dataclasses.asdict(self.position), self._groups()
                with contextlib.suppress(PenstockError):  # the failure is what has to be told
                    self.pipeline.leave(position, self._description(), groups)
            raise

    def _open_log(self) -> MetricsLog:
        trackers: list[Tracker] = []
        if self.config.wandb is not None:
            trackers.append(WeightsAndBiases(self.folder, self.config.wandb, self.config.model_dump(mode="json")))
        return MetricsLog(self.folder, self.position.step, trackers)

    def _validate(self, log: MetricsLog | None) -> bool:
        """Validates the weights; whether they are the best so far, and to be kept."""
        assert self.validation is not None
        measured = self.validation.measure(self.whole(), self.weights, self.device)
        if log is not None:
            log.write(self.position.step, {"validation_bits_per_byte": measured})
        self._clock = time.monotonic()  # validation is no part of the time in steps
        if self.position.best is not None and measured >= self.position.best:
            return False
        self.position.best, self.position.best_step = measured, self.position.step
        return self.validation.config.keep_best

    @property
    def _behind(self) -> int:
        """How many updates are read only while later ones are under way, which keeps the device busy.

        None where the clock says what the next update is, and where nothing runs by itself.
        """
        if self._validated is not None:
            return 1  # what an update gave is known in the next one
        return 0 if self.config.minutes or self.device.type == "cpu" else 1

    def _step(self, batch: Batch) -> _Reading:
        length = self.config.batch.length_at(self.progress)
        factor = self.config.schedule.factor(self.position.step, self._total_steps())
        with _explain_memory(self.device):
            measured = self.update(batch, length, factor)
        self.position.step += 1
        self.position.samples += self.rows
        self.position.tokens += self.config.batch.tokens
        return _Reading(self.position.step, factor, length, measured)

    def _report_all(self, unread: deque[_Reading], log: MetricsLog | None, on_step: Callable[[Report], None]) -> None:
        self.settle()
        while unread:
            self._report(unread.popleft(), log, on_step)

    def _report(self, reading: _Reading, log: MetricsLog | None, on_step: Callable[[Report], None]) -> None:
        """Waits for an update, counts its time, and passes on what it measured."""
        loss, grad_norm, grad_l1 = (reading.measured[name].item() for name in ("loss", "grad_norm", "grad_l1"))
        now = time.monotonic()
        seconds, self._clock = now - self._clock, now
        self.position.seconds += seconds
        skipped = "skipped" in reading.measured
        if not skipped:
            self._require_finite(loss, "the loss", reading.step)
            self._require_finite(grad_norm, "the gradient's norm", reading.step)
        speed = self.config.batch.tokens / max(seconds, 1e-9)
        flops = 3 * self.model.config.flops_per_token(reading.length) * speed
        peak = peak_flops(self.device)
        report = Report(
            step=reading.step,
            progress=self._progress_at(reading.step),
            loss=loss,
            grad_norm=grad_norm,
            grad_l1=grad_l1,
            lr_factor=reading.lr_factor,
            length=reading.length,
            tokens_per_s=speed,
            flops_per_s=flops,
            mfu=None if peak is None else flops / (peak * self.world.size),
            skipped=skipped,
        )
        if log is not None:
            log.write(report.step, report.record())
            on_step(report)

    def _agree(self, stop: bool, saved: float) -> tuple[bool, bool]:
        """Whether any process wants to stop, and whether a checkpoint is due; all take the leader's clock.

        With post-validation none waits for the others: what they wanted an update ago counts.
        """
        by_step = self.config.checkpoint_steps and self.position.step % self.config.checkpoint_steps == 0
        by_time = time.monotonic() - saved > 60 * self.config.checkpoint_minutes
        seconds = self.position.seconds if self.world.leads else 0.0
        asked = self.world.begin_largest(stop, by_time, seconds)
        if self._validated is not None:
            asked, self._votes = self._votes, asked
        stopped, due, self.position.seconds = asked()
        return bool(stopped), bool(due or by_step)

    def _require_finite(self, value: float, what: str, step: int) -> None:
        if not math.isfinite(value):
            raise PenstockError(
                f"{what} is {value} at step {step}",
                hint="No checkpoint was made of it. Continue with a lower learning rate from the newest one: "
                f"{resume_command(self.folder)} --set optim.lr=... (or from an older one, with --branch).",
            )

    def compile(self) -> str:
        """Compiles the loss for every shape that the run will use, so that no step waits for it.

        Returns:
            Why the run goes on without compiling although its configuration asks for it, or nothing.
        """
        self.choose_compile()
        if not self.config.compile:
            return ""
        obstacle = self._obstacle() or self._compile()
        self.world.barrier()  # which waits longer for a slow compiler than a pipeline would
        return obstacle

    def _compile(self) -> str:
        began = time.monotonic()
        if self.pipeline:
            self.pipeline.compile()
        else:
            self._loss = torch.compile(self.config.objective.loss, dynamic=False)
        try:
            for length in {stage.length for stage in self.config.batch.stages}:
                micro, _ = next(self._microbatches(self.loader.batch(0, self.rows), length))
                contexts: list[CausalRows | PackedRows] = [PackedRows.of(micro.documents)]
                if self.device.type == "cuda":
                    contexts.append(CausalRows.of(length, self.device))
                for context in contexts:
                    self._rehearse(micro, context)
        except RuntimeError as error:  # from PyTorch's compiler, which leans on tools outside it, such as C++ headers
            self._loss = self.config.objective.loss
            if self.pipeline:
                self.pipeline.use_eager()
            return f"the compiler failed ({type(error).__name__})"
        finally:
            self.model.zero_grad()
            synchronize(self.device)
            self._compiling = time.monotonic() - began
        return ""

    def _obstacle(self) -> str:
        """Why nothing can be compiled here, or nothing."""
        if self.pipeline and self.config.activation_checkpointing:
            return "layers of a pipeline that are computed twice are not compiled"
        if not can_compile(self.device):
            return "there is no C++ compiler (g++ or clang++)" if self.device.type == "cpu" else "Triton is missing"
        return ""

    # Checkpoints.

    @property
    def checkpoints(self) -> Path:
        """The folder of the run's checkpoints."""
        return self.folder / "checkpoints"

    def save(self) -> None:
        """Writes a checkpoint (in the leading process), unless this step has one.

        Raises:
            PenstockError: the weights are not finite.
            CheckpointError: the disk is full or not writable.
        """
        if self.position.step == self._saved:
            return
        size = torch.nn.utils.get_total_norm(self.masters).item()
        self._require_finite(size, "the norm of the weights", self.position.step)
        model, state = self.whole(), self._state()
        if model is not None:
            config, best = self.config, self.position.best_step if self.config.validation.keep_best else None
            keeping = checkpoint.Keeping(config.keep_checkpoints, config.keep_every, best)
            self._saver.save(self.position.step, model, state, keeping)
        self._saved = self.position.step
        self.world.barrier()

    def whole(self) -> Decoder | None:
        """The whole model in the leading process, None in the others. All processes call this."""
        if self.pipeline:
            return self.pipeline.whole()
        return self.model if self.world.leads else None

    def _groups(self) -> dict[str, dict[str, Tensor]]:
        """The tensors of a checkpoint beside the model's, as far as they are here."""
        tensors = {"optimizer": checkpoint.optimizer_tensors(self.optimizer, self._names)}
        if self.averages:
            tensors["average"] = dict(zip(self.weights.masters, self.averages, strict=True))
        if self.weights.separate:
            tensors["masters"] = dict(self.weights.masters)
        if self.model.config.moe is not None:
            tensors["loads"] = self.loads.tensors()
        return tensors

    def _description(self) -> dict[str, Any]:
        return {"config": self.config.model_dump(mode="json"), "version": __version__}

    def _state(self) -> checkpoint.TrainerState:
        tensors = self._groups()
        if self.pipeline:
            tensors = {group: self.pipeline.collect(parts) for group, parts in tensors.items()}
        return checkpoint.TrainerState(dataclasses.asdict(self.position), self._description(), tensors)

    def resume(self, folder: Path) -> None:
        """Continues from a verified checkpoint.

        Raises:
            ModelError: it is of another model.
            CheckpointError: it was written with another kind of optimizer, or lacks state that is needed now.
        """
        state = checkpoint.load_state(folder)
        self._require_same(folder, state)
        entries = state.tensors["optimizer"]
        if self.pipeline:
            self.pipeline.part.take(hub.load(folder))
            entries = self.pipeline.own(entries)
        else:
            hub.import_state(self.model, folder)
        checkpoint.restore_optimizer(self.optimizer, self._names, entries)
        own = self.pipeline.own if self.pipeline else dict
        if "masters" in state.tensors:
            self.weights.load(own(state.tensors["masters"]))
        if self.averages:
            averages = own(state.tensors["average"])
            for average, name in zip(self.averages, self.weights.masters, strict=True):
                average.copy_(averages[name])
        self.loads.restore(state.tensors.get("loads", {}))
        self.position = Position(**{**state.position, "guard": Guard(**state.position.get("guard", {}))})
        former = state.description["config"]
        self.position.samples, self.order_note = carry_on(self.position.samples, former, self.config)
        if folder.parent == self.checkpoints:
            self._saved = self.position.step

    def _require_same(self, folder: Path, state: checkpoint.TrainerState) -> None:
        former, now = state.description["config"]["optim"]["name"], self.config.optim.policy_name
        needed = {"average": bool(self.averages), "masters": self.weights.separate}
        lacking = [group for group, wanted in needed.items() if wanted and group not in state.tensors]
        if former == now and not lacking:
            return
        what = f"was written with {former}" if former != now else f"has no {' and no '.join(lacking)}"
        raise CheckpointError(
            f"{folder} {what}, so it cannot continue with this configuration",
            hint="Leave optim.name, precision and average as they were, or start a new run from this model "
            "with start_from.",
        )

    @torch.no_grad()
    def use_average(self) -> None:
        """Puts the averaged weights into the model, for evaluation and export; training is over then."""
        if self.averages:
            self.weights.load(dict(zip(self.weights.masters, self.averages, strict=True)))


def rows_of_each(batch: BatchConfig, sharing: int, what: str) -> int:
    """The rows of a batch that each of ``sharing`` processes or pipelines gets.

    Raises:
        ConfigError: they cannot share it evenly.
    """
    rows = batch.tokens // batch.length
    if rows % sharing:
        raise ConfigError(
            f"{sharing} {what} cannot share {rows} rows of {batch.length} tokens evenly",
            hint=f"Make batch.tokens a multiple of {sharing * batch.length}.",
        )
    return rows // sharing


def resume_command(folder: Path) -> str:
    """What to type to go on with the run in ``folder``."""
    return f"penstock train --resume {shlex.quote(str(folder))}"


@contextlib.contextmanager
def _explain_memory(device: torch.device) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise PenstockError(
            f"the memory of {device} does not suffice",
            hint="Lower batch.micro_tokens, which leaves the batch as it is, or set activation_checkpointing = true.",
        ) from error
