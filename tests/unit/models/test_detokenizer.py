"""Text out of random tokens, of tokenizers of every kind, beside decoding all of them at once."""

from __future__ import annotations

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders

from penstock.models.text import TextStream
from penstock.models.vocabulary import Vocabulary
from small_tokenizers import BYTES, KINDS, gpt2_letters, made

#: Bytes of characters and of none, often in order, so that whole characters, parts and stray bytes come together.
RUNS = st.sampled_from(["🎉", "漢", "é", "\n", " ", "  a"]).map(lambda text: list(text.encode())) | st.lists(
    st.sampled_from([0x0A, 0x20, 0x41, 0x80, 0xBF, 0xC3, 0xE6, 0xF0, 0x9F, 0xED, 0xA0, 0xFF]), max_size=3
)


@functools.cache
def written(kind: str) -> st.SearchStrategy[list[int]]:
    """Tokens of any kind, ids that the tokenizer lacks among them."""
    tokenizer = made(kind)
    level = isinstance(tokenizer.decoder, decoders.ByteLevel)
    single = [tokenizer.token_to_id(letter) for letter in (gpt2_letters() if level else BYTES)]
    runs = RUNS.map(lambda run: [single[byte] for byte in run if single[byte] is not None])
    ids = st.integers(0, tokenizer.get_vocab_size() + 2).map(lambda id: [id])
    return st.lists(ids | runs, max_size=12).map(lambda groups: [id for group in groups for id in group])


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_the_text_is_that_of_all_tokens_at_once(kind, data):
    tokenizer = made(kind)
    tokens = data.draw(written(kind))
    stream = TextStream(tokenizer, [])
    shown = ""
    for count, token in enumerate(tokens):
        so_far = tokenizer.decode(tokens[:count])
        assert stream.position == len(so_far) or "\ufffd" in so_far
        shown += stream.push([token])
    assert shown + stream.end() == tokenizer.decode(tokens)


@pytest.mark.parametrize("behind", [[], [0], [199], [172]], ids=str)
def test_half_of_a_pair_at_the_end_of_a_prompt_is_shown_once(behind):
    """Bytes ED A0 are two replacements, which Python holds back as one unfinished character."""
    tokenizer, prompt = made("byte level"), [198, 169, 254]
    stream = TextStream(tokenizer, prompt)
    assert tokenizer.decode(prompt) + stream.push(behind) + stream.end() == tokenizer.decode([*prompt, *behind])


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_prompt_may_be_cut_anywhere(kind, data):
    """Also inside a character, or a run of bytes that only the tokens behind it make a text or break."""
    tokenizer = made(kind)
    tokens = data.draw(written(kind))
    cut = data.draw(st.integers(0, len(tokens)))
    stream = TextStream(tokenizer, tokens[:cut])
    text = stream.push(tokens[cut:]) + stream.end()
    whole, before = tokenizer.decode(tokens), tokenizer.decode(tokens[:cut])
    assert whole.endswith(text)
    if whole.startswith(before):
        assert before + text == whole
    if "\ufffd" not in whole:
        # What the prompt had of it: a character that it began belongs to the tokens that complete it.
        beginnings = map(tokenizer.decode, (tokens[:length] for length in range(cut + 1)))
        assert whole[max(len(each) for each in beginnings if whole.startswith(each)) :] == text


@pytest.mark.parametrize("first", ["▁", "▁def"])
def test_a_space_as_a_byte_is_lost_at_the_beginning_alone(first):
    """Llama 2's decoder strips one space where a text begins, and none behind its first token."""
    tokenizer = made("byte fallback, strip")
    tokens = [tokenizer.token_to_id(first), tokenizer.token_to_id("<0x20>")]
    stream = TextStream(tokenizer, [])
    assert stream.push(tokens) + stream.end() == tokenizer.decode(tokens) != tokenizer.decode(tokens[:1])


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(data=st.data(), stop=st.lists(st.text("\n adef漢🎉\ufffd", min_size=1, max_size=3), min_size=1, max_size=2))
def test_a_stop_string_ends_the_text_with_the_token_that_completes_it(kind, data, stop):
    tokenizer = made(kind)
    tokens = data.draw(written(kind))
    stream = TextStream(tokenizer, [], stop)
    shown, count = "", 0
    while count < len(tokens) and stream.stopped is None:
        shown += stream.push(tokens[count : count + 1])
        count += 1
    shown += stream.end()
    at_once = tokenizer.decode(tokens[:count])
    if stream.stopped is None:
        assert shown == at_once
        assert not any(each in at_once for each in stop)
    else:
        assert at_once.startswith(shown + stream.stopped)
        assert not any(each in shown for each in stop)
        # Not a token sooner, unfinished characters apart, would it have been there.
        earlier = tokenizer.decode(tokens[: count - 1]).rstrip("\ufffd")
        assert not any(each in earlier for each in stop) or "\ufffd" in at_once


def test_a_newline_ends_the_text_at_once_where_newlines_are_bytes():
    tokenizer = made("byte fallback, strip")
    stream = TextStream(tokenizer, [tokenizer.token_to_id("▁def")], ["\n"])
    assert stream.push([tokenizer.token_to_id("<0x0A>")]) == ""
    assert stream.stopped == "\n"


def test_a_newline_and_the_first_byte_of_an_emoji_before_a_word():
    """Decoded as a whole, a run of bytes that is no UTF-8 is a replacement character for each byte."""
    tokenizer = made("byte fallback, strip")
    tokens = [tokenizer.token_to_id(piece) for piece in ("▁def", "<0x0A>", "<0xF0>", "▁def")]
    stream = TextStream(tokenizer, tokens[:1])
    assert stream.push(tokens[1:]) + stream.end() == "\ufffd\ufffd def"


@pytest.mark.parametrize("count", [1, 22, 5000])
def test_a_prompt_that_ends_in_characters_outside_of_the_vocabulary(count):
    tokenizer = made("byte fallback, strip")
    bytes_of = [tokenizer.token_to_id(BYTES[byte]) for byte in ("字" * count).encode()]
    word = tokenizer.token_to_id("▁def")
    for unfinished in (0, 1, 2):
        stream = TextStream(tokenizer, [word, *bytes_of[: len(bytes_of) - unfinished]])
        rest = bytes_of[len(bytes_of) - unfinished :]
        assert stream.push([*rest, word]) + stream.end() == "字" * bool(unfinished) + " def"


def test_long_runs_of_bytes_take_time_that_grows_with_their_length(monkeypatch):
    """Not with its square: whoever forces a token upon a model for a whole answer must not hold up others."""
    tokenizer = made("byte fallback, strip")
    decoded = 0
    once = Vocabulary.decode

    def counting(self, tokens):
        nonlocal decoded
        decoded += len(tokens)
        return once(self, tokens)

    monkeypatch.setattr(Vocabulary, "decode", counting)
    for prompt in ([], [tokenizer.token_to_id("▁def")]):
        for byte in (0x20, 0x41, 0x80, 0xF0):
            stream = TextStream(tokenizer, prompt, ["zz"])
            stream.push([tokenizer.token_to_id(BYTES[byte])] * 2000)
            stream.end()
    assert decoded < 8 * 3 * 2000
