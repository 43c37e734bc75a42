"""Requests that are ended by their ids."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from in_process import Engine, serving
from penstock.serve.http.errors import ApiError


def test_a_request_is_ended_by_its_own_key_alone():
    service = serving(engine := Engine([300]))
    requests = [SimpleNamespace(id="cmpl-1/0"), SimpleNamespace(id="cmpl-1/1")]
    service.live["cmpl-1"] = SimpleNamespace(key="one", requests=requests)
    for id, key in (("cmpl-1", "other"), ("cmpl-2", "one")):
        with pytest.raises(ApiError, match="no request") as refused:
            service.abort(id, key)
        assert refused.value.status == 404
    assert not engine.aborted
    service.abort("cmpl-1", "one")
    assert engine.aborted == ["cmpl-1/0", "cmpl-1/1"]
