"""Speculation: tokens a second and accepted tokens a step of drafters and controllers, beside plain decoding.

python-6m continues files of the standard library that it has not seen, greedily, for one, four and sixteen requests at
a time; python-1m drafts for it, or its own text does, a chain or a tree; and what was said the last time, where all is
asked again. The head that predicts for the controller specdec_pp is trained before that. At one request also
transformers' assisted generation and its prompt look-up, with the same models on the same prompts.

On CUDA it is python-150m and python-15m, which are trained the first time: see ``speculate_cuda``.
"""

from __future__ import annotations

import functools
import itertools
import tempfile
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch

from penstock.core.bench import Bench, load
from penstock.core.config import build, read_toml
from penstock.core.progress import show
from penstock.data.building import is_held_out
from penstock.data.corpora.stdlib import StandardLibrary
from penstock.models import hub
from penstock.models.acceptance import folder as acceptance
from penstock.models.acceptance.head import AcceptanceHead, like
from penstock.models.decoder import Decoder
from penstock.policy import index
from penstock.serve.build import build_engine
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.engine.engine import Engine
from penstock.serve.messages import Request
from penstock.serve.rehearsal import rehearse_drafts
from penstock.train import presets
from penstock.train.config import TrainConfig
from penstock.train.run import Run
from penstock.train.session import train_to_the_end

TARGET, DRAFT, PLAIN = "python-6m", "python-1m", "plain decoding"
PROMPT, OUTPUT = 128, 192  # tokens in and out
#: By which shares of these a request gets more tokens out, or fewer: else all that came together would end together
#: where nothing is drafted, and their successors' prompts would be computed together, as in no traffic.
UNLIKE = (0, -0.2, 0.1, 0.2, -0.1)
CROWDS = (1, 4, 16)
#: Of one request at a time, and of several; and where the default controller decides, beside plain decoding alone: on a
#: machine that is not always as fast, what stands between two runs makes them differ.
REPETITIONS, REPEATED, DEFAULT = 5, 3, 9
#: Prompts of a crowd of one, and for each place in a larger one: few, and it would be small for much of the time.
ALONE, TURNS = 4, 4
#: How many drafts each place has, by depth.
TREES = ("2",)
#: Lengths that are fixed, beside the most that there may be.
LENGTHS = (2, 3)
#: Controllers that have no say about what comes out of the text.
UNHEARD = ("fallback", "tetris", "specdec_pp")
#: What papers claim of a controller or drafter beside plain decoding: greater speed.
PAPERS = {"model, bass": (160,), "model, fixed": (63,), "ppd": (333,)}
#: And of one beside the best length that is fixed.
ADAPTIVE = {"model, specdec_pp": (374,), "model, tetris": (191,), "model, thompson": (162,)}

#: And of one beside others: several drafts of one pass beside as many that are computed each by itself; heads on the
#: model itself beside Medusa and the model's own first layers.
SUPERPOSED, COMPUTED = "superposed, fixed", "model, fixed, tree 3"
BESIDE = {SUPERPOSED: ((COMPUTED,), (399,)), "hidden_transfer": (("medusa", "early_exit"), (407,))}


def prompts(count: int, source: str | Path = TARGET) -> list[list[int]]:
    """``count`` pieces of files that neither model has seen: the first tokens of each, then those behind them."""
    tokenizer = hub.load_tokenizer(source)
    texts = (each.text for each in StandardLibrary(tests=True).documents() if is_held_out(each.text, 0.05))
    files = [ids for text in texts if len(ids := tokenizer(text)["input_ids"]) >= PROMPT]
    starts = range(0, max(map(len, files)), PROMPT)
    pieces = (ids[start : start + PROMPT] for start in starts for ids in files)
    return list(itertools.islice((piece for piece in pieces if len(piece) == PROMPT), count))


def settings(quick: bool) -> dict[str, dict[str, Any]]:
    """The engine's options by what they are called."""
    drafters: dict[str, dict[str, Any]] = {
        "ngram": {"draft": "ngram"},
        "suffix": {"draft": {"name": "suffix", "kept": 0}},  # or all would know what was said the last time
        "model": {"draft": DRAFT},
    }
    names = ["measured", "fixed", "specdec_pp"] if quick else index().names("speculate.controller")
    controllers = {
        "ngram": [name for name in names if name not in UNHEARD],
        "suffix": ["measured", "fixed"],
        "model": names,
    }
    found: dict[str, dict[str, Any]] = {PLAIN: {}}
    for drafter, options in drafters.items():
        for name in controllers[drafter]:
            found[f"{drafter}, {name}"] = {**options, "controller": name}
        for tree in TREES:
            for name in ("measured", "fixed"):
                found[f"{drafter}, {name}, tree {tree}"] = {**options, "controller": name, "draft_tree": tree}
    found["suffix, measured, asked again"] = {"draft": "suffix"}
    found[SUPERPOSED] = {"draft": {"name": "superposed", "source": DRAFT, "drafts": 3}, "controller": "fixed"}
    found[COMPUTED] = {
        "draft": {"name": "model", "source": DRAFT, "tokens": 4},
        "draft_tree": "3",
        "controller": "fixed",
    }
    for length in LENGTHS[:1] if quick else LENGTHS:
        found[f"model, fixed {length}"] = {**drafters["model"], "controller": {"name": "fixed", "length": length}}
    return found


def predictor(draft: Decoder, target: Decoder, quick: bool) -> AcceptanceHead:
    """The head that predicts what is accepted of greedy drafts; one that has learnt nothing where it is to be quick."""
    if quick:
        return like(draft).initialize(0).requires_grad_(False)
    greedy = {"name": "acceptance", "temperature": 0.0}
    options = {"target": TARGET, "draft": DRAFT, "objective": greedy}
    config = build(TrainConfig, {**read_toml(presets.path_of("acceptance")), **options})
    with tempfile.TemporaryDirectory() as made:
        train_to_the_end(Run.create(config, Path(made) / "run"), show)
        return acceptance.load(Path(made) / "run", draft, target, (DRAFT, TARGET))


def run(engine: Engine, todo: list[list[int]], crowd: int, output: int) -> float:
    """Tokens a second, so many requests at a time, from an empty cache: where one ends, the next one comes, and where
    none is left to come it is over."""
    engine.memory.pool.forget()
    lengths = (round(output * (1 + share)) for share in itertools.cycle(UNLIKE))
    coming = (
        Request(str(number), prompt, SamplingParams(temperature=0, max_tokens=length, ignore_eos=True))
        for number, (prompt, length) in enumerate(zip(todo, lengths, strict=False))
    )
    begun = time.perf_counter()
    for request in itertools.islice(coming, crowd):
        engine.add(request)
    tokens, ended = 0, False
    while not ended:
        deltas = engine.step()
        tokens += sum(len(delta.tokens) for delta in deltas)
        for delta in deltas:
            if delta.finish is not None:
                if (request := next(coming, None)) is not None:
                    engine.add(request)
                else:
                    ended = True
    speed = tokens / (time.perf_counter() - begun)
    for number in range(len(todo)):
        engine.abort(str(number))
    while engine.busy:
        engine.step()
    return speed


def peers(todo: list[list[int]], output: int) -> dict[str, Callable[[], float]]:
    """What transformers does of the same, one request at a time."""
    from transformers import AutoModelForCausalLM

    target, draft = (
        AutoModelForCausalLM.from_pretrained(hub.resolve(name), dtype=torch.float32).eval() for name in (TARGET, DRAFT)
    )

    def speed(**options: Any) -> Callable[[], float]:
        def generate() -> float:
            begun = time.perf_counter()
            for prompt in todo:
                ids = torch.tensor([prompt])
                target.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=output,
                    min_new_tokens=output,
                    do_sample=False,
                    pad_token_id=0,
                    **options,
                )
            return len(todo) * output / (time.perf_counter() - begun)

        return generate

    return {
        "transformers, plain": speed(),
        "transformers, assisted generation": speed(assistant_model=draft),
        "transformers, prompt look-up": speed(prompt_lookup_num_tokens=8),
    }


def main(bench: Bench) -> None:
    """Measures every crowd."""
    if bench.device.type == "cuda":
        load("speculate_cuda").main(bench)
        return
    chosen = settings(bench.quick)
    models = [hub.load(name, device=bench.device, dtype=torch.float32).eval() for name in (TARGET, DRAFT)]
    engines, head = {}, predictor(models[1], models[0], bench.quick)
    for name, options in chosen.items():
        config = EngineConfig.model_validate({"sequences": max(CROWDS), "cache_tokens": 16384, **options})
        predicts = head if config.controller.predicts else None
        engines[name] = build_engine(models[0], config, draft=models[1], predictor=predicts)
        rehearse_drafts(config, engines[name])
    for crowd in CROWDS[: 1 if bench.quick else None]:
        by_crowd(bench, engines, crowd)


def by_crowd(bench: Bench, engines: dict[str, Engine], crowd: int) -> None:
    """Measures the ``engines`` with so many requests at a time, and where it is one, transformers."""
    output = 24 if bench.quick else OUTPUT
    todo = prompts(1 if bench.quick else (ALONE if crowd == 1 else TURNS * crowd))
    runs: dict[str, Callable[[], float]] = {
        name: functools.partial(run, engine, todo, crowd, output) for name, engine in engines.items()
    }
    default = {name: run for name, run in runs.items() if name == PLAIN or name.endswith(", measured")}
    others = {name: run for name, run in runs.items() if name == PLAIN or name not in default}
    if crowd == 1:
        beside = peers(todo, output)
        default, others = default | beside, others | beside
    setting = f"{crowd} at a time"
    measure(bench, default, engines, setting, DEFAULT)
    measure(bench, others, engines, setting, REPETITIONS if crowd == 1 else REPEATED, known={PLAIN, *default})


def measure(
    bench: Bench,
    runs: dict[str, Callable[[], float]],
    engines: dict[str, Engine],
    setting: str,
    repetitions: int = REPETITIONS,
    known: Collection[str] = (),
) -> None:
    """The rows of one crowd: each beside plain decoding, and those that draft beside the best of transformers. Those
    that are ``known`` have rows already."""
    before = {name: engine.snapshot() for name, engine in engines.items()}
    values = bench.turns(runs, setting, repetitions)
    common = {"metric": "decoding speed", "unit": "tokens/s", "setting": setting}
    others = [name for name in runs if name.startswith("transformers")]
    best = max(others, key=lambda name: sum(values[name]), default=None)
    fixed = [name for name in runs if name.startswith("model, fixed") and "tree" not in name]
    for name in ADAPTIVE.keys() & runs.keys():
        length = max(fixed, key=lambda each: sum(values[each]))
        beside = {"subject": name, "values": values[name], "papers": ADAPTIVE[name], **common}
        bench.compared(peer=length, peer_values=values[length], **beside)
    for name, (rivals, papers) in BESIDE.items():
        for other in rivals if name in runs else ():
            if other in runs:
                beside = {"subject": name, "values": values[name], "papers": papers, **common}
                bench.compared(peer=other, peer_values=values[other], **beside)
    for name in runs:
        if name in known:
            continue
        if name == PLAIN:
            bench.measured(subject=name, values=values[name], **common)
            continue
        beside = {"subject": name, "values": values[name], **common}
        papers = PAPERS.get(name, ())
        bench.compared(peer=PLAIN, peer_values=values[PLAIN], papers=papers, **beside)
        if name in engines:
            if best is not None:
                bench.compared(peer=best, peer_values=values[best], **beside)
            now, then = engines[name].snapshot(), before[name]
            steps = now.sequence_steps - then.sequence_steps
            tokens = (now.output_tokens - then.output_tokens) / steps
            bench.row(subject=name, setting=setting, metric="tokens a step of a sequence", unit="", value=tokens)
