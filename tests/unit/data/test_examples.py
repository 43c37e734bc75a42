"""The store of examples, and how they are packed into rows."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.errors import DataError
from penstock.data.chats.examples import ExampleStore
from penstock.data.chats.messages import conversation
from penstock.data.chats.packing import PackedLoader, pack
from penstock.data.chats.template import Template
from penstock.data.corpora.hf import HuggingFace
from penstock.data.corpora.jsonl import JsonLines
from penstock.data.corpora.parquet import Parquet
from penstock.data.samplers.sequential import Sequential
from penstock.ops.cross_entropy import IGNORE
from tiny_chats import make_chat_model, turns, write_lines

RECORDS = [{"messages": turns(f"what is {i}?", "a word " * (i % 7 + 1))} for i in range(30)]


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Template:
    return Template(make_chat_model(tmp_path_factory.mktemp("chat") / "model"))


def stored(template, folder, records=RECORDS, kind="chats", **options) -> ExampleStore:
    lines = JsonLines(path=write_lines(folder / "data.jsonl", records))
    return ExampleStore.build(lines, kind, template, folder / "store", **options)


def contents(store: ExampleStore, name="train") -> list[tuple[list[int], list[bool]]]:
    split = store.split(name)
    return [tuple(each.tolist() for each in split.read(i, 10**6)) for i in range(split.count * split.width)]


def test_a_store_holds_what_the_template_wrote(template, tmp_path):
    built = stored(template, tmp_path, held_out=0.0)
    wanted = [template.write(conversation(record, "here"), "here") for record in RECORDS]
    assert contents(built) == [(each.tokens.tolist(), each.learnt.tolist()) for each in wanted]
    opened = ExampleStore.open(tmp_path / "store")
    assert opened.manifest == built.manifest
    assert contents(opened) == contents(built)


def test_data_sets_of_all_kinds_give_the_same_examples(template, tmp_path):
    import datasets
    import pyarrow
    from pyarrow import parquet

    wanted = contents(stored(template, tmp_path, held_out=0.0))
    parquet.write_table(pyarrow.Table.from_pylist(RECORDS), tmp_path / "data.parquet")
    datasets.Dataset.from_list(RECORDS).save_to_disk(tmp_path / "saved")
    for place, source in enumerate(
        (Parquet(path=tmp_path / "data.parquet"), HuggingFace(path=str(tmp_path / "saved")))
    ):
        store = ExampleStore.build(source, "chats", template, tmp_path / f"store{place}", held_out=0.0)
        assert contents(store) == wanted


def test_what_is_held_out_depends_on_the_contents_alone(template, tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "other").mkdir()
    one = stored(template, tmp_path / "one", held_out=0.3)
    other = stored(template, tmp_path / "other", [*RECORDS[::-1], *RECORDS], held_out=0.3)
    for name in ("train", "held_out"):
        assert {str(each) for each in contents(one, name)} == {str(each) for each in contents(other, name)}
    assert 0 < one.split("held_out").count < 20


def test_bad_records_end_the_work_or_are_counted(template, tmp_path):
    records = [*RECORDS[:3], {"messages": turns("hello")}, {"text": "x"}, {"messages": turns("hello", "")}]
    with pytest.raises(DataError, match=r"data.jsonl, line 4 is a conversation without an answer") as caught:
        stored(template, tmp_path, records)
    assert "data.skip_bad=true" in caught.value.hint
    assert not (tmp_path / "store").exists()
    manifest = stored(template, tmp_path, records, skip_bad=True, held_out=0.0).manifest
    assert (manifest.splits["train"].examples, manifest.skipped) == (3, 3)
    assert manifest.first_skipped.endswith(
        "line 4 is a conversation without an answer: it has no message of the assistant"
    )


def test_nothing_to_train_on_is_told(template, tmp_path):
    with pytest.raises(DataError, match=r"nothing to train on .*: 1 records were skipped, the first since"):
        stored(template, tmp_path, [{"text": "x"}], skip_bad=True)


@pytest.mark.parametrize("part", ["tokens", "starts"])
def test_a_damaged_store_is_told(template, tmp_path, part):
    stored(template, tmp_path)
    path = tmp_path / "store" / "train" / f"{part}.bin"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(DataError, match=f"{part}.bin is damaged"):
        ExampleStore.open(tmp_path / "store")


@given(st.lists(st.integers(1, 20), min_size=1, max_size=40))
def test_every_item_is_packed_once_and_no_row_overflows(sizes):
    rows = pack(np.array(sizes), 20)
    assert sorted(itertools.chain.from_iterable(row.tolist() for row in rows)) == list(range(len(sizes)))
    assert all(sum(sizes[i] for i in row) <= 20 for row in rows)
    half_empty = [row for row in rows if sum(sizes[i] for i in row) <= 10]
    assert len(half_empty) <= 1, "two of them would have fitted into one row"


def test_rows_hold_whole_sequences_with_their_own_targets(template, tmp_path):
    split = stored(template, tmp_path, held_out=0.0).split("train")
    loader = PackedLoader(split, length=64, sampler=Sequential(), seed=0)
    found = []
    for sample in range(loader.samples):
        batch = loader.batch(sample, 1)
        tokens, targets, numbers = (x[0].tolist() for x in (batch.tokens, batch.targets, batch.documents))
        for number in range(len(loader.packed.rows[sample])):
            places = [i for i, each in enumerate(numbers) if each == number]
            assert places == list(range(places[0], places[-1] + 1))
            learnt = [False, *(targets[i] != IGNORE for i in places[:-1])]
            assert targets[places[-1]] == IGNORE
            assert all(targets[i] in (IGNORE, tokens[i + 1]) for i in places[:-1])
            found.append(([tokens[i] for i in places], learnt))
        rest = [i for i, each in enumerate(numbers) if each >= len(loader.packed.rows[sample])]
        assert all(targets[i] == IGNORE for i in rest)
    assert sorted(found) == sorted(contents(stored_again(split)))


def stored_again(split):
    """A store with nothing but ``split``."""

    class One:
        def split(self, name):
            return split

    return One()


def test_long_conversations_are_cut_and_those_without_an_answer_left_are_left_out(template, tmp_path):
    records = [
        {"messages": turns("what", "a word " * 60)},
        {"messages": turns("what is " * 60, "a word")},
        {"messages": turns("what", "a word")},
    ]
    split = stored(template, tmp_path, records, held_out=0.0).split("train")
    loader = PackedLoader(split, length=32, sampler=Sequential(), seed=0)
    assert (loader.packed.cut, loader.packed.left_out) == (1, 1)
    assert sorted(np.concatenate(loader.packed.rows).tolist()) == [0, 2]


def test_preferences_that_are_too_long_are_left_out_whole(template, tmp_path):
    records = [{"prompt": "what", "chosen": "a word " * size, "rejected": "no"} for size in (1, 40, 2)]
    store = stored(template, tmp_path, records, kind="preferences", held_out=0.0)
    loader = PackedLoader(store.split("train"), length=64, sampler=Sequential(), seed=0)
    assert (loader.packed.cut, loader.packed.left_out) == (0, 1)
    batch = loader.batch(0, 1)
    assert set(batch.documents[0].tolist()) == {0, 1, 2}
    assert store.manifest.splits["train"].examples == 3


def test_ratings_stand_beside_the_answer_of_the_one_before(template, tmp_path):
    texts = [("what is 1?", "a word", True), ("what is 2?", "no", False), ("what is 3?", "and 3", 1)]
    records = [{"prompt": asked, "completion": said, "label": label} for asked, said, label in texts]
    split = stored(template, tmp_path, records, kind="ratings", held_out=0.0).split("train")
    assert split.extras["label"].tolist() == [0, 0, 1, 1, 1, 1]
    wanted = [("what is 2?", "no"), ("what is 2?", "a word"), ("what is 3?", "and 3"), ("what is 3?", "no")]
    wanted += [("what is 1?", "a word"), ("what is 1?", "and 3")]
    written = [template.write(conversation({"messages": turns(*chat)}, "here"), "here").tokens for chat in wanted]
    assert [split.read(i, 99)[0].tolist() for i in range(6)] == [tokens.tolist() for tokens in written]


@pytest.mark.parametrize(
    ("record", "why"),
    [
        ({"prompt": "a", "completion": "b"}, "line 2 is no rating: its 'label' must be true or false, and is None"),
        ({"prompt": "a", "completion": "b", "label": "good"}, "line 2 is no rating: .* is 'good'"),
        (None, "line 1 is the only rating, and each needs another one beside it"),
    ],
)
def test_bad_ratings_are_told(template, tmp_path, record, why):
    records = [{"prompt": "x", "completion": "a word", "label": True}, *([record] if record else [])]
    with pytest.raises(DataError, match=why):
        stored(template, tmp_path, records, kind="ratings")
