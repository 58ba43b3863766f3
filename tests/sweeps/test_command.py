"""Files of cells, shares of the machine, and what is shown."""

import io
import json
import os
import pathlib
import re
import subprocess
import sys
import textwrap

import pytest
from rich.console import Console

from efficient_attn.arguments import ConfigError
from efficient_attn.sweeps import command, slots
from efficient_attn.sweeps.jobs import Job, Progress, State, last_error, outcome, progress
from efficient_attn.sweeps.ledger import Record
from efficient_attn.sweeps.view import View, duration, line, render

ROOT = pathlib.Path(__file__).parents[2]
HEAD = """from efficient_attn.tables import Cell
def cell(**more):
    return Cell('configs/quickstart.py:identity', 'r', 'c', 'p', **more)
"""


def load(tmp_path, body: str, scale: str = "paper") -> list[Job]:
    path = tmp_path / "grid.py"
    path.write_text(HEAD + body)
    return command.load_jobs(path, scale, tmp_path / "runs")[1]


def test_cells_become_jobs(tmp_path):
    (job,) = load(tmp_path, "def sweep(scale):\n    yield cell(overrides={'train.duration': '5 steps'}, seed=3, choice=scale)")
    train, score = job.commands
    assert job.name == "p/r-c-paper-s3" and job.folder == tmp_path / "runs" / job.name and job.title == "r c paper s3"
    assert train[:3] == ("python", "train.py", "--config=configs/quickstart.py:identity") and "--config.seed=3" in train
    assert score == ("python", "eval.py", f"--workdir={job.folder}") and "'--config.train.duration=5 steps'" in job.paste()


@pytest.mark.parametrize(
    "body, message",
    [
        ("def swep(scale): ...", r"has no function sweep\(scale\)"),
        ("def sweep(scale):\n    return 1 / 0", "ZeroDivisionError at .*grid.py line 5"),
        ("def sweep(scale:\n", "SyntaxError"),
        ("def sweep(scale):\n    yield {}", r"must yield cells .*got \{\}"),
        ("def sweep(scale):\n    yield cell(overrides={'model.widht': 3})", r"'r c s0'.*model.widht \(did you mean 'width'\?\)"),
        ("def sweep(scale):\n    yield cell()\n    yield cell(overrides={'model.width': 3})", "would share the folder"),
        ("MEASURED_BY = 'make'\ndef sweep(scale):\n    return []", "no runs of scale 'paper'; its figures come from: make"),
        ("SCALES = {'cpu': ''}\ndef sweep(scale):\n    yield cell()", "scale of .*='paper' is unknown.*one of: cpu"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_in_a_line(tmp_path, body, message):
    with pytest.raises(ConfigError, match=message) as error:
        load(tmp_path, body)
    assert "\n" not in str(error.value)


def test_runs_are_put_where_the_file_says(tmp_path):
    path = tmp_path / "grid.py"
    for said, name in (("", "grid"), ("RUNS = 'other'\n", "other")):
        path.write_text(HEAD + said + "def sweep(scale):\n    yield cell()")
        root, (job,) = command.load_jobs(path, "paper")
        assert root == pathlib.Path("runs") / name and job.folder.resolve() == (root / "p/r-c-s0").resolve()


def test_the_grid_of_the_readme(tmp_path):
    lines = (ROOT / "README.md").read_text().split("\n")
    start = lines.index("    from efficient_attn.tables import Cell")
    end = next(i for i in range(start, len(lines)) if lines[i] and not lines[i].startswith("    "))
    (tmp_path / "grid.py").write_text(textwrap.dedent("\n".join(lines[start:end])))
    _, jobs = command.load_jobs(tmp_path / "grid.py", "paper", tmp_path / "runs")
    assert [job.title for job in jobs][1:3] == ["softmax recall lr=0.003 s0", "s5 recall lr=0.001 s0"] and len(jobs) == 4


def test_shares():
    assert [s.cores for s in slots.divide(2, range(5), [])] == [(0, 1), (2, 3, 4)]
    assert [s.cores for s in slots.divide(3, [4, 6], [])] == [(4,), (6,), (4,)]
    assert [s.environment["CUDA_VISIBLE_DEVICES"] for s in slots.divide(2, range(8), ["0", "1", "2", "3"])] == ["0,1", "2,3"]
    shared = slots.divide(3, range(8), ["MIG-a", "MIG-b"])
    assert [s.environment["CUDA_VISIBLE_DEVICES"] for s in shared] == ["MIG-a", "MIG-b", "MIG-a"]
    assert [s.environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] for s in shared] == ["0.450", "0.900", "0.450"]
    assert len({lock for s in [*shared, *slots.divide(3, [4, 6], [])] for lock in s.locks}) == 6
    with pytest.raises(ConfigError, match="--jobs=0"):
        slots.divide(0, [1], [])


def test_gpus_are_those_that_a_run_would_see(monkeypatch, tmp_path):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, 5")
    assert slots.available_gpus() == ["3", "5"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert slots.available_gpus() == []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100'\necho '  MIG 1g'\necho 'GPU 1: NVIDIA H100'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert slots.available_gpus() == ["0", "1"]
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert slots.available_gpus() == []


def test_a_share_is_taken_once(tmp_path):
    a, b = slots.divide(2, range(4), [])
    held = slots.take(a, tmp_path)
    assert held and slots.take(a, tmp_path) is None and slots.take(b, tmp_path)
    slots.give_back(held)
    assert slots.take(a, tmp_path)


def test_how_a_command_ended(tmp_path):
    log = tmp_path / "log"
    log.write_text("error: an earlier one\n")
    since = log.stat().st_size
    log.write_text(log.read_text() + "hello\nerror: disk full\nTraceback\nfoo\n")
    assert last_error(log, since) == "disk full" and last_error(log, log.stat().st_size) == "it printed nothing"
    expected = {State.DONE: [0], State.FAILED: [1, 2, 4], State.ELSEWHERE: [5], State.PREEMPTED: [75, 130, -9]}
    assert all(outcome(status, log, since).state == state for state, statuses in expected.items() for status in statuses)
    log.write_text("Traceback (most recent call last):\nValueError: x\n")
    assert outcome(1, log).reason == "ValueError: x"


def test_progress_comes_from_what_is_whole_in_the_files(tmp_path):
    assert progress(tmp_path) == Progress()
    (tmp_path / "run.json").write_text('{"steps": 40}')
    rows = [{"step": 10, "steps_per_second": 2.0}, {"step": 20, "valid_loss": 3.0, "valid_accuracy": 0.25}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 3')
    at = progress(tmp_path)
    assert at == Progress(20, 40, 2.0, "valid_accuracy 0.25") and at.seconds_left == 10
    (tmp_path / "eval.json").write_text('{"test_loss": 1.5}')
    assert progress(tmp_path).metric == "test_loss 1.5"
    assert [duration(x) for x in (59.0, 60.0, 7199.0, 9000.0)] == ["59 s", "1 min", "2 h 00", "2 h 30"]


def rows_of(states, tmp_path):
    jobs = [Job(f"run{i}", f"run{i}", tmp_path / f"run{i}", (("python", "train.py"),)) for i in range(len(states))]
    return jobs, {job.name: Record(job.title, "", state, reason="why") for job, state in zip(jobs, states)}


def test_a_table_longer_than_the_terminal_keeps_what_matters(tmp_path):
    jobs, records = rows_of([State.DONE] * 20 + [State.FAILED] + [State.WAITING] * 20 + [State.RUNNING], tmp_path)
    console = Console(width=90, height=12, file=io.StringIO(), record=True)
    console.print(render(jobs, records, console.height))
    text = console.export_text()
    assert len(text.splitlines()) <= 12 and "run41  running" in text and "run20  failed" in text and "... and 35 more" in text
    assert text.splitlines()[-1].strip() == "20 done, 20 waiting, 1 failed, 1 running"


def test_plain_lines_tell_every_change_once(tmp_path, capsys):
    jobs, records = rows_of([State.RUNNING, State.WAITING], tmp_path)
    with View(jobs, Console()) as view:
        view.show(records)
        view.show(records)
        records["run0"].state = State.FAILED
        view.show(records)
    assert [re.sub(" +", " ", text) for text in capsys.readouterr().out.splitlines()] == ["running run0", "failed run0 why"]
    assert line(jobs[0], records["run0"], Progress()) == "failed    run0  why"


@pytest.mark.slow
def test_two_runs_of_the_real_program(tmp_path, capsys):
    """One is scored, one lacks its data; a second call starts nothing. (That of twelve_runs.py has more.)"""
    small = {
        "model.width": 8, "model.depth": 1, "task.num_eval": 16, "train.batch_size": 16, "train.duration": "2 steps",
        "train.tensorboard": False,
    }  # fmt: skip
    (tmp_path / "grid.py").write_text(
        f"from efficient_attn.tables import Cell\nSMALL = {small!r}\n"
        "def sweep(scale):\n"
        "    yield Cell('configs/quickstart.py:identity', 'identity', 'recall', 'grid', SMALL)\n"
        "    yield Cell('configs/lm_text.py', 'transformer', 'text', 'grid', {'task.path': '/no/such/file'})\n"
    )
    call = [sys.executable, "sweep.py", f"--config={tmp_path / 'grid.py'}", f"--root={tmp_path / 'runs'}", "--jobs=2"]
    quick = {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": "", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    first = subprocess.run(call, cwd=ROOT, env=os.environ | quick, capture_output=True, text=True, timeout=300)
    assert first.returncode == 1 and first.stderr == "" and "1 done, 1 failed" in first.stdout, first.stdout + first.stderr
    assert "/no/such/file" in re.search(r"  why   (.*)", first.stdout)[1]
    done = tmp_path / "runs" / "grid" / "identity-recall-s0"
    assert "test_accuracy" in json.loads((done / "eval.json").read_text())
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*") if path.name in ("log.txt", "run.json")}
    _, jobs = command.load_jobs(tmp_path / "grid.py", "paper", tmp_path / "runs")
    launcher = command.LAUNCHERS["local"](tmp_path / "runs", 2, [])
    assert not command.run(jobs, tmp_path / "runs", launcher, about={}, retries=3, retry_failed=False)
    assert "0 to run" in capsys.readouterr().out
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps} and len(stamps) >= 3
