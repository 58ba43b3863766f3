"""Training on meshes of devices and in several processes is the training of one device; checkpoints go from mesh to mesh."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest

from efficient_attn import distributed
from efficient_attn.arguments import ConfigError

ROOT = pathlib.Path(__file__).parents[2]
SMALL = [
    "--config=configs/quickstart.py:softmax",
    "--config.model.width=16",
    "--config.model.mixer.num_heads=2",
    "--config.task.num_eval=64",
    "--config.train.batch_size=16",
    "--config.train.eval_every=10000 steps",
    "--config.train.checkpoint_every=10000 steps",
    "--config.train.log_every=1",
    "--config.train.tensorboard=False",
    "--config.optimizer.schedule=constant",
    "--config.optimizer.warmup=0 steps",
    "--config.sharding.min_size=0",
]


def start(workdir, devices: int, steps: int, *options) -> subprocess.Popen:
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}"}
    command = [sys.executable, "train.py", f"--workdir={workdir}", *SMALL, f"--config.train.duration={steps} steps", *options]
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(*processes: subprocess.Popen) -> None:
    outputs = [process.communicate(timeout=600)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes), outputs


def losses(workdir) -> dict[int, float]:
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["train_loss"] for row in rows}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def first_line(path: pathlib.Path, *writers: subprocess.Popen) -> None:
    """Wait until the file has a line."""
    deadline = time.monotonic() + 300
    while not path.exists() or not path.read_text():
        assert time.monotonic() < deadline and all(writer.poll() is None for writer in writers), "no line came"
        time.sleep(0.02)


@pytest.mark.slow
def test_two_processes_stopped_then_another_mesh_train_as_one_device(tmp_path):
    """SIGTERM to one of two processes stops both with a checkpoint, from which a single one goes on, on another mesh."""
    alone, spread = tmp_path / "alone", tmp_path / "spread"
    cluster = [f"--coordinator=localhost:{free_port()}", "--num_processes=2", "--config.sharding.fsdp=4"]
    both = [start(spread, 4, 10_000, *cluster, f"--process_id={i}") for i in range(2)]
    first_line(spread / "metrics.jsonl", *both)
    both[1].send_signal(signal.SIGTERM)
    outputs = [process.communicate(timeout=600)[0] for process in both]
    assert [process.returncode for process in both] == [75, 75], outputs
    stopped = max(losses(spread))
    rules = r"((r'.*/(query|key|value)/kernel', (None, 'model')), (r'.*', 'fsdp'))"
    axes = ["--config.sharding.seq=2", "--config.sharding.model=2", f"--config.sharding.rules={rules}"]
    finish(start(spread, 8, stopped + 4, *axes), start(alone, 1, stopped + 4))
    expected, found = losses(alone), losses(spread)
    assert list(found) == list(expected) == list(range(1, stopped + 5))
    differences = [abs(found[step] - loss) for step, loss in expected.items()]
    assert max(differences[:8]) < 1e-5 and max(differences) < 1e-4, differences


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, 2, 1), "go together"),
        (("localhost:1234", 2, None), "go together"),
        (("localhost", 2, 0), "--coordinator=localhost must be HOST:PORT"),
        (("localhost:1234", 2, 2), "--process_id=2 must be 0 to 1"),
    ],
)
def test_wrong_addresses_are_told_before_anything_waits(arguments, message):
    with pytest.raises(ConfigError, match=message):
        distributed.initialize(*arguments)


@pytest.mark.exhaustive
@pytest.mark.parametrize("section", ["equality", "processes"])
def test_every_mesh_trains_as_one_device(section, tmp_path):
    out = tmp_path / "parallel.json"
    command = [sys.executable, "-m", "benchmarks.parallel", f"--section={section}", f"--out={out}"]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"}, check=True, timeout=3600)
    for name, found in json.loads(out.read_text())[section].items():
        assert found["adamw"]["losses"] < 1e-5 and found["sgd"]["losses"] < 1e-5, name
        assert found["sgd"]["parameters"] < 1e-5, name
