"""Long texts in pieces: the tokens of the whole, for tokenizers of every kind."""

from __future__ import annotations

import argparse
import inspect
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from penstock.data import pieces
from penstock.data.store import TokenStore
from penstock.data.tokenizer import PIECES, train_tokenizer

CODE = inspect.getsource(argparse)
LLAMA = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)


def trained(pre_tokenizer=None, normalizer=None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="?"))
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["?"], show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    # Unsplit text is cut into lines here, only to keep the training short.
    tokenizer.train_from_iterator(CODE[:20_000].splitlines(keepends=True), trainer)
    return tokenizer


def bytes_after(pattern: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


KINDS = {
    "ours": lambda: train_tokenizer([CODE], 400),
    "gpt2": lambda: trained(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "llama3": lambda: trained(bytes_after(LLAMA)),
    "qwen": lambda: trained(bytes_after(LLAMA), normalizers.NFC()),
    "metaspace": lambda: trained(pre_tokenizers.Metaspace(prepend_scheme="first")),
    "whitespace": lambda: trained(pre_tokenizers.Whitespace(), normalizers.Lowercase()),
    "stripped": lambda: trained(pre_tokenizers.ByteLevel(), normalizers.Strip()),
    "no words": lambda: trained(None, normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])),
}
TEXT = st.lists(
    st.one_of(
        st.sampled_from(
            ["word", " ", "  ", "\n", "\n\n    ", "a", "'s", "é", "e\u0301", "漢字", "🙂", "12345", "<|x|>"]
        ),
        st.text(max_size=5),
        st.integers(0, len(CODE) - 200).map(lambda start: CODE[start : start + 150]),
    ),
    max_size=60,
).map("".join)


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request) -> Tokenizer:
    made = KINDS[request.param]()
    made.add_tokens(["<|x|>"])
    return pieces.plain(made)


@given(text=TEXT, size=st.integers(1, 200))
@settings(max_examples=60, deadline=None)
def test_the_tokens_are_those_of_the_whole(tokenizer, text, size):
    whole = tokenizer.encode(text, add_special_tokens=False).ids
    assert [token for part in pieces.encode(tokenizer, text, size) for token in part] == whole


def test_real_text_is_never_encoded_in_more_than_a_piece(tokenizer, request):
    """But for a tokenizer that makes no words."""
    seen = []

    class Watched:
        pre_tokenizer = tokenizer.pre_tokenizer

        def encode(self, text: str, **options):
            seen.append(len(text))
            return tokenizer.encode(text, **options)

    found = [token for part in pieces.encode(Watched(), CODE, 4000) for token in part]
    assert found == tokenizer.encode(CODE, add_special_tokens=False).ids
    longest = len(CODE) if tokenizer.pre_tokenizer is None else 6000
    assert max(seen) <= longest
    assert tokenizer.pre_tokenizer is None or len(seen) > len(CODE) / 5000


def test_a_tokenizer_is_learnt_from_parts_as_from_the_whole(monkeypatch):
    whole = train_tokenizer([CODE], 400).to_str()
    monkeypatch.setattr("penstock.data.tokenizer.parts", lambda text: pieces.parts(text, 300))
    assert train_tokenizer([CODE], 400).to_str() == whole


SPLIT = pre_tokenizers.Split(Regex(PIECES), "isolated")


@given(text=st.one_of(TEXT, st.text("aé1 \n\t\u3000\x1c!_，。漢́", max_size=80)), size=st.integers(1, 20))
@settings(max_examples=60, deadline=None)
def test_parts_of_a_text_are_cut_where_our_tokenizers_cut(text, size):
    """But where they do not for longer than a part, and a part has an end in any text."""
    found = list(pieces.parts(text, size))
    assert "".join(found) == text
    assert max(map(len, found), default=0) <= 2 * size
    ends = [0, *(found.start() for found in pieces.CUT.finditer(text)), len(text)]
    if all(after - before < size for before, after in itertools.pairwise(ends)):
        cut = [word for part in found for word, _ in SPLIT.pre_tokenize_str(part)]
        assert cut == [word for word, _ in SPLIT.pre_tokenize_str(text)]


@pytest.mark.parametrize(
    "text",
    ["word " * 4000, "漢字かな，" * 4000, "ab" * 10_000],
    ids=["one line", "no ASCII", "one word"],
)
def test_no_text_is_encoded_at_once(text, monkeypatch):
    """Without line breaks, without a character of ASCII, or of one word, which is cut."""
    monkeypatch.setattr(pieces, "LONGEST", 2000)
    tokenizer = pieces.plain(train_tokenizer([CODE, text[:100]], 400))
    seen = []

    class Watched:
        pre_tokenizer = tokenizer.pre_tokenizer

        def encode(self, text: str, **options):
            seen.append(len(text))
            return tokenizer.encode(text, **options)

    found = [token for part in pieces.encode(Watched(), text, 1000) for token in part]
    assert max(seen) <= 2000
    assert tokenizer.decode(found) == text
    if text[:2] != "ab":
        assert found == tokenizer.encode(text, add_special_tokens=False).ids


def test_a_store_has_the_same_tokens_of_a_long_document(listed, tmp_path, monkeypatch):
    chosen = train_tokenizer([CODE], 400)
    whole = TokenStore.build(listed.of(CODE, "short"), chosen, tmp_path / "whole", held_out=0)
    monkeypatch.setattr(pieces, "PIECE", 1000)
    parts = TokenStore.build(listed.of(CODE, "short"), chosen, tmp_path / "parts", held_out=0)
    assert parts.manifest.files == whole.manifest.files
