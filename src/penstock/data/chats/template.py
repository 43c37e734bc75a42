"""Conversations as tokens, by a model's own chat template, and which of the tokens are the assistant's."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from penstock.core.errors import DataError, UsageError
from penstock.core.files import read_text
from penstock.core.strict_json import is_text
from penstock.data.chats.messages import Conversation
from penstock.data.tokenizer import add_tokens, fingerprint, with_tokens
from penstock.models import hub
from penstock.models.chats import ChatWriter, forms, of_tools

#: What of a conversation is learnt: all answers of the assistant, the last one alone, or every token.
Learnt = Literal["answers", "last", "all"]

#: A template that itself marks what the assistant writes.
MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Written(NamedTuple):
    """A conversation as ``tokens`` (int32 [N]), and which of them are learnt (bool [N])."""

    tokens: npt.NDArray[np.int32]
    learnt: npt.NDArray[np.bool_]


class Template:
    """The chat template of the model in ``folder``.

    Tokens are those that a server would prompt with. An answer goes from the end of the prompt that asks for it to the
    token that ends it; line breaks that the template writes after that are none of the model's. Where the template
    marks with ``{% generation %}`` what the assistant writes, its marks count. An answer that the template does not
    end is ended with the tokenizer's end-of-text token.

    Args:
        folder: of the model.
        file: a template to take in place of the model's own.
        new_tokens: special tokens that the tokenizer gets, where it does not have them.

    Attributes:
        tokenizer: the model's, with the template.
        fingerprint: of the tokenizer as it is stored, of which transformers may make another one for some families.
        ends: the special tokens that have ended answers so far.

    Raises:
        DataError: the model has no tokenizer or no template.
    """

    def __init__(self, folder: Path, file: Path | None = None, new_tokens: Sequence[str] = ()) -> None:
        self.tokenizer = hub.load_tokenizer(folder)
        self.fingerprint = fingerprint(with_tokens(folder, new_tokens))
        if new_tokens:
            add_tokens(self.tokenizer.backend_tokenizer, new_tokens)
        if file is not None:
            self.tokenizer.chat_template = read_text(file)
        if not self.tokenizer.chat_template:
            raise DataError(
                f"the model {folder} has no chat template",
                hint="Give one with data.chat_template=FILE; it goes into the trained model.",
            )
        self._marked = bool(MARKED.search(str(self.tokenizer.chat_template)))
        self._ends = hub.end_tokens(folder, self.tokenizer)
        added = {number for number, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        self._special = added | {*self.tokenizer.all_special_ids}
        self.ends: set[int] = set()

    def write(self, chat: Conversation, where: str, learnt: Learnt = "answers") -> Written:
        """A conversation as tokens.

        Raises:
            DataError: the template refuses it, leaves out one of its messages or its functions and calls, or does not
                tell where its answers are, or all tokens are masked; the message begins with ``where``.
        """
        if chat.tools or any(map(of_tools, chat.messages)):
            self._require_tools(chat, where)
        text = self._text(chat, where)
        if not is_text(text):
            raise DataError(f"{where} is not valid Unicode: it has half of a surrogate pair")
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        tokens, offsets = np.array(encoded["input_ids"], np.int32), np.array(encoded["offset_mapping"]).reshape(-1, 2)
        chosen = np.zeros(len(tokens), np.bool_)
        for begin, end in self._spans(chat, text, where, learnt):
            chosen |= (offsets[:, 0] >= begin) & (offsets[:, 0] < end) & (offsets[:, 1] > offsets[:, 0])
        self._require_all(chat, where)
        if not chosen.any():
            raise DataError(f"{where}: all {len(tokens)} tokens are masked: there is nothing in it to learn")
        if chosen[-1] and int(tokens[-1]) not in self._ends:
            ending = self.tokenizer.eos_token_id
            if ending is None:
                raise DataError(f"{where}: neither the template nor the tokenizer has a token that ends an answer")
            tokens, chosen = np.append(tokens, np.int32(ending)), np.append(chosen, True)
        last = int(tokens[np.flatnonzero(chosen)[-1]])
        if last in self._special:
            self.ends.add(last)
        return Written(tokens, chosen)

    def _spans(self, chat: Conversation, text: str, where: str, learnt: Learnt) -> list[tuple[int, int]]:
        """Where what is learnt begins and ends in the ``text`` of the conversation, in characters."""
        if learnt == "all":
            return [(0, len(text))]
        if self._marked:
            spans = self._marks(chat, where)
        else:
            answers = [i for i, message in enumerate(chat.messages) if message["role"] == "assistant"]
            spans = [self._turn(chat, place, text, where) for place in answers[-1:] if learnt == "last"]
            spans = spans or [self._turn(chat, place, text, where) for place in answers]
        return spans[-1:] if learnt == "last" else spans

    def _turn(self, chat: Conversation, place: int, text: str, where: str) -> tuple[int, int]:
        """The span of the answer that is message ``place``, from what the template writes with and without it."""
        asked = self._text(Conversation(chat.messages[:place], chat.tools), where, prompt=True)
        whole = self._text(Conversation(chat.messages[: place + 1], chat.tools), where)
        if not text.startswith(whole):
            raise DataError(
                f"{where}: the chat template writes message {place + 1} in another way when more messages follow",
                hint="Set objective.learnt=last, which learns from the last answer of each conversation alone.",
            )
        begin = _alike(asked, whole)
        # A prompt may end with more than every answer begins with, such as <think>; but all of the question is before.
        if begin < len(asked) and begin < len(self._text(Conversation(chat.messages[:place], chat.tools), where)):
            raise DataError(
                f"{where}: the chat template does not write message {place + 1} after those before it",
                hint="Set objective.learnt=all, or mark the answers in the template with {% generation %}.",
            )
        answer = whole[begin:]
        kept = answer.rstrip()
        ended = any(kept.endswith(str(self.tokenizer.convert_ids_to_tokens(token))) for token in self._special)
        return begin, begin + len(kept if ended else answer)

    def _marks(self, chat: Conversation, where: str) -> list[tuple[int, int]]:
        """The spans that the template marks."""
        from transformers.utils.chat_template_utils import render_jinja_template

        failures = []
        for messages in forms(chat.messages):
            try:
                _, marks = render_jinja_template(
                    [[dict(message) for message in messages]],
                    tools=chat.tools,
                    chat_template=self.tokenizer.chat_template,
                    return_assistant_tokens_mask=True,
                    **self.tokenizer.special_tokens_map,
                )
            except Exception as error:  # A template is a program of the model's makers, and raises what it likes.
                failures.append(error)
            else:
                return [(int(begin), int(end)) for begin, end in marks[0]]
        raise DataError(f"{where}: the chat template fails: {failures[-1]}") from failures[-1]

    def _require_all(self, chat: Conversation, where: str) -> None:
        """Refuses a conversation of which the template leaves out what an answer answers, as the server does."""
        left_out = ChatWriter(self.tokenizer, chat.tools, {"add_generation_prompt": False}).dropped(chat.messages)
        for place in left_out:
            role = chat.messages[place]["role"]
            if role != "assistant":
                raise DataError(f"{where}: the chat template leaves out message {place + 1}, of the {role}")

    def _require_tools(self, chat: Conversation, where: str) -> None:
        """Refuses a conversation whose functions, calls or results the template leaves out: what the model would learn
        is to say nothing in place of a call."""
        self._text(chat, where)  # which says what is wrong where the template fails
        if not ChatWriter(self.tokenizer, chat.tools, {"add_generation_prompt": False}).knows_tools(chat.messages):
            raise DataError(
                f"{where}: the chat template does not write functions, their calls and what they returned",
                hint="Give one that does with data.chat_template=FILE.",
            )

    def _text(self, chat: Conversation, where: str, prompt: bool = False) -> str:
        try:
            return ChatWriter(self.tokenizer, chat.tools, {"add_generation_prompt": prompt})(chat.messages)
        except UsageError as error:
            raise DataError(f"{where}: the chat template fails: {error.__cause__}") from error


def _alike(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
