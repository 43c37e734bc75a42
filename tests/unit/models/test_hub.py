"""Model folders: finding, reading, refusing and writing them."""

from __future__ import annotations

import contextlib
import json
import pickle
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import tokenizers
import torch
from huggingface_hub.utils import filter_repo_objects
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from durability import durable
from penstock.core.errors import DataError, ModelError, PenstockError, UsageError
from penstock.models import hub
from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder
from penstock.models.hub import folders
from penstock.testing.transformers_peer import peer, published

SHAPE = DecoderConfig(vocabulary=31, hidden=16, layers=2, heads=4, kv_heads=2, head_dim=4, ffn=20, context=32)


def tiny(**changes: Any) -> Decoder:
    return Decoder(DecoderConfig.model_validate(SHAPE.model_dump() | changes)).initialize(0)


def same(one: Decoder, other: Decoder) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in one.state_dict().items())


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Rewrites a JSON file."""
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Rewrites the tensors of an unsharded folder."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    hub.save(tiny(), tmp_path / "model-folder")
    return tmp_path / "model-folder"


# Which folder.


def test_a_folder_resolves_to_itself(folder: Path) -> None:
    assert hub.resolve(folder) == hub.resolve(str(folder)) == folder


def test_a_model_is_called_by_its_folder_or_as_it_was_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir(exist_ok=True)
    assert hub.name_of(str(folder)) == hub.name_of(f"{folder}/") == folder.name
    monkeypatch.chdir(folder)
    assert hub.name_of(".") == folder.name
    assert hub.name_of("python-6m") == "python-6m"
    assert hub.name_of("org/name") == "org/name"


def test_a_run_resolves_to_its_newest_checkpoint_and_then_to_its_model(tmp_path: Path) -> None:
    for name in ("step-00000100", "step-00000020", "step-1000000000", "step-zzz", ".step-2000000000.partial"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    with pytest.raises(UsageError, match="there is no model in"):
        hub.resolve(tmp_path)
    for name in ("step-00000100", "step-00000020", "step-zzz", ".step-2000000000.partial"):
        (tmp_path / "checkpoints" / name / "config.json").write_text("{}")
    assert hub.resolve(tmp_path) == tmp_path / "checkpoints" / "step-00000100"
    (tmp_path / "checkpoints" / "step-1000000000" / "config.json").write_text("{}")
    assert hub.resolve(tmp_path) == tmp_path / "checkpoints" / "step-1000000000"
    hub.save(tiny(), tmp_path / "model")
    assert hub.resolve(tmp_path) == tmp_path / "model"


def test_boxed_models(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By bare name, unless a folder here has that name."""
    monkeypatch.setattr(folders, "BOXED", folder.parent)
    assert hub.resolve(folder.name) == folder
    with pytest.raises(UsageError, match="did you mean 'model-folder'"):
        hub.resolve("model-foldr")
    (tmp_path / "here" / folder.name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UsageError, match=r"neither config\.json nor"):
        hub.resolve(folder.name)


def test_a_hub_name_is_downloaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(name: str, *, allow_patterns: list[str]) -> str:
        asked.append(name)
        listed = ["config.json", "generation_config.json", "model.safetensors.index.json", "chat_template.jinja"]
        listed += ["model-00001-of-00002.safetensors", "tokenizer.json", "tokenizer.model", "merges.txt", "vocab.json"]
        useless = ["consolidated.safetensors", "pytorch_model.bin", "original/consolidated.00.pth", "README.md"]
        assert list(filter_repo_objects(listed + useless, allow_patterns=allow_patterns)) == listed
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert same(hub.load("org/name-1.5_b"), tiny())
    assert asked == ["org/name-1.5_b"]


def test_a_hub_name_without_a_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The real client, told to be offline, with an empty cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UsageError, match="no folder org/name here, and the Hugging Face hub") as caught:
        hub.resolve("org/name")
    assert "spelling and the network" in caught.value.hint


@pytest.mark.parametrize("name", ["nothing", "./nothing", "a/b/c", "/nothing/at/all", "", "x" * 5000, "nul\0"])
def test_no_such_model(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PenstockError, match="model"):
        hub.resolve(name)


def test_a_file_is_no_model(folder: Path) -> None:
    with pytest.raises(UsageError, match="is a file"):
        hub.load(folder / "model.safetensors")


# What is wrong with it.


def test_config_errors(folder: Path) -> None:
    path = folder / "config.json"
    original = path.read_text()
    for change, message in (
        (
            {"model_type": "ours"},
            "model_type 'ours' is not supported\nIts weights are those of 'llama': if it computes",
        ),
        ({"model_type": ["llama"]}, "model_type"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "quantized, it says, but none has a qweight"),
        ({"hidden_act": "relu"}, "hidden_act 'relu'"),
        ({"torch_dtype": "int8"}, "dtype 'int8'"),
    ):
        path.write_text(json.dumps(json.loads(original) | change))
        with pytest.raises(ModelError, match=message) as caught:
            hub.load(folder)
        assert str(path) in str(caught.value)
    for text, message in (("{", "not valid JSON"), ("[1]", "not a table"), ("{}", "model_type None")):
        path.write_text(text)
        with pytest.raises(PenstockError, match=message):
            hub.load(folder)
    path.unlink()
    with pytest.raises(UsageError, match=r"config\.json does not exist"):
        hub.read_config(folder)


def _drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.1.self_attn.k_proj.weight"]


def _add(tensors: dict[str, torch.Tensor]) -> None:
    for layer in range(5):
        tensors[f"model.layers.{layer}.self_attn.q_norm.weight"] = torch.ones(4)


def _reshape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.ones(19, 16)


def _transpose(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.ones(16, 20)


def _integers(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = torch.ones(16, dtype=torch.int64)


def _eighths(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_drop, r"lacks model\.layers\.1\.self_attn\.k_proj\.weight"),
        (_add, r"also has model\.layers\.0\.self_attn\.q_norm\.weight, .* and 2 more"),
        (_reshape, r"mlp\.up_proj\.weight in .*model\.safetensors is \[19, 16\], but config.json implies \[20, 16\]"),
        (_transpose, r"is \[16, 20\]"),
        (_integers, r"model\.norm\.weight in .* holds I64"),
        (_eighths, r"lm_head\.weight in .* holds F8_E4M3"),
    ],
)
def test_tensors_that_do_not_fit(damage: Callable[[dict[str, torch.Tensor]], None], message: str, folder: Path) -> None:
    rewrite(folder, damage)
    with pytest.raises(ModelError, match=message):
        hub.load(folder)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sound") / "model"
    hub.save(tiny(), path)
    return path


@given(share=st.floats(0, 1, exclude_max=True))
def test_truncated_at_any_byte(share: float, sound: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    whole = (sound / "model.safetensors").read_bytes()
    cut = tmp_path_factory.mktemp("cut")
    (cut / "config.json").write_text((sound / "config.json").read_text())
    (cut / "model.safetensors").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ModelError, match=r"model\.safetensors is truncated or no safetensors file"):
        hub.load(cut)


@given(data=st.data())
def test_a_damaged_header_is_an_error_for_people(
    data: st.DataObject, sound: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    contents = bytearray((sound / "model.safetensors").read_bytes())
    header = 8 + int.from_bytes(contents[:8], "little")
    contents[data.draw(st.integers(0, header - 1))] ^= data.draw(st.integers(1, 255))
    damaged = tmp_path_factory.mktemp("damaged")
    (damaged / "config.json").write_text((sound / "config.json").read_text())
    (damaged / "model.safetensors").write_bytes(contents)
    try:
        decoder = hub.load(damaged)
    except ModelError:
        return
    # Damage to the padding, to the metadata or to the order of the tensors leaves a model of the right shape.
    assert decoder.config == SHAPE


def test_shards_that_are_missing_or_overlap(tmp_path: Path) -> None:
    path = tmp_path / "model"
    hub.save(tiny(), path, shard_bytes=2000)
    shards = sorted(path.glob("*.safetensors"))
    assert len(shards) > 2
    duplicate = load_file(shards[0]) | load_file(shards[1])
    save_file(duplicate, shards[0])
    with pytest.raises(ModelError, match=f"is in {shards[0].name} and again in .*{shards[1].name}"):
        hub.load(path)
    shards[1].unlink()
    with pytest.raises(ModelError, match=rf"index\.json names {shards[1].name}, which is missing"):
        hub.load(path)
    for contents in ("{}", "[]", '{"weight_map": {}}', '{"weight_map": "x"}', '{"weight_map": {"a": 3}}'):
        (path / "model.safetensors.index.json").write_text(contents)
        with pytest.raises(ModelError, match="index"):
            hub.load(path)


class _Trap:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


def test_pickles_are_never_opened(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="has no weights"):
        hub.load(folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Trap(tmp_path / "sprung")))
    with pytest.raises(ModelError, match=r"pytorch_model\.bin only, a pickle, which is never read"):
        hub.load(folder)
    assert not (tmp_path / "sprung").exists()


def test_old_frequencies_are_ignored(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}))
    assert same(hub.load(folder), tiny())


def test_a_head_beside_a_tied_embedding(tmp_path: Path) -> None:
    """Left out when saving; when loading accepted if it is the embedding, refused if it is another matrix."""
    path = tmp_path / "model"
    hub.save(tiny(tied=True), path)
    assert "lm_head.weight" not in load_file(path / "model.safetensors")
    decoder = hub.load(path)
    assert decoder.head.weight is decoder.embedding.weight
    rewrite(path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert same(hub.load(path), tiny(tied=True))
    rewrite(path, lambda t: t["lm_head.weight"].add_(1))
    with pytest.raises(ModelError, match=r"lm_head\.weight in .* differs from the embedding"):
        hub.load(path)


# In.


def test_dtype_is_the_one_asked_for_or_stated_or_stored(folder: Path) -> None:
    config = folder / "config.json"
    assert hub.load(folder).norm.weight.dtype == torch.float32
    assert hub.load(folder, dtype=torch.float64).norm.weight.dtype == torch.float64
    edit(config, lambda hub: hub.update(torch_dtype="bfloat16"))
    loaded = hub.load(folder)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert same(loaded, tiny().to(torch.bfloat16))
    assert loaded.rotary[0].frequencies.dtype == torch.float32
    edit(config, lambda hub: hub.update(dtype="float16"))
    assert hub.load(folder).norm.weight.dtype == torch.float16
    edit(config, lambda hub: (hub.pop("dtype"), hub.pop("torch_dtype")))
    assert hub.load(folder).norm.weight.dtype == torch.float32


MEASURE = """
import sys, torch
from pathlib import Path
from penstock.models import hub

def memory(which):  # from /proc, since getrusage's peak counts the parent too
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(which))

torch.set_num_threads(1)
before = memory("VmRSS")
decoder = hub.load(sys.argv[1])
print(memory("VmHWM") - before)
assert all(bool((p == 1).all()) for p in decoder.parameters())
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to measure memory")
def test_loading_takes_the_memory_of_the_model_and_one_shard(tmp_path: Path) -> None:
    config = DecoderConfig(vocabulary=512, hidden=512, layers=10, heads=8, kv_heads=4, head_dim=64, ffn=1536)
    decoder, shard = Decoder(config), 12_000_000
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.fill_(1)
    hub.save(decoder, tmp_path / "model", shard_bytes=shard)
    size = 4 * decoder.parameter_count()
    assert size > 100e6
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 8
    run = subprocess.run([sys.executable, "-c", MEASURE, tmp_path / "model"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert size < int(run.stdout) < size + shard + 12e6


def test_import_in_place(folder: Path) -> None:
    """Importing keeps the parameters that an optimizer holds."""
    decoder, before = tiny(), tiny()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.zero_()
    held = list(decoder.parameters())
    hub.import_state(decoder, folder)
    assert same(decoder, before)
    assert all(one is other for one, other in zip(held, decoder.parameters(), strict=True))


def test_importing_another_model_is_refused(folder: Path) -> None:
    decoder = tiny(window=3, layers=3)
    before = {name: tensor.clone() for name, tensor in decoder.state_dict().items()}
    with pytest.raises(ModelError, match="differ in layers, sparse, window"):
        hub.import_state(decoder, folder)
    rewrite(folder, _drop)
    with pytest.raises(ModelError, match="lacks"):
        hub.import_state(tiny(), folder)
    assert all(torch.equal(tensor, before[name]) for name, tensor in decoder.state_dict().items())


# Out.


@pytest.mark.parametrize("limit", [1, 3000, 10**9])
def test_shards(limit: int, tmp_path: Path) -> None:
    decoder, path = tiny(), tmp_path / "model"
    hub.save(decoder, path, shard_bytes=limit, dtype=torch.bfloat16)
    files = sorted(path.glob("*.safetensors"))
    sizes = [[t.nbytes for t in load_file(file).values()] for file in files]
    assert all(len(tensors) == 1 or sum(tensors) <= limit for tensors in sizes)
    if len(files) == 1:
        assert files[0].name == "model.safetensors"
        assert not (path / "model.safetensors.index.json").exists()
    else:
        assert [file.name for file in files] == [
            f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)
        ]
        index = json.loads((path / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(map(sum, sizes)) == 2 * decoder.parameter_count()
        assert index["weight_map"] == {name: file.name for file in files for name in load_file(file)}
    assert same(hub.load(path), tiny().to(torch.bfloat16))
    reference = published(path)
    assert reference.dtype == torch.bfloat16
    assert torch.equal(reference.lm_head.weight, decoder.head.weight.to(torch.bfloat16))


def test_token_ids_survive_and_are_not_invented(tmp_path: Path) -> None:
    """transformers gives Llama the ids 1 and 2 where config.json is silent."""
    peer("llama", bos_token_id=5, eos_token_id=[6, 7]).save_pretrained(tmp_path / "theirs")
    hub.save(hub.load(tmp_path / "theirs"), tmp_path / "ours")
    config = published(tmp_path / "ours").config
    assert (config.bos_token_id, config.eos_token_id) == (5, [6, 7])
    hub.save(tiny(), tmp_path / "new")
    config = published(tmp_path / "new").config
    assert config.bos_token_id is config.eos_token_id is None


def test_family_is_the_one_asked_for_or_loaded_from_or_the_first_that_fits(tmp_path: Path) -> None:
    hub.save(tiny(), tmp_path / "as-mistral", family="mistral")
    loaded = hub.load(tmp_path / "as-mistral")
    assert hub.family_of(loaded).policy_name == "mistral"
    assert hub.family_of(loaded, "llama").policy_name == "llama"
    assert hub.family_of(tiny()).policy_name == "llama"
    assert hub.family_of(tiny(window=3)).policy_name == "mistral"
    assert hub.family_of(tiny(qkv_bias=True)).policy_name == "qwen2"
    assert hub.family_of(tiny(qk_norm=True, window=2, windowed_layers=(1,))).policy_name == "qwen3"
    moe = {"experts": 4, "ffn": 8}
    assert hub.family_of(tiny(moe=moe)).policy_name == "mixtral"
    assert hub.family_of(tiny(qk_norm=True, moe=moe | {"dense_layers": (0,)})).policy_name == "qwen3_moe"
    with pytest.raises(UsageError, match="did you mean 'llama'"):
        hub.family_of(loaded, "lama")
    with pytest.raises(ModelError, match=r"as llama, qk_norm; .*as qwen3, mlp_bias"):
        hub.save(tiny(qk_norm=True, mlp_bias=True), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_saving_into_an_existing_folder(tmp_path: Path) -> None:
    """Adds its files to what is there, and never mixes with another model."""
    (tmp_path / "trainer.json").write_text("{}")
    with durable() as placed:
        hub.save(tiny(), tmp_path, shard_bytes=3000)
    assert placed[-1] == tmp_path / "config.json"  # without which the folder is no model
    assert (tmp_path / "trainer.json").read_text() == "{}"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert same(hub.load(tmp_path), tiny())
    with pytest.raises(UsageError, match=r"already holds a model \(config\.json\)"):
        hub.save(tiny(), tmp_path)


def test_a_save_that_is_cut_short_is_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder that exists, config.json comes last, so that whatever stops the process leaves no half of a model."""
    replace, moved = Path.replace, []

    def record(path: Path, target: Path) -> Path:
        if target.parent == tmp_path:
            with pytest.raises(UsageError, match="there is no model"):
                hub.resolve(tmp_path)
            moved.append(target.name)
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", record)
    hub.save(tiny(), tmp_path, shard_bytes=3000)
    assert moved[-1] == "config.json"
    assert len(moved) > 3


@contextlib.contextmanager
def small_files() -> Iterator[None]:
    """The system refuses to write beyond 4 kB of a file, as it does on a full disk.

    Not a fixture: the limit would hold while the report of the test is written, to a file perhaps.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    for target in (tmp_path / "new", tmp_path):
        with pytest.raises(PenstockError, match=r"cannot write .*model\.safetensors"), small_files():
            hub.save(tiny(), target)
        assert not list(tmp_path.iterdir())


# The tokenizer beside it.


def test_tokenizer(folder: Path) -> None:
    with pytest.raises(DataError, match="has no tokenizer"):
        hub.load_tokenizer(folder)
    model = tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?")
    words = tokenizers.Tokenizer(model)
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="?").save_pretrained(folder)
    loaded = hub.load_tokenizer(str(folder))
    assert loaded.encode("b a c") == [1, 0, 2]
    assert loaded.eos_token_id == 2
    assert hub.end_tokens(folder, loaded) == {2}
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    (folder / "config.json").write_text(
        json.dumps(json.loads((folder / "config.json").read_text()) | {"eos_token_id": 9})
    )
    assert hub.end_tokens(folder, loaded) == {2, 7, 9}
    (folder / "tokenizer.json").write_text('{"model"')
    with pytest.raises(DataError, match="cannot be read"):
        hub.load_tokenizer(folder)
