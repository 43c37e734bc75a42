"""``penstock plan``: how models are trained, and how a budget of retrieval is shared out."""

from __future__ import annotations

import itertools
import json
import math
import tomllib

import pytest
from typer.testing import CliRunner

from penstock.cli import build_app
from penstock.core.config import build
from penstock.core.errors import DataError, UsageError
from penstock.policy import index
from penstock.search.allocation import Allocation
from penstock.train.config import TrainConfig
from penstock.train.hyper.contract import Scale, Settings
from penstock.train.hyper.power_lines import PowerLines

SCALE = ("--parameters", "1e9", "--tokens", "2e10")
MODEL = {"hidden": 64, "layers": 2, "heads": 2, "kv_heads": 2, "head_dim": 32, "ffn": 128}


def plan(*arguments: str) -> str:
    done = CliRunner().invoke(build_app(), ["plan", "hyper", *arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_json_is_what_the_rule_recommends():
    found = Settings.model_validate(json.loads(plan(*SCALE, "--batch", "5e5", "--set", "lr=2e-3", "--json")))
    assert found == PowerLines(lr=2e-3).settings(Scale(parameters=1e9, tokens=2e10, batch=5e5))


@pytest.mark.parametrize("policy", index().names("train.hyper"))
def test_its_lines_make_a_configuration(policy: str):
    """For every rule: the lines below the table are TOML that a training configuration takes."""
    asked = (*SCALE, "--batch", "5e5", "--length", "256", "--policy", policy)
    lines = plan(*asked).split("# For the run's configuration:")[1]
    config = build(TrainConfig, {"model": MODEL, **tomllib.loads(lines)})
    expected = Settings.model_validate(json.loads(plan(*asked, "--json")))
    assert config.steps == expected.steps
    assert config.batch.tokens == expected.batch
    assert config.batch.length == 256
    assert config.optim.lr == pytest.approx(expected.lr, rel=1e-5)
    assert config.optim.weight_decay == pytest.approx(expected.weight_decay, rel=1e-5)
    for step in (0, 10, 500, 10_000, expected.steps - 1):
        factor = config.schedule.factor(step, expected.steps)
        assert factor == pytest.approx(expected.schedule.factor(step, expected.steps), rel=1e-4)


def test_the_table_shows_every_finding():
    shown = plan(*SCALE)
    for wanted in ("power_lines", "batch (tokens)", "552,448", "0.4119", "timescale", "0.2236", "critical batch"):
        assert wanted in shown


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--parameters", "-1", "--tokens", "2e10"), "parameters"),
        (("--parameters", "1e9", "--tokens", "nan"), "tokens"),
        (("--parameters", "1e9", "--tokens", "inf"), "tokens"),
        ((*SCALE, "--batch", "0"), "batch"),
        ((*SCALE, "--length", "0"), "length"),
        ((*SCALE, "--policy", "power_line"), "did you mean 'power_lines'"),
        ((*SCALE, "--set", "rate=1"), "no option 'rate'"),
        ((*SCALE, "--set", "lr=-1"), "lr"),
        ((*SCALE, "--set", "lr"), "section.key=value"),
        ((*SCALE, "--set", "name=linear_scaling"), "--policy"),
        ((*SCALE, "--batch", "1e10"), "too short"),
    ],
)
def test_bad_requests_are_usage_errors(arguments: tuple[str, ...], complaint: str):
    with pytest.raises(UsageError, match=complaint):
        plan(*arguments)


@pytest.mark.parametrize("arguments", [(), ("--parameters", "1e9"), ("--parameters", "many", "--tokens", "2e10")])
def test_malformed_command_lines_exit_with_2(arguments: tuple[str, ...]):
    assert CliRunner().invoke(build_app(), ["plan", "hyper", *arguments]).exit_code == 2


def test_laws_are_fitted_to_finished_runs(tmp_path):
    """Losses that are least at the timescale 2 (D / N)^-0.5: the weight decay is that law's, and the others stay."""
    rows = ["name,parameters,tokens,batch,lr,weight_decay,loss"]
    for ratio, decay in itertools.product((16, 64, 256), [0.01 * 2**n for n in range(12)]):
        tau = 1e5 / (1e-3 * decay * ratio * 1e8)
        rows.append(f"x,1e8,{ratio * 1e8},1e5,1e-3,{decay},{2 + math.log(tau / (2 * ratio**-0.5)) ** 2}")
    table = tmp_path / "runs.csv"
    table.write_text("\n".join(rows))
    done = CliRunner().invoke(build_app(), ["plan", "hyper", *SCALE, "--trials", str(table), "--json"])
    assert done.exit_code == 0, done.output
    assert done.stderr.startswith("fitted timescale: 2 x^-0.5")
    found, paper = (
        Settings.model_validate(json.loads(done.stdout)),
        PowerLines().settings(Scale(parameters=1e9, tokens=2e10)),
    )
    assert found.findings["timescale"] == pytest.approx(2 * 20**-0.5, rel=1e-3)
    assert found.findings["optimal_batch"] == pytest.approx(paper.findings["optimal_batch"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("parameters,tokens\n1,2", "line 2 of .* is no finished run"),
        ("parameters,tokens,batch,lr,weight_decay,loss\n1,1,1,1,1,nan", "line 2 of .* is no finished run"),
        ("parameters,tokens,batch,lr,weight_decay,loss\n1,1,1,1,1,1", "shows none of the laws"),
    ],
)
def test_a_table_that_shows_nothing_is_refused(tmp_path, text, words):
    table = tmp_path / "runs.csv"
    table.write_text(text)
    with pytest.raises(DataError, match=words):
        plan(*SCALE, "--trials", str(table))
    with pytest.raises(UsageError, match="has none"):
        plan(*SCALE, "--trials", str(table), "--policy", "linear_scaling")


def test_a_budget_of_retrieval_is_shared_out_by_runs(tmp_path):
    """Accuracies are those of a planted model, in 1,000 problems; what was not run is predicted by it."""
    true = Allocation((0.9, 0.4, 0.1), (0.0, 0.0), -1.0)
    for setting in ((0, 0, 0), (4, 0, 0), (0, 2, 0), (0, 0, 3), (4, 2, 0)):
        folder = tmp_path / "-".join(map(str, setting))
        folder.mkdir()
        options = dict(zip(("documents", "shots", "rounds"), setting, strict=True))
        program = {"name": "retrieval", **options}
        (folder / "search.json").write_text(json.dumps({"program": program, "problems": "p"}))
        ledger = {"tokens": 50 + 100 * setting[0] + 60 * setting[1] + 150 * setting[2]}
        right = round(1000 * true.accuracy(setting, (0.0, 0.0)))
        lines = [
            json.dumps({"place": place, "score": float(place < right), "error": None, "ledger": ledger})
            for place in range(1000)
        ]
        (folder / "results.jsonl").write_text("\n".join(lines) + "\n")
    runs = sorted(map(str, tmp_path.iterdir()))
    settings = list(itertools.product((0, 4), (0, 2), (0, 3)))
    cost = lambda each: 50 + 100 * each[0] + 60 * each[1] + 150 * each[2]  # noqa: E731
    for budget in (60, 200, 450, 600, 2000):
        said = CliRunner().invoke(build_app(), ["plan", "retrieval", *runs, "--budget", str(budget)]).stdout
        allowed = [each for each in settings if cost(each) <= budget]
        best = max(allowed, key=lambda each: true.accuracy(each, (0.0, 0.0)))
        assert "--option documents={} --option shots={} --option rounds={}".format(*best) in said
    for given, complaint in ((["--budget", "9"], "no setting costs 9"), (["--budget", "99"], "differ in documents")):
        with pytest.raises(UsageError, match=complaint):
            few = runs if "9" in given else runs[:3]
            CliRunner().invoke(build_app(), ["plan", "retrieval", *few, *given], catch_exceptions=False)
