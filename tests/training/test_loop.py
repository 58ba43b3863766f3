"""The loop as a user meets it: `python train.py`, stopped in every way, continued, compared bit for bit."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 24
TIMES = ("steps_per_second", "tokens_per_second", "input_wait")
SMALL = [
    "--config=configs/quickstart.py:softmax",
    "--config.model.width=16",
    "--config.model.norm=batch",
    "--config.model.dropout=0.1",
    "--config.optimizer.ema=0.9",
    "--config.task.num_eval=64",
    "--config.train.batch_size=16",
    f"--config.train.duration={STEPS} steps",
    "--config.train.eval_every=8 steps",
    "--config.train.checkpoint_every=4 steps",
    "--config.train.log_every=3",
    "--config.train.tensorboard=False",
]


def command(workdir, *overrides) -> list[str]:
    return [sys.executable, "train.py", f"--workdir={workdir}", *SMALL, *overrides]


def environment() -> dict[str, str]:
    return {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": "", "PYTHONUNBUFFERED": "1"}


def run(workdir, *overrides, expect=0):
    result = subprocess.run(
        command(workdir, *overrides), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert result.returncode == expect, result.stdout[-3000:] + result.stderr[-3000:]
    return result


def stop_at(workdir, step: int, number: signal.Signals):
    """Start a run, signal it once it has reported `step`, and wait for its end."""
    process = subprocess.Popen(
        command(workdir), cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        if line.startswith(f"step {step}/"):
            process.send_signal(number)
            break
    _, err = process.communicate(timeout=300)
    return process.returncode, err


def rows(workdir) -> list[dict]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def parameters(workdir) -> list[np.ndarray]:
    """All arrays of the last checkpoint."""
    import jax

    from efficient_attn.checkpoints import Checkpoints
    from efficient_attn.plan import make_plan
    from efficient_attn.workdir import read_json

    plan = make_plan(read_json(workdir / "run.json")["config"])
    checkpoints = Checkpoints(workdir / "checkpoints", metric="valid_accuracy", mode="max", read_only=True)
    step, state, _ = checkpoints.restore_latest(plan.state)
    checkpoints.close()
    assert step == STEPS
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    run(workdir)
    return workdir


def assert_same_run(workdir, reference):
    assert rows(workdir) == rows(reference)
    for a, b in zip(parameters(workdir), parameters(reference), strict=True):
        np.testing.assert_array_equal(a, b)


def test_metrics_have_one_line_a_step_and_say_what_happened(uninterrupted):
    lines = rows(uninterrupted)
    assert [line["step"] for line in lines] == sorted({*range(3, STEPS + 1, 3), 8, 16, 24})
    assert "train_loss" in lines[0] and "valid_accuracy" in lines[-1] and "train_grad_norm" in lines[-1]
    assert lines[-1]["train_loss"] < lines[0]["train_loss"]


def test_run_json_records_what_the_run_was(uninterrupted):
    info = json.loads((uninterrupted / "run.json").read_text())
    assert info["config"]["model"]["width"] == 16 and info["steps"] == STEPS
    assert info["data"].startswith("multi_query_recall") and "jax" in info["versions"]


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 75), (signal.SIGINT, 75), (signal.SIGKILL, -9)])
def test_stopped_and_continued_equals_uninterrupted(tmp_path, uninterrupted, number, status):
    workdir = tmp_path / "stopped"
    code, err = stop_at(workdir, 9, number)
    assert code == status
    if number != signal.SIGKILL:
        assert f"stopped by {number.name} after step" in err and "Traceback" not in err
    continued = run(workdir)
    assert "continuing from step" in continued.stdout and "bit-identical" not in continued.stderr
    assert_same_run(workdir, uninterrupted)


@pytest.mark.parametrize("damage", ["truncate", "flip"])
def test_damaged_newest_checkpoint_is_named_and_skipped(tmp_path, uninterrupted, damage):
    workdir = tmp_path / "damaged"
    code, _ = stop_at(workdir, 15, signal.SIGTERM)
    assert code == 75
    newest = max((p for p in (workdir / "checkpoints").iterdir() if p.name.isdecimal()), key=lambda p: int(p.name))
    data = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(data.read_bytes())
    if damage == "truncate":
        content = content[: len(content) // 2]
    else:
        content[len(content) // 2] ^= 1
    data.write_bytes(content)
    result = run(workdir)
    assert re.search(rf"checkpoints/{newest.name}\b", result.stderr), result.stderr[-2000:]
    assert f"continuing from step {newest.name}\n" not in result.stdout
    assert_same_run(workdir, uninterrupted)


def test_finished_run_does_nothing_more(uninterrupted):
    before = (uninterrupted / "metrics.jsonl").read_bytes()
    assert f"finished at step {STEPS}" in run(uninterrupted).stdout
    assert (uninterrupted / "metrics.jsonl").read_bytes() == before


def test_other_configuration_in_the_workdir_is_refused(uninterrupted):
    before = (uninterrupted / "run.json").read_bytes()
    err = run(uninterrupted, "--config.model.width=32", "--config.seed=3", expect=2).stderr
    assert "model.width: 16 there, 32 now" in err and "seed: 0 there, 3 now" in err and "Traceback" not in err
    assert (uninterrupted / "run.json").read_bytes() == before


def test_second_run_on_a_workdir_is_refused(tmp_path):
    from efficient_attn import workdir

    with workdir.lock(tmp_path / "busy"):
        err = run(tmp_path / "busy", expect=5).stderr
    assert f"pid {os.getpid()}" in err and "Traceback" not in err


def test_non_finite_loss_stops_the_run_and_is_never_saved(tmp_path):
    result = run(tmp_path / "nan", "--config.optimizer.learning_rate=1e38", "--config.optimizer.warmup=0 steps", expect=4)
    assert "is not finite at step" in result.stderr and "Traceback" not in result.stderr
    saved = [p for p in (tmp_path / "nan" / "checkpoints").iterdir() if p.name.isdecimal()]
    assert not saved
    for row in rows(tmp_path / "nan") if (tmp_path / "nan" / "metrics.jsonl").exists() else []:
        assert row.get("train_loss") is not None


def test_evaluation_scores_the_best_checkpoint_once(uninterrupted, tmp_path):
    def evaluate(workdir, expect=0):
        return subprocess.run(
            [sys.executable, "eval.py", f"--workdir={workdir}"], cwd=ROOT, env=environment(), capture_output=True, text=True
        )

    first = json.loads(evaluate(uninterrupted).stdout)
    best = max((r for r in rows(uninterrupted) if "valid_accuracy" in r), key=lambda r: (r["valid_accuracy"], -r["step"]))
    assert first["step"] == best["step"] and first["valid_accuracy"] == best["valid_accuracy"] and "test_accuracy" in first
    stamp = (uninterrupted / "eval.json").stat().st_mtime_ns
    time.sleep(0.01)
    assert json.loads(evaluate(uninterrupted).stdout) == first
    assert (uninterrupted / "eval.json").stat().st_mtime_ns == stamp
    changed = tmp_path / "run"
    shutil.copytree(uninterrupted, changed)
    evaluated = [r["step"] for r in rows(uninterrupted) if "valid_accuracy" in r]
    assert first["evaluated_until"] == evaluated[-1]
    early = first | {"step": first["step"] - 1, "evaluated_until": first["step"] - 1, "test_accuracy": 0.0}
    (changed / "eval.json").write_text(json.dumps(early))
    again = evaluate(changed)
    assert json.loads(again.stdout)["test_accuracy"] == first["test_accuracy"] and "the best is now step" in again.stderr
    assert json.loads((changed / "eval.previous.json").read_text())["test_accuracy"] == 0.0
    (changed / "eval.json").write_text(json.dumps(early))
    shutil.rmtree(changed / "checkpoints" / str(first["step"]))
    assert json.loads((lost := evaluate(changed)).stdout) == early and "has no whole checkpoint" in lost.stderr
    lines = (changed / "metrics.jsonl").read_text().splitlines(keepends=True)
    (changed / "metrics.jsonl").write_text("".join(lines[:-1]))
    assert "best so far" in evaluate(changed).stderr
    missing = evaluate(uninterrupted / "nothing")
    assert missing.returncode == 2 and "holds no run" in missing.stderr


def test_check_prints_the_plan_and_writes_nothing(tmp_path):
    result = run(tmp_path / "none", "--check")
    assert "parameters" in result.stdout and "layer_0/mixer/query/kernel" in result.stdout
    assert not (tmp_path / "none").exists()


def test_profile_is_written_even_in_a_short_run(tmp_path):
    assert "profile of 3 step(s) written" in run(tmp_path / "p", "--profile=3", "--config.train.duration=8 steps").stdout
    assert list((tmp_path / "p" / "profile").rglob("*.xplane.pb"))


def test_changed_data_are_refused(tmp_path):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("the quick brown fox jumps over the lazy dog. " * 400)
    lm = [
        "--config=configs/lm_text.py", f"--config.task.path={corpus}", f"--config.task.data_dir={tmp_path / 'data'}",
        "--config.task.context=16", "--config.model.depth=1", "--config.model.width=16", "--config.train.duration=4 steps",
        "--config.train.eval_every=2 steps", "--config.train.tensorboard=False", f"--workdir={tmp_path / 'lm'}",
    ]  # fmt: skip
    first = subprocess.run([sys.executable, "train.py", *lm], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    corpus.write_text(corpus.read_text() + "one more line")
    again = subprocess.run([sys.executable, "train.py", *lm], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert again.returncode == 2 and "the data of" in again.stderr and "choose another --workdir" in again.stderr


def test_early_stop_ends_the_run_and_stays_ended(tmp_path):
    first = run(tmp_path / "early", "--config.train.early_stop=0.0001").stdout
    assert "finished at step 8 (valid accuracy" in first
    again = run(tmp_path / "early", "--config.train.early_stop=0.0001").stdout
    assert "finished at step 8 (valid accuracy" in again
    assert f"finished at step {STEPS}" in run(tmp_path / "early", "--config.train.early_stop=0.99").stdout


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["--config=configs/quickstart.py:sofmax"],
            "recipe of configs/quickstart.py='sofmax' is unknown (did you mean 'softmax'?)",
        ),
        (["--config=configs/quickstat.py"], "configs/quickstat.py"),
        (["--config=configs/quickstart.py", "--config.model.widht=3"], "no field --config.model.widht (did you mean 'width'?)"),
        (["--config=configs/quickstart.py", "--config.model.mixer.num_head=3"], "(did you mean 'num_heads'?)"),
        (["--config=configs/quickstart.py", "--config.model.width=wide"], "width"),
        (["--config=configs/quickstart.py", "--wrkdir=x"], "wrkdir"),
        (["--config=configs/quickstart.py", "stray"], "unexpected argument 'stray'"),
        (["--config=configs/quickstart.py", "--config.model.mixer=(dict(name='s5'),)"], "model.mixer"),
        (["--config", "configs/quickstat.py"], "no configuration file configs/quickstat.py (did you mean 'quickstart.py'?)"),
        (["--config=configs/quickstart.py", "--config.seed=1", "--config.model.mixr.x=1"], "no field --config.model.mixr.x"),
        ([], "config"),
    ],
)
def test_wrong_flags_give_one_clear_line(arguments, message, tmp_path):
    result = subprocess.run(
        [sys.executable, "train.py", f"--workdir={tmp_path / 'w'}", *arguments],
        cwd=ROOT, env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 2 and message in result.stderr, result.stderr
    assert "Traceback" not in result.stderr and len(result.stderr.strip().splitlines()) <= 3
    assert not (tmp_path / "w").exists()
