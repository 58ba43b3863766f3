"""Runs PyTorch's attention for benchmarks/attention_speed.py, in a Python of its own that has torch but no JAX.

Arguments: threads, heads, head size. Prints its versions as a line of JSON, then for every line [pass, length] on standard input
runs causal `scaled_dot_product_attention` once, forward or with gradients, and answers "done".
"""

import functools
import json
import sys

import torch


@functools.cache
def operands(length: int, heads: int, head_dim: int) -> tuple[torch.Tensor, ...]:
    """q, k, v and the gradient that arrives."""
    return tuple(torch.randn(1, heads, length, head_dim) for _ in range(4))


def run(which: str, q, k, v, do) -> None:
    """One pass."""
    attend = functools.partial(torch.nn.functional.scaled_dot_product_attention, is_causal=True)
    if which == "forward":
        with torch.no_grad():
            attend(q, k, v)
    else:
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        torch.autograd.grad(attend(*inputs), inputs, do)


def main() -> None:
    threads, *sizes = map(int, sys.argv[1:])
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    print(json.dumps({"torch": torch.__version__, "torch_threads": threads}), flush=True)
    for line in sys.stdin:
        which, length = json.loads(line)
        run(which, *operands(length, *sizes))
        print(json.dumps("done"), flush=True)


if __name__ == "__main__":
    main()
