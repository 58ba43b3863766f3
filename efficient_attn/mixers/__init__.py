"""Every sequence mixer, by the name that `config.model.mixer = dict(name=...)` uses.

A mixer is a Flax module `__call__(x: [B, L, E], ctx: Context) -> [B, L, E]` whose fields are the other keys of that dict.
To add one: write the module (or, for a function of q, k, v alone, the function) in a file of its own and enter it here;
the contract tests in `tests/mixers/test_contract.py` then hold it to what its entry claims.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from efficient_attn.arguments import ConfigError, check_arguments, lookup
from efficient_attn.mixers.adaptive_span import AdaptiveSpan
from efficient_attn.mixers.attention import Attention
from efficient_attn.mixers.bigbird import BigBird
from efficient_attn.mixers.blockbert import BlockBERT
from efficient_attn.mixers.bp_transformer import BPTransformer
from efficient_attn.mixers.combiner import Combiner
from efficient_attn.mixers.compressive_transformer import CompressiveTransformer
from efficient_attn.mixers.context import Context
from efficient_attn.mixers.dss import DSS
from efficient_attn.mixers.fnet import FNet
from efficient_attn.mixers.gaussian import HardCodedGaussian
from efficient_attn.mixers.global_local import GlobalLocal
from efficient_attn.mixers.h_transformer import HTransformer1D
from efficient_attn.mixers.identity import Identity
from efficient_attn.mixers.image_local import ImageLocal1D, ImageLocal2D
from efficient_attn.mixers.infinite_former import InfiniteFormer
from efficient_attn.mixers.linear_attention import LinearAttention
from efficient_attn.mixers.linformer import REFUSES_DOCUMENTS as LINFORMER_DOCUMENTS
from efficient_attn.mixers.linformer import Linformer
from efficient_attn.mixers.local import BlockLocal, Local
from efficient_attn.mixers.longformer import Longformer
from efficient_attn.mixers.lru import LRU
from efficient_attn.mixers.luna import REFUSES_DOCUMENTS as LUNA_DOCUMENTS
from efficient_attn.mixers.luna import Luna
from efficient_attn.mixers.mamba import Mamba
from efficient_attn.mixers.mamba2 import Mamba2
from efficient_attn.mixers.nystrom import REFUSES_DOCUMENTS as NYSTROM_DOCUMENTS
from efficient_attn.mixers.nystrom import NystromAttention
from efficient_attn.mixers.performer import Performer
from efficient_attn.mixers.reformer import Reformer
from efficient_attn.mixers.rfa import RFA, GatedRFA
from efficient_attn.mixers.routing import REFUSES_DOCUMENTS as ROUTING_DOCUMENTS
from efficient_attn.mixers.routing import Routing
from efficient_attn.mixers.s4 import S4
from efficient_attn.mixers.s4d import S4D
from efficient_attn.mixers.s4nd import REFUSES_DOCUMENTS, S4ND
from efficient_attn.mixers.s5 import S5
from efficient_attn.mixers.scatterbrain import REFUSES_DOCUMENTS as SCATTERBRAIN_DOCUMENTS
from efficient_attn.mixers.scatterbrain import Scatterbrain
from efficient_attn.mixers.scfa import SCFA
from efficient_attn.mixers.sinkhorn import REFUSES_DOCUMENTS as SINKHORN_DOCUMENTS
from efficient_attn.mixers.sinkhorn import Sinkhorn
from efficient_attn.mixers.smyrf import REFUSES_DOCUMENTS as SMYRF_DOCUMENTS
from efficient_attn.mixers.smyrf import Smyrf
from efficient_attn.mixers.sparse_transformer import SparseTransformer
from efficient_attn.mixers.synthesizer import Synthesizer
from efficient_attn.mixers.transformer_xl import ErnieDoc, TransformerXL

__all__ = ["MIXERS", "S5", "Attention", "Context", "Entry", "Identity", "build", "state_size"]


@dataclasses.dataclass(frozen=True)
class Entry:
    """A mechanism and what it claims, which the contract tests hold it to.

    constructor: the Flax module.
    cost: time in the sequence length L.
    function: for `Attention`, the function of q, k, v that it is built around.
    causal, bidirectional: which forms the mechanism has.
    decode: it continues token by token from the `cache` collection, equal to the parallel form.
    length_dependent: the pattern is laid out over the whole row (say, in n parts), so that a document sees other parts of
        itself in a longer row, padded or packed, than alone.
    content_based: the tokens themselves decide which of the pattern's positions a position sees, and rounding may for a few
        tokens decide otherwise.
    by_fft: it convolves by FFT, whose rounding reaches every position: causal but for that.
    refuses_documents: why packed documents (segment_ids) are an error; "" where they are kept apart.
    bidirectional_refuses_documents: the same of the bidirectional form alone, of a mechanism that keeps them apart when causal.
    recall: how far above chance two layers get on associative recall in the contract test's short training,
        or the reason why the mechanism cannot.
    """

    constructor: Callable[..., nn.Module]
    cost: str
    causal: bool = True
    bidirectional: bool = True
    decode: bool = True
    length_dependent: bool = False
    content_based: bool = False
    by_fft: bool = False
    refuses_documents: str = ""
    bidirectional_refuses_documents: str = ""
    recall: float | str = "not measured"
    function: Callable | None = None


_BIDIRECTIONAL = "bidirectional only, and the test's task is autoregressive"
_SUMS = "sums keep every key in few features: near chance after so short a training"
_ONE_SEGMENT = (
    "in one segment it is attention with Transformer-XL's positions, which so short a training does not teach to recall"
)
_TIME_INVARIANT = "time-invariant: what it stores does not depend on the content"

MIXERS: Mapping[str, Entry] = {
    "softmax": Entry(Attention, cost="L^2", recall=0.3),
    "local": Entry(Local, cost="L window", recall=0.3),
    "block_local": Entry(BlockLocal, cost="L block_size", recall=0.3),
    "image_local_1d": Entry(ImageLocal1D, cost="L (query_block + memory)", recall=0.3),
    "image_local_2d": Entry(ImageLocal2D, cost="L (query rectangle + memory)", recall=0.3),
    "blockbert": Entry(
        BlockBERT, cost="L^2 / num_blocks", causal=False, decode=False, length_dependent=True, recall=_BIDIRECTIONAL
    ),
    "sparse_transformer": Entry(SparseTransformer, cost="L (stride + L / stride)", recall=0.2),
    "longformer": Entry(Longformer, cost="L (window + global_tokens)", recall=0.2),
    "bigbird": Entry(BigBird, cost="L block_size", causal=False, decode=False, length_dependent=True, recall=_BIDIRECTIONAL),
    "etc": Entry(GlobalLocal, cost="L (radius + global_tokens)", causal=False, decode=False, recall=_BIDIRECTIONAL),
    "gaussian": Entry(HardCodedGaussian, cost="L", recall="weights are fixed: what is read does not depend on the content"),
    "synthesizer": Entry(Synthesizer, cost="L^2", recall="a token is not compared with those it reads from"),
    "s5": Entry(S5, cost="L", recall=_TIME_INVARIANT),
    "s4": Entry(S4, cost="L log L", by_fft=True, recall=_TIME_INVARIANT),
    "s4d": Entry(S4D, cost="L log L", by_fft=True, recall=_TIME_INVARIANT),
    "dss": Entry(DSS, cost="L log L", by_fft=True, recall=_TIME_INVARIANT),
    "lru": Entry(LRU, cost="L", recall=_TIME_INVARIANT),
    "s4nd": Entry(
        S4ND, cost="L log L", causal=False, decode=False, by_fft=True, refuses_documents=REFUSES_DOCUMENTS, recall=_BIDIRECTIONAL
    ),
    "mamba": Entry(Mamba, cost="L", recall=0.3),
    "mamba2": Entry(Mamba2, cost="L", recall=0.3),
    "linear_attention": Entry(LinearAttention, cost="L", recall="one sum keeps every key: near chance after so short a training"),
    "fnet": Entry(
        FNet,
        cost="L log L",
        causal=False,
        decode=False,
        length_dependent=True,
        refuses_documents=FNet.refuses_documents,
        recall=_BIDIRECTIONAL,
    ),
    "reformer": Entry(
        Reformer,
        cost="L log L + L rounds chunk_size",
        decode=False,
        length_dependent=True,
        content_based=True,
        recall="new hashes at every step: few of them let a query see what it needs in so short a training",
    ),
    "routing": Entry(
        Routing,
        cost="L (num_clusters + L / num_clusters + block_size)",
        decode=False,
        length_dependent=True,
        content_based=True,
        refuses_documents=ROUTING_DOCUMENTS,
        recall=0.2,
    ),
    "sinkhorn": Entry(
        Sinkhorn,
        cost="L block_size + L^2 / block_size",
        length_dependent=True,
        refuses_documents=SINKHORN_DOCUMENTS,
        recall="tokens of other blocks come mixed, and so short a training does not learn to sort them",
    ),
    "smyrf": Entry(
        Smyrf,
        cost="L log L + L rounds cluster_size",
        causal=False,
        decode=False,
        length_dependent=True,
        content_based=True,
        refuses_documents=SMYRF_DOCUMENTS,
        recall=_BIDIRECTIONAL,
    ),
    "scfa": Entry(
        SCFA,
        cost="L^2 / num_buckets",
        content_based=True,
        recall="its own key is the nearest to every query, so that a token mostly reads itself",
    ),
    "h_transformer_1d": Entry(
        HTransformer1D,
        cost="L block_size; causal: L block_size log L",
        refuses_documents=HTransformer1D.refuses_documents,
        recall=0.3,
    ),
    "performer": Entry(Performer, cost="L num_features", recall=_SUMS),
    "combiner": Entry(
        Combiner,
        cost="L (size + L / size); logsparse: L log L",
        refuses_documents=Combiner.refuses_documents,
        recall="far tokens are read through maxima of keys: near chance after so short a training",
    ),
    "rfa": Entry(RFA, cost="L num_features", recall=_SUMS),
    "rfa_gate": Entry(GatedRFA, cost="L num_features", bidirectional=False, recall=_SUMS),
    "luna": Entry(Luna, cost="L packed_length", bidirectional_refuses_documents=LUNA_DOCUMENTS, recall=_SUMS),
    "scatterbrain": Entry(
        Scatterbrain, cost="L (block_size + num_features)", refuses_documents=SCATTERBRAIN_DOCUMENTS, recall=_SUMS
    ),
    "linformer": Entry(
        Linformer,
        cost="L projected_length",
        causal=False,
        decode=False,
        refuses_documents=LINFORMER_DOCUMENTS,
        recall=_BIDIRECTIONAL,
    ),
    "nystrom": Entry(
        NystromAttention,
        cost="L num_landmarks",
        causal=False,
        decode=False,
        length_dependent=True,
        refuses_documents=NYSTROM_DOCUMENTS,
        recall=_BIDIRECTIONAL,
    ),
    "adaptive_span": Entry(AdaptiveSpan, cost="L max_span", recall=0.3),
    "bp_transformer": Entry(
        BPTransformer,
        cost="L log L + L neighbours log(L / neighbours)",
        refuses_documents=BPTransformer.refuses_documents,
        recall=0.3,
    ),
    "transformer_xl": Entry(TransformerXL, cost="L (L + memory_length)", recall=_ONE_SEGMENT),
    "ernie_doc": Entry(ErnieDoc, cost="L (L + memory_length)", recall=_ONE_SEGMENT),
    "compressive_transformer": Entry(
        CompressiveTransformer, cost="L (L + memory_length + compressed_length)", recall=_ONE_SEGMENT
    ),
    "infinite_former": Entry(InfiniteFormer, cost="L (L + memory_length + num_basis)", recall=_ONE_SEGMENT),
    "identity": Entry(Identity, cost="L", recall="mixes nothing: every position sees itself alone"),
}


def build(mixer: Mapping[str, Any], **injected: Any) -> nn.Module:
    """The module that a mixer dict describes. `injected` is what the model adds: `name`, `dtype`.

    Raises `ConfigError` for an unknown name or argument, or a form (causal or not) that the mechanism lacks.
    """
    arguments = dict(mixer)
    name = arguments.pop("name", None)
    entry = lookup(MIXERS, name, "model.mixer.name")
    check_arguments(entry.constructor, arguments, f"model.mixer (name={name!r})")
    causal = arguments.get("causal", False)
    if not (entry.causal if causal else entry.bidirectional):
        raise ConfigError(f"mixer {name!r} has no {'causal' if causal else 'bidirectional'} form")
    if entry.function is not None:
        injected["function"] = entry.function
    return entry.constructor(**arguments, **injected)


def state_size(mixer: Mapping[str, Any], length: int, width: int) -> int:
    """Bytes one sequence of `length` tokens leaves behind for decoding the next: its decode cache, in float32."""
    module = build(mixer)
    x = jax.ShapeDtypeStruct((1, length, width), np.float32)
    variables = jax.eval_shape(lambda x: module.init(jax.random.key(0), x, Context(decode=True)), x)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(variables.get("cache", {})))
