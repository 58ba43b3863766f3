"""The pool on one machine: what is started, continued, retried, refused and left alone."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

from efficient_attn import workdir
from efficient_attn.preemption import Preempted
from efficient_attn.sweeps import command, slots
from efficient_attn.sweeps.jobs import Job, State, is_finished
from efficient_attn.sweeps.local import Local
from tests.reporting.fake_runs import write_run, write_table
from tests.sweeps.quick_jobs import quick_job


def sweep(root, jobs, *, at_once=4, retries=3, retry_failed=False) -> bool:
    launcher = Local(root, slots.divide(at_once, slots.available_cores(), []))
    return command.run(jobs, root, launcher, about={}, retries=retries, retry_failed=retry_failed)


def records(root) -> dict[str, dict]:
    return json.loads((root / "sweep.json").read_text())["runs"]


def steps(folder: pathlib.Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def logs(jobs) -> list[str]:
    return [job.log.read_text() for job in jobs]


def test_twelve_runs_two_killed_and_one_that_must_fail(tmp_path, capsys):
    flags = {2: ["--kill-at=2"], 5: ["--kill-at=1,2"], 7: ["--fail-at=2"]}
    jobs = [quick_job(tmp_path, f"run{i}", *flags.get(i, [])) for i in range(12)]
    assert not sweep(tmp_path, jobs)
    found = records(tmp_path)
    assert {name for name, record in found.items() if record["state"] != "done"} == {"run7"}
    assert found["run7"]["state"] == "failed" and found["run7"]["status"] == 4
    assert found["run7"]["reason"] == "loss is not finite at step 2"
    assert [found[name]["attempts"] for name in ("run0", "run2", "run5", "run7")] == [1, 2, 3, 1]
    assert steps(jobs[5].folder) == [1, 2, 3]  # it went on from where it was killed
    assert all(json.loads((job.folder / "eval.json").read_text()) == {"test_accuracy": 0.3} for job in jobs if job != jobs[7])
    printed = capsys.readouterr().out
    assert "11 done, 1 failed" in printed and f"again {jobs[7].paste()}" in printed and str(jobs[7].log) in printed

    before = logs(jobs)
    assert not sweep(tmp_path, jobs)  # still not all done
    assert logs(jobs) == before and "0 to run" in capsys.readouterr().out
    assert not sweep(tmp_path, jobs, retry_failed=True)
    assert [i for i, (a, b) in enumerate(zip(before, logs(jobs))) if a != b] == [7]


def test_a_run_that_is_killed_too_often_fails(tmp_path, capsys):
    job = quick_job(tmp_path, "run", "--steps=5", "--kill-at=1,2,3,4")
    assert not sweep(tmp_path, [job], retries=2)
    record = records(tmp_path)["run"]
    assert record["state"] == "failed" and record["attempts"] == 3
    assert record["reason"] == "killed by SIGKILL (out of memory?); started 3 times"
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("preempted run")]
    assert [line.split("; ")[1] for line in told] == ["started again, 1 of 2", "started again, 2 of 2"]
    assert sweep(tmp_path, [job], retries=2, retry_failed=True) and steps(job.folder) == [1, 2, 3, 4, 5]


def test_a_command_that_has_changed_is_run_again_and_scored_again(tmp_path):
    assert sweep(tmp_path, [quick_job(tmp_path, "run")])
    assert sweep(tmp_path, [quick_job(tmp_path, "run", "--steps=5")])
    assert steps(tmp_path / "run") == [1, 2, 3, 4, 5]
    assert json.loads((tmp_path / "run" / "eval.json").read_text()) == {"test_accuracy": 0.5}
    assert json.loads((tmp_path / "run" / "eval.previous.json").read_text()) == {"test_accuracy": 0.3}


def test_runs_made_by_hand_are_not_made_again(tmp_path):
    job = quick_job(tmp_path, "run", "--steps=4")
    job.folder.mkdir()
    for words in job.commands:
        subprocess.run(words, check=True)
    assert sweep(tmp_path, [job]) and not job.log.exists()


def test_a_score_of_a_run_with_steps_to_go_is_not_its_job_done(tmp_path, monkeypatch):
    cell = write_table(tmp_path).cells["cpu"][0]
    folder = write_run(cell, tmp_path)
    job = Job("a", "a", folder, tuple(map(tuple, cell.commands(tmp_path))))
    assert is_finished(job)
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:-1]))
    (folder / "eval.json").touch()
    assert not is_finished(job)
    with monkeypatch.context() as patch:
        patch.setattr(workdir, "holder", lambda folder: 1)
        assert not is_finished(job)
    (folder / "metrics.jsonl").write_text("".join(lines))
    score = json.loads((folder / "eval.json").read_text())
    (folder / "eval.json").write_text(json.dumps(score | {"step": 50}))  # step 100 is better
    assert not is_finished(job)
    (folder / "eval.json").write_text(
        json.dumps(score | {"step": 50, "evaluated_until": 100})
    )  # but its checkpoint was not whole
    assert is_finished(job)


def test_a_score_that_has_gone_is_taken_again(tmp_path):
    job = quick_job(tmp_path, "run")
    assert sweep(tmp_path, [job])
    (job.folder / "eval.json").unlink()
    assert sweep(tmp_path, [job]) and (job.folder / "eval.json").exists() and steps(job.folder) == [1, 2, 3]


def test_stopping_lets_the_runs_save_and_the_same_sweep_continues(tmp_path):
    jobs = [quick_job(tmp_path, f"run{i}", "--steps=40", "--seconds-a-step=0.02") for i in range(3)]
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(Preempted, match="stopped by SIGTERM"):
        sweep(tmp_path, jobs, at_once=2)
    found = records(tmp_path)
    assert [found[job.name]["state"] for job in jobs] == ["preempted", "preempted", "waiting"]
    assert found["run0"]["status"] == 75 and re.fullmatch(r"stopped after step \d+", found["run0"]["reason"])
    assert not jobs[2].folder.exists()
    assert sweep(tmp_path, jobs)
    assert all(steps(job.folder) == list(range(1, 41)) for job in jobs)


def test_two_sweeps_on_one_root(tmp_path):
    with workdir.lock(tmp_path), pytest.raises(workdir.WorkdirBusy, match=f"another sweep works on .*pid {os.getpid()}"):
        sweep(tmp_path, [quick_job(tmp_path, "run")])


def test_what_a_killed_sweep_left_running_is_waited_for_and_keeps_its_share(tmp_path):
    """A run goes on when its sweep is killed; the next sweep neither starts it twice nor puts another in its place."""
    jobs = [quick_job(tmp_path, f"run{i}", "--steps=50", "--seconds-a-step=0.04") for i in range(2)]
    code = (
        "import sys, pathlib; from tests.sweeps.test_local import quick_job, sweep\n"
        "root = pathlib.Path(sys.argv[1])\n"
        "sweep(root, [quick_job(root, 'run0', '--steps=50', '--seconds-a-step=0.04')], at_once=1)"
    )
    first = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=pathlib.Path(__file__).parents[2])
    while not (jobs[0].folder / "metrics.jsonl").exists():
        time.sleep(0.02)
    first.kill()
    first.wait()
    assert records(tmp_path)["run0"]["state"] == "running"
    assert sweep(tmp_path, jobs, at_once=1)
    assert [steps(job.folder) for job in jobs] == [list(range(1, 51))] * 2
    began = [json.loads((job.folder / "share.json").read_text()) for job in jobs]
    assert began[0] == began[1]
    first_ended, second_began = (jobs[0].folder / "metrics.jsonl").stat().st_mtime, (jobs[1].folder / "run.json").stat().st_mtime
    assert second_began >= first_ended  # they have one share
    assert records(tmp_path)["run0"]["attempts"] == 2 and jobs[0].log.read_text().count("continuing from step 50") == 1


def test_a_run_in_other_hands_is_waited_for(tmp_path):
    job = quick_job(tmp_path, "run")
    held = workdir.lock(job.folder)
    threading.Timer(0.4, held.close).start()
    seen = []
    launcher = Local(tmp_path, slots.divide(1, [0], []))
    start = launcher.start
    launcher.start = lambda batch: (seen.extend(records(tmp_path)["run"]["state"] for _ in batch), start(batch))[1]
    assert command.run([job], tmp_path, launcher, about={}, retries=0, retry_failed=False)
    assert seen == ["elsewhere"]
    assert records(tmp_path)["run"]["state"] == State.DONE


def test_each_run_has_its_share_of_the_cores(tmp_path):
    cores = slots.available_cores()
    if len(cores) < 2:
        pytest.skip("needs two cores")
    jobs = [quick_job(tmp_path, f"run{i}", "--seconds-a-step=0.1") for i in range(2)]
    assert sweep(tmp_path, jobs, at_once=2)
    shares = [json.loads((job.folder / "share.json").read_text()) for job in jobs]
    assert sorted(c for share in shares for c in share["cores"]) == cores
    assert shares[0]["threads"] == str(len(shares[0]["cores"]))
    assert sorted(os.sched_getaffinity(0)) == cores


def test_a_program_that_cannot_be_started_fails_with_the_reason(tmp_path):
    job = quick_job(tmp_path, "run")
    broken = type(job)(job.name, job.title, job.folder, (("no-such-program",), job.commands[1]))
    assert not sweep(tmp_path, [broken])
    assert re.match("could not be started: .*no-such-program", records(tmp_path)["run"]["reason"])


def test_a_damaged_record_is_named(tmp_path):
    for text, message in (("{", "is not JSON"), ('{"runs": {"a": {"state": "odd"}}}', "not what a sweep writes")):
        (tmp_path / "sweep.json").write_text(text)
        with pytest.raises(workdir.WorkdirError, match=message):
            sweep(tmp_path, [quick_job(tmp_path, "run")])
