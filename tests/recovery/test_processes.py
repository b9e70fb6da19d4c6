"""Several processes end where one does; and no moment at which a process is killed makes a difference."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fxcompress.errors import UsageError
from tests.recovery.cases import SAME, State, Stop, interrupted

HERE = Path(__file__).resolve().parent
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
CLOSE = 1e-5


def launch(*command: str, **options: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **options}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=HERE.parents[1]
    )


def finished(*launched: subprocess.Popen[str]) -> None:
    try:
        for process in launched:
            output, _ = process.communicate(timeout=500)
            assert process.returncode == 0, output
    finally:
        for process in launched:
            process.kill()


def distance(a: State, b: State) -> float:
    assert a.keys() == b.keys()
    return max((float((a[key] - b[key]).abs().max()) for key in a), default=0.0)


def check(folder: Path, world: int, wanted: dict[str, State]) -> None:
    """Every process has what one process by itself ends with."""
    for rank in range(world):
        processes, results = torch.load(folder / f"results-{rank}.pt")
        assert processes == world
        for name, single in wanted.items():
            assert distance(results[name], single) < CLOSE, (name, rank)


def test_two_processes_are_as_one(tmp_path: Path) -> None:
    names = ("uneven", "loaded", "norms", "distilled", "calibrated", "not_a_number")
    wanted = {name: SAME[name]() for name in names}
    # One process begins what two end, and the other way round.
    wanted["ended"] = interrupted(str(tmp_path / "whole"), None).state_dict()
    with pytest.raises(Stop):
        interrupted(str(tmp_path / "ended"), 11)
    worker = str(HERE / "worker.py")
    finished(launch(*TORCHRUN, "--standalone", "--nproc-per-node=2", worker, str(tmp_path), *names, "begun", "ended"))
    check(tmp_path, 2, wanted)
    places = sorted(path.name for path in (tmp_path / "begun").iterdir())
    assert places == ["step-0000000009", "step-0000000010"]
    assert distance(interrupted(str(tmp_path / "begun"), None).state_dict(), wanted["ended"]) < CLOSE


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3, 4])
def test_all_trainings_in_several_processes(tmp_path: Path, processes: int) -> None:
    wanted = {name: case() for name, case in SAME.items()}
    launcher = (*TORCHRUN, "--standalone", f"--nproc-per-node={processes}")
    finished(launch(*launcher, str(HERE / "worker.py"), str(tmp_path), *wanted))
    check(tmp_path, processes, wanted)


@pytest.mark.slow
def test_accelerate_launch(tmp_path: Path) -> None:
    # On CPUs it starts several processes by mpirun alone. What it is told about precision is for recover to say.
    launcher = (sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=1", "--num_machines=1")
    told = ("--mixed_precision=bf16", "--gradient_accumulation_steps=4", "--dynamo_backend=no")
    finished(launch(*launcher, *told, str(HERE / "worker.py"), str(tmp_path), "uneven"))
    check(tmp_path, 1, {"uneven": SAME["uneven"]()})


@pytest.mark.slow
def test_sharded_parameters(tmp_path: Path) -> None:
    wanted = interrupted(str(tmp_path / "whole"), None).state_dict()
    options = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true",
               "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT", "FSDP_AUTO_WRAP_POLICY": "NO_WRAP"}  # fmt: skip
    worker = str(HERE / "worker.py")
    for case in ("begun", "going-on"):
        launcher = (*TORCHRUN, "--standalone", "--nproc-per-node=2", worker, str(tmp_path), "sharded", case)
        finished(launch(*launcher, **options))
    check(tmp_path, 2, {"begun": wanted})


@pytest.mark.slow
def test_two_machines(tmp_path: Path) -> None:
    wanted = {name: SAME[name]() for name in ("uneven", "loaded", "norms", "gradual")}
    meet = ("--nnodes=2", "--nproc-per-node=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}")
    launcher = (*TORCHRUN, *meet, "--rdzv-id=recover", "--local-addr=127.0.0.1")
    finished(*(launch(*launcher, str(HERE / "worker.py"), str(tmp_path), *wanted) for _ in range(2)))
    check(tmp_path, 4, wanted)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_processes_that_accelerate_knows_nothing_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    from accelerate.state import AcceleratorState, PartialState

    PartialState._shared_state.clear()
    PartialState._shared_state.update(
        {"_cpu": True, "backend": None, "device": torch.device("cpu"), "debug": False, "fork_launched": False,
         "distributed_type": "NO", "num_processes": 1, "process_index": 0, "local_process_index": 0}
    )  # fmt: skip
    try:
        with pytest.raises(UsageError, match="2 processes were launched, but accelerate was set up before for 1"):
            SAME["uneven"]()
    finally:
        AcceleratorState._reset_state(True)


def test_killed_at_any_moment(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(HERE / "kills.py"), str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    plain, gradual = (line.split() for line in done.stdout.splitlines())
    for (name, killed, writing, same, *left), at_least in ((plain, 7), (gradual, 3)):
        assert int(killed) >= at_least, name
        assert int(writing) >= 2, name
        assert same == "True", name
        assert not any(part.startswith(".partial") for part in left), name
        assert sum(part.startswith("step-") for part in left) == 2
