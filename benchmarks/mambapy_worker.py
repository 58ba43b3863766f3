"""Runs mambapy's Mamba for benchmarks/selective_scan.py, in a Python of its own that has torch and mambapy but no JAX.

Arguments: threads, width, expand, states. Prints its versions as a line of JSON, then for every line [what, length] on standard
input runs one forward and backward pass and answers "done". The first pass at a length also makes its arrays.
"""

import functools
import json
import sys

import mambapy.mamba
import torch
from mambapy.pscan import pscan


@functools.cache
def block(length: int, width: int, expand: int, states: int):
    """The whole block, and the tensors whose gradients are asked for."""
    module = mambapy.mamba.MambaBlock(mambapy.mamba.MambaConfig(d_model=width, n_layers=1, d_state=states, expand_factor=expand))
    x = torch.randn(1, length, width, requires_grad=True)
    return lambda: module(x), [x, *module.parameters()]


@functools.cache
def scan(length: int, width: int, expand: int, states: int):
    """The selective scan as mambapy computes it: softplus, discretisation, parallel scan, C, D and the gate."""
    channels = width * expand
    u, delta, z = (torch.randn(1, length, channels) for _ in range(3))
    B, C = (torch.randn(1, length, states) for _ in range(2))
    A = -torch.arange(1.0, states + 1).repeat(channels, 1)
    inputs = [u, 0.5 * delta, A, B, C, torch.ones(channels), z, torch.full((channels,), -4.6)]
    u, delta, A, B, C, D, z, bias = (x.requires_grad_() for x in map(torch.clone, inputs))

    def forward():
        dt = torch.nn.functional.softplus(delta + bias)
        h = pscan(torch.exp(dt.unsqueeze(-1) * A), (dt * u).unsqueeze(-1) * B.unsqueeze(2))
        return ((h @ C.unsqueeze(-1)).squeeze(3) + D * u) * torch.nn.functional.silu(z)

    return forward, [u, delta, A, B, C, D, z, bias]


def main() -> None:
    threads, *sizes = map(int, sys.argv[1:])
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    print(json.dumps({"torch": torch.__version__, "torch_threads": threads}), flush=True)
    for line in sys.stdin:
        what, length = json.loads(line)
        forward, inputs = {"scan": scan, "block": block}[what](length, *sizes)
        y = forward()
        torch.autograd.grad(y, inputs, torch.ones_like(y))
        print(json.dumps("done"), flush=True)


if __name__ == "__main__":
    main()
