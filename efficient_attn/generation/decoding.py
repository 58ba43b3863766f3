"""What runs on the device: prompts into the cache in chunks, then token after token in one loop, for any mixers.

The state of all rows is two collections: `cache`, whose arrays have a row for each sequence (recurrent states, contiguous keys
and values, and how far each row is), and `blocks`, pools that rows share by block tables. Decoding takes no padding, so prompts
of different lengths go in by chunks of powers of two in which only some rows take part. The loop can feed the last tokens of a
prompt itself, while other rows decode (as Sarathi's batches do, Agrawal et al. 2023).
"""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, Int

from efficient_attn.generation.sampling import Sampling, sample
from efficient_attn.mixers.context import Context, Paging
from kernels.attention import paged

MAX_CHUNK = 256
"""Tokens of a prompt that go into the cache at a time, at most."""

MAX_STEPS = 32
"""Tokens of each row that are decoded between two looks of the host, at most."""

CHUNKS = [1 << i for i in range(MAX_CHUNK.bit_length())]

NO_TOKEN = -1
"""The stop token where there is none, and what a row that has ended puts out."""


@flax.struct.dataclass
class State:
    """The variables that decoding changes: `cache`, axis 0 the row, and `blocks`, axis 1 the block of a pool."""

    cache: Any
    blocks: Any

    @property
    def nbytes(self) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves((self.cache, self.blocks)))


@flax.struct.dataclass
class Rows:
    """Where each row [B] stands: the token to feed next, how many it did and may sample, its seed, and whether it goes on.

    Before a row samples it feeds `pending` tokens more, the first ones of `prompt` [B, MAX_STEPS].
    """

    token: Any
    count: Any
    limit: Any
    seed: Any
    active: Any
    pending: Any
    prompt: Any

    @classmethod
    def idle(cls, size: int) -> "Rows":
        """NumPy arrays to fill in."""
        numbers = (np.zeros(size, np.int32) for _ in range(4))
        return cls(*numbers, np.zeros(size, bool), np.zeros(size, np.int32), np.zeros((size, MAX_STEPS), np.int32))


CALL = 2
"""Steps of the loop that take as long as putting a chunk of a prompt into the cache, about."""


def left_to_steps(lengths: Sequence[int], active: int) -> list[int]:
    """How many last tokens of new prompts the loop had better feed, where `active` rows take part in it, theirs among them.

    A chunk takes a call of its own, in which nobody else gets on; a token that is left takes a step, in which the other rows do.
    """

    def cost(size: int) -> float:
        calls = sum(any(n & chunk for n in lengths) for chunk in CHUNKS if chunk >= size)
        return CALL * calls + max(n % size for n in lengths) * len(lengths) / active

    size = min((size for size in CHUNKS if size <= MAX_STEPS), key=cost)
    return [n % size for n in lengths]


class Decoder:
    """A language model with its parameters, and its compiled steps.

    model: a `LanguageModel`, or anything called like it with `(tokens [B, L], ctx)`. variables: without cache.
    paging: (blocks of a pool, tokens in a block) for keys and values of softmax attention in blocks; None for contiguous ones.
    gather_once: `decode` copies the rows' blocks side by side, and back when it ends, instead of reading them by the tables at
        each token: faster where that reading is a copy anyway, in as much more memory, while it runs, as the tables span.
    Steps are compiled once for each size of chunk and number of rows that take part, powers of two, and each width of tables.
    """

    def __init__(
        self, model: nn.Module, variables: Any, paging: tuple[int, int] | None = None, *, gather_once: bool = True
    ):  # fmt: skip
        self.model, self.variables, self.paging, self.gather_once = model, variables, paging, gather_once
        self.init_shapes = functools.cache(self._init_shapes)
        self._prefill = jax.jit(self._prefill_step, donate_argnums=1)
        self._decode = jax.jit(self._decode_loop, donate_argnums=1, static_argnames=("sampling", "stop"))
        self._scores = jax.jit(self._score_step, donate_argnums=1)
        self._copy_rows = jax.jit(_copy_rows, donate_argnums=0)
        self._copy_blocks = jax.jit(_copy_blocks, donate_argnums=0)

    def _init_shapes(self, rows: int, length: int) -> State:
        """The shapes of `init`'s arrays."""
        tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)
        ctx = self._context(None if self.paging is None else jnp.zeros((rows, 1), jnp.int32))
        variables = jax.eval_shape(lambda tokens: self.model.init(jax.random.key(0), tokens, ctx), tokens)
        return State(*(variables.get(name, {}) for name in ("cache", "blocks")))

    def init(self, rows: int, length: int) -> State:
        """Empty rows of at most `length` tokens. Raises `ValueError` where the model has no room for so many."""
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self.init_shapes(rows, length))

    def prefill(
        self, state: State, rows: Sequence[int], prompts: Sequence[Sequence[int]], tables: np.ndarray | None = None
    ) -> State:
        """Put `prompts` into `rows`, each after what its row holds. tables [n, N] of these rows, in this order, where paged."""
        left = [list(prompt) for prompt in prompts]
        while longest := max(map(len, left), default=0):
            size = min(MAX_CHUNK, 1 << (longest.bit_length() - 1))
            here = [i for i, tokens in enumerate(left) if len(tokens) >= size]
            padded = here + here[:1] * ((1 << (len(here) - 1).bit_length()) - len(here))  # repeated rows do the same again
            chunk = np.array([left[i][:size] for i in padded], np.int32)
            at = np.array([rows[i] for i in padded], np.int32)
            state = self._prefill(self.variables, state, chunk, at, None if tables is None else tables[padded])
            for i in here:
                del left[i][:size]
        return state

    def decode(
        self, state: State, rows: Rows, tables: np.ndarray | None, steps: int, *, sampling: Sampling, stop: int = NO_TOKEN
    ) -> tuple[State, Rows, Int[Array, "B T"]]:  # fmt: skip
        """Feed up to `steps` <= `MAX_STEPS` tokens of each active row, and where each row is then.

        A row ends at its limit, and at the token `stop`, which is put out. The tokens sampled are [B, MAX_STEPS], `NO_TOKEN`
        where none: in the first `pending` steps of a row, and after its end.
        """
        return self._decode(self.variables, state, rows, tables, jnp.int32(min(steps, MAX_STEPS)), sampling=sampling, stop=stop)

    def scores(
        self, state: State, tokens: Int[Array, "B"], tables: np.ndarray | None = None
    ) -> tuple[State, Float[Array, "B V"]]:
        """Feed a token to every row, and score the next."""
        return self._scores(self.variables, state, tokens, tables)

    def copy_rows(self, state: State, to: Sequence[int], of: Sequence[int]) -> State:
        """Rows `to` become what rows `of` are; blocks stay as they are."""
        return self._copy_rows(state, np.asarray(to, np.int32), np.asarray(of, np.int32))

    def copy_blocks(self, state: State, copies: Sequence[tuple[int, int]]) -> State:
        """Copy blocks of the pools, (from, to)."""
        if not copies:
            return state
        padded = [*copies, *copies[:1] * ((1 << (len(copies) - 1).bit_length()) - len(copies))]
        return self._copy_blocks(state, np.asarray(padded, np.int32))

    def reset(self, state: State, rows: Sequence[int], positions: Sequence[int]) -> State:
        """Empty these rows, as they are before the first token; where everything but positions is in blocks, set those."""
        return _reset(state, np.asarray(rows, np.int32), np.asarray(positions, np.int32))

    def compiled(self) -> dict[str, int]:
        """How many programs there are of the two steps."""
        return {"decode": self._decode._cache_size(), "prefill": self._prefill._cache_size()}

    def _context(self, tables) -> Context:
        return Context(decode=True, paging=None if tables is None else Paging(tables, *self.paging))

    def _apply(self, variables, cache, blocks, tokens, tables):
        """Scores [B, L, V] of the next tokens and the changed collections."""
        collections = {**variables, "cache": cache, "blocks": blocks}
        logits, updated = self.model.apply(collections, tokens, self._context(tables), mutable=["cache", "blocks"])
        return logits, State(updated.get("cache", cache), updated.get("blocks", blocks))

    def _prefill_step(self, variables, state: State, tokens, rows, tables) -> State:
        _, new = self._apply(variables, _take(state.cache, rows), state.blocks, tokens, tables)
        return State(_put(state.cache, rows, new.cache), new.blocks)

    def _score_step(self, variables, state: State, tokens, tables):
        logits, state = self._apply(variables, state.cache, state.blocks, tokens[:, None], tables)
        return state, logits[:, -1]

    def _decode_loop(self, variables, state: State, rows: Rows, tables, steps, *, sampling: Sampling, stop: int):
        rows = jax.tree.map(jnp.asarray, rows)
        keys = jax.vmap(jax.random.key)(rows.seed)
        out = jnp.full((rows.token.shape[0], MAX_STEPS), NO_TOKEN, jnp.int32)
        if tables is not None and self.gather_once:
            before, spread = state, jnp.pad(tables, ((0, 0), (0, 1)))  # block 0 last: what rows that ended write past it
            state, tables = State(_side_by_side(state, spread), {}), None
        else:
            before = spread = None

        def goes_on(carry):
            step, _, rows, _ = carry
            return (step < steps) & jnp.any(rows.active)

        def body(carry):
            step, state, rows, out = carry
            own = None if tables is None else jnp.where(rows.active[:, None], tables, 0)  # a row that ended writes to scratch
            state, logits = self._score_step(variables, state, rows.token, own)
            feeds = rows.active & (step < rows.pending)
            samples = rows.active & ~feeds
            new = jnp.where(samples, sample(logits, keys, rows.count, sampling), NO_TOKEN)
            count = rows.count + samples
            token = jnp.where(feeds, rows.prompt[:, step], jnp.where(samples, new, rows.token))
            active = feeds | (samples & (count < rows.limit) & (new != stop))
            return step + 1, state, rows.replace(token=token, count=count, active=active), out.at[:, step].set(new)

        step, state, rows, out = jax.lax.while_loop(goes_on, body, (jnp.int32(0), state, rows, out))
        rows = rows.replace(pending=jnp.maximum(rows.pending - step, 0))
        return state if spread is None else _in_blocks(state.cache, before, spread), rows, out


CONTIGUOUS = {"key_blocks": "cached_key", "value_blocks": "cached_value"}
"""Names of the pools of a layer -> those of what its rows keep without paging (`mixers.kv_cache`)."""


def _side_by_side(state: State, tables: Int[Array, "B N"]) -> Any:
    """The cache of the same rows without paging: each row's blocks in order, zeros beyond its length."""
    cache = flatten_dict(state.cache)
    found = {
        (*layer, CONTIGUOUS[name]): jnp.moveaxis(paged.gather(pool, tables, cache[*layer, "cache_index"]), 0, 1)
        for (*layer, name), pool in flatten_dict(state.blocks).items()
    }
    return unflatten_dict(cache | found)


def _in_blocks(cache: Any, before: State, tables: Int[Array, "B N"]) -> State:
    """What `_side_by_side` made of `before`, back in the pools: of each row the blocks that `MAX_STEPS` tokens may reach."""
    cache, old, new = flatten_dict(cache), flatten_dict(before.cache), {}
    for (*layer, name), pool in flatten_dict(before.blocks).items():
        size, rows = pool.shape[2], cache.pop((*layer, CONTIGUOUS[name]))
        reached = old[*layer, "cache_index"][:, None] // size + jnp.arange(MAX_STEPS // size + 2)[None]
        reached = jnp.minimum(reached, tables.shape[1] - 1)
        blocks = rows.reshape(*rows.shape[:2], tables.shape[1], *pool.shape[2:])
        written = jnp.take_along_axis(blocks, reached[:, None, :, None, None], axis=2)
        at = jnp.take_along_axis(tables, reached, axis=1)
        new[*layer, name] = pool.at[:, at].set(jnp.moveaxis(written, 0, 1))
    return State(unflatten_dict(cache), unflatten_dict(new))


def _take(cache, rows):
    return jax.tree.map(lambda x: x[rows], cache)


def _put(cache, rows, new):
    return jax.tree.map(lambda x, part: x.at[rows].set(part), cache, new)


def _copy_rows(state: State, to: Int[Array, "n"], of: Int[Array, "n"]) -> State:
    return state.replace(cache=_put(state.cache, to, _take(state.cache, of)))


def _copy_blocks(state: State, copies: Int[Array, "n 2"]) -> State:
    return state.replace(blocks=jax.tree.map(lambda pool: pool.at[:, copies[:, 1]].set(pool[:, copies[:, 0]]), state.blocks))


@functools.partial(jax.jit, donate_argnums=0)
def _reset(state: State, rows: Int[Array, "n"], positions: Int[Array, "n"]) -> State:
    def fresh(x):
        return x.at[rows].set(positions if is_position(x) else 0)

    return state.replace(cache=jax.tree.map(fresh, state.cache))


def is_position(leaf: Any) -> bool:
    """Whether an array of the cache holds how far each row is, and nothing of what it has seen."""
    return leaf.ndim == 1 and jnp.issubdtype(leaf.dtype, jnp.integer)


def is_all_in_blocks(state: State) -> bool:
    """Whether a row is its blocks and its position alone, so that rows which begin alike can share them."""
    return bool(jax.tree.leaves(state.blocks)) and all(is_position(leaf) for leaf in jax.tree.leaves(state.cache))
