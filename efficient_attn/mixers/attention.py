"""Multi-head attention around any function of queries, keys and values."""

import functools
from collections.abc import Callable, Mapping, Sequence

import flax.linen as nn
import jax.numpy as jnp
from flax.core import FrozenDict
from flax.typing import Dtype
from jaxtyping import Array, Float, Int

from efficient_attn import positions
from efficient_attn.arguments import ConfigError, lookup
from efficient_attn.mixers import kv_cache
from efficient_attn.mixers.context import Context
from efficient_attn.positions import Places, Sizes
from kernels.attention import Dropout, attend, masks, paged
from kernels.matmul import dot_general

AttentionFunction = Callable[..., Float[Array, "B L H Dv"]]


def softmax(q, k, v, **options):
    """Exact softmax attention (Vaswani et al. 2017, eq. 1); options are those of `kernels.attention.attend`."""
    return attend(q, k, v, **options)


def to_read_weights(methods: Sequence, k: Float[Array, "B S G D"]) -> tuple[list, Float[Array, "B S G S"]]:
    """Position methods and values, the identity matrix, with which attention returns what it weighs values by: [B, L, H, S]."""
    methods = [method.of_scores() if hasattr(method, "of_scores") else method for method in methods]
    identity = jnp.eye(k.shape[1], dtype=k.dtype)[None, :, None]
    return methods, jnp.broadcast_to(identity, (*k.shape[:3], k.shape[1]))


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017, section 3.2.2), grouped-query where `num_kv_heads` < `num_heads`.

    num_heads: H query heads.
    num_kv_heads: G key/value heads, a divisor of H (Ainslie et al. 2023); None means H.
    head_dim: D; None means E / H.
    causal: position i attends only positions <= i.
    rotation: what is done to queries and keys, by name from `positions.ROTATIONS`.
    bias: what is done to scores, by name from `positions.BIASES`; besides the model's own (`ctx.bias`), if there is one.
    scale: what scores are multiplied by; None means 1 / sqrt(D). T5 uses 1.
    dropout: rate on attention weights while training.
    use_bias: biases on the four projections.
    implementation: of `kernels.attention.attend`; None means the fastest for the platform.
    function: the mechanism, chosen by the entry in `MIXERS`.
    """

    num_heads: int = 4
    num_kv_heads: int | None = None
    head_dim: int | None = None
    causal: bool = False
    rotation: Mapping = FrozenDict(name="none")
    bias: Mapping = FrozenDict(name="none")
    scale: float | None = None
    dropout: float = 0.0
    use_bias: bool = True
    implementation: str | None = None
    function: AttentionFunction = softmax
    dtype: Dtype = jnp.float32

    shift_invariant = True
    """Whether the pattern depends on distances alone, so that it is the same wherever a packed document starts."""

    @nn.compact
    def __call__(self, x: Float[Array, "B L E"], ctx: Context) -> Float[Array, "B L E"]:
        heads, kv_heads, head_dim = self._sizes(x.shape[-1])
        q = self._dense((heads, head_dim), "query")(x)
        k = self._dense((kv_heads, head_dim), "key")(x)
        v = self._dense((kv_heads, head_dim), "value")(x)
        methods = self._position_methods(x.shape[-1], ctx)
        if ctx.decode:
            out = self._decode(methods, q, k, v, ctx)
        else:
            places = Places.of_tokens(x.shape[1], ctx.positions, ctx.groups(), causal=self.causal)
            options = dict(mask=self.mask(x.shape[1]), segment_ids=ctx.groups())
            if ctx.train and self.dropout:
                options["dropout"] = Dropout(self.dropout, self.make_rng("dropout"))
            if not self.shift_invariant and ctx.segment_ids is not None:
                options |= dict.fromkeys(("q_positions", "kv_positions"), ctx.document_positions())
            out = self._attend(methods, places, q, k, v, **options)
        return self._dense(x.shape[-1], "out", axis=(-2, -1))(out)

    def pattern(self, length: int) -> masks.Mask:
        """Which keys of a sequence of `length` tokens a query sees, causality apart; mechanisms with a pattern override this."""
        return masks.Full()

    def mask(self, length: int) -> masks.Mask:
        """The pattern, and causality where the mixer is causal."""
        pattern = self.pattern(length)
        if not self.causal:
            return pattern
        return masks.Causal() if pattern == masks.Full() else masks.Causal() & pattern

    def _sizes(self, width: int) -> tuple[int, int, int]:
        kv_heads = self.num_kv_heads or self.num_heads
        if self.num_heads % kv_heads:
            raise ValueError(f"num_heads={self.num_heads} must be a multiple of num_kv_heads={kv_heads}")
        if self.head_dim is None and width % self.num_heads:
            raise ValueError(f"width {width} is not divisible by num_heads={self.num_heads}; set head_dim")
        return self.num_heads, kv_heads, self.head_dim or width // self.num_heads

    def _dense(self, features, name: str, axis=-1) -> nn.DenseGeneral:
        init = nn.initializers.xavier_uniform()
        return nn.DenseGeneral(
            features, axis=axis, use_bias=self.use_bias, dtype=self.dtype, kernel_init=init, dot_general=dot_general, name=name
        )

    def _position_methods(self, width: int, ctx: Context) -> list:
        """The rotation, and what learned position methods there are: the model's and the mixer's own."""
        sizes = self.position_sizes(width)
        rotation = positions.build(positions.ROTATIONS, self.rotation, "model.mixer.rotation")
        own = positions.build(positions.BIASES, self.bias, "model.mixer.bias", name="position_bias")(sizes)
        return [rotation, *(method for method in (ctx.bias, own) if method is not None)]

    def position_sizes(self, width: int) -> Sizes:
        """What a position bias of this mixer is built for."""
        heads, _, head_dim = self._sizes(width)
        return Sizes(heads, head_dim, width, self.causal)

    def _attend(self, methods: list, places: Places, q, k, v, **options) -> Float[Array, "B L H Dv"]:
        """The mechanism's function inside its position methods, the first of them outermost."""
        function = functools.partial(self.function, implementation=self.implementation)
        if self.scale is not None:
            options["scale"] = self.scale
        for method in reversed(methods):
            function = functools.partial(method.attend, function, places)
        return function(q, k, v, **options)

    def _rotate(self, x: Float[Array, "B L H D"], at: Int[Array, "B L"]) -> Float[Array, "B L H D"]:
        """x turned to its positions, for mechanisms that call attention themselves; what is more than that is an error."""
        rotation = positions.build(positions.ROTATIONS, self.rotation, "model.mixer.rotation")
        if not rotation.is_plain:
            raise ConfigError(f"model.mixer.rotation (name={self.rotation['name']!r}) does not go with this mechanism")
        bias = self.bias.get("name")
        lookup(positions.BIASES, bias, "model.mixer.bias.name")
        if bias != "none":
            raise ConfigError(f"model.mixer.bias (name={bias!r}) does not go with this mechanism")
        return rotation.rotate(x, at, at[:, -1:] + 1)

    def _decode(self, methods: list, q, k, v, ctx: Context):
        """Append a chunk of keys and values to the cache and attend all of it.

        Rows may stand at different positions. Slots not yet written lie after every query, so causality hides them. Initialise
        with a full-length input: its length is the size of the cache.
        """
        if not self.causal:
            raise ValueError("only causal attention decodes token by token; set causal=True")
        is_filled = self.has_variable("cache", "cache_index")
        cache = kv_cache.of(self, k, v, ctx)
        if not is_filled:
            slots = k.shape[1]
            return self._attend(methods, Places.in_order(slots, slots, causal=True), q, k, v, mask=self.mask(slots))
        at = cache.index.value[:, None] + jnp.arange(q.shape[1], dtype=jnp.int32)[None, :]
        methods, q, k = self._turned(methods, q, k, at)
        cache.append(k, v, at)
        slots, is_softmax = cache.slots, not methods and self.function is softmax
        is_plain = q.shape[1] == 1 and is_softmax and self.mask(slots) == masks.Causal()
        if is_plain and (ctx.paging is not None or (self.implementation is None and cache.attends_in_place(q))):
            name = self.implementation if self.implementation in paged.IMPLEMENTATIONS else None
            return cache.attend(q, scale=self.scale, implementation=name)
        keys, values = cache.read()
        places = Places.of_cache(at, slots)
        options = dict(q_positions=places.q, kv_positions=jnp.broadcast_to(places.kv, (len(at), slots)))
        return self._attend(methods, places, q, keys, values, mask=self.mask(slots), **options)

    def _turned(self, methods: list, q, k, at: Int[Array, "B L"]) -> tuple:
        """The position methods left to apply, and queries and keys at positions `at` as far as that is done once for each.

        Keys are cached after rotations that go by the position alone; those that go by the length so far turn all of them anew.
        """
        rotation, *others = methods
        if not rotation.is_plain:
            return methods, q, k
        return others, *(rotation.rotate(x, at, at[:, -1:] + 1) for x in (q, k))
