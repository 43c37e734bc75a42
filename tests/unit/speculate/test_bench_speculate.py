"""The benchmark `speculate`, with runs that take no time."""

from __future__ import annotations

import torch

from penstock.core.bench import Bench, load
from penstock.policy import index
from penstock.serve.config import EngineConfig
from penstock.speculate.drafters.ngram import Ngram
from penstock.testing.drafting_engines import engine_with


def test_every_setting_stands_beside_plain_decoding_and_the_best_of_transformers():
    script = load("speculate")
    bench = Bench("speculate", torch.device("cpu"), quick=True)
    bench.console.quiet = True
    engines = {"plain decoding": engine_with(None), "ngram, fixed": engine_with(Ngram(shortest=1))}
    prompts = [[1, 2, 3] * 4, [4, 5] * 6, [6, 7, 8, 9] * 3]
    runs = {name: lambda engine=engine: script.run(engine, prompts, 2, 8) for name, engine in engines.items()}
    runs |= {"transformers, one": lambda: 2.0, "transformers, other": lambda: 3.0}
    script.measure(bench, runs, engines, "2 at a time")
    found = {(row.subject, row.peer, row.metric) for row in bench.rows}
    assert found == {
        ("plain decoding", None, "decoding speed"),
        ("ngram, fixed", "plain decoding", "decoding speed"),
        ("ngram, fixed", "transformers, other", "decoding speed"),
        ("ngram, fixed", None, "tokens a step of a sequence"),
        ("transformers, one", "plain decoding", "decoding speed"),
        ("transformers, other", "plain decoding", "decoding speed"),
    }
    (told,) = (row.value for row in bench.rows if row.metric.startswith("tokens a step"))
    now = engines["ngram, fixed"].snapshot()
    assert told == now.output_tokens / now.sequence_steps >= 1  # nothing came before the first run


def test_a_controller_that_adapts_stands_beside_the_best_fixed_length():
    script = load("speculate")
    bench = Bench("speculate", torch.device("cpu"), quick=True)
    bench.console.quiet = True
    speeds = {"plain decoding": 1.0, "model, fixed": 2.0, "model, fixed 2": 3.0, "model, specdec_pp": 4.0}
    script.measure(bench, {name: lambda speed=speed: speed for name, speed in speeds.items()}, {}, "1 at a time")
    (row,) = [row for row in bench.rows if 374 in row.papers]
    assert (row.subject, row.peer) == ("model, specdec_pp", "model, fixed 2")


def test_drafts_of_one_row_stand_beside_as_many_that_are_computed_each():
    script = load("speculate")
    bench = Bench("speculate", torch.device("cpu"), quick=True)
    bench.console.quiet = True
    chosen = script.settings(quick=True)
    speeds = {"plain decoding": 1.0, "superposed, fixed": 3.0, "model, fixed, tree 3": 2.0}
    assert speeds.keys() <= chosen.keys()
    one, other = (EngineConfig.model_validate(chosen[name]) for name in [*speeds][1:])
    assert (one.tree, one.draft.most) == (other.tree, other.draft.most)
    script.measure(bench, {name: lambda speed=speed: speed for name, speed in speeds.items()}, {}, "1 at a time")
    (row,) = [row for row in bench.rows if 399 in row.papers]
    assert (row.subject, row.peer) == ("superposed, fixed", "model, fixed, tree 3")


def test_heads_stand_beside_plain_decoding_and_one_beside_those_that_it_is_to_beat():
    script = load("speculate_heads")
    bench = Bench("speculate_heads", torch.device("cpu"), quick=True)
    bench.console.quiet = True
    names = ("plain decoding", "early_exit", "medusa", "hidden_transfer", "ppd")
    runs = {name: lambda speed=speed: float(speed) for speed, name in enumerate(names, 1)}
    load("speculate").measure(bench, runs, {}, "1 at a time")
    claims = {(row.subject, row.peer) for row in bench.rows if 407 in row.papers}
    assert claims == {("hidden_transfer", "medusa"), ("hidden_transfer", "early_exit")}
    assert {(row.subject, row.peer) for row in bench.rows if 333 in row.papers} == {("ppd", "plain decoding")}
    assert [row.subject for row in bench.rows if row.peer == "plain decoding"] == [*names[1:]]
    for name in index().names("model.head"):
        assert script.settings(name).head.policy_name == name
        assert script.drafting(name)["draft"]["source"] == name


def test_all_controllers_are_measured_with_a_model():
    script = load("speculate")
    named = [options["controller"] for options in script.settings(quick=False).values() if "controller" in options]
    plain = {each if isinstance(each, str) else each["name"] for each in named}
    assert {"measured", "fixed", "bass", "thompson", "tetris", "specdec_pp"} <= plain
    trees = {options.get("draft_tree") for options in script.settings(quick=True).values()}
    assert trees > {None}
    assert set(script.settings(quick=True)) < set(script.settings(quick=False))


def test_drafts_that_are_made_meanwhile_stand_beside_those_that_wait_and_plain_decoding_from_disk():
    script = load("cascade")
    bench = Bench("cascade", torch.device("cpu"), quick=True)
    bench.console.quiet = True
    engine = engine_with(Ngram(shortest=1))

    def run() -> float:
        return load("speculate").run(engine, [[1, 2, 3] * 4], 1, 8)

    names = [*script.settings(), "in memory"]
    script.measure(bench, dict.fromkeys(names, run), dict.fromkeys(names, engine), "a disk")
    compared = {(row.subject, row.peer) for row in bench.rows if row.peer}
    assert compared == {(name, script.PLAIN) for name in names[1:]} | {
        ("cascade, fixed", "model, fixed"),
        ("cascade, fallback", "model, fallback"),
    }
    assert [row.subject for row in bench.rows if 428 in row.papers] == [script.WHOLE]


def test_a_stream_is_held_up_to_the_rate_of_a_disk(monkeypatch):
    script, slept = load("cascade"), list[float]()
    monkeypatch.setattr(script.time, "perf_counter", lambda: 5.0)
    monkeypatch.setattr(script.time, "sleep", slept.append)

    class Stream:
        read = 100

        def fill(self, number: int, buffer: torch.Tensor) -> dict[str, int]:
            self.read += 30
            return {}

    stream = Stream()
    script.hold_up(stream, lambda: 10.0)
    stream.fill(0, torch.empty(0))
    assert slept == [3.0]
