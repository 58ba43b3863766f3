"""Rows shared by many requests: each gets exactly the tokens it gets alone, from any cache, in memory that is foreseen."""

import jax
import numpy as np
import pytest

from efficient_attn.arguments import ConfigError
from efficient_attn.generation import caches
from efficient_attn.generation.decoding import Decoder, Rows, left_to_steps
from efficient_attn.generation.engine import Engine, Request, generate, seeds
from efficient_attn.generation.sampling import GREEDY, Sampling
from efficient_attn.mixers import state_size
from tests.generation.lm import HYBRID, LENGTH, SOFTMAX, WIDTH, greedy, language_model, run

REQUESTS = [
    Request((1, 2, 3, 4, 5), 9, seed=1),
    Request((7,), 12, seed=2),
    Request((3,) * 9, 6, seed=3),
    Request((1, 2, 3, 4, 6), 8, seed=4),
    Request((1, 2, 3, 4, 5), 7, seed=5),
]
PAGING = (9, 4)  # 8 blocks of 4: too few for three rows


@pytest.fixture(scope="module", autouse=True)
def compile_quickly():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module", params=["contiguous", "paged"])
def decoder(request):
    return Decoder(*language_model("hybrid"), PAGING if request.param == "paged" else None)


def test_requests_together_are_as_each_without_cache(decoder):
    """Rows of different lengths, refilled as they become free; with blocks, some make way and are computed again."""
    engine = Engine(decoder, rows=3, length=24, steps=5)
    assert run(engine, REQUESTS) == [greedy("hybrid", request) for request in REQUESTS]
    assert engine.counts.tokens == sum(request.max_tokens for request in REQUESTS)
    assert bool(engine.counts.preempted) == (decoder.paging is not None)
    assert engine.counts.steps < 2 * max(request.max_tokens for request in REQUESTS) + engine.counts.preempted * 12


def test_the_end_of_a_prompt_is_fed_while_others_decode(monkeypatch):
    """A prompt that comes alone to a full batch goes in by steps, three of them at a time, and is continued as ever."""
    decoder = Decoder(*language_model("hybrid"))
    chunks = []
    monkeypatch.setattr(decoder, "prefill", lambda state, rows, prompts: chunks.extend(prompts) or state)
    engine = Engine(decoder, rows=4, length=24, steps=3)
    requests = [Request((i,), 2 + 9 * (i > 1)) for i in range(1, 5)] + [Request((5, 3, 1, 2, 4, 6), 7)]
    assert run(engine, requests) == [greedy("hybrid", request) for request in requests]
    assert chunks and not any(chunks)


@pytest.mark.parametrize(
    "lengths, active, left",
    [
        ([7], 1, [1]),  # alone: a call for 4 tokens, one for 2, and a step
        ([7], 8, [7]),  # seven rows get on meanwhile
        ([31], 8, [15]),
        ([16, 24], 2, [0, 0]),
        ([0], 1, [0]),
        ([300, 300], 2, [0, 0]),
    ],
)
def test_chunks_and_steps_share_a_prompt_as_costs_least(lengths, active, left):
    assert left_to_steps(lengths, active) == left


def test_blocks_read_at_each_token_give_the_same():
    decoder = Decoder(*language_model("hybrid"), PAGING, gather_once=False)
    assert run(Engine(decoder, rows=3, length=24, steps=5), REQUESTS) == [greedy("hybrid", request) for request in REQUESTS]


def test_a_row_that_has_ended_spoils_none_of_its_blocks():
    """Its table's last block is full when it ends, and another row goes on: what the blocks hold may be shared later."""
    held = []
    for gather_once in (True, False):
        decoder = Decoder(*language_model("softmax"), PAGING, gather_once=gather_once)
        cache = caches.new(decoder, 2, LENGTH)
        cache.admit([0, 1], [(3, 1) * 6 + (4,), (5,)])
        for row in (0, 1):
            cache.reserve(row, 16)
        rows = Rows.idle(2).replace(token=np.array([2, 6]), limit=np.array([3, 9]), active=np.array([True, True]))
        state, after, _ = decoder.decode(cache.state, rows, cache.tables(), 9, sampling=GREEDY)
        assert after.count.tolist() == [3, 9]
        held.append([pool[:, cache.tables([0])[0]] for pool in jax.tree.leaves(state.blocks)])
    for once, each in zip(*held, strict=True):
        np.testing.assert_allclose(once, each, atol=1e-5)


def test_draws_go_by_the_request_alone(decoder):
    options = dict(sampling=Sampling(temperature=1.5, top_k=8, top_p=0.95), steps=5)
    alone = [run(Engine(decoder, rows=3, length=24, **options), [request])[0] for request in REQUESTS[::2]]
    assert run(Engine(decoder, rows=3, length=24, **options), REQUESTS)[::2] == alone
    assert len({tuple(tokens) for tokens in alone}) == 3 and alone[0][:5] != greedy("hybrid", REQUESTS[0])[:5]


def test_static_batches_wait_for_all_rows(decoder):
    static = Engine(decoder, rows=3, length=24, continuous=False)
    assert run(static, REQUESTS[:4]) == [greedy("hybrid", request) for request in REQUESTS[:4]]


def test_equal_prompts_fork(decoder):
    """One prompt, several samples: computed once; with blocks, shared until one of them writes."""
    request = REQUESTS[0]
    engine = Engine(decoder, rows=3, length=24, sampling=Sampling())
    for seed in seeds(0, 3):
        engine.submit(Request(request.prompt[:3], 4, seed))
    events = engine.run()
    first = next(events)
    assert engine.counts.forked == 2
    samples = {0: [], 1: [], 2: []}
    for number, new in [first, *events]:
        samples[number] += new
    assert len({tuple(sample) for sample in samples.values()}) > 1
    alone = Engine(decoder, rows=3, length=24, sampling=Sampling())
    assert run(alone, [Request(request.prompt[:3], 4, seeds(0, 3)[2])])[0] == samples[2]


def test_memory_is_what_state_size_says(decoder):
    """Every byte of the decode state: of each row the layers' states and its position, or the pool's blocks."""
    state, rows, length = decoder.init(3, 24), 3, 24
    position = 4
    if decoder.paging is None:
        assert state.nbytes == rows * (sum(state_size(mixer, length, WIDTH) for mixer in HYBRID) + position)
        return
    blocks, size = decoder.paging
    block = state_size(SOFTMAX, 2 * size, WIDTH) - state_size(SOFTMAX, size, WIDTH)
    kept = state_size(SOFTMAX, size, WIDTH) - block  # the position of the layer
    assert state.nbytes == blocks * block + rows * (kept + state_size(HYBRID[1], length, WIDTH) + position)


def test_steps_compile_once_whatever_the_length():
    decoder = Decoder(*language_model("softmax"))
    engine = Engine(decoder, rows=1, length=LENGTH)
    for prompt, new in ((5, 3), (5, 20), (9, 7)):
        assert len(run(engine, [Request((1,) * prompt, new)])[0]) == new
    assert decoder.compiled() == {"decode": 1, "prefill": 2}  # chunks of 4 and 8


def test_tables_are_of_few_widths():
    widths = [caches._width(blocks) for blocks in range(1, 34)]
    assert sorted(set(widths)) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48]
    assert all(blocks <= width <= 1.5 * blocks for blocks, width in enumerate(widths, 1))


def test_equal_beginnings_are_stored_once():
    decoder = Decoder(*language_model("softmax"), (20, 4))
    engine = Engine(decoder, rows=2, length=LENGTH, steps=2)
    prompts = [Request((1, 2, 3, 4, 5, 6, 7, 8, 9), 4), Request((1, 2, 3, 4, 5, 6, 7, 8, 2, 2, 2), 4)]
    for request in prompts:
        engine.submit(request)
    found = {0: [], 1: []}
    most = 0
    for number, new in engine.run():
        found[number] += new
        most = max(most, 19 - engine.cache.blocks.num_free)
    assert found == {i: greedy("softmax", request) for i, request in enumerate(prompts)}
    assert most == 3 + 3 - 2, "of three blocks each, two are the same"
    assert run(Engine(decoder, rows=1, length=LENGTH), prompts[:1])[0] == found[0]
    assert engine.cache.blocks.num_free == 19


def test_stop_token_ends_a_sequence_and_is_part_of_it():
    request = REQUESTS[0]
    whole = greedy("softmax", request)
    stop = whole[3]
    [found] = generate(Decoder(*language_model("softmax")), [request], stop=stop)
    assert found == whole[: whole.index(stop) + 1]


def test_wrong_requests_are_said_at_once():
    engine = Engine(Decoder(*language_model("softmax"), (3, 4)), rows=1, length=LENGTH)
    with pytest.raises(ConfigError, match="a prompt of 5 tokens and 9 more do not fit in a cache of 8 tokens"):
        engine.submit(REQUESTS[0])
    with pytest.raises(ConfigError, match="at least one token"):
        Request((), 3)
    with pytest.raises(ConfigError, match="max_tokens=0 must be at least 1"):
        Request((1,), 0)
