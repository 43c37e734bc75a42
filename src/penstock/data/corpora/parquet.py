"""Parquet files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import Field

from penstock.core.errors import DataError, nearest
from penstock.core.files import explain_os_errors
from penstock.data.corpora.contract import Corpus, Document, source_files
from penstock.policy import policy

#: Rows decoded at a time (few, because one may be a whole book), and bytes read at a time.
ROWS = 64
BUFFER_BYTES = 1 << 20


@policy("data.corpus", "parquet")
class Parquet(Corpus):
    """The strings of ``column`` in a ``.parquet`` file, or in all those below a folder, read a few rows at a time.

    Empty and null strings are left out. A document is named after its file and row, counted from 0.
    """

    suffixes: ClassVar[tuple[str, ...]] = (".parquet",)

    path: Path = Field(examples=["texts"])
    column: str = "text"

    def documents(self) -> Iterator[Document]:
        import pyarrow

        for path in source_files(self.path, self.suffixes):
            name = path.name if path == self.path else path.relative_to(self.path).as_posix()
            row = 0
            with explain_os_errors(f"cannot read {path}"), self._open(path) as file:
                try:
                    for batch in file.iter_batches(batch_size=ROWS, columns=[self.column], use_threads=False):
                        for text in batch.column(0).to_pylist():
                            if text:
                                yield Document(f"{name}:{row}", text)
                            row += 1
                except pyarrow.ArrowException as error:
                    raise DataError(f"{path}, near row {row}, cannot be decoded: {error}") from error

    def size(self) -> int:
        total = 0
        for path in source_files(self.path, self.suffixes):
            with self._open(path) as file:
                groups = (file.metadata.row_group(i) for i in range(file.metadata.num_row_groups))
                columns = (group.column(i) for group in groups for i in range(group.num_columns))
                total += sum(c.total_uncompressed_size for c in columns if c.path_in_schema == self.column)
        return total

    @classmethod
    def example(cls, folder: Path, texts: Sequence[str]) -> Self:
        import pyarrow
        from pyarrow import parquet

        half = len(texts) // 2
        for name, part in (("a", texts[:half]), ("b", texts[half:])):
            table = pyarrow.table({"body": list(part), "text": ["another"] * len(part)})
            parquet.write_table(table, folder / f"{name}.parquet", row_group_size=2)
        return cls(path=folder, column="body")

    def _open(self, path: Path) -> Any:
        import pyarrow
        from pyarrow import parquet

        try:
            # Read through a small buffer; by default, whole row groups are read ahead into memory.
            file = parquet.ParquetFile(path, buffer_size=BUFFER_BYTES, pre_buffer=False)
        except pyarrow.ArrowException as error:
            raise DataError(f"{path} is not a Parquet file: {error}") from error
        names = file.schema_arrow.names
        if self.column not in names:
            file.close()
            raise DataError(f"{path} has no column {self.column!r}: {nearest(self.column, names)}")
        kind = file.schema_arrow.field(self.column).type
        plain = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
        if plain not in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()):
            file.close()
            raise DataError(f"{path}: the column {self.column!r} is of type {kind}, not string")
        return file
