"""The registry: reading decorators, looking policies up, options, and plug-ins."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import pytest
from pydantic import BaseModel, PositiveFloat, PositiveInt, ValidationError

from penstock import policy as registry
from penstock.core.config import Config, build
from penstock.core.errors import ConfigError, PenstockError, UsageError
from penstock.papers.catalogue import bibliography
from penstock.policy import Choice, Contract, Entry, Index, Policy, contract, index, policy, read_index

ENTRIES = sorted(index().policies.items())


@contract("test.cut", law="every cut is where it was asked for")
class Cut(Policy):
    """Where to cut."""

    depth: PositiveInt = 1


@policy("test.cut", "straight")
class Straight(Cut):
    """A straight cut."""

    angle: PositiveFloat = 90.0


@policy("test.cut", "slanted", papers=[3, 7])
class Slanted(Cut):
    """A slanted cut."""

    inner: Annotated[Cut, Choice("test.cut")] = Straight()


class Settings(Config):
    cut: Annotated[Cut, Choice("test.cut")] = Straight()
    second: Annotated[Cut, Choice("test.cut")] | None = None


@pytest.fixture
def cuts(monkeypatch):
    """The real index, with the policies of this file."""
    found = Index(
        {**index().contracts, "test.cut": Contract("test.cut", "law", __name__, "Cut")},
        {
            **index().policies,
            **{
                ("test.cut", cls.policy_name): Entry(
                    "test.cut", cls.policy_name, cls.papers, "", __name__, cls.__name__, Path(__file__)
                )
                for cls in (Straight, Slanted)
            },
        },
    )
    monkeypatch.setattr(registry, "index", lambda: found)


def write(folder: Path, **files: str) -> Path:
    """A package called ``made`` with the given modules, each opened by the import that a policy needs."""
    package = folder / "made"
    package.mkdir()
    for name, text in {"__init__": "", **files}.items():
        (package / f"{name}.py").write_text(f"from penstock.policy import Policy, contract, policy\n\n\n{text}")
    return package


HOLE = '''
@contract("test.hole", law="a hole is round")
class Hole(Policy):
    """Makes holes."""
'''


# What is registered


@pytest.mark.parametrize(("key", "entry"), ENTRIES, ids=["/".join(key) for key, _ in ENTRIES])
def test_the_index_agrees_with_what_is_imported(key, entry):
    cls = entry.load()
    assert (cls.contract_name, cls.policy_name) == key == (entry.contract, entry.name)
    assert cls.papers == entry.papers
    assert issubclass(cls, Policy)
    assert Path(sys.modules[cls.__module__].__file__) == entry.path


@pytest.mark.parametrize(("key", "entry"), ENTRIES, ids=["/".join(key) for key, _ in ENTRIES])
def test_every_policy_is_documented_and_its_papers_are_known(key, entry):
    assert key[0] in index().contracts
    assert entry.summary
    for paper in entry.papers:
        bibliography().paper(paper)


@pytest.mark.parametrize("name", sorted(index().contracts))
def test_every_contract_states_a_law_and_has_a_policy(name):
    assert index().contracts[name].law
    assert index().names(name)


def test_every_decorated_class_is_in_the_index():
    """No policy hides from the reader of the source, for instance behind an alias of the decorator."""

    def below(cls: type) -> set[type]:
        return {cls}.union(*(below(sub) for sub in cls.__subclasses__()))

    for entry in index().policies.values():
        entry.load()
    declared = {cls for cls in below(Policy) if "policy_name" in vars(cls) and cls.__module__.startswith("penstock.")}
    assert {(cls.contract_name, cls.policy_name) for cls in declared} == set(index().policies)


def test_listing_needs_no_torch():
    script = "import sys; from penstock.policy import index; assert index().policies; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# Looking up, and options


@pytest.mark.parametrize(
    ("asked", "answer"),
    [
        (("test.cut", "strait"), "test.cut has no policy 'strait': did you mean 'straight'?"),
        (("test.cut", "xyzzy"), "test.cut has no policy 'xyzzy': known: slanted, straight"),
        (("test.cat", "straight"), "there is no contract 'test.cat': did you mean 'test.cut'"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(cuts, asked, answer):
    with pytest.raises(UsageError) as caught:
        registry.lookup(*asked)
    assert str(caught.value).startswith(answer)
    assert caught.value.exit_code == 2


def test_hyphens_stand_for_underscores():
    """The papers write zb-h1 where we write zb_h1: wherever a policy is named, and whatever policy it is."""
    for contract_name, name in index().policies:
        spelled = name.replace("_", "-")
        assert registry.lookup(contract_name, spelled) is registry.lookup(contract_name, name)

    class Chosen(Config):
        schedule: Annotated[Policy, Choice("pipeline.schedule")]

    for value in ("zb-h1", {"name": "zb-h1"}):
        assert build(Chosen, {"schedule": value}).model_dump() == {"schedule": {"name": "zb_h1"}}
    with pytest.raises(UsageError, match=r"pipeline\.schedule has no policy 'zb-h7': did you mean"):
        registry.lookup("pipeline.schedule", "zb-h7")


def test_a_name_with_a_hyphen_of_its_own_is_found(tmp_path):
    package = write(tmp_path, contract=HOLE, drill='@policy("test.hole", "dr-ill")\nclass Drill(Hole):\n    pass\n')
    found = read_index([("made", package)])
    assert found.find("test.hole", "dr-ill") is found.policies["test.hole", "dr-ill"]
    assert found.find("test.hole", "dr_ill") is None


@pytest.mark.parametrize(
    ("options", "answer"),
    [
        ({"angel": 3}, "test.cut 'straight' has no option 'angel': did you mean 'angle'?"),
        ({"contract": 3}, "test.cut 'straight' has no option 'contract'"),
        ({"angle": -3}, "test.cut 'straight': angle: Input should be greater than 0"),
        ({"angle": "wide"}, "test.cut 'straight': angle: Input should be a valid number"),
    ],
)
def test_wrong_options_are_named(cuts, options, answer):
    with pytest.raises(ConfigError) as caught:
        registry.create("test.cut", "straight", **options)
    assert str(caught.value).startswith(answer)


def test_a_policy_cannot_change():
    with pytest.raises(ValidationError, match="frozen"):
        Straight().angle = 3.0


@pytest.mark.parametrize(
    ("value", "cut"),
    [
        ("straight", Straight()),
        ({"name": "straight"}, Straight()),
        ({"name": "straight", "angle": 45, "depth": 3}, Straight(angle=45, depth=3)),
        ({"name": "slanted", "inner": "straight"}, Slanted()),
        ({"name": "slanted", "inner": {"name": "slanted", "depth": 2}}, Slanted(inner=Slanted(depth=2))),
        (Straight(depth=5), Straight(depth=5)),
    ],
)
def test_a_choice_takes_a_name_a_table_or_a_policy_and_survives_json(cuts, value, cut):
    settings = build(Settings, {"cut": value, "second": value})
    assert settings.cut == settings.second == cut
    assert type(settings.cut) is type(cut)
    text = settings.model_dump_json()
    assert build(Settings, json.loads(text)) == settings
    assert Settings.model_validate_json(text) == settings


@pytest.mark.parametrize(
    ("value", "answer"),
    [
        ("strait", "did you mean 'straight'"),
        ({"angle": 3}, "say which policy with 'name', one of slanted, straight"),
        ({"name": 3}, "say which policy with 'name', one of slanted, straight"),
        ({"name": "straight", "angel": 3}, "did you mean 'angle'"),
        (3, "cut: Input should be an instance of Cut"),
        (None, "cut: Input should be an instance of Cut"),
    ],
)
def test_a_wrong_choice_is_an_error_for_people(cuts, value, answer):
    with pytest.raises(ConfigError if value != "strait" else UsageError) as caught:
        build(Settings, {"cut": value})
    assert answer in str(caught.value)


# What the decorators refuse


def test_a_contract_must_state_a_law():
    with pytest.raises(ValueError, match=r"'test\.empty' states no law"):
        contract("test.empty", law="")


def test_a_policy_must_fulfil_its_contract():
    with pytest.raises(TypeError, match=r"registered for 'test\.hole' but fulfils 'test\.cut'"):
        policy("test.hole", "stray")(type("Stray", (Cut,), {}))
    with pytest.raises(TypeError, match=r"registered for 'test\.hole' but fulfils None"):
        policy("test.hole", "stray")(type("Stray", (Policy,), {}))


def test_no_option_may_be_called_name():
    class Named(Cut):
        name: str = "x"

    with pytest.raises(TypeError, match="has an option called 'name'"):
        policy("test.cut", "named")(Named)


# What the reader of the source finds and refuses


def test_declarations_are_read_without_running_them(tmp_path):
    package = write(
        tmp_path,
        contract=HOLE.replace('round"', 'round", simulated=True'),
        drill="raise SystemExit('imported')\n"
        '@policy("test.hole", "drill", papers=[1, 2])\nclass Drill(Hole):\n    """Drills.\n\n    Slowly.\n    """\n',
        punch='@policy(name="punch", contract="test.hole")\nclass Punch(Hole):\n    pass\n',
        other="class Other:\n    pass\n",
    )
    found = read_index([("made", package)])
    assert found.contracts == {
        "test.hole": Contract("test.hole", "a hole is round", "made.contract", "Hole", simulated=True)
    }
    assert found.entries("test.hole") == [
        Entry(
            "test.hole", "drill", (1, 2), "Drills.", "made.drill", "Drill", package / "drill.py", "Drills.\n\nSlowly."
        ),
        Entry("test.hole", "punch", (), "", "made.punch", "Punch", package / "punch.py"),
    ]


def test_a_mechanism_is_a_function_and_no_policy(tmp_path):
    made = '@mechanism("dig", papers=[4])\ndef dig(hole: int) -> int:\n    """Digs. Ours: the spade."""\n'
    package = write(tmp_path, contract=HOLE, dig=made)
    found = read_index([("made", package), ("made.dig", package / "dig.py")])
    text = "Digs. Ours: the spade."
    assert found.mechanisms == (Entry("mechanism", "dig", (4,), "Digs.", "made.dig", "dig", package / "dig.py", text),)
    assert not found.policies
    (package / "two.py").write_text((package / "dig.py").read_text())
    with pytest.raises(PenstockError, match=r"two mechanisms are called 'dig': made\.dig\.dig and made\.two\.dig"):
        read_index([("made", package)])


def test_every_mechanism_is_documented_and_its_papers_are_known():
    assert index().mechanisms
    for entry in index().mechanisms:
        assert callable(getattr(importlib.import_module(entry.module), entry.qualname)) and entry.summary
        assert [bibliography().paper(paper).id for paper in entry.papers] == list(entry.papers) != []


@pytest.mark.parametrize(
    "decorator",
    [
        '@policy("test.hole", NAME)',
        '@policy("test.hole", "x" + "y")',
        '@policy("test.hole", "x", papers=range(3))',
        '@policy("test.hole", **OPTIONS)',
        '@policy("test.hole")',
        '@policy("test.hole", "x", paper=[3])',
        '@contract("test.hole")',
        '@contract("test.hole", law=LAW)',
    ],
)
def test_arguments_that_cannot_be_read_are_refused_with_their_place(tmp_path, decorator):
    package = write(tmp_path, hole=f"{decorator}\nclass Hole(Policy):\n    pass\n")
    with pytest.raises(PenstockError, match=r"hole\.py:4: cannot read @(policy|contract)"):
        read_index([("made", package)])


def test_a_name_taken_twice_is_refused(tmp_path):
    drill = '@policy("test.hole", "drill")\nclass {}(Hole):\n    pass\n'
    package = write(tmp_path, contract=HOLE, a=drill.format("A"), b=drill.format("B"))
    with pytest.raises(
        PenstockError, match=r"two policies of 'test\.hole' are called 'drill': made\.a\.A and made\.b\.B"
    ):
        read_index([("made", package)])
    (package / "b.py").write_text((package / "contract.py").read_text())
    with pytest.raises(
        PenstockError, match=r"two contracts are called 'test\.hole': made\.b\.Hole and made\.contract\.Hole"
    ):
        read_index([("made", package)])


def test_a_file_reached_twice_is_one_policy(tmp_path):
    package = write(tmp_path, contract=HOLE, drill='@policy("test.hole", "drill")\nclass Drill(Hole):\n    pass\n')
    found = read_index([("made", package), ("made.drill", package / "drill.py")])
    assert found.names("test.hole") == ["drill"]


@pytest.mark.parametrize("text", [b"\n@policy(\n", b"\n@policy('a', 'b')\nclass A(:\n", b"\n@policy('\xff')\n"])
def test_a_broken_file_is_named(tmp_path, text):
    package = write(tmp_path)
    (package / "broken.py").write_bytes(text)
    with pytest.raises(PenstockError, match=r"broken\.py is not valid Python"):
        read_index([("made", package)])


# Plug-ins


def plug_in(folder: Path, module: str) -> Path:
    """Installs a distribution with the package ``made`` into ``folder``, as pip would."""
    write(
        folder,
        contract=HOLE,
        drill="from made.contract import Hole\n\n\n"
        '@policy("test.hole", "drill", papers=[3])\nclass Drill(Hole):\n    """Drills."""\n\n    bit: int = 8\n',
    )
    metadata = folder / "made-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: made\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[penstock.policies]\nmade = {module}\n")
    return folder


def run_beside(folder: Path, script: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)


def test_a_plug_in_is_found_and_loaded(tmp_path):
    script = (
        "import sys\n"
        "from penstock.policy import create, index\n"
        "entry = index().policies['test.hole', 'drill']\n"
        "assert index().contracts['test.hole'].law == 'a hole is round'\n"
        "assert 'made.drill' not in sys.modules and 'torch' not in sys.modules\n"
        "print(entry.papers, entry.path, create('test.hole', 'drill', bit=5).describe())\n"
    )
    done = run_beside(plug_in(tmp_path, "made"), script)
    assert done.stderr == ""
    assert done.stdout.strip() == f"(3,) {tmp_path / 'made' / 'drill.py'} {{'name': 'drill', 'bit': 5}}"


@pytest.mark.parametrize("module", ["mode", "mode.sub", "made.sub"])
def test_a_plug_in_whose_module_is_missing_is_named(tmp_path, module):
    script = "import penstock.cli, sys; sys.argv[1:] = ['papers']; penstock.cli.main()"
    done = run_beside(plug_in(tmp_path, module), script)
    assert done.returncode == 1
    assert f"the plug-in 'made' names the module '{module}', which is not there" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_choice_is_a_pydantic_type(cuts):
    """Any model can hold one, not only our own configuration."""

    class Plain(BaseModel):
        cuts: list[Annotated[Cut, Choice("test.cut")]]

    assert Plain.model_validate({"cuts": ["straight", {"name": "slanted"}]}).cuts == [Straight(), Slanted()]
