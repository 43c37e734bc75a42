"""Templates that make a prompt of a query and a document."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from penstock.core.errors import UsageError
from penstock.core.files import read_json, read_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: In which sentence-transformers says what stands before texts.
PROMPTS = "config_sentence_transformers.json"

#: Stand in a template to see what it writes.
_QUERY, _DOCUMENT, _INSTRUCTION = "querystandshere", "documentstandshere", "instructionstandshere"

_HINT = "Give one with --rerank-template FILE, in Jinja's language, that writes {{ query }} and {{ document }}."


@dataclasses.dataclass(frozen=True)
class PairTemplate:
    """Writes a pair of a query and a document as one text.

    Attributes:
        tokenizer: of the model.
        template: in Jinja's language. It is given ``query``, ``document`` and, where there is one, ``instruction``; and
            ``messages`` of the roles ``query``, ``document`` and ``system`` with the same, as sentence-transformers'
            and vLLM's templates want them.
        instruction: of requests that bring none; None leaves it to the template.
    """

    tokenizer: PreTrainedTokenizerBase
    template: str
    instruction: str | None = None

    def prompt(self, query: str, document: str, instruction: str | None = None, most: int | None = None) -> list[int]:
        """The tokens of a pair; where they are more than ``most``, of the beginning alone of the document.

        Raises:
            UsageError: nothing of the document would be left, or the template takes no instruction.
        """
        if instruction is not None and _INSTRUCTION not in self._text(_QUERY, _DOCUMENT, _INSTRUCTION):
            raise UsageError("the model's template for rankings has no place for an instruction")
        tokens = self._tokens(query, document, instruction)
        if most is None or len(tokens) <= most:
            return tokens
        told = self.tokenizer(document, add_special_tokens=False, return_offsets_mapping=True)
        ends = [end for _, end in told["offset_mapping"]]
        left = len(ends)
        while len(tokens) > most:
            left -= len(tokens) - most
            if left < 1:
                raise UsageError(f"{most} tokens are too few: the template and the query alone have as many")
            tokens = self._tokens(query, document[: ends[left - 1]], instruction)
        return tokens

    def check(self) -> PairTemplate:
        """The same, if it writes pairs.

        Raises:
            UsageError: it does not.
        """
        text = self._text(_QUERY, _DOCUMENT, self.instruction)
        missing = [what for what, word in (("query", _QUERY), ("document", _DOCUMENT)) if word not in text]
        if missing:
            raise UsageError(f"the template for rankings leaves out the {' and the '.join(missing)}", hint=_HINT)
        return self

    def _tokens(self, query: str, document: str, instruction: str | None) -> list[int]:
        text = self._text(query, document, self.instruction if instruction is None else instruction)
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _text(self, query: str, document: str, instruction: str | None) -> str:
        given = {"query": query, "document": document}
        given |= {} if instruction is None else {"instruction": instruction}
        roles = {"instruction": "system"}
        order = sorted(given, key=lambda name: name != "instruction")
        messages = [{"role": roles.get(name, name), "content": given[name]} for name in order]
        try:
            text: str = self.tokenizer.apply_chat_template(
                messages, chat_template=self.template, tokenize=False, add_generation_prompt=True, **given
            )
        except Exception as error:  # a template is a program of the model's makers, and raises what it likes
            raise UsageError(f"the template for rankings takes no query and document: {error}", hint=_HINT) from error
        return text


def open_template(folder: Path, tokenizer: PreTrainedTokenizerBase, file: Path | None = None) -> PairTemplate:
    """The template in ``file``, or else the chat template of the model in ``folder``; the instruction is the prompt
    that sentence-transformers takes where none is named.

    Raises:
        UsageError: it does not write pairs.
    """
    text = str(tokenizer.chat_template or "") if file is None else read_text(file)
    return PairTemplate(tokenizer, text, _instruction(folder)).check()


def writes_pairs(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template of ``tokenizer`` writes pairs."""
    try:
        PairTemplate(tokenizer, str(tokenizer.chat_template or "")).check()
    except UsageError:
        return False
    return True


def _instruction(folder: Path) -> str | None:
    path = folder / PROMPTS
    told = read_json(path) if path.is_file() else {}
    prompts = told.get("prompts") if isinstance(told, dict) else None
    found = prompts.get(told.get("default_prompt_name")) if isinstance(prompts, dict) else None
    return found if isinstance(found, str) and found else None
