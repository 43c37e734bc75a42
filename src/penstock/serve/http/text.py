"""Text to tokens and back, for the endpoints."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from penstock.core.errors import UsageError
from penstock.models.chats import Messages
from penstock.models.vocabulary import Vocabulary
from penstock.serve.chat import Prompt, chat_prompt
from penstock.serve.dialogue.contract import Dialogue, Spell
from penstock.serve.dialogue.guess import doubt, guess
from penstock.serve.dialogue.lark import speller

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

#: Ends the assistant's turn where a model brings no chat template, and goes on with a transcript.
NEXT_TURN = "\nuser:"


class Tokens:
    """The tokenizer of a served model. Its methods may run in threads beside each other.

    Attributes:
        backend: the tokenizer proper.
        vocabulary: what each token says by itself.
        templated: whether the model brings a chat template.
        turn_stops: stop strings that every chat needs besides its own.
        template: the model's chat template, empty where it has none.
        dialogue: how the model writes thoughts and calls: guessed from the template if not given.
        guest_templates: whether a chat may bring a template of its own.
        specials: all special tokens, and how they are written.
        marks: the dialogue's markers that are special tokens, which texts leave out otherwise.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, dialogue: Dialogue | None = None, guest_templates: bool = False
    ) -> None:
        self._tokenizer, self.backend = tokenizer, tokenizer.backend_tokenizer
        # What a tokenizer.json says of a batch for training would cut texts without a word, and fill them up.
        self.backend.no_truncation()
        self.backend.no_padding()
        self.template = str(tokenizer.chat_template or "")
        if dialogue is None and (warning := doubt(self.template)) is not None:
            log.warning("%s", warning)
        self.dialogue, self.guest_templates = dialogue or guess(self.template), guest_templates
        self.vocabulary = Vocabulary(self.backend)
        self.templated = bool(tokenizer.chat_template)
        self.turn_stops = () if self.templated else (NEXT_TURN,)
        added = self.backend.get_added_tokens_decoder()
        self.specials = {id: token.content for id, token in added.items() if token.special}
        known = {self.backend.token_to_id(marker): marker for marker in self.dialogue.markers}
        self.marks = {id: marker for id, marker in known.items() if id is not None and self.vocabulary.says(id) is None}

    @property
    def spell(self) -> Spell:
        """Writes texts of the dialogue's format for grammars."""
        return speller(self.dialogue.markers, self.backend.token_to_id)

    def encode(self, text: str, special: bool = True) -> list[int]:
        """The tokens of ``text``; with ``special``, those that the model wants around a text are added.

        Raises:
            UsageError: it is no text: a half of a surrogate pair stands alone in it.
        """
        check_characters(text)
        ids: list[int] = self.backend.encode(text, add_special_tokens=special).ids
        return ids

    def encode_first(self, text: str, most: int | None, special: bool = True) -> list[int]:
        """The tokens of :meth:`encode`; where they are more than ``most``, of the text's beginning alone, so that with
        those around it they are so many.

        Raises:
            UsageError: it is no text, or nothing of it would be left.
        """
        tokens = self.encode(text, special)
        if most is None or len(tokens) <= most:
            return tokens
        around = self.backend.num_special_tokens_to_add(False) if special else 0
        if most <= around:
            raise UsageError(f"{most} tokens are too few: the model wants {around} around a text")
        found = self.backend.encode(text, add_special_tokens=False)
        found.truncate(most - around)
        ids: list[int] = self.backend.post_process(found, None, special).ids
        return ids

    def encode_pair(self, one: str, other: str, most: int | None) -> tuple[list[int], int]:
        """The tokens of two texts that are read together, with those that the model wants around them, and the number
        of the one with which the second begins, where the model tells both apart; where they are more than ``most``, of
        the beginning alone of the second.

        Raises:
            UsageError: one is no text, or nothing of the second would be left.
        """
        check_characters(one)
        check_characters(other)
        whole = self.backend.encode(one, other)
        if most is not None and len(whole.ids) > most:
            first, second = (self.backend.encode(each, add_special_tokens=False) for each in (one, other))
            room = most - self.backend.num_special_tokens_to_add(True) - len(first.ids)
            if room < 1:
                raise UsageError(f"{most} tokens are too few: the first text alone has {len(first.ids)}")
            second.truncate(room)
            whole = self.backend.post_process(first, second, True)
        # Some tokenizers know of kinds, and their models are not to be told.
        kinds = whole.type_ids if "token_type_ids" in self._tokenizer.model_input_names else []
        return whole.ids, kinds.index(1) if 1 in kinds else len(whole.ids)

    def bare(self, text: str) -> list[int]:
        """The tokens of ``text`` alone; see :meth:`encode`."""
        return self.encode(text, False)

    def contexts(self, given: Sequence[str | list[int]] | None) -> list[list[int]]:
        """The tokens of each of the contexts that a request names; see :meth:`encode`."""
        return [self.bare(each) if isinstance(each, str) else each for each in given or ()]

    def decode(self, tokens: list[int], skip_special_tokens: bool = False) -> str:
        """The text of ``tokens``."""
        text: str = self.backend.decode(tokens, skip_special_tokens=skip_special_tokens)
        return text

    def chat(
        self,
        messages: Messages,
        tools: list[dict[str, Any]] | None,
        variables: dict[str, Any],
        special: bool = False,
        template: str | None = None,
    ) -> Prompt:
        """A chat, up to where the assistant's answer begins.

        Raises:
            UsageError: the template does not take these messages, or is one that the chat brings, and may not.
        """
        if template is not None and not self.guest_templates:
            raise UsageError(
                "chat_template: a chat template is a program, and whoever runs the server gives it, by --chat-template "
                "FILE, or lets requests bring their own, by --request-templates"
            )
        check_characters(json.dumps([list(messages), tools, variables], ensure_ascii=False))
        return chat_prompt(self._tokenizer, messages, tools, variables, self.dialogue, special, template)


def check_characters(text: str) -> None:
    """Refuses what is no text.

    Raises:
        UsageError: a half of a surrogate pair stands alone in it.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError("the text has half of a surrogate pair, which is no character") from error
