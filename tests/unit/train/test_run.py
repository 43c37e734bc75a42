"""The run folder: what a run needs to begin, what it leaves, and how it is taken up again."""

from __future__ import annotations

import json
import math
import re
import shutil
import signal
import sys
import types
from pathlib import Path

import pytest
import torch

from penstock.core.errors import CheckpointError, ConfigError, DataError, ModelError, PenstockError, UsageError
from penstock.core.metrics import MetricsLog, read_metrics
from penstock.core.progress import silent
from penstock.core.signals import StopRequest, termination_interrupts
from penstock.data.corpora.folder import Folder
from penstock.data.store import TokenStore
from penstock.data.tokenizer import load_tokenizer, train_tokenizer
from penstock.models import hub
from penstock.parallel.world import World
from penstock.train import demo
from penstock.train.evaluate import Sample, affordable, bits_per_byte
from penstock.train.run import Run
from penstock.train.session import train_to_the_end
from tiny_runs import MODEL, VOCABULARY, assert_same_bits, config, make_corpus, tensors


@pytest.fixture(scope="module")
def finished(store, tmp_path_factory) -> Path:
    """A run of 20 updates to its end; not to be written to."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert train_to_the_end(Run.create(config(store, steps=20), folder), silent)
    return folder


def contents(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_what_a_run_leaves(finished, store):
    names = {"run.json", "metrics.jsonl", "tokenizer", "checkpoints", "model", "loss.png", "summary.json"}
    assert contents(finished) - {"tensorboard"} == names  # which is there where TensorBoard is installed
    assert (finished / "loss.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((finished / "summary.json").read_text())
    wanted = {"bits_per_byte", "documents", "tokens_per_s", "parameters", "steps", "tokens", "seconds"}
    assert set(summary) == wanted
    assert summary["documents"] == TokenStore.open(store).split("held_out").documents
    assert (summary["steps"], summary["tokens"]) == (20, 2560)
    assert summary["tokens_per_s"] == pytest.approx(2560 / summary["seconds"])
    model = hub.load(finished)
    assert summary["parameters"] == model.parameter_count()
    held_out = TokenStore.open(store).split("held_out")
    assert summary["bits_per_byte"] == pytest.approx(bits_per_byte(model, held_out, window=32))
    assert hub.load_tokenizer(finished).backend_tokenizer.encode("import re").ids


def test_a_finished_run_can_go_on_with_more_steps(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    again = Run.reopen(folder, overrides=["steps=30"])
    assert train_to_the_end(again, silent)["steps"] == 30
    assert json.loads((folder / "run.json").read_text())["steps"] == 30
    assert [record["step"] for record in read_metrics(folder / "metrics.jsonl")] == [*range(1, 31)]


def test_a_finished_run_finishes_again_without_training(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(folder / "model")
    (folder / "summary.json").unlink()
    summary = train_to_the_end(Run.reopen(folder), silent)
    assert summary == json.loads((finished / "summary.json").read_text())
    assert contents(folder) == contents(finished)


def test_a_run_without_a_checkpoint_yet_begins_again(store, tmp_path, finished):
    Run.create(config(store, steps=20), tmp_path / "run")
    again = Run.reopen(tmp_path / "run")
    assert again.trainer.position.step == 0
    again.trainer.train()
    assert_same_bits(tmp_path / "run" / "checkpoints" / "step-00000020", finished / "checkpoints" / "step-00000020")


def test_a_folder_with_a_run_takes_no_other(finished, store):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    for make in (
        lambda: Run.create(config(store), finished),
        lambda: Run.branch(finished / "checkpoints" / "step-00000020", finished),
    ):
        with pytest.raises(UsageError, match=r"already holds a training run\n.*--resume"):
            make()
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


def test_nothing_to_resume(tmp_path):
    with pytest.raises(UsageError, match="holds no training run"):
        Run.reopen(tmp_path)


# A run that cannot start leaves nothing.


def small_corpus(folder: Path, *texts: str) -> dict[str, str]:
    folder.mkdir()
    for number, text in enumerate(texts):
        (folder / f"{number}.txt").write_text(text)
    return {"name": "folder", "path": str(folder)}


@pytest.mark.parametrize(
    ("texts", "error", "message"),
    [
        ((), DataError, "the corpus is empty"),
        (("",), DataError, "the corpus is empty"),
        (("text",), DataError, "all 1 documents are held out"),
    ],
)
def test_a_corpus_that_is_too_small(tmp_path, texts, error, message):
    data = {"corpus": small_corpus(tmp_path / "corpus", *texts), "vocabulary": 300, "held_out": 0.999999}
    with pytest.raises(error, match=message):
        Run.create(config(tmp_path, data=data), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_store_that_took_long_to_build_stays_when_the_run_cannot_start(tmp_path, monkeypatch):
    """The next attempt finds it there."""
    data = {"corpus": small_corpus(tmp_path / "corpus", "a short text"), "vocabulary": 258, "held_out": 0}
    with pytest.raises(DataError, match="too few for a row"):
        Run.create(config(tmp_path, data=data), tmp_path / "run")
    assert contents(tmp_path / "run") == {"store"}
    built = TokenStore.open(tmp_path / "run" / "store", verify=True)
    monkeypatch.setattr(Folder, "documents", None)  # read no more
    shorter = {"tokens": 4, "stages": [{"length": 2}]}
    run = Run.create(config(tmp_path, data=data, batch=shorter), tmp_path / "run")
    assert run.material.store.manifest == built.manifest


@pytest.mark.parametrize("asked", [0, 0.001])
def test_a_run_without_held_out_documents_trains_and_is_not_evaluated(tmp_path, asked, capsys):
    corpus = {"name": "folder", "path": str(make_corpus(tmp_path / "corpus"))}
    data = {"corpus": corpus, "vocabulary": 300, "held_out": asked}
    run = Run.create(config(tmp_path, data=data, steps=2), tmp_path / "run")
    assert [note for note in run.notes if "has no held-out documents, so the model will not be evaluated" in note]
    summary = train_to_the_end(run, silent)
    assert (summary["bits_per_byte"], summary["steps"]) == (None, 2)
    assert "not evaluated, since no documents are held out" in capsys.readouterr().out


def test_what_cannot_fit_is_refused_before_the_corpus_is_read(finished, tmp_path, monkeypatch):
    """Sequences beyond the context, more tokens than embeddings, processes that cannot share a batch."""
    read = []
    monkeypatch.setattr(Folder, "documents", lambda self: read.append(1))
    data = {"corpus": small_corpus(tmp_path / "corpus", "text"), "vocabulary": 300}
    narrow = shutil.copytree(finished / "model", tmp_path / "narrow")
    tokenizer = load_tokenizer(narrow)
    tokenizer.add_tokens(["one more"])
    tokenizer.save(str(narrow / "tokenizer.json"))
    own = {"model": None, "data": {"corpus": data["corpus"]}}
    for changes, world, message in (
        ({**own, "start_from": str(finished), "batch": {"tokens": 128, "stages": [{"length": 128}]}}, 1, "context"),
        ({**own, "start_from": str(narrow)}, 1, f"has {VOCABULARY + 1} tokens, the model only {VOCABULARY}"),
        ({**own, "start_from": str(finished), "data": data}, 1, f"300, and the tokenizer of .* has {VOCABULARY}"),
        ({"data": data}, 3, "3 processes cannot share 4 rows"),
    ):
        with pytest.raises(ConfigError, match=message):
            Run.create(
                config(tmp_path, **changes), tmp_path / "run", World(0, world) if world == 1 else Alone(0, world)
            )
    assert not read
    assert not (tmp_path / "run").exists()


class Alone(World):
    """One of several processes, the others of which agree with everything."""

    def largest(self, *values: float) -> list[float]:
        return list(values)


def test_a_corpus_that_is_not_text(tmp_path):
    data = {"corpus": small_corpus(tmp_path / "corpus", "text"), "vocabulary": 300}
    (tmp_path / "corpus" / "image.png").write_bytes(b"\x89PNG\xff")
    with pytest.raises(DataError, match=r"image\.png is not UTF-8 text"):
        Run.create(config(tmp_path, data=data), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_store_that_the_model_cannot_read(store, tmp_path):
    small = {**MODEL, "vocabulary": VOCABULARY - 1}
    with pytest.raises(ConfigError, match=rf"has {VOCABULARY} tokens, the model only {VOCABULARY - 1}"):
        Run.create(config(store, model=small), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_failed_start_leaves_what_was_in_the_folder(store, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"no CUDA device|there is no cuda:99"):
        Run.create(config(store, device="cuda:99"), tmp_path)
    assert contents(tmp_path) == {"notes.txt"}


def test_overrides_that_do_not_fit_are_not_kept(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    before = (folder / "run.json").read_text()
    for change, error in (
        ("model.hidden=64", ModelError),
        ("optim.name=muon", CheckpointError),
        ("steps=x", UsageError),
    ):
        with pytest.raises(error):
            Run.reopen(folder, overrides=[change])
        assert (folder / "run.json").read_text() == before


# The store and its tokenizer.


def test_a_run_builds_its_own_store(tmp_path):
    corpus = {"name": "folder", "path": str(make_corpus(tmp_path / "corpus"))}
    data = {"corpus": corpus, "vocabulary": 300, "held_out": 0.2}
    run = Run.create(config(tmp_path, data=data), tmp_path / "run")
    assert run.material.store.folder == tmp_path / "run" / "store"
    assert run.material.store.manifest.vocabulary == 300
    assert run.material.store.manifest.held_out == 0.2
    run.material.store.verify()
    built = (tmp_path / "run" / "store" / "manifest.json").stat().st_mtime_ns
    assert Run.reopen(tmp_path / "run").material.store.manifest == run.material.store.manifest
    assert (tmp_path / "run" / "store" / "manifest.json").stat().st_mtime_ns == built


def test_a_run_builds_the_store_that_is_named_but_not_there(tmp_path):
    corpus = {"name": "folder", "path": str(make_corpus(tmp_path / "corpus"))}
    data = {"corpus": corpus, "vocabulary": 300, "held_out": 0.2, "store": str(tmp_path / "shared")}
    Run.create(config(tmp_path, data=data), tmp_path / "run")
    assert TokenStore.open(tmp_path / "shared").manifest.vocabulary == 300
    assert not (tmp_path / "run" / "store").exists()


def test_starting_from_a_model_keeps_its_weights_and_its_tokenizer(finished, tmp_path):
    corpus = {"name": "folder", "path": str(make_corpus(tmp_path / "corpus"))}
    data = {"corpus": corpus, "held_out": 0.2}
    options = config(tmp_path, model=None, start_from=str(finished), data=data, steps=3)
    run = Run.create(options, tmp_path / "run")
    parent = hub.load(finished)
    assert run.trainer.position.step == 0
    assert all(torch.equal(a, b) for a, b in zip(run.trainer.model.parameters(), parent.parameters(), strict=True))
    text = "def main(argv):"
    assert run.material.store.tokenizer.encode(text).ids == load_tokenizer(finished / "model").encode(text).ids
    assert train_to_the_end(run, silent)
    shutil.move(finished, tmp_path / "gone")
    try:
        assert Run.reopen(tmp_path / "run").trainer.position.step == 3
    finally:
        shutil.move(tmp_path / "gone", finished)


def test_a_store_of_another_tokenizer_is_refused(finished, tmp_path):
    corpus = Folder(path=make_corpus(tmp_path / "corpus"))
    other = train_tokenizer(["quite another text " * 9], VOCABULARY)
    TokenStore.build(corpus, other, tmp_path / "store", held_out=0.2, workers=1)
    options = config(tmp_path / "store", model=None, start_from=str(finished))
    with pytest.raises(DataError, match="was built with another tokenizer"):
        Run.create(options, tmp_path / "run")
    again = shutil.copytree(finished, tmp_path / "again")
    with pytest.raises(DataError, match="was built with another tokenizer"):
        Run.reopen(again, overrides=[f"data.store={tmp_path / 'store'}"])


def test_a_model_to_start_from_that_is_not_there_is_refused_before_the_store_is_built(tmp_path):
    data = {"corpus": {"name": "folder", "path": str(make_corpus(tmp_path / "corpus"))}}
    options = config(tmp_path, model=None, start_from=str(tmp_path / "none"), data=data)
    with pytest.raises(UsageError, match="there is no model"):
        Run.create(options, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_windows_longer_than_the_context_of_the_model_to_start_from(finished, store, tmp_path):
    batch = {"tokens": 128, "stages": [{"length": 128}]}
    with pytest.raises(ConfigError, match=r"128 tokens are longer than the model's context \(64\)"):
        Run.create(config(store, model=None, start_from=str(finished), batch=batch), tmp_path / "run")


DIFFERING = {
    "corpus": ({"corpus": "stdlib"}, "data.corpus is"),
    "vocabulary": ({"vocabulary": 301}, "data.vocabulary is 301, and it has 300 tokens"),
    "held_out": ({"held_out": 0.1}, "data.held_out is 0.1, and it was built with 0.2"),
    "end_of_text": ({"end_of_text": "</s>"}, "data.end_of_text is '</s>', and it was built with '<|endoftext|>'"),
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> tuple[dict[str, object], Path]:
    """What a store was built from, and the store."""
    place = tmp_path_factory.mktemp("shared")
    corpus = {"name": "folder", "path": str(make_corpus(place / "corpus"))}
    data = {"corpus": corpus, "vocabulary": 300, "held_out": 0.2, "store": str(place / "store")}
    Run.create(config(place, data=data), place / "first")
    return data, place / "store"


@pytest.mark.parametrize("key", DIFFERING)
def test_a_store_that_differs_from_the_configuration_is_refused(shared, tmp_path, key):
    data, _ = shared
    change, message = DIFFERING[key]
    with pytest.raises(ConfigError, match=re.escape(message)):
        Run.create(config(tmp_path, data={**data, **change}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_records_what_it_read(shared, tmp_path):
    """Where the configuration names a store alone, the record has what the store was built from."""
    data, built = shared
    run = Run.create(config(built), tmp_path / "run")
    recorded = json.loads((tmp_path / "run" / "run.json").read_text())["data"]
    assert recorded["corpus"]["path"] == data["corpus"]["path"]
    assert (recorded["vocabulary"], recorded["held_out"]) == (300, 0.2)
    assert (
        Run.create(config(built, data=data), tmp_path / "again").material.store.manifest == run.material.store.manifest
    )
    with pytest.raises(ConfigError, match=r"data\.held_out is 0\.3"):
        Run.reopen(tmp_path / "run", overrides=["data.held_out=0.3"])


def test_a_run_can_go_on_with_another_store(shared, store, tmp_path):
    _, built = shared
    Run.create(config(built), tmp_path / "run")
    again = Run.reopen(tmp_path / "run", overrides=[f"data.store={store}"])
    assert again.material.store.folder == store
    assert again.config.data.vocabulary == VOCABULARY


# Branches.


def test_a_branch_has_a_copy_of_its_beginning_and_needs_the_other_run_no_more(tmp_path):
    corpus = {"name": "folder", "path": str(make_corpus(tmp_path / "corpus"))}
    data = {"corpus": corpus, "vocabulary": 300, "held_out": 0.2}
    Run.create(config(tmp_path, data=data, steps=10, checkpoint_steps=5), tmp_path / "long").trainer.train()
    found = tmp_path / "long" / "checkpoints" / "step-00000005"
    branch = Run.branch(found, tmp_path / "branch", overrides=["steps=7"])
    assert branch.material.store.folder == tmp_path / "long" / "store"
    assert branch.trainer.position.step == 5
    assert tensors(tmp_path / "branch" / "checkpoints" / found.name).keys() == tensors(found).keys()
    shutil.rmtree(tmp_path / "long" / "checkpoints")
    again = Run.reopen(tmp_path / "branch")
    assert again.trainer.position.step == 5
    assert again.config.steps == 7
    assert again.trainer.train()


@pytest.mark.parametrize("change", ["model.hidden=64", "optim.name=muon", "btach.tokens=1"])
def test_a_branch_that_does_not_fit_leaves_nothing(finished, tmp_path, change):
    with pytest.raises(PenstockError):
        Run.branch(finished / "checkpoints" / "step-00000020", tmp_path / "branch", overrides=[change])
    assert not (tmp_path / "branch").exists()


def test_a_branch_from_what_is_no_checkpoint(finished, tmp_path):
    for found in (tmp_path / "none", finished):
        with pytest.raises(UsageError, match="is not a checkpoint"):
            Run.branch(found, tmp_path / "branch")
    assert not (tmp_path / "branch").exists()


# The session around it.


def test_one_process_trains_in_a_folder(store, tmp_path):
    run = Run.create(config(store, steps=2), tmp_path / "run")

    def second(label: str, total: float | None, unit: str):
        with pytest.raises(UsageError, match="another process is at work in"):
            train_to_the_end(Run.reopen(tmp_path / "run"), silent)
        return silent(label, total, unit)

    assert train_to_the_end(run, second)


def test_leftovers_of_killed_processes_go_when_the_run_goes_on(store, tmp_path):
    folder = tmp_path / "run"
    run = Run.create(config(store, steps=4), folder)
    left = [folder / ".store.abcd1234.partial", folder / "checkpoints" / ".step-00000002.abcd1234.partial"]
    for path in left:
        path.mkdir(parents=True)
        (path / "half").write_text("half")
    (folder / ".run.json.abcd1234.partial").write_text("{")
    assert train_to_the_end(run, silent)
    assert not [path for path in folder.rglob("*") if path.name.endswith((".partial", ".old"))]


def test_a_run_without_a_compiler_says_so(store, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("penstock.train.compiling.can_compile", lambda device: False)
    assert train_to_the_end(Run.create(config(store, steps=2, compile=True), tmp_path / "run"), silent)
    assert "training without torch.compile, which is slower: there is no C++ compiler" in capsys.readouterr().out


def test_a_run_whose_compiler_fails_goes_on_without(store, tmp_path, monkeypatch, capsys):
    def failing(*_, **__):
        def call(*_):
            raise torch._dynamo.exc.BackendCompilerFailed(lambda: None, RuntimeError("Python.h: no such file"), None)

        return call

    monkeypatch.setattr(torch, "compile", failing)
    monkeypatch.setattr("penstock.train.compiling.can_compile", lambda device: True)
    assert train_to_the_end(Run.create(config(store, steps=2, compile=True), tmp_path / "run"), silent)
    assert "the compiler failed (BackendCompilerFailed)" in capsys.readouterr().out


def test_tensorboard_where_it_is_installed(tmp_path, monkeypatch):
    """And a resumed run hides what an earlier process wrote of the steps that are made anew."""
    calls = []

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int) -> None:
            calls.append(("open", folder, purge_step))

        def add_scalar(self, *arguments) -> None:
            calls.append(arguments)

        def close(self) -> None:
            calls.append("close")

    module = types.SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    log = MetricsLog(tmp_path, 7)
    log.write(8, {"loss": 2.5, "length": 32})
    log.close()
    assert calls == [("open", str(tmp_path / "tensorboard"), 8), ("loss", 2.5, 8), ("length", 32, 8), "close"]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    MetricsLog(tmp_path, 8).close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 8, "loss": 2.5, "length": 32}]


def test_a_full_disk_while_metrics_are_written_is_one_error(store, tmp_path, monkeypatch):
    """Also when the log is closed after it."""
    opened = MetricsLog.__init__

    def on_a_full_disk(self, *arguments):
        opened(self, *arguments)
        self._file.close()
        self._file = Path("/dev/full").open("ab", buffering=0)  # noqa: SIM115 (the log closes it)

    monkeypatch.setattr(MetricsLog, "__init__", on_a_full_disk)
    with pytest.raises(PenstockError, match="cannot write /dev/full: No space left on device") as caught:
        train_to_the_end(Run.create(config(store, steps=2), tmp_path / "run"), silent)
    assert "free some space" in caught.value.hint
    assert isinstance(caught.value.__context__, OSError)
    assert caught.value.__context__.__context__ is None


# Signals.


@pytest.mark.parametrize("number", StopRequest.SIGNALS)
def test_a_signal_is_a_request_and_handlers_come_back(number):
    former = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop.wanted
        signal.raise_signal(number)
        signal.raise_signal(number)  # torchrun passes Ctrl-C on to processes that got it from the terminal already
        assert stop.wanted
    assert signal.getsignal(number) is former


def test_a_second_interrupt_is_obeyed_at_once(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("penstock.core.signals.time.monotonic", lambda: now[0])
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        now[0] += 2
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert stop.wanted


@pytest.mark.parametrize("number", StopRequest.SIGNALS)
def test_termination_interrupts(number):
    former = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), termination_interrupts():
        signal.raise_signal(number)
    assert signal.getsignal(number) is former


# The parts of the demonstration.


def test_a_demonstration_clears_runs_only(finished, tmp_path):
    demo.clear(tmp_path / "none")
    run = shutil.copytree(finished, tmp_path / "run")
    demo.clear(run)
    assert not run.exists()
    (run / ".store.abcd1234.partial").mkdir(parents=True)
    demo.clear(run)
    assert not run.exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for path in (tmp_path / "mine", tmp_path / "mine" / "thesis.txt"):
        with pytest.raises(UsageError, match="exists and is not a run"):
            demo.clear(path)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_a_demonstration_compares_the_held_out_texts_with_xz(store, tmp_path, finished):
    run = Run.reopen(shutil.copytree(finished, tmp_path / "run"))
    summary = demo.compare_with_xz(run, {"steps": 20})
    held_out = run.material.store.split("held_out")
    texts = [(store.parent / "corpus" / held_out.name(i)).read_bytes() for i in range(held_out.documents)]
    assert sum(map(len, texts)) == held_out.bytes
    assert summary == {"steps": 20, "xz_bits_per_byte": demo.xz_bits_per_byte(texts)}
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary


def test_an_evaluation_within_a_budget_takes_some_documents(finished, store):
    """All where the time suffices, one where there is none; bits are those of the documents taken."""
    split, model = TokenStore.open(store).split("held_out"), hub.load(finished).eval()
    assert list(affordable(model, split, window=32, seconds=1e6).numbers) == list(range(split.documents))
    least = affordable(model, split, window=32, seconds=0.0)
    assert (least.documents, least.bytes) == (1, min(map(split.document_bytes, range(split.documents))))
    each = [bits_per_byte(model, Sample(split, [n]), window=32) * split.document_bytes(n) for n in (0, 1)]
    both = Sample(split, [0, 1])
    assert bits_per_byte(model, both, window=32) * both.bytes == pytest.approx(sum(each), rel=1e-5)


def test_a_demonstration_completes_held_out_documents(finished, store):
    split = TokenStore.open(store).split("held_out")
    held_out = Sample(split, range(split.documents))
    samples = list(demo.completions(finished, held_out, 2, math.inf))
    assert len(samples) == 2
    assert list(demo.completions(finished, held_out, 2, 0.0)) == samples[:1], "one, however late it is"
    for sample in samples:
        whole = (store.parent / "corpus" / sample.name).read_text()
        assert sample.prompt in whole
        assert not whole.startswith(sample.prompt)
        assert sample.completion
