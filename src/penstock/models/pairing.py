"""Two models of which one drafts for the other."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from penstock.core.errors import UsageError
from penstock.models import hub

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def require_same_tokens(source: str, draft: Path, target: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses a model that does not speak the tokens of the one that it is to draft for.

    Args:
        source: what the drafting model is called.
        draft, target: the folders of both.
        tokenizer: the target's.

    Raises:
        UsageError: their vocabularies differ.
    """
    own, other = (hub.read_config(each).vocabulary for each in (draft, target))
    hint = "Draft with a model of the same family, or with `ngram`, which needs none."
    if own != other:
        raise UsageError(
            f"the model {source!r} that is to draft has a vocabulary of {own:,} tokens, and the model that it is to "
            f"draft for one of {other:,}",
            hint=hint,
        )
    if hub.load_tokenizer(draft).get_vocab() != tokenizer.get_vocab():
        raise UsageError(
            f"the tokenizer of the model {source!r} that is to draft numbers its {own:,} tokens otherwise than that of "
            "the model that it is to draft for",
            hint=hint,
        )
