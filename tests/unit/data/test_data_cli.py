from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from penstock.cli import main
from penstock.data.store import TokenStore
from penstock.data.tokenizer import save_tokenizer


@pytest.fixture
def penstock(monkeypatch, capsys):
    """Runs ``penstock data ...``: exit code, standard output and standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["penstock", "data", *map(str, arguments)])
        with pytest.raises(SystemExit) as exited:
            main()
        out, err = capsys.readouterr()
        return int(exited.value.code or 0), out, err

    return run


@pytest.fixture
def texts(tmp_path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(30):
        (folder / f"{i}.txt").write_text(f"The text number {i} has some words of its own, like {i * i}.\n" * 3)
    return folder


def test_builds_shows_and_verifies(penstock, texts, tmp_path):
    out = tmp_path / "store"
    code, printed, told = penstock("build", texts, "--out", out, "--vocabulary", 300, "--held-out", 0.2)
    assert code == 0, told
    store = TokenStore.open(out, verify=True)
    assert store.tokenizer.get_vocab_size() == 300
    assert store.split("train").documents + store.split("held_out").documents == 30
    assert "tokenizing: " in told
    assert store.split("train").name(0) in printed

    code, shown, _ = penstock("show", out)
    assert (code, shown) == (0, printed)
    for side in ("train", "held_out"):
        assert f"{store.split(side).tokens:,}" in shown

    assert penstock("verify", out)[:2] == (0, f"{out} is intact: 8 files\n")


def test_corpora_by_path_and_by_name(penstock, tmp_path, tokenizer):
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"body": f"text {i}"}) + "\n" for i in range(20)))
    by_path = ("build", path, "--set", "field=body")
    by_name = ("build", "jsonl", "--set", f"path={path}", "--set", "field=body")
    stores = []
    for i, arguments in enumerate((by_path, by_name)):
        code, _, told = penstock(*arguments, "--out", tmp_path / str(i), "--tokenizer", tmp_path / "tokenizer")
        assert code == 0, told
        stores.append(TokenStore.open(tmp_path / str(i), tokenizer=tokenizer))
    assert stores[0].manifest.files == stores[1].manifest.files


def test_a_store_is_replaced_only_if_asked(penstock, texts, tmp_path):
    out = tmp_path / "store"
    arguments = ("build", texts, "--out", out, "--vocabulary", 300)
    assert penstock(*arguments)[0] == 0
    code, _, told = penstock(*arguments)
    assert (code, "add --replace" in told) == (2, True)
    assert penstock(*arguments, "--seed", 1, "--replace")[0] == 0
    assert TokenStore.open(out).manifest.seed == 1


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["build", "stdlip"], 2, "neither a path nor a corpus: did you mean 'stdlib'?"),
        (["build", "README"], 2, "neither a path nor a corpus"),
        (["build", "notes.xyz"], 2, "cannot tell what kind of corpus notes.xyz is"),
        (["build", "empty"], 1, "the corpus is empty"),
        (["build", "texts", "--vocabulary", "20"], 2, "a vocabulary of 20 is too small"),
        (["build", "texts", "--held-out", "1.5"], 2, "cannot hold out 1.5"),
        (["build", "texts", "--set", "pattern=1"], 2, "no option 'pattern': did you mean 'patterns'"),
        (["build", "texts", "--tokenizer", "empty"], 1, "no tokenizer.json in empty"),
        (["build", "texts", "--end-of-text", "</s>"], 2, "no token '</s>'"),
        (["show", "empty"], 2, "no token store in empty"),
        (["verify", "texts"], 2, "no token store in texts"),
    ],
)
def test_bad_input_is_one_message(penstock, texts, tmp_path, monkeypatch, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.xyz").write_text("notes")
    (tmp_path / "empty").mkdir()
    out = ["--out", "store"] if arguments[0] == "build" else []
    exit_code, _, told = penstock(*arguments, *out)
    assert exit_code == code
    assert [line for line in told.splitlines() if line.startswith("error: ") and message in line]
    assert "Traceback" not in told
    assert not Path("store").exists()


@pytest.mark.parametrize("verb", ["build", "show", "verify"])
def test_help_has_an_example(penstock, verb):
    code, printed, _ = penstock(verb, "--help")
    assert code == 0
    assert f"penstock data {verb} " in printed.replace("\n", " ")
