"""Data sets of the Hugging Face ``datasets`` library."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import Field

from penstock.core.errors import DataError, UsageError, nearest
from penstock.data.corpora.records import Record, Records
from penstock.policy import policy


@policy("data.corpus", "hf")
class HuggingFace(Records):
    """The string in ``field`` of each row of a data set: a folder that ``save_to_disk`` wrote, or a name on the hub.

    ``subset`` and ``split`` choose a part, ``revision`` a version on the hub. With ``streaming`` the rows come over the
    network as they are read, each time that the corpus is read, and nothing is stored but the tokens; without it the
    data set is downloaded first, into the library's cache. Needs the extra ``hf`` (``pip install 'penstock[hf]'``). A
    document is named after its split and row, counted from 0.
    """

    path: str = Field(examples=["org/name"])
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    streaming: bool = False

    def records(self, only: str | None = None) -> Iterator[Record | DataError]:
        for i, row in enumerate(self._rows(self._open(), only)):
            yield Record(f"{self.split}:{i}", f"{self.path}, row {i} of {self.split}", row)

    @classmethod
    def example(cls, folder: Path, texts: Sequence[str]) -> Self:
        import datasets

        datasets.Dataset.from_dict({"body": list(texts), "text": ["another"] * len(texts)}).save_to_disk(folder / "set")
        return cls(path=str(folder / "set"), field="body")

    def _open(self) -> Any:
        try:
            import datasets
        except ImportError as error:
            raise UsageError(
                "Hugging Face data sets need the library 'datasets'", hint="Install it: pip install 'penstock[hf]'"
            ) from error
        try:
            if was_saved(Path(self.path)):
                found = datasets.load_from_disk(self.path)
            else:
                options = {"split": self.split, "revision": self.revision, "streaming": self.streaming}
                found = datasets.load_dataset(self.path, self.subset, **options)
        except Exception as error:  # the library and the network raise what they like
            raise DataError(
                f"the data set {self.path!r} (split {self.split!r}) cannot be loaded: {error}",
                hint="Check its name, subset and split, and the network; or give a folder that save_to_disk wrote.",
            ) from error
        if isinstance(found, dict):
            if self.split not in found:
                raise UsageError(f"{self.path} has no split {self.split!r}: {nearest(self.split, found)}")
            return found[self.split]
        return found

    def _rows(self, found: Any, only: str | None) -> Iterator[Any]:
        try:
            # Only the column that is wanted is decoded: images and sounds beside it stay as they are.
            yield from found if only is None else found.select_columns([only.split(".")[0]])
        except Exception as error:
            raise DataError(f"the data set {self.path!r} cannot be read: {error}") from error


def was_saved(path: Path) -> bool:
    """Whether ``save_to_disk`` wrote the folder."""
    return any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json", "state.json"))
