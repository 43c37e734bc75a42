"""Log-probabilities as OpenAI and vLLM tell them, with a tokenizer whose newlines and rare characters are bytes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from penstock.serve.choose.logprobs import LogprobRows, TokenLogprobs
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.dialogue.contract import Thinking
from penstock.serve.http.chats import Form
from penstock.serve.http.protocol.chats import Chat
from penstock.serve.http.protocol.completions import Completion
from penstock.serve.http.service import Piece
from penstock.serve.http.shapes.chats import Chats
from penstock.serve.http.shapes.completions import Completions
from penstock.serve.http.text import Tokens
from penstock.serve.messages import Delta, Finish, Request
from penstock.serve.reader import Reader
from small_tokenizers import made

BACKEND = made("byte fallback, strip")
TOKENS = Tokens(SimpleNamespace(backend_tokenizer=BACKEND, chat_template=None))


CHAT = Chat(messages=[{"role": "user", "content": "x"}], logprobs=True)


def chats(tokens: Tokens) -> Chats:
    return Chats(tokens, [], CHAT, Form(tokens.dialogue, {}, Thinking.NOT))


def ids(*pieces: str) -> list[int]:
    found = [BACKEND.token_to_id(piece) for piece in pieces]
    assert None not in found
    return found


PROMPT = ids("<s>", "▁def", "▁a")
ANSWER = ids("▁def", "<0x0A>", "<0xF0>", "<0x9F>", "<0x8E>", "<0x89>", "▁a", "<0xC3>", "<0xA9>", "▁", "▁def")
TEXT = " def\n🎉 aé  def"


def position(token: int, *others: int) -> TokenLogprobs:
    """``token`` is less probable than all ``others``."""
    top = [(other, -1.0 - place) for place, other in enumerate(others)]
    own = [logprob for other, logprob in top if other == token]
    return TokenLogprobs(token, own[0] if own else -9.0, len(others) + 1, top)


def pieces(sizes: list[int]) -> list[Piece]:
    """The answer as it comes in deltas of ``sizes`` tokens, the rest in the last."""
    reader = Reader(Request("a", PROMPT, SamplingParams(logprobs=0)), BACKEND)
    found, rest = [], list(ANSWER)
    for size in [*sizes, len(ANSWER)]:
        own, rest = rest[:size], rest[size:]
        end = None if rest else Finish.LENGTH
        reading = reader.read(Delta("a", 0, own, LogprobRows.of(map(position, own)), None, end))
        found.append(Piece(0, reading.text, reading.shown, reading.logprobs, reading.offsets, reading.finish))
        if end:
            return found
    raise AssertionError


@pytest.mark.parametrize("sizes", [[], [1] * 11, [2] * 6, [3, 1, 4]])
def test_text_offsets_are_right_in_every_chunk(sizes):
    shapes = Completions(TOKENS, [], Completion(prompt="", logprobs=1))
    chunks = [delta for piece in pieces(sizes) for delta in shapes.deltas(piece)]
    assert "".join(chunk["text"] for chunk in chunks) == TEXT
    told = [pair for c in chunks for pair in zip(c["logprobs"]["tokens"], c["logprobs"]["text_offset"], strict=True)]
    assert told == [
        (" def", 0),
        ("\n", 4),
        (r"bytes:\xf0", 5),
        (r"bytes:\x9f", 5),
        (r"bytes:\x8e", 5),
        (r"bytes:\x89", 5),
        (" a", 6),
        (r"bytes:\xc3", 8),
        (r"bytes:\xa9", 8),
        (" ", 9),
        (" def", 10),
    ]


def test_an_echo_begins_with_the_prompt():
    piece = Piece(0, " def", ids("▁def"), [position(*ids("▁def"))], [0], "length", [position(t) for t in PROMPT[1:]])
    choice = Completions(TOKENS, [PROMPT], Completion(prompt=PROMPT, logprobs=1, echo=True)).choice(piece)
    assert choice["text"] == "def a def"
    assert choice["logprobs"]["tokens"] == ["<s>", " def", " a", " def"]
    assert choice["logprobs"]["text_offset"] == [0, 0, 3, 5]
    assert choice["logprobs"]["token_logprobs"][0] is choice["logprobs"]["top_logprobs"][0] is None


def top_of(token: int, *others: int) -> tuple[dict, list]:
    """The alternatives in the shapes of completions and chats."""
    piece = Piece(0, "", [token], [position(token, *others)], [0], None)
    completion = next(Completions(TOKENS, [], Completion(prompt="", logprobs=1)).deltas(piece))["logprobs"][
        "top_logprobs"
    ][0]
    chat = next(chats(TOKENS).deltas(piece))["logprobs"]["content"][0]["top_logprobs"]
    return completion, [(each["token"], each["logprob"], bytes(each["bytes"])) for each in chat]


def test_tokens_that_differ_by_a_space_have_keys_of_their_own():
    completion, chat = top_of(*ids("▁", "▁", "▁▁"))
    assert completion == {" ": -1.0, "  ": -2.0}
    assert chat == [(" ", -1.0, b" "), ("  ", -2.0, b"  ")]


def test_two_tokens_of_one_text_have_keys_of_their_own():
    letter, byte = ids("d", "<0x64>")
    assert top_of(letter, byte, letter)[0] == {f"token_id:{byte}": -1.0, "d": -2.0}
    assert top_of(byte, byte, letter)[0] == {"d": -1.0, f"token_id:{letter}": -2.0}


def test_the_sampled_token_is_always_among_the_alternatives():
    """Completions tell it besides those that were asked for; chats tell no more than these, with it in the last."""
    own, first, second = ids("▁a", "▁def", "d")
    completion, chat = top_of(own, first, second)
    assert completion == {" def": -1.0, "d": -2.0, " a": -9.0}
    assert [name for name, _, _ in chat] == [" def", " a"]
    assert top_of(own) == ({" a": -9.0}, [])


def test_parts_of_characters_have_their_bytes():
    (part,) = ids("<0xF0>")
    completion, chat = top_of(part, part, *ids("<0x9F>", "▁a"))
    assert completion == {r"bytes:\xf0": -1.0, r"bytes:\x9f": -2.0, " a": -3.0}
    assert chat[:2] == [(r"\xf0", -1.0, b"\xf0"), (r"\x9f", -2.0, b"\x9f")]


def test_bytes_of_byte_level_tokens_add_up_to_the_text():
    backend = made("byte level")
    tokens = Tokens(SimpleNamespace(backend_tokenizer=backend, chat_template=None))
    shown = backend.encode("naïve → 🙂 漢字").ids
    piece = Piece(0, "", shown, [position(token) for token in shown], [], None)
    content = next(chats(tokens).deltas(piece))["logprobs"]["content"]
    assert b"".join(bytes(each["bytes"]) for each in content).decode() == "naïve → 🙂 漢字"
    assert any(each["token"].startswith("\\x") for each in content)
