"""What a deterministic engine tells of the tokens that it reads and writes are the log-probabilities of the trainer's
weights, to the last bit, for every family that can be computed so."""

from __future__ import annotations

import copy
import operator
import re

import pytest
import torch

from penstock.core.errors import UsageError
from penstock.models import hub
from penstock.models.attention import CausalRows
from penstock.models.decoder import Decoder
from penstock.models.exact import ExactForward
from penstock.models.families.contract import Family
from penstock.policy import create, index
from penstock.serve.build import build_engine
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.engine.engine import Engine
from penstock.serve.messages import Request
from penstock.testing.serve_model import SHAPE
from penstock.testing.transformers_peer import peer


def engine(model: Decoder, **options) -> Engine:
    sizes = {"tokens": 12, "sequences": 4, "block_size": 4, "cache_tokens": 120, "check": True}
    return build_engine(copy.deepcopy(model), EngineConfig.model_validate({**sizes, "deterministic": True, **options}))


def told(subject: Engine, vocabulary: int) -> list[tuple[list[int], torch.Tensor]]:
    """Texts, and the log-probabilities of their tokens but the first, of requests that share beginnings, in chunks of a
    few tokens and a cache in which some lose their place."""
    draw = torch.Generator().manual_seed(3)
    prefix = torch.randint(vocabulary, (9,), generator=draw).tolist()
    texts: dict[str, list[int]] = {}
    scores: dict[str, list[float]] = {}
    for number in range(5):
        prompt = prefix[: 3 * number] + torch.randint(vocabulary, (4 + number,), generator=draw).tolist()
        asked = {"temperature": 0.9, "seed": number, "max_tokens": 10, "ignore_eos": True}
        sampling = SamplingParams.model_validate(asked | {"logprobs": 0, "prompt_logprobs": 0})
        subject.add(Request(str(number), prompt, sampling))
        texts[str(number)], scores[str(number)] = list(prompt), []
    while subject.busy:
        for delta in subject.step():
            texts[delta.id] += delta.tokens
            scores[delta.id] += [each.logprob for each in delta.prompt_logprobs or []]
            scores[delta.id] += [each.logprob for each in delta.logprobs or []]
    return [(texts[id], torch.tensor(scores[id])) for id in texts]


def check(model: Decoder, **options) -> None:
    exact = ExactForward(model, block_size=4)
    for text, scores in told(engine(model, **options), model.config.vocabulary):
        assert len(scores) == len(text) - 1
        assert torch.equal(exact.logprobs(text), scores)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"draft": {"name": "ngram", "shortest": 1}}], ids=["plain", "drafted"])
def test_every_log_probability_has_the_bits_of_the_trainers_weights(dtype, options):
    check(Decoder(SHAPE).initialize(0).to(dtype).eval(), **options)


def test_weights_that_are_trained_on_are_those_that_are_computed_with():
    model = Decoder(SHAPE).initialize(0)
    exact, text = ExactForward(model, block_size=4), [1, 2, 3, 4, 5]
    before = exact.logprobs(text)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    assert not torch.equal(exact.logprobs(text), before)
    assert type(model.layers[0].mlp) is type(Decoder(SHAPE).layers[0].mlp)  # the model itself stays as it is
    check(model.eval())
    assert exact.logprobs([1]).shape == (0,)


def test_a_trainers_tensors_in_place_have_the_trainers_log_probabilities():
    """One step of reinforcement learning: the engine takes the trainer's weights, and tells their log-probabilities."""
    model = Decoder(SHAPE).initialize(5)
    subject = engine(Decoder(SHAPE).initialize(0).eval())
    told(subject, 50)
    subject.control.load(model.state_dict())
    exact = ExactForward(model, block_size=4)
    for text, scores in told(subject, 50):
        assert torch.equal(exact.logprobs(text), scores)


def test_the_trainers_forward_is_near_and_not_the_same():
    """Why there is an exact one: sums of a whole row are in another order."""
    model = Decoder(SHAPE).initialize(0).eval()
    differing = 0
    for text, scores in told(engine(model), 50):
        row = torch.tensor([text])
        with torch.no_grad():
            logits = model.logits(model(row, CausalRows.of(len(text))).hidden)[0].log_softmax(-1)
        plain = logits[:-1].gather(1, row[0, 1:, None])[:, 0]
        assert torch.allclose(plain, scores, atol=1e-4)
        differing += int((plain != scores).sum())
    assert differing


@pytest.mark.slow
@pytest.mark.parametrize("name", index().names("model.family"))
def test_every_family_that_can_be_computed_so(name, tmp_path):
    family = create("model.family", name)
    assert isinstance(family, Family)
    peer(name, torch.float32, **family.example).save_pretrained(tmp_path)
    model = hub.load(tmp_path, dtype=torch.float32).eval()
    try:
        ExactForward(model)
    except UsageError as error:
        # It names what the model has and the plain one, which is computed so, has not.
        named = re.fullmatch(r"a model with such (.*) cannot be computed with the same bits in any batch", error.what)
        assert named, error
        for part in named[1].split(", "):
            wanted = operator.attrgetter(part)
            assert wanted(model.config) if part.startswith("moe.") else wanted(model.config) != wanted(SHAPE), error
        return
    check(model)
