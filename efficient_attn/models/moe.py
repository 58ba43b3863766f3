"""Mixtures of experts: feed-forward layers in which a router sends each token to few of many networks."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Bool, Float, Int

from efficient_attn.arguments import ConfigError, check_arguments, lookup
from efficient_attn.mixers.context import Context
from efficient_attn.models.feed_forward import FEED_FORWARDS
from kernels.grouped_matmul import grouped_matmul
from kernels.matmul import dot_general

BLOCK = 128
"""Most rows of one product where experts take as many tokens as come; whole blocks are computed."""


@dataclasses.dataclass(frozen=True)
class TopK:
    """Each token goes to the k experts that its router prefers (Shazeer et al. 2017), and their outputs are added, weighted.

    num_experts: X.
    k: experts a token. weights: the router's softmax over all experts, at the k chosen.
    renormalise: divide the k weights by their sum (Mixtral: Jiang et al. 2024, section 2.1, a softmax over the chosen alone,
        which is the same); Jamba and Switch do not.
    capacity_factor: f > 0 lets an expert take at most C = ceil(k L / X * f) of a row's L tokens (Fedus et al. 2022, eq. 3), the
        first ones in order; what comes later is dropped: that expert adds nothing to it. 0 is no limit.
    balance_weight: factor on the load-balancing loss, `balance_loss`.
    z_weight: factor on the router's z-loss, `z_loss`; 1e-3 in ST-MoE, 0 in the models before it.
    jitter: training multiplies the router's input by noise uniform in [1 - jitter, 1 + jitter] (Fedus et al. 2022, appendix C).

    Capacity is counted row by row, where Switch counts over the batch of a device: what becomes of a token depends on no other
    row, and on no later token. It still depends on the earlier ones, so decoding in chunks, each with a capacity of its own,
    equals the parallel form only where nothing is dropped.
    """

    num_experts: int = 8
    k: int = 2
    renormalise: bool = True
    capacity_factor: float = 0.0
    balance_weight: float = 0.01
    z_weight: float = 0.0
    jitter: float = 0.0

    def __post_init__(self):
        if not 1 <= self.k <= self.num_experts:
            raise ConfigError(f"model.experts.k={self.k} must be between 1 and num_experts={self.num_experts}")
        if self.k == 1 and self.renormalise:
            raise ConfigError("model.experts: k=1 with renormalise=True weighs every expert 1, and the router learns nothing")
        for name in ("capacity_factor", "balance_weight", "z_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"model.experts.{name}={getattr(self, name)} must be at least 0 and finite")
        if not 0 <= self.jitter < 1:
            raise ConfigError(f"model.experts.jitter={self.jitter} must be at least 0 and less than 1")


@dataclasses.dataclass(frozen=True)
class Switch(TopK):
    """One expert a token, with limited capacity (Switch Transformer, Fedus et al. 2022): `TopK` with the published values."""

    k: int = 1
    renormalise: bool = False
    capacity_factor: float = 1.25
    jitter: float = 0.01


def none() -> None:
    """No experts: the same network for every token."""


ROUTINGS: Mapping[str, Callable[..., TopK | None]] = {"none": none, "top_k": TopK, "switch": Switch}
"""How tokens find their experts, by the name that `config.model.experts = dict(name=...)` uses."""


def routing(experts: Mapping[str, Any]) -> TopK | None:
    """What an experts dict describes; None for one network without a router. Raises `ConfigError`."""
    arguments = dict(experts)
    name = arguments.pop("name", None)
    constructor = lookup(ROUTINGS, name, "model.experts.name")
    check_arguments(constructor, arguments, f"model.experts (name={name!r})")
    return constructor(**arguments)


def balance_loss(probabilities: Float[Array, "B L X"], chosen: Int[Array, "B L k"], real: Bool[Array, "B L"]) -> Float[Array, ""]:
    """X sum_e f_e P_e (Fedus et al. 2022, eq. 4): 1 where experts share tokens evenly, up to X / k where they do not.

    f_e is the share of the real tokens' choices that name expert e, P_e the mean probability of e over real tokens. Choices
    count before any is dropped. For k > 1 Mixtral's released code sums f over the k choices instead, which is k times this.
    """
    f = _load(chosen, real, probabilities.shape[-1])
    P = jnp.sum(jnp.where(real[..., None], probabilities, 0), axis=(0, 1)) / _count(real)
    return probabilities.shape[-1] * jnp.sum(f.astype(P.dtype) * P)


def z_loss(logits: Float[Array, "B L X"], real: Bool[Array, "B L"]) -> Float[Array, ""]:
    """Mean over real tokens of log(sum_e exp logits_e)^2, which keeps logits small (ST-MoE: Zoph et al. 2022, eq. 5)."""
    return jnp.sum(jnp.where(real, jax.nn.logsumexp(logits, axis=-1) ** 2, 0)) / _count(real)


def _load(chosen, real, num_experts: int) -> Float[Array, "X"]:
    """Share of the real tokens' choices that go to each expert."""
    hits = jax.nn.one_hot(chosen, num_experts) * real[..., None, None]
    return jnp.sum(hits, axis=(0, 1, 2)) / (_count(real) * chosen.shape[-1])


def _count(real) -> Float[Array, ""]:
    return jnp.maximum(jnp.sum(real, dtype=jnp.float32), 1)


@dataclasses.dataclass(frozen=True)
class Dispatch:
    """Where each choice of each token is computed: G groups of tokens, each with a buffer of N blocks of b rows.

    slot: place of each choice in its group's buffer; past its end for a choice that is dropped.
    blocks, rows: N and b. expert: whose weights each block is multiplied by. product: buffer times those weights.
    """

    slot: Int[Array, "G T k"]
    blocks: int
    rows: int
    expert: Int[Array, "N"]
    product: Callable

    def gather(self, x: Float[Array, "B L E"]) -> Float[Array, "G N b E"]:
        """The buffers: each slot's token, 0 where a slot is empty."""
        G, T, k = self.slot.shape
        token = jnp.arange(T * k) // k

        def group(slot, x):
            source = jnp.full(self.blocks * self.rows, T).at[slot.reshape(-1)].set(token, mode="drop")
            return x.at[source].get(mode="fill", fill_value=0)

        return jax.vmap(group)(self.slot, x.reshape(G, T, -1)).reshape(G, self.blocks, self.rows, -1)

    def combine(self, buffer: Float[Array, "G N b E"], weights: Float[Array, "B L k"]) -> Float[Array, "B L E"]:
        """Each token's weighted sum over its choices; a dropped one adds 0."""

        def group(slot, rows):
            return rows.at[slot].get(mode="fill", fill_value=0)

        rows = buffer.reshape(len(buffer), self.blocks * self.rows, -1)
        chosen = jax.vmap(group)(self.slot, rows).reshape(*weights.shape, -1)
        return jnp.sum(chosen * weights[..., None].astype(chosen.dtype), axis=2)

    def is_dropped(self, real: Bool[Array, "B L"]) -> Bool[Array, "B L k"]:
        """Which choices of real tokens found no room."""
        return (self.slot >= self.blocks * self.rows).reshape(*real.shape, -1) & real[..., None]


def dispatch_all(chosen: Int[Array, "B L k"], real: Bool[Array, "B L"], num_experts: int) -> Dispatch:
    """Every choice of every real token, in one group: each expert gets as many blocks as its choices fill.

    The buffer has room for the B L k choices and one unfinished block an expert: about twice the choices at most. Blocks that
    stay empty are not computed. XLA's partitioner does not split the loop over blocks: every device of a mesh runs all of it.
    """
    B, L, k = chosen.shape
    chosen, real = chosen.reshape(1, B * L, k), real.reshape(1, B * L)
    rows = min(BLOCK, -(-B * L * k // num_experts))
    blocks = -(-B * L * k // rows) + num_experts
    order, sizes = _order_in_expert(chosen, real, num_experts)
    last = jnp.cumsum(-(-sizes[0] // rows))
    first = jnp.pad(last, (1, 0))[:-1]
    slot = jnp.where(real[..., None], first[chosen] * rows + order, blocks * rows)
    expert = jnp.minimum(jnp.searchsorted(last, jnp.arange(blocks), side="right"), num_experts - 1)
    return Dispatch(slot, blocks, rows, expert, lambda x, w: grouped_matmul(x[0], w, expert, last[-1])[None])


def dispatch_limited(chosen: Int[Array, "B L k"], real: Bool[Array, "B L"], num_experts: int, capacity_factor: float) -> Dispatch:
    """The first C choices of each expert in each row; padding takes no place. A row is a group, a block is an expert.

    One batched product, so that a mesh may shard rows and experts.
    """
    _, L, k = chosen.shape
    capacity = math.ceil(round(k * L * capacity_factor / num_experts, 9))  # so that 1.1 * 50 is 55
    order, _ = _order_in_expert(chosen, real, num_experts)
    slot = jnp.where(real[..., None] & (order < capacity), chosen * capacity + order, num_experts * capacity)
    return Dispatch(slot, num_experts, capacity, jnp.arange(num_experts), _product_by_expert)


def _product_by_expert(x: Float[Array, "B X b K"], w: Float[Array, "X K F"]) -> Float[Array, "B X b F"]:
    return jnp.einsum("nxbk,xkf->nxbf", x, w)


def _order_in_expert(
    chosen: Int[Array, "B L k"], real: Bool[Array, "B L"], num_experts: int
) -> tuple[Int[Array, "B L k"], Int[Array, "B X"]]:
    """How many choices of the same expert stand before each one in its row (token by token), and how many there are in all.

    Padding counts nowhere.
    """
    B, L, k = chosen.shape
    hits = jax.nn.one_hot(chosen, num_experts, dtype=jnp.int32) * real[..., None, None]
    hits = hits.reshape(B, L * k, num_experts)
    before = jnp.cumsum(hits, axis=1) - hits
    order = jnp.take_along_axis(before, chosen.reshape(B, L * k, 1), axis=-1)
    return order.reshape(B, L, k), jnp.sum(hits, axis=1)


class ExpertDense(nn.Module):
    """A linear layer with a kernel [X, K, F] and bias [X, F] for each expert, applied to a `Dispatch`'s buffer."""

    num_experts: int
    features: int
    use_bias: bool
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "G N b K"], dispatch: Dispatch) -> Float[Array, "G N b F"]:
        init = nn.initializers.xavier_uniform(batch_axis=(0,))
        kernel = self.param("kernel", init, (self.num_experts, x.shape[-1], self.features))
        y = dispatch.product(x.astype(self.dtype), kernel.astype(self.dtype))
        if not self.use_bias:
            return y
        bias = self.param("bias", nn.initializers.zeros, (self.num_experts, self.features))
        return y + bias.astype(self.dtype)[dispatch.expert][None, :, None, :]


class MixtureOfExperts(nn.Module):
    """Experts that are each a `FeedForward` of the same fields, and the router, in float32, that chooses among them.

    The weighted auxiliary losses are sown into `losses` (`balance`, `z`), and into `intermediates` each expert's share of the
    choices, `load` [X], and the share of choices dropped, `dropped` []. Padding goes to no expert, takes no capacity, enters
    no loss and comes out as 0.

    Memory of the activations: n rows of E, and of `width` in the hidden layer, where n is B L k plus at most `BLOCK` an expert
    without a capacity, and f B L k with one; and a few integers for each of B L k X.
    """

    routing: TopK
    width: int
    kind: str = "gelu"
    dropout: float = 0.0
    use_bias: bool = True
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B L E"], ctx: Context) -> Float[Array, "B L E"]:
        if self.routing.capacity_factor and ctx.segment_ids is not None:
            raise ValueError(
                f"experts with capacity_factor={self.routing.capacity_factor} count the tokens of a row, of all its documents; "
                "use capacity_factor=0 with packed documents (segment_ids)"
            )
        real = jnp.ones(x.shape[:2], bool) if ctx.mask is None else ctx.mask
        weights, chosen = self._route(x, real, ctx)
        dispatch = self._dispatch(chosen, real)

        def dense(width, name):
            layer = ExpertDense(self.routing.num_experts, width, self.use_bias, self.dtype, name=name)
            return lambda rows: layer(rows, dispatch)

        rows = dispatch.gather(x)
        hidden = lookup(FEED_FORWARDS, self.kind, "model.feed_forward")(rows, self.width, dense)
        hidden = nn.Dropout(self.dropout)(hidden, deterministic=not ctx.train)
        return dispatch.combine(dense(x.shape[-1], "down")(hidden), weights)

    def _route(self, x, real, ctx: Context) -> tuple[Float[Array, "B L k"], Int[Array, "B L k"]]:
        """Weights and numbers of each token's experts; sows the losses."""
        routing, dtype = self.routing, jnp.promote_types(self.dtype, jnp.float32)
        x = x.astype(dtype)
        if ctx.train and routing.jitter:
            low, high = 1 - routing.jitter, 1 + routing.jitter
            x = x * jax.random.uniform(self.make_rng("dropout"), x.shape, dtype, low, high)
        router = nn.Dense(
            routing.num_experts, use_bias=False, dtype=dtype, precision="highest", dot_general=dot_general, name="router"
        )
        logits = router(x)
        probabilities = jax.nn.softmax(logits)
        weights, chosen = jax.lax.top_k(probabilities, routing.k)
        if routing.renormalise:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        self.sow("losses", "balance", routing.balance_weight * balance_loss(probabilities, chosen, real))
        self.sow("losses", "z", routing.z_weight * z_loss(logits, real))
        return weights, chosen

    def _dispatch(self, chosen, real) -> Dispatch:
        routing = self.routing
        limit = routing.capacity_factor
        dispatch = (
            dispatch_limited(chosen, real, routing.num_experts, limit)
            if limit
            else dispatch_all(chosen, real, routing.num_experts)
        )
        self.sow("intermediates", "load", _load(chosen, real, routing.num_experts))
        self.sow("intermediates", "dropped", jnp.sum(dispatch.is_dropped(real)) / (_count(real) * routing.k))
        return dispatch
