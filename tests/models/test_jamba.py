"""Jamba: Hugging Face's arrays layer by layer, the published size, and the small recipe padded, decoded and trained."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import lm_jamba
from efficient_attn import models
from efficient_attn.mixers import Context
from efficient_attn.plan import make_plan, num_parameters

pytestmark = pytest.mark.usefixtures("quick_compile")

ROOT = pathlib.Path(__file__).parents[2]
TOLERANCE = 1e-4  # the oracle folder's own, for another float32 implementation


def layer_parameters(w, prefix, hyper) -> dict:
    """The weights of one layer under our names, our way round; torch's are (out, in)."""

    def kernel(name):
        return dict(kernel=w[f"{prefix}.{name}.weight"].T)

    def scale(name):
        return dict(scale=w[f"{prefix}.{name}.weight"])

    ours = dict(norm_mixer=scale("input_layernorm"), norm_mlp=scale("pre_ff_layernorm"))
    projections = dict(gate="gate_proj", up="up_proj", down="down_proj")
    if f"{prefix}.feed_forward.router.weight" in w:
        experts = [f"feed_forward.experts.{e}." for e in range(hyper["num_experts"])]
        ours["mlp"] = {k: dict(kernel=jnp.stack([kernel(e + p)["kernel"] for e in experts])) for k, p in projections.items()}
        ours["mlp"]["router"] = kernel("feed_forward.router")
    else:
        ours["mlp"] = {k: kernel(f"feed_forward.{p}") for k, p in projections.items()}
    if f"{prefix}.self_attn.q_proj.weight" in w:
        head_dim = hyper["hidden_size"] // hyper["num_attention_heads"]
        names = dict(query="q_proj", key="k_proj", value="v_proj")
        heads = {k: kernel(f"self_attn.{n}")["kernel"].reshape(hyper["hidden_size"], -1, head_dim) for k, n in names.items()}
        out = kernel("self_attn.o_proj")["kernel"].reshape(-1, head_dim, hyper["hidden_size"])
        return ours | dict(mixer={k: dict(kernel=x) for k, x in (heads | dict(out=out)).items()})
    conv = w[f"{prefix}.mamba.conv1d.weight"][:, 0].T
    s6 = dict(
        conv=dict(kernel=conv, bias=w[f"{prefix}.mamba.conv1d.bias"]),
        x_proj=kernel("mamba.x_proj"),
        dt_proj=kernel("mamba.dt_proj"),
        dt_bias=w[f"{prefix}.mamba.dt_proj.bias"],
        A_log=w[f"{prefix}.mamba.A_log"],
        D=w[f"{prefix}.mamba.D"],
        dt_norm=scale("mamba.dt_layernorm"),
        B_norm=scale("mamba.b_layernorm"),
        C_norm=scale("mamba.c_layernorm"),
    )
    return ours | dict(mixer=dict(in_proj=kernel("mamba.in_proj"), forward=s6, out_proj=kernel("mamba.out_proj")))


def oracle_model(hyper, length) -> models.LanguageModel:
    """The model that the oracle's hyper-parameters describe, from the dicts of the recipe."""
    attention = dict(
        name="softmax", num_heads=hyper["num_attention_heads"], num_kv_heads=hyper["num_key_value_heads"], use_bias=False
    )
    mamba = dict(
        name="mamba", inner_norm=True, state_dim=hyper["mamba_d_state"], conv_width=hyper["mamba_d_conv"],
        expand=hyper["mamba_expand"], dt_rank=hyper["mamba_dt_rank"], use_conv_bias=hyper["mamba_conv_bias"],
        use_bias=hyper["mamba_proj_bias"],
    )  # fmt: skip
    mixture = dict(name="top_k", num_experts=hyper["num_experts"], k=hyper["num_experts_per_tok"], renormalise=False)
    layers = range(hyper["num_hidden_layers"])

    def every(period, offset, there, elsewhere):
        return tuple(there if i % hyper[period] == hyper[offset] else elsewhere for i in layers)

    causal = dict(causal=True)
    return models.LanguageModel(
        vocab_size=hyper["vocab_size"],
        num_outputs=hyper["vocab_size"],
        length=length,
        depth=len(layers),
        width=hyper["hidden_size"],
        mixer=every("attn_layer_period", "attn_layer_offset", attention | causal, mamba | causal),
        experts=every("expert_layer_period", "expert_layer_offset", mixture, dict(name="none")),
        feed_forward="swiglu",
        feed_forward_width=hyper["intermediate_size"],
        use_bias=False,
        norm="rms",
    )


def test_every_layer_equals_the_oracle(oracle_dir):
    stated = json.loads((oracle_dir / "jamba_model_4layer.json").read_text())
    hyper = stated["hyper"]
    assert hyper["hidden_act"] == "silu" and hyper["rms_norm_eps"] == 1e-6 and hyper["sliding_window"] is None
    w = {name: jnp.asarray(x) for name, x in np.load(oracle_dir / "jamba_model_4layer.npz").items()}
    model = oracle_model(hyper, w["in.ids"].shape[1])
    params = {f"layer_{i}": layer_parameters(w, f"w.layers.{i}", hyper) for i in range(hyper["num_hidden_layers"])}
    params |= dict(embed=dict(embedding=w["w.embed_tokens.weight"]), norm=dict(scale=w["w.final_layernorm.weight"]))
    params["head"] = dict(kernel=jnp.zeros((hyper["hidden_size"], hyper["vocab_size"])))
    expected = jax.eval_shape(lambda: model.init(jax.random.key(0), w["in.ids"], Context()))["params"]
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda s: s.shape, expected)

    capture = dict(capture_intermediates=True, mutable=["intermediates"])
    _, told = jax.jit(lambda p: model.apply({"params": p}, w["in.ids"], Context(), **capture))(params)
    told = told["intermediates"]

    def check(module, name):
        np.testing.assert_allclose(module["__call__"][0].reshape(w[name].shape), w[name], rtol=0, atol=TOLERANCE, err_msg=name)

    before, mixtures = told["embed"], 0
    for i in range(hyper["num_hidden_layers"]):
        layer = told[f"layer_{i}"]
        check(before, f"aux.layer{i}.in")
        check(layer["norm_mlp"], f"aux.layer{i}.ff_in")
        check(layer["mlp"], f"aux.layer{i}.ff_out")
        check(layer, f"aux.layer{i}.out")
        if "router" in layer["mlp"]:
            check(layer["mlp"]["router"], f"aux.router_logits{mixtures}")
            mixtures += 1
        before = layer
    assert stated["experts_per_layer"].count(hyper["num_experts"]) == mixtures > 0
    check(told["norm"], "out.y")


def test_the_published_shape_has_the_published_size():
    """Counted by hand from Jamba-v0.1's weights: width 4096, inner width 8192, 16 states, rank 256, kernel 4."""
    E, inner, N, rank, V, hidden = 4096, 8192, 16, 256, 65536, 14336
    mamba = E * 2 * inner + (4 + 1) * inner + inner * (rank + 2 * N) + (rank + 1) * inner + inner * N + inner + inner * E
    mamba += rank + 2 * N  # the norms of dt, B and C
    attention = E * (32 + 2 * 8) * 128 + 32 * 128 * E
    network = 3 * E * hidden
    layers = 28 * mamba + 4 * attention + 16 * network + 16 * (E * 16 + 16 * network) + 32 * 2 * E
    total = 2 * V * E + layers + E  # token vectors and output layer are not tied
    plan = make_plan(lm_jamba.get_config("jamba_52b"))
    assert num_parameters(plan) == total == 51_570_323_328
    active = total - 16 * (16 - 2) * network
    assert active == 12_110_311_296
    assert f"{total:,}" in lm_jamba.__doc__ and f"{active:,}" in lm_jamba.__doc__


@pytest.fixture(scope="module")
def small():
    """The small recipe's model, narrower, up to its attention layer; parameters moved off their initial values."""
    config = lm_jamba.get_config("small")
    config.model.width, config.model.feed_forward_width, config.model.depth, config.task.context = 16, 24, 5, 12
    plan = make_plan(config)
    tokens = jnp.asarray(np.random.default_rng(0).integers(1, 256, (2, 12)), jnp.int32)
    params = jax.jit(lambda: plan.model.init(jax.random.key(0), tokens, Context()))()["params"]
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda p: p + 0.1 * rng.standard_normal(p.shape).astype(np.float32), params)
    return plan.model, {"params": params}, tokens


def test_padding_changes_nothing(small):
    """At the front of a row, where causality does not hide it."""
    model, variables, tokens = small
    mask = jnp.arange(12)[None, :] >= jnp.array([[0], [5]])
    apply = jax.jit(lambda x, mask: model.apply(variables, x, Context(mask=mask)))
    y, z = apply(tokens, mask), apply(tokens.at[1, :5].set(9), mask)
    np.testing.assert_array_equal(y[0], z[0])
    np.testing.assert_allclose(y[1, 5:], z[1, 5:], rtol=0, atol=1e-5)
    np.testing.assert_allclose(y[1, 5:], apply(tokens[1:, 5:], None)[0], rtol=0, atol=1e-5)
    assert np.max(np.abs(y[1, 5:] - apply(tokens, None)[1, 5:])) > 1e-2


def test_decoding_equals_the_parallel_form(small):
    """Token by token, then by chunks."""
    model, variables, tokens = small
    parallel = jax.jit(lambda: model.apply(variables, tokens, Context()))()
    cache = jax.jit(lambda: model.init(jax.random.key(0), tokens, Context(decode=True)))()["cache"]
    step = jax.jit(lambda cache, x: model.apply({**variables, "cache": cache}, x, Context(decode=True), mutable=["cache"]))
    outputs = []
    for part in jnp.split(tokens, (1, 2, 3, 4, 8), axis=1):
        y, updated = step(cache, part)
        cache = updated["cache"]
        outputs.append(y)
    np.testing.assert_allclose(jnp.concatenate(outputs, axis=1), parallel, rtol=0, atol=2e-5)


def test_the_small_recipe_trains(tmp_path):
    """Three steps on the default text, from the command line, up to the attention layer."""
    task = dict(context=32, data_dir=tmp_path / "data")
    train = dict(batch_size=4, duration="3 steps", log_every=1, max_eval_batches=1, tensorboard=False)
    overrides = [f"--config.task.{k}={v}" for k, v in task.items()] + [f"--config.train.{k}={v}" for k, v in train.items()]
    overrides += ["--config.model.depth=5", f"--workdir={tmp_path / 'run'}"]
    command = [sys.executable, "train.py", "--config=configs/lm_jamba.py:small", *overrides]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(0.002 <= row["train_aux_loss"] < 0.003 for row in rows)  # 0.001 times 1 or a little more, in two layers
    assert abs(rows[-1]["valid_loss"] - np.log(256)) < 1
