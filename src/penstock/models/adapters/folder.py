"""A folder of an adapter as a model folder: what lies beside the base's weights, and an index that names both."""

from __future__ import annotations

import hashlib
from pathlib import Path

from penstock.core.files import atomic_folder, cache_folder, read_json, write_json
from penstock.models.adapters import peft
from penstock.models.companions import companions, copy_companions
from penstock.models.families.mapping import as_classifier

#: The file that names the folders of base and adapter.
INDEX = "adapter.json"


def folder_of(adapter: Path, base: Path) -> Path:
    """The model folder of an ``adapter`` on the model folder ``base``, in the user's cache: the weights stay where they
    are. With a reward model's adapter it is that of a sequence classifier. Of a file that both have beside their
    weights, the adapter's counts.

    Raises:
        PenstockError: a file cannot be read, or the folder not be written.
    """
    adapter, base = adapter.resolve(), base.resolve()
    files = [base / "config.json", *(folder / name for folder in (base, adapter) for name in companions(folder))]
    judges = peft.judges(adapter)
    stamps = [str(judges)] + [f"{path} {path.stat().st_mtime_ns} {path.stat().st_size}" for path in files]
    digest = hashlib.blake2b("\n".join([str(adapter), str(base), *stamps]).encode(), digest_size=12).hexdigest()
    target = cache_folder("adapters") / digest
    if not target.exists():
        with atomic_folder(target) as folder:
            config = read_json(base / "config.json")
            write_json(folder / "config.json", as_classifier(config) if judges else config)
            for source in (base, adapter):
                copy_companions(source, folder)
            write_json(folder / INDEX, {"adapter": str(adapter), "base": str(base)})
    return target
