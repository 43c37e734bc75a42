"""Search as users see it: a real tokenizer, their own programs and scorers, and folders of results."""

from __future__ import annotations

import json
import re
import threading

import pytest
import torch

from penstock import LLM, SamplingParams
from penstock.core.errors import UsageError
from penstock.core.progress import silent
from penstock.core.results import repository
from penstock.models.attention import CausalRows
from penstock.search.answers import last_line, matching
from penstock.search.branch import Branch
from penstock.search.contract import Program
from penstock.search.llm import Plan, checking, program_of, scoring_of
from penstock.search.page import tree_page
from penstock.search.prices import Prices
from penstock.search.problems import read_problems
from penstock.search.runs import Results, summary
from penstock.testing.search_program import check_alone, check_budget, check_failures, check_recount

DRAWN = SamplingParams(max_tokens=24, seed=4)
PROMPT = "def add(a, b):\n"


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("python-1m", progress=silent, check=True, cache_tokens=4096)


def length(problem, text: str) -> float:
    return float(len(text))


def test_one_sample_is_what_generate_gives(llm):
    plain = llm.generate(PROMPT, DRAWN, progress=silent)[0].outputs[0]
    (found,) = llm.search(PROMPT, {"name": "best_of_n", "n": 1}, scorer=length, sampling_params=DRAWN, progress=silent)
    assert found.tokens == plain.token_ids and found.text == plain.text
    assert found.ledger.generated == len(plain.token_ids) and not found.exhausted


def test_a_users_own_program(llm):
    """It cuts, forks, appends, drops, and asks for a scorer by name."""
    seen: dict[str, Branch] = {}

    async def program(search):
        begun = await search.root.extend(tokens=5)
        one, two = begun.fork(2)
        two.append("    return ")
        await search.together([one.extend(pattern=r"[a-z]"), two.extend(text="\n")])
        await search.judge([one, two], "short")
        one.drop()
        seen.update(begun=begun, one=one, two=two)
        return two

    (found,) = llm.search(
        PROMPT, program, scorers={"short": lambda problem, text: -len(text)}, sampling_params=DRAWN, progress=silent
    )
    begun, one, two = seen["begun"], seen["one"], seen["two"]
    assert found.error is None and found.text == two.text
    assert len(begun.generated) == 5 and one.tokens[: len(begun.tokens)] == begun.tokens
    assert two.text.startswith(begun.text + "    return ")
    assert one.score == -len(one.text)
    assert one.entropy > 0 > one.logprob and len(one.logprobs) == len(one.entropies) == len(one.generated)
    appended = len(llm.tokenizer("    return ", add_special_tokens=False)["input_ids"])
    prompt = len(llm.tokenizer(PROMPT)["input_ids"])
    assert found.ledger.prompt == prompt + appended
    assert found.ledger.computed >= found.ledger.tokens == prompt - 1 + appended + found.ledger.generated
    assert llm.engine.snapshot().held == 0
    assert [node["fate"] for node in found.tree] == ["", "pruned", "answer"]


def test_hidden_states_are_those_of_the_models_own_forward_pass(llm):
    """Of a fork and of what it was forked from, of all tokens, the newest and the prompt's too; all are charged."""
    seen: list[tuple[list[int], torch.Tensor]] = []

    async def program(search):
        begun = await search.root.extend(tokens=5)
        one, two = await search.extend(begun.fork(2), tokens=3)
        assert one.hidden is None
        spent = search.ledger.record()
        found = await search.hidden([begun, one, two])
        seen.extend((list(branch.tokens), branch.hidden) for branch in found)
        lengths, prices = [len(branch.tokens) for branch in found], Prices(llm.engine.limits.model)
        charged = {unit: sum(prices.cost(unit, 0, each) for each in lengths) for unit in ("tokens", "flops", "eflops")}
        charged |= {"computed": sum(lengths)}
        for name, value in search.ledger.record().items():
            assert value == pytest.approx(spent[name] + charged.get(name, 0))
        return one

    (found,) = llm.search(PROMPT, program, sampling_params=DRAWN, progress=silent)
    assert found.error is None and [len(tokens) - len(seen[0][0]) for tokens, _ in seen] == [0, 3, 3]
    model = llm.engine.executor.model
    for tokens, states in seen:
        with torch.inference_mode():
            wanted = model(torch.tensor([tokens]), CausalRows.of(len(tokens))).hidden[0].float()
        assert states.shape == (len(tokens), model.config.hidden) and states.dtype == torch.float32
        torch.testing.assert_close(states, wanted, rtol=1e-4, atol=1e-4)


def test_hidden_states_that_the_budget_does_not_pay_for_are_not_computed(llm):
    async def program(search):
        text = await search.root.extend(tokens=3)
        left = search.left
        await search.hidden([text])
        assert search.left == left - len(text.tokens)
        await search.hidden([text])
        raise AssertionError("they were computed")

    prompt = len(llm.tokenizer(PROMPT)["input_ids"])
    amount = 3 * (prompt + 3) - 2  # one token less than that the text, and its states twice, would take
    (found,) = llm.search(PROMPT, program, budget=amount, unit="tokens", sampling_params=DRAWN, progress=silent)
    assert found.error is None and found.exhausted and found.ledger.tokens == 2 * (prompt + 3) - 1


def test_hidden_states_that_cannot_be_had_end_the_program_alone(llm, monkeypatch):
    async def program(search):
        await search.hidden([await search.root.extend(tokens=2)])

    monkeypatch.setattr(llm.engine, "executor", Passing(llm.engine.executor))
    (found,) = llm.search(PROMPT, program, sampling_params=DRAWN, progress=silent)
    assert found.error is not None and "hidden states" in found.error


class Passing:
    """An executor that has no model of its own."""

    def __init__(self, executor) -> None:
        self.launch = executor.launch


def test_work_is_done_beside_the_engine(llm):
    """A program whose work waits for another program to have ended: on the engine's thread, it would never."""
    ended = threading.Event()

    def patient() -> int:
        assert ended.wait(60)
        return 3

    async def program(search):
        if search.problem["id"] == "slow":
            search.notes["told"] = await search.work(patient)
            return await search.root.extend(tokens=2)
        text = await search.root.extend(tokens=8)
        ended.set()
        return text

    slow, quick = llm.search(
        [{"id": "slow", "prompt": PROMPT}, {"id": "quick", "prompt": PROMPT}], program, sampling_params=DRAWN,
        progress=silent,
    )  # fmt: skip
    assert slow.error is None and slow.notes == {"told": 3} and slow.ledger.generated == 2
    assert quick.error is None and quick.ledger.generated == 8


def test_work_that_fails_is_told_to_its_program(llm):
    async def program(search):
        with pytest.raises(ZeroDivisionError):
            await search.work(lambda: 1 // 0)
        search.notes["both"] = await search.together([search.work(divmod, 7, 2), search.work(len, "abc")])
        await search.work(int, "no number")

    (found,) = llm.search(PROMPT, program, sampling_params=DRAWN, progress=silent)
    assert found.notes == {"both": [(3, 1), 3]} and found.error is not None and found.error.startswith("ValueError")


def test_what_a_program_may_not_do_ends_it_alone(llm):
    async def forked(search):
        search.root.fork(2)
        await search.root.extend()

    async def waits_for_others(search):
        class Other:
            def __await__(self):
                yield "news"

        await Other()

    async def idle(search):
        while True:
            await search.root.extend(tokens=0)

    for program, complaint in ((forked, "was forked"), (waits_for_others, "can wait for"), (idle, "does nothing")):
        good, bad = llm.search(
            [{"prompt": PROMPT}, {"prompt": PROMPT, "bad": True}],
            lambda search, program=program: program(search) if "bad" in search.problem else _sampled(search),
            sampling_params=DRAWN,
            progress=silent,
        )
        assert good.error is None and good.tokens
        assert complaint in bad.error
        assert llm.engine.snapshot().held == 0


async def _sampled(search):
    return (await search.sample(1))[0]


def test_a_scorer_that_hangs_has_failed_after_its_time_and_the_run_goes_on(llm):
    def hanging(problem, text):
        if "hangs" in problem:
            threading.Event().wait()
        return 1.0

    plan = Plan(program_of({"name": "best_of_n", "n": 2}), {"": scoring_of(hanging)}, DRAWN, seconds=0.3)
    problems = [(0, {"prompt": PROMPT, "hangs": True}), (1, {"prompt": PROMPT})]
    found = dict(llm.searched(plan, problems))
    assert found[0].error is None and found[0].tokens and found[0].ledger.failures == found[0].ledger.scorings == 2
    assert {node["error"] for node in found[0].tree} == {None, "it took more than 0.3 s"} and found[0].score == 0
    assert found[1].score == 1 and not found[1].ledger.failures
    assert llm.engine.snapshot().held == 0


def test_a_function_that_raises_on_a_text_fails_on_that_alone(llm):
    """It raises on the first text that it sees, and hangs on the second."""
    seen = []

    def sometimes(problem, text):
        seen.append(text)
        if len(seen) == 1:
            raise ValueError("not this one")
        if len(seen) == 2:
            threading.Event().wait()
        return 1.0

    plan = Plan(program_of({"name": "best_of_n", "n": 8}), {"": scoring_of(sometimes)}, DRAWN, seconds=0.5)
    ((_, found),) = llm.searched(plan, [(0, {"prompt": PROMPT})])
    assert found.ledger.scorings == 8 and found.ledger.failures == 2 and found.score == 1
    said = {node["error"] for node in found.tree}
    assert said == {None, "ValueError: not this one", "it took more than 0.5 s"}


def test_the_documents_own_program_obeys_the_law():
    """The async function that the page shows: it is held to a budget, recounted, and the same beside others."""
    page = (repository() / "docs" / "search.md").read_text()
    (code,) = re.findall(r"```python\n(async def head_start.*?)\n\n\nfor result", page, re.DOTALL)
    scope: dict = {}
    exec(code, scope)

    class HeadStart(Program):
        async def run(self, search):
            return await scope["head_start"](search)

    for check in (check_budget, check_recount, check_alone, check_failures):
        check(HeadStart())


def test_stop_strings_end_texts(llm):
    stopped = DRAWN.model_copy(update={"stop": ("\n",)})
    plain = llm.generate(PROMPT, stopped, progress=silent)[0].outputs[0]
    (found,) = llm.search(PROMPT, {"name": "majority", "n": 1}, sampling_params=stopped, progress=silent)
    assert found.text == plain.text and found.finished


def test_unknown_names_list_known_ones(llm):
    with pytest.raises(UsageError, match="did you mean 'beam'"):
        llm.search(PROMPT, "bean", progress=silent)
    with pytest.raises(UsageError, match="did you mean 'majority'"):
        llm.search(PROMPT, "best_of_n", scorer="majorty", progress=silent)
    with pytest.raises(UsageError, match="cannot read the prompt"):
        llm.search({"question": "?"}, "best_of_n", progress=silent)


def test_answers_are_read_off_texts():
    assert last_line("so\n  12 \n\n") == "12"
    assert last_line(r"first \boxed{1}, then \boxed{\frac{1}{2}} and more") == r"\frac{1}{2}"
    assert last_line("") == ""
    assert matching(r"= (\d+)")("a = 1, b = 23") == "23"
    assert matching(r"\d+")("none") == ""
    with pytest.raises(UsageError, match="no regular expression"):
        matching("(")


def test_a_folder_of_results_is_gone_on_with(llm, tmp_path):
    results = Results(tmp_path / "out", {"program": "best_of_n"})
    (found,) = llm.search(
        PROMPT, "coverage", scorer=lambda problem, text: 0.0, budget=40, sampling_params=DRAWN, progress=silent
    )
    results.write(1, found.record())
    results.close()
    with (tmp_path / "out" / "results.jsonl").open("ab") as file:
        file.write(b'{"place": 0, "half')  # a process was killed here
    again = Results(tmp_path / "out", {"program": "best_of_n"})
    assert again.done.keys() == {1} and again.done[1]["text"] == found.text
    again.write(0, found.record())
    again.close()
    lines = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["place"] for line in lines] == [1, 0]
    assert "pass@k: 1: 0.000" in "\n".join(summary([again.done[0], again.done[1]]))
    with pytest.raises(UsageError, match="another search: it differs in program"):
        Results(tmp_path / "out", {"program": "beam"})


def test_a_summary_of_coverage_has_the_options_of_saturation():
    """Of two problems one is never solved, and one by a quarter of all samples: 0.5 (1 - (1 - 0.25)^k)."""
    ledger = {"generated": 0, "tokens": 0, "scorings": 0, "failures": 0}
    record = {"ledger": ledger, "score": 0.0, "exhausted": False, "error": None, "tree": []}
    records = [{**record, "notes": {"samples": 1_000_000, "right": right}} for right in (0, 250_000)]
    assert "saturation: ceiling=0.5, rate=0.25" in summary(records)


def test_problems_are_read(tmp_path):
    path = tmp_path / "problems.jsonl"
    path.write_text('{"prompt": "a"}\n\n{"messages": [{"role": "user", "content": "b"}]}\n')
    assert [set(each) for each in read_problems(path)] == [{"prompt"}, {"messages"}]
    refused = (
        ("{", ":1 is not JSON"),
        ('{"a": 1}\n', ":1 has no prompt"),
        ("", "has no problems"),
        ('{"prompt": "a"}\n{"messages": "hello"}\n', ":2: 'messages' is no list of objects"),
        ('{"messages": [{"content": "b"}]}\n', r":1: messages\[0\] has no 'role'"),
        ('{"messages": []}\n', ":1: 'messages' is empty"),
        ('\n{"prompt": 3}\n', ":2: 'prompt' is no text"),
    )
    for text, complaint in refused:
        path.write_text(text)
        with pytest.raises(UsageError, match=complaint):
            read_problems(path)


@pytest.mark.parametrize(
    ("program", "field", "complaint"),
    [
        ("retrieval", {"documents": "a text"}, "'documents' is no list of texts"),
        ("retrieval", {"shots": [1]}, "'shots' is no list of texts"),
        ("meta_ranking", {"references": [{"prompt": "a", "right": True}]}, r"references\[0\] has no 'answer'"),
        ("meta_ranking", {"references": "a"}, "'references' is no list of objects"),
    ],
)
def test_what_a_program_cannot_read_is_refused_by_its_line(llm, tmp_path, program, field, complaint):
    path = tmp_path / "problems.jsonl"
    path.write_text(json.dumps({"prompt": PROMPT}) + "\n" + json.dumps({"prompt": PROMPT} | field))
    with pytest.raises(UsageError, match=f":2: {complaint}"):
        read_problems(path, checking(program_of(program)))
    with pytest.raises(UsageError, match=complaint):
        llm.search({"prompt": PROMPT} | field, program, models={"strong": llm}, progress=silent)


def test_a_model_that_judges_is_opened_before_anything_is_drawn(llm):
    before = llm.engine.snapshot().output_tokens
    with pytest.raises(UsageError, match="it is no reward model"):
        llm.search(PROMPT, scorer={"name": "reward_model", "model": "python-1m"}, progress=silent)
    with pytest.raises(UsageError, match="no-such-model"):
        llm.search(PROMPT, scorer={"name": "generative", "model": "no-such-model"}, progress=silent)
    assert llm.engine.snapshot().output_tokens == before


def test_the_page_holds_what_was_said():
    record = {"id": "</script><b>", "score": None, "ledger": {"generated": 1}, "tree": [], "error": None}
    page = tree_page({"program": "beam"}, [record])
    assert page.count("</script>") == 1 and '"DATA"' not in page


def test_texts_are_cut_cooled_and_looked_into(llm):
    """A fork in the middle draws what plain decoding of that beginning does; the most probable tokens are told."""

    async def program(search):
        (whole,) = await search.extend(search.root.fork(1, temperature=0.0), tokens=8, top=3)
        at = len(whole.tokens) - 5
        (again,) = await search.extend(whole.fork(1, at=at), tokens=5, top=3)
        assert again.tokens == whole.tokens and again.logprobs == pytest.approx(whole.logprobs)
        for place in range(at, len(whole.tokens)):
            top = whole.alternatives[place]
            assert len(top) == 3 and top[0][0] == whole.tokens[place]
            assert top[0][1] == pytest.approx(whole.logprobs[place - whole.prompt], abs=1e-5)
        with pytest.raises(UsageError, match="to fork at"):
            whole.fork(1, at=2)
        asked = whole.fork(1, at=at)[0].ask("\n    return ")
        assert asked.text == "" and asked.generated == []
        with pytest.raises(UsageError, match="not computed yet"):
            asked.append("x, y").fork(1, at=len(asked.tokens) - 1)
        await asked.extend(tokens=3)
        assert len(asked.generated) == len(asked.logprobs) and asked.text
        return whole

    (found,) = llm.search(PROMPT, program, sampling_params=DRAWN, progress=silent)
    assert found.error is None
    greedy = llm.generate(PROMPT, DRAWN.model_copy(update={"temperature": 0.0}), progress=silent)[0].outputs[0]
    assert found.tokens == greedy.token_ids[:8]
    assert found.ledger.tokens == found.ledger.computed, "nothing is computed again but the newest token"


def test_further_models_write_in_their_own_tokens(llm):
    other = LLM("python-1m", progress=silent, check=True, cache_tokens=2048)
    plain = other.generate(PROMPT, DRAWN.model_copy(update={"temperature": 0.0}), progress=silent)[0].outputs[0]

    async def program(search):
        weak = await search.root.fork(1)[0].extend(tokens=4)
        strong = await search.root_of("strong").fork(1, temperature=0.0)[0].extend()
        assert weak.model == "" and strong.model == "strong"
        return strong

    (found,) = llm.search(PROMPT, program, models={"strong": other}, sampling_params=DRAWN, progress=silent)
    assert found.error is None and found.tokens == plain.token_ids
    assert found.ledger.generated == 4 + len(plain.token_ids)
    assert llm.engine.snapshot().held == other.engine.snapshot().held == 0
    before = llm.engine.snapshot().output_tokens
    with pytest.raises(UsageError, match="asks the model 'strong', and none was given"):
        llm.search(PROMPT, {"name": "cascade", "least": 1.0}, sampling_params=DRAWN, progress=silent)
    assert llm.engine.snapshot().output_tokens == before


def test_tests_that_a_program_wrote_come_to_the_scorer(llm):
    seen = []

    def scored(problem, text):
        seen.append(problem["tests"])
        return 0.0

    problem = {"prompt": PROMPT, "tests": ["assert hidden"]}
    program = {"name": "codemonkeys", "trajectories": 2, "length": 16}
    (found,) = llm.search(problem, program, scorer=scored, sampling_params=DRAWN, progress=silent)
    assert found.error is None and seen
    assert all(each != problem["tests"] for each in seen)
