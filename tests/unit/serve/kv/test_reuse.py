"""Contexts beside prompts: what users say, what is refused, and what the engine's parts make of them."""

from __future__ import annotations

import json

import pytest

from in_process import Engine, asked, tokens
from penstock import LLM, SamplingParams
from penstock.core.config import build
from penstock.core.errors import ConfigError, PenstockError, UsageError
from penstock.core.progress import silent
from penstock.models.decoder import Decoder
from penstock.serve.build import build_engine
from penstock.serve.chat import CONTEXTS_HERE, chat_prompt, with_place
from penstock.serve.config import EngineConfig
from penstock.serve.http.text import Tokens
from penstock.serve.kv.pool import ROOT, BlockPool
from penstock.serve.kv.reuse.ape import AdaptiveParallelEncoding
from penstock.serve.kv.reuse.prefix import PrefixReuse
from penstock.serve.messages import Request
from penstock.serve.offline.batch_file import BatchRun
from penstock.serve.offline.gather import Gatherer
from penstock.testing.beside_scores import BesideScores
from penstock.testing.kv_reuse import BEFORE, BEHIND, CONTEXTS, answered, exact_model, opened
from penstock.testing.serve_model import SHAPE, small_model

APE = AdaptiveParallelEncoding()
GREEDY = SamplingParams(temperature=0, max_tokens=8)
DOCUMENTS = ["def area(w, h):\n    return w * h\n", "class Stack:\n    items = []\n", "import os\n"]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("python-1m", device="cpu", kv_reuse="ape", sequences=16, tokens=64, cache_tokens=2048, check=True)


@pytest.fixture(scope="module")
def plain() -> LLM:
    return LLM("python-1m", device="cpu", sequences=16, tokens=64, cache_tokens=2048)


def text(results) -> list[str]:
    return [result.outputs[0].text for result in results]


def test_without_a_policy_contexts_stand_in_the_prompt(plain):
    (result,) = plain.generate("def f(", GREEDY, contexts=DOCUMENTS, prefix="# code\n", progress=silent)
    bare = [plain._bare(each) for each in (*DOCUMENTS, "def f(")]
    (wanted,) = plain.generate(
        [[*plain._encoded("# code\n"), *(token for each in bare for token in each)]], GREEDY, progress=silent
    )
    assert text([result]) == text([wanted])
    assert result.prompt == "def f("
    assert len(result.prompt_token_ids) + result.num_context_tokens == len(wanted.prompt_token_ids)


def test_contexts_come_in_any_order_and_are_found(llm):
    (first,) = llm.generate("def f(", GREEDY, contexts=DOCUMENTS, prefix="# code\n", progress=silent)
    (again,) = llm.generate("def f(", GREEDY, contexts=DOCUMENTS[::-1], prefix="# code\n", progress=silent)
    assert text([first]) == text([again])
    assert again.num_cached_tokens >= again.num_context_tokens == sum(len(llm._bare(each)) for each in DOCUMENTS)


def test_each_prompt_may_have_contexts_of_its_own(llm):
    own = [DOCUMENTS[:1], DOCUMENTS[1:]]
    together = llm.generate(["def f(", "x = "], GREEDY, contexts=own, progress=silent)
    alone = [
        llm.generate(prompt, GREEDY, contexts=contexts, progress=silent)[0]
        for prompt, contexts in zip(["def f(", "x = "], own, strict=True)
    ]
    assert text(together) == text(alone)
    bare = [llm._bare(each) for each in DOCUMENTS]
    assert text(llm.generate("def f(", GREEDY, contexts=bare[:1], progress=silent)) == text(alone[:1])
    for wrong in ([DOCUMENTS], "text", [1, 2]):
        with pytest.raises(UsageError, match="contexts"):
            llm.generate(["def f(", "x = "], GREEDY, contexts=wrong, progress=silent)


def test_in_a_chat_they_stand_before_the_users_first_text(plain):
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]
    told = chat_prompt(plain.tokenizer, messages)
    placed = chat_prompt(plain.tokenizer, with_place(messages))
    assert placed.text == told.text and told.shared == 0
    before = plain.tokenizer.decode(placed.tokens[: placed.shared])
    assert told.text.startswith(before) and before.endswith("user: ")
    assert CONTEXTS_HERE not in plain.tokenizer.decode(placed.tokens)
    (result,) = plain.chat(messages, GREEDY, contexts=["A", "B"], progress=silent)
    joined = [{"role": "system", "content": "S"}, {"role": "user", "content": "ABQ"}]
    between = [*plain._bare("A"), *plain._bare("B")]
    row = [*placed.tokens[: placed.shared], *between, *placed.tokens[placed.shared :]]
    assert plain.tokenizer.decode(row) == chat_prompt(plain.tokenizer, joined).text
    assert text([result]) == text(plain.generate([row], GREEDY, progress=silent))
    with pytest.raises(UsageError, match="user's first message"):
        with_place([{"role": "assistant", "content": "hello"}])


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_http_hands_them_to_the_engine(path):
    engine = Engine([5])
    chat = path.endswith("chat/completions")
    body = {"messages": [{"role": "user", "content": "Q"}]} if chat else {"prompt": "Q", "contexts_prefix": "P"}
    body |= {"max_tokens": 1, "contexts": ["A\n", [7, 8]]}
    answer = asked(path, engine=engine, content=json.dumps(body).encode(), headers={"content-type": "application/json"})
    assert answer.status_code == 200, answer.text
    (request,) = engine.requests
    assert request.contexts == [tokens().bare("A\n"), [7, 8]]
    before, behind = (
        tokens().decode(each) for each in (request.prompt[: request.shared], request.prompt[request.shared :])
    )
    assert (before, behind) == ("user: ", "Q\nassistant:") if chat else ("P", "Q")
    assert answer.json()["usage"]["prompt_tokens"] == request.length


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"contexts": [""]}, "contexts.0"),
        ({"contexts": [[4096]]}, "token 4096 is outside"),
        ({"contexts": ["x"], "truncate_prompt_tokens": 3}, "behind which contexts stand"),
        ({"contexts": "x"}, "contexts"),
    ],
)
def test_http_refuses_what_cannot_be_meant(body, message):
    content = json.dumps({"prompt": "x", "max_tokens": 1} | body).encode()
    answer = asked("/v1/completions", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


def test_batch_files_have_them_too(llm, tmp_path):
    body = {"prompt": "def f(", "max_tokens": 8, "temperature": 0, "contexts": DOCUMENTS, "contexts_prefix": "# code\n"}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}
    (tmp_path / "in.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
    runner = BatchRun(Gatherer(llm.engine, llm.tokenizer), Tokens(llm.tokenizer), "python-1m", 4)
    runner.run(tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    answer = json.loads((tmp_path / "out.jsonl").read_text(encoding="utf-8"))["response"]["body"]
    (wanted,) = llm.generate("def f(", GREEDY, contexts=DOCUMENTS, prefix="# code\n", progress=silent)
    assert answer["choices"][0]["text"] == wanted.outputs[0].text
    assert answer["usage"]["prompt_tokens"] == len(wanted.prompt_token_ids) + wanted.num_context_tokens


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv": "h2o"}, "does not keep it as it is"),
        ({"record": "steps.bin"}, "record needs kv_reuse = prefix"),
        ({"tensor_parallel": 2}, "kv_reuse = ape is for a model on one device"),
        ({"deterministic": True}, "deterministic does not go together with kv_reuse"),
        ({"kv_reuse": "app"}, "did you mean 'ape'"),
        ({"kv_reuse": {"name": "ape", "temperature": 0}}, "temperature"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message):
    with pytest.raises((ConfigError, UsageError), match=message):
        build_engine(small_model(), build(EngineConfig, {"kv_reuse": "ape", "cache_tokens": 100, **options}, "options"))


def test_a_model_whose_attention_cannot_do_it_is_refused():
    model = Decoder(SHAPE.model_copy(update={"window": 8})).initialize(0).eval()
    with pytest.raises(UsageError, match=r"ape lets texts see contexts.*windows") as raised:
        build_engine(model, EngineConfig(kv_reuse=APE, cache_tokens=100))
    assert "kv_reuse = prefix" in str(raised.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shared": 12}, "at least one has to follow"),
        ({"shared": -1}, "cannot stand behind -1"),
        ({"contexts": [[]]}, "context 0 is empty"),
        ({"contexts": [[1], [50]]}, "context 1 has a token that is outside"),
        ({"contexts": [[1]] * 10}, "no room for the prompt's 12 tokens beside 10 contexts"),
        ({"contexts": [[1] * 90]}, "no room"),
        ({"keep": True}, "cannot be kept"),
    ],
)
def test_contexts_that_do_not_fit_are_refused(fields, message):
    engine = opened(APE)
    request = {"contexts": CONTEXTS[:2], "shared": len(BEFORE), **fields}
    with pytest.raises(PenstockError, match=message):
        engine.add(Request("a", [*BEFORE, *BEHIND], GREEDY, **request))
    assert not engine.busy


def test_nobody_goes_on_from_a_text_that_sees_contexts():
    engine = opened(APE)
    engine.add(Request("a", [*BEFORE, *BEHIND], GREEDY, contexts=CONTEXTS[:2], shared=len(BEFORE)))
    engine.step()
    with pytest.raises(UsageError, match="encoded apart"):
        engine.fork("a", Request("b", [*BEFORE, *BEHIND, 1], GREEDY))
    engine.abort("a")
    engine.step()
    assert engine.snapshot().held == 0


def test_several_continuations_share_contexts_and_draft_nothing():
    engine = opened(APE, draft="ngram")
    params = GREEDY.model_copy(update={"n": 2})
    engine.add(Request("a", [*BEFORE, *BEHIND], params, contexts=CONTEXTS[:2], shared=len(BEFORE)))
    told: dict[int, list[int]] = {0: [], 1: []}
    while engine.busy:
        for delta in engine.step():
            told[delta.index] += delta.tokens
    wanted, _ = answered(opened(APE), CONTEXTS[:2])
    assert told[0][:6] == told[1][:6] == wanted
    assert engine.snapshot().drafted_tokens == 0


@pytest.mark.parametrize("policy", [APE, PrefixReuse()])
def test_log_probabilities_of_what_stands_behind_contexts(policy):
    engine, prompt = opened(policy), [*BEFORE, *BEHIND]
    params = GREEDY.model_copy(update={"prompt_logprobs": 0, "prompt_logprobs_from": len(BEFORE) + 1})
    engine.add(Request("a", prompt, params, contexts=CONTEXTS[:2], shared=len(BEFORE)))
    told = []
    while engine.busy:
        for delta in engine.step():
            told += [each.logprob for each in delta.prompt_logprobs or []]
    scores = BesideScores(exact_model(), prompt, CONTEXTS[:2], len(BEFORE), policy.weighing)
    wanted = [
        float(scores.after(prompt[:place]).log_softmax(-1)[prompt[place]])
        for place in range(len(BEFORE) + 1, len(prompt))
    ]
    assert told == pytest.approx(wanted, abs=1e-5)
    params = params.model_copy(update={"prompt_logprobs_from": len(BEFORE)})
    with pytest.raises(UsageError, match="prompt_logprobs_from, 8 or more"):
        engine.add(Request("b", prompt, params, contexts=CONTEXTS[:2], shared=len(BEFORE)))


def test_coded_blocks_are_read_as_contexts():
    config = EngineConfig(kv_reuse=APE, codec="int8", cache_tokens=400, block_size=4, sequences=10, check=True)
    engine = build_engine(small_model(), config)
    first, _ = answered(engine, CONTEXTS)
    assert answered(engine, CONTEXTS[::-1])[0] == first


def test_the_pool_finds_blocks_that_are_not_full():
    pool = BlockPool(4, 4)
    whole, rest, _ = pool.take(3)
    node = pool.commit(ROOT, [1, 2, 3, 4], whole)
    pool.commit(node, [5, 6], rest)
    assert pool.follow([[1, 2, 3, 4], [5, 6]]) == [whole, rest]
    assert pool.follow([[1, 2, 3, 4], [5]]) == pool.follow([[1, 2, 3, 4], [5, 6, 7]]) == [whole]
    assert pool.match([1, 2, 3, 4, 5, 6, 7, 8], 8) == [whole]
