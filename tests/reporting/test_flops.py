"""Counts of operations against formulas worked by hand, and what a training step needs."""

import functools

import jax
import jax.numpy as jnp
import pytest

from configs import quickstart
from efficient_attn.config import normal_form
from efficient_attn.plan import make_plan, num_parameters
from efficient_attn.reporting import costs, flops


def shape(*sizes: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def product(a, b):
    return a @ b


A, B, SQUARE = shape(8, 16), shape(16, 32), shape(8, 8)

CASES = {
    "product": (product, (A, B), 2 * 8 * 16 * 32),
    "gradients of a product": (jax.grad(lambda a, b: (a @ b).sum(), (0, 1)), (A, B), 3 * 2 * 8 * 16 * 32),
    "batched": (functools.partial(jnp.einsum, "bij,bjk->bik"), (shape(5, 2, 3), shape(5, 3, 4)), 2 * 5 * 2 * 3 * 4),
    "complex product": (product, (shape(8, 16, dtype=jnp.complex64), shape(16, 32, dtype=jnp.complex64)), 8 * 8 * 16 * 32),
    "scan": (lambda a: jax.lax.scan(lambda c, _: (c @ a, None), a, length=7)[0], (SQUARE,), 7 * 2 * 8**3),
    "bounded loop": (lambda a: jax.lax.fori_loop(0, 7, lambda _, c: c @ a, a), (SQUARE,), 7 * 2 * 8**3),
    "rematerialised": (jax.grad(lambda a: jax.checkpoint(lambda a: ((a @ a) ** 2).sum())(a)), (SQUARE,), 4 * 2 * 8**3),
    "larger branch": (lambda a: jax.lax.cond(a[0, 0] > 0, lambda a: a @ a, lambda a: a, a), (SQUARE,), 2 * 8**3),
    "inside jit and vmap": (jax.jit(jax.vmap(product)), (shape(4, 8, 8), shape(4, 8, 8)), 4 * 2 * 8**3),
    "elementwise": (lambda a: jnp.tanh(a) * 2, (A,), 0),
    "convolution": (
        lambda x, k: jax.lax.conv_general_dilated(
            x, k, (1,), "SAME", feature_group_count=6, dimension_numbers=("NWC", "WIO", "NWC")
        ),
        (shape(2, 10, 6), shape(3, 1, 6)),
        2 * 2 * 10 * 6 * 3,
    ),
    "fft": (jnp.fft.fft, (shape(3, 64, dtype=jnp.complex64),), 5 * 3 * 64 * 6),
    "rfft": (jnp.fft.rfft, (shape(3, 64),), 5 * 3 * 64 * 6 / 2),
    "irfft": (jnp.fft.irfft, (shape(3, 33, dtype=jnp.complex64),), 5 * 3 * 64 * 6 / 2),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_operations_are_counted(case):
    fn, arguments, expected = CASES[case]
    assert flops.of(fn, *arguments) == flops.Flops(expected, 0)


def test_a_loop_of_unknown_length_makes_it_a_bound():
    counted = flops.of(lambda a: jax.lax.while_loop(lambda c: c[0, 0] < 3, lambda c: c @ a, a), SQUARE)
    assert counted == flops.Flops(2 * 8**3, 1)
    assert flops.of(lambda a: jax.lax.while_loop(lambda c: c[0, 0] < 3, lambda c: c + a, a), SQUARE) == flops.Flops(0, 0)


def test_a_training_step_costs_six_operations_a_weight_and_token(quick_compile):
    """Of the identity mixer, whose only products are those of its dense layers: 2 forward and 4 backward, for each weight."""
    config = quickstart.get_config("identity")
    config.train.batch_size = 2
    plan, cost = make_plan(config), costs.measure(normal_form(config))
    products = [leaf for path, leaf in jax.tree.leaves_with_path(plan.state.params) if "kernel" in jax.tree_util.keystr(path)]
    weights = sum(leaf.size for leaf in products)
    assert cost["parameters"] == num_parameters(plan) and 0 < weights < cost["parameters"]
    assert cost["flops_per_token"] == 6 * weights and cost["flops_loops"] == 0
    assert cost["step_bytes"] > 3 * 4 * cost["parameters"]  # parameters and two moments, in float32
