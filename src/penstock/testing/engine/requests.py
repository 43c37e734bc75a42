"""Requests that arrive: prompts that have beginnings in common, and the parameters of their sampling."""

from __future__ import annotations

from hypothesis import strategies as st

from penstock.core.randomness import numpy_generator
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.decode.uscd import UncertaintyAwareContrast
from penstock.testing.engine.pairs import PAIRS
from penstock.testing.serve_model import SHAPE

#: The most tokens that a request asks for, and the token that ends some.
MOST, STOP = 16, 7


def numbers(stream: str, count: int) -> list[int]:
    """``count`` tokens, the same for the same ``stream``."""
    return [int(token) for token in numpy_generator(0, f"testing/{stream}").integers(SHAPE.vocabulary, size=count)]


#: Prompts begin like one of these, and go on on their own.
PREFIXES = [numbers(f"prefix {index}", 24) for index in range(2)]
TAILS = [numbers(f"tail {index}", 9) for index in range(3)]

#: A rule with a second sequence that begins as prompts do.
CONTRAST = UncertaintyAwareContrast(prompt=(*PREFIXES[0][:8], *TAILS[0][:4]))

prompts = st.builds(
    lambda prefix, shared, tail, own: PREFIXES[prefix][:shared] + TAILS[tail][:own],
    st.integers(0, 1),
    st.sampled_from([0, 3, 8, 16, 24]),
    st.integers(0, 2),
    st.sampled_from([1, 4, 9]),
)
params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 1.0]),
    seed=st.integers(0, 2),
    max_tokens=st.sampled_from([1, 5, MOST, MOST]),
    n=st.sampled_from([1, 1, 1, 3]),
    stop_tokens=st.sampled_from([(), (STOP,)]),
    prompt_logprobs=st.sampled_from([None, None, 1]),
    rule=st.sampled_from([None, None, None, CONTRAST]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.0, 0.6]),
    presence_penalty=st.sampled_from([0.0, 0.0, 0.0, 0.4]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.0, 1.3]),
    grammar=st.sampled_from([None, None, None, PAIRS]),
    ignore_eos=st.just(True),  # but where a grammar says where the text can end
)
