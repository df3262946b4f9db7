"""Who started the process, and the variables that DeepSpeed needs, for every launcher."""

from __future__ import annotations

import pytest

from sparse_ds.config.errors import UserError
from sparse_ds.distributed.launch_environment import LaunchEnvironment, complete_environment, first_slurm_host

RENDEZVOUS = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
LAUNCHERS = {
    # What each of them sets beside the five variables (deepspeed 0.19, torch 2.13, accelerate 1.15).
    "deepspeed": {"CROSS_RANK": "0", "CROSS_SIZE": "1", "LOCAL_SIZE": "4"},
    "torchrun": {"TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "0", "ROLE_RANK": "3"},
    "accelerate": {
        "TORCHELASTIC_RUN_ID": "none",
        "LOCAL_WORLD_SIZE": "4",
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_MIXED_PRECISION": "bf16",
    },
    "environment": {"LOCAL_WORLD_SIZE": "2"},
}
SLURM = {
    "SLURM_JOB_ID": "7654321",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NODELIST": "gpu[003-004]",
    "SLURM_JOB_NODELIST": "gpu[001-008]",
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launcher_that_sets_everything_is_only_recognised(launcher: str) -> None:
    environ = {**RENDEZVOUS, **LAUNCHERS[launcher]}
    before = dict(environ)
    assert complete_environment(environ) == LaunchEnvironment(launcher, rank=3, world_size=4, local_rank=1)
    assert environ == before


def test_plain_python_is_one_rank_with_a_free_port() -> None:
    environ: dict[str, str] = {}
    assert complete_environment(environ) == LaunchEnvironment("python", rank=0, world_size=1, local_rank=0)
    assert environ["MASTER_ADDR"] == "127.0.0.1"
    assert 1024 <= int(environ["MASTER_PORT"]) < 65536


def test_plain_python_keeps_a_port_that_is_given() -> None:
    environ = {"MASTER_PORT": "1234"}
    complete_environment(environ)
    assert environ["MASTER_PORT"] == "1234"


def test_srun_gives_every_rank_the_same_rendezvous() -> None:
    first, last = dict(SLURM), {**SLURM, "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    assert complete_environment(first) == LaunchEnvironment("srun", rank=5, world_size=8, local_rank=1)
    assert complete_environment(last) == LaunchEnvironment("srun", rank=0, world_size=8, local_rank=0)
    # The nodes of the step, not of the whole job: rank 0 runs on the first of them.
    assert first["MASTER_ADDR"] == last["MASTER_ADDR"] == "gpu003"
    assert first["MASTER_PORT"] == last["MASTER_PORT"] == str(20_000 + 7654321 % 20_000)


@pytest.mark.parametrize("job_id", ["0", "1", "19999", "20000", "4294967295"])
def test_srun_ports_are_valid_for_every_job(job_id: str) -> None:
    environ = {**SLURM, "SLURM_JOB_ID": job_id}
    complete_environment(environ)
    assert 1024 <= int(environ["MASTER_PORT"]) < 65536


def test_srun_keeps_what_the_user_exported() -> None:
    environ = {**SLURM, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4711"}
    complete_environment(environ)
    assert (environ["MASTER_ADDR"], environ["MASTER_PORT"]) == ("10.0.0.1", "4711")


def test_srun_without_the_step_variables_falls_back_to_the_job() -> None:
    environ = {
        name: value for name, value in SLURM.items() if name not in ("SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST")
    }
    assert complete_environment(environ).world_size == 8
    assert environ["MASTER_ADDR"] == "gpu001"


def test_python_typed_inside_an_allocation_is_one_rank() -> None:
    environ = {name: value for name, value in SLURM.items() if name != "SLURM_STEP_ID"}
    assert complete_environment(environ) == LaunchEnvironment("python", rank=0, world_size=1, local_rank=0)


def test_a_launcher_inside_a_slurm_step_wins() -> None:
    environ = {**SLURM, **RENDEZVOUS, **LAUNCHERS["torchrun"]}
    assert complete_environment(environ) == LaunchEnvironment("torchrun", rank=3, world_size=4, local_rank=1)


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("node7", "node7"),
        ("node1,node2", "node1"),
        ("gpu[003-005,9],login1", "gpu003"),
        ("gpu[7,9]", "gpu7"),
        ("a-b[01-02]-ib.cluster.local,c1", "a-b01-ib.cluster.local"),
        ("rack[1-2]n[03-04]", "rack1n03"),
        ("login1,gpu[1-2]", "login1"),
        ("127.0.0.1", "127.0.0.1"),
    ],
)
def test_first_host_of_a_node_list(nodelist: str, host: str) -> None:
    assert first_slurm_host(nodelist) == host


@pytest.mark.parametrize("nodelist", ["", ",a", "gpu[1-3", "gpu1-3]", "gpu[]"])
def test_a_node_list_that_cannot_be_read_is_named(nodelist: str) -> None:
    with pytest.raises(UserError, match=r"srun: cannot read the node list .* set MASTER_ADDR to the first node's name"):
        first_slurm_host(nodelist)


@pytest.mark.parametrize("missing", ["WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_half_an_environment_is_refused(missing: str) -> None:
    environ = {name: value for name, value in RENDEZVOUS.items() if name != missing}
    with pytest.raises(UserError, match=rf"launcher: {missing} not set although RANK=3 is; .* or unset RANK"):
        complete_environment(environ)


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK"])
def test_a_variable_that_is_no_number_is_named(name: str) -> None:
    with pytest.raises(UserError, match=f"launcher: {name}='two', expected a whole number"):
        complete_environment({**RENDEZVOUS, name: "two"})


def test_a_job_id_that_is_no_number_is_named() -> None:
    with pytest.raises(UserError, match="launcher: SLURM_JOB_ID='x', expected a whole number"):
        complete_environment({**SLURM, "SLURM_JOB_ID": "x"})


@pytest.mark.parametrize(("rank", "world_size"), [("4", "4"), ("-1", "4"), ("0", "0")])
def test_a_rank_outside_of_the_world_is_refused(rank: str, world_size: str) -> None:
    with pytest.raises(UserError, match=f"launcher: RANK={rank} with WORLD_SIZE={world_size}"):
        complete_environment({**RENDEZVOUS, "RANK": rank, "WORLD_SIZE": world_size})
