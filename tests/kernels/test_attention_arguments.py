"""What `attend` makes of unusual arguments, the same in every implementation, and what it refuses in one line."""

import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.attention import attend, biases, masks
from kernels.attention.api import IMPLEMENTATIONS
from tests.kernels.attention_cases import TESTED_APART

Q, K, V = (jax.random.normal(key, (1, 20, 2, 4)) for key in jax.random.split(jax.random.key(0), 3))


@pytest.mark.parametrize("name", sorted(set(IMPLEMENTATIONS) - TESTED_APART))
@pytest.mark.parametrize("heads", [1, 2])
def test_heads_of_one_mask_are_no_different_from_the_mask(name, heads):
    operands = [x[:, :, :heads] for x in (Q, K, V)]
    alike = attend(*operands, mask=masks.PerHead((masks.Causal(),) * heads), implementation=name)
    np.testing.assert_array_equal(alike, attend(*operands, mask=masks.Causal(), implementation=name))


@pytest.mark.parametrize("name", sorted(set(IMPLEMENTATIONS) - TESTED_APART))
@pytest.mark.parametrize("scale", [0.0, -0.7])
def test_any_finite_scale(name, scale):
    weights = jax.nn.softmax(scale * jnp.einsum("blhd,bshd->bhls", Q, K), axis=-1)
    expected = jnp.einsum("bhls,bshd->blhd", weights, V)
    np.testing.assert_allclose(attend(Q, K, V, scale=scale, implementation=name), expected, atol=1e-6)
    dq = jax.grad(lambda q: attend(q, K, V, scale=scale, implementation=name).sum())(Q)
    assert np.isfinite(dq).all() and (scale != 0 or not dq.any())


def first_key_only(score, q_pos, kv_pos, head, params):
    return score[..., :1]


BAD = {
    "scale": (dict(scale=float("nan")), "scale=nan; give a number"),
    "bias of numbers": (dict(bias=biases.Dense(1.0)), "bias Dense holds 1.0; arrays are expected"),
    "bias that broadcasts": (dict(bias=biases.Function(first_key_only)), r"makes scores \(1, 2, 20, 1\) of \(1, 2, 20, 20\)"),
    "heads": (dict(mask=masks.PerHead((masks.Causal(),) * 3)), "PerHead holds 3 masks"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_refused_in_one_line(options, message):
    with pytest.raises(ValueError, match=message) as error:
        attend(Q, K, V, implementation="reference", **options)
    assert "\n" not in str(error.value)


OF_ANOTHER_TYPE = {
    "attend([1.0], x, x)": "q is list; an array of four axes",
    "attend(x, x, x, scale='a')": "scale='a'; give a number",
    "attend(x, x, x, softcap='a')": "softcap='a'; give a positive number",
    "attend(x, x, x, scale=True)": "scale=True; give a number",
    "attend(x, x, x, softcap=True)": "softcap=True; give a positive number",
    "paged.attend(x[0], x, x, ids.T, ids[0], softcap=True)": "paged.attend: softcap=True; give a positive number",
    "Dropout('x', key)": "Dropout(rate='x'): the rate is a probability",
    "Dropout(None, key)": "Dropout(rate=None): the rate is a probability",
    "attend(x, x, x, dropout=Dropout(0.5, None))": "dropout: its key is None; give one JAX PRNG key",
    "attend(x, x, x, dropout=Dropout(0.5, 3))": "dropout: its key is 3; give one JAX PRNG key",
    "attend(x, x, x, dropout=Dropout(0.5, split(key, 3)))": "dropout: its key is an array key<fry> (3,); give one",
    "attend(x, x, x, dropout=Dropout(0.5, jnp.zeros(2)))": "dropout: its key is an array float32 (2,); give one",
    "attend(x, x, x, segment_ids=[0] * 4)": "segment_ids (queries) is list; an array of integers",
    "attend(x, x, x, segment_ids=(ids,))": "a tuple of 1; give one array, or",
    "masks.Window(2.5)": "Window: size=2.5; a whole number",
    "masks.Strided('a')": "Strided: stride='a'; a whole number",
    "masks.BlockLocal(4, before=True)": "BlockLocal: before=True; a whole number",
    "masks.Band(0, 10**12)": "Band: after=1000000000000; at most 1073741824 is expected",
    "masks.Window(2**20, 2**20)": "use size dilation <= 1073741824",
    "masks.Local2D(2**20, 2**20, 1, 1, 0, 0)": "use height width <= 1073741824",
    "masks.Global((0, 10**12))": "Global: position 1000000000000; at most 1073741824",
    "masks.Blocks(4, 3)": "Blocks(size=4): table=3; give a sequence of rows",
    "masks.Blocks(4, ((0,), ('a',)))": "Blocks(size=4): row 1, ('a',): give a sequence of whole numbers",
    "masks.Causal() & 3": "And: 3 is int; masks combine with masks alone",
}


def test_arguments_of_another_type_are_refused_in_one_line():
    """In a process of its own, without the checking of annotations that the tests switch on."""
    script = f"""
import jax.numpy as jnp
from jax.random import key, split
from kernels.attention import Dropout, attend, masks, paged
x, ids, key = jnp.zeros((1, 4, 2, 8)), jnp.zeros((1, 4), int), key(0)
for expression in {list(OF_ANOTHER_TYPE)!r}:
    try:
        eval(expression)
    except ValueError as error:
        print(str(error).replace(chr(10), "<newline>"))
    else:
        print("accepted")
"""
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == len(OF_ANOTHER_TYPE)
    for line, message in zip(lines, OF_ANOTHER_TYPE.values()):
        assert message in line and "<newline>" not in line
