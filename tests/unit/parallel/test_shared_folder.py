"""A folder of several processes: whole, or not there."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from penstock.core.files import sweep
from penstock.parallel.shared_folder import SharedFolder, entry
from penstock.parallel.world import World
from penstock.testing.ranks import ranks


def written(world: World, target: Path, lost: str = "") -> list[str]:
    """Each process writes its file; the process 1 may be ``lost`` before, or the leading one at the end."""

    def own(folder: Path) -> list[Path]:
        if lost == "before" and world.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        (folder / "inner").mkdir(exist_ok=True)
        path = folder / "inner" / f"{world.rank}.txt"
        path.write_text(f"of {world.rank}")
        return [path]

    told = {}

    def last(folder: Path, entries: dict[str, dict[str, object]]) -> None:
        if lost == "last":
            os.kill(os.getpid(), signal.SIGKILL)
        told.update(entries)
        (folder / "last.txt").write_text("last")

    SharedFolder(target, world).write(own, last)
    world.barrier()
    if world.leads:
        assert told == {f"inner/{rank}.txt": entry(target / "inner" / f"{rank}.txt") for rank in range(world.size)}
    return sorted(path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file())


def test_all_files_appear_together(tmp_path):
    target = tmp_path / "runs" / "made"
    results = ranks(3, lambda world: [written(world, target), written(world, target)])
    wanted = ["inner/0.txt", "inner/1.txt", "inner/2.txt", "last.txt"]
    assert [result.get("returned") for result in results] == [[wanted] * 2] * 3
    assert [path.name for path in target.parent.iterdir()] == ["made"]


def synced(world: World, target: Path) -> bool:
    """Whether this process has synced its own file: on another host, the leading one cannot."""
    done, real = set(), os.fsync

    def fsync(descriptor: int) -> None:
        real(descriptor)
        done.add(os.fstat(descriptor).st_ino)

    os.fsync = fsync
    written(world, target)
    return (target / "inner" / f"{world.rank}.txt").stat().st_ino in done


def test_each_process_syncs_what_it_wrote(tmp_path):
    assert [result.get("returned") for result in ranks(2, lambda world: synced(world, tmp_path / "made"))] == [True] * 2


@pytest.mark.parametrize("lost", ["before", "last"])
def test_nothing_appears_where_a_process_is_lost(tmp_path, lost):
    target = tmp_path / "made"
    results = ranks(2, lambda world: written(world, target, lost))
    other, killed = (0, 1) if lost == "before" else (1, 0)
    assert results[killed] == {}
    assert results[other]["raised"][0] == "LossError"
    assert f"rank {killed} has ended without a word" in results[other]["raised"][1]
    sweep(tmp_path)
    assert list(tmp_path.iterdir()) == []
