"""lm-eval's requests on the engine in process, beside lm-eval's own back end for transformers: samples a second.

Both hold smollm2's weights in fp32, from one folder, and answer the same requests. A sample of multiple choice is a
question with four continuations, of which the most probable one is the answer; one of generation is a greedy answer of
16 tokens behind a question with eight others before it. transformers' back end takes batches of 8 requests, sorted by
their length; ours takes all at once, and begins each repetition with an empty cache.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from penstock.core.bench import Bench
from penstock.core.errors import UsageError
from penstock.core.progress import silent
from penstock.eval.harness import PenstockLM
from penstock.eval.tasks.arithmetic import Arithmetic
from penstock.eval.tasks.recall import Recall
from penstock.models import hub
from penstock.serve.offline.llm import LLM

MODEL = "smollm2"
BATCH = 8
CHOICES = 4
TOKENS = 16


def choices(count: int) -> list[Instance]:
    """Questions about a table of 16 lines, each with four continuations, of which one is right."""
    samples = Recall(samples=count, pairs=16).draw()
    texts = [sample.reference for sample in samples]
    return [
        Instance("loglikelihood", {}, (sample.prompt, texts[(place + shift) % count]), shift)
        for place, sample in enumerate(samples)
        for shift in range(CHOICES)
    ]


def questions(count: int) -> list[Instance]:
    """Questions of arithmetic. No stop string, so that all answers are of one length."""
    samples = Arithmetic(samples=count, shots=8).draw()
    options = {"until": [], "max_gen_toks": TOKENS, "do_sample": False}
    return [Instance("generate_until", {}, (sample.prompt, dict(options)), 0) for sample in samples]


def main(bench: Bench) -> None:
    """Measures on the CPU."""
    if bench.device.type != "cpu":
        raise UsageError("the benchmark eval runs on the CPU", hint="Leave --device out, or say --device cpu.")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    count = 2 if bench.quick else 8
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, MODEL)
        hub.save(hub.load(MODEL, dtype=torch.float32), path)
        hub.load_tokenizer(MODEL).save_pretrained(path)
        llm = LLM(path, device="cpu", dtype="fp32", batching="batchllm", progress=silent)
        ours = PenstockLM(llm, progress=silent)
        theirs = HFLM(pretrained=str(path), dtype="float32", device="cpu", batch_size=BATCH)

    def rate(run: Callable[[], object]) -> float:
        """Samples a second of a run that begins with an empty cache."""
        llm.engine.memory.pool.forget()
        return count / bench.seconds(run)

    asked, written = choices(count), questions(count)
    for setting, run, peer_run in (
        (
            f"{MODEL}, fp32: {count} samples of multiple choice, {CHOICES} continuations each",
            lambda: ours.loglikelihood(asked, disable_tqdm=True),
            lambda: theirs.loglikelihood(asked, disable_tqdm=True),
        ),
        (
            f"{MODEL}, fp32: {count} samples of {TOKENS} generated tokens",
            lambda: ours.generate_until(written, disable_tqdm=True),
            lambda: theirs.generate_until(written, disable_tqdm=True),
        ),
    ):
        bench.compare(
            subject="penstock",
            peer="lm-eval, transformers",
            setting=setting,
            metric="samples evaluated",
            unit="samples/s",
            run=lambda run=run: rate(run),
            peer_run=lambda run=peer_run: rate(run),
            repetitions=3,
        )
