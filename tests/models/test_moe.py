"""Mixtures of experts: against Hugging Face's arrays and a loop over experts; padding, rows, order, losses, configuration."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from efficient_attn import models
from efficient_attn.arguments import ConfigError
from efficient_attn.config import experiment
from efficient_attn.mixers import Context
from efficient_attn.models.feed_forward import FeedForward
from efficient_attn.models.moe import MixtureOfExperts, Switch, TopK, balance_loss, dispatch_limited, routing, z_loss
from efficient_attn.plan import make_plan
from efficient_attn.steps import init_state, train_step
from efficient_attn.tasks.synthetic import MultiQueryRecall

pytestmark = pytest.mark.usefixtures("quick_compile")

TOLERANCE = 1e-4  # the oracle folder's own, for another float32 implementation
B, L, E, WIDTH = 2, 13, 6, 10
FORMS = {
    "top_2": TopK(num_experts=4, k=2),
    "top_2_limited": TopK(num_experts=4, k=2, renormalise=False, capacity_factor=0.7),
    "switch": Switch(num_experts=4, capacity_factor=0.8),
}
forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def load(oracle_dir, case):
    stated = json.loads((oracle_dir / f"{case}.json").read_text())
    return stated, {name: jnp.asarray(x) for name, x in np.load(oracle_dir / f"{case}.npz").items()}


def stacked(arrays, pattern, num_experts):
    """Torch's (out, in) weights of all experts as one kernel [X, in, out]."""
    return dict(kernel=jnp.stack([arrays[pattern.format(e)].T for e in range(num_experts)]))


def routed(form, params, x, mask):
    """Each token's experts, and whether there was room left: 1 or 0 [B, L, k], by a loop over tokens."""
    chosen = np.array(jax.lax.top_k(x @ params["router"]["kernel"], form.k)[1])
    room = np.zeros(chosen.shape)
    limit = np.ceil(form.k * x.shape[1] / form.num_experts * form.capacity_factor) if form.capacity_factor else np.inf
    for row in range(x.shape[0]):
        taken = np.zeros(form.num_experts)
        for t, slot in np.ndindex(*chosen.shape[1:]):
            room[row, t, slot] = mask[row, t] and taken[chosen[row, t, slot]] < limit
            taken[chosen[row, t, slot]] += mask[row, t]
    return chosen, room


def reference(form, params, x, chosen, room):
    """Every expert on every token, weighted 0 where it was not chosen or had no room."""
    weights = jnp.take_along_axis(jax.nn.softmax(x @ params["router"]["kernel"]), chosen, axis=-1)
    if form.renormalise:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    y = jnp.zeros_like(x)
    for e in range(form.num_experts):
        expert = jax.tree.map(lambda p: p[e], {name: params[name] for name in ("gate", "up", "down")})  # noqa: B023
        out = FeedForward(WIDTH, "swiglu", dtype=x.dtype).apply({"params": expert}, x, Context())
        y = y + jnp.sum(weights * room * (chosen == e), axis=-1)[..., None] * out
    return y


def make(form, dtype=jnp.float32, **fields):
    module = MixtureOfExperts(form, WIDTH, "swiglu", dtype=dtype, **fields)
    x = jax.random.normal(jax.random.key(0), (B, L, E), dtype)
    params = jax.jit(module.init)(jax.random.key(1), x, Context())["params"]
    rng = np.random.default_rng(2)
    params = jax.tree.map(lambda p: jnp.asarray(p + 0.3 * rng.standard_normal(p.shape), dtype), params)
    return module, {"params": params}, x


def apply(module, variables, x, ctx=None, **options):
    """The output, the losses and what is told of the routing."""
    applied = jax.jit(lambda v, x, c: module.apply(v, x, c, mutable=["losses", "intermediates"], **options))
    y, told = applied(variables, x, ctx or Context())
    return y, *({k: v[0] for k, v in told[name].items()} for name in ("losses", "intermediates"))


def test_mixtral(oracle_dir):
    stated, arrays = load(oracle_dir, "moe_mixtral_top2")
    assert "renormalised to sum 1" in stated["semantics"][0] and "uniform routing gives top_k" in stated["semantics"][1]
    x, k = arrays["in.x"], 2
    num_experts = arrays["w.gate.weight"].shape[0]
    names = {"gate": "w1", "down": "w2", "up": "w3"}
    params = {ours: stacked(arrays, f"w.experts.{{}}.{w}.weight", num_experts) for ours, w in names.items()}
    params["router"] = {"kernel": arrays["w.gate.weight"].T}
    form = TopK(num_experts=num_experts, k=k, renormalise=True, balance_weight=1.0)
    module = MixtureOfExperts(form, arrays["w.experts.0.w1.weight"].shape[0], "swiglu", use_bias=False)
    y, losses, _ = apply(module, {"params": params}, x)
    np.testing.assert_allclose(y, arrays["out.y"], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(k * losses["balance"], arrays["out.aux_loss"], rtol=0, atol=TOLERANCE)
    logits = (x @ params["router"]["kernel"]).reshape(-1, num_experts)
    np.testing.assert_allclose(logits, arrays["out.router_logits"], rtol=0, atol=TOLERANCE)


def test_switch(oracle_dir):
    stated, arrays = load(oracle_dir, "moe_switch_top1_capacity")
    hyper, x = stated["hyper"], arrays["in.x"]
    X, C = hyper["experts"], hyper["capacity"]
    assert x.shape[1] == hyper["tokens_per_group"] and "groups are batch rows" in stated["semantics"][0]
    assert "counts a dropped token as expert 0" in stated["semantics"][2]
    names = {"up": "wi", "down": "wo"}
    params = {ours: stacked(arrays, f"w.experts.expert_{{}}.{w}.weight", X) for ours, w in names.items()}
    params["router"] = {"kernel": arrays["w.router.classifier.weight"].T}
    form = Switch(num_experts=X, capacity_factor=C * X / x.shape[1], z_weight=1.0)
    module = MixtureOfExperts(form, params["up"]["kernel"].shape[-1], "relu", use_bias=False)
    y, losses, told = apply(module, {"params": params}, x)
    np.testing.assert_allclose(y, arrays["out.y"], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(losses["z"], arrays["out.z_loss"], rtol=1e-5, atol=TOLERANCE)
    np.testing.assert_allclose(told["dropped"], stated["tokens_dropped"] / x[..., 0].size, atol=1e-6)

    logits = x @ params["router"]["kernel"]
    probabilities, real = jax.nn.softmax(logits), jnp.ones(x.shape[:2], bool)
    chosen = jnp.argmax(logits, axis=-1)[..., None]
    dispatch = dispatch_limited(chosen, real, X, form.capacity_factor)
    kept = ~dispatch.is_dropped(real)
    np.testing.assert_array_equal((jax.nn.one_hot(chosen, X) * kept[..., None])[:, :, 0], arrays["out.dispatch_mask"])
    counted = jnp.where(kept, chosen, 0)  # the oracle's way of counting, group by group
    rows = [balance_loss(*(a[i : i + 1] for a in (probabilities, counted, real))) for i in range(x.shape[0])]
    np.testing.assert_allclose(np.mean(rows), arrays["out.aux_loss"], rtol=0, atol=TOLERANCE)


@forms
def test_equals_every_expert_on_every_token(form):
    """In float64, with all gradients, and padding in the middle of a row."""
    with jax.enable_x64(True):
        module, variables, x = make(form, jnp.float64)
        mask = jnp.ones((B, L), bool).at[0, 3:6].set(False).at[1, 9:].set(False)
        weights = jax.random.normal(jax.random.key(3), x.shape) * mask[..., None]

        chosen, room = routed(form, variables["params"], x, mask)

        def both(f):
            y, pullback = jax.vjp(f, variables, x)
            return y, *pullback(weights)

        ours = jax.jit(lambda: both(lambda v, x: module.apply(v, x, Context(mask=mask))))()
        theirs = jax.jit(lambda: both(lambda v, x: reference(form, v["params"], x, chosen, room)))()
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-10), ours, theirs)
        dropped = apply(module, variables, x, Context(mask=mask))[2]["dropped"]
        assert (dropped > 0) == (form.capacity_factor > 0)


@forms
def test_padding_takes_no_capacity_and_enters_no_loss(form):
    module, variables, x = make(form)
    mask = jnp.arange(L)[None, :] >= jnp.array([[0], [5]])  # at the front, where it would take the first places
    y, losses, told = apply(module, variables, x, Context(mask=mask))
    z, *same = apply(module, variables, x.at[1, :5].set(100.0), Context(mask=mask))
    np.testing.assert_array_equal(y, z)
    jax.tree.map(np.testing.assert_array_equal, [losses, told], same)
    np.testing.assert_array_equal(y[1, :5], 0.0)
    assert losses["balance"] != apply(module, variables, x)[1]["balance"]


def test_without_capacity_padding_changes_nothing_else():
    module, variables, x = make(FORMS["top_2"])
    mask = jnp.arange(L)[None, :] < jnp.array([[9], [9]])
    y, losses, told = apply(module, variables, x, Context(mask=mask))
    short, *same = apply(module, variables, x[:, :9])
    np.testing.assert_allclose(y[:, :9], short, rtol=0, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), [losses, told], same)


@forms
def test_neither_other_rows_nor_later_tokens_matter(form):
    module, variables, x = make(form)
    y, *_ = apply(module, variables, x)
    other, *_ = apply(module, variables, x.at[0].set(-x[0]).at[1, 8:].set(3.0))
    np.testing.assert_allclose(y[1, :8], other[1, :8], rtol=0, atol=1e-6)
    assert np.any(y[1, 8:] != other[1, 8:]) and np.any(y[0] != other[0])


def test_tokens_past_the_capacity_are_dropped_in_order():
    module, variables, x = make(Switch(num_experts=2, capacity_factor=0.5))
    variables["params"]["router"]["kernel"] = jnp.zeros((E, 2)).at[:, 1].set(1.0)
    y, _, told = apply(module, variables, jnp.abs(x))  # all tokens prefer expert 1, which takes ceil(13 / 2 * 0.5) = 4
    assert np.all(np.any(y[:, :4] != 0, axis=-1)) and np.all(y[:, 4:] == 0)
    np.testing.assert_allclose(told["load"], [0, 1])
    np.testing.assert_allclose(told["dropped"], 9 / 13, rtol=1e-6)


def test_losses_of_even_and_uneven_routing():
    real = jnp.ones((1, 8), bool)
    chosen = jnp.stack([jnp.arange(8) % 4, (jnp.arange(8) + 1) % 4], axis=-1)[None]
    np.testing.assert_allclose(balance_loss(jnp.full((1, 8, 4), 0.25), chosen, real), 1.0, rtol=1e-6)
    to_two = jnp.broadcast_to(jnp.array([0.5, 0.5, 0.0, 0.0]), (1, 8, 4))
    np.testing.assert_allclose(balance_loss(to_two, chosen % 2, real), 2.0, rtol=1e-6)  # X / k
    np.testing.assert_allclose(z_loss(jnp.zeros((1, 8, 4)), real), np.log(4) ** 2, rtol=1e-6)


def test_jitter_only_while_training():
    module, variables, x = make(TopK(num_experts=4, k=2, jitter=0.5))
    plain, *_ = apply(module, variables, x)
    key = {"dropout": jax.random.key(0)}
    np.testing.assert_array_equal(plain, apply(module, variables, x, rngs=key)[0])
    assert np.any(plain != apply(module, variables, x, Context(train=True), rngs=key)[0])


def test_router_is_float32_in_bfloat16_models():
    """Logits 1 and 1 + 2^-9 of two experts: equal in bfloat16."""
    module = MixtureOfExperts(TopK(num_experts=2, k=1, renormalise=False), WIDTH, dtype=jnp.bfloat16)
    x = jnp.ones((1, 3, E), jnp.bfloat16)
    params = jax.jit(module.init)(jax.random.key(0), x, Context())["params"]
    params["router"]["kernel"] = jnp.zeros((E, 2)).at[0].set(jnp.array([1.0, 1.0 + 2**-9]))
    y, _, told = apply(module, {"params": params}, x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(told["load"], [0, 1])


TASK = MultiQueryRecall(length=24, vocab_size=32, num_pairs=3)
MIXTURE = dict(name="top_k", num_experts=4, k=2, z_weight=0.001)
MODEL = dict(
    depth=2, width=8, mixer=dict(name="identity", causal=True), feed_forward_width=16, feed_forward="swiglu",
    experts=(dict(name="none"), MIXTURE),
)  # fmt: skip


def test_experts_are_cycled_over_depth():
    model = models.build(MODEL | dict(depth=3, use_bias=False), TASK)
    inputs = jnp.zeros((1, 24), jnp.int32)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), inputs, Context()))["params"]
    shapes = [params[f"layer_{i}"]["mlp"]["up"]["kernel"].shape for i in range(3)]
    assert shapes == [(8, 16), (4, 8, 16), (8, 16)]
    assert params["layer_1"]["mlp"]["router"]["kernel"].shape == (8, 4)
    assert not any("bias" in layer["mlp"]["down"] for name, layer in params.items() if name.startswith("layer"))
    assert "bias" not in params["head"]


@pytest.mark.parametrize("remat", ["none", "full"])
def test_losses_reach_the_train_step(remat):
    model = models.build(MODEL | dict(remat=remat), TASK)
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, 32, (4, 24)), jnp.int32)
    batch = dict(inputs=tokens, targets=tokens, mask=jnp.ones((4, 24), bool), weights=jnp.zeros((4, 24)))
    tx = optax.sgd(1.0)
    state = jax.jit(lambda: init_state(model, tx, 0, batch, ema=False))()
    after, sums = jax.jit(lambda s, b: train_step(model, tx, s, b))(state, batch)
    _, told = jax.jit(lambda v: model.apply(v, tokens, Context(), mutable=["losses"]))({"params": state.params})
    sown = [float(x) for x in jax.tree.leaves(told)]
    assert len(sown) == 2
    np.testing.assert_allclose(sums["aux_loss"][0], sum(sown), rtol=1e-5)
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), state.params, after.params)  # no target weighs anything
    assert moved["layer_1"]["mlp"]["router"]["kernel"] and not moved["layer_1"]["mlp"]["up"]["kernel"]


def config(**model):
    recipe = dict(model={**MODEL, **model}, train=dict(batch_size=4, duration="3 steps"))
    task = dict(name="multi_query_recall", length=24, vocab_size=32, num_pairs=3)
    return experiment(name="small", task=task, recipes={"a": recipe}, recipe="a")


def test_configuration_is_completed_and_overridden():
    completed = config()
    assert [e["name"] for e in completed.model.experts] == ["none", "top_k"]
    assert set(completed.model.experts[1]) == {"name"} | set(TopK.__dataclass_fields__)
    completed = config(experts=MIXTURE)
    completed.model.experts.num_experts = 3
    shape = make_plan(completed).state.params["layer_0"]["mlp"]["up"]["kernel"].shape
    assert shape == (3, 8, 16)
    published = routing(dict(name="switch"))
    assert (published.k, published.capacity_factor, published.jitter, published.balance_weight) == (1, 1.25, 0.01, 0.01)


@pytest.mark.parametrize(
    "model, message",
    [
        (dict(experts=dict(name="topk")), r"model.experts.name='topk' is unknown \(did you mean 'top_k'\?\)"),
        (dict(experts=dict(name="top_k", experts=4)), r"model.experts has no argument 'experts'"),
        (dict(experts=dict(name="none", k=2)), r"model.experts has no argument 'k'"),
        (dict(experts="top_k"), r"model.experts must be dict\(name=..."),
        (dict(experts=()), r"model.experts must be a dict\(name=...\) or a tuple of such dicts"),
        (dict(experts=MIXTURE | dict(k=5)), r"model.experts.k=5 must be between 1 and num_experts=4"),
        (dict(experts=MIXTURE | dict(k=1)), r"k=1 with renormalise=True .* the router learns nothing"),
        (dict(experts=MIXTURE | dict(capacity_factor=-1.0)), r"model.experts.capacity_factor=-1.0 must be at least 0"),
        (dict(experts=MIXTURE | dict(jitter=1.0)), r"model.experts.jitter=1.0 must be at least 0 and less than 1"),
        (dict(feed_forward_width=0), r"model.experts makes mixtures .* set model.feed_forward_width"),
    ],
)
def test_wrong_configurations_are_errors_before_compiling(model, message):
    with pytest.raises(ConfigError, match=message):
        make_plan(config(**model))
