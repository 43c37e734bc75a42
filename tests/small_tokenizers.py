"""Small tokenizers of every kind, made without a download."""

from __future__ import annotations

import functools

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

TEXT = ["def add(a, b):\n    return a + b\n", "naïve → 🙂 漢字 def", "  two  spaces\t", "über die Brücke"] * 4
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level() -> Tokenizer:
    """As GPT-2, Llama 3 and Qwen."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    return tokenizer


def byte_fallback(*strip: decoders.Decoder) -> Tokenizer:
    """As Llama 2 and Mistral, with ``strip``; as Gemma without."""
    pieces = ["<unk>", *BYTES, "▁def", "▁", "d", "e", "ef", "▁a", "(", "漢", "▁▁", "\n"]
    vocabulary = {piece: id for id, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def unigram() -> Tokenizer:
    """As T5 and XLM-R: Metaspace drops the first space."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.train_from_iterator(TEXT, trainers.UnigramTrainer(vocab_size=40, unk_token="<unk>", show_progress=False))
    return tokenizer


def unigram_with_bytes() -> Tokenizer:
    """SentencePiece's Unigram that falls back to bytes."""
    pieces = [("<unk>", 0.0), *((each, -9.0) for each in BYTES), ("▁def", -1.0), ("▁", -2.0), ("de", -3.0), ("f", -3.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return tokenizer


def word_piece() -> Tokenizer:
    """As BERT: what is no continuation gets a space, but for the first."""
    words = ["[UNK]", "def", "##ault", "##s", "a", ".", ",", "add", "n", "'", "t", "##.", "do"]
    tokenizer = Tokenizer(models.WordPiece({word: id for id, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def words() -> Tokenizer:
    """Without a decoder: words with spaces between them."""
    return Tokenizer(models.WordLevel({word: id for id, word in enumerate(["<unk>", "def", "a", "b"])}, "<unk>"))


def end_of_word() -> Tokenizer:
    """As GPT-1: a token has a space behind it, but for the last."""
    pieces = ["<unk>", "de", "f</w>", "a</w>", "b", "c</w>"]
    tokenizer = Tokenizer(models.BPE({piece: id for id, piece in enumerate(pieces)}, [], unk_token="<unk>"))
    tokenizer.decoder = decoders.BPEDecoder()
    return tokenizer


def repeats() -> Tokenizer:
    """As CTC: a token counts once until another comes."""
    tokenizer = Tokenizer(models.WordLevel({word: id for id, word in enumerate(["<pad>", "|", "a", "b"])}, "<pad>"))
    tokenizer.decoder = decoders.CTC()
    return tokenizer


KINDS = {
    "byte level": byte_level,
    "byte fallback": byte_fallback,
    "byte fallback, strip": lambda: byte_fallback(decoders.Strip(" ", 1, 0)),
    "byte fallback, strip two": lambda: byte_fallback(decoders.Strip(" ", 2, 0)),
    "byte fallback, and a replacement at the end": lambda: byte_fallback(decoders.Replace("ef", "f")),
    "unigram": unigram,
    "unigram with bytes": unigram_with_bytes,
    "word piece": word_piece,
    "words": words,
    "end of word": end_of_word,
    "repeats": repeats,
}


@functools.cache
def made(kind: str) -> Tokenizer:
    """A tokenizer, with special tokens, one of which stands in the midst of the vocabulary, and an added word."""
    tokenizer = KINDS[kind]()
    tokenizer.add_special_tokens(["<s>", "</s>", "<unk>"])
    tokenizer.add_tokens([AddedToken("añadido", normalized=False)])
    return tokenizer


def gpt2_letters() -> list[str]:
    """The letter of each byte, as GPT-2's encoder has them."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte if byte in printable else 256 + others.index(byte)) for byte in range(256)]
