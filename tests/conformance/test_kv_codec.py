"""The law of ``kv.codec``, for every registered policy."""

from __future__ import annotations

import pytest

from penstock.testing.enrolled import enrolled
from penstock.testing.kv_codec import (
    backends,
    check_attention,
    check_bytes,
    check_evicted,
    check_tokens,
    check_vectors,
    check_window,
)

CODECS = enrolled("kv.codec")
#: The contracts of attention and batching test what is plain.
CODES = [name for name in CODECS if name != "plain"]
BACKENDS = {each.policy_name: each for each in backends()}


@pytest.mark.parametrize("name", CODECS)
def test_vectors_come_back_within_their_bounds(name):
    check_vectors(CODECS[name])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CODES)
def test_attention_over_blocks_is_attention_over_what_they_decode_to(name, backend):
    check_bytes(CODECS[name], BACKENDS[backend])
    check_attention(CODECS[name], BACKENDS[backend])


@pytest.mark.parametrize("name", CODES)
def test_the_engine_says_what_is_said_over_decoded_keys_and_values(name):
    check_tokens(CODECS[name])


@pytest.mark.parametrize("name", CODES)
def test_windows_in_full_precision_are_read_by_place_alone(name):
    check_window(CODECS[name])


@pytest.mark.parametrize("name", CODES)
def test_codecs_go_together_with_caches_that_are_compressed(name):
    check_evicted(CODECS[name])


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CODES)
def test_attention_is_right_in_many_courses(name, backend):
    check_attention(CODECS[name], BACKENDS[backend], examples=8)


@pytest.mark.slow
@pytest.mark.parametrize("name", CODES)
def test_the_engine_says_so_in_long_courses(name):
    check_tokens(CODECS[name], examples=30, steps=40)


@pytest.mark.slow
@pytest.mark.parametrize("name", CODES)
def test_windows_are_right_in_long_courses(name):
    check_window(CODECS[name], examples=30, steps=40)


@pytest.mark.slow
@pytest.mark.parametrize("name", CODES)
def test_caches_are_coded_and_compressed_in_long_courses(name):
    check_evicted(CODECS[name], examples=20, steps=40)
