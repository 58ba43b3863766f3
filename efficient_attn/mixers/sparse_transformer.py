"""Factorised attention of the Sparse Transformer (Child et al. 2019, arXiv 1904.10509)."""

from collections.abc import Callable, Mapping

from efficient_attn.arguments import ConfigError, lookup
from efficient_attn.mixers.attention import Attention
from kernels.attention import masks


class SparseTransformer(Attention):
    """Attention factorised into two patterns that connect all positions in two steps (section 4.3).

    kind: "strided", {i - stride, ..., i} and {j : (i - j) mod stride = 0}; or "fixed", the own block of `stride` positions and
        the last `width` columns of every block.
    stride: l, near sqrt(L); 128 for the paper's images and text.
    width: c, of "fixed": 8, 16 or 32 for l = 128 or 256.
    distinct: each head takes the next `width` columns of a block as its own, as the paper found better.
    integration: how a layer uses the two (section 4.2): "merged", one head's pattern is their union; "heads", the first half
        of the heads has the first pattern; "first" or "second" alone, to be cycled over depth by a tuple of mixer dicts.
    one_sided: without being causal otherwise, leave keys after the query out.
    global_tokens: the first n positions see all and are seen by all, against `one_sided` too. Long Range Arena's encoder is
        `one_sided` with its CLS vector global.

    The paper's model is causal. The bidirectional form has the same patterns without that restriction, two-sided.
    """

    kind: str = "strided"
    stride: int = 128
    width: int = 32
    distinct: bool = True
    integration: str = "merged"
    one_sided: bool = False
    global_tokens: int = 0

    @property
    def shift_invariant(self) -> bool:
        return self.kind == "strided" and not self.global_tokens

    def pattern(self, length: int) -> masks.Mask:
        first, second = lookup(KINDS, self.kind, "model.mixer.kind")
        integrate = lookup(INTEGRATIONS, self.integration, "model.mixer.integration")
        if self.integration == "heads" and self.num_heads < 2:
            raise ConfigError("sparse_transformer: integration='heads' needs num_heads of at least 2, one for each pattern")
        heads = range(self.num_heads)
        pattern = masks.PerHead(tuple(integrate(first(self), second(self, h), 2 * h >= len(heads)) for h in heads))
        if self.one_sided:
            pattern = masks.Causal() & pattern
        if self.global_tokens:
            pattern = masks.Global(tuple(range(min(self.global_tokens, length)))) | pattern
        return pattern


def _fixed_columns(mixer: SparseTransformer, head: int) -> masks.Mask:
    subblocks = max(1, mixer.stride // mixer.width)
    return masks.Fixed(mixer.stride, mixer.width, shift=head % subblocks if mixer.distinct else 0)


KINDS: Mapping[str, tuple[Callable[..., masks.Mask], Callable[..., masks.Mask]]] = {
    "strided": (lambda mixer: masks.Window(mixer.stride + 1), lambda mixer, head: masks.Strided(mixer.stride)),
    "fixed": (lambda mixer: masks.BlockLocal(mixer.stride), _fixed_columns),
}
"""The two patterns: of a mixer, and of a mixer and a head."""

INTEGRATIONS: Mapping[str, Callable[[masks.Mask, masks.Mask, bool], masks.Mask]] = {
    "merged": lambda first, second, in_second_half: first | second,
    "heads": lambda first, second, in_second_half: second if in_second_half else first,
    "first": lambda first, second, in_second_half: first,
    "second": lambda first, second, in_second_half: second,
}
"""A head's pattern, from the two and whether the head is in the second half of the heads."""
