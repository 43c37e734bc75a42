"""A grammar over the small model's tokens, of which it is plain to see what it allows."""

from __future__ import annotations

import functools
import itertools
import string
from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from penstock.serve.choose.grammar import Grammars
from penstock.serve.choose.sampling import Grammar
from penstock.testing.serve_model import SHAPE

#: The token that ends a text which is whole.
END = SHAPE.vocabulary - 1

#: What the others are: a letter, or two.
LETTERS = string.ascii_lowercase
PIECES = [*LETTERS, *("".join(two) for two in itertools.product("ampz", "bfhnqw"))][:END]

#: A letter of the first half of the alphabet and one of the second, so many times.
FEWEST, MOST = 2, 5
PAIRS = Grammar(regex=f"([a-m][n-z]){{{FEWEST},{MOST}}}")


def may_follow(written: Sequence[int], token: int) -> bool:
    """Whether ``token`` may come behind what was ``written`` by the grammar, which has allowed that."""
    text = "".join(PIECES[each] for each in written)
    if token == END:
        return len(text) % 2 == 0 and len(text) >= 2 * FEWEST
    text += PIECES[token]
    halves = all((letter <= "m") == (place % 2 == 0) for place, letter in enumerate(text))
    return halves and len(text) <= 2 * MOST


@functools.cache
def grammars() -> Grammars:
    """Compiles grammars for these tokens."""
    known = {piece: number for number, piece in enumerate([*PIECES, "<end>"])}
    merges = [(piece[0], piece[1]) for piece in PIECES if len(piece) > 1]
    tokenizer = Tokenizer(models.BPE(vocab=known, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    return Grammars(made, SHAPE.vocabulary, [END])
