"""Mixtures of LoRA experts: how tokens choose among them, what that adds, the loss, and the folders of a run."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributions import Categorical
from typer.testing import CliRunner

from penstock import LLM, SamplingParams
from penstock.cli import build_app
from penstock.core.config import build
from penstock.core.errors import ConfigError, ModelError, UsageError
from penstock.core.progress import silent
from penstock.data.loader import Batch
from penstock.models import hub
from penstock.models.adapters.low_rank import LowRankLinear, attached
from penstock.models.adapters.routed import Mixture, routed, tsallis, unevenness
from penstock.models.attention import CausalRows
from penstock.models.decoder import Decoder
from penstock.ops.cross_entropy import IGNORE
from penstock.train.config import TrainConfig
from penstock.train.objectives.next_token import NextToken
from penstock.train.run import Run
from penstock.train.session import train_to_the_end
from penstock.train.tuners.dynmole import DynMoLE
from tiny_chats import chat_config, make_chat_model, turns, write_lines

SMALL = {"name": "dynmole", "rank": 2, "experts": 4, "threshold": 1.2}
EVERY = Mixture(experts=4, entropy_index=2.0, threshold=9.0, top_p=0.75, top_k=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_chat_model(tmp_path_factory.mktemp("chat") / "model")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    records = [{"messages": turns(f"what is {i}?", f"{i} a word")} for i in range(8)]
    path = write_lines(tmp_path_factory.mktemp("data") / "chats.jsonl", records)
    return {"chats": str(path), "held_out": 0.3}


@pytest.fixture(scope="module")
def trained(model, data, tmp_path_factory):
    """A finished run, and what its model scores while it is still attached."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    run = Run.create(chat_config(model, data=data, tuner=SMALL, steps=6), folder)
    assert train_to_the_end(run, silent)["held_out_loss"] > 0
    return folder, scores(run.trainer.model)


@torch.no_grad()
def scores(decoder: Decoder) -> torch.Tensor:
    tokens = torch.arange(20)[None]
    return decoder.logits(decoder(tokens, CausalRows.of(20, "cpu")).hidden)


def mixed(model, seed: int = 0, **options) -> Decoder:
    """In float64, with experts that add something, and routers of which some are certain and some are not."""
    decoder = hub.load(model, dtype=torch.float32).double()
    DynMoLE(**{**{key: each for key, each in SMALL.items() if key != "name"}, **options}).attach(decoder, 0)
    draw = torch.Generator().manual_seed(seed)
    for _, layer in routed(decoder):
        for part, size in ((layer.b, 0.3), (layer.router, 1.0)):
            for each in part.values():
                each.data.copy_(torch.randn(each.shape, generator=draw) * size)
    return decoder


@pytest.mark.parametrize("index", [1.0, 1.1, 1.5, 2.0, 3.0])
def test_the_entropy_of_even_and_of_certain_probabilities(index):
    for count in (2, 5, 8):
        even = tsallis(torch.full((count,), -math.log(count), dtype=torch.float64), index)
        wanted = math.log(count) if index == 1 else (1 - count ** (1 - index)) / (index - 1)
        assert even.item() == pytest.approx(wanted, rel=1e-12)
    logits = torch.zeros(8, dtype=torch.float64)
    logits[3] = 1e4
    logits.requires_grad_()
    certain = tsallis(logits.log_softmax(-1), index)
    certain.backward()
    assert certain.item() == 0
    assert torch.isfinite(logits.grad).all()


def test_the_entropy_is_its_definition_and_becomes_shannons():
    logarithms = torch.randn(50, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64).log_softmax(-1)
    p = logarithms.exp()
    for index in (1.2, 2.0, 4.0):
        wanted = (1 - p.pow(index).sum(-1)) / (index - 1)
        torch.testing.assert_close(tsallis(logarithms, index), wanted, rtol=1e-12, atol=0)
    shannon = Categorical(probs=p).entropy()
    torch.testing.assert_close(tsallis(logarithms, 1.0), shannon, rtol=1e-12, atol=0)
    # Where the definition as it stands has lost most digits.
    torch.testing.assert_close(tsallis(logarithms.float(), 1 + 1e-6), shannon.float(), rtol=1e-5, atol=0)


def test_routing_switches_at_the_threshold():
    logarithms = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64).log()
    entropy = tsallis(logarithms, 2.0).item()
    below = math.nextafter(entropy, 0)
    for threshold, taken in ((entropy, [1, 0, 0, 0]), (below, [1, 1, 1, 1])):
        weights, _, found = EVERY._replace(threshold=threshold, top_p=0.7).choose(logarithms)
        assert found.item() == entropy
        torch.testing.assert_close(weights, logarithms.exp() * torch.tensor(taken))


@pytest.mark.parametrize(
    ("top_p", "top_k", "taken"),
    [(0.75, 1, {0}), (0.75, 2, {0, 2}), (0.79, 1, {0}), (0.81, 1, {0, 2}), (0.99, 1, {0, 2, 3}), (0.1, 3, {0, 2, 3})],
)
def test_certain_tokens_take_the_most_probable_experts(top_p, top_k, taken):
    logarithms = torch.tensor([[0.5, 0.05, 0.3, 0.15]], dtype=torch.float64).log()
    weights = EVERY._replace(top_p=top_p, top_k=top_k).choose(logarithms).weights
    assert set(weights[0].nonzero().flatten().tolist()) == taken
    for expert in taken:
        assert weights[0, expert].item() == pytest.approx(logarithms[0, expert].exp().item())


def test_a_layer_adds_its_experts_one_by_one(model):
    """Against loops over tokens and experts; some of the tokens take all experts, and some do not."""
    decoder = mixed(model, threshold=0.8)
    kinds = set()
    for _, layer in routed(decoder):
        x = torch.randn(12, layer.in_features, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        added = layer(x) - layer.plain()(x)
        for token, found in zip(x, added, strict=True):
            parts = []
            for place in range(len(layer.pieces)):
                router, a, b = (each[str(place)] for each in (layer.router, layer.a, layer.b))
                p = torch.exp(router @ token) / torch.exp(router @ token).sum()
                soft = ((1 - (p**1.1).sum()) / 0.1).item() > 0.8
                order = sorted(range(4), key=lambda e: -p[e].item())
                sparse = {e for k, e in enumerate(order) if k < 2 or sum(p[o].item() for o in order[: k + 1]) <= 0.75}
                kinds.add(soft)
                taken = set(range(4)) if soft else sparse
                parts.append(sum(p[e] * (b[:, 2 * e : 2 * e + 2] @ (a[2 * e : 2 * e + 2] @ token)) for e in taken) * 8)
            torch.testing.assert_close(found, torch.cat(parts), rtol=1e-9, atol=1e-12)
    assert kinds == {True, False}


def batch() -> Batch:
    tokens = torch.arange(40).view(2, 20)
    targets = (tokens + 1).masked_fill(torch.arange(20) % 3 == 0, IGNORE)
    return Batch(tokens, targets, torch.zeros_like(tokens))


def test_the_unevenness_of_even_and_of_collapsed_loads():
    for count in (2, 5, 8):
        even = torch.full((7, count), 1 / count, dtype=torch.float64)
        alone = torch.eye(count, dtype=torch.float64)
        assert unevenness(even, even).item() == pytest.approx(1, rel=1e-12)
        assert unevenness(alone[:1].expand(7, -1), alone[:1].expand(7, -1)).item() == count
        # Each token is certain of another expert: none is taken more than the others.
        assert unevenness(alone, alone).item() == pytest.approx(1, rel=1e-12)
    # Of the probabilities 1/2, 1/4 and 1/4, and of 1/4, 1/4 and 1/2, the first expert alone is taken.
    probabilities = torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.25, 0.5]], dtype=torch.float64)
    taken = probabilities * torch.tensor([1.0, 0, 0])
    assert unevenness(taken, probabilities).item() == pytest.approx(3 * 0.375 * 0.375)


def test_the_loss_has_the_load_of_the_predicted_tokens(model):
    """Against a loop over routers and tokens; and evenly routed, it is 1 a token."""
    decoder, given, context = mixed(model, threshold=0.8), batch(), CausalRows.of(20, "cpu")
    inputs: dict[str, torch.Tensor] = {}
    for name, layer in routed(decoder):
        layer.register_forward_hook(lambda _, given, out, name=name: inputs.update({name: given[0]}))
    options = {**{k: v for k, v in SMALL.items() if k != "name"}, "entropy_weight": 0.0, "balance_weight": 0.5}
    tuner, count = DynMoLE(**options), (given.targets != IGNORE).sum()
    found = tuner.loss(NextToken(), decoder, given, context) - NextToken().loss(decoder, given, context)
    loads = []
    for name, layer in routed(decoder):
        for router in layer.router.values():
            p = (inputs[name] @ router.T).softmax(-1)[given.targets != IGNORE]
            f = torch.stack([layer.mixture.choose(each.log()).weights for each in p])
            loads.append(sum(4 * f[:, e].mean() * p[:, e].mean() for e in range(4)))
    torch.testing.assert_close(found, 0.5 * count * torch.stack(loads).mean(), rtol=1e-9, atol=0)
    for _, layer in routed(decoder):
        for router in layer.router.values():
            router.data.zero_()
    found = tuner.loss(NextToken(), decoder, given, context) - NextToken().loss(decoder, given, context)
    torch.testing.assert_close(found, 0.5 * count.double(), rtol=1e-9, atol=0)


def test_the_loss_has_the_mean_entropy_of_the_predicted_tokens(model):
    decoder, given, context = mixed(model), batch(), CausalRows.of(20, "cpu")
    inputs: dict[str, torch.Tensor] = {}
    for name, layer in routed(decoder):
        layer.register_forward_hook(lambda _, given, out, name=name: inputs.update({name: given[0]}))
    tuner = DynMoLE(**{**{k: v for k, v in SMALL.items() if k != "name"}, "entropy_weight": 0.5, "balance_weight": 0.0})
    found = tuner.loss(NextToken(), decoder, given, context)
    plain = NextToken().loss(decoder, given, context)
    entropies = []
    for name, layer in routed(decoder):
        for router in layer.router.values():
            p = (inputs[name] @ router.T).softmax(-1)
            entropies.append(((1 - p.pow(1.1).sum(-1)) / 0.1)[given.targets != IGNORE])
    count = (given.targets != IGNORE).sum()
    wanted = plain + 0.5 * count * torch.stack(entropies).mean()
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=0)
    assert all(layer.choices is None for _, layer in routed(decoder))
    rows = [Batch(*(each[row : row + 1] for each in (given.tokens, given.targets, given.documents))) for row in (0, 1)]
    torch.testing.assert_close(sum(tuner.loss(NextToken(), decoder, row, context) for row in rows), found)


@pytest.mark.parametrize("threshold", [0.0, 0.8, 9.0])
def test_gradients_equal_differences(model, threshold):
    """All tokens take all experts, some do, none does."""
    decoder, given, context = mixed(model, threshold=threshold), batch(), CausalRows.of(20, "cpu")
    tuner = DynMoLE(rank=2, experts=4, threshold=threshold, entropy_weight=0.7)
    tuner.loss(NextToken(), decoder, given, context).backward()
    assert all((p.grad is not None) == p.requires_grad for p in decoder.parameters())
    layer = decoder.layers[0].mlp.gate_up
    for part in (layer.router["1"], layer.a["0"], layer.b["1"]):
        at = part.grad.abs().argmax().item()
        place, found = part.data.view(-1)[at : at + 1], []
        with torch.no_grad():
            for by in (1e-6, -2e-6):
                place += by
                found.append(tuner.loss(NextToken(), decoder, given, context).item())
            place += 1e-6
        assert (found[0] - found[1]) / 2e-6 == pytest.approx(part.grad.view(-1)[at].item(), rel=1e-5)


def test_experts_of_one_that_is_certain_are_lora(model):
    """A limiting case: two experts, of which all tokens take the first, whose matrices are LoRA's."""
    decoder = hub.load(model, dtype=torch.float32).double()
    DynMoLE(experts=2, rank=3, top_k=1, threshold=9.0, alpha=6.0).attach(decoder, 0)
    plain = hub.load(model, dtype=torch.float32).double()
    for name, layer in list(attached(decoder)):
        places = [int(place) for place in layer.a]
        base, like = plain.get_submodule(name), plain.embedding.weight
        single = LowRankLinear(base, layer.pieces, places, 3, 2.0, like)
        for place in layer.a:
            layer.b[place].data.normal_(generator=torch.Generator().manual_seed(2))
            layer.router[place].data.zero_()
            single.a[place].data.copy_(layer.a[place][:3])
            single.b[place].data.copy_(layer.b[place][:, :3] / 2)
        plain.set_submodule(name, single)
    # Equal probabilities, of which one expert is taken: half of what it adds.
    torch.testing.assert_close(scores(decoder), scores(plain), rtol=1e-9, atol=1e-9)


def test_a_run_leaves_a_folder_that_opens_on_its_base(model, trained):
    folder, wanted = trained
    base = scores(hub.load(model, dtype=torch.float32))
    assert not torch.allclose(wanted, base, atol=1e-3)
    for place in (folder, folder / "adapter", folder / "checkpoints" / "step-00000006"):
        for load in (hub.load, hub.load_for_inference):
            torch.testing.assert_close(scores(load(place, dtype=torch.float32)), wanted, rtol=0, atol=1e-5)
    stored = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert (stored["peft_type"], stored["r"], stored["experts"]) == ("DYNMOLE", 2, 4)
    assert not (folder / "model" / "model.safetensors").exists()


def test_what_is_served_is_what_the_model_says(model, trained):
    folder, _ = trained
    asked = hub.load_tokenizer(folder).apply_chat_template(turns("what is 3?"), add_generation_prompt=True)["input_ids"]
    decoder, found = hub.load(folder, dtype=torch.float32), list(asked)
    with torch.no_grad():
        for _ in range(6):
            hidden = decoder(torch.tensor([found]), CausalRows.of(len(found), "cpu")).hidden
            found.append(int(decoder.logits(hidden)[0, -1].argmax()))
    sampling = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
    llm = LLM(str(folder), dtype="fp32", cache_tokens=512, progress=silent)
    prompts = [{"prompt_token_ids": asked}, {"prompt_token_ids": asked[:4]}]
    assert llm.generate(prompts, sampling, progress=silent)[0].outputs[0].token_ids == found[len(asked) :]


def test_layers_that_are_computed_twice_give_the_same_gradients(model, data, tmp_path):
    found = []
    for again in (False, True):
        options = chat_config(model, data=data, tuner=SMALL, steps=1, activation_checkpointing=again)
        run = Run.create(options, tmp_path / str(again))
        run.trainer.train()
        found.append({name: p.detach() for name, p in run.trainer.model.named_parameters() if p.requires_grad})
    for name, parameter in found[0].items():
        torch.testing.assert_close(found[1][name], parameter, rtol=0, atol=1e-6)


def test_what_cannot_be_is_refused_and_says_what_to_do(model, trained, data, tmp_path):
    folder, _ = trained
    decoder = hub.load(folder)
    with pytest.raises(UsageError, match="cannot be merged") as merging:
        hub.save(decoder, tmp_path / "plain")
    assert "tuner=lora" in merging.value.hint
    with pytest.raises(UsageError, match="cannot be merged"):
        DynMoLE().merged(decoder)
    with pytest.raises(ModelError, match="nor be one of several") as beside:
        LLM(str(model), adapters={"x": str(folder)}, dtype="fp32", cache_tokens=512, progress=silent)
    assert "in place of the model" in beside.value.hint
    with pytest.raises(UsageError, match="the same bits in any batch"):
        LLM(str(folder), deterministic=True, dtype="fp32", cache_tokens=512, progress=silent)
    with pytest.raises(ConfigError, match="nothing can be trained on top of it"):
        Run.create(chat_config(folder, data=data, steps=1), tmp_path / "run")
    with pytest.raises(ConfigError, match="beside a whole model: set parallel"):
        Run.create(chat_config(model, data=data, tuner=SMALL, steps=1, parallel={"shard": "all"}), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"top_k \(9\) is above experts \(8\)"):
        build(TrainConfig, {"start_from": "python-1m", "steps": 1, "tuner": {"name": "dynmole", "top_k": 9}})


def test_damaged_folders_are_refused(model, tmp_path):
    decoder = mixed(model)
    folder = tmp_path / "adapter"
    folder.mkdir()
    DynMoLE(rank=2, experts=4).write(decoder, folder, str(model))
    torch.testing.assert_close(scores(hub.load(folder).double()), scores(decoder), rtol=0, atol=1e-3)
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    first = next(name for name in tensors if "lora_B" in name)
    save_file({**tensors, first: tensors[first][:-1].contiguous()}, path)
    with pytest.raises(ModelError, match="is wanted"):
        hub.load(folder)
    save_file({name: each for name, each in tensors.items() if name != first}, path)
    with pytest.raises(ModelError, match="is missing, and"):
        hub.load(folder)
    save_file({**tensors, "layers.9.router.weight": torch.zeros(1)}, path)
    with pytest.raises(ModelError, match="and its base no matrix for it"):
        hub.load(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "experts"}))
    with pytest.raises(ModelError, match="does not describe experts"):
        hub.load(folder)


def test_the_command_line_trains_and_generates(model, data, tmp_path):
    folder = tmp_path / "run"
    changes = [f"start_from={model}", f"data.chats={data['chats']}", "tuner=dynmole", "tuner.experts=3", "steps=2"]
    changes += ["device=cpu", "batch.tokens=256", "batch.micro_tokens=128", "precision=fp32"]
    changes += ['batch.stages=[{"length" = 128}]', "data.held_out=0.2"]
    options = [part for change in changes for part in ("--set", change)]
    done = CliRunner().invoke(build_app(), ["train", "--preset", "sft", "--out", str(folder), *options])
    assert done.exit_code == 0, done.output
    done = CliRunner().invoke(build_app(), ["generate", str(folder), "--prompt", "what is", "--max-tokens", "3"])
    assert done.exit_code == 0, done.output
