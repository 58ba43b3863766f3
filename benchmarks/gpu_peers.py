"""Attention by others, for `benchmarks.gpu_attention`: tokamax and PyTorch, each where it is installed and has a GPU.

A contestant is made from (q, k, v, do, mask) and gives two functions without arguments: one runs the forward pass, the other the
backward pass of an earlier forward. PyTorch runs in this process, on arrays of its own, and returns when its GPU is done.
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import jax

Passes = dict[str, Callable[[], Any]]


def tokamax(q, k, v, do, mask: str) -> Passes:
    """tokamax's dot_product_attention in its Mosaic GPU form."""
    from tokamax import dot_product_attention

    options = {"full": {}, "causal": {"is_causal": True}}[mask]
    return jax_passes(lambda q, k, v: dot_product_attention(q, k, v, implementation="mosaic", **options), q, k, v, do)


def jax_passes(run: Callable, q, k, v, do) -> Passes:
    """The two passes of a function of JAX arrays, each compiled."""
    forward = jax.jit(run)
    _, pullback = jax.jit(lambda *qkv: jax.vjp(run, *qkv))(q, k, v)
    backward = jax.jit(lambda pullback, do: pullback(do))
    return {"forward": lambda: forward(q, k, v), "backward": lambda: backward(pullback, do)}


def torch_sdpa(q, k, v, do, mask: str, backend: str) -> Passes:
    """PyTorch's scaled_dot_product_attention in one of its forms, a field of `torch.nn.attention.SDPBackend`."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    causal = {"full": False, "causal": True}[mask]

    def run(q, k, v):
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)

    return _torch_passes(run, q, k, v, do)


def torch_flex(q, k, v, do, mask: str) -> Passes:
    """PyTorch's FlexAttention, compiled, with the mask as a block mask."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    rules = {
        "causal": lambda b, h, q, k: q >= k,
        "window 1K": lambda b, h, q, k: (q >= k) & (q - k < 1024),
    }
    length = q.shape[1]
    blocks = None if mask == "full" else create_block_mask(rules[mask], None, None, length, length, device="cuda")
    compiled = torch.compile(flex_attention)
    return _torch_passes(lambda q, k, v: compiled(q, k, v, block_mask=blocks, enable_gqa=True), q, k, v, do)


def _torch_passes(run, *arrays) -> Passes:
    import torch

    def of(x: jax.Array):
        B, L, H, D = x.shape
        return torch.randn(B, H, L, D, device="cuda", dtype=torch.bfloat16)

    q, k, v, do = map(of, arrays)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = run(*inputs)

    def forward():
        with torch.no_grad():
            run(*inputs)
        return _Done()

    def backward():
        torch.autograd.grad(out, inputs, do, retain_graph=True)
        return _Done()

    return {"forward": forward, "backward": backward}


def torch_decode(B: int, S: int, G: int, group: int, D: int, backend: str) -> Callable[[], Any]:
    """One query of G groups of heads against S keys and values, for each of B sequences, in PyTorch's own layout."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    shapes = (G * group, 1), (G, S), (G, S)
    q, k, v = (torch.randn(B, *shape, D, device="cuda", dtype=torch.bfloat16) for shape in shapes)
    which = {"flash": "FLASH_ATTENTION", "efficient": "EFFICIENT_ATTENTION", "cudnn": "CUDNN_ATTENTION"}[backend]

    def run():
        with torch.no_grad(), sdpa_kernel(getattr(SDPBackend, which)):
            torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=group > 1)
        return _Done()

    return run


class _Done:
    """What `jax.block_until_ready` waits for."""

    def block_until_ready(self):
        import torch

        torch.cuda.synchronize()


PEERS = {
    "tokamax": (tokamax, "tokamax"),
    "torch flash": (functools.partial(torch_sdpa, backend="FLASH_ATTENTION"), "torch"),
    "torch cuDNN": (functools.partial(torch_sdpa, backend="CUDNN_ATTENTION"), "torch"),
    "torch Flex": (torch_flex, "torch"),
}
"""name: (contestant, the package it needs)."""

MASKS = dict.fromkeys(PEERS, ("full", "causal")) | {"torch Flex": ("full", "causal", "window 1K")}


def missing(name: str, mask: str) -> str | None:
    """Why this contestant cannot take part."""
    _, package = PEERS[name]
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    if jax.default_backend() != "gpu":
        return "there is no GPU"
    return None if mask in MASKS[name] else f"not written for the mask {mask!r}"
