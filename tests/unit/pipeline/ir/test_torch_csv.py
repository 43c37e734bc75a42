"""PyTorch's CSV format: read by PyTorch's own loader, and read back."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.pipelining import schedules as pytorch

from penstock.core.errors import UsageError
from penstock.pipeline.ir.refusal import RefusalError
from penstock.pipeline.ir.torch_csv import from_csv, to_csv
from penstock.pipeline.simulate.simulator import Costs, simulate
from penstock.policy import create, index

#: Schedules for which the format has no words, and what is said of them.
INEXPRESSIBLE = {"pipedream": "keeps one version of the weights"}
#: What PyTorch does not read: replicas of stages, for which it has no word.
NOT_READ = ("bitpipe", "chimera", "dualpipe")

GOOD = "0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1\n"


def load(path: Path, devices: int, stages: int, microbatches: int) -> pytorch._PipelineScheduleRuntime:
    """PyTorch's runtime with the schedule loaded, checked and lowered, short of process groups and models."""
    runtime = object.__new__(pytorch._PipelineScheduleRuntime)
    runtime.__dict__.update(
        pipeline_order={},
        pp_group_size=devices,
        _num_stages=stages,
        _n_microbatches=microbatches,
        _stages=[],
        _defer_pp_recv=False,
    )
    runtime._load_csv(str(path))
    return runtime


@pytest.mark.parametrize("name", index().names("pipeline.schedule"))
@pytest.mark.parametrize(("p", "m"), [(2, 4), (4, 8), (4, 4)])
def test_pytorchs_runtime_loads_and_runs_what_we_export(tmp_path, name, p, m):
    schedule = create("pipeline.schedule", name).build(p, 2 * m if name == "dualpipe" else max(m, 2 * p))
    m = schedule.microbatches
    if name in INEXPRESSIBLE:
        with pytest.raises(UsageError, match=INEXPRESSIBLE[name]):
            to_csv(schedule)
        return
    path = tmp_path / "schedule.csv"
    path.write_text(to_csv(schedule))
    if name in NOT_READ:
        with pytest.raises(RuntimeError, match="Invalid action"):
            load(path, p, schedule.stages, m)
        return
    runtime = load(path, p, schedule.stages, m)
    assert runtime.stage_index_to_group_rank == {s: devices[0] for s, devices in enumerate(schedule.placement)}
    if schedule.overlapped:  # of which PyTorch's dry run knows nothing
        read = [",".join(map(str, runtime.pipeline_order_with_comms[rank])) for rank in range(p)]
        assert from_csv("\n".join(read), "compute_comms.csv") == schedule
        return
    # PyTorch's dry run of tasks and transfers knows no FSDP, and raises where they deadlock.
    lowered = {
        rank: [action for action in actions if not re.search("SHARD|REDUCE", str(action))]
        for rank, actions in runtime.pipeline_order_with_comms.items()
    }
    ran = pytorch._simulate_comms_compute(lowered, lambda stage: schedule.placement[stage][0], schedule.stages)
    for rank, line in enumerate(path.read_text().splitlines()):
        words = [str(action) for action in ran[rank] if action is not None]
        assert [word for word in words if not re.search("SEND|RECV", word)] == line.split(",")
    transfers = simulate(schedule, Costs.even(schedule)).transfers
    assert sum("SEND" in str(action) for actions in ran.values() for action in actions) == transfers
    with_communication = [",".join(map(str, runtime.pipeline_order_with_comms[rank])) for rank in range(p)]
    assert from_csv("\n".join(with_communication), "compute_comms.csv") == schedule


@given(
    name=st.sampled_from([n for n in index().names("pipeline.schedule") if n not in INEXPRESSIBLE]),
    p=st.integers(1, 5),
    rounds=st.integers(1, 3),
)
def test_reading_back_gives_the_same_schedule(name, p, rounds):
    try:
        schedule = create("pipeline.schedule", name).build(p, rounds * p)
    except RefusalError as refusal:
        schedule = create("pipeline.schedule", name).build(refusal.devices, max(2, refusal.microbatches))
    assert from_csv(to_csv(schedule), "x.csv") == schedule


def test_what_pytorch_writes_is_read(tmp_path):
    """With its idle steps as empty cells."""
    text = "0F0,0F1,,,0B0,,0B1\n,1F0,1B0,1F1,1B1,,\n"
    schedule = from_csv(text, "x.csv")
    assert to_csv(schedule) == GOOD
    assert (schedule.devices, schedule.stages, schedule.microbatches) == (2, 2, 2)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "x.csv holds no task"),
        (",,\n", "x.csv holds no task"),
        (GOOD.replace("1B1", "1X1"), "x.csv, line 2, column 4: '1X1' is no task"),
        (GOOD.replace("0B0", "0SEND_X0"), "x.csv, line 1, column 3: '0SEND_X0' is no task"),
        (GOOD.replace("1F1,1B1", "(1F1;1B1)OVERLAP_F_B"), "x.csv, line 2: 1B1 waits for 1F1, and cannot overlap"),
        (GOOD.replace("1B0,1F1", "(1B0;1F1)OVERLAP_F_B"), "x.csv, line 2: 1B0 overlaps with no backward after it"),
        (GOOD.replace("0F1,0B0", "(0F1;0B0)OVERLAP_F_B").replace("1B0,1F1", "1F1,1B0"), "deadlock: 0B0 on device 0"),
        (
            GOOD.replace("0F0", "r2:0F0"),
            "no line has a task of stage 0, replica 1, though there is a stage 0, replica 2",
        ),
        (GOOD.replace("1B1", "1F" + "9" * 30), "is no task"),
        (GOOD.replace("1B1", "0B1"), "x.csv, line 2: 0B1 is of stage 0, which line 1 has already"),
        (GOOD.replace(",1B1", ""), "x.csv, line 2: 1B1 is missing"),
        (GOOD.replace("0F1,", ""), "x.csv, line 1: 0B1 comes without 0F1 before it"),
        (GOOD.replace("1B1", "1B0"), "x.csv, line 2: 1B0 comes after that work was done"),
        (GOOD.replace("1", "2"), "no line has a task of stage 1, though there is a stage 2"),
        ("0F0,0B0,0F2,0B2\n", "no line has a task of microbatch 1, though there is a microbatch 2"),
        ("0F0,0B0,0F1,0B1\n1F0,1F1,1B0,1B1\n", "x.csv, line 1: deadlock: 0B0 on device 0 waits for 1B0 of device 1"),
    ],
)
def test_faults_name_the_line(text, complaint):
    with pytest.raises(UsageError) as caught:
        from_csv(text, "x.csv")
    assert complaint in str(caught.value)


@given(st.text(alphabet="0129FIWB,\n xr:;()", max_size=60))
def test_any_text_is_read_or_refused(text):
    try:
        schedule = from_csv(text, "x.csv")
    except UsageError:
        return
    assert from_csv(to_csv(schedule), "y.csv") == schedule
