"""What a run's folder says: a score counts only from a run that is over, scored, whole and of the expected protocol."""

import json
import subprocess
import sys

import pytest

from efficient_attn import runs, workdir
from efficient_attn.reporting.summary import expected_config
from efficient_attn.runs import State
from tests.reporting.fake_runs import write_run, write_table


@pytest.fixture
def cell(tmp_path):
    return write_table(tmp_path).cells["cpu"][0]


def edit(path, **changes):
    workdir.write_json(path, {**workdir.read_json(path), **changes})


def test_a_finished_run_gives_scores_curves_and_rates(tmp_path, cell):
    run = runs.read(write_run(cell, tmp_path, accuracy=0.75), expected_config(cell))
    assert (run.state, run.why, run.values("test_accuracy"), run.step) == (State.FINISHED, "", [0.75], 100)
    (curve,) = run.curves("valid_accuracy")
    assert curve[-1] == (100, 0.75) and len(curve) == 10 and run.curves("no_such_key") == []
    assert run.rate("steps_per_second") == 20.0 and run.metric == "accuracy"


def test_several_seeds_in_one_run_have_scores_and_curves_each(tmp_path, cell):
    folder = write_run(cell, tmp_path)
    edit(folder / "eval.json", test_accuracy=0.6, test_accuracy_by_seed=[0.5, None, 0.7])
    (folder / "metrics.jsonl").write_text('{"step": 100, "valid_accuracy": 0.5, "valid_accuracy_by_seed": [0.4, null, 0.6]}\n')
    run = runs.read(folder)
    assert run.values("test_accuracy") == [0.5, 0.7]
    assert run.curves("valid_accuracy") == [[(100, 0.4)], [(100, 0.6)]]


def cut(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:4]))


def tear(folder):
    text = (folder / "run.json").read_text()
    (folder / "run.json").write_text(text[: len(text) // 2])


def other_width(folder):
    config = workdir.read_json(folder / "run.json")["config"]
    config["model"]["width"] = 48
    edit(folder / "run.json", config=config)


def analysis(folder, content):
    (folder / "analysis").mkdir()
    (folder / "analysis/windows.json").write_text(content)


DAMAGE = {
    "deleted": (lambda folder: (folder / "run.json").unlink(), State.NOT_RUN, ""),
    "metrics cut": (cut, State.UNFINISHED, "step 40 of 100"),
    "metrics deleted": (lambda folder: (folder / "metrics.jsonl").unlink(), State.UNFINISHED, "step 0 of 100"),
    "metrics damaged": (lambda f: (f / "metrics.jsonl").write_text("{}\n"), State.DAMAGED, "metrics.jsonl line 1"),
    "run.json torn": (tear, State.DAMAGED, "run.json is not JSON"),
    "run.json of something else": (lambda f: (f / "run.json").write_text("[]"), State.DAMAGED, "is not a run's"),
    "not scored": (lambda folder: (folder / "eval.json").unlink(), State.NOT_SCORED, "eval.py --workdir="),
    "trained on since": (lambda f: edit(f / "eval.json", step=50), State.NOT_SCORED, "step 100 is better; run: python eval.py"),
    "score torn": (lambda f: (f / "eval.json").write_text("{"), State.DAMAGED, "eval.json is not JSON"),
    "score of another step": (lambda f: edit(f / "eval.json", step=95), State.DAMAGED, "step 95"),
    "score of other data": (lambda f: edit(f / "eval.json", data="x"), State.DAMAGED, "the data x"),
    "score of another shape": (lambda f: (f / "eval.json").write_text("[1, 2]"), State.DAMAGED, "is not a run's"),
    "score of no step": (lambda f: edit(f / "eval.json", step=[1]), State.DAMAGED, "is not a run's"),
    "lengths of another shape": (lambda f: (f / "lengths.json").write_text("[]"), State.DAMAGED, "lengths.json has no rows"),
    "analysis torn": (lambda f: analysis(f, "{"), State.DAMAGED, "windows.json is not JSON"),
    "analysis of another shape": (lambda f: analysis(f, '{"rows": [1]}'), State.DAMAGED, "windows.json has no rows"),
    "more scores than seeds": (
        lambda f: edit(f / "eval.json", test_accuracy_by_seed=[0.5, 0.5]),
        State.DAMAGED,
        "2 scores for 1",
    ),
    "scores that are one": (lambda f: edit(f / "eval.json", test_accuracy_by_seed=0.5), State.DAMAGED, ""),
    "score that is none": (lambda f: edit(f / "eval.json", test_accuracy=True), State.DAMAGED, "True is no accuracy"),
    "score out of range": (lambda f: edit(f / "eval.json", test_accuracy=7.0), State.DAMAGED, "7.0 is no accuracy"),
    "steps that are no number": (lambda f: edit(f / "run.json", steps="x"), State.DAMAGED, "is not a run's"),
    "score not finite": (lambda f: edit(f / "eval.json", test_accuracy=None), State.FAILED, "accuracy is None"),
    "another protocol": (other_width, State.OTHER_PROTOCOL, "model.width is 48, here 32"),
    "a file in its place": (lambda f: (f.rename(f"{f}-x"), f.write_text("")), State.NOT_RUN, ""),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_no_other_run_counts_and_each_says_why(tmp_path, cell, damage):
    spoil, state, why = DAMAGE[damage]
    folder = write_run(cell, tmp_path)
    assert runs.read(folder, expected_config(cell)).state == State.FINISHED
    spoil(folder)
    run = runs.read(folder, expected_config(cell))
    assert run.state == state and why in run.why


def test_what_only_displays_is_no_protocol(tmp_path, cell):
    folder = write_run(cell, tmp_path)
    config = workdir.read_json(folder / "run.json")["config"]
    config["train"].update(tensorboard=False, log_every=7, prefetch=1)
    edit(folder / "run.json", config=config)
    assert runs.read(folder, expected_config(cell)).state == State.FINISHED


def test_a_run_is_not_of_another_protocol_because_arguments_were_added_since(tmp_path, cell):
    folder = write_run(cell, tmp_path)
    config = workdir.read_json(folder / "run.json")["config"]
    del config["sharding"], config["optimizer"]["ema"], config["model"]["mixer"]["dropout"], config["train"]["replicas"]
    edit(folder / "run.json", config=config)
    assert runs.read(folder, expected_config(cell)).state == State.FINISHED
    config["optimizer"]["ema"] = 0.5
    edit(folder / "run.json", config=config)
    assert runs.read(folder, expected_config(cell)).why == "optimizer.ema is 0.5, here 0.0"
    edit(folder / "run.json", config={**config, "optimizer": {"eta": 1}})
    assert "another version of this code" in runs.read(folder, expected_config(cell)).why


def test_a_run_that_stopped_early_as_configured_is_over(tmp_path, cell):
    folder = write_run(cell, tmp_path, accuracy=0.9999)
    edit(folder / "run.json", steps=5000)
    assert runs.read(folder).config["train"]["early_stop"] == 0.9995 and runs.read(folder).state == State.FINISHED
    last = {"step": 100, "valid_accuracy": 0.9999}
    for seeds, state in (([0.9999] * 3, State.FINISHED), ([0.99, 1.0, 1.0], State.UNFINISHED)):  # all of them must reach it
        (folder / "metrics.jsonl").write_text(json.dumps(last | {"valid_accuracy_by_seed": seeds}) + "\n")
        assert runs.read(folder).state == state


HOLDER = """
import pathlib, sys
from efficient_attn import workdir
workdir.lock(pathlib.Path(sys.argv[1]))
print("locked", flush=True)
sys.stdin.read()
"""


def test_a_run_that_is_still_running_does_not_count_and_keeps_its_lock(tmp_path, cell):
    folder = write_run(cell, tmp_path)
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "locked\n"
        for _ in range(2):
            run = runs.read(folder)
            assert (run.state, run.why) == (State.RUNNING, "at step 100 of 100")
        holder.stdin.close()
        holder.wait()
    assert runs.read(folder).state == State.FINISHED
    with workdir.lock(folder):  # of this very process: reading must not release it
        assert runs.read(folder).state == State.RUNNING and workdir.holder(folder)


def test_reading_writes_nothing(tmp_path, cell):
    folder = write_run(cell, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*"))}
    json.dumps(workdir.jsonable(runs.read(folder, expected_config(cell)).info))
    assert {path: path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*"))} == before
