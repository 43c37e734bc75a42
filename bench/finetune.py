"""Fine-tuning beside TRL and PEFT: SFT, LoRA and DPO of smollm2, the same rows in the same order; and what SFT changes.

Generated dialogues are packed into rows, of which each update takes one. TRL's trainers get those very tokens, masks
and batches: for SFT the rows as they are packed, without padding (its attention keeps the conversations apart, too);
for DPO, which it cannot pack, the pairs of a row as a padded batch. The optimizer's settings are the same, LoRA begins
with the same numbers, and what the model at the beginning finds probable is computed before the run by both. In fp32
the losses of all updates have to agree to a thousandth. In bf16 each multiplies in its own way: ours rounds what layers
hand on, which TRL's autocast keeps in fp32. There it is told how far the losses are apart, and how far those of each
are from ours in fp32.

A token counts where it is no padding. Each side trains in a process of its own, once for each task, and they take turns
with rounds of updates. Its memory is the highest while it makes them: of the process on the CPU, of tensors on CUDA. Of
a round the first update is not timed, and nothing of the first round, which both make at the same time: it compiles. On
the CPU nothing is compiled, since such short runs would not be. On CUDA ours is, and TRL's trainers are as they come,
and then once more, beside ours again, with `torch_compile`. They make their first round alone then, and a row tells how
long it took, or that it was not over in the seconds that they are given: PENSTOCK_TRL_SECONDS, 600 if unset.

The last rows are the accuracy on `penstock eval`'s held-out questions of arithmetic, before and after SFT on others.

TRL is best kept in a place of its own. Make one, and say where its Python is:

    python -m venv .trl && .trl/bin/pip install torch trl==1.16.0 peft==0.21.2 transformers datasets accelerate
    PENSTOCK_TRL=.trl/bin/python penstock bench finetune
"""

from __future__ import annotations

import itertools
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from penstock.core.bench import Apart, Bench, LateError, peer_python
from penstock.core.config import build
from penstock.core.devices import synchronize
from penstock.core.errors import PenstockError
from penstock.core.progress import silent
from penstock.data.chats.examples import ExampleStore
from penstock.data.chats.packing import PackedLoader
from penstock.data.loader import Batch
from penstock.data.samplers.shuffle import Shuffle
from penstock.eval.run import evaluate
from penstock.eval.tasks.arithmetic import Arithmetic
from penstock.models import hub
from penstock.ops.cross_entropy import IGNORE
from penstock.serve.offline.llm import LLM
from penstock.train.config import TrainConfig
from penstock.train.run import Run
from penstock.train.session import train_to_the_end

MODEL = "smollm2"
#: The most by which losses may differ in fp32.
EXACT = 1e-3
ADAM = {"betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.0}


class Task(NamedTuple):
    """What is trained: objective, tuner, the data's key and the rate; and what the peer is called."""

    objective: dict[str, Any]
    tuner: dict[str, Any]
    key: str
    lr: float
    peer: str


TASKS = {
    "sft": Task({"name": "sft"}, {"name": "full"}, "chats", 2e-5, "TRL's SFTTrainer"),
    "lora": Task(
        {"name": "sft"}, {"name": "lora", "rank": 16, "unpack": True}, "chats", 5e-4, "TRL's SFTTrainer, PEFT"
    ),
    "dpo": Task({"name": "dpo", "beta": 0.1}, {"name": "full"}, "preferences", 2e-6, "TRL's DPOTrainer"),
}


class Peer(NamedTuple):
    """TRL's side of a task: what it is called, and whether it compiles."""

    name: str
    compiles: bool


def peers_of(task: Task, device: str) -> list[Peer]:
    """Whom ours stands beside, one after the other."""
    plain = Peer(task.peer, compiles=False)
    return [plain, Peer(f"{task.peer}, torch_compile", compiles=True)] if device == "cuda" else [plain]


class Shape(NamedTuple):
    """How much is trained: the tokens of a row, which is a batch; the updates of a round; and how many rounds are
    timed, behind one that is not."""

    length: int
    updates: int
    rounds: int

    @property
    def all(self) -> int:
        """Updates of a run."""
        return self.updates * (1 + self.rounds)


def shape_of(bench: Bench) -> Shape:
    """What fits into minutes, and a quick one into one."""
    if bench.device.type == "cuda":
        return Shape(2048, 4, 1) if bench.quick else Shape(8192, 10, 3)
    return Shape(256, 2, 1) if bench.quick else Shape(1024, 4, 2)


# Data


def dialogues(count: int) -> Iterator[dict[str, Any]]:
    """Conversations of one to four turns about sums, which the assistant works out: about half of the tokens."""
    draw = random.Random(0)
    for _ in range(count):
        messages = []
        for _ in range(draw.randint(1, 4)):
            question, answer = _sum(draw)
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        yield {"messages": messages}


def preferences(count: int) -> Iterator[dict[str, Any]]:
    """Questions with an answer that is right, and a shorter one that is not."""
    draw = random.Random(0)
    for _ in range(count):
        question, answer = _sum(draw)
        wrong = f"It is {draw.randint(1, 999)}{draw.choice(['.', ', I think.', ', more or less, but do check it.'])}"
        yield {"prompt": question, "chosen": answer, "rejected": wrong}


def _sum(draw: random.Random) -> tuple[str, str]:
    numbers = [draw.randint(10, 99) for _ in range(draw.randint(2, 6))]
    asked = " + ".join(map(str, numbers))
    steps, total = [], numbers[0]
    for number in numbers[1:]:
        steps.append(f"{total} and {number} make {total + number}")
        total += number
    question = draw.choice([f"How much is {asked}?", f"I have bills of {asked} to pay. Work out the sum, please."])
    return question, f"Step by step: {', '.join(steps)}. The answer is {total}."


def write_data(folder: Path, count: int) -> None:
    """A file for each kind of data."""
    for name, records in (("chats", dialogues(count)), ("preferences", preferences(2 * count))):
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


# What the peer gets


def segments(batch: Batch) -> list[tuple[list[int], list[int]]]:
    """The sequences of a row: their tokens, and the label of each token, IGNORE where nothing is learnt from it. What
    fills the row is left out."""
    found = []
    tokens, targets, documents = (values[0] for values in (batch.tokens, batch.targets, batch.documents))
    for number in documents.unique():
        own = documents == number
        if (targets[own] != IGNORE).any():
            found.append((tokens[own].tolist(), [IGNORE, *targets[own][:-1].tolist()]))
    return found


def packed_row(batch: Batch) -> dict[str, list[int]]:
    """A row as TRL has packed ones."""
    parts = segments(batch)
    return {
        "input_ids": [token for tokens, _ in parts for token in tokens],
        "labels": [label for _, labels in parts for label in labels],
        "seq_lengths": [len(tokens) for tokens, _ in parts],
    }


def pairs(batch: Batch) -> list[dict[str, list[int]]]:
    """The pairs of a row. What stands behind an answer's last learnt token is seen by none that counts."""
    sides = []
    for tokens, labels in segments(batch):
        learnt = [place for place, label in enumerate(labels) if label != IGNORE]
        sides.append((tokens[: learnt[0]], tokens[learnt[0] : learnt[-1] + 1]))
    return [
        {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
        for (prompt, chosen), (_, rejected) in zip(sides[0::2], sides[1::2], strict=True)
    ]


def batches(store: Path, shape: Shape) -> list[Batch]:
    """The batches of all updates, as the trainer takes them."""
    loader = PackedLoader(ExampleStore.open(store).split("train"), length=shape.length, sampler=Shuffle(), seed=0)
    return [loader.batch(number, 1) for number in range(shape.all)]


# The sides


class Round(NamedTuple):
    """What came of a side's round: losses, seconds of all updates but the first, and bytes."""

    losses: list[float]
    seconds: list[float]
    memory: int


def restart_peak(device: torch.device) -> None:
    """Forgets how much memory was in use at most."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> int:
    """How much memory was in use at most since then: of tensors on CUDA, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def asked_of(name: str, folder: Path, shape: Shape, device: str, precision: str | None = None) -> dict[str, Any]:
    """The configuration of a run of ours, in the ``precision`` that it is measured in if none is given."""
    task, measured = TASKS[name], "bf16" if device == "cuda" else "fp32"
    return {
        "start_from": MODEL,
        "objective": task.objective,
        "tuner": task.tuner,
        "data": {task.key: str(folder / f"{task.key}.jsonl"), "store": str(folder / f"{name}-store"), "held_out": 0.0},
        "batch": {"tokens": shape.length, "stages": [{"length": shape.length}]},
        "optim": {"name": "adamw", "lr": task.lr, **ADAM},
        "steps": shape.all,
        "device": device,
        "precision": precision or measured,
        "compile": device == "cuda" and precision in (None, measured),
    }


def ours(config: dict[str, Any], folder: Path, updates: int) -> Iterator[dict[str, Any]]:
    """Trains, in rounds of so many ``updates``: nothing when it is ready, and then what came of each. What LoRA begins
    with is left in ``folder``."""
    run = Run.create(build(TrainConfig, config), folder / "run")
    trainer, length = run.trainer, run.config.batch.length
    if run.config.tuner.adds:
        (folder / "first").mkdir()
        run.config.tuner.write(trainer.model, folder / "first", MODEL)
    trainer.compile()
    yield {}
    for first in range(0, run.config.steps or 0, updates):
        losses, ends = [], []
        restart_peak(run.device)
        for number in range(first, first + updates):
            losses.append(trainer.update(trainer.loader.batch(number, 1), length, 1.0)["loss"].item())
            synchronize(run.device)
            ends.append(time.perf_counter())
        seconds = [after - before for before, after in itertools.pairwise(ends)]
        yield Round(losses, seconds, peak_bytes(run.device))._asdict()


def answer_orders() -> None:
    """The main function of our process: reads a line of JSON with what :func:`ours` is given, and writes a line for
    each thing that comes of it, the next when it has read another."""
    # Answers have the output to themselves: whatever else is printed goes where errors go.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    given = json.loads(sys.stdin.readline())
    for answer in ours(given["config"], Path(given["folder"]), given["updates"]):
        print(json.dumps(answer), file=answers, flush=True)
        sys.stdin.readline()


class Played(NamedTuple):
    """The rounds of both sides of a task, and how many seconds the peer took for its first one."""

    own: list[Round]
    others: list[Round]
    beginning: float


def play(name: str, peer: Peer, python: str, data: Path, weights: Path, shape: Shape, device: str) -> Played:
    """The rounds of both sides of a task.

    Raises:
        LateError: the peer compiles for longer than it is given.
    """
    task, folder = TASKS[name], data / f"{name}{'-compiled' if peer.compiles else ''}"
    folder.mkdir()
    script = str(Path(__file__).parent / "peers" / "trl_finetune.py")
    with Apart([sys.executable, __file__], "ours") as own, Apart([python, script], peer.name) as other:
        own.ask({"config": asked_of(name, data, shape, device), "folder": str(folder), "updates": shape.updates})
        todo, first = batches(data / f"{name}-store", shape), folder / "first"
        other.ask(
            {
                "task": name,
                "model": str(weights),
                "adapter": str(first) if first.exists() else None,
                "batches": [pairs(batch) if name == "dpo" else [packed_row(batch)] for batch in todo],
                "updates": shape.updates,
                "lr": task.lr,
                "beta": task.objective.get("beta"),
                "folder": str(folder),
                "cuda": device == "cuda",
                "compile": peer.compiles,
                **ADAM,
            }
        )
        rounds, beginning = begin(own, other, peer)
        for number in range(shape.rounds):
            for side, found in zip((own, other), rounds, strict=True):
                found.append(Round(**side.ask({})))
            print(f"{name}, {peer.name}: round {number + 1} of {shape.rounds}", file=sys.stderr)
    return Played(*rounds, beginning)


def begin(own: Apart, other: Apart, peer: Peer) -> tuple[list[list[Round]], float]:
    """The first round of both sides, a list for each, and how many seconds the ``peer`` took: at the same time, or, of
    one that compiles, one after the other.

    Raises:
        LateError: the peer compiles for longer than it is given.
    """
    within = patience() if peer.compiles else None
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(own.ask, {})
        if peer.compiles:
            first.result()
        began = time.perf_counter()
        answer = other.ask({}, within)
        return [[Round(**first.result())], [Round(**answer)]], time.perf_counter() - began


def patience() -> float:
    """How many seconds TRL's trainers are given for a round in which they compile."""
    return float(os.environ.get("PENSTOCK_TRL_SECONDS", "600"))


def in_fp32(name: str, data: Path, shape: Shape, device: str) -> list[float]:
    """The losses of all updates of a task where ours makes them in fp32."""
    folder = data / f"{name}-fp32"
    folder.mkdir()
    with Apart([sys.executable, __file__], "ours in fp32") as own:
        config = asked_of(name, data, shape, device, "fp32")
        own.ask({"config": config, "folder": str(folder), "updates": shape.all})
        return Round(**own.ask({})).losses


def compare(bench: Bench, name: str, python: str, data: Path, weights: Path, shape: Shape) -> None:
    """The rows of a task."""
    device = bench.device.type
    setting = f"{name}, {MODEL}, {'bf16' if device == 'cuda' else 'fp32'}, {shape.length} tokens an update"
    for peer in peers_of(TASKS[name], device):
        shown = {"subject": "penstock", "peer": peer.name, "setting": setting}
        late = None
        try:
            played = play(name, peer, python, data, weights, shape, device)
            seconds = played.beginning
        except LateError:
            seconds = patience()
            late = f"did not finish compiling in {seconds:.0f} s, so that nothing of it is compared"
        if peer.compiles:
            bench.row(
                subject=peer.name,
                setting=f"{setting}: {shape.updates} updates",
                metric="time of the first round, which compiles",
                unit="s",
                better="lower",
                value=seconds,
                note=late,
            )
        if late is None:
            compare_rounds(bench, shown, batches(data / f"{name}-store", shape), shape, played)
            compare_curves(bench, shown, losses_of(played.own), losses_of(played.others))
        if late is None and device == "cuda" and not peer.compiles:
            reference = in_fp32(name, data, shape, device)
            compare_with_fp32(bench, shown, reference, losses_of(played.own), losses_of(played.others))


def losses_of(rounds: list[Round]) -> list[float]:
    """Those of all updates."""
    return [loss for each in rounds for loss in each.losses]


def compare_rounds(bench: Bench, shown: dict[str, str], todo: list[Batch], shape: Shape, played: Played) -> None:
    """Rows of the throughput and of the memory of both sides, over the rounds behind the first."""
    tokens = [sum(len(each) for each, _ in segments(batch)) for batch in todo]
    counted = [sum(tokens[first + 1 : first + shape.updates]) for first in range(0, shape.all, shape.updates)]
    rates, memory = [], []
    for side in (played.own, played.others):
        timed = list(zip(counted, side, strict=True))[1:]
        rates.append([count / sum(each.seconds) for count, each in timed])
        memory.append([each.memory / 2**30 for _, each in timed])
    bench.compared(**shown, metric="training throughput", unit="tokens/s", values=rates[0], peer_values=rates[1])
    bench.compared(
        **shown,
        metric="peak memory",
        unit="GiB",
        better="lower",
        values=memory[0],
        peer_values=memory[1],
        claim="parity",
    )


def apart(own: list[float], others: list[float]) -> float:
    """The largest difference of the losses of an update."""
    return max(abs(one - other) for one, other in zip(own, others, strict=True))


def compare_curves(bench: Bench, shown: dict[str, str], own: list[float], others: list[float]) -> None:
    """A row of how far apart the losses are.

    Raises:
        PenstockError: too far, for fp32.
    """
    far = apart(own, others)
    bench.row(
        subject=shown["subject"],
        setting=f"{shown['setting']}: {len(own)} updates, beside {shown['peer']}",
        metric="largest difference of the losses",
        unit="",
        better="lower",
        value=far,
    )
    if bench.device.type == "cpu" and far > EXACT:
        raise PenstockError(f"{shown['setting']}: the losses are {far:.1e} apart: {own} here, and {others} there")


def compare_with_fp32(
    bench: Bench, shown: dict[str, str], reference: list[float], own: list[float], others: list[float]
) -> None:
    """Rows of how far the losses of both sides are from the ``reference``: of the first update, which no update was
    made before, and of all."""
    note = "both update weights in fp32; ours rounds what layers hand on to bf16, which TRL's autocast keeps in fp32"
    for what, count in (("the first update", 1), (f"{len(reference)} updates", len(reference))):
        bench.compared(
            subject=shown["subject"],
            peer=shown["peer"],
            setting=f"{shown['setting']}: {what}",
            metric="largest difference of the losses from those in fp32",
            unit="",
            better="lower",
            values=[apart(own[:count], reference[:count])],
            peer_values=[apart(others[:count], reference[:count])],
            claim="parity",
            note=note,
        )


# Before and after


def tune(bench: Bench, data: Path) -> None:
    """Rows of how many held-out questions of arithmetic are answered right, before and after SFT on others."""
    asked, shown = (64, 8) if bench.quick else (1500, 100)
    task = Arithmetic(samples=asked, digits=2, shots=0, part="train")
    records = [
        {
            "messages": [
                {"role": "user", "content": f"{task.instruction}\n\n{sample.prompt}"},
                {"role": "assistant", "content": sample.reference.strip()},
            ]
        }
        for sample in task.draw()
    ]
    (data / "arithmetic.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records), encoding="utf-8")
    config = {
        "start_from": MODEL,
        "objective": "sft",
        "data": {"chats": str(data / "arithmetic.jsonl"), "held_out": 0.0},
        "batch": {"tokens": 512, "stages": [{"length": 512}]},
        "optim": {"name": "adamw", "lr": 1e-4, **ADAM},
        "epochs": 1.0,
        "device": bench.device.type,
        "compile": False,  # which takes longer than the run
    }
    questions = Arithmetic(samples=shown, digits=2, shots=0)
    setting = f"{MODEL}, {asked} generated questions of arithmetic, once; {shown} others asked"
    accuracy(bench, "before SFT", setting, MODEL, questions)
    train_to_the_end(Run.create(build(TrainConfig, config), data / "tuned"), silent)
    accuracy(bench, "after SFT", setting, str(data / "tuned"), questions)


def accuracy(bench: Bench, subject: str, setting: str, model: str, questions: Arithmetic) -> None:
    """A row of the share of ``questions`` that ``model`` answers right, asked by its chat template."""
    # For so few questions nothing is built or compiled.
    plain = {"compile": False, "attention": "reference"} if bench.device.type == "cuda" else {}
    llm = LLM(model, device=bench.device.type, batching="batchllm", progress=silent, **plain)
    (found,) = evaluate(llm, questions, chat=True, progress=silent)
    bench.row(
        subject=subject,
        setting=setting,
        metric=found.metric,
        unit="",
        value=found.estimate.value,
        low=found.estimate.low,
        high=found.estimate.high,
    )


def main(bench: Bench) -> None:
    """Measures all tasks, and fails where losses in fp32 are not the same."""
    python = peer_python("TRL", "PENSTOCK_TRL")
    shape = shape_of(bench)
    with tempfile.TemporaryDirectory() as name:
        data, weights = Path(name), Path(name, "weights")
        write_data(data, max(64, shape.all * shape.length // 64))
        hub.save(hub.load(MODEL, dtype=torch.float32), weights)
        hub.load_tokenizer(hub.resolve(MODEL)).save_pretrained(weights)
        for each in TASKS:
            compare(bench, each, python, data, weights, shape)
        tune(bench, data)


if __name__ == "__main__":
    answer_orders()
