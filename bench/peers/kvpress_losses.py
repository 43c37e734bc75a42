"""What kvpress loses: run by `bench/kv_peers.py` with the Python that has it, on a folder of transformers' weights.

Reads a line of JSON: ``folder``, ``texts`` (lists of tokens), ``read`` (how many of a text are read before its cache is
pressed) and ``presses``, each with a ``kind`` and its ``options``. Writes a line of JSON: the ``versions``, and by
press the ``losses`` of each text behind what was read, in nats a token, and how many tokens were ``kept`` in each head.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import sys

import torch
from kvpress import ObservedAttentionPress, SnapKVPress, StreamingLLMPress
from transformers import AutoModelForCausalLM, DynamicCache


@dataclasses.dataclass
class SummedAttentionPress(ObservedAttentionPress):
    """Scores a token by the attention that the last ``queries`` paid to it, in sum (H2O's rule), where its parent
    divides by how many could."""

    queries: int = 64

    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        heads = attentions[:, :, -self.queries :].float().sum(2)
        return heads.view(*keys.shape[:2], -1, keys.shape[2]).mean(2)


PRESSES = {
    "streaming": StreamingLLMPress,
    "snapkv": SnapKVPress,
    "observed": ObservedAttentionPress,
    "summed": SummedAttentionPress,
}


@torch.no_grad()
def losses(model, text: list[int], read: int, press) -> tuple[float, int]:
    """The mean loss of what follows, and how many tokens a head keeps."""
    tokens, cache = torch.tensor([text]), DynamicCache()
    with press(model):
        first = model(tokens[:, :read], past_key_values=cache, output_attentions=True).logits[:, -1:]
    kept = cache.layers[0].keys.shape[2]
    positions = torch.arange(read, len(text) - 1).unsqueeze(0)
    rest = model(tokens[:, read:-1], past_key_values=cache, position_ids=positions).logits
    scores = torch.cat([first, rest], 1)[0].double().log_softmax(-1)
    return float(-scores.gather(-1, tokens[0, read:, None]).mean()), kept


def main() -> None:
    asked, out = json.loads(sys.stdin.readline()), sys.stdout
    sys.stdout = sys.stderr  # whatever else is printed
    model = AutoModelForCausalLM.from_pretrained(asked["folder"], dtype=torch.float32, attn_implementation="eager")
    model.eval()
    found = {}
    for name, press in asked["presses"].items():
        made = PRESSES[press["kind"]](**press["options"])
        each = [losses(model, text, asked["read"], made) for text in asked["texts"]]
        found[name] = {"losses": [loss for loss, _ in each], "kept": [kept for _, kept in each]}
    versions = {name: importlib.metadata.version(name) for name in ("kvpress", "transformers", "torch")}
    print(json.dumps({"versions": versions, "presses": found}), file=out, flush=True)


if __name__ == "__main__":
    main()
