"""Parquet files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import Field

from penstock.core.errors import DataError, nearest
from penstock.core.files import explain_os_errors
from penstock.data.corpora.files import source_files
from penstock.data.corpora.records import Record, Records
from penstock.policy import policy

#: Rows decoded at a time (few, because one may be a whole book), and bytes read at a time.
ROWS = 64
BUFFER_BYTES = 1 << 20


@policy("data.corpus", "parquet")
class Parquet(Records):
    """The strings of the column ``field`` in a ``.parquet`` file, or in all those below a folder, a few rows at a time.

    ``meta.text`` is the field ``text`` of a column ``meta`` of structures. Empty and null strings are left out. A
    document is named after its file and row, counted from 0.
    """

    suffixes: ClassVar[tuple[str, ...]] = (".parquet",)

    path: Path = Field(examples=["texts"])

    def records(self, only: str | None = None) -> Iterator[Record | DataError]:
        import pyarrow

        for path in source_files(self.path, self.suffixes):
            name = path.name if path == self.path else path.relative_to(self.path).as_posix()
            row = 0
            try:
                with explain_os_errors(f"cannot read {path}"), self._open(path, only) as file:
                    columns = None if only is None else [only]
                    for batch in file.iter_batches(batch_size=ROWS, columns=columns, use_threads=False):
                        for record in batch.to_pylist():
                            yield Record(f"{name}:{row}", f"{path}, row {row}", record)
                            row += 1
            except pyarrow.ArrowException as error:
                yield DataError(f"{path}, near row {row}, cannot be decoded: {error}")
            except DataError as fault:
                yield fault

    def size(self) -> int:
        total = 0
        for path in source_files(self.path, self.suffixes):
            with self._open(path, self.field) as file:
                groups = (file.metadata.row_group(i) for i in range(file.metadata.num_row_groups))
                columns = (group.column(i) for group in groups for i in range(group.num_columns))
                total += sum(c.total_uncompressed_size for c in columns if c.path_in_schema == self.field)
        return total

    @classmethod
    def example(cls, folder: Path, texts: Sequence[str]) -> Self:
        import pyarrow
        from pyarrow import parquet

        half = len(texts) // 2
        for name, part in (("a", texts[:half]), ("b", texts[half:])):
            table = pyarrow.table({"body": list(part), "text": ["another"] * len(part)})
            parquet.write_table(table, folder / f"{name}.parquet", row_group_size=2)
        return cls(path=folder, field="body")

    def _open(self, path: Path, only: str | None) -> Any:
        import pyarrow
        from pyarrow import parquet

        try:
            # Read through a small buffer; by default, whole row groups are read ahead into memory.
            file = parquet.ParquetFile(path, buffer_size=BUFFER_BYTES, pre_buffer=False)
        except pyarrow.ArrowException as error:
            raise DataError(f"{path} is not a Parquet file: {error}") from error
        if only is not None:
            _require_text(file, path, only)
        return file


def _require_text(file: Any, path: Path, column: str) -> None:
    """Closes the ``file`` and raises where the column is not there, or is not of strings."""
    import pyarrow

    kind: Any = file.schema_arrow
    for part in [column] if column in kind.names else column.split("."):
        names = [field.name for field in kind] if hasattr(kind, "names") or pyarrow.types.is_struct(kind) else []
        if part not in names:
            file.close()
            raise DataError(f"{path} has no column {column!r}: {nearest(part, names)}")
        kind = kind.field(part).type
    plain = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    if plain not in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()):
        file.close()
        raise DataError(f"{path}: the column {column!r} is of type {kind}, not string")
