"""``penstock serve``: what it refuses before anything is loaded."""

from __future__ import annotations

import socket
import sys

import pytest

from penstock import cli


@pytest.fixture
def refused(monkeypatch, capsys):
    """What a command line that is refused says."""
    monkeypatch.delenv("PENSTOCK_API_KEY", raising=False)

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["penstock", "serve", "python-1m", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        assert exit.value.code == 2
        errors = capsys.readouterr().err
        assert errors.startswith("error: ")
        return errors

    return run


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "example.com"])
def test_strangers_without_a_key(refused, host):
    said = refused("--host", host)
    assert f"the server listens at loopback addresses alone, and {host} is none" in said
    assert "--no-key" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--api-key", ""], "an API key is empty"),
        (["--api-key", "é"], "characters that no header can carry"),
        (["--api-key-file", "nowhere"], "cannot read nowhere"),
        (["--set", "sequenes=4"], "sequenes: unknown key; did you mean 'sequences'"),
        (["--set", "batching=nothing"], "batching"),
        (["--draft", "ngrm"], "did you mean 'ngram'"),
        (["--draft-tree", "3,2"], "there is none: set draft"),
        (["--draft", "ngram", "--draft-tree", "3,x"], "valid integer"),
        (["--kv-codec", "int9"], "did you mean 'int8'"),
        (["--draft", "ngram", "--set", "draft.tokens=0"], "'ngram': tokens: Input should be greater than"),
        (["--kv-when", "pressure"], "says when a cache is compressed, and not what is kept of it"),
        (["--kv", "h2o", "--kv-when", "sometimes"], "'h2o': when: Input should be 'due' or 'pressure'"),
        (["--kv", "full", "--kv-when", "pressure"], "'full' has no option 'when'"),
        (["--kv-eviction", "lfu"], "kv.eviction has no policy 'lfu'"),
        (["--kv-disk", "cache"], "kv_disk needs kv_host"),
        (["--kv-host", "much"], "kv_host: "),
        (["--kv-host", "1GB", "--record", "steps"], "a recording has no blocks that come back"),
        (["--controller", "fixed"], "controller says how many tokens are drafted, and nothing drafts: set draft=ngram"),
        (["--set", "controller=measured"], "nothing drafts: set draft=ngram, or leave it out"),
        (["--verifier", "accept_residual"], "verifier says which drafted tokens stay, and nothing drafts"),
        (["--set", "kv_disk_size=1GB"], "kv_disk_size is of a folder that is not named: set kv_disk"),
        (["--set", "adapter_rank=4"], "adapter_rank is of adapters, and there is no room for any"),
        (["--routing", "least_loaded"], "routing says which engine gets a request, and there is one: ask for several"),
        (["--routing-option", "ahead=4"], "routing says which engine gets a request, and there is one"),
        (["--restarts", "3"], "restarts says how often an engine is started again that died, and there is one"),
        (
            ["--replicas", "2", "--routing", "prefix", "--routing-option", "name=round_robin"],
            "different things of name",
        ),
        (["--set", "replicas=2"], "serve them with penstock serve MODEL --replicas N"),
        (["--resident-weights", "8GB", "--set", "resident_weights=4GB"], "--set resident_weights=4GB say different"),
        (["--record", "steps", "--replicas", "2"], "several replicas would record their steps into one file"),
        (["--draft", "python-1m", "--set", "draft.source=python-6m"], "two models or heads are to draft"),
        (["--deadline", "0"], "deadline: Input should be greater than 0"),
        (["--deadline", "nan"], "deadline: "),
        (["--body-limit", "-1"], "body: Input should be greater than 0"),
        (["--drain", "inf"], "drain: "),
        (["--chat-template", "nowhere.jinja"], "cannot read nowhere.jinja"),
        (["--host", "127.0.0.1.nowhere.invalid", "--no-key"], "cannot listen at 127.0.0.1.nowhere.invalid"),
    ],
)
def test_wrong_options(refused, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused(*arguments, "--port", 0)


def test_a_file_of_comments_holds_no_key(refused, tmp_path):
    (tmp_path / "keys").write_text("# alice\n\n")
    assert "keys holds no key" in refused("--api-key-file", tmp_path / "keys")


def test_a_port_that_is_taken(refused):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"cannot listen at 127.0.0.1 port {port}" in refused("--port", port)
