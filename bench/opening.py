"""From the command to the first token, in parts, and the peak of memory: with nothing cached, and once more.

Processes of their own open a model and say when they had imported what they need, read the model, built the kernels of
attention, compiled the model, captured its steps as graphs, and had a token; what is left is the rest of opening.
Beside them, the whole of what a user waits for: `penstock serve` until a request has its first token, and `penstock
batch` with one line. *Cold* is the first of such processes with empty folders for what Python, Penstock, PyTorch,
Triton and FlashInfer keep (the files of the model may be in the system's memory), *warm* are those after it. Python
keeps the bytecode of packages in a folder of its own here, where it is before anything is measured, as pip leaves it:
where they were installed without it, or by somebody else, each process might compile some thousand files again.

On CUDA random weights in the shape of Qwen3-8B, bf16; on the CPU python-6m, and smollm2 where it is installed.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from penstock.core.bench import Bench
    from penstock.core.progress import Bar

#: Parts of opening that the engine's progress names, by how what it calls them begins.
NAMED = {
    "building": "build kernels",
    "compiling": "compile",
    "measuring memory": "measure memory",
    "capturing": "capture",
}

#: How often each is measured once a model was opened.
ROUNDS = 5

PARTS = ("import", "read", *NAMED.values(), "other", "first token")


class Stopwatch:
    """Reports progress to nobody, and keeps the seconds that each part took, in all."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(NAMED.values(), 0.0)

    @contextlib.contextmanager
    def __call__(self, label: str, total: float | None, unit: str) -> Iterator[Bar]:
        from penstock.core.progress import silent

        begun = time.perf_counter()
        with silent(label, total, unit) as bar:
            yield bar
        for beginning, part in NAMED.items():
            if label.startswith(beginning):
                self.seconds[part] += time.perf_counter() - begun


def open_once(model: str, device: str, begun: float) -> dict[str, float]:
    """Opens ``model`` and computes a token, as `penstock batch` does: seconds by part, and bytes at the peak. The
    process was started at the time ``begun``."""
    from penstock.core.garbage import loading, settle

    with loading():
        import torch

        from penstock.core.devices import pick, synchronize
        from penstock.models import hub
        from penstock.serve.build import build_engine
        from penstock.serve.choose.sampling import SamplingParams
        from penstock.serve.config import EngineConfig
        from penstock.serve.messages import Request
        from penstock.serve.opening import loader
    marks, watch, config, where = [begun, time.time()], Stopwatch(), EngineConfig(), pick(device)
    folder = hub.resolve(model)
    tokenizer, decoder = hub.load_tokenizer(folder), loader(config, where)(folder).eval()
    synchronize(where)
    marks.append(time.time())
    engine = build_engine(decoder, config, hub.end_tokens(folder, tokenizer), watch)
    settle()
    marks.append(time.time())
    engine.add(Request("0", tokenizer("def f(")["input_ids"], SamplingParams(temperature=0, max_tokens=1)))
    while engine.busy:
        engine.step()
    marks.append(time.time())
    imported, read, opened, first = (later - earlier for earlier, later in itertools.pairwise(marks))
    found = {"import": imported, "read": read, "first token": first}
    found |= watch.seconds
    found["other"] = opened - sum(watch.seconds.values())
    found["peak"] = 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if where.type == "cuda":
        found["device's peak"] = float(torch.cuda.max_memory_reserved(where))
    return found


def parts(model: str, device: str, environment: Mapping[str, str]) -> dict[str, float]:
    """What :func:`open_once` finds in a process of its own."""
    line = [sys.executable, "-P", __file__, model, device, repr(time.time())]
    done = subprocess.run(line, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"opening {model} failed: {done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def serve(model: str, device: str, environment: Mapping[str, str]) -> float:
    """Seconds until a server that is started now has answered with one token.

    Raises:
        RuntimeError: it has ended before.
    """
    import httpx

    begun = time.perf_counter()
    line = [sys.executable, "-m", "penstock", "serve", model, "--name", "m", "--port", "0", "--device", device]
    with (
        tempfile.TemporaryFile("w+") as said,
        subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=said, text=True) as server,
    ):
        try:
            assert server.stdout is not None
            heads = (re.search(r"^Serving \S+ at (\S+)", each) for each in server.stdout)
            url = next((found[1] for found in heads if found), None)
            if url is None:
                said.seek(0)
                raise RuntimeError(f"a server of {model} ended: {said.read()[-2000:]}")
            body = {"model": "m", "prompt": "def f(", "max_tokens": 1}
            httpx.post(f"{url}/v1/completions", json=body, timeout=600).raise_for_status()
            return time.perf_counter() - begun
        finally:
            server.terminate()


def batch(model: str, device: str, environment: Mapping[str, str]) -> float:
    """Seconds that the command takes to answer a file of one line with one token."""
    request = {"model": "m", "prompt": "def f(", "max_tokens": 1}
    asked = {"custom_id": "0", "method": "POST", "url": "/v1/completions", "body": request}
    with tempfile.TemporaryDirectory() as folder:
        source, target = (Path(folder, name) for name in ("in.jsonl", "out.jsonl"))
        source.write_text(json.dumps(asked) + "\n")
        line = [sys.executable, "-m", "penstock", "batch", model, str(source), str(target), "--name", "m"]
        begun = time.perf_counter()
        subprocess.run([*line, "--device", device], env=environment, check=True, capture_output=True)
        return time.perf_counter() - begun


@contextlib.contextmanager
def nothing_kept() -> Iterator[dict[str, str]]:
    """An environment whose folders for what is kept between runs are empty, and its own."""
    with tempfile.TemporaryDirectory(prefix="penstock-opening-") as folder:
        places = {
            "XDG_CACHE_HOME": "cache",
            "TORCHINDUCTOR_CACHE_DIR": "inductor",
            "TRITON_CACHE_DIR": "triton",
            "FLASHINFER_WORKSPACE_BASE": "flashinfer",
            "PYTHONPYCACHEPREFIX": "bytecode",
        }
        inherited = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        yield {**inherited, **{name: str(Path(folder, place)) for name, place in places.items()}}


def compile_packages(environment: Mapping[str, str]) -> None:
    """Makes bytecode of all modules that are not somebody's tests."""
    folders = {str(Path(each)) for each in sys.path if Path(each).is_dir() and Path(each).resolve() != Path.cwd()}
    line = [sys.executable, "-m", "compileall", "-q", "-j", "0", "-x", r"[/\\](tests?|testing)[/\\]"]
    subprocess.run([*line, *sorted(folders)], env=environment, capture_output=True)  # some files are for other versions


def main(bench: Bench) -> None:
    """Measures each model cold and warm."""
    from penstock.core.bench import load
    from penstock.core.errors import UsageError
    from penstock.models import hub

    device, rounds = str(bench.device), 1 if bench.quick else ROUNDS
    with contextlib.ExitStack() as opened:
        if bench.device.type == "cuda":
            shape = "Qwen3-0.6B shape" if bench.quick else "Qwen3-8B shape"
            models = {shape: str(opened.enter_context(load("tensor_parallel").stored(shape, bench.device)))}
        else:
            models = {"python-6m": "python-6m"}
            with contextlib.suppress(UsageError):  # it is not installed
                models |= {"smollm2": str(hub.resolve("smollm2"))}
        for name, model in models.items():
            with nothing_kept() as environment:
                compile_packages(environment)
                tell(bench, f"{name}, cold", [parts(model, device, environment)])
                tell(bench, f"{name}, warm", [parts(model, device, environment) for _ in range(rounds)])
                for command in (serve, batch):
                    whole(bench, name, command.__name__, [command(model, device, environment) for _ in range(rounds)])


def whole(bench: Bench, model: str, command: str, values: list[float]) -> None:
    """A row of what a command took."""
    row(bench, f"penstock {command}", f"{model}, warm", "command to first token", "s", values)


def tell(bench: Bench, setting: str, found: list[dict[str, float]]) -> None:
    """Rows of what processes of :func:`parts` said."""
    for part in PARTS:
        row(bench, part, setting, "wall time", "s", [each[part] for each in found])
    row(bench, "all parts", setting, "wall time", "s", [sum(each[part] for part in PARTS) for each in found])
    row(bench, "the process", setting, "peak memory", "MB", [each["peak"] / 1e6 for each in found])
    if "device's peak" in found[0]:
        row(bench, "the device", setting, "peak memory", "MB", [each["device's peak"] / 1e6 for each in found])


def row(bench: Bench, subject: str, setting: str, metric: str, unit: str, values: list[float]) -> None:
    """A row of the middle of ``values``."""
    middle = sorted(values)[len(values) // 2]
    bench.row(subject=subject, setting=setting, metric=metric, unit=unit, better="lower", value=middle,
              low=min(values), high=max(values), repetitions=len(values))  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(open_once(sys.argv[1], sys.argv[2], float(sys.argv[3]))))
