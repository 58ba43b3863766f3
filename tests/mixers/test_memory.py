"""Memory from segment to segment: against independent implementations, and what must hold of any memory."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from efficient_attn.mixers import Context, build, infinite_former
from efficient_attn.models.decoder import LanguageModel
from efficient_attn.steps import MEMORY, TrainState, empty_memory, eval_step, train_step

pytestmark = pytest.mark.usefixtures("quick_compile")

V, B, L = 17, 2, 6
MIXERS = {
    "transformer_xl": dict(memory_length=L),
    "ernie_doc": dict(memory_length=L),
    "compressive_transformer": dict(memory_length=L, compressed_length=4, compression_rate=2),
    "infinite_former": dict(memory_length=L, num_basis=8, basis_widths=(0.1,), num_samples=9, sticky=True),
}


def load(oracle_dir, case):
    arrays = {name: jnp.asarray(array) for name, array in np.load(oracle_dir / f"{case}.npz").items()}
    return arrays, json.loads((oracle_dir / f"{case}.json").read_text())["hyper"]


def language_model(name, depth=2, **mixer):
    mixer = dict(name=name, causal=True, num_heads=2) | MIXERS.get(name, {}) | mixer
    return LanguageModel(V, V, L, mixer, depth=depth, width=8, feed_forward_width=8, prenorm=False, final_norm=False)


def batch_of(tokens, segment_ids=None):
    """tokens [B, L + 1]: inputs and the targets after them."""
    full = np.ones(tokens[:, 1:].shape)
    batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "mask": full.astype(bool), "weights": full.astype(np.float32)}
    if segment_ids is not None:
        batch["segment_ids"] = segment_ids
    return {key: jnp.asarray(value) for key, value in batch.items()}


def segments(seed=0, count=3, rows=B):
    """Consecutive segments of one run of tokens for each row."""
    tokens = np.random.default_rng(seed).integers(1, V, (rows, count * L + 1)).astype(np.int32)
    return tokens, [batch_of(tokens[:, i * L : (i + 1) * L + 1]) for i in range(count)]


def parameters(model):
    params = jax.jit(model.init)(jax.random.key(0), jnp.ones((B, L), jnp.int32), Context())["params"]
    keys = iter(jax.random.split(jax.random.key(1), 1000))
    return jax.tree.map(lambda p: p + 0.3 * jax.random.normal(next(keys), p.shape), params)


def run(model, params, batches, memory=None):
    """Logits of each segment, every one continuing the last, and the memory after the last."""
    variables, logits = {} if memory is None else {MEMORY: memory}, []
    apply = jax.jit(lambda v, x, ctx: model.apply(v, x, ctx, mutable=[MEMORY]))
    for batch in batches:
        ctx = Context(segment_ids=batch.get("segment_ids"))
        out, variables = apply({"params": params, **variables}, batch["inputs"], ctx)
        logits.append(out)
    return logits, variables[MEMORY]


def test_transformer_xl_against_two_segments_of_the_published_model(oracle_dir):
    a, hyper = load(oracle_dir, "transformer_xl_two_segments")
    M, depth = hyper["mem_len"], hyper["layers"]
    embedding = a["w.word_emb.emb_layers.0.weight"]
    E = embedding.shape[1]
    H, D = a["w.layers.0.dec_attn.r_w_bias"].shape
    mixer = dict(name="transformer_xl", causal=True, num_heads=H, head_dim=D, use_bias=False, memory_length=M)
    model = LanguageModel(
        len(embedding), E, a["in.ids1"].shape[1], mixer, depth=depth, width=E, feed_forward="relu", prenorm=False,
        feed_forward_width=hyper["d_inner"], final_norm=False, use_bias=True,
    )  # fmt: skip
    params = {"embed": {"embedding": embedding * np.sqrt(E)}, "head": {"kernel": np.eye(E), "bias": np.zeros(E)}}
    for i in range(depth):
        w = {key.removeprefix(f"w.layers.{i}."): value for key, value in a.items() if key.startswith(f"w.layers.{i}.")}
        q, k, v = w["dec_attn.qkv_net.weight"].reshape(3, H, D, E).transpose(0, 3, 1, 2)
        params[f"layer_{i}"] = {
            "mixer": {
                "query": {"kernel": q}, "key": {"kernel": k}, "value": {"kernel": v},
                "out": {"kernel": w["dec_attn.o_net.weight"].T.reshape(H, D, E)},
                "position_bias": {
                    "u": w["dec_attn.r_w_bias"], "v": w["dec_attn.r_r_bias"],
                    "W_R": w["dec_attn.r_net.weight"].T.reshape(E, H, D),
                },
            },
            "mlp": {
                "up": {"kernel": w["pos_ff.CoreNet.0.weight"].T, "bias": w["pos_ff.CoreNet.0.bias"]},
                "down": {"kernel": w["pos_ff.CoreNet.3.weight"].T, "bias": w["pos_ff.CoreNet.3.bias"]},
            },
            "norm_mixer": {"scale": w["dec_attn.layer_norm.weight"], "bias": w["dec_attn.layer_norm.bias"]},
            "norm_mlp": {"scale": w["pos_ff.layer_norm.weight"], "bias": w["pos_ff.layer_norm.bias"]},
        }  # fmt: skip
    # there the first segment attends a memory of zero vectors: states that are there, and zero
    rows = len(a["in.ids1"])
    zeros = {"states": np.zeros((rows, M, E), np.float32), "states_ids": np.ones((rows, M), np.int32)}
    memory = {f"layer_{i}": {"mixer": zeros} for i in range(depth)}
    shapes = jax.eval_shape(model.init, jax.random.key(0), a["in.ids1"], Context())["params"]
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda x: x.shape, shapes)
    variables = {"params": jax.tree.map(jnp.asarray, params), MEMORY: jax.tree.map(jnp.asarray, memory)}
    for number in (1, 2):
        y, updated = model.apply(variables, a[f"in.ids{number}"], Context(), mutable=[MEMORY])
        variables |= updated
        np.testing.assert_allclose(y, a[f"out.y{number}"], atol=1e-4)
        for i in range(depth):
            states = updated[MEMORY][f"layer_{i}"]["mixer"]["states"]
            np.testing.assert_allclose(np.swapaxes(states, 0, 1), a[f"out.mem{number}_{i}"], atol=1e-4)


def test_compressive_transformer_against_a_published_layer(oracle_dir):
    a, hyper = load(oracle_dir, "compressive_transformer_step")
    E = a["in.x"].shape[-1]
    inner = a["w.to_q.weight"].shape[0]
    outputs = []
    for heads in [hyper["heads"]] if "heads" in hyper else [h for h in (1, 2, 4, 8) if inner % h == 0]:
        D = inner // heads
        module = build(
            dict(
                name="compressive_transformer", causal=True, num_heads=heads, head_dim=D, bias=dict(name="none"),
                memory_length=hyper["mem"], compressed_length=hyper["cmem"], compression_rate=hyper["ratio"],
            )
        )  # fmt: skip
        k, v = a["w.to_kv.weight"].reshape(2, heads, D, E).transpose(0, 3, 1, 2)
        zero = np.zeros((heads, D), np.float32)
        params = {
            "query": {"kernel": a["w.to_q.weight"].T.reshape(E, heads, D), "bias": zero},
            "key": {"kernel": k, "bias": zero}, "value": {"kernel": v, "bias": zero},
            "out": {"kernel": a["w.to_out.weight"].T.reshape(heads, D, E), "bias": a["w.to_out.bias"]},
            "compress_kernel": a["w.compress_mem_fn.conv.weight"].transpose(2, 1, 0),
            "compress_bias": a["w.compress_mem_fn.conv.bias"],
        }  # fmt: skip
        full = {
            name: np.ones(a[f"in.{array}"].shape[:2], np.int32) for name, array in (("states", "mem"), ("compressed", "cmem"))
        }
        memory = {"states": a["in.mem"], "compressed": a["in.cmem"]} | {f"{name}_ids": ids for name, ids in full.items()}
        y, new = module.apply(
            {"params": params, MEMORY: jax.tree.map(jnp.asarray, memory)}, a["in.x"], Context(), mutable=[MEMORY]
        )
        outputs.append(np.abs(y - a["out.y"]).max())
        np.testing.assert_allclose(new[MEMORY]["states"], a["out.new_mem"], atol=1e-5)
        np.testing.assert_allclose(new[MEMORY]["compressed"], a["out.new_cmem_expected"], atol=1e-5)
    assert min(outputs) < 1e-4, outputs


def test_continuous_memory_against_scikit_learn_and_quadrature(oracle_dir):
    a, hyper = load(oracle_dir, "continuous_memory_ridge")
    t, centres, variance = (jnp.asarray(x, jnp.float32) for x in (a["in.t"], a["in.rbf_centres"], hyper["rbf_sigma"] ** 2))
    psi = infinite_former.normal_pdf(t[:, None], centres[None], variance)
    fitted = infinite_former.ridge(psi[None], jnp.asarray(a["in.X"])[None], jnp.ones((1, len(t))), hyper["ridge"])
    np.testing.assert_allclose(fitted[0], a["out.B"], atol=1e-4)
    mu, sigma = a["in.mu_sigma"]
    read = infinite_former.normal_pdf(centres, jnp.float32(mu), jnp.float32(sigma**2) + variance) @ fitted[0]
    np.testing.assert_allclose(read, a["out.r"], atol=1e-4)


def test_a_memory_as_long_as_the_past_is_attention_to_all_of_it():
    """The last segment's logits are those of full causal attention; its memory of each layer, that layer's states."""
    tokens, batches = segments()
    model = language_model("transformer_xl", memory_length=3 * L)
    params = parameters(model)
    logits, _ = run(model, params, batches)
    whole = model.apply({"params": params}, jnp.asarray(tokens[:, :-1]), Context())
    np.testing.assert_allclose(jnp.concatenate(logits, axis=1), whole, atol=1e-4)
    short, _ = run(language_model("transformer_xl"), params, batches)
    assert np.abs(short[0] - logits[0]).max() < 1e-5 < 1e-2 < np.abs(short[2] - logits[2]).max()


@pytest.mark.parametrize("name", MIXERS)
def test_packed_documents_remember_nothing_of_each_other(name):
    """A document that starts with a segment, and one that starts inside it, as if the stream began there."""
    _, batches = segments(count=4)
    ids = np.zeros((B, 4 * L), np.int32)
    ids[:, L:], ids[1, L + 2 :] = 1, 2
    packed = [{**batch, "segment_ids": jnp.asarray(ids[:, i * L : (i + 1) * L])} for i, batch in enumerate(batches)]
    model = language_model(name)
    params = parameters(model)
    logits, _ = run(model, params, packed)
    alone, _ = run(model, params, packed[1:])
    for a, b in zip(logits[1:], alone, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    other = [{**packed[0], "inputs": packed[0]["inputs"][:, ::-1]}, *packed[1:]]
    other[1] = {**packed[1], "inputs": packed[1]["inputs"].at[1, :2].set(1)}
    changed, _ = run(model, params, other)
    for a, b in zip(logits[1:], changed[1:], strict=True):
        np.testing.assert_array_equal(a[0], b[0])
        np.testing.assert_allclose(a[1, 2:] if a is logits[1] else a[1], b[1, 2:] if a is logits[1] else b[1], atol=1e-5)
    unpacked, _ = run(model, params, batches)
    assert np.abs(unpacked[3] - logits[3]).max() > 1e-4


@pytest.mark.parametrize("name", MIXERS)
def test_gradients_stop_at_the_memory_which_matters_all_the_same(name):
    _, batches = segments(count=4)
    model = language_model(name)
    params = parameters(model)
    _, memory = run(model, params, batches[:3])

    def last(memory, tree):
        return jnp.sum(model.apply({"params": tree, MEMORY: memory}, batches[3]["inputs"], Context()) ** 2)

    floats, rest = (jax.tree.map(lambda x, k=k: x if (x.dtype == jnp.float32) == k else None, memory) for k in (True, False))

    def join(floats):
        return jax.tree.map(lambda a, b: b if a is None else a, floats, rest, is_leaf=lambda x: x is None)

    gradients = jax.tree.leaves(jax.jit(jax.grad(lambda floats: last(join(floats), params)))(floats))
    assert gradients and not any(np.any(g) for g in gradients)
    assert abs(last(memory, params) - last(jax.tree.map(jnp.zeros_like, memory), params)) > 1e-3


def test_enhanced_recurrence_reaches_further_back_than_the_depth_allows_transformer_xl():
    """Two layers with memories of a segment: a token three segments back changes the logits of ErnieDoc alone."""
    _, batches = segments(count=4)
    changed = [
        {**batches[0], "inputs": batches[0]["inputs"].at[:, -1].set(1 + batches[0]["inputs"][:, -1] % (V - 1))},
        *batches[1:],
    ]
    reaches = {}
    for name in ("transformer_xl", "ernie_doc"):
        model = language_model(name)
        params = parameters(model)
        (a, _), (b, _) = (run(model, params, x) for x in (batches, changed))
        reaches[name] = np.any(a[3] != b[3])
    assert reaches == {"transformer_xl": False, "ernie_doc": True}


@pytest.mark.parametrize("compression", ["max", "mean", "conv", "dilated_conv", "most_used"])
def test_compressions_by_hand(compression):
    """Four states leave the memory as two; a state of two documents speaks of the later; the first of the two is empty here."""
    module = build(
        dict(name="compressive_transformer", causal=True, num_heads=1, memory_length=4, compressed_length=2, compression_rate=2,
             compression=compression, auxiliary="none")
    )  # fmt: skip
    x = jax.random.normal(jax.random.key(0), (1, 4, 3))
    params = module.init(jax.random.key(1), x, Context())["params"]
    old, ids = np.asarray(jax.random.normal(jax.random.key(2), (1, 4, 3))), np.array([[1, 2, 2, 2]], np.int32)
    memory = dict(
        states=old, states_ids=ids, compressed=np.zeros((1, 2, 3), np.float32), compressed_ids=np.zeros((1, 2), np.int32)
    )
    usage = np.array([[0.0, 3.0, 1.0, 2.0]], np.float32)
    memory |= {"usage": usage} if compression == "most_used" else {}
    ctx = Context(segment_ids=jnp.full((1, 4), 8))  # a document that attends nothing of the memory: usage stays
    _, new = module.apply({"params": params, MEMORY: jax.tree.map(jnp.asarray, memory)}, x, ctx, mutable=[MEMORY])
    o = old[0]
    masked = np.concatenate([np.zeros((1, 3)), o[1:]])
    kernel, bias = params.get("compress_kernel"), params.get("compress_bias")
    expected = {
        "max": lambda: [o[1], np.maximum(o[2], o[3])],
        "mean": lambda: [o[1], (o[2] + o[3]) / 2],
        "conv": lambda: [masked[2 * g] @ kernel[0] + masked[2 * g + 1] @ kernel[1] + bias for g in (0, 1)],
        "dilated_conv": lambda: [masked[1] @ kernel[1] + bias, masked[1] @ kernel[0] + masked[3] @ kernel[1] + bias],
        "most_used": lambda: [o[1], o[3]],
    }[compression]()
    np.testing.assert_allclose(new[MEMORY]["compressed"][0], np.stack(expected), atol=1e-6)
    np.testing.assert_array_equal(new[MEMORY]["compressed_ids"][0], [2, 2])
    np.testing.assert_array_equal(new[MEMORY]["states"], x)


def test_usage_is_of_weights_also_where_a_bias_changes_values():
    """With a^K = 0 Shaw's weights are those of plain attention, whatever a^V is."""
    config = dict(name="compressive_transformer", causal=True, num_heads=2, memory_length=4, compressed_length=2,
                  compression_rate=2, compression="most_used", auxiliary="none")  # fmt: skip
    x = jax.random.normal(jax.random.key(0), (3, 4, 6))
    used = {}
    for bias in ("none", "shaw"):
        module = build(config | dict(bias=dict(name=bias)))
        params = module.init(jax.random.key(1), x, Context())["params"]
        if bias == "shaw":
            params = params | {"position_bias": {**params["position_bias"], "keys": jnp.zeros((33, 3))}}
        memory = {}
        for _ in range(2):
            _, memory = module.apply({"params": params, **memory}, x, Context(), mutable=[MEMORY])
        used[bias] = memory[MEMORY]["usage"]
    np.testing.assert_allclose(used["shaw"], used["none"], atol=1e-5)


@pytest.mark.parametrize("auxiliary", ["attention_reconstruction", "auto_encoding"])
def test_auxiliary_loss_teaches_the_compression_alone(auxiliary):
    _, batches = segments(count=3)
    model = language_model("compressive_transformer", auxiliary=auxiliary)
    params = parameters(model)
    _, memory = run(model, params, batches[:2])

    def losses(params):
        ctx = Context(train=True)
        logits, new = model.apply({"params": params, MEMORY: memory}, batches[2]["inputs"], ctx, mutable=[MEMORY, "losses"])
        return sum(jax.tree.leaves(new["losses"])), jnp.sum(logits**2)

    auxiliary_gradient, own = (jax.jit(jax.grad(lambda p, i=i: losses(p)[i]))(params) for i in (0, 1))
    for path, g in jax.tree_util.tree_leaves_with_path(auxiliary_gradient):
        name = jax.tree_util.keystr(path)
        assert np.any(g != 0) == ("compress" in name), name
    assert not any(np.any(g) for p, g in jax.tree_util.tree_leaves_with_path(own) if "compress" in jax.tree_util.keystr(p))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_train_step_carries_the_memory_of_each_row(accumulate):
    """As if the model were applied by hand; micro-batches keep their rows' memories apart."""
    rows = 4
    _, batches = segments(count=2, rows=rows)
    model = language_model("transformer_xl")
    params = parameters(model)
    memory = empty_memory(model, {"params": params}, batches[0])
    assert all(not np.any(leaf) and len(leaf) == rows for leaf in jax.tree.leaves(memory))
    tx = optax.sgd(0.0)
    state = TrainState(jnp.int32(0), params, tx.init(params), {MEMORY: memory}, None, jax.random.key_data(jax.random.key(0)))
    step = jax.jit(functools.partial(train_step, model, tx, accumulate=accumulate))
    losses = []
    for batch in batches:
        state, sums = step(state, batch)
        losses.append(sums["loss"][0])
    _, expected = run(model, params, batches)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), state.variables[MEMORY], expected)
    memory = {}
    for batch, loss in zip(batches, losses, strict=True):
        sums, memory = eval_step(model, {"params": params, **memory}, batch)
        np.testing.assert_allclose(loss, sums["loss"][0], rtol=1e-5)
    assert MEMORY not in state.evaluated()
