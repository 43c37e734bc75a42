"""Every response bears the name of its request."""

from __future__ import annotations

import pytest

from in_process import asked


@pytest.mark.parametrize("body", [{"prompt": "x"}, {"prompt": "x", "stream": True}, {"prompt": 5}])
def test_a_request_keeps_its_name(body):
    answer = asked("/v1/completions", json=body, headers={"X-Request-Id": "mine-1"})
    assert answer.headers["x-request-id"] == "mine-1"


def test_one_without_a_name_gets_that_of_its_response():
    answer = asked("/v1/completions", json={"prompt": "x"})
    assert answer.headers["x-request-id"] == answer.json()["id"]


def test_one_that_is_refused_gets_a_name_as_well():
    for headers in ({}, {"X-Request-Id": "a b"}, {"X-Request-Id": "x" * 129}):
        names = {asked("/nowhere", json={}, headers=headers).headers["x-request-id"] for _ in range(2)}
        assert len(names) == 2
        assert all(name.startswith("req-") for name in names)
