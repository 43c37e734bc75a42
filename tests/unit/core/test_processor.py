"""What the processor does well: precision by timed products, threads by affinity, control groups and load."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from penstock.core import processor
from penstock.core.devices import label
from penstock.core.processor import cores, fast_dtype, free_threads, kind, product_rate, quota

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def forgetful():
    """Nothing is remembered from one test to another."""
    fast_dtype.cache_clear()
    threads = torch.get_num_threads()
    yield
    fast_dtype.cache_clear()
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("bf16", "chosen"), [(0.01, torch.float32), (1.1, torch.float32), (2.0, torch.bfloat16)])
def test_bf16_is_chosen_where_its_products_are_faster(monkeypatch, bf16, chosen):
    monkeypatch.setattr(processor, "product_rate", lambda dtype: 1e11 * (bf16 if dtype is torch.bfloat16 else 1))
    answer = fast_dtype(CPU)
    assert answer.choice is chosen
    assert answer.reason == f"products run at {100 * bf16:.3g} GFLOP/s in bf16 and at 100 in fp32 here"
    assert kind().endswith(", bf16") == (chosen is torch.bfloat16)


@pytest.mark.parametrize(("capability", "chosen"), [((7, 5), torch.float32), ((8, 0), torch.bfloat16)])
def test_a_cuda_device_is_asked(monkeypatch, capability, chosen):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert fast_dtype(torch.device("cuda", 0)).choice is chosen


def test_the_choice_is_that_of_training_products():
    """The dtype chosen from small products is not the slower one for those of a layer, by far."""
    choice = fast_dtype(CPU).choice
    other = torch.float32 if choice is torch.bfloat16 else torch.bfloat16
    assert product_rate(choice, size=320) > 0.8 * product_rate(other, size=320)


def test_measuring_leaves_the_threads_as_they_were():
    torch.set_num_threads(2)
    product_rate(torch.float32)
    assert torch.get_num_threads() == 2


def made(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


V1 = "2:cpu,cpuacct:/a/b\n1:memory:/x\n"


@pytest.mark.parametrize(
    ("files", "granted"),
    [
        ({}, float("inf")),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, float("inf")),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/b/cpu.max": "400000 100000\n",
                "sys/fs/cgroup/a/cpu.max": "50000 100000\n",
            },
            0.5,
        ),
        # In a container: the path is the host's, what is mounted is the container's own group.
        ({"proc/self/cgroup": "0::/docker/1f\n", "sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2.0),
        (
            {
                "proc/self/cgroup": V1,
                "sys/fs/cgroup/cpu,cpuacct/a/b/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu,cpuacct/a/b/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_quota_us": "300000\n",
                "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_period_us": "100000\n",
            },
            3.0,
        ),
        (
            {
                "proc/self/cgroup": "3:cpu:/host\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "100000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            1.0,
        ),
    ],
    ids=["none", "v2", "v2 without limit", "v2 above", "v2 in a container", "v1 above", "v1 in a container"],
)
def test_what_control_groups_grant(tmp_path, files, granted):
    assert quota(made(tmp_path, files)) == granted


@pytest.mark.parametrize(("grant", "threads"), [("20000", 1), ("140000", 1), ("150000", 2), ("max", 8)])
def test_cores_are_those_of_affinity_and_control_group(tmp_path, monkeypatch, grant, threads):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    root = made(tmp_path, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": f"{grant} 100000\n"})
    answer = cores(root)
    assert answer.choice == threads
    assert answer.reason


@pytest.mark.parametrize(
    ("rates", "best"),
    [({8: 8.0, 4: 5.0}, 8), ({8: 2.0, 4: 3.0, 2: 2.5}, 4), ({8: 1.0, 4: 2.0, 2: 3.0, 1: 4.0}, 1)],
)
def test_fewer_threads_where_cores_are_taken(monkeypatch, rates, best):
    """Halves as long as it gains, and leaves the best number set."""
    monkeypatch.setattr(processor, "_steady_rate", lambda seconds: 1e9 * rates[torch.get_num_threads()])
    answer = free_threads(8)
    assert (answer.choice, torch.get_num_threads()) == (best, best)
    assert f"{rates[best]:.3g} GFLOP/s with {best}" in answer.reason


def shared(**environment: str) -> list[str]:
    """What OpenMP is told, in a process of its own, where the control group grants one core of several."""
    script = (
        "import os; from penstock.core import processor; "
        "processor._allowed, processor.quota = lambda: 4, lambda root: 1.0; processor.share_cores(); "
        "import sys; print(os.environ.get('OMP_NUM_THREADS'), os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    )
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_"))}
    command = [sys.executable, "-c", script]
    return subprocess.run(command, env=kept | environment, capture_output=True, text=True, check=True).stdout.split()


def test_openmp_is_told_before_torch_is_there():
    assert shared() == ["1", "1000", "False"]


def test_what_the_user_has_set_stays():
    assert shared(OMP_NUM_THREADS="3", GOMP_SPINCOUNT="7") == ["3", "7", "False"]
    assert shared(OMP_WAIT_POLICY="active") == ["1", "None", "False"]


def test_a_label_tells_the_kind():
    assert label(CPU).startswith(f"cpu-{torch.get_num_threads()}-")
    assert label(CPU).endswith(kind().lower().replace(", ", "-").replace(" ", "-"))
