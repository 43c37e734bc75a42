"""Text in pieces, up to a stop string, beside a search through all of the text after each token."""

from __future__ import annotations

import functools

from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from penstock.models import hub
from penstock.models.text import TextStream

LETTERS = "set"


@functools.cache
def tokenizer() -> Tokenizer:
    return hub.load_tokenizer(hub.resolve("python-1m")).backend_tokenizer


@functools.cache
def tokens() -> dict[str, int]:
    """Those whose text has no other letters than LETTERS."""
    found = {tokenizer().decode([id]): id for id in range(tokenizer().get_vocab_size())}
    return {text: id for text, id in found.items() if text and set(text) <= set(LETTERS)}


def searched(pieces: list[str], stop: list[str], least: int) -> tuple[str, str | None]:
    """The text of ``pieces`` up to the first of ``stop`` that ends behind the first ``least`` pieces."""
    early = len("".join(pieces[:least]))
    for count in range(least + 1, len(pieces) + 1):
        text = "".join(pieces[:count])
        ends = range(early + 1, len(text) + 1)
        found = [(end - len(each), each) for each in stop for end in ends if text[:end].endswith(each)]
        if found:
            place, which = min(found)
            return text[:place], which
    return "".join(pieces), None


stops = st.lists(st.text(LETTERS, min_size=1, max_size=6), max_size=3)


@given(stop=stops, least=st.integers(0, 6), data=st.data())
@example(stop=["tesse", "es"], least=2, data=None)
def test_a_stop_string_ends_the_text_once_enough_tokens_are_there(stop, least, data):
    texts = sorted(tokens())
    assert len(texts) > 5
    pieces = list("tests" + "set") if data is None else data.draw(st.lists(st.sampled_from(texts), max_size=14))
    stream = TextStream(tokenizer(), [], stop, least)
    shown = ""
    for piece in pieces:
        shown += stream.push([tokens()[piece]])
        # What has been shown is never taken back.
        assert searched(pieces, stop, least)[0].startswith(shown)
    shown += stream.end()
    assert (shown, stream.stopped) == searched(pieces, stop, least)


def test_several_tokens_at_once_are_as_one_after_another():
    ids = [tokens()[letter] for letter in "testset"]
    for least in range(8):
        single, several = (TextStream(tokenizer(), [], ["se", "es"], least) for _ in range(2))
        assert "".join(single.push([id]) for id in ids) == several.push(ids)
        assert single.stopped == several.stopped
