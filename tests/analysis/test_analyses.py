"""Analyses of language models, on models whose answer is known beforehand."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import lm_memory, lm_text
from efficient_attn.analysis import ANALYSES, Run, Table, over_seeds
from efficient_attn.analysis.attention import _classify, attention_weights
from efficient_attn.analysis.base import AnalysisError
from efficient_attn.mixers import Context
from efficient_attn.plan import make_plan

pytestmark = pytest.mark.usefixtures("quick_compile")

L = 16


@pytest.fixture
def make_run(tmp_path):
    """A run of random parameters on random text: (mixer arguments, model arguments) -> Run."""

    def make(mixer, tokens=400, config=None, **model):
        path = tmp_path / "text.txt"
        path.write_text("".join(f"{number} squared is {number * number}. " for number in range(400)))
        config = config or lm_text.get_config()
        config = json.loads(config.to_json())
        config["task"] |= dict(path=str(path), data_dir=str(tmp_path / "data"), context=L)
        config["model"] |= dict(depth=1, width=8, feed_forward_width=0, **model)
        config["model"]["mixer"] = config["model"]["mixer"] | dict(num_heads=2, causal=True) | mixer
        plan = make_plan(config)
        params = jax.jit(plan.model.init)(jax.random.key(0), jnp.ones((1, L), jnp.int32), Context())["params"]
        keys = iter(jax.random.split(jax.random.key(1), 100))
        params = jax.tree.map(lambda p: p + 0.5 * jax.random.normal(next(keys), p.shape), params)
        text = np.random.default_rng(0).integers(1, 256, tokens + 1).astype(np.uint8)
        return Run(plan, 7, 0, {"params": params}, "valid", text)

    return make


extrapolation = sys.modules["efficient_attn.analysis.extrapolation"]  # the package exports functions of these names
fine_tuning = sys.modules["efficient_attn.analysis.fine_tuning"]
perturbation = sys.modules["efficient_attn.analysis.perturbation"]
LOCAL = dict(name="local", window=4)


def columns(table: Table, *names):
    return [tuple(row[table.columns.index(name)] for name in names) for row in table.rows]


def test_losses_are_the_models_own(make_run):
    run = make_run({})
    windows = run.windows(L, count=5)
    logits = run.plan.model.apply(run.variables, jnp.asarray(windows[:, :-1]), Context())
    expected = -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), windows[:, 1:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(run.losses(windows), expected, atol=1e-5)
    with pytest.raises(AnalysisError, match="--tokens=402"):
        run.windows(401)


def test_a_model_with_memory_reads_on_from_segment_to_segment(make_run):
    """Within its memory's length, a long window's losses are those of one attention to all of it."""
    config = lm_memory.get_config("transformer_xl")
    run = make_run(dict(memory_length=3 * L), config=config)
    windows = run.windows(3 * L, count=2)
    logits = run.plan.model.apply(run.variables, jnp.asarray(windows[:, :-1]), Context())
    expected = -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), windows[:, 1:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(run.losses(windows), expected, atol=1e-4)
    protocols = columns(ANALYSES["windows"](run), "protocol", "tokens")
    assert protocols[-1] == ("segments with memory", 400)


def test_sliding_windows_score_every_token_once_from_the_window_before_it(make_run):
    run = make_run({})
    rows = {stride: (count, nats) for stride, count, nats in columns(ANALYSES["windows"](run), "stride", "tokens", "nats")}
    assert {stride: count for stride, (count, _) in rows.items()} == {L: 400, L // 2: 400, L // 8: 400}
    by_hand = [run.losses(run.tokens[None, : L + 1].astype(np.int32))[0]]
    for start in range(L // 2, 400 - L + 1, L // 2):
        by_hand.append(run.losses(run.tokens[None, start : start + L + 1].astype(np.int32))[0, L // 2 :])
    np.testing.assert_allclose(rows[L // 2][1], np.concatenate(by_hand).mean(), rtol=1e-5)
    local = make_run(LOCAL | dict(rotation=dict(name="none")))
    table = columns(ANALYSES["positions"](local), "tokens before, from", "nats")
    assert [first for first, _ in table] == list(range(1, L + 1))


def test_perturbing_what_a_window_cannot_see_changes_nothing(make_run, monkeypatch):
    """Twelve tokens before the targets; a window of 4 sees none but the last three of them."""
    monkeypatch.setattr(perturbation, "STEPS", 4)
    table = ANALYSES["perturbation"](make_run(LOCAL | dict(rotation=dict(name="none"))))
    for name, n, change in columns(table, "perturbation", "first tokens perturbed", "change in nats"):
        assert (abs(change) < 1e-6) == (n <= 9), (name, n, change)
    dense = ANALYSES["perturbation"](make_run(dict(rotation=dict(name="rotary"))))
    assert all(abs(change) > 1e-6 for n, change in columns(dense, "first tokens perturbed", "change in nats") if n > 1)


def test_the_receptive_field_is_the_window(make_run):
    for first, last, share, reached in columns(
        ANALYSES["receptive_field"](make_run(LOCAL | dict(rotation=dict(name="none")))), "distance from", "to", "share", "reached"
    ):
        assert (reached == 1.0) == (last <= 3) and (share > 0) == (first <= 3)


def test_extrapolation_of_rotary_and_of_learned_positions(make_run, monkeypatch):
    monkeypatch.setattr(extrapolation, "LONGEST", 4)
    run = make_run(dict(rotation=dict(name="rotary")))
    rows = {(m, t): (tokens, nats) for m, t, tokens, nats in columns(
        ANALYSES["extrapolation"](run), "positions", "times trained", "tokens", "nats")}  # fmt: skip
    assert {name for name, _ in rows} == {"as trained", "linear (PI)", "NTK", "YaRN"} and {t for _, t in rows} == {1, 2, 4}
    assert len({tokens for tokens, _ in rows.values()}) == 1
    for name in ("linear (PI)", "NTK", "YaRN"):
        np.testing.assert_allclose(rows[name, 1][1], rows["as trained", 1][1], rtol=1e-5)
        assert abs(rows[name, 4][1] - rows["as trained", 4][1]) > 1e-5
    learned = ANALYSES["extrapolation"](
        make_run(dict(rotation=dict(name="none")), positions=dict(name="learned", stddev=0.02, per_layer=False))
    )
    assert columns(learned, "times trained") == [(1,)] and any("longer than the table" in note for note in learned.notes)


def test_attention_weights_and_what_they_are_called(make_run):
    run = make_run(dict(rotation=dict(name="rotary")))
    (weights,) = attention_weights(run, run.windows(L, count=3)[:, :-1]).values()
    assert weights.shape == (3, 2, L, L)
    np.testing.assert_allclose(weights.sum(axis=-1), 1, atol=1e-5)
    assert not np.any(np.triu(weights, k=1)) and columns(ANALYSES["attention"](run), "layer.head") == [("0.0",), ("0.1",)]
    eye, first = np.eye(L)[None], np.zeros((1, L, L))
    first[:, :, 0] = 1
    spread = np.tril(np.ones((L, L)))[None] / np.arange(1, L + 1)[None, :, None]
    names = [_classify(maps)[0] for maps in (eye, np.roll(eye, 1, axis=1), first, spread)]
    assert names == ["self", "previous", "first", "spread"]


def test_a_table_is_written_as_json_markdown_and_plot(tmp_path):
    table = Table(
        "Title", ("length", "method", "nats"), [(1, "a", 2.0), (2, "a", 1.5), (1, "b", 3.0)], ("length", ("nats",)), "method"
    )
    table.write(tmp_path / "analysis" / "name", {"step": 3})
    stored = json.loads((tmp_path / "analysis" / "name.json").read_text())
    assert stored["step"] == 3 and stored["rows"][1] == {"length": 2, "method": "a", "nats": 1.5}
    assert "| 2 | a | 1.5 |" in (tmp_path / "analysis" / "name.md").read_text()
    assert (tmp_path / "analysis" / "name.png").stat().st_size > 1000
    assert not (tmp_path / "analysis" / "name_maps.png").exists()
    dataclasses.replace(table, maps={"0.0": np.eye(4)}).write(tmp_path / "maps", {})
    assert (tmp_path / "maps_maps.png").stat().st_size > 1000
    lines = table.figure().axes[0].lines
    assert [list(line.get_ydata()) for line in lines] == [[2.0, 1.5], [3.0]]


def test_seeds_are_told_apart_in_rows_and_drawn_as_a_mean_with_a_range():
    one = Table("Title", ("length", "nats"), [(1, 2.0), (2, 1.0)], ("length", ("nats",)), notes=("a",))
    both = over_seeds({3: one, 4: dataclasses.replace(one, rows=[(1, 3.0), (2, 1.0)])})
    assert both.columns == ("seed", "length", "nats") and both.rows[2] == (4, 1, 3.0) and both.notes == ("a",)
    axes = both.figure().axes[0]
    assert list(axes.lines[0].get_ydata()) == [2.5, 1.0] and len(axes.collections) == 1
    assert over_seeds({3: one}) is one and not one.figure().axes[0].collections


def test_fine_tuning_lowers_the_loss_at_the_longer_context(make_run, monkeypatch):
    """On text that repeats, so that a few steps teach something; what is not rotary is refused."""
    monkeypatch.setattr(fine_tuning, "LONGEST", 4)
    for module in (extrapolation, fine_tuning):
        monkeypatch.setattr(module, "SCALINGS", {"YaRN": extrapolation.SCALINGS["YaRN"]})
    run = make_run(dict(rotation=dict(name="rotary")))
    run.plan.task.prepare()
    before = {n: nats for p, n, nats in columns(extrapolation.extrapolation(run), "positions", "length", "nats") if p == "YaRN"}
    rows = columns(fine_tuning.fine_tuning(run), "positions", "length", "tokens", "nats")
    after = {length: nats for name, length, _, nats in rows if name == "YaRN"}
    assert list(after) == [L, 2 * L, 4 * L] and after[4 * L] < before[4 * L] - 0.01
    with pytest.raises(AnalysisError, match="rescales rotary positions"):
        fine_tuning.fine_tuning(make_run(dict(rotation=dict(name="none"))))
