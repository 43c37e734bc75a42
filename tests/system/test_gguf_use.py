"""A GGUF file is used as a folder is: served, continued on the terminal, and trained from."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gguf_files import SHAPE, coded, write
from penstock import LLM, SamplingParams, cli
from penstock.core.progress import silent
from penstock.models import hub
from penstock.testing.transformers_peer import peer
from penstock.train.run import Run
from penstock.train.session import train_to_the_end
from served import Served
from tiny_runs import config, make_corpus


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file, described in the user's cache, where the compiled kernels are too."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write(path, peer("llama", **SHAPE), "llama", coded("Q8_0"))
    described = hub.resolve(path)
    yield path
    shutil.rmtree(described)


def test_it_is_served_by_its_name(file):
    with Served(model=str(file)) as server:
        assert server.http.get("/v1/models").json()["data"][0]["id"] == "tiny"
        chat = {"model": "tiny", "messages": [{"role": "user", "content": "def"}], "max_tokens": 4, "temperature": 0}
        answer = server.post("/v1/chat/completions", **chat).json()
    tokens = hub.load_tokenizer(file)("<|turn|>def")["input_ids"]
    [same] = LLM(str(file), progress=silent, cache_tokens=256, sequences=2, tokens=64).generate(
        [tokens], SamplingParams(max_tokens=4, temperature=0)
    )
    assert answer["choices"][0]["message"]["content"] == same.outputs[0].text


def test_it_is_continued_on_the_terminal(file, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["penstock", "generate", str(file), "-p", "def add", "-n", "4"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    assert capsys.readouterr().out.startswith("def add")


def test_it_is_trained_from(file, tmp_path):
    """What comes of it is an ordinary folder, with the file's tokenizer and chat template beside the weights."""
    data = {"corpus": {"name": "folder", "path": str(make_corpus(tmp_path / "corpus"))}, "held_out": 0.2}
    made = config(tmp_path / "none", model=None, start_from=str(file), data=data, steps=2, checkpoint_steps=2)
    run = Run.create(made, tmp_path / "run")
    before = hub.load(file)
    assert all(torch.equal(a, b) for a, b in zip(run.trainer.model.parameters(), before.parameters(), strict=True))
    assert train_to_the_end(run, silent)
    assert hub.read_config(tmp_path / "run" / "model") == before.config
    assert hub.load_tokenizer(tmp_path / "run" / "model").chat_template == hub.load_tokenizer(file).chat_template
