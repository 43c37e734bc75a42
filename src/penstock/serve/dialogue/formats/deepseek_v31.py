"""DeepSeek V3.1: bare JSON between markers."""

from __future__ import annotations

from typing import ClassVar

from penstock.policy import policy
from penstock.serve.dialogue.answer import Answer, Call
from penstock.serve.dialogue.formats.deepseek_v3 import CALL, CALL_END, CALLS, SEP, DeepSeekV3


@policy("serve.dialogue", "deepseek_v31")
class DeepSeekV31(DeepSeekV3):
    """DeepSeek V3.1: the name and the arguments between markers for each call and for all of them. What V3 writes is
    read too."""

    signs: ClassVar[tuple[str, ...]] = (CALLS,)
    close: ClassVar[str] = CALL_END
    between: ClassVar[str] = ""

    def begin(self, name: str) -> str:
        return f"{CALL}{name}{SEP}"

    @classmethod
    def example(cls) -> tuple[Answer, str]:
        calls = (Call("get_weather", '{"city": "Köln"}'), Call("now"))
        text = (
            'Let me see.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": "Köln"}'
            "<｜tool▁call▁end｜><｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
        )
        return Answer("Let me see.", calls), text
