"""What lm-eval's back end for vLLM makes of given requests, on the CPU: run by `bench/eval.py` with the Python that has
both.

Reads a line of JSON: the folder of the ``model``, whose weights are fp32, and ``requests`` by name, of which each has a
``kind`` of lm-eval's and a list of ``arguments``. Writes ``{}`` when it is ready, and for each further line, which
names requests (``asked``), the ``seconds`` that all of them took, beginning with an empty cache, and the ``answers``.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
# All that there are: of few it leaves one idle.
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, sorted(os.sched_getaffinity(0)))))

#: lm-eval looks for vLLM under this name alone; its build for CPUs has one of its own.
NAME, OTHER = "vllm", "vllm-cpu"


def name_it() -> None:
    """Has the build for CPUs found where vLLM is asked for."""
    version = importlib.metadata.version
    try:
        version(NAME)
    except importlib.metadata.PackageNotFoundError:
        importlib.metadata.version = lambda name: f"{version(OTHER)}+cpu" if name == NAME else version(name)


def main() -> None:
    # Answers have the output to themselves: vLLM's processes print.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    name_it()
    from lm_eval.api.instance import Instance
    from lm_eval.models.vllm_causallms import VLLM

    given = json.loads(sys.stdin.readline())
    model = VLLM(pretrained=given["model"], dtype="float32", batch_size="auto")
    asked = {
        name: [Instance(each["kind"], {}, tuple(arguments), 0) for arguments in each["arguments"]]
        for name, each in given["requests"].items()
    }
    print("{}", file=answers, flush=True)
    for line in sys.stdin:
        requests = asked[json.loads(line)["asked"]]
        if not model.model.reset_prefix_cache():
            raise RuntimeError("the cache cannot be emptied")
        start = time.perf_counter()
        found = getattr(model, requests[0].request_type)(requests, disable_tqdm=True)
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "answers": found}), file=answers, flush=True)


if __name__ == "__main__":
    main()
