"""A small hybrid language model, and what it says without any cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from efficient_attn.generation.engine import Engine, Request
from efficient_attn.mixers import Context
from efficient_attn.models.decoder import LanguageModel

VOCAB, LENGTH, WIDTH = 12, 32, 8
SOFTMAX = dict(name="softmax", num_heads=2, num_kv_heads=1, causal=True, rotation=dict(name="rotary"))
MAMBA = dict(name="mamba", state_dim=2, causal=True)
HYBRID = (SOFTMAX, MAMBA)


@functools.cache
def language_model(kind: str):
    """The model, and parameters with which its choices are far apart."""
    mixer = {"softmax": SOFTMAX, "hybrid": HYBRID}[kind]
    sizes = dict(vocab_size=VOCAB, num_outputs=VOCAB, length=LENGTH, depth=2, width=WIDTH)
    model = LanguageModel(**sizes, mixer=mixer, embed_stddev=1.0)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32), Context())
    return model, variables


def greedy(kind: str, request: Request) -> list[int]:
    """The best next token of the whole sequence so far, again and again."""
    _, variables = language_model(kind)
    tokens = list(request.prompt)
    while len(tokens) < len(request.prompt) + request.max_tokens:
        padded = np.zeros((1, LENGTH), np.int32)
        padded[0, : len(tokens)] = tokens
        tokens.append(int(_logits(kind)(variables, padded)[0, len(tokens) - 1].argmax()))
    return tokens[len(request.prompt) :]


@functools.cache
def _logits(kind: str):
    model, _ = language_model(kind)
    return jax.jit(lambda variables, tokens: model.apply(variables, tokens, Context()))


def run(engine: Engine, requests) -> list[list[int]]:
    """What an engine makes of requests, put together from its events."""
    numbers = [engine.submit(request) for request in requests]
    found = {number: [] for number in numbers}
    for number, new in engine.run():
        found[number] += new
    return list(found.values())
