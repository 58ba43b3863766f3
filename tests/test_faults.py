"""Five random kills over a short run, by the command that does two hundred: python -m tests.faults --kills=200."""

import collections
import json
import os
import pathlib
import subprocess
import sys

import pytest

from tests.faults import table
from tests.faults.faults import FAULTS
from tests.faults.kills import Tally

ROOT = pathlib.Path(__file__).parents[1]


def faults(*flags: str) -> subprocess.CompletedProcess:
    """The harness in a process of its own, which JAX has not started in."""
    env = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    env["XLA_FLAGS"] = "--xla_backend_optimization_level=0"  # of the same run every time
    command = [sys.executable, "-m", "tests.faults", *flags]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)


@pytest.mark.slow
def test_five_kills_lose_nothing(tmp_path):
    result = faults("--kills=5", "--seed=6", "--steps=30", f"--out={tmp_path / 'kills.json'}")
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    summary = json.loads((tmp_path / "kills.json").read_text())
    assert summary["kills"] == 5 and summary["runs_finished_and_identical"] >= 1


@pytest.mark.slow
@pytest.mark.exhaustive
def test_some_faults_lose_nothing():
    result = faults("--only", "kill -9", "a damaged line within metrics", "a flipped bit in the newest checkpoint")
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    assert "Skipping checkpoint runs/x/checkpoints/8" in result.stdout


def test_kills_that_miss_what_they_are_named_after_are_an_error():
    hits = {("SIGKILL", "any time", "starting"): 9, ("SIGTERM", "in a save", "saving"): 2, ("SIGINT", "in a save", "stepping"): 2}
    Tally(collections.Counter(hits)).check_moments()
    misses = {**hits, ("SIGKILL", "in data generation", "starting"): 2, ("SIGINT", "in data generation", "generating data"): 1}
    with pytest.raises(AssertionError, match=r"in data generation have met .*'starting': 2"):
        Tally(collections.Counter(misses)).check_moments()


def test_the_page_of_faults_has_a_row_for_each_and_no_other():
    page = (ROOT / "docs/faults.md").read_text()
    assert list(table.lines_of(page)) == list(FAULTS), "python -m tests.faults --table=docs/faults.md --only NAME ..."
    assert table.markdown({}, page) == page
