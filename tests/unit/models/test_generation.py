"""Generation with a cache beside the reference, which computes every token from the whole sequence anew."""

from __future__ import annotations

import argparse
import inspect

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from penstock.core.errors import ModelError, UsageError
from penstock.data.tokenizer import END_OF_TEXT, train_tokenizer
from penstock.models.config import DecoderConfig, LinearScaling, RopeConfig
from penstock.models.decoder import Decoder
from penstock.models.generate import generate
from penstock.models.sampling import Sampling
from penstock.models.text import stream_text
from penstock.testing import reference

SHAPE = {
    "vocabulary": 300,
    "hidden": 32,
    "layers": 2,
    "heads": 4,
    "kv_heads": 4,
    "head_dim": 8,
    "ffn": 48,
    "context": 48,
    "init_std": 0.2,
}
MODELS = {
    "plain": {},
    "grouped queries": {"kv_heads": 2, "qk_norm": True},
    "one key head": {"kv_heads": 1, "qkv_bias": True, "tied": True},
    "sliding window": {"window": 4},
    "a window in one layer": {"kv_heads": 2, "window": 3, "windowed_layers": (1,)},
    "experts": {"moe": {"experts": 4, "ffn": 24}},
    "scaled positions": {"rope": RopeConfig(scaling=LinearScaling(factor=4.0))},
}
OPTIONS = [
    Sampling(temperature=0, max_tokens=30),
    Sampling(max_tokens=30, seed=3),
    Sampling(temperature=1.7, top_k=40, top_p=0.9, min_p=0.01, max_tokens=30, seed=11),
]


def model(**changes) -> Decoder:
    return Decoder(DecoderConfig(**{**SHAPE, **changes})).initialize(2).eval()


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("options", OPTIONS, ids=["greedy", "plain", "cut"])
def test_token_by_token_as_the_reference(kind, options):
    decoder = model(**MODELS[kind])
    prompt = [5, 17, 250, 5, 99, 1, 42]
    got = list(generate(decoder, prompt, options, frozenset()))
    assert got == reference.sample(decoder, prompt, options)
    assert len(got) == 30
    assert len(set(got)) > 2
    if options.temperature == 0:
        assert got == reference.greedy(decoder, prompt, 30)


@given(st.lists(st.integers(0, 299), min_size=1, max_size=20), st.integers(-(2**70), 2**70))
def test_any_prompt_and_seed(prompt, seed):
    decoder = model(window=6, kv_heads=2)
    options = Sampling(max_tokens=6, seed=seed)
    assert list(generate(decoder, prompt, options, frozenset())) == reference.sample(decoder, prompt, options)


def test_a_seed_gives_the_same_tokens_and_another_seed_others():
    decoder = model()

    def drawn(seed: int, count: int = 20) -> list[int]:
        return list(generate(decoder, [1, 2], Sampling(seed=seed, max_tokens=count), frozenset()))

    torch.manual_seed(0)
    first = drawn(1)
    torch.manual_seed(1)
    assert drawn(1) == first
    assert drawn(1, 7) == first[:7]
    assert drawn(2) != first


def test_a_stop_token_ends_it_and_is_not_part_of_it():
    decoder = model()
    options = Sampling(max_tokens=20, seed=5)
    whole = list(generate(decoder, [1, 2], options, frozenset()))
    stop = frozenset({whole[12], 299 if whole[12] != 299 else 298})
    place = next(i for i, token in enumerate(whole) if token in stop)
    assert list(generate(decoder, [1, 2], options, stop)) == whole[:place]
    assert reference.sample(decoder, [1, 2], options, stop) == whole[:place]


@pytest.mark.parametrize("length", [1, 46, 47])
def test_the_context_is_filled_and_no_more(length):
    prompt = [(7 * i) % 300 for i in range(length)]
    assert len(list(generate(model(), prompt, Sampling(max_tokens=500), frozenset()))) == 48 - length


@pytest.mark.parametrize(
    ("length", "message"), [(0, "the prompt is empty"), (48, "has 48 tokens, and the model's context is 48")]
)
def test_a_prompt_of_no_or_too_many_tokens(length, message):
    """Known before anything is generated."""
    with pytest.raises(UsageError, match=message):
        generate(model(), [1] * length, Sampling(), frozenset())


def test_nothing_is_kept_for_gradients():
    decoder = model()
    next(generate(decoder, [1], Sampling(), frozenset()))
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    assert all(parameter.grad is None for parameter in decoder.parameters())


# Text.


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    trained = train_tokenizer([inspect.getsource(argparse), "déjà vu, 你好世界 🙂🙃 ☃ " * 3], 300)
    return PreTrainedTokenizerFast(tokenizer_object=trained, eos_token=END_OF_TEXT)


def scripted(monkeypatch, tokens: list[int]) -> None:
    """Makes a model say ``tokens``."""
    monkeypatch.setattr("penstock.models.text.generate", lambda model, prompt, sampling, stop: iter(tokens))


@given(prompt=st.text(min_size=1, max_size=8), text=st.text(max_size=20))
def test_pieces_make_the_text_whatever_its_characters(tokenizer, prompt, text):
    """Characters of up to four bytes, cut into tokens anywhere."""
    tokens = tokenizer(text)["input_ids"]
    with pytest.MonkeyPatch.context() as monkeypatch:
        scripted(monkeypatch, tokens)
        pieces = list(stream_text(model(), tokenizer, prompt, Sampling()))
    assert "".join(pieces) == text
    assert all(pieces)


@given(st.lists(st.integers(1, 299), max_size=12))
def test_pieces_make_the_decoded_text_of_any_tokens(tokenizer, tokens):
    """An untrained model says bytes that are no characters; those that could still become one at the end come last."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        scripted(monkeypatch, tokens)
        pieces = list(stream_text(model(), tokenizer, "é", Sampling()))
    assert "".join(pieces) == tokenizer.backend_tokenizer.decode(tokens)


def test_a_character_is_shown_when_its_last_byte_has_come(tokenizer, monkeypatch):
    snow = tokenizer.backend_tokenizer.encode("\N{SNOWFLAKE}").ids
    assert len(snow) == 3
    seen = []

    def saying(model, prompt, sampling, stop):
        for token in snow:
            seen.append("token")
            yield token

    monkeypatch.setattr("penstock.models.text.generate", saying)
    seen.extend(stream_text(model(), tokenizer, "a", Sampling()))
    assert seen == ["token", "token", "token", "\N{SNOWFLAKE}"]


def test_text_is_what_the_reference_says(tokenizer):
    decoder = model()
    options = Sampling(max_tokens=25, seed=8)
    tokens = reference.sample(decoder, tokenizer("def f(")["input_ids"], options, frozenset({0}))
    assert "".join(stream_text(decoder, tokenizer, "def f(", options)) == tokenizer.backend_tokenizer.decode(tokens)


def test_the_end_of_text_ends_it(tokenizer):
    decoder = model()
    torch.nn.init.zeros_(decoder.head.weight)
    assert "".join(stream_text(decoder, tokenizer, "x", Sampling(temperature=0))) == ""


@pytest.mark.parametrize(("prompt", "message"), [("", "the prompt is empty"), ("a b c d " * 99, "context is 48")])
def test_a_prompt_that_cannot_be_continued(tokenizer, prompt, message):
    with pytest.raises(UsageError, match=message):
        stream_text(model(), tokenizer, prompt, Sampling())


def test_a_token_beyond_the_embedding_is_refused():
    model = Decoder(DecoderConfig(**{**SHAPE, "vocabulary": 40}))
    with pytest.raises(ModelError, match=r"the token 40, and the model's embedding ends at 39\n.*tokenizer"):
        generate(model.initialize(0), [1, 40], Sampling(max_tokens=1), frozenset())
