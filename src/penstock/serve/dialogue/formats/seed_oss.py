"""Seed-OSS: a tag for each argument, between tags of its own."""

from __future__ import annotations

from typing import ClassVar

from penstock.policy import policy
from penstock.serve.dialogue import tagged
from penstock.serve.dialogue.answer import Answer, Call
from penstock.serve.dialogue.contract import Thinking
from penstock.serve.dialogue.formats.qwen3_coder import CLOSE, FUNCTION, Qwen3Coder

BEGIN, END = "<seed:tool_call>", "</seed:tool_call>"
THINK, THOUGHT = "<seed:think>", "</seed:think>"

#: What the template writes behind THINK where the model is not to think: it says so itself, and ends the thought.
REFLECT = "<seed:cot_budget_reflect>"


@policy("serve.dialogue", "seed_oss")
class SeedOss(Qwen3Coder):
    """Seed-OSS: as Qwen3-Coder, between ``<seed:tool_call>`` tags and with values on the line of their tags; thoughts
    stand between ``<seed:think>`` tags."""

    signs: ClassVar[tuple[str, ...]] = (BEGIN, FUNCTION)
    markers: ClassVar[tuple[str, ...]] = (BEGIN, END, THINK, THOUGHT)
    tags: ClassVar[tuple[str, str]] = (THINK, THOUGHT)
    around: ClassVar[tuple[str, str]] = (BEGIN, END)
    arguments: ClassVar[tagged.Tags] = tagged.Tags("<parameter=", ">", "", "</parameter>", (CLOSE, END))

    def thought(self, reasoning: str) -> str:
        return f"{THINK}{reasoning}{THOUGHT}\n" if reasoning else ""

    def thinking(self, template: str, prompt: str) -> Thinking:
        return Thinking.BEGUN if prompt.rstrip().endswith(REFLECT) else super().thinking(template, prompt)

    @classmethod
    def example(cls) -> tuple[Answer, str]:
        calls = (Call("get_weather", '{"city": "Köln", "days": 3}'), Call("now"))
        text = (
            "<seed:think>Which city?</seed:think>\nLet me see.\n<seed:tool_call>\n<function=get_weather>\n"
            "<parameter=city>Köln</parameter>\n<parameter=days>3</parameter>\n</function>\n</seed:tool_call>\n"
            "<seed:tool_call>\n<function=now>\n</function>\n</seed:tool_call>"
        )
        return Answer("Let me see.", calls, "Which city?"), text
