"""What a teacher would say in the place of each token that is learnt: asked once, and kept beside the run.

``teacher/`` in a run folder has a ``teacher.json``, and a file a split of records: for each learnt token, in their
order, the teacher's most probable tokens (int32 [K]) and their log-probabilities (float32 [K]). Records are appended:
what was interrupted goes on where that was.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from penstock.core.errors import ConfigError, DataError, PenstockError
from penstock.core.files import explain_os_errors, fsync_file, read_json, write_json
from penstock.core.progress import Reporter
from penstock.data.chats.examples import Examples, ExampleStore
from penstock.data.manifest import SPLITS, SplitName, map_file
from penstock.data.tokenizer import fingerprint, load_tokenizer
from penstock.models import hub
from penstock.models.attention import PackedRows
from penstock.models.decoder import Decoder
from penstock.train.objectives.contract import Teacher

DESCRIPTION = "teacher.json"

#: Requests to a server at a time, and seconds for one.
AT_ONCE, PATIENCE = 16, 600.0

#: What a teacher says of a sequence: its most probable tokens [N, K] behind each of its N tokens, and how probable.
Said = tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]


class Asked(Protocol):
    """A teacher at work."""

    def say(self, sequences: Sequence[npt.NDArray[np.int32]]) -> list[Said]:
        """What it says of each of the ``sequences``."""
        ...


def compute(teacher: Teacher, store: ExampleStore, folder: Path, tokens: int, device: str, report: Reporter) -> None:
    """Asks ``teacher`` of all of ``store``, about so many ``tokens`` at a time, and writes what it says into
    ``folder``, where what is there already is kept.

    Raises:
        ConfigError: the folder has what another teacher said, or of other data; or the teacher has another tokenizer.
        PenstockError: the teacher cannot be asked.
    """
    described = _described(teacher, store)
    asked: Asked | None = None
    if (folder / DESCRIPTION).is_file():
        _same(folder, described)
    else:
        asked = _asked(teacher, store, device)  # nothing is left of one that cannot be asked
        with explain_os_errors(f"cannot write {folder}"):
            folder.mkdir(exist_ok=True)
        write_json(folder / DESCRIPTION, described)
    for name in SPLITS:
        examples, path = store.split(name), folder / f"{name}.bin"
        first = _begun(path, examples, teacher.top)
        last = examples.count * examples.width
        with report(f"asking the teacher ({name})", last - first, "sequence") as bar:
            for group in _groups(examples, first, last, tokens):
                asked = asked or _asked(teacher, store, device)
                said = asked.say([examples.read(sequence, 1 << 30)[0] for sequence in group])
                records = [_records(*each, examples.read(s, 1 << 30)[1]) for s, each in zip(group, said, strict=True)]
                with explain_os_errors(f"cannot write {path}"), path.open("ab") as file:
                    file.write(np.concatenate(records).tobytes())
                bar.advance(len(group))
        fsync_file(path)


def read(examples: Examples, folder: Path, name: SplitName, top: int) -> dict[str, npt.NDArray[Any]]:
    """What :func:`compute` has written of a split, by the names of a batch's extras.

    Raises:
        DataError: it is not there, or not whole.
    """
    path = folder / f"{name}.bin"
    records, wanted = _mapped(path, top), int(examples.learnt_before[-1])
    if len(records) != wanted:
        raise DataError(
            f"{path} has what the teacher said of {len(records):,} tokens, not of the {wanted:,} that are learnt",
            hint="Start the run again, which asks for the rest, in another folder or with this one empty.",
        )
    return {"teacher_tokens": records["token"], "teacher_logprobs": records["logprob"]}


def record_type(top: int) -> np.dtype[Any]:
    """What is kept of a token."""
    return np.dtype([("token", "<i4", (top,)), ("logprob", "<f4", (top,))])


def _mapped(path: Path, top: int) -> npt.NDArray[Any]:
    there = path.is_file() and path.stat().st_size
    return map_file(path, "u1").view(record_type(top)) if there else np.empty(0, record_type(top))


def _described(teacher: Teacher, store: ExampleStore) -> dict[str, Any]:
    files = [file.model_dump(mode="json") for file in store.manifest.files]
    return {"source": teacher.source, "top": teacher.top, "store": files}


def _same(folder: Path, described: dict[str, Any]) -> None:
    there = read_json(folder / DESCRIPTION)
    for key, wanted in described.items():
        found = there.get(key) if isinstance(there, dict) else None
        if found != wanted:
            what = "of other conversations" if key == "store" else f"with the {key} {found!r}, not {wanted!r}"
            raise ConfigError(
                f"{folder} has what a teacher said {what}",
                hint="Remove that folder, or choose another one for the run.",
            )


def _begun(path: Path, examples: Examples, top: int) -> int:
    """The first sequence that ``path`` lacks; what it has of that one is cut off."""
    size = record_type(top).itemsize
    with explain_os_errors(f"cannot write {path}"):
        path.touch()
        first = int(np.searchsorted(examples.learnt_before, path.stat().st_size // size, side="right")) - 1
        with path.open("r+b") as file:
            file.truncate(int(examples.learnt_before[first]) * size)
    return first


def _groups(examples: Examples, first: int, last: int, tokens: int) -> Iterator[list[int]]:
    """The sequences from ``first`` on, in groups of about so many ``tokens``."""
    group, size = list[int](), 0
    for sequence in range(first, last):
        length = len(examples.read(sequence, 1 << 30)[0])
        if group and size + length > tokens:
            yield group
            group, size = [], 0
        group.append(sequence)
        size += length
    if group:
        yield group


def _records(tokens: npt.NDArray[np.int32], logprobs: npt.NDArray[np.float32], learnt: npt.NDArray[np.bool_]) -> Any:
    """What was said in the places of the tokens that are learnt."""
    places = np.flatnonzero(learnt[1:])
    records = np.empty(len(places), record_type(tokens.shape[1]))
    records["token"], records["logprob"] = tokens[places], logprobs[places]
    return records


def _asked(teacher: Teacher, store: ExampleStore, device: str) -> Asked:
    if teacher.source.startswith(("http://", "https://")):
        return Server(teacher.source.rstrip("/"), _model_of(teacher.source.rstrip("/")), teacher.top)
    return InProcess.opened(teacher, store, device)


class InProcess(NamedTuple):
    """A teacher in this process, of which the first ``vocabulary`` tokens are those of the tokenizer."""

    decoder: Decoder
    top: int
    vocabulary: int

    @classmethod
    def opened(cls, teacher: Teacher, store: ExampleStore, device: str) -> InProcess:
        """The teacher, loaded.

        Raises:
            ConfigError: its tokenizer is another one.
            PenstockError: it cannot be loaded.
        """
        if fingerprint(load_tokenizer(hub.resolve(teacher.source))) != store.manifest.tokenizer:
            raise ConfigError(
                f"the teacher {teacher.source} has another tokenizer than the model",
                hint="What it says of tokens can be learnt only where both mean the same by them.",
            )
        decoder = hub.load_for_inference(teacher.source, device=device)
        if teacher.top > store.manifest.vocabulary:
            raise ConfigError(f"objective.top is {teacher.top}, and there are {store.manifest.vocabulary} tokens")
        return cls(decoder.eval(), teacher.top, store.manifest.vocabulary)

    @torch.no_grad()
    def say(self, sequences: Sequence[npt.NDArray[np.int32]]) -> list[Said]:
        device = self.decoder.like.device
        row = torch.from_numpy(np.concatenate(sequences).astype(np.int64))[None].to(device)
        lengths = torch.tensor([len(each) for each in sequences])
        documents = torch.repeat_interleave(torch.arange(len(sequences)), lengths)[None]
        hidden = self.decoder(row, PackedRows.of(documents).to(device)).hidden[0]
        tokens, logprobs = list[Any](), list[Any]()
        for rows in torch.split(hidden, 1024):
            best = self.decoder.logits(rows)[:, : self.vocabulary].float().log_softmax(-1).topk(self.top)
            tokens.append(best.indices.int().cpu())
            logprobs.append(best.values.cpu())
        pieces = (torch.split(torch.cat(each), lengths.tolist()) for each in (tokens, logprobs))
        return [(ids.numpy(), values.numpy()) for ids, values in zip(*pieces, strict=True)]


class Server(NamedTuple):
    """A teacher at an address, asked by OpenAI's completions with ``prompt_logprobs``, as vLLM has them too."""

    address: str
    model: str
    top: int

    def say(self, sequences: Sequence[npt.NDArray[np.int32]]) -> list[Said]:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(self._of, sequences))

    def _of(self, tokens: npt.NDArray[np.int32]) -> Said:
        asked = {"model": self.model, "prompt": tokens.tolist(), "max_tokens": 1, "prompt_logprobs": self.top}
        told = _request(f"{self.address}/v1/completions", asked)
        try:
            places = told["choices"][0]["prompt_logprobs"][1:]
            best = [sorted((-entry["logprob"], int(token)) for token, entry in place.items()) for place in places]
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise PenstockError(
                f"the teacher {self.address} does not tell prompt_logprobs", hint="Ask penstock serve, or vLLM."
            ) from error
        if len(best) != len(tokens) - 1 or any(len(each) < self.top for each in best):
            raise PenstockError(
                f"the teacher {self.address} does not tell {self.top} log-probabilities for each token",
                hint="Lower objective.top, or raise the server's limit (vLLM: --max-logprobs).",
            )
        # Behind the last token nothing is asked.
        kept = [each[: self.top] for each in best] + [[(0.0, 0)] * self.top]
        ids, values = ([[pair[place] for pair in each] for each in kept] for place in (1, 0))
        return np.array(ids, np.int32), -np.array(values, np.float32)


def _model_of(address: str) -> str:
    """What the server calls its model."""
    told = _request(f"{address}/v1/models")
    try:
        return str(told["data"][0]["id"])
    except (KeyError, IndexError, TypeError) as error:
        raise PenstockError(
            f"{address} names no model at /v1/models", hint="Is it a server of OpenAI's API?"
        ) from error


def _request(address: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    asked = urllib.request.Request(address, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(asked, timeout=PATIENCE) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        said = error.read().decode(errors="replace")[:300]
        raise PenstockError(f"the teacher at {address} answers with {error.code}: {said}") from error
    except (OSError, ValueError) as error:
        raise PenstockError(
            f"the teacher at {address} does not answer: {error}",
            hint="Start it again, and then this run: what the teacher has said already is kept.",
        ) from error
