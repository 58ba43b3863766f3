"""Checkpoints: bit-exact restore, which steps are kept, and states that cannot be saved or do not fit."""

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import textwrap
import threading
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from efficient_attn import checkpoints as checkpoints_lib
from efficient_attn.checkpoints import CheckpointError, Checkpoints

ROOT = str(pathlib.Path(__file__).parents[1])
TX = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


@flax.struct.dataclass
class State:
    step: jax.Array
    params: Any
    opt_state: Any
    key: jax.Array
    variables: Any


def make_state(seed: int) -> State:
    """A small state with every dtype a run may hold, and the float32 values that careless copies change."""
    rng = np.random.default_rng(seed)
    odd = jnp.asarray([np.nan, np.inf, -0.0, 1e-42, 1 / 3], jnp.float32)
    kernel = jnp.asarray(rng.standard_normal((8, 8)), jnp.float32)
    params = {"mlp": {"kernel": kernel, "bias": jnp.full(3, seed, jnp.bfloat16)}, "odd": odd}
    variables = {"stats": {"poles": jnp.asarray([seed + 2j], jnp.complex64), "seen": jnp.asarray([True, False])}}
    return State(jnp.int32(seed), params, TX.init(params), jax.random.key_data(jax.random.key(seed)), variables)


def abstract(state: State) -> State:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)


def bits(state: Any) -> dict[str, tuple]:
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): (leaf.dtype, leaf.shape, np.asarray(leaf).tobytes()) for path, leaf in leaves}


def assert_identical(restored: Any, expected: Any) -> None:
    assert jax.tree.structure(restored) == jax.tree.structure(expected)
    assert bits(restored) == bits(expected)


@pytest.fixture
def open_checkpoints(tmp_path):
    """Opens `tmp_path/checkpoints` (or another folder), as a run that starts or resumes does."""
    with contextlib.ExitStack() as stack:

        def open_them(directory: pathlib.Path = tmp_path / "checkpoints", **options) -> Checkpoints:
            opened = Checkpoints(directory, **{"metric": "accuracy", "mode": "max", **options})
            return stack.enter_context(contextlib.closing(opened))

        yield open_them


def save_all(checkpoints: Checkpoints, accuracies: dict[int, float | None]) -> None:
    for step, accuracy in accuracies.items():
        metrics = None if accuracy is None else {"accuracy": accuracy}
        checkpoints.save(step, make_state(step), {"examples": 32 * step}, metrics)
    checkpoints.wait()


# What is saved comes back.


def test_restores_every_bit_and_the_tree(open_checkpoints):
    state = make_state(7)
    checkpoints = open_checkpoints()
    checkpoints.save(7, state, {"epoch": 2, "best": 0.1 + 0.2})
    checkpoints.close()
    step, restored, progress = open_checkpoints().restore_latest(abstract(make_state(0)))
    assert step == 7
    assert_identical(restored, state)
    assert progress == {"epoch": 2, "best": 0.1 + 0.2}


def test_empty_folder_has_nothing(open_checkpoints):
    checkpoints = open_checkpoints()
    assert (checkpoints.latest_step(), checkpoints.best_step(), checkpoints.steps()) == (None, None, [])
    assert checkpoints.restore_latest(abstract(make_state(0))) is None
    assert checkpoints.restore_best(abstract(make_state(0))) is None


def test_arrays_may_be_donated_as_soon_as_save_returns(open_checkpoints):
    double = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + leaf, state), donate_argnums=0)
    state = {"w": jnp.arange(1_000_000, dtype=jnp.float32)}
    expected = jax.tree.map(np.array, state)
    checkpoints = open_checkpoints()
    checkpoints.save(1, state, {})
    for _ in range(3):
        state = jax.block_until_ready(double(state))
    restored, _ = checkpoints.restore(1, state)
    assert_identical(restored, jax.tree.map(jnp.asarray, expected))


def test_plain_orbax_reads_a_step(open_checkpoints, tmp_path):
    checkpoints = open_checkpoints()
    save_all(checkpoints, {3: None})
    restored = ocp.StandardCheckpointer().restore(tmp_path / "checkpoints" / "3", abstract(make_state(0)))
    assert_identical(restored, make_state(3))


def test_seal_is_readable_json(open_checkpoints, tmp_path):
    save_all(open_checkpoints(), {1: float("nan")})
    seal = json.loads((tmp_path / "checkpoints" / "1" / "seal.json").read_text())
    assert seal["metrics"] == {"accuracy": None} and seal["progress"] == {"examples": 32}
    assert seal["arrays"]["params/mlp/kernel"] == "float32[8,8]"


def test_save_returns_before_the_step_is_committed(open_checkpoints, monkeypatch):
    go_on = threading.Event()
    finalize = checkpoints_lib._SealingHandler.finalize
    monkeypatch.setattr(checkpoints_lib._SealingHandler, "finalize", lambda self, path: (go_on.wait(30), finalize(self, path))[1])
    checkpoints = open_checkpoints()
    checkpoints.save(1, make_state(1), {})
    assert checkpoints.steps() == []
    go_on.set()
    checkpoints.wait()
    assert checkpoints.steps() == [1]


def test_restores_onto_other_shardings():
    script = """
        import pathlib, sys, jax, numpy as np
        from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
        from efficient_attn.checkpoints import Checkpoints
        grid = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
        values = np.arange(64, dtype=np.float32).reshape(8, 8)
        saved = Checkpoints(pathlib.Path(sys.argv[1]), metric="loss", mode="min")
        saved.save(1, {"w": jax.device_put(values, NamedSharding(grid, P("a", "b")))}, {})
        for sharding in (NamedSharding(grid, P("b")), NamedSharding(grid, P()), None):
            wanted = {"w": jax.ShapeDtypeStruct((8, 8), np.float32, sharding=sharding)}
            restored = saved.restore(1, wanted)[0]["w"]
            assert np.array_equal(restored, values)
            assert sharding is None or restored.sharding.is_equivalent_to(sharding, 2), restored.sharding
        saved.close()
        print("shardings", len(jax.devices()))
    """
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, "PYTHONPATH": ROOT, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
        command = [sys.executable, "-c", textwrap.dedent(script), folder]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["shardings", "4"], done.stderr


# Which steps are kept.


@pytest.mark.parametrize(
    ("mode", "accuracies", "kept", "best"),
    [
        ("max", {1: 0.1, 2: 0.9, 3: 0.2, 4: 0.3, 5: 0.4}, [2, 4, 5], 2),
        ("max", {1: 0.1, 2: 0.2, 3: 0.3}, [2, 3], 3),
        ("min", {1: 0.1, 2: 0.9, 3: 0.2, 4: 0.3}, [1, 3, 4], 1),
        ("max", {1: 0.5, 2: 0.5, 3: 0.5, 4: 0.5}, [1, 3, 4], 1),
        ("max", {1: float("nan"), 2: 0.1, 3: float("nan"), 4: float("inf")}, [2, 3, 4], 2),
        ("min", {1: float("-inf"), 2: float("nan"), 3: None, 4: None}, [3, 4], None),
        ("max", {1: 0.1, 2: None, 3: None, 4: None}, [1, 3, 4], 1),
    ],
)
def test_keeps_two_latest_and_the_best(open_checkpoints, mode, accuracies, kept, best):
    checkpoints = open_checkpoints(mode=mode)
    save_all(checkpoints, accuracies)
    assert (checkpoints.steps(), checkpoints.latest_step(), checkpoints.best_step()) == (kept, kept[-1], best)
    if best is not None:
        step, restored, _ = checkpoints.restore_best(abstract(make_state(0)))
        assert step == best
        assert_identical(restored, make_state(best))


def test_best_survives_a_resume(open_checkpoints):
    save_all(open_checkpoints(), {1: 0.9, 2: 0.1, 3: 0.2})
    resumed = open_checkpoints()
    save_all(resumed, {4: 0.3, 5: 0.4})
    assert (resumed.steps(), resumed.best_step(), resumed.metrics(1)) == ([1, 4, 5], 1, {"accuracy": 0.9})


def test_saving_a_step_again_keeps_its_arrays(open_checkpoints):
    checkpoints = open_checkpoints()
    checkpoints.save(4, make_state(4), {"evaluated": False})
    checkpoints.save(4, make_state(5), {"evaluated": True}, {"accuracy": 0.5, "loss": float("nan")})
    checkpoints.save(4, make_state(5), {"evaluated": True, "done": True})
    restored, progress = open_checkpoints().restore(4, abstract(make_state(0)))
    assert_identical(restored, make_state(4))
    assert progress == {"evaluated": True, "done": True}
    assert checkpoints.metrics(4) == {"accuracy": 0.5, "loss": None}
    assert checkpoints.best_step() == 4


# What cannot be saved or does not fit.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s.replace(params={**s.params, "odd": s.params["odd"][:4]}),
            r"params/odd is float32\[5\] there and float32\[4\]",
        ),
        (lambda s: s.replace(step=s.step.astype(jnp.uint32)), r"step is int32\[\] there and uint32\[\] here"),
        (lambda s: s.replace(params={**s.params, "new": s.step}), r"params/new is missing there and int32\[\] here"),
        (lambda s: s.replace(variables={}), r"variables/stats/poles is complex64\[1\] there and missing here"),
        (
            lambda s: s.replace(opt_state=optax.sgd(0.1).init(s.params)),
            r"opt_state/1/0/count is int32\[\] there and missing here",
        ),
    ],
)
def test_a_state_that_does_not_fit_is_named(open_checkpoints, change, message):
    checkpoints = open_checkpoints()
    save_all(checkpoints, {1: None, 2: None})
    with pytest.raises(CheckpointError, match=message):
        checkpoints.restore_latest(abstract(change(make_state(2))))
    assert checkpoints.steps() == [1, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({"n": 3}, {}), "state leaf n is a int"),
        (({"empty": jnp.zeros((0, 2))}, {}), r"state leaf empty has no elements \(shape \(0, 2\)\)"),
        (({"w": jnp.ones(2)}, {"best": float("nan")}), "progress must be finite, plain JSON"),
        (({"w": jnp.ones(2)}, {"best": jnp.ones(2)}), "progress must be finite, plain JSON"),
        (({"w": jnp.ones(2)}, {}, {"loss": 1.0}), r"metrics of step 1 lack 'accuracy'.*\['loss'\]"),
    ],
)
def test_what_cannot_be_saved_is_named(open_checkpoints, arguments, message):
    checkpoints = open_checkpoints()
    with pytest.raises(CheckpointError, match=message):
        checkpoints.save(1, *arguments)
    checkpoints.close()
    assert list(checkpoints.directory.iterdir()) == []
