"""A page that shows the trees that were explored."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def tree_page(settings: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> str:
    """One HTML file without any others: each problem's tree with scores, tokens and what was pruned, and its ledger."""
    data = json.dumps({"settings": settings, "records": records}).replace("</", "<\\/")
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    return template.replace('"DATA"', data)
