"""Distillation, beside divergences that are worked out of transformers' scores."""

from __future__ import annotations

import http.server
import json
import threading

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from penstock.core.errors import ConfigError, DataError, PenstockError
from penstock.core.progress import silent
from penstock.models import hub
from penstock.models.decoder import Decoder
from penstock.train.batches import microbatches
from penstock.train.material import teacher
from penstock.train.run import Run
from penstock.train.session import train_to_the_end
from tiny_chats import VOCABULARY, chat_config, make_chat_model, turns, write_lines

CHATS = [turns(f"what is {i}?", f"{i} a word " * (i % 3 + 1), "and?", "no") for i in range(7)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_chat_model(tmp_path_factory.mktemp("chat") / "model")


@pytest.fixture(scope="module")
def sage(model, tmp_path_factory):
    """A teacher with the same tokenizer, and opinions of its own."""
    folder = tmp_path_factory.mktemp("sage") / "model"
    shape = hub.read_config(model).model_copy(update={"layers": 1, "init_std": 0.5})
    hub.save(Decoder(shape).initialize(1), folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((model / name).read_bytes())
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = write_lines(tmp_path_factory.mktemp("data") / "chats.jsonl", [{"messages": chat} for chat in CHATS])
    return {"chats": str(path), "held_out": 0.3}


@pytest.fixture(scope="module")
def server(sage):
    """What vLLM and penstock tell of a prompt, from transformers; after so many answers it fails, if it is told to."""
    peer = AutoModelForCausalLM.from_pretrained(sage)

    class Handler(http.server.BaseHTTPRequestHandler):
        left = 10**6

        def do_GET(self):
            self._say({"data": [{"id": "sage"}]})

        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            Handler.left -= 1
            if Handler.left < 0:
                self.send_error(503, "gone for lunch")
                return
            assert asked["model"] == "sage"
            with torch.no_grad():
                scores = peer(torch.tensor([asked["prompt"]])).logits[0].log_softmax(-1)
            told = [None]
            for place, token in zip(scores, asked["prompt"][1:], strict=False):
                best = place.topk(asked["prompt_logprobs"]).indices.tolist()
                told.append({str(t): {"logprob": place[t].item()} for t in [token, *best]})
            self._say({"choices": [{"prompt_logprobs": told}]})

        def _say(self, said):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(said).encode())

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{served.server_port}", Handler
        served.shutdown()


def options(model, data, source, **changes):
    objective = {"name": "distill", "source": str(source), "top": changes.pop("top", 5)}
    return chat_config(model, data=data, objective=objective, **changes)


def divergence(run: Run, student, sage, top: int) -> tuple[float, int]:
    """Of all sequences that are trained on, in float64, each by itself; and of how many tokens."""
    split, total, count = run.material.store.split("train"), 0.0, 0
    peers = [AutoModelForCausalLM.from_pretrained(folder) for folder in (student, sage)]
    for sequence in range(split.count):
        tokens, learnt = split.read(sequence, 999)
        with torch.no_grad():
            given = torch.tensor(tokens[None].astype("int64"))
            q, p = (peer(given).logits[0, :-1].double().softmax(-1)[learnt[1:]] for peer in peers)
        best = p.topk(top).indices
        ps, qs = ([*each.gather(1, best).T, 1 - each.gather(1, best).sum(1)] for each in (p, q))
        total += sum((a * (a / b).log())[a > 1e-6].sum().item() for a, b in zip(ps, qs, strict=True))
        count += len(p)
    return total, count


def loss_of(run: Run, model) -> float:
    loader, loss = run.trainer.loader, 0.0
    for row in range(loader.samples):
        for micro, context in microbatches(loader.batch(row, 1), 128, None, torch.device("cpu")):
            loss += run.config.objective.loss(model, micro, context).item()
    return loss


@pytest.mark.parametrize("top", [5, VOCABULARY])
def test_the_loss_is_the_divergence_from_the_teacher(model, sage, data, tmp_path, top):
    """With all tokens known it is the whole one."""
    run = Run.create(options(model, data, sage, top=top), tmp_path / "run")
    wanted, count = divergence(run, model, sage, top)
    assert count == run.material.store.manifest.splits["train"].learnt
    assert loss_of(run, run.trainer.model) == pytest.approx(wanted, rel=1e-4)


def test_a_model_becomes_its_teacher(model, sage, data, server, tmp_path):
    """The same from a server as from a folder; and the run goes on by what is stored."""
    here = Run.create(options(model, data, sage, steps=30, checkpoint_steps=15), tmp_path / "here")
    there = Run.create(options(model, data, server[0]), tmp_path / "there")
    for name in ("train", "held_out"):
        one, other = (
            teacher.read(run.material.store.split(name), run.folder / "teacher", name, 5) for run in (here, there)
        )
        assert np.array_equal(one["teacher_tokens"], other["teacher_tokens"])
        np.testing.assert_allclose(one["teacher_logprobs"], other["teacher_logprobs"], atol=1e-4)
    first, _ = divergence(here, model, sage, 5)
    assert train_to_the_end(here, silent)["held_out_loss"] > 0
    again = Run.reopen(tmp_path / "here")
    assert loss_of(again, hub.load(tmp_path / "here")) < 0.6 * first
    (tmp_path / "here" / "teacher" / "train.bin").write_bytes(b"")
    with pytest.raises(DataError, match="has what the teacher said of 0 tokens, not of the"):
        Run.reopen(tmp_path / "here")


def test_what_was_asked_before_a_server_fell_silent_is_kept(model, data, server, tmp_path):
    address, handler = server
    whole = Run.create(options(model, data, address), tmp_path / "whole").folder / "teacher" / "train.bin"
    batch = {"tokens": 256, "micro_tokens": 128, "stages": [{"length": 128}]}
    handler.left, folder = 3, tmp_path / "run"
    with pytest.raises(PenstockError, match=r"(?s)answers with 503: .*gone for lunch"):
        Run.create(options(model, data, address, batch=batch), folder)
    begun = (folder / "teacher" / "train.bin").read_bytes()
    assert 0 < len(begun) < whole.stat().st_size
    (folder / "teacher" / "train.bin").write_bytes(begun + b"half a record")
    handler.left = 10**6
    with pytest.raises(ConfigError, match="has what a teacher said with the top 5, not 4"):
        Run.create(options(model, data, address, batch=batch, top=4), folder)
    Run.create(options(model, data, address, batch=batch), folder)
    assert (folder / "teacher" / "train.bin").read_bytes() == whole.read_bytes()


def test_teachers_that_cannot_be_asked_are_told(model, sage, data, tmp_path):
    for source, kind, why in (
        ("", ConfigError, "learns from a teacher, and objective.source names none"),
        ("python-1m", ConfigError, "the teacher python-1m has another tokenizer than the model"),
        ("http://127.0.0.1:9", PenstockError, "does not answer"),
    ):
        with pytest.raises(kind, match=why):
            Run.create(options(model, data, source), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"objective.top is 999, and there are \d+ tokens"):
        Run.create(options(model, data, sage, top=999), tmp_path / "run")
