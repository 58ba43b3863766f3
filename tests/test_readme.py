"""The code that the README shows, run as it stands there."""

import pathlib
import textwrap

import jax
import jax.numpy as jnp
import numpy as np

README = pathlib.Path(__file__).parent.parent / "README.md"


def block(first_line: str) -> str:
    """The indented block that starts with `first_line`, up to the next line of text."""
    lines = README.read_text().split("\n")
    start = lines.index("    " + first_line)
    end = next(i for i in range(start, len(lines)) if lines[i] and not lines[i].startswith("    "))
    return textwrap.dedent("\n".join(lines[start:end]))


def test_a_pattern_and_a_bias_of_ones_own():
    q, k, v = (jax.random.normal(key, (2, 150, 4, 8)) for key in jax.random.split(jax.random.key(0), 3))
    slopes = jnp.array([0.5, 0.25, 0.125, 0.0625])
    source = block("from kernels.attention import attend, biases, masks")

    def run(slopes):
        names = {"q": q, "k": k, "v": v, "slopes": slopes}
        exec(source, names)
        return names["out"]

    i, j = np.mgrid[:150, :150]
    ragged = (j <= i) & ((abs(i - j) < 64) | (i <= 1) | (j <= 1) | ((i - j) % 128 == 0))
    allowed = ragged | ((j <= i) & ((i - j) % 7 != 3))
    scores = jnp.einsum("blhd,bshd->bhls", q, k) / 8**0.5 - slopes[None, :, None, None] * abs(i - j)[None, None]
    weights = jax.nn.softmax(jnp.where(allowed[None, None], scores, -jnp.inf), axis=-1)
    np.testing.assert_allclose(run(slopes), jnp.einsum("bhls,bshd->blhd", weights, v), atol=1e-5)
    assert np.all(jax.grad(lambda slopes: (run(slopes) ** 2).sum())(slopes) != 0)
