"""A model whose layers stay on disk: the same bits as in memory, no more bytes than allowed, and files that go away."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.core.errors import UsageError
from penstock.models import hub
from penstock.models.attention import CausalRows
from penstock.models.config import DecoderConfig, MoEConfig
from penstock.models.decoder import Decoder
from penstock.models.families.gpt2 import GPT2
from penstock.models.formats.weight_file import LostWeightsError
from penstock.models.streamed import BUFFERS, StreamedLayer, stream_of
from penstock.ops.paged.reference import Reference
from penstock.serve.build import build_engine
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.engine.engine import Engine
from penstock.serve.messages import Request
from penstock.serve.sizing import weight_bytes
from penstock.testing.lanes import Lane, Lanes

SHAPE = DecoderConfig(vocabulary=31, hidden=16, layers=6, heads=4, kv_heads=2, head_dim=4, ffn=20, context=32)
TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3]])

#: Models whose parameters are stored as they are, cast, turned, stacked by experts, and unlike from layer to layer.
KINDS: dict[str, tuple[dict[str, Any], str, torch.dtype]] = {
    "plain": ({}, "llama", torch.float32),
    "cast": ({"tied": False}, "llama", torch.bfloat16),
    "turned": ({**GPT2.fixed, "kv_heads": 4, "unrotated_layers": tuple(range(6))}, "gpt2", torch.float32),
    "experts": ({"moe": MoEConfig(experts=4, ffn=12), "tied": False}, "mixtral", torch.float32),
}


def saved(folder: Path, kind: str = "plain", shard_bytes: int = 5_000) -> Path:
    changes, family, dtype = KINDS[kind]
    model = Decoder(DecoderConfig.model_validate(SHAPE.model_dump() | changes)).initialize(0)
    hub.save(model, folder, family=family, dtype=dtype, shard_bytes=shard_bytes)
    return folder


def streamed(folder: Path, extra: int = 0) -> Decoder:
    """The model with the least memory that it can do with, and so many bytes more."""
    return hub.load_streamed(folder, least(folder) + extra, dtype=torch.float32).eval()


def least(folder: Path) -> int:
    with pytest.raises(UsageError, match="too few") as caught:
        hub.load_streamed(folder, 1, dtype=torch.float32)
    return int(str(caught.value).split("at least ")[1].split(" bytes")[0].replace(",", ""))


def states(model: Decoder, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    with torch.inference_mode():
        return model.logits(model(tokens, CausalRows.of(tokens.shape[1])).hidden)


@pytest.mark.parametrize("kind", KINDS)
def test_passes_have_the_bits_of_a_model_in_memory(tmp_path, kind):
    folder = saved(tmp_path / "model", kind)
    whole = hub.load(folder, dtype=torch.float32).eval()
    layer = 4 * sum(each.numel() for each in whole.layers[-1].parameters())
    for stay in (0, 2):
        model = streamed(folder, stay * layer + 512)
        assert sum(isinstance(each, StreamedLayer) for each in model.layers) == SHAPE.layers - stay
        for tokens in (TOKENS, TOKENS[:, :3], TOKENS.flip(1)):
            assert torch.equal(states(model, tokens), states(whole, tokens))


def test_layers_may_be_wanted_in_any_order(tmp_path):
    folder = saved(tmp_path / "model")
    whole, model = hub.load(folder).eval(), streamed(folder)
    x = torch.randn(1, 5, SHAPE.hidden, generator=torch.Generator().manual_seed(0))
    context = CausalRows.of(5)
    for number in (0, 1, 5, 4, 4, 0, 3, 5, 0, 2):
        found, wanted = (
            each.layers[number](x, each.rotary(context.positions, x.dtype), context)[0] for each in (model, whole)
        )
        assert torch.equal(found, wanted)


def memory_of(model: Decoder) -> int:
    """Bytes of all memory that the weights have, each counted once, wherever a parameter may lie in it."""
    stream = stream_of(model)
    tensors = [*model.parameters(), *(stream.buffers if stream else ())]
    held = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors if not each.is_meta}
    return sum(held.values())


def frequencies(model: Decoder) -> int:
    """Bytes of what is no weight, and is computed from the configuration."""
    return sum(each.nbytes for each in model.buffers())


@pytest.mark.parametrize("kind", ["plain", "cast", "experts"])
def test_no_more_bytes_are_in_memory_than_allowed_and_as_many_layers_as_fit(tmp_path, kind):
    folder = saved(tmp_path / "model", kind)
    whole = memory_of(hub.load(folder, dtype=torch.float32))
    stayed = []
    for budget in range(least(folder), whole + 1, (whole - least(folder)) // 12):
        model = hub.load_streamed(folder, budget, dtype=torch.float32).eval()
        for _ in range(2):
            states(model)
            assert memory_of(model) <= budget
        stayed.append(sum(not isinstance(each, StreamedLayer) for each in model.layers))
        assert weight_bytes(model) == memory_of(model) + frequencies(model)
    assert stayed == sorted(stayed) and stayed[0] == 0 and stayed[-1] >= SHAPE.layers - BUFFERS - 1
    assert stream_of(hub.load_streamed(folder, whole, dtype=torch.float32)) is None
    with pytest.raises(UsageError, match="too few"):
        hub.load_streamed(folder, least(folder) - 1, dtype=torch.float32)


def test_each_pass_reads_every_layer_on_disk_once(tmp_path):
    folder = saved(tmp_path / "model")
    model = streamed(folder)
    stream = stream_of(model)
    assert stream is not None
    on_disk = sum(each.numel() * 4 for each in hub.load(folder).layers.parameters())
    passes = 4
    for _ in range(passes):
        states(model)
    stream._lane.submit(int).result()  # what was begun is read
    assert stream.read == passes * on_disk + on_disk / SHAPE.layers  # and one layer ahead


@pytest.mark.parametrize(("read", "compute"), [(3.0, 1.0), (1.0, 3.0), (2.0, 2.0), (0.0, 1.0)])
def test_reading_and_computing_overlap(tmp_path, read, compute):
    model = streamed(saved(tmp_path / "model"))
    stream, lanes = stream_of(model), Lanes()
    assert stream is not None
    stream._lane, fill = Lane(lanes, "reads"), stream.fill

    def timed(*args: Any) -> Any:
        lanes.spend(read)
        return fill(*args)

    stream.fill = timed  # type: ignore[method-assign]
    passes = 3
    for layer in [*model.layers] * passes:
        stream.hold(layer)
        lanes.spend(compute)
    # The first is waited for; then each layer takes what takes longer.
    assert lanes.now == read + (passes * SHAPE.layers - 1) * max(read, compute) + compute


def test_only_the_layer_that_computes_has_memory(tmp_path):
    model = streamed(saved(tmp_path / "model"))
    states(model)
    has = [not any(each.is_meta for each in layer.parameters()) for layer in model.layers]
    assert has == [False] * (SHAPE.layers - 1) + [True]


def changed(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size - 4)
        file.write(b"\x00\x00\x00\x00")
    os.utime(path, ns=(1, 1))


def replaced(path: Path) -> None:
    other = path.with_suffix(".new")
    other.write_bytes(path.read_bytes())
    other.rename(path)


def cut_short(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 400)


@pytest.mark.parametrize("harm", [changed, replaced, cut_short, Path.unlink])
def test_a_file_that_does_not_stay_as_it_was_is_one_clear_error(tmp_path, harm):
    folder = saved(tmp_path / "model", shard_bytes=10**9)
    model = streamed(folder)
    states(model)
    harm(folder / "model.safetensors")
    for _ in range(2):  # and stays one
        with pytest.raises(LostWeightsError, match=r"model\.safetensors (has|is gone).* while a model read its layers"):
            states(model)


def test_what_is_not_stored_as_plain_numbers_is_refused(tmp_path):
    hub.save(
        Decoder(SHAPE.model_copy(update={"hidden": 32, "ffn": 32})).initialize(0), tmp_path / "int8", scheme="int8"
    )
    with pytest.raises(UsageError, match="quantized"):
        hub.load_streamed(tmp_path / "int8", 10**9)


@pytest.mark.parametrize("option", [{"tensor_parallel": 2}, {"adapter_slots": 1}, {"kv_disk": "x", "kv_host": "1GB"}])
def test_what_needs_the_whole_model_is_refused(option):
    with pytest.raises(ValueError, match="needs all weights in memory"):
        EngineConfig.model_validate({"resident_weights": "1GB", **option})


def served(model: Decoder, **options: Any) -> Engine:
    config = EngineConfig(attention=Reference(), tokens=16, sequences=4, block_size=4, cache_tokens=200, **options)
    return build_engine(model, config)


def said(engine: Engine) -> list[Any]:
    """What comes of requests of several kinds, with the exact log-probabilities."""
    for number, temperature in enumerate((0.0, 0.8, 0.0)):
        sampling = SamplingParams(temperature=temperature, seed=number, max_tokens=6, logprobs=2, prompt_logprobs=1)
        engine.add(Request(str(number), [1 + number] * (3 + 5 * number), sampling))
    found: list[Any] = []
    while engine.busy:
        found += [(each.id, each.tokens, each.logprobs, each.prompt_logprobs) for each in engine.step()]
    return found


def test_an_engine_says_the_same_with_the_same_bits(tmp_path):
    folder = saved(tmp_path / "model")
    model = streamed(folder)
    engine = served(model)
    assert engine.executor.memory["weights"] == least(folder) + frequencies(model)
    assert said(engine) == said(served(hub.load(folder).eval()))
    engine.control.sleep()
    engine.control.wake()
    assert said(engine) == said(served(hub.load(folder).eval()))
    with pytest.raises(UsageError, match="stay on disk"):
        engine.control.load(folder)


def test_an_engine_whose_bits_do_not_depend_on_the_batch_says_the_same(tmp_path):
    folder = saved(tmp_path / "model")
    options: dict[str, Any] = {"tokens": 16, "sequences": 4, "block_size": 4, "cache_tokens": 200}
    engines = [
        build_engine(each, EngineConfig(deterministic=True, **options))
        for each in (streamed(folder), hub.load(folder).eval())
    ]
    assert said(engines[0]) == said(engines[1])
