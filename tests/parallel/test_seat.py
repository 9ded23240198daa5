"""Every launcher's processes find their seats, in environments copied from torchrun, DeepSpeed 0.19 and Slurm 22.05."""

import base64
import dataclasses
import json
import os
import re
import subprocess
import sys

import pytest

from lamella.errors import UserError
from lamella.parallel.seat import MASTER, SEAT, find_seat, first_host, step_port, tasks_per_node

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2",
    "ROLE_NAME": "default",
    "ROLE_RANK": "5",
    "ROLE_WORLD_SIZE": "8",
    "MASTER_ADDR": "n1",
    "MASTER_PORT": "42421",
    "TORCHELASTIC_RESTART_COUNT": "0",
    "TORCHELASTIC_MAX_RESTARTS": "0",
    "TORCHELASTIC_RUN_ID": "7",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}
DEEPSPEED = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_SIZE": "4",
    "CROSS_RANK": "1",
    "CROSS_SIZE": "2",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
    "CUDA_VISIBLE_DEVICES": "0,1,2,3",
}
NPROC = {name: TORCHRUN[name] for name in (*SEAT, *MASTER)}
SALLOC = {  # salloc -n5 -N2
    "SLURM_JOBID": "1",
    "SLURM_JOB_CPUS_PER_NODE": "3(x2)",
    "SLURM_JOB_ID": "1",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_NNODES": "2",
    "SLURM_NODELIST": "n[1-2]",
    "SLURM_NPROCS": "5",
    "SLURM_NTASKS": "5",
    "SLURM_TASKS_PER_NODE": "3,2",
}
SBATCH = SALLOC | {  # the script of the same job
    "ENVIRONMENT": "BATCH",
    "SLURMD_NODENAME": "n1",
    "SLURM_GTIDS": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_PROCID": "0",
    "SLURM_TASKS_PER_NODE": "3(x2)",
    "SLURM_TASK_PID": "24",
    "SLURM_TOPOLOGY_ADDR": "n1",
}
SRUN = SBATCH | {  # the last of its step's processes
    "SLURMD_NODENAME": "n2",
    "SLURM_DISTRIBUTION": "block",
    "SLURM_GTIDS": "3,4",
    "SLURM_LAUNCH_NODE_IPADDR": "10.213.91.1",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_PROCID": "4",
    "SLURM_SRUN_COMM_HOST": "10.213.91.1",
    "SLURM_SRUN_COMM_PORT": "46613",
    "SLURM_STEPID": "0",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_LAUNCHER_PORT": "46613",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "3,2",
    "SLURM_TASKS_PER_NODE": "3,2",
    "SLURM_TASK_PID": "26",
    "SLURM_TOPOLOGY_ADDR": "n2",
}
FIRST = SRUN | {"SLURMD_NODENAME": "n1", "SLURM_GTIDS": "0,1,2", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
FIRST["SLURM_PROCID"] = "0"
ONE = FIRST | {  # srun -n1, from the same script
    "SLURM_GTIDS": "0",
    "SLURM_NTASKS": "1",
    "SLURM_STEP_NODELIST": "n1",
    "SLURM_STEP_NUM_TASKS": "1",
    "SLURM_STEP_TASKS_PER_NODE": "1",
    "SLURM_TASKS_PER_NODE": "1",
}
CYCLIC = SRUN | {  # srun -n5 -N2 -m cyclic
    "SLURMD_NODENAME": "n1",
    "SLURM_GTIDS": "0,2,3,4",
    "SLURM_LOCALID": "3",
    "SLURM_NODEID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "4,1",
}
HETEROGENEOUS = SRUN | {  # srun --het-group=0,1 of `-n2 -N1` and `-n2 -N2`
    "SLURMD_NODENAME": "n3",
    "SLURM_GTIDS": "3",
    "SLURM_HET_SIZE": "2",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "2",
    "SLURM_PROCID": "3",
    "SLURM_STEP_NODELIST": "n[1-3]",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2,1(x2)",
}
INTERACTIVE = SBATCH | {  # salloc's shell with LaunchParameters=use_interactive_step
    "SLURM_PTY_PORT": "34961",
    "SLURM_STEPID": "4294967290",
    "SLURM_STEP_ID": "4294967290",
    "SLURM_STEP_NODELIST": "n1",
    "SLURM_STEP_NUM_TASKS": "1",
    "SLURM_STEP_TASKS_PER_NODE": "1",
}
SUBMITTED_IN_A_STEP = FIRST | {  # the script of a job whose sbatch a rank of five has called
    "SLURM_GTIDS": "0",
    "SLURM_JOB_ID": "3",
    "SLURM_JOB_NODELIST": "n1",
    "SLURM_TASKS_PER_NODE": "1",
}
PARTIAL = {"MASTER_ADDR": "n1", "MASTER_PORT": "1234", "WORLD_SIZE": "5"}  # what scripts like to export before srun
ALONE = ((0, 1, 0, 1), "127.0.0.1", "0")

FOUND = {
    "by hand": ({}, *ALONE),
    "torchrun": (TORCHRUN, (5, 8, 1, 4), "n1", "42421"),
    "deepspeed": (DEEPSPEED, (5, 8, 1, 4), "10.0.0.1", "29500"),
    "nproc": (NPROC, (5, 8, 1, 4), "n1", "42421"),
    "salloc": (SALLOC, *ALONE),
    "sbatch": (SBATCH, *ALONE),
    "nproc in sbatch": (SBATCH | NPROC, (5, 8, 1, 4), "n1", "42421"),
    "torchrun in sbatch": (SBATCH | TORCHRUN, (5, 8, 1, 4), "n1", "42421"),
    "an interactive step": (INTERACTIVE, *ALONE),
    "srun": (SRUN, (4, 5, 1, 2), "n1", "10061"),
    "srun, the first": (FIRST, (0, 5, 0, 3), "n1", "10061"),
    "srun, cyclic": (CYCLIC, (4, 5, 3, 4), "n1", "10061"),
    "srun, heterogeneous": (HETEROGENEOUS, (3, 4, 0, 1), "n1", "10061"),
    "srun, a later step": (SRUN | {"SLURM_STEP_ID": "7"}, (4, 5, 1, 2), "n1", "10068"),
    "srun, its own master": (SRUN | PARTIAL, (4, 5, 1, 2), "n1", "1234"),
    "srun, an empty master": (SRUN | {"MASTER_ADDR": "", "MASTER_PORT": ""}, (4, 5, 1, 2), "n1", "10061"),
    "srun, another first node": (
        FIRST | {"SLURMD_NODENAME": "n2", "SLURM_NODEID": "1", "SLURM_GTIDS": "0,4", "MASTER_ADDR": "n2"},
        (0, 5, 0, 2),
        "n2",
        "10061",
    ),
    "srun -n1": (ONE, *ALONE),
    "nproc in srun -n1": (ONE | NPROC, (5, 8, 1, 4), "n1", "42421"),
    "torchrun in srun": (SRUN | TORCHRUN, (5, 8, 1, 4), "n1", "42421"),
    "deepspeed in srun": (SRUN | DEEPSPEED, (5, 8, 1, 4), "10.0.0.1", "29500"),
}


@pytest.mark.parametrize(("environ", "seat", "address", "port"), FOUND.values(), ids=FOUND)
def test_found(environ, seat, address, port):
    environ = dict(environ)
    assert dataclasses.astuple(find_seat(environ)) == seat
    assert [environ[name] for name in SEAT] == [str(n) for n in seat]
    assert (environ["MASTER_ADDR"], environ["MASTER_PORT"]) == (address, port)
    completed = dict(environ)
    assert dataclasses.astuple(find_seat(environ)) == seat
    assert environ == completed


def without(environ, *names):
    return {name: value for name, value in environ.items() if name not in names}


REFUSED = {
    "no RANK": (without(NPROC, "RANK", "LOCAL_RANK"), "has WORLD_SIZE, .* but not RANK, LOCAL_RANK; start with"),
    "only a master": (SBATCH | PARTIAL, "but not RANK, LOCAL_RANK, LOCAL_WORLD_SIZE; .* unset WORLD_SIZE, MASTER_ADDR"),
    "no LOCAL_SIZE": (without(DEEPSPEED, "LOCAL_SIZE"), "but not LOCAL_WORLD_SIZE"),
    "no number": (NPROC | {"RANK": "first"}, "RANK='first' is not a whole number; start with"),
    "negative": (NPROC | {"LOCAL_RANK": "-1"}, "LOCAL_RANK='-1' is not a whole number"),
    "rank": (NPROC | {"RANK": "8"}, "RANK=8 is not below WORLD_SIZE=8"),
    "local rank": (DEEPSPEED | {"LOCAL_RANK": "4"}, "LOCAL_RANK=4 is not below LOCAL_SIZE=4"),
    "local world": (NPROC | {"LOCAL_WORLD_SIZE": "9"}, "LOCAL_WORLD_SIZE=9 is more than WORLD_SIZE=8"),
    "port": (NPROC | {"MASTER_PORT": "65536"}, "MASTER_PORT=65536 is not from 1 to 65535"),
    "any port": (SRUN | {"MASTER_PORT": "0"}, "MASTER_PORT=0 is not from 1 to 65535"),
    "mpirun": ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, "OMPI_COMM_WORLD_SIZE=2, .* start with"),
    "no node": (without(SRUN, "SLURM_NODEID"), "lacks SLURM_NODEID; start with"),
    "counts": (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "3x2"}, "SLURM_STEP_TASKS_PER_NODE='3x2' is not like"),
    "other counts": (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "3(x2)"}, "3.x2. does not fit SLURM_STEP_NUM_TASKS=5"),
    "task": (SRUN | {"SLURM_PROCID": "5"}, "SLURM_PROCID=5 is not below SLURM_STEP_NUM_TASKS=5"),
    "local task": (SRUN | {"SLURM_LOCALID": "2"}, "SLURM_LOCALID=2 is not below SLURM_STEP_TASKS_PER_NODE=2"),
    "no nodes": (
        without(SRUN, "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"),
        "SLURM_JOB_NODELIST='' .* set MASTER_ADDR",
    ),
    "cut nodes": (SRUN | {"SLURM_STEP_NODELIST": "n[1-"}, r"SLURM_STEP_NODELIST='n\[1-' .* set MASTER_ADDR"),
    "localhost": (SRUN | {"MASTER_ADDR": "localhost"}, "MASTER_ADDR=localhost is another machine on each of the 2"),
    "loopback": (SRUN | {"MASTER_ADDR": "127.0.1.1"}, "MASTER_ADDR=127.0.1.1 is another machine"),
    "another first node": (FIRST | {"SLURMD_NODENAME": "n2"}, "rank 0 is on n2, but .* set MASTER_ADDR=n2"),
    "another size": (SRUN | PARTIAL | {"WORLD_SIZE": "4"}, "WORLD_SIZE=4, but srun's SLURM_STEP_NUM_TASKS makes it 5"),
    "nproc in srun -n5": (SRUN | NPROC, "RANK=5, but srun's SLURM_PROCID makes it 4; unset RANK"),
    "a rank's sbatch": (SUBMITTED_IN_A_STEP, "SLURM_STEP_NUM_TASKS=5 is left over from another step"),
}


@pytest.mark.parametrize(("environ", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(environ, message):
    given = dict(environ)
    with pytest.raises(UserError, match=message) as caught:
        find_seat(given)
    assert "\n" not in str(caught.value)
    assert given == environ


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("login1", "login1"),
        ("gpu[003-006,010],login1", "gpu003"),
        ("gpu[7,9-12]", "gpu7"),
        ("gpu[003-006]-ib.cluster,x", "gpu003-ib.cluster"),
        ("rack[2-3]node[01-16]", "rack2node01"),
        ("a,b[1-2]", "a"),
    ],
)
def test_first_host(nodes, host):
    assert first_host(nodes) == host


@pytest.mark.parametrize("nodes", ["", ",a", "gpu[", "gpu[1-2", "gpu1]", "gpu[]", "gpu[a-b]", "a b"])
def test_no_host(nodes):
    with pytest.raises(ValueError):
        first_host(nodes)


def test_tasks_per_node():
    assert tasks_per_node("4(x2),3") == [4, 4, 3]
    assert tasks_per_node("1") == [1]
    for counts in ("", "4,", "4x2", "4(x)", "-1"):
        with pytest.raises(ValueError):
            tasks_per_node(counts)


def test_ports():
    ports = {step_port(job, step) for job in range(4_000_000, 4_000_319) for step in range(61)}
    assert len(ports) == 319 * 61
    assert min(ports) >= 10_000
    assert max(ports) < 29_500
    assert len({step_port(job, 0) for job in range(19_489)}) == len({step_port(1, s) for s in range(19_489)}) == 19_489


SAY = """
import dataclasses, os, sys
from lamella.parallel.seat import find_seat
said = dataclasses.astuple(find_seat()), os.environ["LOCAL_WORLD_SIZE"], "torch" in sys.modules
os.write(1, f"{said}\\n".encode())
"""
WORLD = base64.urlsafe_b64encode(json.dumps({"localhost": [0, 1]}).encode()).decode()
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node=2"],
    "deepspeed": ["deepspeed.launcher.launch", f"--world_info={WORLD}", "--no_local_rank"],
    "python": [],
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launched(launcher, tmp_path):
    (tmp_path / "say.py").write_text(SAY)
    module = LAUNCHERS[launcher]
    environ = {k: v for k, v in os.environ.items() if k not in (*SEAT, *MASTER) and not k.startswith("SLURM_")}
    done = subprocess.run(
        [sys.executable, *(["-m", *module] if module else []), str(tmp_path / "say.py")],
        env=environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    world = 2 if module else 1
    said = sorted(re.findall(r"^\(\(.*\)$", done.stdout, re.M))
    assert said == [str(((rank, world, rank, world), str(world), False)) for rank in range(world)]
