"""Several seeds as one program: each trains as it does alone, and the run resumes and ends as one."""

import json
import shutil

import jax
import numpy as np
import pytest

from efficient_attn.arguments import ConfigError
from efficient_attn.checkpoints import Checkpoints
from efficient_attn.evaluation import score_once
from efficient_attn.metrics import Window, first_non_finite
from efficient_attn.plan import describe, make_plan, num_parameters
from efficient_attn.tables import Cell
from efficient_attn.tasks.pipeline import train_batches
from efficient_attn.tasks.synthetic import MultiQueryRecall
from efficient_attn.training import Progress, train_and_evaluate

SMALL = {
    "model.width": 16, "model.depth": 1, "model.norm": "batch", "model.dropout": 0.1, "optimizer.ema": 0.9, "task.num_eval": 64,
    "train.batch_size": 16, "train.duration": "12 steps", "train.eval_every": "4 steps", "train.checkpoint_every": "4 steps",
    "train.log_every": 3, "train.tensorboard": False, "model.mixer.use_bias": False,  # a key's has gradient zero: Adam drifts
}  # fmt: skip
TIMES = ("steps_per_second", "tokens_per_second", "input_wait")


def config_of(**seeds):
    return Cell("configs/quickstart.py:softmax", "softmax", "a", "p", SMALL, **seeds).get_config()


def train(folder, **seeds):
    state, _ = train_and_evaluate(config_of(**seeds), folder)
    return state


def rows(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "three"
    return folder, train(folder, seed=5, replicas=3)


def test_each_seed_trains_as_it_does_alone(three, tmp_path):
    folder, state = three
    for i, seed in enumerate((5, 7)):
        one = train(tmp_path / str(seed), seed=seed)
        mine = jax.tree.map(lambda x, i=i: x[2 * i], state.replace(step=None))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), mine, one.replace(step=None))
        for together, alone in zip(rows(folder), rows(tmp_path / str(seed)), strict=True):
            for name, value in alone.items():
                if name not in ("step", "learning_rate"):
                    np.testing.assert_allclose(together[f"{name}_by_seed"][2 * i], value, rtol=1e-4, err_msg=name)
    last = rows(folder)[-1]
    assert last["valid_loss"] == pytest.approx(np.mean(last["valid_loss_by_seed"])) and len(last["valid_loss_by_seed"]) == 3
    assert np.ptp(last["train_loss_by_seed"]) > 1e-3  # seeds differ


def test_a_continued_run_is_bit_identical(three, tmp_path):
    folder, state = three
    shutil.copytree(folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/12")
    again = train(tmp_path / "run", seed=5, replicas=3)
    jax.tree.map(np.testing.assert_array_equal, again, state)
    assert rows(tmp_path / "run") == rows(folder)


def test_the_test_score_has_one_entry_a_seed(three):
    folder, _ = three
    result = score_once(folder)
    assert len(result["test_accuracy_by_seed"]) == 3
    assert result["test_loss"] == pytest.approx(np.mean(result["test_loss_by_seed"]))
    plan = make_plan(json.loads((folder / "run.json").read_text())["config"])
    checkpoints = Checkpoints(folder / "checkpoints", metric="valid_accuracy", mode="max", read_only=True)
    by_step = {row["step"]: row["valid_accuracy"] for row in rows(folder) if "valid_accuracy" in row}
    assert result["step"] == checkpoints.best_step() == max(by_step, key=by_step.get)
    checkpoints.close()
    assert plan.seeds == (5, 6, 7)


def test_the_plan_counts_one_replica_s_parameters_and_all_tokens():
    one, three = make_plan(config_of()), make_plan(config_of(replicas=3))
    assert num_parameters(one) == num_parameters(three) and 3 * one.tokens_per_batch == three.tokens_per_batch
    assert "in each of 3 replicas" in describe(three) and "replicas" not in describe(one)
    with pytest.raises(ConfigError, match="seed=4294967294 must be"):
        make_plan(config_of(seed=2**32 - 2, replicas=3))
    with pytest.raises(ConfigError, match="replicas=0 must be at least 1"):
        make_plan({**config_of().to_dict(), "train": {**config_of().train.to_dict(), "replicas": 0}})


def test_batches_of_several_seeds_are_the_seeds_own():
    source = MultiQueryRecall(length=16, vocab_size=32, num_pairs=2, num_examples=40).source("train")
    streams = {seed: train_batches(source, batch_size=8, seed=seed, start_step=3) for seed in (1, 2, (1, 2))}
    one, two, both = map(next, streams.values())
    for key, value in both.items():
        np.testing.assert_array_equal(value, np.stack([one[key], two[key]], axis=1))


def test_early_stop_waits_for_all_replicas_together():
    plan = make_plan({**config_of(replicas=2).to_dict(), "train": {**config_of().train.to_dict(), "early_stop": 0.9}})
    progress = Progress()
    for step, values, finished in [(1, [1.0, 0.1], False), (2, [0.2, 1.0], False), (3, [0.95, 0.9], True)]:
        progress.note_evaluation(step, values, "max")
        assert bool(progress.why_finished(plan.task, plan.train)) == finished
    assert progress.best_step == 3 and progress.reached == 0.9
    assert Progress.from_json(progress.to_json()).why_finished(plan.task, plan.train)
    progress = Progress()
    progress.note_evaluation(1, [2.0, 4.0], "min")
    assert (progress.best, progress.reached) == (3.0, 4.0)


def test_sums_of_replicas_are_averaged_apart_and_survive_json():
    window = Window()
    for _ in range(2):
        window.add({"loss": (np.array([1.0, 3.0]), np.array([2.0, 2.0]))})
    window = Window(json.loads(json.dumps(window.to_json())))
    assert window.means("t") == {"t_loss": 1.0, "t_loss_by_seed": [0.5, 1.5]}
    assert first_non_finite({"loss": (np.array([1.0, np.nan]), 1)}) == "loss"
