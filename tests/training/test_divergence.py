"""Steps that are not finite, and spikes: stopped, skipped or rolled back, counted, bounded, and the same after a resume."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from configs import quickstart
from efficient_attn import models, training
from efficient_attn.arguments import ConfigError
from efficient_attn.divergence import HISTORY, Guard, TrainingDiverged, advice
from efficient_attn.plan import make_plan
from efficient_attn.steps import init_state, train_step
from efficient_attn.tasks.pipeline import eval_batches, train_batches
from efficient_attn.tasks.synthetic import MultiQueryRecall

STEPS = 12


def sums(norm: float, loss: float = 1.0) -> dict:
    return {"loss": (loss, 1.0), "grad_norm": (norm, 1.0)}


def test_a_spike_is_measured_against_the_running_median():
    guard = Guard()
    for step in range(1, HISTORY + 20):
        assert guard.note(step, sums(1.0 + step % 3), 5.0, 10) == ""
    assert guard.limit(HISTORY + 20, 5.0) == 10.0 and guard.limit(HISTORY + 20, 0.0) == math.inf
    wrong = guard.note(HISTORY + 20, sums(10.5), 5.0, 10)
    assert wrong == f"grad_norm=10.5 at step {HISTORY + 20} is over 5 times the median (2)"
    assert "loss is not finite" in guard.note(HISTORY + 20, sums(1.0, math.nan), 0.0, 10)


def test_no_step_is_a_spike_before_there_is_a_median():
    guard = Guard()
    for step in range(1, HISTORY // 4 + 1):
        assert guard.note(step, sums(10.0**step), 2.0, 10) == ""


def test_a_resumed_run_that_knows_one_step_more_decides_alike():
    guard = Guard()
    for step in range(1, 3 * HISTORY):
        before = guard.limit(step + 1, 3.0)  # what the loop decides by, before it has fetched the sums of `step`
        assert guard.note(step, sums(float(step)), 3.0, 10) == ""
        assert guard.limit(step + 1, 3.0) == before
    norms = [[step, float(step)] for step in range(1, 31)]
    assert Guard(norms).limit(31, 3.0) == Guard(norms[:-1]).limit(31, 3.0) == 45.0
    assert Guard(**json.loads(json.dumps(Guard(norms, 1, 2, 3).to_json()))) == Guard(norms, 1, 2, 3)


@pytest.fixture(scope="module")
def small():
    task = MultiQueryRecall(length=16, vocab_size=32, num_pairs=2)
    model = models.build(dict(depth=1, width=8, norm="batch", mixer=dict(name="identity", causal=True)), task)
    tx = optax.adam(0.1)
    batch = {k: jnp.asarray(v) for k, v in task.source("train").batch(np.arange(4)).items()}
    state = jax.jit(functools.partial(init_state, model, tx, 0, ema=True))(batch)
    return jax.jit(functools.partial(train_step, model, tx, ema=0.9)), state, batch


@pytest.mark.parametrize("bad", ["nan", "spike"])
def test_a_skipped_step_changes_the_step_alone(small, bad):
    step, state, batch = small
    state, _ = step(state, batch, np.float32(np.inf))
    weights, limit = {"nan": (jnp.nan, np.inf), "spike": (1.0, 1e-6)}[bad]
    skipped, sums = step(state, {**batch, "weights": batch["weights"] * weights}, np.float32(limit))
    assert skipped.step == state.step + 1 == 2
    jax.tree.map(np.testing.assert_array_equal, skipped.replace(step=0), state.replace(step=0))
    assert sums.pop("skipped") == (1.0, 1.0) and all(s == c == 0 for s, c in sums.values())
    taken, sums = step(skipped, batch, np.float32(np.inf))
    assert sums["skipped"] == (0.0, 1.0) and sums["loss"][1] > 0
    changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), taken.params, state.params)
    assert all(jax.tree.leaves(changed))


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory):
    """The runs here are few programs, each of which is compiled once."""

    def use(folder, seconds):
        compilation_cache.reset_cache()
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)

    before = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs
    use(str(tmp_path_factory.mktemp("cache")), 0.0)
    yield
    use(*before)


@pytest.fixture
def run(tmp_path, monkeypatch, quick_compile, compiled_once):
    """Trains the quickstart in miniature; the batches `poisoned`, and the validations `bad`, have weights that are no numbers;
    `killed_at` ends it."""

    def train(name: str, poisoned=(), bad=(), killed_at=None, **options):
        read, validations = [], iter(range(STEPS))

        def batches(source, *, start_step, **arguments):
            for i, batch in enumerate(train_batches(source, start_step=start_step, **arguments), start=start_step):
                if i == killed_at:
                    raise OSError("killed")
                read.append(i)
                yield {**batch, "weights": batch["weights"] * (np.nan if i in poisoned else 1)}

        def validation(source, **arguments):
            weight = np.nan if next(validations) in bad else 1
            yield from ({**batch, "weights": batch["weights"] * weight} for batch in eval_batches(source, **arguments))

        monkeypatch.setattr(training, "train_batches", batches)
        monkeypatch.setattr(training, "eval_batches", validation)
        config = quickstart.get_config("identity").unlock()
        config.model.update(width=8, depth=1, dropout=0.1)
        config.task.num_eval = 16
        config.train.update(
            batch_size=4, duration=f"{STEPS} steps", eval_every="6 steps", checkpoint_every="4 steps", log_every=1,
            tensorboard=False, **options,
        )  # fmt: skip
        state, progress = training.train_and_evaluate(config, tmp_path / name)
        times = ("steps_per_second", "tokens_per_second", "input_wait")
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return state, progress, [{k: v for k, v in line.items() if k not in times} for line in lines], read

    return train


@pytest.mark.parametrize("policy, counted", [("skip", "skipped"), ("rollback", "rollbacks")])
def test_the_run_goes_on_and_a_resumed_one_is_the_same(run, policy, counted):
    options, bad = dict(poisoned=(5, 6), on_divergence=policy), {"skip": (0,), "rollback": ()}[policy]
    whole, progress, lines, read = run("whole", bad=bad, **options)
    with pytest.raises(OSError, match="killed"):
        run("killed", bad=bad, killed_at=11, **options)
    resumed, *rest = run("killed", **options)
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)
    guard = progress.guard
    assert (
        rest[0].to_json() == progress.to_json()
        and rest[1] == lines
        and [line["step"] for line in lines] == list(range(1, STEPS + 1))
    )
    assert getattr(guard, counted) == 2 and lines[-1][counted] == 2 and "skipped" not in lines[3] and "rollbacks" not in lines[3]
    if policy == "skip":
        assert [line["train_loss"] is None for line in lines] == [i in (5, 6) for i in range(STEPS)]
        assert lines[7]["learning_rate"] == pytest.approx(lines[4]["learning_rate"] * 6 / 5)  # the warm-up waits
        assert lines[5]["valid_accuracy"] is None and progress.best_step == STEPS and progress.best == lines[-1]["valid_accuracy"]
    else:
        assert guard.batch_offset == 3 and max(read) == STEPS - 1 + 3  # step 5 reads batch 4, then 6, then 7
        assert all(line["train_loss"] is not None for line in lines)


def test_skips_are_bounded():
    guard, skip = Guard(), {"loss": (0.0, 0.0), "grad_norm": (0.0, 0.0), "skipped": (1.0, 1.0)}
    assert [guard.note(step, skip, 0.0, 2) for step in (3, 4)] == ["", ""]
    assert guard.note(6, skip, 0.0, 2) == "3 steps were skipped up to step 6 (train.max_divergences=2)"


def test_rollbacks_are_bounded_and_a_validation_that_is_not_finite_asks_for_one(run):
    with pytest.raises(TrainingDiverged, match=r"after 1 rollbacks .*valid accuracy is not finite at step 6; nothing of it was"):
        run("rollback", poisoned=[0], bad=[0], on_divergence="rollback", max_divergences=1)


def test_only_what_is_not_chosen_is_advised():
    told = {policy: advice(policy, 1, 0.0, False) for policy in ("stop", "skip", "rollback")}
    assert told["stop"].endswith("lengthen optimizer.warmup, or set train.on_divergence to 'rollback' or 'skip'")
    assert told["skip"].endswith("raise train.max_divergences, or set train.on_divergence to 'rollback'")
    assert told["rollback"].endswith("or set train.on_divergence to 'skip'")
    assert advice("stop", 1, 1.0, True).endswith("to 'skip'") and "lower optimizer.clip_norm" in advice("stop", 1, 1.0, True)
    assert advice("stop", 3, 0.0, False).endswith("or lengthen optimizer.warmup")  # replicas take no other policy


@pytest.mark.parametrize(
    "options, message", [(dict(on_divergence="skp"), "did you mean 'skip'"), (dict(spike_factor=0.5), "more than 1")]
)
def test_wrong_policies_are_named(options, message):
    config = quickstart.get_config("identity").unlock()
    config.train.update(**options)
    with pytest.raises(ConfigError, match=message):
        make_plan(config)
