"""Blocks that leave the cache and come back: from the host's memory, from disk, after a restart, and after damage."""

from __future__ import annotations

import copy
import errno
import functools
import itertools
import logging
import math
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from penstock.core.errors import UsageError
from penstock.core.randomness import torch_generator
from penstock.ops.paged.contract import CacheShape
from penstock.ops.paged.cpu import Native
from penstock.ops.paged.reference import Reference
from penstock.ops.quantized.contract import Packed
from penstock.ops.quantized.integers import Int8
from penstock.serve.build import build_engine, build_runners
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.engine.engine import Engine
from penstock.serve.kv.disk import DiskBlocks, fingerprint
from penstock.serve.kv.host import HostBlocks
from penstock.serve.kv.tiers import Tiers
from penstock.serve.messages import Finish, Request
from penstock.testing.at_once import AtOnce
from penstock.testing.engine.requests import numbers
from penstock.testing.reference import greedy
from penstock.testing.serve_model import small_model
from penstock.testing.weight_format import swap

#: What follows each of these, one after the other, does not fit into a cache of 80 tokens.
PROMPTS = [numbers(f"tiers {index}", 40) for index in range(4)]
GREEDY = SamplingParams(temperature=0, max_tokens=3)
OPTIONS = {"attention": "reference", "tokens": 64, "sequences": 2, "block_size": 4, "cache_tokens": 80, "check": True}


@functools.cache
def wanted(prompt: tuple[int, ...]) -> list[int]:
    """What follows ``prompt``, by a model without a cache."""
    return greedy(small_model(), prompt, 3)


def opened(folder: Path | None = None, places: int = 200, budget: int = 1 << 20, **options) -> Engine:
    """An engine whose files are read and written at once."""
    config = EngineConfig.model_validate({**OPTIONS, **options})
    runner, _ = build_runners(small_model(), config)
    disk = None if folder is None else DiskBlocks(folder, "space", budget)
    return Engine(config, runner, tiers=Tiers(HostBlocks(runner.cache, places), disk, AtOnce()))


def say(engine: Engine, prompt: list[int]) -> tuple[list[int], int]:
    """What follows ``prompt``, and how many of its tokens were there."""
    engine.add(Request("a", prompt, GREEDY))
    told: list[int] = []
    cached = 0
    while engine.busy:
        for delta in engine.step():
            told += delta.tokens
            cached = delta.cached
    return told, cached


def play(engine: Engine, times: int = 2) -> list[int]:
    """All prompts, ``times`` times, each with its tokens; how many tokens were there the last time."""
    cached = []
    for _ in range(times):
        cached = []
        for prompt in PROMPTS:
            told, found = say(engine, prompt)
            assert told == wanted(tuple(prompt))
            cached.append(found)
    return cached


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*/*.kv"))


def test_what_was_evicted_comes_back_from_the_host_and_says_the_same():
    plain = build_engine(small_model(), EngineConfig.model_validate(OPTIONS))
    assert play(plain) == [0] * 4, "without tiers nothing is left of them"
    engine = opened()
    assert play(engine) == [36] * 4, "all full blocks but that of the last token"
    now = engine.snapshot()
    assert now.tier_hits[0] == 4 * 9 and now.evicted and now.tier_bytes[1] == 0
    assert now.hits == 4 * 9 and now.misses == 4 * 10 + 4


def test_the_host_keeps_to_its_budget_and_to_what_was_used_last():
    engine = opened(places=12)
    most = 0
    for prompt in [*PROMPTS, PROMPTS[3], PROMPTS[2]]:
        say(engine, prompt)
        most = max(most, engine.snapshot().tier_bytes[0])
    assert most == 12 * engine._tiers._host.place_bytes
    assert play(engine, 1)[0] < 36


@pytest.mark.parametrize("backend", [Reference(), Native()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("latent", [None, 12])
def test_a_round_trip_is_exact_to_the_bit_and_touches_nothing_else(backend, dtype, latent):
    if latent and isinstance(backend, Native):
        pytest.skip("it has no latent attention")
    shape = CacheShape(3, 4, 2, 16, 10, 4, dtype, torch.device("cpu"), latent=latent)
    cache = backend.open(shape)
    slots, draw = torch.arange(40), torch_generator(0, "tests/tiers")
    keys = torch.randn(3, 2, 40, 16, generator=draw).to(dtype)
    cache.write(slots, keys, keys[..., :latent] if latent else -keys)
    before = [each.clone() for each in cache.read(slots)]
    host = HostBlocks(cache, 6)
    host.save([7, 2, 5], [4, 0, 3])
    garbage = torch.full_like(keys[:, :, :12], 9)
    cache.write(torch.cat([torch.arange(28, 32), torch.arange(8, 12), torch.arange(20, 24)]), garbage, garbage)
    host.load([0, 4, 3], [2, 7, 5])
    assert all(torch.equal(one, other) for one, other in zip(before, cache.read(slots), strict=True))
    assert len(host.content(0)) == host.place_bytes == shape.block_bytes
    host.load([4], [1])
    now = cache.read(slots)
    assert torch.equal(now[0][:, :, 4:8], before[0][:, :, 28:32])


def test_what_was_written_is_found_after_a_restart(tmp_path):
    play(opened(tmp_path), 1)
    assert files(tmp_path)
    again = opened(tmp_path)
    assert play(again, 1) == [36] * 4
    assert again.snapshot().tier_hits[1] == 4 * 9


def test_what_is_computed_sooner_than_it_is_read_is_computed(tmp_path):
    play(opened(tmp_path), 1)
    engine = opened(tmp_path)
    engine.steps.prompts._pace.add(1e-9)
    assert play(engine, 1) == [36, 0, 0, 0], "by the first one it is known how slow the disk is"
    waiting = opened(tmp_path, sequences=1)
    waiting.steps.prompts._pace.add(1e-9)
    say(waiting, PROMPTS[0])
    for number, prompt in enumerate([numbers("tiers other", 4), PROMPTS[1]]):
        waiting.add(Request(str(number), prompt, GREEDY))
    found = {delta.id: delta.cached for _ in range(20) for delta in waiting.step()}
    assert found == {"0": 0, "1": 36}, "others wait for the device"


def test_a_cache_that_is_compressed_brings_back_only_what_is_whole(tmp_path):
    """What was compressed is in no tier; the whole blocks before are, as far as no query in them is asked for."""
    kv = {"kv": {"name": "snapkv", "budget": 0.5}}
    plain = build_engine(small_model(), EngineConfig.model_validate({**OPTIONS, **kv}))
    expected = [say(plain, prompt)[0] for prompt in PROMPTS]
    engine = opened(tmp_path, **kv)
    for again in range(2):
        found = [say(engine, prompt) for prompt in PROMPTS]
        assert [told for told, _ in found] == expected
        assert all((cached > 0) == bool(again) for _, cached in found)


def test_threads_read_and_write_beside_the_engine(tmp_path):
    options = {**OPTIONS, "kv_host": "200KB", "kv_disk": tmp_path}
    for expected in (0, 36):
        engine = build_engine(small_model(), EngineConfig.model_validate(options))
        assert play(engine, 1) == [expected] * 4
        engine.close()
    assert engine.snapshot().tier_bytes[1] == sum(path.stat().st_size for path in files(tmp_path))


@pytest.mark.parametrize("harm", ["torn", "longer", "flipped", "flipped at its end", "another's", "empty", "gone"])
def test_a_damaged_file_is_a_miss_that_the_log_names(tmp_path, caplog, harm):
    play(opened(tmp_path), 1)
    found = files(tmp_path)
    other = found[-1].read_bytes()
    for path in found[:-1]:
        content = bytearray(path.read_bytes())
        if harm == "flipped":
            content[int(np.random.default_rng(len(content)).integers(len(content)))] ^= 4
        if harm == "flipped at its end":
            content[-1] ^= 128
        changed = {"torn": content[:-5], "longer": content + b"0", "another's": other, "empty": b""}
        path.unlink() if harm == "gone" else path.write_bytes(changed.get(harm, content))
    engine = opened(tmp_path)
    if harm == "gone":
        assert sum(play(engine, 1)) == 0
        return
    with caplog.at_level(logging.WARNING):
        assert sum(play(engine, 1)) == 0
    named = [path for path in found if str(path) in caplog.text]
    assert named and "torn or has flipped bits" in caplog.text
    assert play(engine) == [36] * 4, "computed anew, they are written anew"


def test_unfinished_files_of_a_killed_engine_do_no_harm(tmp_path):
    play(opened(tmp_path), 1)
    first = files(tmp_path)[0]
    partial = first.with_suffix(".1-1.partial")
    partial.write_bytes(b"half")
    assert play(opened(tmp_path), 1) == [36] * 4
    assert partial.exists(), "another engine may be writing it"
    old = partial.stat().st_mtime - 3600
    os.utime(partial, (old, old))
    opened(tmp_path)
    assert not partial.exists()


def test_a_full_disk_is_no_tier_any_more_after_one_warning(tmp_path, caplog, monkeypatch):
    play(opened(tmp_path), 1)
    written = files(tmp_path)
    real = Path.open

    def full(path: Path, mode: str = "r", *more, **options):
        if "w" in mode:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, mode, *more, **options)

    monkeypatch.setattr(Path, "open", full)
    engine = opened(tmp_path, places=12)
    with caplog.at_level(logging.WARNING):
        for index in range(5):
            prompt = numbers(f"full {index}", 40)
            assert say(engine, prompt)[0] == wanted(tuple(prompt))
        play(engine, 1)
    assert [record.getMessage() for record in caplog.records] == [
        f"blocks of the cache cannot be written to {tmp_path} any more: No space left on device; what is there is "
        "still read"
    ]
    assert files(tmp_path) == written


def test_the_disk_keeps_to_its_budget_and_to_what_was_used_last(tmp_path):
    disk = DiskBlocks(tmp_path, "one", 500)
    names = [bytes([number] * 16) for number in range(8)]
    for name in names[:4]:
        disk.write(name, memoryview(bytes(56)))
    assert disk.bytes == 4 * 100
    assert disk.read(names[0], memoryview(bytearray(56)))
    other = DiskBlocks(tmp_path, "other", 300)
    other.write(names[0], memoryview(bytes(56)))
    assert [name in disk for name in names[:4]] == [True] * 4, "each keeps to its own budget"
    assert not disk.read(names[1], memoryview(bytearray(56))), "the other one removed it"
    assert len(files(tmp_path)) == 3 and other.bytes == 300
    other.write(names[1], memoryview(bytes(400)))
    assert names[1] not in other, "it is larger than the budget"


class Rows:
    """A host's memory of places with 64 bytes, which are those of the block that was saved there."""

    places, place_bytes = 100, 64

    def __init__(self) -> None:
        self.rows = np.zeros((self.places, self.place_bytes), np.uint8)

    def save(self, blocks: list[int], places: list[int]) -> None:
        self.rows[places] = np.array(blocks)[:, None]

    def load(self, places: list[int], blocks: list[int]) -> None: ...

    def content(self, place: int) -> memoryview:
        return memoryview(self.rows[place])


class Later(Executor):
    """Does what it was given when it is told to."""

    def __init__(self) -> None:
        self._given: list[tuple[Future[Any], Callable[[], Any]]] = []

    def submit(self, function: Callable[..., Any], /, *given: Any, **named: Any) -> Future[Any]:
        self._given.append((Future(), functools.partial(function, *given, **named)))
        return self._given[-1][0]

    def work(self) -> None:
        for done, function in self._given:
            try:
                done.set_result(function())
            except Exception as error:
                done.set_exception(error)
        self._given.clear()


NAMES = [bytes([number] * 16) for number in range(46)]


@pytest.fixture
def written(tmp_path: Path) -> DiskBlocks:
    """A disk with 46 blocks."""
    disk = DiskBlocks(tmp_path, "space", 1 << 20)
    tiers = Tiers(Rows(), disk)
    for number, name in enumerate(NAMES):
        tiers.keep([(name, number)])
    tiers.close()
    return disk


def test_small_blocks_are_read_together_and_each_stands_for_itself(tmp_path, written, caplog):
    torn = next(path for path in files(tmp_path) if NAMES[7].hex() in path.name)
    torn.write_bytes(torn.read_bytes()[:-1])
    rows, workers = Rows(), Later()
    tiers = Tiers(rows, written, workers)
    coming = tiers.fetch(iter(NAMES))
    assert len(coming) == 16, "three of them in each, and one in the last"
    assert tiers.fetch(iter(NAMES)) == coming, "others wait for the same"
    workers.work()
    assert [each.result() for each in coming] == [number != 2 for number in range(16)]
    assert list(tiers.find(NAMES)) == NAMES[:7] and str(torn) in caplog.text
    assert not tiers.knows(NAMES[7]) and tiers.disk_hits == 45
    for first, last in ((0, 7), (8, 46)):
        found = tiers.find(NAMES[first:last])
        assert [rows.content(place)[-1] for place in found.values()] == list(range(first, last))
    assert tiers.host_bytes == 45 * 64


def test_each_second_counts_once_however_many_are_read_at_a_time(written):
    """Four threads, each of which takes a second for a block."""
    now, workers = [0.0], Later()
    tiers = Tiers(Rows(), written, workers, clock=lambda: now[0])
    for number in range(40):
        (coming,) = tiers.fetch(NAMES[number : number + 1])
        assert not coming.done()
    jobs, workers._given = workers._given, []
    ticks: dict[int, float] = {}

    def clock(number: int) -> float:
        ticks[number] = number // 4 + (number in ticks)
        return ticks[number]

    for number, job in enumerate(jobs):
        tiers.pace._clock = functools.partial(clock, number)
        workers._given = [job]
        workers.work()
    tiers.find([])
    assert tiers.disk_hits == 40 and tiers.pace.each == pytest.approx(0.25, rel=0.1)


def test_what_is_computed_sooner_stays_on_disk_and_is_tried_again_some_day(written):
    now = itertools.count()
    tiers = Tiers(Rows(), written, AtOnce(), clock=lambda: float(next(now)))
    assert tiers.fetch(NAMES[:3], seconds=0.1), "nobody knows yet how fast it is"
    assert list(tiers.find(NAMES[:5])) == NAMES[:3] and tiers.pace.each == 1.0
    assert not tiers.fetch(NAMES[:5], seconds=0.9), "three are here, and two stay there"
    assert tiers.fetch(NAMES[:5], seconds=1.1)
    assert list(tiers.find(NAMES[:5])) == NAMES[:5]
    assert not tiers.fetch(NAMES[:5], seconds=0.1), "there is nothing to decide"
    before = tiers.pace.each
    tries = next(number for number in range(100) if tiers.fetch(NAMES[5:7], seconds=before / 2))
    assert tries == 14  # 0.95^13 > 1/2 > 0.95^14


class Disk:
    """Brings 46 blocks, one after the other, each in so many ``seconds``."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.now, self.count = seconds, 0.0, 0

    def __contains__(self, name: bytes) -> bool:
        return name in NAMES

    def read(self, name: bytes, into: memoryview) -> bool:
        self.now += self.seconds
        self.count += 1
        return True


@pytest.mark.parametrize("workers", [AtOnce, Later], ids=["at once", "later"])
@pytest.mark.parametrize(
    ("slower", "read"), [(0.1, 46), (0.9, 46), (1.1, 16), (50, 16)], ids=["fast", "as fast", "slow", "very slow"]
)
def test_of_a_disk_that_shows_slow_no_more_is_read_than_it_takes_to_see_that(slower, read, workers):
    """From the first fetch on, with blocks that are computed in a second."""
    disk, given = Disk(slower), workers()
    tiers = Tiers(Rows(), disk, given, clock=lambda: disk.now)
    coming = tiers.fetch(iter(NAMES), seconds=1.0)
    if workers is Later:
        given.work()
    assert all(each.done() for each in coming) and disk.count == read
    there = [name for name in NAMES if name in tiers.find([name])]
    assert len(there) == read and tiers.host_bytes == read * 64, "nor are places held for the rest"
    if read < len(NAMES):
        assert not tiers.fetch(iter(set(NAMES) - {*there}), seconds=1.0), "the next one does not even begin"
        assert disk.now + (len(NAMES) - len(tiers.find(NAMES))) <= 46 + 16 * slower


def test_where_others_wait_for_the_device_a_slow_disk_is_read_to_the_end():
    disk = Disk(50.0)
    tiers = Tiers(Rows(), disk, AtOnce(), clock=lambda: disk.now)
    tiers.fetch(iter(NAMES), seconds=math.inf)
    assert disk.count == 46


def test_no_place_is_lost_where_reading_fails_in_a_way_that_nobody_foresaw(written, monkeypatch):
    workers, read = Later(), DiskBlocks.read
    tiers = Tiers(Rows(), written, workers)

    def failing(disk: DiskBlocks, name: bytes, into: memoryview) -> bool:
        if name == NAMES[4]:
            raise RuntimeError("no such luck")
        return read(disk, name, into)

    monkeypatch.setattr(DiskBlocks, "read", failing)
    coming = tiers.fetch(iter(NAMES))
    workers.work()
    assert [each.exception() is None for each in coming] == [number != 1 for number in range(16)]
    assert list(tiers.find(NAMES)) == NAMES[:4] and tiers.host_bytes == 44 * 64


def test_a_folder_that_cannot_be_used_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot hold blocks"):
        DiskBlocks(tmp_path / "file", "space", 1)


def test_models_whose_keys_and_values_differ_have_folders_of_their_own():
    model = small_model()
    other = copy.deepcopy(model)
    with torch.no_grad():
        next(iter(other.parameters())).add_(1e-3)
    marks = {
        fingerprint(model, torch.float32, 16),
        fingerprint(other, torch.float32, 16),
        fingerprint(model, torch.float32, 32),
        fingerprint(copy.deepcopy(model).bfloat16(), torch.float32, 16),
    }
    assert len(marks) == 4
    assert fingerprint(copy.deepcopy(model), torch.float32, 16) in marks


def test_so_have_models_that_differ_in_what_quantized_matrices_are_stored_in():
    packed = []
    for least in (-127, -126):
        model = copy.deepcopy(small_model())
        values = torch.full(model.embedding.weight.shape, least, dtype=torch.int8)
        swap(model, "embedding.weight", Packed(Int8(), {"values": values, "scale": torch.ones(len(values), 1)}))
        packed.append(model)
    one, other = (fingerprint(model) for model in packed)
    assert one != other and one == fingerprint(copy.deepcopy(packed[0]))


def test_a_request_that_waits_for_the_disk_can_be_aborted_and_run_out_of_time(tmp_path):
    play(opened(tmp_path), 1)
    engine = opened(tmp_path)
    for index, deadline in enumerate([None, 0.0]):
        engine.add(Request(str(index), PROMPTS[index], GREEDY, deadline=deadline))
    assert len(engine._fetching) == 2 == engine.snapshot().waiting
    engine.abort("0")
    ends = {delta.id: delta.finish for delta in engine.step()}
    assert ends == {"0": Finish.ABORT, "1": Finish.DEADLINE}
    assert not engine.busy and not engine._fetching


def test_what_does_not_go_together_is_refused(tmp_path):
    with pytest.raises(ValueError, match="kv_disk needs kv_host"):
        EngineConfig(kv_disk=tmp_path)
    with pytest.raises(ValueError, match="a recording has no blocks"):
        EngineConfig.model_validate({"kv_host": "1GB", "record": tmp_path / "steps"})
    with pytest.raises(UsageError, match="kv_host is 100 bytes, and a block of the cache has"):
        build_engine(small_model(), EngineConfig.model_validate({**OPTIONS, "kv_host": 100}))


WRITER = """
import sys
from pathlib import Path
from penstock.serve.kv.disk import DiskBlocks

disk = DiskBlocks(Path(sys.argv[1]), "space", 1 << 40)
for number in range(1 << 40):
    disk.write(number.to_bytes(16, "big"), memoryview(number.to_bytes(8, "big") * 200_000))
    print(number, flush=True)
"""


@pytest.mark.slow
def test_a_folder_whose_writer_was_killed_opens_and_has_what_was_written(tmp_path):
    writer = subprocess.Popen([sys.executable, "-c", WRITER, tmp_path], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    for _ in range(30):
        last = int(writer.stdout.readline())
    writer.kill()
    writer.wait()
    disk, content = DiskBlocks(tmp_path, "space", 1 << 40), bytearray(1_600_000)
    for number in range(last + 1):
        assert disk.read(number.to_bytes(16, "big"), memoryview(content))
        assert content == number.to_bytes(8, "big") * 200_000
    assert disk.bytes == sum(path.stat().st_size for path in files(tmp_path))
