"""Training on from a model of others: what lies beside its weights goes along, and documents look as it knows them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import processors
from transformers import AutoTokenizer, GenerationConfig

from penstock.core.errors import ConfigError
from penstock.core.progress import silent
from penstock.data.corpora.folder import Folder
from penstock.data.store import TokenStore
from penstock.data.tokenizer import load_tokenizer, train_tokenizer
from penstock.models import hub
from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder
from penstock.train.config import TrainConfig
from penstock.train.run import Run
from penstock.train.session import train_to_the_end
from tiny_runs import MODEL, VOCABULARY, config, make_corpus

TEMPLATE = "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{% endfor %}<|assistant|>"
END = {"__type": "AddedToken", "content": "<|endoftext|>", "lstrip": False, "rstrip": False, "normalized": False}
SAMPLING = {"temperature": 0.3, "top_p": 0.8, "do_sample": True}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> dict[str, str]:
    return {"name": "folder", "path": str(make_corpus(tmp_path_factory.mktemp("texts") / "corpus"))}


def make_base(folder: Path, corpus: dict[str, str], *, jinja: bool = True) -> Path:
    """A chat model as Llama's are: BOS from the post-processor, two end tokens, padding, bf16, a template."""
    texts = [document.text for document in Folder(path=Path(corpus["path"])).documents()]
    tokenizer = train_tokenizer(texts, VOCABULARY - 3)
    tokenizer.add_special_tokens(["<s>", "<|end|>", "<pad>"])
    bos, end, pad = (tokenizer.token_to_id(token) for token in ("<s>", "<|end|>", "<pad>"))
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", bos)])
    model = Decoder(DecoderConfig(**MODEL, vocabulary=VOCABULARY, init_std=0.08)).initialize(0)
    hub.save(model, folder, dtype=torch.bfloat16)
    stored = json.loads((folder / "config.json").read_text())
    ids = {"bos_token_id": bos, "eos_token_id": 0, "pad_token_id": pad}
    (folder / "config.json").write_text(json.dumps(stored | ids))
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": END, "pad_token": "<pad>"}
    written = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 64, **special}
    if jinja:
        (folder / "chat_template.jinja").write_text(TEMPLATE)
    else:
        written["chat_template"] = TEMPLATE
    (folder / "tokenizer_config.json").write_text(json.dumps(written))
    (folder / "generation_config.json").write_text(json.dumps({**ids, "eos_token_id": [0, end], **SAMPLING}))
    return folder


def options(base: Path, corpus: dict[str, str], **data) -> TrainConfig:
    data = {"corpus": corpus, "held_out": 0.2, **data}
    return config(base, model=None, start_from=str(base), data=data, steps=2, checkpoint_steps=2)


@pytest.fixture(scope="module")
def base(tmp_path_factory, corpus) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "chat", corpus)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, base, corpus) -> Path:
    folder = tmp_path_factory.mktemp("tuned") / "run"
    assert train_to_the_end(Run.create(options(base, corpus), folder), silent)
    return folder


@pytest.mark.parametrize("where", ["model", "checkpoints/step-00000002"])
def test_a_fine_tuned_chat_model_is_used_like_its_base(tuned, base, where):
    """transformers reads the same template, special tokens, length, end tokens and sampling defaults from both."""
    ours, theirs = AutoTokenizer.from_pretrained(tuned / where), AutoTokenizer.from_pretrained(base)
    chat = [{"role": "user", "content": "x"}]
    assert ours.apply_chat_template(chat, tokenize=False) == theirs.apply_chat_template(chat, tokenize=False)
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert (ours.pad_token, ours.bos_token, ours.model_max_length) == ("<pad>", "<s>", 64)
    assert ours("some text").input_ids == theirs("some text").input_ids
    defaults = [GenerationConfig.from_pretrained(folder).to_diff_dict() for folder in (tuned / where, base)]
    assert defaults[0] == defaults[1]
    assert len(defaults[0]["eos_token_id"]) == 2
    ids = [json.loads((folder / "config.json").read_text()) for folder in (tuned / where, base)]
    assert all(ids[0][key] == ids[1][key] for key in ("bos_token_id", "eos_token_id", "pad_token_id"))


def test_a_template_inside_the_tokenizer_s_configuration_goes_along_too(tmp_path, corpus):
    base = make_base(tmp_path / "base", corpus, jinja=False)
    run = Run.create(options(base, corpus), tmp_path / "run")
    assert train_to_the_end(run, silent)
    assert AutoTokenizer.from_pretrained(tmp_path / "run" / "model").chat_template == TEMPLATE


def test_it_goes_along_when_the_base_is_gone(tmp_path, corpus):
    base = make_base(tmp_path / "base", corpus)
    Run.create(options(base, corpus), tmp_path / "run").trainer.train()
    base.rename(tmp_path / "gone")
    again = Run.reopen(tmp_path / "run", overrides=["steps=3"])
    assert train_to_the_end(again, silent)
    assert (tmp_path / "run" / "model" / "chat_template.jinja").read_text() == TEMPLATE
    branch = Run.branch(tmp_path / "run" / "checkpoints" / "step-00000002", tmp_path / "branch")
    assert (branch.folder / "tokenizer" / "generation_config.json").is_file()


def test_a_bf16_model_comes_back_in_bf16(tuned, base, tmp_path, corpus, capsys):
    """And its checkpoints keep all bits, which a resumed run needs."""
    assert next(hub.load(tuned / "model").parameters()).dtype == torch.bfloat16
    assert next(hub.load(tuned / "checkpoints" / "step-00000002").parameters()).dtype == torch.float32
    kept = Run.create(options(base, corpus).model_copy(update={"export_dtype": "fp32"}), tmp_path / "run")
    assert train_to_the_end(kept, silent)
    assert "(fp32, like " in capsys.readouterr().out
    assert next(hub.load(tmp_path / "run" / "model").parameters()).dtype == torch.float32


# Documents as the tokenizer would write them.


def documents(store: TokenStore) -> list[list[int]]:
    splits = (store.split("train"), store.split("held_out"))
    return [split.document(i).tolist() for split in splits for i in range(split.documents)]


def test_documents_begin_with_bos_where_the_tokenizer_adds_it(base, corpus, tmp_path):
    run = Run.create(options(base, corpus), tmp_path / "run")
    reference = AutoTokenizer.from_pretrained(base)
    stored = documents(run.material.store)
    assert len(stored) > 50
    for ids in stored:
        assert ids == [*reference(run.material.store.tokenizer.decode(ids)).input_ids, 0]
        assert ids[0] == reference.bos_token_id
    assert (run.config.data.begin_of_text, run.config.data.end_of_text) == ("<s>", "<|endoftext|>")


@pytest.mark.parametrize(("begin", "end"), [("", "<|end|>"), ("<pad>", "auto")])
def test_the_tokens_around_a_document_can_be_chosen(base, corpus, tmp_path, begin, end):
    run = Run.create(options(base, corpus, begin_of_text=begin, end_of_text=end), tmp_path / "run")
    tokenizer = run.material.store.tokenizer
    stored = documents(run.material.store)
    assert all(tokenizer.id_to_token(ids[-1]) == ("<|end|>" if end != "auto" else "<|endoftext|>") for ids in stored)
    assert all((tokenizer.id_to_token(ids[0]) == "<pad>") == bool(begin) for ids in stored)
    assert Run.reopen(tmp_path / "run").material.store.manifest == run.material.store.manifest


def test_an_end_of_text_of_one_s_own_ends_what_the_model_writes(base, corpus, tmp_path):
    run = Run.create(options(base, corpus, end_of_text="<pad>"), tmp_path / "run")
    assert train_to_the_end(run, silent)
    ends = hub.end_tokens(tmp_path / "run", hub.load_tokenizer(tmp_path / "run"))
    assert ends == hub.end_tokens(base, hub.load_tokenizer(base)) | {load_tokenizer(base).token_to_id("<pad>")}


def test_a_store_without_the_model_s_bos_is_refused(base, corpus, tmp_path):
    made = Folder(path=Path(corpus["path"]))
    TokenStore.build(made, load_tokenizer(base), tmp_path / "store", held_out=0.2, begin_of_text="")
    plain = config(tmp_path / "store", model=None, start_from=str(base), steps=2)
    with pytest.raises(ConfigError, match=r"documents begin with nothing, and the model's tokenizer .* with <s>"):
        Run.create(plain, tmp_path / "run")
    chosen = plain.model_copy(update={"data": plain.data.model_copy(update={"begin_of_text": ""})})
    assert Run.create(chosen, tmp_path / "run").material.store.manifest.begin_of_text_ids == ()
