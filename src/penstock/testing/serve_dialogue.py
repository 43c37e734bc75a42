"""The law of ``serve.dialogue``.

What each clause is there to catch:

- the example is written and read as it stands: a format that is consistent, and no model's;
- reading inverts writing, however the text is cut: markers that are missed at a cut, white space that is kept or lost,
  values of another type, strings with markup in them, calls in another order;
- a text without markers is content as it stands; every word of any text is told once, and no text fails: text that is
  held back and forgotten, or told twice, when what looked like a call is none;
- what the grammar allows is read as calls that fit: rules and reader that disagree, parameters that are left out;
- the grammar allows what is written: rules that no model would follow.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLTokenizer

from penstock.core.randomness import numpy_generator
from penstock.serve.choose.grammar import LIMITS
from penstock.serve.dialogue.answer import Answer, Call, Event, gathered, merged
from penstock.serve.dialogue.contract import EXAMPLES, Dialogue, Reader, Thinking
from penstock.serve.dialogue.lark import literal

#: Letters and marks for strings; the brackets and quotes are there to be mistaken for markup.
LETTERS = list("abcÖß漢🙂 '\"\\{}[]()<>/=,:;.\n\t`|")

#: Texts that are JSON by themselves.
JSON_TEXTS = ("5", "-1.5e3", "true", "[]", '{"a": [1]}', '"q"')

#: What texts are made of that are none of the format's, besides its own markers and words.
PIECES = (
    '{"name": "now", "arguments": {}}', '{"name": "', '", "arguments": {', "}", "{", "[", "]", "(", ")", '"', "'", ",",
    ":", "=", ";", "\n", " ", "```json\n", "```", "</", ">", "<", "function", "now", "now()", "get_weather(city=",
    "<function=now>", "</function>", "<parameter=city>", "</parameter>", "assistant", "analysis", "commentary",
    "final", " to=functions.now", "json", "null", "\\", '"arguments"', '"name"',
)  # fmt: skip


def check(dialogue: Dialogue) -> None:
    """Asserts the law."""
    check_example(dialogue)
    check_inverse(dialogue)
    check_plain(dialogue)
    check_words(dialogue)
    check_grammar(dialogue)


def read(dialogue: Dialogue, chunks: Sequence[str], begun: bool = False) -> Answer:
    """The answer in ``chunks``, whose calls are of EXAMPLES' functions."""
    reader = Reader(dialogue, EXAMPLES, begun)
    events: list[Event] = []
    for chunk in chunks:
        events += reader.read(chunk)
    return gathered(merged(events + reader.end()))


def same(one: Answer, other: Answer) -> bool:
    """Whether two answers are one, but for how the JSON of arguments is written."""

    def plain(answer: Answer) -> Any:
        return answer.content, answer.reasoning, [(each.name, _loaded(each.arguments)) for each in answer.calls]

    return bool(plain(one) == plain(other))


def _loaded(arguments: str) -> Any:
    try:
        return json.loads(arguments)
    except ValueError:
        return arguments


def cut(draw: np.random.Generator, text: str) -> list[str]:
    """``text`` in chunks of a few letters."""
    chunks, place = [], 0
    while place < len(text):
        length = int(draw.integers(1, draw.integers(2, 12)))
        chunks.append(text[place : place + length])
        place += length
    return chunks


def check_example(dialogue: Dialogue) -> None:
    """Asserts that the policy's example is written and read as it stands."""
    answer, text = dialogue.example()
    assert dialogue.write(answer) == text, f"the example is written as {dialogue.write(answer)!r}"
    found = read(dialogue, [text])
    assert same(found, answer), f"the example is read as {found}"
    assert answer.calls, "the example has no call"


def check_inverse(dialogue: Dialogue) -> None:
    """Asserts that what is written is read, whole, letter by letter and in any other chunks."""
    draw = numpy_generator(0, "testing/dialogue")
    for number in range(150):
        answer = drawn_answer(draw, dialogue)
        text = dialogue.write(answer)
        for chunks in ([text], list(text), cut(draw, text)):
            found = read(dialogue, chunks)
            assert same(found, answer), f"answer {number}, {answer}, is written as {text!r} and read as {found}"
        began = dialogue.thought("x").partition("x")[0]
        if answer.reasoning and began and text.startswith(began):
            rest = text.removeprefix(began)
            assert same(read(dialogue, cut(draw, rest), True), answer), "a thought that the prompt began is lost"


def drawn_answer(draw: np.random.Generator, dialogue: Dialogue) -> Answer:
    """An answer with any of content, thought and calls."""
    names = list(EXAMPLES)
    calls = tuple(drawn_call(draw, names[draw.integers(len(names))], dialogue) for _ in range(draw.integers(0, 4)))
    reasoning = drawn_text(draw, dialogue).strip() if draw.random() < 0.5 else ""
    content = drawn_text(draw, dialogue).strip() if draw.random() < 0.7 or not calls else ""
    # What begins as bare calls do may be one, and is no content then.
    return Answer(re.sub(r"^[\[{]+\s*", "", content), calls, reasoning)


def drawn_call(draw: np.random.Generator, name: str, dialogue: Dialogue) -> Call:
    """A call of one of EXAMPLES' functions."""
    arguments: dict[str, Any] = {}
    if name == "get_weather":
        arguments["city"] = drawn_text(draw, dialogue)
        if draw.random() < 0.5:
            arguments["unit"] = "celsius"
        if draw.random() < 0.5:
            arguments["days"] = int(draw.integers(-9, 99))
    elif name == "book":
        arguments["guests"] = [drawn_text(draw, dialogue) for _ in range(draw.integers(0, 3))]
        if draw.random() < 0.5:
            arguments["at"] = {"hour": float(draw.integers(0, 48)) / 2} | (
                {"late": True} if draw.random() < 0.5 else {}
            )
        arguments["window"] = bool(draw.random() < 0.5)
        if draw.random() < 0.5:
            arguments["note"] = drawn_text(draw, dialogue) if draw.random() < 0.7 else None
    return Call(name, json.dumps(arguments, ensure_ascii=bool(draw.random() < 0.5)))


def drawn_text(draw: np.random.Generator, dialogue: Dialogue) -> str:
    """Any text but one with the format's markers, which a model cannot write as text either; it may look like JSON."""
    if draw.random() < 0.15:
        return JSON_TEXTS[int(draw.integers(len(JSON_TEXTS)))]
    text = "".join(LETTERS[draw.integers(len(LETTERS))] for _ in range(draw.integers(0, 30)))
    for marker in dialogue.markers:
        text = text.replace(marker, "")
    return text


def check_plain(dialogue: Dialogue) -> None:
    """Asserts that a text without markers is content as it stands."""
    draw = numpy_generator(1, "testing/dialogue")
    for _ in range(100):
        text = "A" + drawn_text(draw, dialogue)
        found = read(dialogue, cut(draw, text))
        assert found == Answer(text), f"the text {text!r} is read as {found}"


def check_words(dialogue: Dialogue) -> None:
    """Asserts that of any text every word is told once, however the text is cut."""
    draw = numpy_generator(2, "testing/dialogue")
    pieces = [*PIECES, *dialogue.markers * 4, *dialogue.tags]
    for number in range(400):
        text, words = drawn_puzzle(draw, pieces, dialogue)
        found = read(dialogue, [text])
        again = read(dialogue, cut(draw, text))
        assert found == again, f"text {number}, {text!r}, is read as {found}, and in chunks as {again}"
        if not (found.calls or found.reasoning or dialogue.ends or text.lstrip().startswith(dialogue.tags[0])):
            assert found.content == text, f"text {number}, {text!r}, has no call, and is read as {found.content!r}"
        told = found.content + found.reasoning + "".join(each.name + each.arguments for each in found.calls)
        for word in words:
            assert told.count(word) == 1, (
                f"of text {number}, {text!r}, the word {word!r} is told {told.count(word)} times"
            )


def drawn_puzzle(draw: np.random.Generator, pieces: Sequence[str], dialogue: Dialogue) -> tuple[str, list[str]]:
    """A text of words and of what means something to some format, or of a written answer with such things in it."""
    parts, words = [], []
    if draw.random() < 0.5:
        parts = cut(draw, dialogue.write(drawn_answer(draw, dialogue)))
    for place in range(draw.integers(1, 12)):
        word = f"w{place}x"
        words += [word] if draw.random() < 0.5 else []
        part = words[-1] if words and words[-1] == word else pieces[int(draw.integers(len(pieces)))]
        parts.insert(int(draw.integers(0, len(parts) + 1)), part)
    return "".join(parts), words


# Grammars


def check_grammar(dialogue: Dialogue) -> None:
    """Asserts that what the rules allow is read as calls that fit, and that they allow what is written."""
    draw, tokenizer = numpy_generator(3, "testing/dialogue"), LLTokenizer("byte")
    closings = ['"', "}", "]", ")", *re.findall(r"\n?<[^>]+>", dialogue.example()[1])]
    for several in (False, True):
        grammar = LLMatcher.grammar_from_lark(dialogue.rules(EXAMPLES, several, literal))
        for _ in range(12):
            text = sentence(draw, tokenizer, grammar, closings)
            found = read(dialogue, [text])
            assert found.calls, f"the grammar allows {text!r}, which is no call"
            assert not found.content.strip(), f"of {text!r}, which the grammar allows, {found.content!r} is no call"
            assert several or len(found.calls) == 1, f"the grammar of one call allows {text!r}"
            for call in found.calls:
                fault = misfit(json.loads(call.arguments), EXAMPLES[call.name].parameters)
                assert fault is None, f"of {text!r}, which the grammar allows, {call} does not fit: {fault}"
        for name in EXAMPLES:
            call = _ordered(drawn_call(draw, name, dialogue))
            text = _without_end(dialogue, dialogue.write(Answer(calls=(call,))))
            assert allows(tokenizer, grammar, text), f"the grammar does not allow {text!r}"
    check_lead(dialogue)


def check_lead(dialogue: Dialogue) -> None:
    """Asserts that a thought may stand before a call that a grammar governs, and is read as one."""
    tokenizer, (answer, _) = LLTokenizer("byte"), dialogue.example()
    call = answer.calls[:1]
    rules = dialogue.rules(EXAMPLES, False, literal)
    told = dialogue.lead(Thinking.MAY, None, literal, True)
    grammar = json.dumps(
        {"grammars": [{"lark_grammar": f"start: lead @answer\n{told}"}, {"name": "answer", "lark_grammar": rules}]}
    )
    for reasoning in ("", "I call {now}."):
        text = _without_end(dialogue, dialogue.write(Answer("", call, reasoning)))
        assert allows(tokenizer, grammar, text), f"the grammar does not allow the thought in {text!r}"


def _without_end(dialogue: Dialogue, text: str) -> str:
    return next((text.removesuffix(end) for end in dialogue.ends if text.endswith(end)), text)


def _ordered(call: Call) -> Call:
    """``call`` with its arguments in the order of the schema, those that are required first."""
    arguments, schema = json.loads(call.arguments), EXAMPLES[call.name].parameters
    names = [name for name in schema["properties"] if name in arguments]
    names.sort(key=lambda name: name not in schema.get("required", ()))
    return Call(call.name, json.dumps({name: arguments[name] for name in names}, ensure_ascii=False))


def allows(tokenizer: LLTokenizer, grammar: str, text: str) -> bool:
    """Whether ``grammar`` allows ``text`` as a whole."""
    matcher = LLMatcher(tokenizer, grammar, limits=LIMITS, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    tokens = tokenizer.tokenize_bytes(text.encode())
    return bool(
        matcher.validate_tokens(tokens) == len(tokens) and matcher.consume_tokens(tokens) and matcher.is_accepting()
    )


def sentence(draw: np.random.Generator, tokenizer: LLTokenizer, grammar: str, closings: Sequence[str]) -> str:
    """A text that ``grammar`` allows, letter by letter; it hurries to an end, with the help of ``closings``."""
    matcher = LLMatcher(tokenizer, grammar, limits=LIMITS, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    said = bytearray()
    for _ in range(4000):
        if matcher.is_accepting() and draw.random() < 0.3:
            return said.decode()
        allowed = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little").nonzero()[0]
        letters = [int(each) for each in allowed if each < 256]
        if not letters:
            assert matcher.is_accepting(), f"the grammar goes no further behind {said.decode()!r}"
            return said.decode()
        # Any letter of ASCII; others where one has been begun.
        plain = [each for each in letters if each < 127] or letters
        tokens = tokenizer.tokenize_bytes(closings[int(draw.integers(len(closings)))].encode())
        if draw.random() < 0.6 or matcher.validate_tokens(tokens) < len(tokens):
            tokens = [plain[draw.integers(len(plain))]]
        said += bytes(tokens)
        assert matcher.consume_tokens(tokens), matcher.get_error()
    raise AssertionError(f"the grammar does not end: {said.decode()!r}")


def misfit(value: Any, schema: Mapping[str, Any]) -> str | None:
    """Why ``value`` does not fit ``schema``, which has no more than types, properties, items and choices."""
    return next(_misfits(value, schema), None)


def _misfits(value: Any, schema: Mapping[str, Any]) -> Iterator[str]:
    kinds = {
        "string": str,
        "integer": int,
        "number": int | float,
        "boolean": bool,
        "null": type(None),
        "array": list,
        "object": dict,
    }
    kind = schema["type"]
    if isinstance(kind, list):
        faults = [misfit(value, {**schema, "type": each}) for each in kind]
        yield from [fault for fault in faults[:1] if fault and None not in faults]
        return
    if not isinstance(value, kinds[kind]) or (isinstance(value, bool) and kind != "boolean"):
        yield f"{value!r} is no {kind}"
        return
    if "enum" in schema and value not in schema["enum"]:
        yield f"{value!r} is no choice"
    if isinstance(value, list):
        for each in value:
            yield from _misfits(each, schema["items"])
    if isinstance(value, dict):
        yield from (f"{name!r} is missing" for name in schema.get("required", ()) if name not in value)
        for name, each in value.items():
            if name not in schema["properties"]:
                yield f"{name!r} is unknown"
            else:
                yield from _misfits(each, schema["properties"][name])
