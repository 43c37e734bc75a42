"""How fast llama.cpp decodes: run by `bench/formats.py` with the Python that has `llama-cpp-python`.

Its arguments are a GGUF file and how many threads to use. Then it reads lines of JSON, ``prompts`` (lists of tokens, a
request each) and ``length``, and answers each with tokens a second: the requests run at once, greedily, and are timed
after the first token of each. The first line that it writes says its ``version``.
"""

from __future__ import annotations

import json
import sys
import time

import llama_cpp as llama

#: Requests at once, and tokens of all of them.
MOST, ROOM = 16, 4096


class Peer:
    """A context that decodes many sequences together."""

    def __init__(self, file: str, threads: int) -> None:
        llama.llama_backend_init()
        self.model = llama.llama_model_load_from_file(file.encode(), llama.llama_model_default_params())
        options = llama.llama_context_default_params()
        options.n_ctx, options.n_seq_max, options.n_batch, options.kv_unified = ROOM, MOST, ROOM, True
        options.n_threads = options.n_threads_batch = threads
        self.context = llama.llama_init_from_model(self.model, options)
        self.sampler = llama.llama_sampler_init_greedy()
        self.batch = llama.llama_batch_init(ROOM, 0, 1)

    def decode(self, rows: list[tuple[int, int, int, bool]]) -> None:
        """Computes rows: a token, its position, its sequence, and whether what follows is asked for."""
        batch = self.batch
        batch.n_tokens = len(rows)
        for place, (token, position, sequence, asked) in enumerate(rows):
            batch.token[place], batch.pos[place], batch.logits[place] = token, position, asked
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, sequence
        if llama.llama_decode(self.context, batch):
            raise RuntimeError("llama.cpp cannot decode")

    def next(self, place: int) -> int:
        """The most probable token after the row in ``place``."""
        return llama.llama_sampler_sample(self.sampler, self.context, place)

    def rate(self, prompts: list[list[int]], length: int) -> float:
        llama.llama_memory_clear(llama.llama_get_memory(self.context), True)
        newest = []
        for sequence, prompt in enumerate(prompts):
            last = len(prompt) - 1
            self.decode([(token, place, sequence, place == last) for place, token in enumerate(prompt)])
            newest.append(self.next(last))
        begun = time.perf_counter()
        for step in range(length - 1):
            self.decode([(token, len(prompts[n]) + step, n, True) for n, token in enumerate(newest)])
            newest = [self.next(place) for place in range(len(newest))]
        return len(prompts) * (length - 1) / (time.perf_counter() - begun)


def main() -> None:
    silent = llama.llama_log_callback(lambda *_: None)
    llama.llama_log_set(silent, None)
    peer = Peer(sys.argv[1], int(sys.argv[2]))
    print(json.dumps({"version": llama.__version__}), flush=True)
    for line in sys.stdin:
        print(json.dumps(peer.rate(**json.loads(line))), flush=True)


main()
