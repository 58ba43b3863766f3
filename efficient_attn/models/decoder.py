"""The decoder-only language model."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from efficient_attn.arguments import lookup
from efficient_attn.losses import Unprojected
from efficient_attn.mixers import MIXERS
from efficient_attn.mixers.context import Context
from efficient_attn.models.trunk import Trunk, mixers_by_depth
from kernels import mesh


class LanguageModel(Trunk):
    """Scores of the next token at every position (causal mixers only, which `build` checks).

    tied: the output layer is the transpose of the token vectors (Press & Wolf 2017).

    With `project=False` the output layer is left to the caller, who need not hold the logits of all positions at once.

    With `ctx.decode` the `cache` collection carries what came before: initialise it with a full-length input, then apply one
    token or one chunk at a time with `mutable=["cache"]`.
    """

    tied: bool = False

    @property
    def has_memory(self) -> bool:
        """Whether a layer carries state from segment to segment."""
        mixers = mixers_by_depth(self.mixer, self.depth)
        return any(getattr(lookup(MIXERS, m.get("name"), "model.mixer.name").constructor, "has_memory", False) for m in mixers)

    @nn.compact
    def __call__(self, inputs: Int[Array, "B L"], ctx: Context, *, project: bool = True) -> Float[Array, "B L V"] | Unprojected:
        if ctx.decode and ctx.positions is None:
            ctx = ctx.replace(positions=self._advance(inputs))
        embed = self.input_layer()
        x = embed(inputs)
        ctx = self.sample_positions(x, ctx)
        hidden = self.blocks(self.add_positions(x, ctx), ctx)
        layer, method = embed, "attend"
        if not self.tied:
            layer = nn.Dense(self.num_outputs, use_bias=self.use_bias, dtype=jnp.float32, name="head")
            method = "__call__"
        if project:
            logits = getattr(layer, method)(hidden).astype(jnp.float32)
            return mesh.constrain(logits, mesh.ROWS, mesh.SEQ, mesh.FREE)
        module, variables = layer.unbind()

        def logits(params, hidden):
            return module.apply({"params": params}, hidden, method=method).astype(jnp.float32)

        return Unprojected(hidden, variables["params"], logits)

    def _advance(self, inputs: Int[Array, "B L"]) -> Int[Array, "B L"]:
        """Positions of this chunk; the cache remembers where the next one starts."""
        batch, length = inputs.shape
        is_filled = self.has_variable("cache", "index")
        index = self.variable("cache", "index", jnp.zeros, (batch,), jnp.int32)
        positions = index.value[:, None] + jnp.arange(length, dtype=jnp.int32)[None, :]
        if is_filled:
            index.value = index.value + length
        return positions
