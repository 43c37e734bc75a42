"""``penstock.LLM`` on a boxed model, against plain generation."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import penstock
from penstock import LLM, SamplingParams
from penstock.core.errors import ConfigError, UsageError
from penstock.core.progress import silent
from penstock.models import hub
from penstock.models.text import stream_text
from penstock.serve.messages import Request
from penstock.serve.reader import Reader
from tiny_adapters import written

GREEDY = SamplingParams(temperature=0, max_tokens=24)
PROMPTS = ["def fibonacci(n):\n", "import os\n\nclass Walker:\n", "x = [", "def fibonacci(n):\n    "]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("python-1m", device="cpu", sequences=8, tokens=64, cache_tokens=2048, check=True)


@pytest.fixture(scope="module")
def plain():
    model, tokenizer = hub.load("python-1m", dtype=torch.float32).eval(), hub.load_tokenizer("python-1m")
    return lambda prompt, sampling: "".join(stream_text(model, tokenizer, prompt, sampling))


def texts(results) -> list[str]:
    return [result.outputs[0].text for result in results]


def idle(llm: LLM) -> bool:
    return not llm.engine.busy and llm.engine.memory.pool.held == 0 and llm.engine.steps.batcher.waiting == 0


def test_the_package_offers_it_without_importing_torch():
    code = "import sys, penstock; assert 'LLM' in penstock.__all__ and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert penstock.LLM is LLM
    with pytest.raises(AttributeError, match="no attribute 'LLm'"):
        _ = penstock.LLm


def test_results_are_those_of_plain_generation_in_the_order_of_the_prompts(llm, plain):
    results = llm.generate(PROMPTS, GREEDY, progress=silent)
    assert [result.prompt for result in results] == PROMPTS
    assert texts(results) == [plain(prompt, GREEDY) for prompt in PROMPTS]
    for result in results:
        assert result.prompt_token_ids == llm.tokenizer(result.prompt)["input_ids"]
        assert llm.tokenizer.decode(result.outputs[0].token_ids) == result.outputs[0].text
        assert result.outputs[0].finish_reason == "length"
    assert idle(llm)


def test_every_prompt_may_have_its_own_sampling(llm, plain):
    params = [SamplingParams(temperature=0.9, top_k=20, seed=seed, max_tokens=5 + seed) for seed in range(4)]
    results = llm.generate(PROMPTS, params, progress=silent)
    assert texts(results) == [plain(*pair) for pair in zip(PROMPTS, params, strict=True)]
    with pytest.raises(UsageError, match="4 prompts, and 3 sampling params"):
        llm.generate(PROMPTS, params[:3], progress=silent)


def test_several_continuations_have_the_seeds_that_follow(llm):
    (several,) = llm.generate(PROMPTS[0], SamplingParams(n=3, seed=5, max_tokens=12), progress=silent)
    alone = [SamplingParams(seed=5 + index, max_tokens=12) for index in range(3)]
    assert [output.text for output in several.outputs] == texts(llm.generate([PROMPTS[0]] * 3, alone, progress=silent))
    assert [output.index for output in several.outputs] == [0, 1, 2]


def test_prompts_come_in_several_forms(llm):
    tokens = llm.tokenizer(PROMPTS[2])["input_ids"]
    forms = [PROMPTS[2], tokens, {"prompt_token_ids": tokens}, {"prompt": PROMPTS[2]}]
    want = llm.generate(PROMPTS[2], GREEDY, progress=silent)[0].outputs[0].text
    assert texts(llm.generate(forms, GREEDY, progress=silent)) == [want] * 4
    for form in forms:
        assert texts(llm.generate(form, GREEDY, progress=silent)) == [want]
    assert llm.generate([], GREEDY, progress=silent) == []


def test_a_stop_string_ends_its_continuation_alone(llm, plain):
    free = SamplingParams(n=2, max_tokens=40, seed=3)
    (whole,) = llm.generate(PROMPTS[0], free, progress=silent)
    first, second = (output.text for output in whole.outputs)
    stop = first[9:12]
    assert stop not in second
    (cut,) = llm.generate(PROMPTS[0], free.model_copy(update={"stop": (stop,)}), progress=silent)
    one, two = cut.outputs
    assert one.text == first[: first.index(stop)]
    assert (one.finish_reason, one.stop_reason) == ("stop", stop)
    assert two.text == second
    assert two.finish_reason == "length"
    assert idle(llm)


def test_a_stop_string_among_the_least_tokens_is_text(llm):
    (whole,) = llm.generate(PROMPTS[1], GREEDY, progress=silent)
    output = whole.outputs[0]
    stop = llm.tokenizer.decode(output.token_ids[2:5])
    for least, there in ((0, False), (5, True)):
        options = GREEDY.model_copy(update={"stop": (stop,), "min_tokens": least})
        (cut,) = llm.generate(PROMPTS[1], options, progress=silent)
        assert (stop in cut.outputs[0].text) == there


def test_a_stop_token_is_in_the_tokens_and_not_in_the_text(llm):
    (whole,) = llm.generate(PROMPTS[1], GREEDY, progress=silent)
    tokens = whole.outputs[0].token_ids
    token = tokens[7]
    kept = tokens[: tokens.index(token) + 1]
    (cut,) = llm.generate(PROMPTS[1], GREEDY.model_copy(update={"stop_tokens": (token,)}), progress=silent)
    output = cut.outputs[0]
    assert output.token_ids == kept
    assert output.text == llm.tokenizer.decode(kept[:-1])
    assert (output.finish_reason, output.stop_reason) == ("stop", token)


def test_a_conversation_ends_where_the_answer_begins(llm):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Sort a list."}]
    (one,) = llm.chat(messages, GREEDY, progress=silent)
    assert one.prompt == "system: Be brief.\nuser: Sort a list.\nassistant:"
    assert texts([one]) == texts(llm.generate(one.prompt, GREEDY, progress=silent))
    assert len(llm.chat([messages, messages[1:]], GREEDY, progress=silent)) == 2
    with pytest.raises(UsageError, match="at least one message"):
        llm.chat([], GREEDY, progress=silent)


def test_the_model_s_own_template_goes_first_and_may_refuse(llm, monkeypatch):
    monkeypatch.setattr(llm.tokenizer, "chat_template", "{{ messages[0]['content'] }}|{{ tools[0]['name'] }}>")
    (one,) = llm.chat([{"role": "user", "content": "Hi"}], GREEDY, tools=[{"name": "add"}], progress=silent)
    assert one.prompt == "Hi|add>"
    monkeypatch.setattr(llm.tokenizer, "chat_template", "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(UsageError, match="refuses the conversation: roles must alternate"):
        llm.chat([{"role": "user", "content": "Hi"}], GREEDY, progress=silent)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [("", "empty"), ([[]], "empty"), ([[1, 99999]], "vocabulary"), ([3.5], "cannot read"), ([[1] * 5000], "tokens")],
)
def test_a_wrong_prompt_is_refused_and_nothing_stays_behind(llm, prompts, message):
    several = [*PROMPTS[:2], *prompts] if isinstance(prompts, list) else prompts
    with pytest.raises(UsageError, match=message):
        llm.generate(several, GREEDY, progress=silent)
    assert idle(llm)


def test_a_wrong_option_is_refused():
    with pytest.raises(ConfigError, match="did you mean 'tokens'"):
        LLM("python-1m", token=7)


def test_ctrl_c_leaves_the_engine_usable(llm):
    """Between steps, and a library has no business with the process's handler afterwards."""
    former = signal.getsignal(signal.SIGINT)

    @contextlib.contextmanager
    def interrupting(label, total, unit):
        class Bar:
            def advance(self, amount=1, note=""):
                os.kill(os.getpid(), signal.SIGINT)

        yield Bar()

    params = [SamplingParams(temperature=0, max_tokens=3 + 30 * (place > 0)) for place in range(4)]
    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS, params, progress=interrupting)
    assert signal.getsignal(signal.SIGINT) is former
    assert idle(llm)
    assert len(llm.generate(PROMPTS, GREEDY, progress=silent)) == 4


def test_progress_counts_prompts(llm):
    seen = []

    @contextlib.contextmanager
    def counting(label, total, unit):
        class Bar:
            def advance(self, amount=1, note=""):
                seen.append(amount)

        seen.append(total)
        yield Bar()

    llm.generate(PROMPTS, GREEDY, progress=counting)
    assert seen == [4, 1, 1, 1, 1]


def test_a_folder_serves_as_well(tmp_path):
    hub_folder = hub.resolve("python-1m")
    assert isinstance(hub_folder, Path)
    small = LLM(hub_folder, device="cpu", cache_tokens=256, sequences=2, tokens=16)
    assert small.generate("x", GREEDY, progress=silent)[0].outputs[0].token_ids


def test_a_rules_prompt_may_be_text(llm):
    poorer = "def add(a):\n"
    ids = tuple(llm.tokenizer(poorer)["input_ids"])
    both = [
        SamplingParams(temperature=0, max_tokens=8, rule={"name": "uscd", "prompt": prompt, "threshold": 1})
        for prompt in (poorer, ids)
    ]
    one, other = texts(llm.generate([PROMPTS[0]] * 2, both, progress=silent))
    (plain_one,) = texts(llm.generate(PROMPTS[0], SamplingParams(temperature=0, max_tokens=8), progress=silent))
    assert one == other != plain_one
    assert idle(llm)


@pytest.mark.parametrize("caught", [False, True])
def test_a_failure_is_raised_once(caught, monkeypatch):
    """Where it was, and not once more when the engine is left, whose last step would fail likewise."""
    failing = LLM("python-1m", device="cpu", sequences=2, tokens=64, cache_tokens=256)
    failure = RuntimeError("the device is gone")

    def launch(batch):
        raise failure

    def publish(batch):
        raise AssertionError("a step after the failure")

    left = False
    outer = contextlib.nullcontext() if caught else pytest.raises(RuntimeError, match="gone")
    with outer as raised, failing:
        failing.engine.add(Request("r", [1, 2], SamplingParams(max_tokens=9)))
        failing.engine.step()
        monkeypatch.setattr(failing.engine.executor, "launch", launch)
        monkeypatch.setattr(failing.engine.steps, "publish", publish)
        with pytest.raises(RuntimeError, match="gone") if caught else contextlib.nullcontext():
            failing.engine.step()
        left = True
    assert left == caught
    if raised is not None:
        assert raised.value is failure and failure.__context__ is None


@pytest.mark.parametrize("option", [{"replicas": 2}, {"routing": "prefix"}, {"restarts": 0}])
def test_several_engines_are_for_a_server(option):
    with pytest.raises(ConfigError, match="penstock serve MODEL --replicas N"):
        LLM("python-1m", **option)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"controller": "measured"}, "nothing drafts: set draft=ngram"),
        ({"controller": "fixed", "draft": None}, "nothing drafts"),
        ({"verifier": "accept_residual"}, "nothing drafts"),
        ({"adapter_targets": ["q_proj"]}, "no room for any: set adapter_slots"),
    ],
)
def test_options_that_nobody_would_heed(option, said):
    with pytest.raises(ConfigError, match=said):
        LLM("python-1m", **option)


def test_a_request_that_fails_loses_no_others(llm, plain, monkeypatch):
    poison = llm.tokenizer(PROMPTS[1])["input_ids"]
    read = Reader.read

    def failing(self, delta):
        if self.prompt == poison:
            raise RuntimeError("Invalid prefix")
        return read(self, delta)

    begin = Reader.__init__

    def remembering(self, request, *others):
        begin(self, request, *others)
        self.prompt = request.prompt

    monkeypatch.setattr(Reader, "__init__", remembering)
    monkeypatch.setattr(Reader, "read", failing)
    results = llm.generate(PROMPTS, GREEDY, progress=silent)
    for prompt, result in zip(PROMPTS, results, strict=True):
        output = result.outputs[0]
        if prompt == PROMPTS[1]:
            assert (output.finish_reason, result.error) == ("error", "RuntimeError: Invalid prefix")
        else:
            assert (output.text, result.error) == (plain(prompt, GREEDY), None)
    assert idle(llm)


def test_log_probabilities_have_the_token_and_its_text(llm):
    params = SamplingParams(temperature=0.8, seed=3, max_tokens=30, logprobs=2)
    (result,) = llm.generate(PROMPTS[0], params, progress=silent)
    output = result.outputs[0]
    pairs = zip(output.token_ids, output.logprobs, strict=True)
    assert "".join(told[token].decoded_token for token, told in pairs) == output.text
    assert output.text_offsets == [len(llm.tokenizer.decode(output.token_ids[:place])) for place in range(30)]


def test_other_weights_and_sleep(plain):
    llm = LLM("python-1m", device="cpu", sequences=8, tokens=64, cache_tokens=512, dtype="fp32", progress=silent)
    assert texts(llm.generate(PROMPTS, GREEDY, progress=silent)) == [plain(prompt, GREEDY) for prompt in PROMPTS]
    other, tokenizer = hub.load("python-1m", dtype=torch.float32).eval(), llm.tokenizer
    with torch.no_grad():
        other.layers[1].mlp.down.weight.mul_(-1)
    assert llm.load(other.state_dict()) == 1
    llm.sleep()
    for ask in (lambda: llm.generate(PROMPTS, GREEDY, progress=silent), lambda: llm.embed("x", progress=silent)):
        with pytest.raises(UsageError, match="asleep"):
            ask()
    llm.wake()
    llm.pause()
    with pytest.raises(UsageError, match="paused"):
        llm.generate(PROMPTS, GREEDY, progress=silent)
    llm.resume()
    results = llm.generate(PROMPTS, GREEDY, progress=silent)
    assert texts(results) == ["".join(stream_text(other, tokenizer, prompt, GREEDY)) for prompt in PROMPTS]
    assert {result.outputs[0].weights_version for result in results} == {1}
    assert llm.load("python-1m") == 2
    assert texts(llm.generate(PROMPTS[0], GREEDY, progress=silent)) == [plain(PROMPTS[0], GREEDY)]
    assert idle(llm)


def test_prompts_have_the_adapters_that_they_name(tmp_path):
    model = hub.load("python-1m")
    folders = {
        name: written(tmp_path / name, model, seed, size=0.1, base_model_name_or_path="python-1m")
        for seed, name in enumerate("ab")
    }
    with LLM("python-1m", device="cpu", cache_tokens=2048, adapters={"a": folders["a"]}, adapter_slots=2) as llm:
        llm.load_adapter("b", folders["b"])
        names = ["", "a", "b"]
        told = texts(llm.generate([PROMPTS[0]] * 3, GREEDY, adapter=names, progress=silent))
        assert len(set(told)) == 3
        for name, text in zip(names, told, strict=True):
            assert texts(llm.generate(PROMPTS[0], GREEDY, adapter=name, progress=silent)) == [text]
        with LLM(hub.resolve(folders["b"]), device="cpu", cache_tokens=2048) as alone:
            assert texts(alone.generate(PROMPTS[0], GREEDY, progress=silent)) == [told[2]]
        with pytest.raises(UsageError, match="there are 3 prompts, and 2 adapters"):
            llm.generate([PROMPTS[0]] * 3, GREEDY, adapter=["a", "b"], progress=silent)
        llm.drop_adapter("b")
        with pytest.raises(UsageError, match="there is no adapter 'b' here"):
            llm.chat([{"role": "user", "content": "Hi"}], GREEDY, adapter="b", progress=silent)
        assert idle(llm)


def test_models_are_run_where_no_server_can_be():
    """What an LLM imports is nothing that answers over HTTP."""
    script = "import sys, penstock.serve.offline.llm; print({'fastapi', 'starlette', 'uvicorn'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
