"""Several adapters in one model: what is added row by row is what merging adds, PEFT reads a folder as we do, and the
model is what it was."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from penstock.core.errors import ModelError, PenstockError, UsageError
from penstock.models import hub
from penstock.models.adapters.slots import AdapterSlots, hook_first, matrices
from penstock.models.attention import CausalRows
from penstock.models.decoder import Decoder
from penstock.models.quantized import QuantizedLinear
from penstock.ops import low_rank
from penstock.ops.attention import PLAIN
from penstock.ops.low_rank import CHUNK, Chunked, Native, Sorted
from penstock.testing.enrolled import enrolled
from penstock.testing.transformers_peer import peer
from tiny_adapters import added, row_by_row, written

FAMILIES = enrolled("model.family")

#: Whose matrices are stacked in ours, whole, or [in, out] on disk; with latent attention; with experts beside it.
QUICK = ("llama", "phi3", "gpt2", "deepseek_v2", "gpt_oss")

EACH = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAMILIES]

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")

TOKENS = torch.arange(3, 17)


class OneText:
    """Tokens [N] of one text."""

    keeps = False
    positions = torch.arange(len(TOKENS))

    def attend(self, layer, query, key, value, *, scale, window, extras=PLAIN):
        rows = CausalRows.of(len(TOKENS))
        return rows.attend(layer, query[None], key[None], value[None], scale=scale, window=window, extras=extras)[0]


@torch.no_grad()
def logits(model: Decoder, slots: AdapterSlots | None = None, slot: int = 0) -> torch.Tensor:
    """Of the text, which has the adapter in ``slot``."""
    if slots is None:
        return model.logits(model.tip(*model.trunk(TOKENS, OneText())))
    owners = torch.full_like(TOKENS, slot)
    return model.logits(slots.tip(*slots.trunk(TOKENS, OneText(), owners=owners), owners=owners))


def alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    """To the fifth digit of the largest score."""
    return bool((one - other).abs().max() <= 1e-5 * other.abs().max())


def opened(model: Decoder, *folders, slots: int = 3, rank: int = 5, targets=()) -> AdapterSlots:
    """``model`` with the adapters of ``folders`` in the slots from 1 on."""
    family = hub.family_of(model)
    room = AdapterSlots(model, family, slots, rank, targets)
    for slot, folder in enumerate(folders, 1):
        room.load(slot, folder)
    return room


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model's."""
    folder = tmp_path_factory.mktemp("base")
    peer("llama").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", EACH)
def test_unmerged_is_merged_for_every_family(name, tmp_path):
    peer(name, **FAMILIES[name].example).save_pretrained(tmp_path)
    model = hub.load(tmp_path)
    before = logits(model)
    adapters = [written(tmp_path / f"a{seed}", model, seed, rank=seed + 2) for seed in range(2)]
    for each in adapters:
        config = json.loads((each / "adapter_config.json").read_text())
        (each / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(tmp_path)}))
    slots = opened(model, *adapters)
    for slot, each in enumerate(adapters, 1):
        merged = logits(hub.load(hub.resolve(each)))
        assert not torch.allclose(merged, before, atol=1e-2), "the adapter does nothing"
        assert alike(logits(model, slots, slot), merged)
    assert torch.equal(logits(model, slots, 0), before)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"target_modules": ["q_proj", "v_proj"]}])
@pytest.mark.parametrize("family", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_what_peft_writes_is_read_as_peft_reads_it(family, options, tmp_path):
    if family == "gpt2" and "target_modules" in options:
        options = {"target_modules": ["c_attn"]}
    peer(family).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = LoraConfig(**{"r": 3, "lora_alpha": 7, "target_modules": "all-linear", **options}, init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    model = hub.load(tmp_path / "base")
    before = logits(model)
    with torch.no_grad():
        wanted = theirs(TOKENS[None]).logits[0]
    slots = opened(model, tmp_path / "adapter")
    assert not torch.allclose(wanted, before, atol=1e-2)
    assert alike(logits(model, slots, 1), wanted)


def test_ranks_by_module_are_peft_s(folder, tmp_path):
    """Its rank pattern changes the scale too."""
    base = AutoModelForCausalLM.from_pretrained(folder)
    options = LoraConfig(r=2, lora_alpha=6, target_modules="all-linear", rank_pattern={"q_proj": 4})
    peft = get_peft_model(base, options)
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    peft.save_pretrained(tmp_path)
    with torch.no_grad():
        wanted = peft(TOKENS[None]).logits[0]
    model = hub.load(folder)
    assert alike(logits(model, opened(model, tmp_path), 1), wanted)


def test_a_model_whose_matrices_stay_quantized_has_adapters_too(tmp_path):
    peer("llama", hidden_size=64, intermediate_size=96, head_dim=16).save_pretrained(tmp_path / "plain")
    hub.save(hub.load(tmp_path / "plain"), tmp_path / "packed", scheme="w4a16")
    packed, plain = hub.load_for_inference(tmp_path / "packed"), hub.load(tmp_path / "packed")
    assert any(isinstance(module, QuantizedLinear) for module in packed.modules())
    adapter = written(tmp_path / "a", plain, 0)
    before = logits(packed)
    wanted, found = (logits(model, opened(model, adapter), 1) for model in (plain, packed))
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()
    assert (before - wanted).abs().max() > 0.1 * wanted.abs().max()


def test_a_slot_that_is_loaded_anew_has_nothing_of_what_was_there(folder, tmp_path):
    model = hub.load(folder)
    large = written(tmp_path / "large", model, 0, rank=5)
    small = written(tmp_path / "small", model, 1, rank=2, wanted=lambda name: name.endswith("q_proj"))
    slots, fresh = opened(model, large), hub.load(folder)
    slots.load(1, small)
    assert torch.equal(logits(model, slots, 1), logits(fresh, opened(fresh, small), 1))


def test_keys_tell_adapters_apart(folder, tmp_path):
    model = hub.load(folder)
    family = hub.family_of(model)
    slots = AdapterSlots(model, family, 2, 4)
    written(tmp_path / "a", model, 0), written(tmp_path / "b", model, 1), written(tmp_path / "same", model, 0)
    written(tmp_path / "scaled", model, 0, lora_alpha=1)
    keys = {name: slots.load(1 + place % 2, tmp_path / name) for place, name in enumerate(("a", "b", "same", "scaled"))}
    assert keys["a"] == keys["same"] and len(set(keys.values())) == 3


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"use_dora": True}, "adapters with use_dora are not supported"),
        ({"modules_to_save": ["lm_head"]}, "adapters with modules_to_save are not supported"),
        ({"bias": "lora_only"}, "without biases are supported"),
        ({"peft_type": "VERA"}, "only adapters of the type LORA"),
    ],
)
def test_kinds_that_are_not_supported_are_refused(folder, tmp_path, change, why):
    model = hub.load(folder)
    with pytest.raises(ModelError, match=why):
        opened(model, written(tmp_path, model, 0, **change))


def test_adapters_of_another_base_are_refused_and_change_nothing(folder, tmp_path):
    model = hub.load(folder)
    peer("llama", hidden_size=48).save_pretrained(tmp_path / "wide")
    wide = written(tmp_path / "a", hub.load(tmp_path / "wide"), 0)
    peer("llama", num_hidden_layers=4).save_pretrained(tmp_path / "deep")
    deep = written(tmp_path / "b", hub.load(tmp_path / "deep"), 0)
    peer("mixtral").save_pretrained(tmp_path / "sparse")
    sparse = hub.load(tmp_path / "sparse")
    dense = written(tmp_path / "c", model, 0)
    good = written(tmp_path / "d", model, 1)
    slots = opened(model, good)
    before = logits(model, slots, 1)
    other = r"adds \[48, 40\] to model.layers.0.mlp.down_proj, which is \[32, 40\] here: it is of another base"
    for each, why in ((wide, other), (deep, r"adds to model.layers.3.\S+, which is none")):
        with pytest.raises(ModelError, match=why):
            slots.load(1, each)
    assert torch.equal(logits(model, slots, 1), before)
    with pytest.raises(ModelError, match="which is none of the matrices of attention and of dense feed-forward"):
        opened(sparse, dense)


def test_what_there_is_no_room_for_is_refused(folder, tmp_path):
    model = hub.load(folder)
    adapter = written(tmp_path / "a", model, 0, rank=6)
    with pytest.raises(UsageError, match="has the rank 6, and there is room for 5"):
        opened(model, adapter)
    with pytest.raises(UsageError, match="for which no room is kept"):
        opened(model, adapter, rank=6, targets=["q_proj"])


def test_folders_are_found(folder, tmp_path):
    model = hub.load(folder)
    adapter = written(tmp_path / "run" / "adapter", model, 0)
    assert hub.resolve_adapter(tmp_path / "run") == adapter
    assert hub.resolve_adapter(adapter) == adapter
    with pytest.raises(UsageError, match="there is no adapter in"):
        hub.resolve_adapter(folder)
    with pytest.raises(UsageError, match="there is no adapter 'nowhere'"):
        hub.resolve_adapter("nowhere")


def test_only_linear_layers_of_attention_and_dense_blocks_count():
    """Of a model with experts, and of one whose attention is latent, the others are left out."""
    names = matrices(
        Decoder(FAMILIES["deepseek_v2"].config_from_hub(peer_config("deepseek_v2"))), FAMILIES["deepseek_v2"]
    )
    ends = {name.rpartition(".")[2] for name in names}
    assert "kv_b_proj" not in ends and "kv_a_proj_with_mqa" in ends
    assert not any(".experts." in name for name in names) and any("shared_experts" in name for name in names)


def peer_config(name: str) -> dict:
    return peer(name, **FAMILIES[name].example).config.to_dict()


@pytest.mark.parametrize("owners", ["mixed", "runs", "one", "none"])
def test_a_library_adds_the_sum_row_by_row(owners):
    draw = torch.Generator().manual_seed(0)
    slots, count = 4, 3 * CHUNK + 5
    whose = {
        "mixed": torch.randint(0, slots + 1, (count,), generator=draw),
        "runs": torch.arange(count) // CHUNK,
        "one": torch.full((count,), 3),
        "none": torch.zeros(count, dtype=torch.int64),
    }[owners]
    room = added(slots, 3, 10, (4, 6), torch.float64, draw)
    x, out = (torch.randn(count, size, dtype=torch.float64, generator=draw) for size in (10, 14))
    wanted = row_by_row(out, x, room, whose)
    chunked = Chunked.of(whose)
    assert (chunked is None) == (owners == "none")
    if chunked is not None:
        assert torch.allclose(chunked.add(out.clone(), x, room), wanted)


@needs_compiler
@pytest.mark.parametrize(
    ("size", "widths", "rank"),
    # Vectors of 8 and of 16 numbers, whole ones and not; ranks in groups of 4, and what they leave over.
    [(48, (32, 16), 4), (10, (4, 33), 3), (688, (7,), 5), (7, (16, 1, 70), 9)],
)
def test_native_code_adds_the_sum_row_by_row(size, widths, rank):
    draw = torch.Generator().manual_seed(size)
    slots, count = 5, 43
    room = added(slots, rank, size, widths, torch.float32, draw)
    # One adapter has nobody, and numbers that would be seen; one has many, and the others have from one row on.
    for each in (room.a[:, 3], *(b[3] for b in room.b)):
        each.fill_(torch.nan)
    whose = torch.tensor([0, 1, 2, 2, 3, 3, 3, *[5] * 29, 0, 1, 3, 3, 0, 2, 5])
    x, out = torch.randn(count, 2 * size, generator=draw)[:, size:], torch.randn(count, room.ranges[-1][1] + 2)
    wanted = row_by_row(out, x, room, whose)
    found = Native(whose).add(out.clone(), x, room)
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-6 * wanted.abs().max().item())
    outside = torch.ones(out.shape[1], dtype=torch.bool)
    for begin, end in room.ranges:
        outside[begin:end] = False
    assert torch.equal(found[:, outside], out[:, outside])
    assert torch.equal(found[whose == 0], out[whose == 0])
    # Nor does a row depend on those beside it.
    alone = [Native(whose[[row]]).add(out[[row]], x[[row]], room) for row in range(count)]
    assert torch.equal(found, torch.cat(alone))


def test_without_a_compiler_a_library_multiplies(monkeypatch):
    def none():
        raise PenstockError("native kernels need a C++ compiler")

    some, like = torch.tensor([0, 2]), torch.zeros(1)
    assert isinstance(low_rank.wearing(some, 2, natively=False), Chunked)
    assert not low_rank.takes(like.bfloat16())
    monkeypatch.setattr(low_rank.native, "_compiler", none)
    low_rank.native._made.cache_clear()
    assert not low_rank.takes(like)
    low_rank.native._made.cache_clear()


@needs_compiler
def test_numbers_in_fp32_are_native_code_s():
    assert low_rank.takes(torch.zeros(1))
    assert isinstance(low_rank.wearing(torch.tensor([0, 2]), 2, natively=True), Native)
    assert low_rank.wearing(torch.tensor([0, 0]), 2, natively=True) is None


def test_what_cuda_computes_is_compiled_once_for_any_number_of_rows():
    """The compiler sees sizes alone: nothing is computed here."""
    graphs, draw = [], torch.Generator().manual_seed(0)
    room = added(4, 3, 10, (4, 6), torch.float32, draw)

    def add(out, x, owners):
        Sorted.of(owners, 4).add(out, x, room)

    torch._dynamo.reset()
    compiled = torch.compile(add, dynamic=True, backend=lambda graph, _: (graphs.append(graph), lambda *given: ())[1])
    for count in (5, 9, 300):
        compiled(torch.zeros(count, 14), torch.zeros(count, 10), torch.zeros(count, dtype=torch.int64))
    torch._dynamo.reset()
    assert len(graphs) == 1


def test_a_hook_that_is_called_first_is_the_first_one_to_compilers_too():
    """Ranks sum up in a hook of their own what adapters have been added to."""
    layer, x = torch.nn.Linear(4, 4), torch.ones(2, 4)
    layer.register_forward_hook(lambda module, inputs, out: 2 * out)
    hook_first(layer, lambda module, inputs, out: out + 3)
    assert torch.allclose(layer(x), 2 * (x @ layer.weight.T + layer.bias + 3))
    # torch.compile of PyTorch 2.11 looks at the order of the dict that the ordered one is made of.
    assert [*dict.keys(layer._forward_hooks)] == [*layer._forward_hooks]
