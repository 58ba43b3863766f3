"""Slurm's launcher behind fakes of sbatch, srun, sacct, scontrol and scancel that run the jobs on this machine."""

import json
import os
import pathlib
import signal
import subprocess
import threading
import time

import pytest

from efficient_attn.arguments import ConfigError
from efficient_attn.preemption import Preempted
from efficient_attn.sweeps import command
from efficient_attn.sweeps.slurm import Slurm, parse_parameters
from tests.sweeps.quick_jobs import quick_job

FAKES = pathlib.Path(__file__).parent / "fake_slurm"
PARAMETERS = {"time": 10, "signal_delay_s": 5}


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A folder where the fakes keep what they know: a pid, an exit status and a script for each job."""
    submitit = pytest.importorskip("submitit", reason="the Slurm launcher needs the optional package submitit")
    monkeypatch.setattr(submitit.core.core.Job, "_results_timeout_s", 0)  # for which a network's file system may hide a result
    folder = tmp_path / "cluster"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{FAKES}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(folder))
    yield folder
    for session in [*folder.glob("*.pid"), *folder.glob("*.step")]:
        subprocess.run(["pkill", "-KILL", "-s", session.read_text().strip()], check=False)


def sweep(root, jobs, *, retries=1, retry_failed=False) -> bool:
    return command.run(jobs, root, Slurm(root, PARAMETERS, 8), about={}, retries=retries, retry_failed=retry_failed)


def records(root) -> dict[str, dict]:
    return json.loads((root / "sweep.json").read_text())["runs"]


def wait_for(path: pathlib.Path) -> None:
    for _ in range(1500):
        if path.exists():
            return
        time.sleep(0.02)
    raise AssertionError(f"{path} has not come")


def test_one_array_runs_retries_and_tells_what_failed(tmp_path, cluster):
    flags = {1: ["--kill-at=2"], 2: ["--fail-at=1"]}
    jobs = [quick_job(tmp_path / "runs", f"run{i}", *flags.get(i, [])) for i in range(3)]
    assert not sweep(tmp_path / "runs", jobs)
    found = records(tmp_path / "runs")
    assert [found[job.name]["state"] for job in jobs] == ["done", "done", "failed"]
    assert [found[job.name]["attempts"] for job in jobs] == [1, 2, 1]
    assert found["run2"]["reason"] == "loss is not finite at step 1" and found["run2"]["status"] == 4
    scripts = sorted(cluster.glob("*.sh"))
    assert len(scripts) == 2 and "--array=0-2%3" in scripts[0].read_text() and "--time=10" in scripts[0].read_text()
    assert not sweep(tmp_path / "runs", jobs) and len(list(cluster.glob("*.sh"))) == 2  # nothing is submitted again


def test_jobs_outlive_the_sweep_and_the_next_one_watches_them(tmp_path, cluster):
    root = tmp_path / "runs"
    jobs = [quick_job(root, f"run{i}", "--steps=30", "--seconds-a-step=0.05") for i in range(2)]
    threading.Thread(target=lambda: (wait_for(root / "run1/metrics.jsonl"), os.kill(os.getpid(), signal.SIGINT))).start()
    with pytest.raises(Preempted, match="its jobs stay with Slurm"):
        sweep(root, jobs)
    assert {record["state"] for record in records(root).values()} == {"running"}
    assert sweep(root, jobs)
    assert len(list(cluster.glob("*.sh"))) == 1 and {record["attempts"] for record in records(root).values()} == {1}
    assert all(job.log.read_text().count("continuing from step 0") == 1 for job in jobs)


def test_notice_of_the_end_saves_and_queues_the_job_again(tmp_path, cluster):
    root = tmp_path / "runs"
    job = quick_job(root, "run", "--steps=40", "--seconds-a-step=0.05")

    def notice():
        """As Slurm does: SIGUSR2 to every process of the job."""
        wait_for(job.folder / "metrics.jsonl")
        subprocess.run(["scancel", "1", "--signal", "USR2"], check=True)

    threading.Thread(target=notice).start()
    assert sweep(root, [job], retries=0)
    log = job.log.read_text()
    assert "error: stopped after step" in log and log.count("continuing from step") == 2 and "from step 0" in log
    assert [json.loads(line)["step"] for line in (job.folder / "metrics.jsonl").read_text().splitlines()] == list(range(1, 41))
    assert records(root)["run"]["attempts"] == 1


def test_a_job_that_slurm_ended_is_submitted_again(tmp_path, cluster):
    root = tmp_path / "runs"
    job = quick_job(root, "run", "--steps=40", "--seconds-a-step=0.05")

    def lose_the_node():
        wait_for(job.folder / "metrics.jsonl")
        subprocess.run(["scancel", "1", "--signal", "KILL"], check=True)

    threading.Thread(target=lose_the_node).start()
    assert sweep(root, [job]) and records(root)["run"]["attempts"] == 2 and len(list(cluster.glob("*.sh"))) == 2


def test_what_is_wrong_with_the_parameters_is_said_in_a_line(tmp_path, cluster, monkeypatch):
    for pairs, message in ((["gpu"], "'gpu' is not NAME=VALUE"), (["partition=gpu"], "needs time=MINUTES")):
        with pytest.raises(ConfigError, match=message):
            parse_parameters(pairs)
    assert parse_parameters(["time=5", "partition=gpu"]) == {"time": 5, "partition": "gpu"}
    with pytest.raises(ConfigError, match=r"Unavailable parameter\(s\): \['partitoin'\]") as error:
        Slurm(tmp_path, {"time": 5, "partitoin": "x"}, None)
    assert "\n" not in str(error.value)
    monkeypatch.setenv("FAKE_SLURM_REFUSES", "invalid partition specified: nowhere")
    with pytest.raises(ConfigError, match=r"sbatch refused the jobs: .*invalid partition specified: nowhere"):
        sweep(tmp_path / "runs", [quick_job(tmp_path / "runs", "run")])
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    with pytest.raises(ConfigError, match="srun"):
        Slurm(tmp_path, PARAMETERS, None)
