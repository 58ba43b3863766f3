"""Tokens a second of generation on this machine, each claim against its alternative, taking turns (A B A B).

    python -m benchmarks.generation                                            prints Markdown tables
    python -m benchmarks.generation --peer=PYTHON --out=results/cpu/generation.json

- cache: milliseconds a token after L tokens, from the cache and by computing all L again; of attention, and of Mamba, whose state
  does not grow.
- paged: the same requests from contiguous keys and values and from blocks of 16 tokens.
- batching: requests of mixed lengths through 8 rows, each row refilled when it is free, or all when all are.
- peer: greedy generation by Hugging Face transformers' Llama (`--peer` names a Python that can import torch and transformers;
  benchmarks/transformers_worker.py runs there) and by the same architecture here, with the same random weights; the tokens must
  agree.

All with random weights, in float32. A ratio is that of one turn; given are the median over the turns and their quartiles.
"""

import argparse
import functools
import itertools
import os
import pathlib
import statistics
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import harness
from efficient_attn.generation.decoding import MAX_STEPS, Decoder, Rows
from efficient_attn.generation.engine import Engine, Request, generate
from efficient_attn.generation.sampling import GREEDY
from efficient_attn.mixers import Context
from efficient_attn.models.decoder import LanguageModel

VOCAB = 256
ATTENTION = dict(name="softmax", num_heads=8, causal=True, rotation=dict(name="rotary"))
MAMBA = dict(name="mamba", causal=True)
LLAMA = dict(vocab_size=4096, width=512, depth=8, heads=8, kv_heads=4, feed_forward_width=1408)
ROWS, BLOCK_SIZE = 8, 16


def language_model(mixer: dict, length: int, *, depth: int = 4, width: int = 256) -> tuple[LanguageModel, dict]:
    """A model with random weights."""
    sizes = dict(vocab_size=VOCAB, num_outputs=VOCAB, length=length, depth=depth, width=width)
    model = LanguageModel(**sizes, mixer=mixer, feed_forward_width=4 * width, embed_stddev=1.0)
    return model, jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32), Context())


def prompt(length: int, seed: int = 0, vocab: int = VOCAB) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(1, vocab, length).tolist())


def cached(model: LanguageModel, variables: dict, length: int, turns: int):
    """A function that decodes `MAX_STEPS` more tokens after `length`, and goes on from there the next time."""
    decoder = Decoder(model, variables)
    held = [decoder.prefill(decoder.init(1, length + MAX_STEPS * turns), [0], [prompt(length)])]
    rows = Rows.idle(1).replace(token=np.array([1]), limit=np.array([10**9]), active=np.array([True]))

    def run():
        held[0], _, out = decoder.decode(held[0], rows, None, MAX_STEPS, sampling=GREEDY)
        return out

    return run


def uncached(model: LanguageModel, variables: dict, length: int):
    """A function that computes the next token from all `length` before it."""
    step = jax.jit(lambda variables, tokens: jnp.argmax(model.apply(variables, tokens, Context())[:, -1], axis=-1))
    tokens = jnp.array([prompt(length)], jnp.int32)
    return lambda: step(variables, tokens)


def measure_cache(lengths: list[int], repeats: int) -> list[dict]:
    """Milliseconds a token after each length."""
    rows, calls = [], 1 + 2 * repeats  # the most that `take_turns` makes
    for name, mixer in (("attention", ATTENTION), ("mamba", MAMBA)):
        runs = {}
        for length in lengths:
            model, variables = language_model(mixer, length)
            runs["cached", length] = cached(model, variables, length, calls)
            runs["uncached", length] = uncached(model, variables, length)
        times = harness.take_turns(runs, repeats)
        for length in lengths:
            a_token = [ms / MAX_STEPS for ms in times["cached", length]]
            growth = harness.ratio([ms / MAX_STEPS for ms in times["cached", lengths[0]]], a_token)
            rows.append(
                {
                    "mixer": name,
                    "length": length,
                    "cached_ms": statistics.median(a_token),
                    "uncached_ms": statistics.median(times["uncached", length]),
                    "times_faster": harness.ratio(a_token, times["uncached", length])["median"],
                    "cached_growth": growth["median"],
                }
            )
    return rows


def compare(runs: dict, tokens: int, repeats: int, **facts) -> list[dict]:
    """Tokens a second of each way to do the same, and of each how many times those of the first."""
    times = harness.take_turns(runs, repeats)
    first = next(iter(runs))
    return [
        {
            **facts,
            "what": name,
            "tokens_per_second": 1e3 * tokens / statistics.median(ms),
            "against_first": harness.ratio(ms, times[first]),
        }
        for name, ms in times.items()
    ]


def measure_paged(lengths: list[int], repeats: int) -> list[dict]:
    """The same requests with contiguous and with paged keys and values."""
    rows = []
    for length in lengths:
        model, variables = language_model(ATTENTION, 2 * length)
        requests = [Request(prompt(length - 3 * i, i), length) for i in range(ROWS)]
        blocks = ROWS * -(-2 * length // BLOCK_SIZE) + 1
        decoders = {"contiguous": Decoder(model, variables), "paged": Decoder(model, variables, (blocks, BLOCK_SIZE))}
        results = {name: generate(decoder, requests) for name, decoder in decoders.items()}
        if results["paged"] != results["contiguous"]:
            raise RuntimeError(f"paged and contiguous caches gave different tokens at length {length}")
        runs = {name: functools.partial(generate, decoder, requests) for name, decoder in decoders.items()}
        rows += compare(runs, ROWS * length, repeats, prompt=length, new=length, rows=ROWS)
    return rows


def mixed_requests(count: int) -> list[Request]:
    """One in eight is long, 256 new tokens, and the others 8 to 32, in random order; prompts of 4 to 32 tokens."""
    rng = np.random.default_rng(0)
    new = np.where(rng.permutation(count) % 8 == 0, 256, rng.integers(8, 33, count))
    return [Request(prompt(int(rng.integers(4, 33)), i), int(n)) for i, n in enumerate(new)]


def measure_batching(count: int, repeats: int) -> list[dict]:
    """The same requests in static batches, in order, and with rows refilled as they become free."""
    model, variables = language_model(ATTENTION, 512)
    requests, length = mixed_requests(count), 320
    contiguous = Decoder(model, variables)
    paged = Decoder(model, variables, (ROWS * length // BLOCK_SIZE // 2, BLOCK_SIZE))
    ways = {"static": (contiguous, False), "continuous": (contiguous, True), "continuous, paged": (paged, True)}
    steps, results = {}, {}

    def run(name: str, decoder: Decoder, continuous: bool):
        engine = Engine(decoder, ROWS, length, continuous=continuous)
        for request in requests:
            engine.submit(request)
        out = [[] for _ in requests]
        for number, new in engine.run():
            out[number] += new
        steps[name], results[name] = engine.counts.steps, out
        return engine.counts.tokens

    runs = {name: functools.partial(run, name, *way) for name, way in ways.items()}
    tokens = sum(request.max_tokens for request in requests)
    rows = compare(runs, tokens, repeats, requests=count, rows=ROWS)
    if any(result != results["static"] for result in results.values()):
        raise RuntimeError("static and continuous batching gave different tokens")
    return [row | {"steps": steps[row["what"]]} for row in rows]


def llama(weights: pathlib.Path, length: int) -> tuple[LanguageModel, dict]:
    """The architecture of transformers' Llama, with the weights in a file of its state dict."""
    sizes = dict(LLAMA)
    heads, kv_heads, width, vocab = (sizes.pop(name) for name in ("heads", "kv_heads", "width", "vocab_size"))
    mixer = dict(
        name="softmax", num_heads=heads, num_kv_heads=kv_heads, causal=True, use_bias=False, rotation=dict(name="rotary")
    )
    model = LanguageModel(
        vocab_size=vocab, num_outputs=vocab, length=length, width=width, mixer=mixer, norm="rms", feed_forward="swiglu",
        use_bias=False, **sizes,
    )  # fmt: skip
    theirs = {name: jnp.asarray(value) for name, value in np.load(weights).items()}

    def matrix(name: str, *shape: int):
        return {"kernel": theirs[f"{name}.weight"].T.reshape(shape or theirs[f"{name}.weight"].shape[::-1])}

    params = {"embed": {"embedding": theirs["model.embed_tokens.weight"]}, "head": matrix("lm_head")}
    params["norm"] = {"scale": theirs["model.norm.weight"]}
    for i in range(model.depth):
        at, size = f"model.layers.{i}", width // heads
        params[f"layer_{i}"] = {
            "norm_mixer": {"scale": theirs[f"{at}.input_layernorm.weight"]},
            "norm_mlp": {"scale": theirs[f"{at}.post_attention_layernorm.weight"]},
            "mixer": {
                "query": matrix(f"{at}.self_attn.q_proj", width, heads, size),
                "key": matrix(f"{at}.self_attn.k_proj", width, kv_heads, size),
                "value": matrix(f"{at}.self_attn.v_proj", width, kv_heads, size),
                "out": matrix(f"{at}.self_attn.o_proj", heads, size, width),
            },
            "mlp": {name: matrix(f"{at}.mlp.{name}_proj") for name in ("gate", "up", "down")},
        }
    return model, {"params": params}


def measure_peer(python: str, threads: int, batches: list[int], new: int, repeats: int) -> tuple[list[dict], dict]:
    """Greedy generation after 32 tokens, here and by transformers; and its versions."""
    length = 32
    with tempfile.TemporaryDirectory() as folder:
        weights = pathlib.Path(folder) / "weights.npz"
        peer = harness.Peer(python, "transformers_worker.py", threads, weights, *LLAMA.values(), length + new)
        decoder = Decoder(*llama(weights, length + new))
    rows = []
    for batch in batches:
        prompts = [prompt(length, i, LLAMA["vocab_size"]) for i in range(batch)]
        requests = [Request(tokens, new) for tokens in prompts]
        if generate(decoder, requests) != peer.run(prompts, new):
            raise RuntimeError(f"transformers and we gave different tokens for {batch} prompts")
        runs = {
            "transformers": functools.partial(peer.run, prompts, new),
            "here": functools.partial(generate, decoder, requests),
        }
        rows += compare(runs, batch * new, repeats, prompt=length, new=new, rows=batch)
    return rows, peer.versions


SECTIONS = ("cache", "paged", "batching", "peer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sections", nargs="+", default=list(SECTIONS), choices=SECTIONS)
    parser.add_argument("--lengths", nargs="+", type=int, default=[64, 256, 1024, 4096], help="of cache")
    parser.add_argument("--paged_lengths", nargs="+", type=int, default=[64, 256])
    parser.add_argument("--requests", type=int, default=48, help="of batching")
    parser.add_argument("--new", type=int, default=128, help="tokens that peer generates")
    parser.add_argument("--peer", help="a Python with torch and transformers")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of the peer")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", help="write the figures to this JSON file")
    args = parser.parse_args()
    versions: str | dict = "left out: --peer names no Python to run it with"
    found: dict[str, list[dict]] = {}
    if "cache" in args.sections:
        found["cache"] = measure_cache(args.lengths, args.repeats)
    if "paged" in args.sections:
        found["paged"] = measure_paged(args.paged_lengths, args.repeats)
    if "batching" in args.sections:
        found["batching"] = measure_batching(args.requests, args.repeats)
    if "peer" in args.sections and args.peer:
        found["peer"], versions = measure_peer(args.peer, args.threads, [1, ROWS], args.new, args.repeats)
    for name, rows in found.items():
        print(f"\n{name}\n\n{harness.markdown([_flat(row) for row in rows])}", flush=True)
    rows = list(itertools.chain.from_iterable([{"section": name, **row} for row in rows] for name, rows in found.items()))
    harness.write(args.out, rows, peer=versions)


def _flat(row: dict) -> dict:
    """A row for a table: the median of a ratio."""
    return {key: value["median"] if isinstance(value, dict) else value for key, value in row.items()}


if __name__ == "__main__":
    main()
