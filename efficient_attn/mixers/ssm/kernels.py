"""Forms of discrete state-space models: recurrence, convolution kernel, and the sums that structured kernels reduce to."""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Complex, Float, Inexact, Int


def recurrence(
    A_bar: Inexact[Array, "n n"], B_bar: Inexact[Array, "n"], C: Inexact[Array, "n"], u: Float[Array, "L"]
) -> Inexact[Array, "L"]:
    """x_k = A_bar x_{k-1} + B_bar u_k, y_k = C x_k, from x = 0 (Gu et al. 2022, eq. 3)."""

    def step(x, u_k):
        x = A_bar @ x + B_bar * u_k
        return x, C @ x

    return lax.scan(step, jnp.zeros_like(B_bar), u)[1]


def kernel(A_bar: Inexact[Array, "n n"], B_bar: Inexact[Array, "n"], C: Inexact[Array, "n"], length: int) -> Inexact[Array, "L"]:
    """K = (C B_bar, C A_bar B_bar, C A_bar^2 B_bar, ...), with which y = K * u (Gu et al. 2022, eq. 5): n^2 a step."""
    return lax.scan(lambda x, _: (A_bar @ x, C @ x), B_bar, length=length)[1]


def vandermonde(c: Complex[Array, "E n"], log_A: Complex[Array, "E n"], length: int) -> Float[Array, "E L"]:
    """K_l = Re sum_n c_n A_n^l for l = 0 .. length-1: the kernel of a diagonal system (Gu et al. 2022, S4D, eq. 4).

    With l = i T + j, A^l = A^(iT) A^j is a product of two Vandermonde matrices of about sqrt(length) rows. So the sum is one
    matrix product for each channel, and neither length * n exponentials are taken nor length * n numbers stored.
    """
    T = 2 ** math.ceil(math.log2(length) / 2)
    rows = -(-length // T)
    giant = c[:, None, :] * _powers(log_A, T * jnp.arange(rows))
    baby = _powers(log_A, jnp.arange(T))
    giant = jnp.concatenate([giant.real, -giant.imag], axis=-1)
    baby = jnp.concatenate([baby.real, baby.imag], axis=-1)
    return jnp.einsum("ein,ejn->eij", giant, baby).reshape(c.shape[0], rows * T)[:, :length]


def _powers(log_A: Complex[Array, "E n"], exponents: Int[Array, "l"]) -> Complex[Array, "E l n"]:
    return jnp.exp(log_A[:, None, :] * exponents.astype(log_A.real.dtype)[None, :, None])


CAUCHY_BLOCK = {"cpu": 2**17}
"""Elements of the Cauchy matrix at a time: on CPUs what stays in a core's cache, several times faster than all at once."""
DEFAULT_CAUCHY_BLOCK = 2**26


@jax.custom_vjp
def cauchy(
    v: Complex[Array, "m E n"], x: Complex[Array, "E n"], sine: Float[Array, "L"], cosine: Float[Array, "L"]
) -> Complex[Array, "m E L"]:
    """sum_n v_n / (i s - c x_n) at each node (s, c), which is a constant.

    The Cauchy kernel of S4 (Gu et al. 2022, section 3.3) with numerator and denominator multiplied by c: the nodes i s / c of
    the paper are infinite at c = 0, these nowhere. The `m` sums share their denominators, of which at most a block exists at a
    time. The gradient by x, v c / (i s - c x)^2, is written out because that of real arithmetic overflows for x below 1e-9.
    """
    return jnp.swapaxes(_over_channels(_cauchy, sine, cosine, jnp.swapaxes(v, 0, 1), x), 0, 1)


def _forward(v, x, sine, cosine):
    return cauchy(v, x, sine, cosine), (v, x, sine, cosine)


def _backward(residuals, g):
    v, x, sine, cosine = residuals
    dv, dx = _over_channels(_cauchy_gradient, sine, cosine, jnp.swapaxes(v, 0, 1), x, jnp.swapaxes(g, 0, 1))
    return jnp.swapaxes(dv, 0, 1), dx, None, None


cauchy.defvjp(_forward, _backward)


def _over_channels(fn, sine, cosine, *arrays):
    """fn(sine, cosine, *channel) for each channel, the first axis of `arrays`, as many at a time as fit into a block."""
    channels, n = arrays[1].shape
    block = CAUCHY_BLOCK.get(jax.default_backend(), DEFAULT_CAUCHY_BLOCK) // (n * sine.shape[0])
    return lax.map(lambda channel: fn(sine, cosine, *channel), arrays, batch_size=min(max(block, 1), channels))


def _cauchy(
    s: Float[Array, "L"], c: Float[Array, "L"], v: Complex[Array, "m n"], x: Complex[Array, "n"]
) -> Complex[Array, "m L"]:
    return _product(v, *_inverse(s, c, x))


def _cauchy_gradient(
    s: Float[Array, "L"], c: Float[Array, "L"], v: Complex[Array, "m n"], x: Complex[Array, "n"], g: Complex[Array, "m L"]
) -> tuple[Complex[Array, "m n"], Complex[Array, "n"]]:
    re, im = _inverse(s, c, x)
    by_square = _product(g, (c[None] * (re * re - im * im)).T, (2 * c[None] * re * im).T)
    return _product(g, re.T, im.T), jnp.sum(v * by_square, axis=0)


def _inverse(
    s: Float[Array, "L"], c: Float[Array, "L"], x: Complex[Array, "n"]
) -> tuple[Float[Array, "n L"], Float[Array, "n L"]]:
    """Real and imaginary part of 1 / (i s - c x)."""
    re = -x.real[:, None] * c[None]
    im = s[None] - x.imag[:, None] * c[None]
    scale = 1 / (re * re + im * im)
    return re * scale, -im * scale


def _product(a: Complex[Array, "m k"], re: Float[Array, "k l"], im: Float[Array, "k l"]) -> Complex[Array, "m l"]:
    """a (re + i im) as one real matrix product: complex ones are slow."""
    both = jnp.concatenate([a.real, a.imag]) @ jnp.concatenate([re, im], axis=1)
    (rr, ri), (ir, ii) = (jnp.split(rows, 2, axis=1) for rows in jnp.split(both, 2))
    return lax.complex(rr - ii, ri + ir)
