"""A chat model that is small enough for tests, and conversations for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from penstock.core.config import build
from penstock.data.tokenizer import train_tokenizer
from penstock.models import hub
from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder
from penstock.train.config import TrainConfig

#: As the models of Qwen write turns.
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
#: The same, with marks around what the assistant writes.
MARKED = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

VOCABULARY = 300
SHAPE = {"hidden": 32, "layers": 2, "heads": 2, "kv_heads": 1, "head_dim": 16, "ffn": 48, "context": 128}


def turns(*texts: str, system: str = "") -> list[dict[str, str]]:
    """Messages of the user and the assistant in turn."""
    roles = ("user", "assistant")
    first = [{"role": "system", "content": system}] if system else []
    return first + [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def make_chat_model(folder: Path, template: str | None = TEMPLATE, **shape: int) -> Path:
    """An untrained model with a tokenizer and a template, whose config names <|endoftext|> alone as its end; ``shape``
    changes its own."""
    tokenizer = train_tokenizer([f"what is {i} and {i} a word" for i in range(99)], VOCABULARY - 2)
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    size = tokenizer.get_vocab_size()
    model = Decoder(DecoderConfig(**{**SHAPE, **shape}, vocabulary=size, init_std=0.08, tied=True)).initialize(0)
    hub.save(model, folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    if template is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def write_lines(path: Path, records: list[Any]) -> Path:
    """A file with a record a line."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def chat_config(model: Path, **changes: Any) -> TrainConfig:
    """A configuration that trains that model: rows of 128 tokens, two an update."""
    tree = {
        "start_from": str(model),
        "objective": "sft",
        "batch": {"tokens": 256, "stages": [{"length": 128}]},
        "optim": {"name": "adamw", "lr": 1e-2, "weight_decay": 0.0},
        "schedule": {"name": "constant", "warmup_steps": 0},
        "precision": "fp32",
        "compile": False,
        "device": "cpu",
        "steps": 40,
        **changes,
    }
    return build(TrainConfig, tree)
