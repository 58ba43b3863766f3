"""The run's folder: one run at a time, atomic JSON, metrics without duplicates or torn lines, and the record of the run."""

import contextlib
import copy
import json
import os
import pathlib
import platform
import re
import resource
import signal
import socket
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from efficient_attn import workdir
from efficient_attn.workdir import MetricsFile, WorkdirError

ROOT = str(pathlib.Path(__file__).parents[1])
HOLD_LOCK = """
import pathlib, sys, time
from efficient_attn.workdir import lock
lock(pathlib.Path(sys.argv[1]))
print("locked", flush=True)
time.sleep(60)
"""


@contextlib.contextmanager
def file_size_limit(size: int):
    """Writes beyond `size` bytes of a file fail, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


# The lock.


def test_lock_names_the_holder_and_dies_with_it(tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, "-c", HOLD_LOCK, str(folder)]
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": ROOT}, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"locked\n"
        for _ in range(2):  # a refused attempt takes nothing from the holder
            with pytest.raises(
                WorkdirError, match=rf"in use by another run \(pid {holder.pid} on {re.escape(socket.gethostname())}\)"
            ):
                workdir.lock(folder)
        holder.send_signal(signal.SIGKILL)
    with workdir.lock(folder):
        assert (folder / ".lock").read_text() == f"pid {os.getpid()} on {socket.gethostname()}\n"


def test_one_who_looks_keeps_nobody_from_looking_or_starting(tmp_path, monkeypatch):
    workdir.lock(tmp_path).close()
    look = (
        "import fcntl, sys, time; f = open(sys.argv[1]); fcntl.lockf(f, fcntl.LOCK_SH); print('looks', flush=True); time.sleep(9)"
    )
    with subprocess.Popen([sys.executable, "-S", "-c", look, tmp_path / ".lock"], stdout=subprocess.PIPE) as looks:
        assert looks.stdout.readline() == b"looks\n"
        assert workdir.holder(tmp_path) is None
        monkeypatch.setattr(workdir.time, "sleep", lambda seconds: (looks.kill(), looks.wait()))
        workdir.lock(tmp_path).close()  # it waited until the other had looked


def test_lock_is_held_from_the_call_until_released(tmp_path):
    held = workdir.lock(tmp_path)
    with pytest.raises(WorkdirError, match=rf"another run of this process \(pid {os.getpid()}\)"):
        workdir.lock(tmp_path)
    held.close()
    with workdir.lock(tmp_path):
        pass
    with workdir.lock(tmp_path):
        pass


def test_a_forked_worker_does_not_keep_the_lock(tmp_path):
    script = HOLD_LOCK.replace('print("locked"', 'import os; child = os.fork(); child and print("locked", child')
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], env={**os.environ, "PYTHONPATH": ROOT}, stdout=subprocess.PIPE
    ) as parent:
        child = int(parent.stdout.readline().split()[1])
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        try:
            os.kill(child, 0)  # it lives on
            with workdir.lock(tmp_path):
                pass
        finally:
            os.kill(child, signal.SIGKILL)


def test_lock_where_nothing_can_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkdirError, match=r"cannot write in .*file/run: Not a directory. Choose another --workdir"):
        workdir.lock(tmp_path / "file" / "run")


# JSON.


def test_json_round_trip(tmp_path):
    obj = {"a": np.float32(0.1), "b": jnp.int32(3), "c": (1, [True, None]), "d": float("nan"), "e": {"f": -np.inf}, "g": "ä"}
    workdir.write_json(tmp_path / "x.json", obj)
    expected = {"a": float(np.float32(0.1)), "b": 3, "c": [1, [True, None]], "d": None, "e": {"f": None}, "g": "ä"}
    assert workdir.read_json(tmp_path / "x.json") == expected
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize("obj", [{1: 2}, {"a": object()}, {"a": {3}}])
def test_what_json_cannot_hold_is_an_error(tmp_path, obj):
    with pytest.raises(TypeError, match="JSON"):
        workdir.write_json(tmp_path / "x.json", obj)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.json"
    workdir.write_json(path, {"old": 1})
    with file_size_limit(1000), pytest.raises(WorkdirError, match=r"cannot write .*x.json: File too large.*intact"):
        workdir.write_json(path, {"new": "x" * 2000})
    assert workdir.read_json(path) == {"old": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.json"]


def test_damaged_json_is_named(tmp_path):
    for number, data in enumerate((b"", b'{"a": 1', b'{"a": \xff}')):
        path = tmp_path / f"{number}.json"
        path.write_bytes(data)
        with pytest.raises(WorkdirError, match=rf"{number}.json is not JSON"):
            workdir.read_json(path)
    with pytest.raises(FileNotFoundError):
        workdir.read_json(tmp_path / "none.json")


# metrics.jsonl.


def test_metrics_are_whole_lines_of_valid_json(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    assert metrics.read() == [] and not metrics.path.exists()
    metrics.append({"step": 1, "train_loss": np.float32(0.1)})
    metrics.append({"step": np.int64(5), "train_loss": float("nan"), "valid_accuracy": jnp.float32(0.5)})
    assert metrics.path.read_text() == (
        '{"step": 1, "train_loss": 0.10000000149011612}\n{"step": 5, "train_loss": null, "valid_accuracy": 0.5}\n'
    )
    reopened = MetricsFile(metrics.path)
    assert [row["step"] for row in reopened.read()] == [1, 5]
    reopened.append({"step": 6})
    assert [row["step"] for row in metrics.read()] == [1, 5, 6]


@pytest.mark.parametrize(
    ("row", "message"),
    [({"step": 5}, "step 5 does not follow step 5"), ({"step": 4}, "step 4 does not follow"), ({"loss": 1}, "integer 'step'")],
)
def test_a_step_is_written_once(tmp_path, row, message):
    for metrics in (MetricsFile(tmp_path / "metrics.jsonl"), MetricsFile(tmp_path / "metrics.jsonl")):
        if not metrics.path.exists():
            metrics.append({"step": 5})
        with pytest.raises(WorkdirError, match=message):
            metrics.append(row)
        assert metrics.read() == [{"step": 5}]
    metrics.append({"step": 6})


def write_steps(path: pathlib.Path, steps: list[int], torn: str = "") -> MetricsFile:
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in steps) + torn)
    return MetricsFile(path)


@pytest.mark.parametrize(
    ("steps", "torn", "keep", "kept", "dropped"),
    [
        ([1, 2, 3, 4], "", 2, [1, 2], 2),
        ([1, 2], '{"step": 3, "los', 2, [1, 2], 1),
        ([1, 2, 3], '{"step": 4}', 2, [1, 2], 2),
        ([1, 2], "", 2, [1, 2], 0),
        ([1, 2], "", 9, [1, 2], 0),
        ([5], "", 0, [], 1),
        ([], '{"st', 0, [], 1),
        ([], "", 0, [], 0),
    ],
)
def test_truncate(tmp_path, steps, torn, keep, kept, dropped):
    metrics = write_steps(tmp_path / "metrics.jsonl", steps, torn)
    assert metrics.truncate(keep) == dropped
    assert metrics.path.read_text() == "".join(f'{{"step": {step}}}\n' for step in kept)
    metrics.append({"step": 10})
    assert [row["step"] for row in metrics.read()] == [*kept, 10]
    assert metrics.truncate(0) == len(kept) + 1  # an open file too
    metrics.append({"step": 1})
    assert metrics.read() == [{"step": 1}]


def test_appending_after_a_torn_line_is_not_glued_to_it(tmp_path):
    metrics = write_steps(tmp_path / "metrics.jsonl", [1, 2], '{"step": 3, "lo')
    assert [row["step"] for row in metrics.read()] == [1, 2]
    metrics.append({"step": 3, "loss": 0.5})
    assert metrics.read() == [{"step": 1}, {"step": 2}, {"step": 3, "loss": 0.5}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"step": 1}\n{"st\x00p": 2\n{"step": 3}\n', "line 2 is not JSON"),
        ('{"step": 1}\n[2]\n', "line 2: expected an object"),
        ('{"step": 1}\n{"step": 3}\n{"step": 2}\n', "line 3: step 2 does not follow step 3"),
        ('{"step": 1}\n{"step": 1}\n', "line 2: step 1 does not follow step 1"),
    ],
)
def test_damaged_metrics_are_named_and_left_alone(tmp_path, text, message):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.path.write_text(text)
    for action in (metrics.read, lambda: metrics.truncate(1), lambda: metrics.append({"step": 9})):
        with pytest.raises(WorkdirError, match=message):
            action()
    assert metrics.path.read_text() == text


def test_metrics_on_a_full_disk(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.append({"step": 1})
    with file_size_limit(20), pytest.raises(WorkdirError, match=r"cannot write .*metrics.jsonl"):
        metrics.append({"step": 2, "train_loss": 0.5})
    assert metrics.path.read_text() == '{"step": 1}\n'
    metrics.append({"step": 2})
    assert metrics.read() == [{"step": 1}, {"step": 2}]


# run.json.


def test_run_info_is_json_and_names_no_host(tmp_path, monkeypatch):
    for module, function in ((socket, "gethostname"), (platform, "node")):
        monkeypatch.setattr(module, function, lambda: "name-of-the-host")
    info = workdir.run_info()
    workdir.write_json(tmp_path / "run.json", info)
    assert workdir.compare_run_info(workdir.read_json(tmp_path / "run.json"), workdir.run_info()) == []
    assert info["versions"]["jax"] and info["versions"]["python"].startswith("3.")
    assert set(info["versions"]) == {"python", *workdir.PACKAGES} and None not in info["versions"].values()
    assert info["device_count"] >= 1 and info["process_count"] == 1 and info["cores"] >= 1 and info["backend"] == "cpu"
    assert info["jax_config"]["jax_enable_x64"] is False
    assert "name-of-the-host" not in json.dumps(info)


def test_run_info_of_a_checkout(tmp_path, monkeypatch):
    package = tmp_path / "checkout" / "package"
    package.mkdir(parents=True)
    monkeypatch.setattr(workdir, "__file__", str(package / "workdir.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    assert (workdir.run_info()["commit"], workdir.run_info()["dirty"]) == (None, None)

    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(["git", *identity, *arguments], cwd=package, check=True, capture_output=True, text=True).stdout

    git("init")
    (package / "workdir.py").write_text("")
    git("add", ".")
    git("commit", "-m", "x")
    info = workdir.run_info()
    assert (info["commit"], info["dirty"]) == (git("rev-parse", "HEAD").strip(), False)
    (package / "workdir.py").write_text("changed")
    assert workdir.run_info()["dirty"] is True
    monkeypatch.setenv("PATH", "")
    assert workdir.run_info()["commit"] is None


def test_flags_are_recorded_and_differences_listed(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    old = workdir.run_info()
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "somehost:1234")
    new = copy.deepcopy(workdir.run_info())
    assert "somehost" not in json.dumps(new)
    new["versions"]["jaxlib"] = "99"
    new["cores"] = old["cores"] + 1
    new["argv"], new["os"], new["versions"]["orbax-checkpoint"] = ["other"], "other", "99"  # results do not depend on these
    assert workdir.compare_run_info(old, new) == [
        f"cores: {old['cores']} -> {old['cores'] + 1}",
        "flags.XLA_FLAGS: not set -> --xla_cpu_enable_fast_math=true",
        f"versions.jaxlib: {old['versions']['jaxlib']} -> 99",
    ]
