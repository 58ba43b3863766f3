"""The Compressive Transformer (Rae et al. 2020, arXiv 1911.05507): what drops out of the memory is compressed and kept."""

from collections.abc import Callable, Mapping
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from efficient_attn.arguments import lookup
from efficient_attn.mixers.attention import to_read_weights
from efficient_attn.mixers.context import MEMORY, Context
from efficient_attn.mixers.transformer_xl import Ids, States, TransformerXL
from kernels.attention import attend

Compressed = tuple[Float[Array, "B n E"], Int[Array, "B n"]]


class CompressiveTransformer(TransformerXL):
    """Attention to [compressed memory, memory, segment]; of c states that leave the memory one compressed state remains.

    Section 3: compressed states come before the memory, each counting as one position, and a state of two documents speaks of the
    later. No gradient of the language model reaches the compression; it learns from its own loss, which in turn reaches nothing
    else. The segment's length must be a multiple of `compression_rate`.

    compressed_length, eval_compressed_length: states of compressed memory, as `memory_length` and its twin.
    compression_rate: c. compression: one of `COMPRESSIONS`.
    auxiliary: one of `LOSSES`, sown into `losses` and weighted by auxiliary_weight.
    """

    compressed_length: int = 128
    eval_compressed_length: int | None = None
    compression_rate: int = 3
    compression: str = "conv"
    auxiliary: str = "attention_reconstruction"
    auxiliary_weight: float = 1.0

    def recall(self, x: Float[Array, "B L E"], ctx: Context) -> tuple[States, Ids]:
        lookup(COMPRESSIONS, self.compression, "model.mixer.compression")
        C = self.compressed_length if ctx.train or self.eval_compressed_length is None else self.eval_compressed_length
        recent, recent_ids = super().recall(x, ctx)
        compressed, compressed_ids = self.stored(x, "compressed", C, ctx)
        if recent.shape[1] and self.compression == "most_used":
            self.variable(MEMORY, "usage", jnp.zeros, recent.shape[:2], jnp.float32)
        if self.is_initializing():  # nothing is remembered yet; the parameters are made all the same
            nothing = jnp.zeros((x.shape[0], self.compression_rate, x.shape[2]), x.dtype)
            self.compress(x, nothing, jnp.zeros(nothing.shape[:2], jnp.int32), jnp.zeros(nothing.shape[:2]))
        return jnp.concatenate([compressed, recent], axis=1), jnp.concatenate([compressed_ids, recent_ids], axis=1)

    def _attend(self, methods: list, places, q, k, v, **options):
        """Attention; where the most used states are kept, also counts how much each of the memory is attended."""
        if self.has_variable(MEMORY, "usage") and self.is_mutable_collection(MEMORY):
            plain = {key: value for key, value in options.items() if key != "dropout"}
            of_scores, identity = to_read_weights(methods, k)
            weights = super()._attend(of_scores, places, q, k, identity, **plain).mean(axis=(1, 2))
            usage = self.get_variable(MEMORY, "usage")
            seen = jax.lax.stop_gradient(weights[:, -q.shape[1] - usage.shape[1] : -q.shape[1]])
            self.put_variable(MEMORY, "usage", usage + seen.astype(jnp.float32))
        return super()._attend(methods, places, q, k, v, **options)

    def remember(self, x: Float[Array, "B L E"], ctx: Context) -> None:
        if x.shape[1] % self.compression_rate:
            raise ValueError(f"model.mixer.compression_rate={self.compression_rate} must divide segments of {x.shape[1]}")
        old, old_ids = self.push("states", jax.lax.stop_gradient(x), self.document_ids(x, ctx))
        compressed, ids = self.compress(x, old, old_ids, self._dropped_usage(x.shape))
        self.push("compressed", jax.lax.stop_gradient(compressed), ids)

    def _dropped_usage(self, shape: tuple[int, ...]) -> Float[Array, "B L"]:
        """How much the states that drop out were attended; states that the segment has just brought start from zero."""
        fresh = jnp.zeros(shape[:2])
        if not self.has_variable(MEMORY, "usage"):
            return fresh
        usage = jnp.concatenate([self.get_variable(MEMORY, "usage"), fresh], axis=1)
        if self.is_mutable_collection(MEMORY):
            self.put_variable(MEMORY, "usage", usage[:, shape[1] :])
        return usage[:, : shape[1]]

    def compress(self, x: Float[Array, "B L E"], old: States, ids: Ids, usage: Float[Array, "B M"]) -> Compressed:
        """`old` with its ids in n / c states, and the loss that the compression learns from."""
        new, new_ids = COMPRESSIONS[self.compression](self, old, ids, usage)
        loss = lookup(LOSSES, self.auxiliary, "model.mixer.auxiliary")
        error = loss(self, jax.lax.stop_gradient(x), old, ids, new, new_ids)
        if error is not None:
            self.sow("losses", self.auxiliary, self.auxiliary_weight * error)
        return new, new_ids

    convolutions: ClassVar[Mapping[str, int]] = {"conv": 1, "dilated_conv": 2}

    def windows(
        self, old: States, ids: Ids, dilation: int = 1
    ) -> tuple[Float[Array, "B n c E"], Bool[Array, "B n c"], Int[Array, "B n"]]:
        """The c states, `dilation` apart, that end with each c-th; which of them are of the document of the last; that document.

        The other states are zero.
        """
        c, n = self.compression_rate, old.shape[1] // self.compression_rate
        offsets = dilation * jnp.arange(1 - c, 1)[None] + c * jnp.arange(1, n + 1)[:, None] - 1
        at, is_there = jnp.maximum(offsets, 0), offsets >= 0
        document = ids[:, c - 1 :: c]
        member = (ids[:, at] == document[..., None]) & is_there[None]
        return jnp.where(member[..., None], old[:, at], 0), member, document


def _max(mixer: CompressiveTransformer, old: States, ids: Ids, usage) -> Compressed:
    states, member, document = mixer.windows(old, ids)
    return jnp.max(jnp.where(member[..., None], states, -jnp.inf), axis=2).astype(old.dtype), document


def _mean(mixer: CompressiveTransformer, old: States, ids: Ids, usage) -> Compressed:
    states, member, document = mixer.windows(old, ids)
    return (states.sum(axis=2) / member.sum(axis=2)[..., None]).astype(old.dtype), document


def _convolution(mixer: CompressiveTransformer, old: States, ids: Ids, usage) -> Compressed:
    """A learned combination of c states. The paper gives no sizes of its dilated convolutions: here every second state."""
    states, _, document = mixer.windows(old, ids, mixer.convolutions[mixer.compression])
    E = old.shape[-1]
    kernel = mixer.param(
        "compress_kernel", nn.initializers.lecun_normal(in_axis=(0, 1), out_axis=2), (mixer.compression_rate, E, E)
    )
    bias = mixer.param("compress_bias", nn.initializers.zeros, (E,))
    return jnp.einsum("bncd,cde->bne", states, kernel.astype(old.dtype)) + bias.astype(old.dtype)[None, None], document


def _most_used(mixer: CompressiveTransformer, old: States, ids: Ids, usage) -> Compressed:
    """The n / c states that were attended most, in their order."""
    _, best = jax.lax.top_k(jnp.where(ids > 0, usage, -1.0), old.shape[1] // mixer.compression_rate)
    best = jnp.sort(best, axis=1)
    return jnp.take_along_axis(old, best[..., None], axis=1), jnp.take_along_axis(ids, best, axis=1)


COMPRESSIONS: Mapping[str, Callable] = {
    "max": _max, "mean": _mean, "conv": _convolution, "dilated_conv": _convolution, "most_used": _most_used,
}  # fmt: skip
"""(mixer, states leaving the memory [B, n, E], their ids, their usage) -> n / c states and their ids (section 3.1)."""


def _attention_reconstruction(
    mixer: CompressiveTransformer, x, old: States, ids: Ids, new: Float[Array, "B n E"], new_ids: Int[Array, "B n"]
):
    """Mean square of attention(x, old) - attention(x, new), by content alone; only the compression learns (algorithm 2)."""
    frozen = jax.lax.stop_gradient(mixer.variables["params"]) if not mixer.is_initializing() else None
    if frozen is None:
        return None

    def heads(name: str, states):
        y = jnp.einsum("ble,ehd->blhd", states, frozen[name]["kernel"].astype(states.dtype))
        return y + frozen[name]["bias"].astype(states.dtype)[None, None] if mixer.use_bias else y

    def read(states, state_ids):
        segments = jnp.ones(x.shape[:2], jnp.int32), (state_ids > 0).astype(jnp.int32)
        return attend(heads("query", x), heads("key", states), heads("value", states), segment_ids=segments)

    return jnp.mean(jnp.square((read(old, ids) - read(new, new_ids)).astype(jnp.float32)))


def _auto_encoding(
    mixer: CompressiveTransformer, x, old: States, ids: Ids, new: Float[Array, "B n E"], new_ids: Int[Array, "B n"]
):
    """Mean square of old - g(new), g a learned linear map of one state to c (algorithm 1's loss, section 3.2)."""
    E = old.shape[-1]
    decoded = nn.DenseGeneral((mixer.compression_rate, E), dtype=old.dtype, name="decompress")(new).reshape(old.shape)
    real = (ids > 0)[..., None]
    error = jnp.sum(jnp.square(jnp.where(real, old - decoded, 0).astype(jnp.float32)))
    return error / jnp.maximum(E * jnp.sum(real), 1)


LOSSES: Mapping[str, Callable] = {
    "attention_reconstruction": _attention_reconstruction, "auto_encoding": _auto_encoding, "none": lambda *_: None
}  # fmt: skip
"""(mixer, segment, states leaving the memory and their ids, compressed states and theirs) -> what the compression minimises."""
