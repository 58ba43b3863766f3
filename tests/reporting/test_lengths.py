"""Scores of runs against length: which task each score is of, what is refused, and what is written."""

import json
import statistics
import subprocess
import sys

import pytest
from matplotlib.figure import Figure

from configs import lm_text, synthetic_recall
from efficient_attn import evaluation, workdir
from efficient_attn.config import normal_form
from efficient_attn.reporting import curves, figures, lengths


def run_folder(folder, recipe: str, seed: int, configs=synthetic_recall):
    """What train.py leaves of a run, but for its checkpoints."""
    config = configs.get_config(recipe)
    config.seed = seed
    folder.mkdir()
    run = {"config": normal_form(config), "cpu": "a cpu", "device_kind": "cpu", "argv": ["train.py"], "commit": "none"}
    workdir.write_json(folder / "run.json", run)
    return folder


@pytest.fixture
def scored(monkeypatch):
    """Checkpoints whose accuracy is 1 / length, and a little more for later seeds."""

    def score_best(plan, folder):
        return {"step": 7, "test_accuracy": 1 / plan.task.length + 0.01 * plan.seed}

    monkeypatch.setattr(evaluation, "score_best", score_best)


def test_every_length_is_scored_on_a_task_of_that_length(tmp_path, scored):
    rows = [row for seed in (0, 1) for row in lengths.score(run_folder(tmp_path / f"s{seed}", "s5", seed), [32, 64])]
    assert [(row["seed"], row["length"], row["accuracy"]) for row in rows] == [
        (0, 32, 1 / 32), (0, 64, 1 / 64), (1, 32, 1 / 32 + 0.01), (1, 64, 1 / 64 + 0.01)
    ]  # fmt: skip
    table = lengths.by_recipe(rows, "accuracy")
    assert table["s5"][32] == [1 / 32, 1 / 32 + 0.01]
    assert "| s5 | 2 | 3.6 (3.1-4.1) | 2.1 (1.6-2.6) |" in lengths.markdown(table)
    assert statistics.mean(table["s5"][32]) == pytest.approx(1 / 32 + 0.005)


def test_a_task_says_which_of_its_arguments_is_the_length(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "score_best", lambda plan, folder: {"step": 7, "test_loss": float(plan.task.context)})
    rows = lengths.score(run_folder(tmp_path / "s0", "alibi_short", 0, lm_text), [32, 512])
    assert [(row["trained_at"], row["length"], row["loss"]) for row in rows] == [(64, 32, 32.0), (64, 512, 512.0)]


def test_a_run_on_a_mesh_of_other_devices_is_scored_on_those_here(tmp_path, scored):
    folder = run_folder(tmp_path / "s0", "s5", 0)
    run = workdir.read_json(folder / "run.json")
    run["config"]["sharding"]["fsdp"] = 2**10
    workdir.write_json(folder / "run.json", run)
    assert [row["length"] for row in lengths.score(folder, [32, 64])] == [32, 64]


def test_of_replicas_every_seed_has_a_row(tmp_path, monkeypatch):
    scores = {"step": 7, "test_accuracy": 0.5, "test_accuracy_by_seed": [0.4, 0.6]}
    monkeypatch.setattr(evaluation, "score_best", lambda plan, folder: scores)
    folder = run_folder(tmp_path / "s0", "s5", 3)
    run = workdir.read_json(folder / "run.json")
    run["config"]["train"]["replicas"] = 2
    workdir.write_json(folder / "run.json", run)
    assert [(row["seed"], row["accuracy"]) for row in lengths.score(folder, [32])] == [(3, 0.4), (4, 0.6)]


def test_a_figure_and_every_score_are_written(tmp_path, scored):
    rows = lengths.score(run_folder(tmp_path / "s0", "s5", 0), [32, 64])
    lengths.draw(rows, "accuracy", {"chance": 0.1}, tmp_path / "out.png")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob(".*tmp*")) and json.dumps(rows)


def test_parameters_that_depend_on_the_length_are_refused(tmp_path, scored):
    folder = run_folder(tmp_path / "run", "softmax", 0)
    with pytest.raises(workdir.WorkdirError, match="parameters depend on the length; it has none for 32"):
        lengths.score(folder, [32])


def test_folders_without_a_run_are_refused(tmp_path):
    for read in (lambda: lengths.score(tmp_path, [32]), lambda: curves.read(tmp_path)):
        with pytest.raises(workdir.WorkdirError, match="holds no run"):
            read()


def test_figures_are_png_or_an_error(tmp_path):
    with pytest.raises(workdir.WorkdirError, match=r"should end in \.png"):
        figures.save(Figure(), tmp_path / "out.pdf")


def test_lengths_are_whole_numbers(tmp_path):
    command = [
        sys.executable,
        "-m",
        "efficient_attn.reporting.lengths",
        "--workdirs=a",
        "--lengths=32,x",
        f"--out={tmp_path / 'out'}",
    ]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 2 and "--lengths=32,x: give whole numbers" in run.stderr and "Traceback" not in run.stderr
