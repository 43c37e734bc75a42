from __future__ import annotations

import contextlib
import json
import os
import random
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

import killed_builds
from penstock.core.errors import DataError, PenstockError, UsageError
from penstock.data import building
from penstock.data.building import is_held_out, training_texts
from penstock.data.store import TokenStore
from penstock.data.tokenizer import END_OF_TEXT, train_tokenizer

TEXTS = [f"def f{i}(x):\n    return x * {i}\n" * (1 + i % 5) for i in range(60)]


@pytest.fixture
def store(listed, tokenizer, tmp_path) -> TokenStore:
    return TokenStore.build(listed.of(*TEXTS), tokenizer, tmp_path / "store", held_out=0.3)


def names(split) -> list[str]:
    return [split.name(i) for i in range(split.documents)]


@given(
    texts=st.lists(st.text(min_size=1, max_size=30), min_size=1, max_size=12),
    labels=st.lists(st.text(max_size=5), min_size=12, max_size=12, unique=True),
    shard_tokens=st.integers(1, 40),
    held_out=st.sampled_from([0.0, 0.3, 0.6]),
    data=st.data(),
)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_holds_exactly_the_documents(listed, tokenizer, monkeypatch, texts, labels, shard_tokens, held_out, data):
    """Every document is in one split with its own tokens; any window of the stream is that of their concatenation."""
    monkeypatch.setattr(building, "SHARD_TOKENS", shard_tokens)
    corpus = listed(pairs=tuple(zip(labels, texts, strict=False)))
    sides = {text: is_held_out(text, held_out) for text in texts}
    with tempfile.TemporaryDirectory() as folder:
        if all(sides.values()):
            with pytest.raises(DataError, match="are held out"):
                TokenStore.build(corpus, tokenizer, Path(folder) / "store", held_out=held_out)
            assert not list(Path(folder).iterdir())
            return
        store = TokenStore.build(corpus, tokenizer, Path(folder) / "store", held_out=held_out)
        found = {}
        for side in ("train", "held_out"):
            split = store.split(side)
            stream, owners = [], []
            for i in range(split.documents):
                ids = split.document(i).tolist()
                text = dict(corpus.pairs)[split.name(i)]
                assert ids == [*tokenizer.encode(text, add_special_tokens=False).ids, 0]
                assert tokenizer.decode(ids[:-1]) == text
                assert split.document_bytes(i) == len(text.encode())
                assert sides[text] == (side == "held_out")
                found[split.name(i)] = text
                stream += ids
                owners += [i] * len(ids)
            assert split.tokens == len(stream)
            assert split.bytes == sum(split.document_bytes(i) for i in range(split.documents))
            start = data.draw(st.integers(0, len(stream)))
            count = data.draw(st.integers(0, len(stream) - start))
            for a, n in ((0, len(stream)), (start, count)):
                tokens, documents = split.read(a, n)
                assert (tokens.dtype, documents.dtype) == (np.int32, np.int32)
                assert tokens.tolist() == stream[a : a + n]
                assert documents.tolist() == owners[a : a + n]
        assert found == dict(corpus.pairs)


def test_does_not_depend_on_workers_or_the_order_of_the_corpus(listed, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(building, "BATCH_CHARACTERS", 100)
    corpus = listed.of(*TEXTS)
    shuffled = listed(pairs=tuple(random.Random(0).sample(corpus.pairs, len(corpus.pairs))))
    stores = [
        TokenStore.build(corpus, tokenizer, tmp_path / "one", workers=1),
        TokenStore.build(corpus, tokenizer, tmp_path / "four", workers=4),
        TokenStore.build(shuffled, tokenizer, tmp_path / "shuffled"),
    ]
    assert stores[0].manifest.files == stores[1].manifest.files == stores[2].manifest.files


def test_seed_orders_the_documents_but_not_the_sides(listed, tokenizer, tmp_path):
    corpus = listed.of(*TEXTS)
    first, second = (
        TokenStore.build(corpus, tokenizer, tmp_path / str(seed), seed=seed, held_out=0.3) for seed in (1, 2)
    )
    for side in ("train", "held_out"):
        assert names(first.split(side)) != names(second.split(side))
        assert sorted(names(first.split(side))) == sorted(names(second.split(side)))
    assert names(first.split("train")) != sorted(names(first.split("train")))


@given(text=st.text(), shares=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_a_larger_share_holds_out_more(text, shares):
    smaller, larger = sorted(shares)
    assert is_held_out(text, larger) or not is_held_out(text, smaller)
    assert not is_held_out(text, 0.0)
    assert is_held_out(text, 1.0)


def test_the_share_is_the_share():
    held = sum(is_held_out(f"document {i}", 0.1) for i in range(10_000))
    assert abs(held - 1000) < 5 * 30


def test_sides_do_not_change_when_documents_come(listed, tokenizer, tmp_path):
    """Copies fall on the same side under any name; more documents move none."""
    before = TokenStore.build(listed.of(*TEXTS[:30]), tokenizer, tmp_path / "before", held_out=0.3)
    pairs = [(f"copy/{i}", text) for i, text in enumerate(TEXTS)] + list(listed.of(*TEXTS).pairs)
    after = TokenStore.build(listed(pairs=tuple(pairs)), tokenizer, tmp_path / "after", held_out=0.3)
    for side in ("train", "held_out"):
        then, now = set(names(before.split(side))), set(names(after.split(side)))
        assert then
        assert then <= now
        assert {name.removeprefix("copy/") for name in now if "copy" in name} == {
            name.removesuffix(".txt") for name in now if "copy" not in name
        }


def test_a_tokenizer_learns_from_the_training_side(listed):
    assert sorted(training_texts(listed.of(*TEXTS), 0.3)) == sorted(t for t in TEXTS if not is_held_out(t, 0.3))
    with pytest.raises(DataError, match="the corpus is empty"):
        list(training_texts(listed.of(), 0.3))
    with pytest.raises(UsageError, match="cannot hold out"):
        list(training_texts(listed.of("a"), 1.0))


def test_special_tokens_in_the_text_end_no_document(listed, tokenizer, tmp_path):
    text = f"before{END_OF_TEXT}after"
    split = TokenStore.build(listed.of(text), tokenizer, tmp_path / "store", held_out=0).split("train")
    ids = split.document(0)
    assert (ids == 0).sum() == 1
    assert tokenizer.decode(ids[:-1]) == text
    assert tokenizer.encode(text).ids.count(0) == 1, "the caller's tokenizer is as before"


def test_truncation_and_padding_of_the_tokenizer_do_not_matter(listed, tokenizer, tmp_path):
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.enable_truncation(3)
    copy.enable_padding()
    files = [
        TokenStore.build(listed.of(*TEXTS), t, tmp_path / name).manifest.files[:3]
        for name, t in (("plain", tokenizer), ("limited", copy))
    ]
    assert files[0] == files[1]


def test_large_vocabularies_take_wider_tokens(listed, tokenizer, tmp_path):
    wide = Tokenizer.from_str(tokenizer.to_str())
    wide.add_tokens([f"word{i}" for i in range(1 << 16)])
    store = TokenStore.build(listed.of("word65535 x"), wide, tmp_path / "store", held_out=0)
    assert store.manifest.dtype == "<u4"
    assert store.split("train").document(0)[0] == 400 + 65535


def test_another_end_of_text_token(listed, tokenizer, tmp_path):
    other = Tokenizer.from_str(tokenizer.to_str())
    other.add_special_tokens(["</s>"])
    store = TokenStore.build(listed.of("abc"), other, tmp_path / "store", held_out=0, end_of_text="</s>")
    assert store.split("train").document(0)[-1] == 400
    assert (store.manifest.end_of_text, store.manifest.end_of_text_id) == ("</s>", 400)
    with pytest.raises(UsageError, match="no token '<eos>'"):
        TokenStore.build(listed.of("abc"), other, tmp_path / "store", end_of_text="<eos>")


def test_reads_outside_are_refused(store):
    split = store.split("train")
    for start, count in ((-1, 2), (0, split.tokens + 1), (split.tokens, 1), (3, -1)):
        with pytest.raises(IndexError):
            split.read(start, count)
    for number in (-1, split.documents):
        with pytest.raises(IndexError):
            split.document(number)
    assert split.read(split.tokens, 0)[0].shape == (0,)


def test_reopens_as_it_was(store, tokenizer):
    again = TokenStore.open(store.folder, tokenizer=tokenizer, verify=True)
    assert again.manifest == store.manifest
    assert again.tokenizer.to_str() == tokenizer.to_str()
    assert store.manifest.corpus["name"] == "listed"
    assert [p.name for p in store.folder.parent.iterdir()] == ["store"], "nothing else is left behind"


def test_another_tokenizer_is_refused(store):
    with pytest.raises(DataError, match="built with another tokenizer"):
        TokenStore.open(store.folder, tokenizer=train_tokenizer(["something else"], 300))


FILES = [
    "train/tokens-00000.bin",
    "train/index.bin",
    "train/names.bin",
    "held_out/tokens-00000.bin",
    "tokenizer/tokenizer.json",
]


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_or_missing_file_is_named(store, name):
    path = store.folder / name
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(DataError, match=rf"{re.escape(str(path))} is damaged: it has \d+ bytes instead of \d+"):
        TokenStore.open(store.folder)
    path.unlink()
    with pytest.raises(DataError, match=rf"{re.escape(str(path))} is damaged: it is missing"):
        TokenStore.open(store.folder)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_named(store, name):
    path = store.folder / name
    payload = bytearray(path.read_bytes())
    payload[len(payload) // 2] ^= 4
    path.write_bytes(payload)
    with pytest.raises(DataError, match=rf"{re.escape(str(path))} is damaged: its contents"):
        TokenStore.open(store.folder, verify=True)


def test_a_damaged_manifest_is_named(store):
    path = store.folder / "manifest.json"
    whole = json.loads(path.read_text())

    def opening(text: str) -> str:
        path.write_text(text)
        with pytest.raises(PenstockError) as caught:
            TokenStore.open(store.folder)
        assert str(path.parent) in str(caught.value)
        return str(caught.value)

    assert "not valid JSON" in opening(path.read_text()[:-10])
    assert "not the manifest of a token store" in opening("[1]")
    assert "of version 2" in opening(json.dumps(whole | {"token_store": 2}))
    assert "splits" in opening(json.dumps(whole | {"splits": {"train": 1}}))
    assert "dtype" in opening(json.dumps(whole | {"dtype": "<f4"}))
    assert "does not fit" in opening(json.dumps(whole | {"dtype": "<u4"}))
    assert "surplus" in opening(json.dumps(whole | {"surplus": 1}))
    counts = whole["splits"]["train"] | {"tokens": 5}
    assert "does not fit" in opening(json.dumps(whole | {"splits": whole["splits"] | {"train": counts}}))


def test_no_store_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="no token store in"):
        TokenStore.open(tmp_path / "nothing")


def test_other_folders_are_not_replaced(listed, tokenizer, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    for target in (tmp_path, tmp_path / "thesis.txt"):
        with pytest.raises(UsageError, match="is not a token store"):
            TokenStore.build(listed.of("abc"), tokenizer, target)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_an_older_store_is_replaced(store, listed, tokenizer):
    again = TokenStore.build(listed.of("new"), tokenizer, store.folder, held_out=0)
    assert names(again.split("train")) == ["0.txt"]


def test_a_failed_build_leaves_what_was_there(store, listed, tokenizer):
    before = store.manifest
    for broken, message in ((listed.of(), "the corpus is empty"), (listed.of("a", "\ud800"), "not valid Unicode")):
        with pytest.raises(DataError, match=message):
            TokenStore.build(broken, tokenizer, store.folder)
        assert TokenStore.open(store.folder, verify=True).manifest == before
        assert [p.name for p in store.folder.parent.iterdir()] == ["store"]


@pytest.mark.parametrize("share", [-0.1, 1.0, 2.0])
def test_a_share_out_of_range_is_refused(listed, tokenizer, tmp_path, share):
    with pytest.raises(UsageError, match="cannot hold out"):
        TokenStore.build(listed.of("abc"), tokenizer, tmp_path / "store", held_out=share)


def test_progress_is_told_of_every_byte_and_token(listed, tokenizer, tmp_path):
    told: dict[str, float] = {}

    @contextlib.contextmanager
    def reporter(label, total, unit):
        class Bar:
            def advance(self, amount=1, note=""):
                told[label] = told.get(label, 0) + amount

        yield Bar()
        told[f"{label} total"] = total

    store = TokenStore.build(listed.of(*TEXTS), tokenizer, tmp_path / "store", held_out=0.3, progress=reporter)
    store.verify(reporter)
    assert len(list(training_texts(listed.of(*TEXTS), 0, reporter))) == len(TEXTS)
    splits = [store.split("train"), store.split("held_out")]
    assert told["tokenizing"] == sum(split.bytes for split in splits)
    assert told["writing"] == told["writing total"] == sum(split.tokens for split in splits)
    assert told["verifying"] == told["verifying total"]
    assert told["reading"] == sum(map(len, TEXTS))


@pytest.mark.parametrize("builds", [8, pytest.param(80, marks=pytest.mark.slow)])
def test_a_killed_build_leaves_a_whole_store_or_none(tokenizer, tmp_path, builds):
    """Builds killed with SIGKILL at random moments, half of them over an older store."""
    source = tmp_path / "source"
    source.mkdir()
    for i in range(200):
        (source / f"{i}.txt").write_text(TEXTS[i % len(TEXTS)] + str(i))
    killed, none = killed_builds.kill(source, tokenizer, tmp_path / "store", builds)
    assert killed >= builds // 4
    assert none >= builds // 8


def test_a_full_disk_is_explained(listed, tokenizer, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "tokens")

    monkeypatch.setattr(building._Spill, "add", full)
    with pytest.raises(PenstockError, match=r"(?s)cannot write .*No space left.*free some space"):
        TokenStore.build(listed.of("abc"), tokenizer, tmp_path / "store", held_out=0)
    assert not list(tmp_path.iterdir())
