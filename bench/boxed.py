"""The models in the box: bits per byte on held-out files of the standard library, beside xz -9 on each of them."""

from __future__ import annotations

import functools

import numpy as np
import torch

from penstock.core.bench import Bench
from penstock.data.building import is_held_out
from penstock.data.corpora.stdlib import StandardLibrary
from penstock.models import hub
from penstock.train.evaluate import bits_per_byte, xz_bits_per_byte


class HeldOut:
    """The documents that the presets ``python-6m`` and ``python-1m`` hold out, as token ids; nothing is put before."""

    prefix = 0

    def __init__(self, texts: list[str], tokenizer: object) -> None:
        encoded = tokenizer(texts)["input_ids"]
        self._ids = [[*ids, tokenizer.eos_token_id] for ids in encoded]
        self.documents = len(texts)
        self.tokens = sum(len(ids) for ids in self._ids)
        self.bytes = sum(len(text.encode()) for text in texts)

    def document(self, index: int) -> np.ndarray:
        """Token ids of a document and the end-of-text token."""
        return np.array(self._ids[index])


def main(bench: Bench) -> None:
    """Measures both models on the device of ``bench``."""
    texts = [d.text for d in StandardLibrary(tests=True).documents() if is_held_out(d.text, 0.05)]
    texts = texts[:5] if bench.quick else texts
    xz = functools.cache(lambda: xz_bits_per_byte([text.encode() for text in texts]))
    for name in ("python-6m", "python-1m"):
        model = hub.load(name, device=bench.device, dtype=torch.float32).eval()
        documents = HeldOut(texts, hub.load_tokenizer(name))
        measured = functools.cache(
            functools.partial(bits_per_byte, model, documents, window=model.config.context, rows=4)
        )
        bench.compare(
            subject=name,
            peer="xz -9",
            setting=f"{documents.documents} held-out files, {documents.bytes / 1e6:.2f} MB",
            metric="bits per byte",
            unit="bit",
            better="lower",
            run=measured,
            peer_run=xz,
            repetitions=1,
        )
