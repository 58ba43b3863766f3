"""Five random kills over a short run, by the command that does two hundred: python -m tests.faults --kills=200."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def faults(*flags: str) -> subprocess.CompletedProcess:
    """The harness in a process of its own, which JAX has not started in."""
    env = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    env["XLA_FLAGS"] = "--xla_backend_optimization_level=0"  # of the same run every time
    command = [sys.executable, "-m", "tests.faults", *flags]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)


@pytest.mark.slow
def test_five_kills_lose_nothing(tmp_path):
    result = faults("--kills=5", "--seed=3", "--steps=30", f"--out={tmp_path / 'kills.json'}")
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    summary = json.loads((tmp_path / "kills.json").read_text())
    assert summary["kills"] == 5 and summary["runs_finished_and_identical"] >= 1
