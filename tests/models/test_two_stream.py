"""Two-stream attention: the published model's numbers, and who sees whom."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_attn.models.two_stream import PermutationLM, draw_order

pytestmark = pytest.mark.usefixtures("quick_compile")


def test_against_the_published_model(oracle_dir):
    """The query stream at three targets; there tokens are scored by an untied layer that the arrays do not have."""
    a = np.load(oracle_dir / "xlnet_two_stream.npz")
    hyper = json.loads((oracle_dir / "xlnet_two_stream.json").read_text())["hyper"]
    E, H, D = hyper["d_model"], hyper["n_head"], hyper["d_head"]
    model = PermutationLM(hyper["vocab_size"], hyper["n_layer"], E, H, hyper["d_inner"], head_dim=D)
    embedding = a["w.word_embedding.weight"]
    params = {"embed": {"embedding": embedding}, "query": a["w.mask_emb"][0, 0], "bias": np.zeros(len(embedding))}
    for i in range(hyper["n_layer"]):
        w = {key.removeprefix(f"w.layer.{i}."): a[key] for key in a.files if key.startswith(f"w.layer.{i}.")}
        kernels = {name: {"kernel": w[f"rel_attn.{name[0]}"]} for name in ("query", "key", "value")}
        terms = {"u": w["rel_attn.r_w_bias"], "v": w["rel_attn.r_r_bias"], "W_R": w["rel_attn.r"]}
        out = {"kernel": np.moveaxis(w["rel_attn.o"], 0, -1)}
        params[f"layer_{i}_mixer"] = {**kernels, "out": out, "position_bias": terms}
        params[f"layer_{i}_mlp"] = {
            name: {"kernel": w[f"ff.layer_{n}.weight"].T, "bias": w[f"ff.layer_{n}.bias"]} for n, name in ((1, "up"), (2, "down"))
        }
        for name, source in (("mixer", "rel_attn"), ("mlp", "ff")):
            norm = {"scale": w[f"{source}.layer_norm.weight"], "bias": w[f"{source}.layer_norm.bias"]}
            params[f"layer_{i}_norm_{name}"] = norm
    rank, targets = np.argsort(a["in.perm"])[None], a["in.target_mapping"].argmax(axis=-1)
    seen = rank[:, :, None] > rank[:, None, :]
    np.testing.assert_array_equal(~seen, a["in.perm_mask"] == 1)
    params, inputs, rank, targets = jax.tree.map(jnp.asarray, (params, a["in.ids"], rank, targets))
    logits = jax.jit(model.apply)({"params": params}, inputs, rank, targets)
    np.testing.assert_allclose(logits, a["out.query_stream"] @ embedding.T, atol=1e-5)


def test_a_target_is_predicted_from_what_comes_before_it_and_not_from_itself():
    L = 7
    model = PermutationLM(vocab_size=11, depth=2, width=8, num_heads=2, feed_forward_width=16)
    rank, targets = draw_order(jax.random.key(3), batch=L + 1, length=L, num_targets=3)
    assert all(sorted(row) == list(range(L)) for row in rank.tolist()) and len({tuple(row) for row in rank.tolist()}) > L // 2
    np.testing.assert_array_equal(jnp.take_along_axis(rank, targets, axis=1), [[4, 5, 6]] * (L + 1))
    rank, targets = (jnp.broadcast_to(x[:1], x.shape) for x in (rank, targets))
    inputs = jnp.broadcast_to(jnp.arange(L), (L + 1, L)).at[jnp.arange(L), jnp.arange(L)].set(10)  # row j: token j is another
    apply, everything = jax.jit(model.apply), jnp.ones((L + 1, L), bool)
    params = jax.jit(model.init)(jax.random.key(0), inputs, rank, targets)
    params = jax.tree.map(lambda p: p + jnp.sin(jnp.arange(p.size, dtype=p.dtype)).reshape(p.shape), params)
    logits = apply(params, inputs, rank, targets, everything)
    changed = np.abs(logits[:L] - logits[L:]).max(axis=-1) > 1e-5
    np.testing.assert_array_equal(changed, rank[0][:, None] < jnp.array([4, 5, 6])[None])
    logits = apply(params, inputs, rank, targets, everything.at[:, 0].set(False))
    assert np.array_equal(logits[0], logits[L]) and not np.array_equal(logits[1], logits[L]), "what is masked is seen by nobody"
