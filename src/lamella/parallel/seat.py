"""Where this process sits among the others: found in what its launcher put into the environment.

torchrun, deepspeed and `lamella train --nproc` say it in torch's own names, srun in Slurm's. A process that nobody
launched is a world of one; so is one in the shell of sbatch or salloc, whatever number of tasks the job has.
"""

import dataclasses
import os
import re
from collections.abc import Mapping, MutableMapping

from lamella.errors import UserError

SEAT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
MASTER = ("MASTER_ADDR", "MASTER_PORT")
INNER = ("TORCHELASTIC_RUN_ID", "LOCAL_SIZE")  # torchrun and deepspeed leave these, and win over a srun around them
MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
CURE = "start with torchrun, srun, deepspeed or --nproc"
FIRST_SPECIAL_STEP = 0xFFFFFFF0  # batch scripts, salloc's shell and the like (slurm.h: SLURM_BATCH_SCRIPT, ...)
FIRST_PORT = 10_000
NUM_PORTS = 19_489  # a prime; ends below 29500, the port that torchrun and deepspeed start from
PORT_STRIDE = 61

_RANGES = r"\[\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*\]"
_FIRST_NAME = re.compile(rf"([^\s,\[\]]*(?:{_RANGES}[^\s,\[\]]*)*)(?:,|$)")


@dataclasses.dataclass(frozen=True)
class Seat:
    """This process among all (`rank` of `world`) and among those of its machine (`local_rank` of `local_world`)."""

    rank: int
    world: int
    local_rank: int
    local_world: int


def find_seat(environ: MutableMapping[str, str] = os.environ) -> Seat:
    """Reads the seat, and completes RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT.

    So torch's env:// and DeepSpeed work, and a second call answers the same. Raises UserError where something is
    missing, impossible or said twice in different ways.
    """
    given = {name: environ[name] for name in (*SEAT, *MASTER) if environ.get(name)}
    if _srun_decides(environ, given):
        seat, address, port = _under_srun(environ, given)
    elif given:
        seat, address, port = _under_torch(environ, given)
    else:
        _refuse_mpirun(environ)
        seat, address, port = Seat(0, 1, 0, 1), "127.0.0.1", 0  # any free port
    environ.update(zip(SEAT, map(str, dataclasses.astuple(seat)), strict=True))
    environ.update(zip(MASTER, (address, str(port)), strict=True))
    return seat


def step_port(job: int, step: int) -> int:
    """10000 + (61 job + step) mod 19489: below the ports that Linux hands out (32768 and up).

    The steps of a job never share one, nor the same step of two jobs, unless their numbers differ by a multiple of
    19489; nor do the first 61 steps of jobs less than 319 apart.
    """
    return FIRST_PORT + (PORT_STRIDE * job + step) % NUM_PORTS


def first_host(nodes: str) -> str:
    """The first of Slurm's compressed names: `gpu003` of `gpu[003-006,010],login1`. Raises ValueError."""
    name = _FIRST_NAME.match(nodes)
    if not name or not name[1]:
        raise ValueError(nodes)
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", name[1])


def tasks_per_node(counts: str) -> list[int]:
    """[4, 4, 3] of Slurm's `4(x2),3`. Raises ValueError."""
    parts = [re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part) for part in counts.split(",")]
    if not all(parts):
        raise ValueError(counts)
    return [int(p[1]) for p in parts if p for _ in range(int(p[2] or 1))]


def _srun_decides(environ: Mapping[str, str], given: Mapping[str, str]) -> bool:
    """Whether srun started this process and no launcher inside it did.

    sbatch sets SLURM_PROCID=0 for its script, and no step; salloc sets neither. Inside a step of one task a whole set
    of torch's names is a launcher's; in one of several tasks it must agree with srun, unless its launcher left a mark.
    """
    if not environ.get("SLURM_PROCID") or not environ.get(_step_name(environ)):
        return False
    if _number(environ, _step_name(environ)) >= FIRST_SPECIAL_STEP:
        return False
    if "RANK" in given and any(environ.get(name) for name in INNER):
        return False
    return len(given) < len(SEAT) + len(MASTER) or environ.get(_world_name(environ)) != "1"


def _under_torch(environ: Mapping[str, str], given: Mapping[str, str]) -> tuple[Seat, str, int]:
    """torchrun, --nproc; deepspeed says LOCAL_SIZE for LOCAL_WORLD_SIZE."""
    local = "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in given or not environ.get("LOCAL_SIZE") else "LOCAL_SIZE"
    names = (*SEAT[:3], local)
    missing = [name for name in (*names, *MASTER) if not environ.get(name)]
    if missing:
        raise UserError(
            f"the environment has {', '.join(given)} but not {', '.join(missing)}; {CURE}, or unset {', '.join(given)}"
        )
    seat = _seat(names, *(_number(environ, name) for name in names))
    return seat, given["MASTER_ADDR"], _port(given, seat.world, 0)


def _under_srun(environ: Mapping[str, str], given: Mapping[str, str]) -> tuple[Seat, str, int]:
    """One process a task. The names of torch that the user set as well must agree; the master is the user's choice."""
    names = ("SLURM_PROCID", _world_name(environ), "SLURM_LOCALID", _counts_name(environ))
    missing = [name for name in (*names, "SLURM_NODEID", "SLURM_JOB_ID") if not environ.get(name)]
    if missing:
        raise UserError(f"srun's environment lacks {', '.join(missing)}; start with srun itself, or with torchrun")
    rank, world, local_rank = (_number(environ, name) for name in names[:3])
    counts = _counts(environ, world)
    seat = _seat(names, rank, world, local_rank, counts[_number(environ, "SLURM_NODEID")])
    _refuse_leftovers(environ, seat)
    for name, source, value in zip(SEAT, names, dataclasses.astuple(seat), strict=True):
        if name in given and _number(given, name) != value:
            raise UserError(
                f"{name}={given[name]}, but srun's {source} makes it {value}; unset {name}, or for --nproc start one"
                " task with srun"
            )
    if world == 1:
        return seat, given.get("MASTER_ADDR", "127.0.0.1"), _port(given, world, 0)
    port = step_port(_number(environ, "SLURM_JOB_ID"), _number(environ, _step_name(environ)))
    return seat, _address(environ, seat, len(counts)), _port(given, world, port)


def _counts(environ: Mapping[str, str], world: int) -> list[int]:
    """The step's tasks on each of its nodes."""
    name, node = _counts_name(environ), _number(environ, "SLURM_NODEID")
    try:
        counts = tasks_per_node(environ[name])
    except ValueError:
        raise UserError(f"{name}={environ[name]!r} is not like 4(x2),3; {CURE}") from None
    if sum(counts) != world or node >= len(counts):
        raise UserError(
            f"{name}={environ[name]} does not fit {_world_name(environ)}={world} and SLURM_NODEID={node}; {CURE}"
        )
    return counts


def _address(environ: Mapping[str, str], seat: Seat, num_nodes: int) -> str:
    """MASTER_ADDR, else the step's first node."""
    address = environ.get("MASTER_ADDR")
    if address:
        if num_nodes > 1 and re.fullmatch(r"localhost|127\.[\d.]+|::1", address):
            raise UserError(
                f"MASTER_ADDR={address} is another machine on each of the {num_nodes} nodes; unset it, or name rank 0's"
            )
        return address
    name = "SLURM_STEP_NODELIST" if environ.get("SLURM_STEP_NODELIST") else "SLURM_JOB_NODELIST"
    try:
        host = first_host(environ.get(name, ""))
    except ValueError:
        raise UserError(
            f"{name}={environ.get(name, '')!r} is not like gpu[003-006],login1; set MASTER_ADDR to rank 0's node"
        ) from None
    here = environ.get("SLURMD_NODENAME", host)
    if seat.rank == 0 and here != host:  # `srun -m arbitrary`
        raise UserError(f"rank 0 is on {here}, but {name}={environ[name]} begins with {host}; set MASTER_ADDR={here}")
    return host


def _refuse_leftovers(environ: Mapping[str, str], seat: Seat) -> None:
    """sbatch, called in a step, hands that step's names to its script; SLURM_GTIDS, this node's ranks, is set anew."""
    ranks = environ.get("SLURM_GTIDS", "")
    if ranks and len(ranks.split(",")) != seat.local_world:
        raise UserError(
            f"{_world_name(environ)}={seat.world} is left over from another step (SLURM_GTIDS={ranks}); start with"
            " srun, or unset ${!SLURM_STEP*}"
        )


def _refuse_mpirun(environ: Mapping[str, str]) -> None:
    """Else each of its processes would take itself for a world of one."""
    for name in MPI:
        if environ.get(name, "1") not in ("", "1"):
            raise UserError(f"{name}={environ[name]}, but mpirun sets no RANK; {CURE}, or unset {name}")


def _seat(names: tuple[str, ...], rank: int, world: int, local_rank: int, local_world: int) -> Seat:
    """The seat, if there can be one; `names` are where its numbers stood."""
    said = [f"{n}={v}" for n, v in zip(names, (rank, world, local_rank, local_world), strict=True)]
    if rank >= world:
        raise UserError(f"{said[0]} is not below {said[1]}; {CURE}")
    if local_rank >= local_world:
        raise UserError(f"{said[2]} is not below {said[3]}; {CURE}")
    if local_world > world:
        raise UserError(f"{said[3]} is more than {said[1]}; {CURE}")
    return Seat(rank, world, local_rank, local_world)


def _port(given: Mapping[str, str], world: int, default: int) -> int:
    """MASTER_PORT; 0, any free port, only serves a world of one."""
    port = _number(given, "MASTER_PORT") if "MASTER_PORT" in given else default
    if port > 65535 or (port == 0 and world > 1):
        raise UserError(f"MASTER_PORT={port} is not from 1 to 65535; set a free port of rank 0's machine, or unset it")
    return port


def _number(environ: Mapping[str, str], name: str) -> int:
    if not environ[name].isdecimal():
        raise UserError(f"{name}={environ[name]!r} is not a whole number; {CURE}, or unset it")
    return int(environ[name])


def _step_name(environ: Mapping[str, str]) -> str:
    return "SLURM_STEP_ID" if environ.get("SLURM_STEP_ID") else "SLURM_STEPID"


def _world_name(environ: Mapping[str, str]) -> str:
    return "SLURM_STEP_NUM_TASKS" if environ.get("SLURM_STEP_NUM_TASKS") else "SLURM_NTASKS"


def _counts_name(environ: Mapping[str, str]) -> str:
    return "SLURM_STEP_TASKS_PER_NODE" if environ.get("SLURM_STEP_TASKS_PER_NODE") else "SLURM_TASKS_PER_NODE"
