"""What TRL's trainers make of given batches: run by `bench/finetune.py` with the Python that has them.

Reads a line of JSON: the ``task`` (sft, lora or dpo), the folder of the ``model`` in fp32, for lora that of the
``adapter`` to begin with, the ``batches`` of all updates, tokenized, how many ``updates`` a round has, the optimizer's
``lr``, ``betas``, ``eps`` and ``weight_decay``, ``beta`` of DPO, a ``folder`` to write to, whether on ``cuda``, where
it multiplies in bf16, and whether to ``compile``. Writes ``{}`` when it is ready, and goes on with a round for each
line that it reads, of which it writes JSON: the ``losses`` of its updates, the ``seconds`` of all but the first, and
the ``memory`` in bytes, the highest while they were made.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from datasets import Dataset
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer


class InOrder:
    """A trainer that takes the batches as they are given."""

    groups: list[list[int]]

    def get_train_dataloader(self) -> DataLoader:
        loader = DataLoader(self.train_dataset, batch_sampler=self.groups, collate_fn=self.data_collator)
        return self.accelerator.prepare(loader)


class SFT(InOrder, SFTTrainer):
    pass


class DPO(InOrder, DPOTrainer):
    def _prepare_dataset(self, dataset, *_):
        """The pairs are tokenized already."""
        return dataset


class Rounds(TrainerCallback):
    """Takes times and losses of a round, and the highest memory, answers with them, and waits for the next."""

    def __init__(self, cuda: bool, updates: int, out) -> None:
        self.cuda, self.updates, self.out = cuda, updates, out

    def begin(self, answer: dict) -> None:
        print(json.dumps(answer), file=self.out, flush=True)
        sys.stdin.readline()
        self.ends, self.losses = [], []
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")

    def on_train_begin(self, *_, **__):
        self.begin({})

    def on_step_end(self, *_, **__):
        if self.cuda:
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())

    def on_log(self, args, state, control, logs=None, **_):
        if "loss" in logs:  # comes after the end of its update
            self.losses.append(logs["loss"])
            if len(self.losses) == self.updates:
                seconds = [after - before for before, after in itertools.pairwise(self.ends)]
                self.begin({"losses": self.losses, "seconds": seconds, "memory": self.memory()})

    def memory(self) -> int:
        if self.cuda:
            return torch.cuda.max_memory_allocated()
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def options(asked: dict) -> dict:
    """What both kinds of trainer are told."""
    return {
        "output_dir": f"{asked['folder']}/trl",
        "per_device_train_batch_size": len(asked["batches"][0]),
        "max_steps": len(asked["batches"]),
        "learning_rate": asked["lr"],
        "lr_scheduler_type": "constant",
        "adam_beta1": asked["betas"][0],
        "adam_beta2": asked["betas"][1],
        "adam_epsilon": asked["eps"],
        "weight_decay": asked["weight_decay"],
        "max_grad_norm": 1.0,
        "bf16": asked["cuda"],
        "torch_compile": asked["compile"],
        "use_cpu": not asked["cuda"],
        "gradient_checkpointing": False,
        "max_length": None,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 0,
    }


def main() -> None:
    asked, out = json.loads(sys.stdin.readline()), sys.stdout
    sys.stdout = sys.stderr  # the trainers print
    model = AutoModelForCausalLM.from_pretrained(asked["model"], dtype=torch.float32)
    if asked["adapter"] is not None:
        model = PeftModel.from_pretrained(model, asked["adapter"], is_trainable=True)
    data = Dataset.from_list([example for batch in asked["batches"] for example in batch])
    given = {
        "train_dataset": data,
        "processing_class": AutoTokenizer.from_pretrained(asked["model"]),
        "callbacks": [Rounds(asked["cuda"], asked["updates"], out)],
    }
    if asked["task"] == "dpo":
        args = DPOConfig(**options(asked), beta=asked["beta"], precompute_ref_log_probs=True)
        trainer = DPO(model, args=args, **given)
    else:
        trainer = SFT(model, args=SFTConfig(**options(asked), padding_free=True), **given)
    places = iter(range(len(data)))
    trainer.groups = [[next(places) for _ in batch] for batch in asked["batches"]]
    trainer.train()


if __name__ == "__main__":
    main()
