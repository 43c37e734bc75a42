"""lm-eval on the engine, beside lm-eval's own back end for transformers."""

from __future__ import annotations

import json
import logging

import pytest
from typer.testing import CliRunner

from penstock import LLM
from penstock.cli import build_app
from penstock.core.errors import UsageError
from penstock.core.progress import silent
from penstock.models import hub

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance

from penstock.eval.harness import PenstockLM

CODE = "def add(a, b):\n    return a + b\n\n\nclass Stack:\n    def __init__(self):\n        self.items = []\n"


def asked(kind, *arguments):
    return [Instance(kind, {}, each, place) for place, each in enumerate(arguments)]


@pytest.fixture(scope="module")
def ours():
    return PenstockLM(LLM("python-1m", device="cpu", progress=silent, dtype="fp32"), progress=silent)


@pytest.fixture(scope="module")
def theirs():
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return HFLM(pretrained=str(hub.resolve("python-1m")), dtype="float32", device="cpu", batch_size=2)


def test_log_probabilities_are_those_of_transformers(ours, theirs):
    pairs = [(CODE[:cut], CODE[cut : cut + 25]) for cut in (8, 31, 40, 77)]
    pairs += [("import ", "os"), ("", "import os"), ("x = [\n", "    1,\n    2,\n]"), (CODE * 80, "import os")]
    found = ours.loglikelihood(asked("loglikelihood", *pairs))
    wanted = theirs.loglikelihood(asked("loglikelihood", *pairs), disable_tqdm=True)
    assert [greedy for _, greedy in found[:-1]] == [greedy for _, greedy in wanted[:-1]]
    assert [score for score, _ in found[:-1]] == pytest.approx([score for score, _ in wanted[:-1]], abs=1e-4)
    assert found[-1][0] == pytest.approx(wanted[-1][0], abs=0.05)  # cut to one token less


def test_texts_are_charged_token_by_token(ours, theirs):
    texts = [(CODE,), ("import os\n",)]
    wanted = theirs.loglikelihood_rolling(asked("loglikelihood_rolling", *texts), disable_tqdm=True)
    assert ours.loglikelihood_rolling(asked("loglikelihood_rolling", *texts)) == pytest.approx(wanted, abs=1e-3)


def test_answers_are_those_of_transformers(ours, theirs):
    options = {"until": ["\n\n", "class"], "max_gen_toks": 24}
    questions = [(CODE[:cut], dict(options)) for cut in (15, 34, 60)]
    wanted = theirs.generate_until(asked("generate_until", *questions), disable_tqdm=True)
    assert ours.generate_until(asked("generate_until", *questions)) == wanted


TASK = """
task: keywords
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{code}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{right}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
"""


@pytest.mark.slow
def test_a_task_in_a_file_runs_by_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [
        {"code": "import", "choices": [" os\n", " ;;\n"], "right": 0},
        {"code": "def add(self, x):\n", "choices": ["((((", "    return x"], "right": 1},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "keywords.yaml").write_text(TASK.format(data=tmp_path / "rows.jsonl"))
    words = ["eval", "python-1m", "--harness", str(tmp_path / "keywords.yaml"), "--out", str(tmp_path / "out")]
    said = CliRunner().invoke(build_app(), words, catch_exceptions=False).stdout
    assert "keywords" in said
    results = json.loads((tmp_path / "out" / "lm_eval.json").read_text())["results"]
    assert results["keywords"]["acc,none"] == 1.0


@pytest.mark.slow  # lm-eval reads its thousands of tasks
def test_a_task_that_lm_eval_does_not_have_is_refused(tmp_path):
    words = ["eval", "python-1m", "--harness", "no_such_task", "--out", str(tmp_path / "out")]
    with pytest.raises(UsageError, match="has no task 'no_such_task'"):
        CliRunner().invoke(build_app(), words, catch_exceptions=False)
