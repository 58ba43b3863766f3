"""The mesh and the rules of `config.sharding`: what lies where, and what is wrong said before anything is compiled."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from configs.lm_memory import get_config
from efficient_attn import sharding
from efficient_attn.arguments import ConfigError
from efficient_attn.config import experiment, may_change
from efficient_attn.mixers.context import MEMORY
from efficient_attn.plan import describe, make_plan, mib_per_device
from efficient_attn.sharding import ShardingConfig, batch_spec, mesh_shape


def config(batch_size=8, **fields):
    recipe = dict(
        model=dict(depth=1, width=32, feed_forward_width=64, mixer=dict(name="softmax", num_heads=4)),
        train=dict(batch_size=batch_size, duration="3 steps"),
        sharding=fields,
    )
    return experiment(
        name="small", task=dict(name="multi_query_recall", vocab_size=128), recipes={"a": recipe}, recipe="a"
    )  # fmt: skip


def plan(**fields):
    """A plan for eight devices, of which one is here."""
    return make_plan(config(**{"data": 1, "min_size": 0, **fields}))


def test_the_open_axis_takes_the_devices_that_are_left():
    assert mesh_shape(ShardingConfig(fsdp=2, model=2), 8) == {"data": 2, "fsdp": 2, "expert": 1, "seq": 1, "model": 2}
    assert mesh_shape(ShardingConfig(data=2, fsdp=-1), 8)["fsdp"] == 4


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(data=-1, fsdp=-1), "data and fsdp are both -1"),
        (dict(data=0), "sharding.data=0 must be"),
        (dict(seq=2), "seq=2 does not divide the 1 device"),
        (dict(data=1, fsdp=3), "train.batch_size=8 must be a positive multiple of 3"),
        (dict(data=1, seq=3), "sharding.seq=3 does not divide the task's sequences of 64"),
        (dict(rules=((".*/kernel", "fsdp"),)), "no rule matches parameter"),
        (dict(rules=((".*", "fsdp"), ("head/kernel", ()))), "match no parameter that an earlier rule left"),
        (dict(rules=((".*", "tensor"),)), "names the axis 'tensor'; the mesh has data, fsdp"),
        (dict(rules=((".*/query/kernel", ("fsdp", "fsdp")), (".*", "fsdp"))), "names the axis 'fsdp' twice"),
        (dict(rules=(("(", "fsdp"),)), "must be (regular expression, layout)"),
        (dict(rules=((".*", 3),)), "must be the name of an axis, or a tuple"),
        (dict(data=1, model=8, rules=((".*/query/kernel", (None, "model")), (".*", "fsdp"))), "its axis of 4 does not split"),
        (dict(data=1, rules=((".*/scale", (None, "model")), (".*", "fsdp"))), "fewer axes than its layout"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_compiled(fields, message):
    with pytest.raises(ConfigError) as error:
        make_plan(config(**fields))
    assert message in str(error.value)


def test_a_mesh_for_other_devices_is_planned_but_not_trained_on():
    text = describe(plan(fsdp=8))
    assert "fsdp 8 of 1 x cpu here" in text
    with pytest.raises(ConfigError, match=r"fsdp=8 needs 8 device\(s\), but there are 1 in 1 process"):
        plan(fsdp=8).placement()


def test_parameters_optimizer_state_and_averages_lie_together():
    rules = ((r".*/(query|key|value)/kernel", (None, "model")), (r".*/out/kernel", ["model"]), (".*", "fsdp"))
    specs = plan(fsdp=2, model=4, rules=rules).specs
    mixer = specs.params["layer_0"]["mixer"]
    assert mixer["query"]["kernel"] == P(None, "model") and mixer["out"]["kernel"] == P("model")
    assert specs.params["layer_0"]["mlp"]["up"]["kernel"] == P(None, "fsdp")  # 32 x 64: the largest axis
    adam = next(part for part in jax.tree.leaves(specs.opt_state, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(part, "mu"))
    assert adam.mu == adam.nu == specs.params and adam.count == P()
    assert specs.step == specs.rng == P()


def test_small_arrays_stay_whole():
    specs = plan(fsdp=2, min_size=64).specs.params["layer_0"]
    assert specs["norm_mlp"]["scale"] == P() and specs["mlp"]["up"]["bias"] == P("fsdp")


def test_bytes_per_device_fall_with_the_mesh():
    one, eight = mib_per_device(plan()), mib_per_device(plan(fsdp=8))
    assert one["batch"] == 8 * eight["batch"]
    assert one["parameters"] == 8 * eight["parameters"] > 0  # all axes of this model divide by 8
    assert 1.99 < one["optimizer state"] / one["parameters"] < 2.01


def test_the_memory_of_streams_lies_as_their_rows(tmp_path):
    (tmp_path / "text.txt").write_text("to be or not " * 3000)
    config = get_config("transformer_xl")
    config.task.update(path=str(tmp_path / "text.txt"), data_dir=str(tmp_path), context=16)
    config.model.update(depth=1, width=16)
    config.train.batch_size = 8
    config.sharding.update(data=2, fsdp=4)
    spread = make_plan(config)
    memory = jax.tree.leaves(spread.specs.variables[MEMORY], is_leaf=lambda x: isinstance(x, P))
    assert memory and all(spec == P(sharding.ROWS) for spec in memory)
    config.sharding.update(data=1, fsdp=1)
    assert mib_per_device(make_plan(config))["variables"] == 8 * mib_per_device(spread)["variables"] > 0


def test_sequences_are_split_along_their_own_axis():
    assert batch_spec((8, 64), 64) == P(sharding.ROWS, "seq")
    assert batch_spec((8, 2, 64), 64) == P(sharding.ROWS, None, "seq")
    assert batch_spec((8, 64, 64), 64) == P(sharding.ROWS, "seq", None)
    assert batch_spec((8,), 64) == P(sharding.ROWS)


def test_a_batch_arrives_as_it_is():
    placement = make_plan(config()).placement()
    batch = {"inputs": np.arange(8 * 64).reshape(8, 64), "weights": np.ones(8, np.float32)}
    placed = placement.put(batch)
    assert all(np.array_equal(placed[name], batch[name]) for name in batch)


@pytest.mark.parametrize(
    ("devices", "section", "train", "expected"),
    [
        (1, {"fsdp": 1, "data": -1}, {}, {"fsdp": 1, "data": -1}),
        (4, {"fsdp": 2, "data": -1}, {}, {"fsdp": 2, "data": -1}),
        (1, {"fsdp": 8, "data": 1, "rules": [[".*", "fsdp"]]}, {}, {"data": 1, "fsdp": -1}),
        (3, {"data": -1}, {}, {"data": 1, "model": -1}),
        (8, {"data": -1}, {"eval_batch_size": 12}, {"data": 1, "model": -1}),
        (4, {"data": -1}, {"accumulate": 4}, {"data": -1}),
        (8, {"data": -1}, {"accumulate": 4}, {"data": 1, "model": -1}),
        (4, {"data": 2}, {"replicas": 3}, {"data": -1}),
    ],
)
def test_a_run_is_scored_on_whatever_devices_there_are(monkeypatch, devices, section, train, expected):
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    assert sharding.for_devices_here({"train": {"batch_size": 16, **train}, "sharding": section}) == expected


@pytest.mark.parametrize(
    ("owners", "expected"),
    [
        ([[0], [0], [1], [1]], [(0, 2), (1, 2)]),
        ([[0, 0, 1, 1]], [(0, 1), (0, 1)]),
        ([[0, 1], [2, 3]], [(0, 2), (0, 2), (1, 2), (1, 2)]),
        ([[0], [1], [0], [1]], [(0, 1), (0, 1)]),  # no contiguous part: each reads all
    ],
)
def test_processes_whose_devices_share_rows_read_the_same_ones(owners, expected):
    assert [sharding._row_group(np.array(owners), i) for i in range(len(expected))] == expected


def test_a_resumed_run_may_lie_on_another_mesh():
    assert may_change("sharding.fsdp") and may_change("train.log_every") and not may_change("model.width")


def test_optimizer_state_of_another_shape_stays_whole():
    import optax

    state = make_plan(config()).state
    tx = optax.scale_by_factored_rms(min_dim_size_to_factor=8)  # rows and columns in place of a matrix
    state = state.replace(opt_state=jax.eval_shape(tx.init, state.params))
    rules = ((r".*/up/kernel", (None, "model")), (".*", "fsdp"))
    specs = sharding.state_specs(ShardingConfig(data=1, model=2, rules=rules), mesh_shape(ShardingConfig(model=2), 2), state, tx)
    assert specs.params["layer_0"]["mlp"]["up"]["kernel"] == P(None, "model")
    assert specs.opt_state.v_row["layer_0"]["mlp"]["up"]["kernel"] == P()
