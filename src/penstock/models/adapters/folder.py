"""A folder of an adapter as a model folder: what lies beside the base's weights, and an index that names both."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from penstock.core.files import atomic_folder, cache_folder, write_json
from penstock.models.companions import companions, copy_companions

#: The file that names the folders of base and adapter.
INDEX = "adapter.json"


def folder_of(adapter: Path, base: Path) -> Path:
    """The model folder of an ``adapter`` on the model folder ``base``, in the user's cache: the weights stay where they
    are. Of a file that both have beside their weights, the adapter's counts.

    Raises:
        PenstockError: a file cannot be read, or the folder not be written.
    """
    adapter, base = adapter.resolve(), base.resolve()
    files = [base / "config.json", *(folder / name for folder in (base, adapter) for name in companions(folder))]
    stamps = [f"{path} {path.stat().st_mtime_ns} {path.stat().st_size}" for path in files]
    digest = hashlib.blake2b("\n".join([str(adapter), str(base), *stamps]).encode(), digest_size=12).hexdigest()
    target = cache_folder("adapters") / digest
    if not target.exists():
        with atomic_folder(target) as folder:
            shutil.copyfile(base / "config.json", folder / "config.json")
            for source in (base, adapter):
                copy_companions(source, folder)
            write_json(folder / INDEX, {"adapter": str(adapter), "base": str(base)})
    return target
