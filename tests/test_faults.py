"""Five random kills over a short run, by the command that does two hundred: python -m tests.faults --kills=200."""

import collections
import json
import os
import pathlib
import subprocess
import sys

import pytest

from tests.faults import repeat, table
from tests.faults.draw import Draw
from tests.faults.faults import FAULTS
from tests.faults.kills import Tally
from tests.faults.place import STEPS, Place, Row

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
    names = ("kill -9 within a save", "a damaged line within metrics", "a flipped bit in the newest checkpoint")
    result = faults("--repeat=2", "--seed=3", "--only", *names)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    assert "6 faults made of 6, seed 3, first 0: 0 findings" in result.stdout


def test_kills_that_miss_what_they_are_named_after_are_an_error():
    hits = {("SIGKILL", "any time", "starting"): 9, ("SIGTERM", "in a save", "saving"): 2, ("SIGINT", "in a save", "stepping"): 2}
    Tally(collections.Counter(hits)).check_moments()
    misses = {**hits, ("SIGKILL", "in data generation", "starting"): 2, ("SIGINT", "in data generation", "generating data"): 1}
    with pytest.raises(AssertionError, match=r"in data generation have met .*'starting': 2"):
        Tally(collections.Counter(misses)).check_moments()


@pytest.fixture
def campaign(tmp_path, monkeypatch):
    """`repeat.campaign` over a fault that is as it should be and one that is not at late steps; no run is needed."""

    def unsound(place: Place) -> Row:
        if place.step() >= 9:
            raise AssertionError("it lost a step")
        return Row("", 3, "", "from step 7")

    made = {"sound": lambda place: Row("", 75, "", f"from step {place.step()}"), "unsound": unsound}
    monkeypatch.setattr(repeat, "FAULTS", made)
    monkeypatch.setattr(Place, "reference", tmp_path)
    info = dict.fromkeys(("versions", "cpu", "cores", "commit", "dirty"))
    (tmp_path / "run.json").write_text(json.dumps(info))

    def run(count: int, seed: int, first: int = 0, minutes: float = 1.0) -> dict:
        folder = tmp_path / f"{count}-{seed}-{first}"
        (folder / "tmp").mkdir(parents=True)
        return repeat.campaign(folder, list(made), count, seed, first, minutes)

    return run


def test_what_goes_otherwise_than_it_should_is_a_finding(campaign):
    summary = campaign(20, seed=0)
    sound, unsound = summary["faults"]["sound"], summary["faults"]["unsound"]
    assert summary["made"] == 40 and sound["made"] == 20 and sound["ends"] == {"exit 75; from step N": 20}
    assert unsound["ends"] == {"exit 3; from step N": unsound["made"]} and unsound["made"] + len(summary["findings"]) == 20
    assert summary["findings"] and all("lost a step" in finding["what"] for finding in summary["findings"])
    finding = summary["findings"][-1]
    [again] = campaign(1, seed=0, first=finding["number"])["findings"]
    assert again == finding, "the same seed and number draw the same"


def test_no_fault_is_begun_after_the_time_is_over(campaign):
    summary = campaign(20, seed=0, minutes=0.0)
    assert summary["made"] == 0 and not summary["findings"]


def test_without_a_seed_all_is_as_documented():
    draw, other = Draw(), Draw("0 SIGTERM 1")
    assert [draw("step", 8, STEPS) for _ in range(20)] == [8] * 20
    assert len({other("step", 8, STEPS) for _ in range(200)}) == len(STEPS) and draw.made == {"step": 8}


def test_the_page_of_faults_has_a_row_for_each_and_no_other():
    page = (ROOT / "docs/faults.md").read_text()
    assert list(table.lines_of(page)) == list(FAULTS), "python -m tests.faults --table=docs/faults.md --only NAME ..."
    assert table.markdown({}, page) == page
