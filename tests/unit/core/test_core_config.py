"""Typed configuration: overrides against a flat oracle, and every fault named."""

from __future__ import annotations

import copy
import json
import tomllib
from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ByteSize, Field, PositiveInt

from penstock.core.config import Config, apply_overrides, build, parse_value, read_toml
from penstock.core.errors import ConfigError, UsageError

KEYS = st.sampled_from(["lr", "name", "warmup", "a", "b", "data-set"])
VALUES = st.one_of(
    st.integers(-(2**62), 2**62),
    st.booleans(),
    st.floats(allow_nan=False),
    st.text(st.characters(codec="ascii", exclude_categories=["Cc"])),
)
TREES = st.recursive(VALUES, lambda inner: st.dictionaries(KEYS, inner, max_size=3), max_leaves=8)


def toml(value: object) -> str:
    """A TOML literal, written by JSON's encoder: the two agree on ASCII strings, integers and booleans."""
    return repr(value) if isinstance(value, float) else json.dumps(value)


@given(VALUES)
def test_a_toml_value_is_read_as_itself(value):
    read = parse_value(toml(value))
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    "text", ["stdlib", "a/b.txt", "7b", "", "3e", "#1", "yes", "1\nb = 2", "'", "value = 3", "[a b]", "[a,,b]", "[a"]
)
def test_what_is_no_toml_value_is_the_text_itself(text):
    assert parse_value(text) == text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[("3e-4", 3e-4), ("[1, 2]", [1, 2]), ("{a = 1}", {"a": 1}), ("true", True), ("'7'", "7"), ("[]", [])],
        *[("[2bp]", ["2bp"]), (" [ zb-h1,v_min ] ", ["zb-h1", "v_min"]), ("['2bp']", ["2bp"])],
    ],
)
def test_numbers_lists_and_tables(text, value):
    assert parse_value(text) == value


def set_path(tree: dict, path: list[str], value: object) -> None:
    """The oracle: sets one key in a tree of plain sections."""
    for part in path[:-1]:
        tree = tree.setdefault(part, {})
    tree[path[-1]] = value


PATHS = st.lists(KEYS.filter(lambda key: key != "name"), min_size=1, max_size=3)


@given(
    st.dictionaries(KEYS, TREES, max_size=4),
    st.lists(st.tuples(PATHS, VALUES), max_size=4, unique_by=lambda pair: pair[0][0]),
    st.randoms(use_true_random=False),
)
def test_overrides_set_their_keys_and_nothing_else(tree, pairs, random):
    """In any order, as long as none speaks of another's section."""
    tree = {key: value for key, value in tree.items() if isinstance(value, dict) and "name" not in json.dumps(value)}
    pairs = [pair for pair in pairs if pair[0][0] not in tree or len(pair[0]) == 1]
    before, expected = copy.deepcopy(tree), copy.deepcopy(tree)
    for path, value in pairs:
        set_path(expected, path, value)
    overrides = [f"{'.'.join(path)}={toml(value)}" for path, value in pairs]
    random.shuffle(overrides)
    assert apply_overrides(tree, overrides) == expected
    assert tree == before


class Optional(Config):
    clip: float | None = 1.0
    steps: int | None = None
    name: str = "some"
    rate: Annotated[float, Field(gt=0)] | None = 0.5


def test_none_unsets_what_may_be_unset():
    """On the command line and in a file alike, and nowhere else."""
    tree = {"clip": 2.0, "steps": 3, "rate": 0.1}
    wanted = Optional(clip=None, steps=None, name="none", rate=None)
    assert build(Optional, apply_overrides(tree, ["clip=none", "steps=none", "name=none", "rate=none"])) == wanted
    assert build(Optional, tomllib.loads('clip = "none"\nrate = "none"\nname = "none"')) == wanted
    with pytest.raises(ConfigError, match="name: Input should be a valid string"):
        build(Optional, {"name": None})


@given(st.dictionaries(st.sampled_from(["lr", "warmup", "floor"]), VALUES, min_size=1), st.permutations(range(4)))
def test_options_and_name_may_come_in_any_order(options, order):
    """What is asked for on the command line is never dropped; what the file said of another policy is."""
    overrides = ["schedule.name=linear", *(f"schedule.{key}={toml(value)}" for key, value in options.items())]
    shuffled = [overrides[i] for i in order if i < len(overrides)]
    tree = {"schedule": {"name": "cosine", "cycles": 3}}
    assert apply_overrides(tree, shuffled) == {"schedule": {"name": "linear", **options}}


@pytest.mark.parametrize(
    ("tree", "overrides", "expected"),
    [
        ({"s": "cosine"}, ["s.warmup=3"], {"s": {"name": "cosine", "warmup": 3}}),
        ({"s": "cosine"}, ["s.name=linear"], {"s": {"name": "linear"}}),
        ({"s": {"name": "cosine", "warmup": 3}}, ["s.name=cosine"], {"s": {"name": "cosine", "warmup": 3}}),
        ({"s": {"name": "cosine", "warmup": 3}}, ["s=linear"], {"s": "linear"}),
        ({"s": {"name": "cosine"}}, ["s.warmup=3", "s=linear"], {"s": {"name": "linear", "warmup": 3}}),
        ({}, ["a=1", "a=2"], {"a": 2}),
        ({}, ["a.b = 1"], {"a": {"b": 1}}),
        ({}, ["a=x=y"], {"a": "x=y"}),
    ],
)
def test_short_forms_and_order(tree, overrides, expected):
    assert apply_overrides(tree, overrides) == expected


@pytest.mark.parametrize("override", ["", "lr", "=3", "a..b=3", ".a=3", "a.=3"])
def test_an_override_that_cannot_be_read_is_a_usage_error(override):
    with pytest.raises(UsageError, match="cannot read the override"):
        apply_overrides({}, [override])


def test_a_value_is_not_a_section():
    with pytest.raises(ConfigError, match=r"cannot set 'a\.b\.c': 'b' is a value, not a section"):
        apply_overrides({"a": {"b": 3}}, ["a.b.c=1"])


class Small(Config):
    kind: Literal["small"] = "small"
    width: PositiveInt = 3


class Large(Config):
    kind: Literal["large"] = "large"
    height: PositiveInt = 3


class Tree(Config):
    depth: int
    small: Small = Small()
    maybe: Small | None = None
    either: Annotated[Small | Large, Field(discriminator="kind")] = Small()
    many: tuple[Small, ...] = ()
    named: dict[str, Small] = Field(default_factory=dict)
    room: ByteSize = ByteSize(0)


@pytest.mark.parametrize(
    ("tree", "fault"),
    [
        ({"detph": 3}, "detph: unknown key; did you mean 'depth'?"),
        ({"small": {"widht": 3}}, "small.widht: unknown key; did you mean 'width'?"),
        ({"maybe": {"widht": 3}}, "maybe.widht: unknown key; did you mean 'width'?"),
        ({"either": {"kind": "large", "hieght": 3}}, "either.large.hieght: unknown key; did you mean 'height'?"),
        ({"many": [{}, {"widht": 3}]}, "many.1.widht: unknown key; did you mean 'width'?"),
        ({"named": {"x": {"widht": 3}}}, "named.x.widht: unknown key; did you mean 'width'?"),
        ({}, "depth: required, but not given"),
        ({"small": {"width": -3}}, "small.width: Input should be greater than 0 (got -3)"),
        ({"small": 3}, "small: "),
        ({"room": "much"}, "room: give a number of bytes, such as 500MB or 8GB (got 'much')"),
    ],
)
def test_every_fault_is_named_with_its_key(tree, fault):
    with pytest.raises(ConfigError) as caught:
        build(Tree, tree, source="run.toml")
    assert str(caught.value).startswith("run.toml: not valid:\n")
    assert fault in str(caught.value)


def test_all_faults_are_told_at_once():
    with pytest.raises(ConfigError) as caught:
        build(Tree, {"detph": 3, "small": {"width": 0}})
    assert len(str(caught.value).splitlines()) == 1 + 3


def test_a_configuration_cannot_change():
    with pytest.raises(ValueError, match="frozen"):
        build(Tree, {"depth": 3}).depth = 4


def test_toml_files(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("[a]\nb = 3\n")
    assert read_toml(path) == {"a": {"b": 3}}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.toml", None, "there is no file"),
        ("broken.toml", b"a = \n", r"broken\.toml is not valid TOML: Invalid value \(at line 1"),
        ("binary.toml", b"\xff\xfe\x00", r"binary\.toml is not valid TOML"),
        (".", None, "cannot read .*: Is a directory"),
        ("file/run.toml", b"", "cannot read .*: Not a directory"),
    ],
)
def test_a_toml_file_that_cannot_be_read_is_named(tmp_path, name, content, message):
    (tmp_path / "file").write_bytes(b"")
    if content:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message):
        read_toml(tmp_path / name)
