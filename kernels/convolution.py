"""Convolution of a sequence with kernels as long as itself, by FFT: O(L log L)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def long_convolution(
    u: Float[Array, "B L E"], kernel: Float[Array, "_ K"], *, ahead: Float[Array, "_ M"] | None = None
) -> Float[Array, "B L E"]:
    """y_t = sum_{j=0}^{K-1} kernel_j u_{t-j} + sum_{j=0}^{M-1} ahead_j u_{t+1+j}, for each channel on its own.

    Args:
      u: the input; what lies outside it is zero.
      kernel: how each channel weighs the present and the past, from lag 0 on; alone it makes the convolution causal.
      ahead: how it weighs the future, from one step ahead on (the two-sided convolution of the released S4 code).

    Returns y in the dtype of `u`, computed in float32, or in float64 where an argument is. The backward pass keeps `u` and the
    kernels alone, and transforms them again.

    A convolution carries everything on: it knows no document boundaries. Where documents are packed into one row, use the
    recurrent form of what made the kernel (`kernels.scan.linear_scan` resets its state).

    Raises ValueError where a kernel's channels are not those of `u`.
    """
    for name, k in (("kernel", kernel), ("ahead", ahead)):
        if k is not None and k.shape[0] != u.shape[-1]:
            expected = f"must be [E, K] with the E={u.shape[-1]} channels of u {u.shape}"
            raise ValueError(f"long_convolution: {name} {k.shape} {expected}")
    L = u.shape[1]
    dtype = jnp.result_type(u.dtype, kernel.dtype, jnp.float32)
    parts = [kernel[:, :L].astype(dtype)] + ([] if ahead is None else [ahead[:, : L - 1].astype(dtype)])
    n = fast_length(L + max(k.shape[-1] for k in parts))
    y = _circular(jnp.swapaxes(u, 1, 2).astype(dtype), _around(n, *parts))
    return jnp.swapaxes(y, 1, 2).astype(u.dtype)


Kernels = tuple[Float[Array, "E _"]] | tuple[Float[Array, "E _"], Float[Array, "E _"]]
"""What weighs the present and the past and, if the convolution is two-sided, what weighs the future."""


def separable_convolution(image: Float[Array, "B R S E"], rows: Kernels, columns: Kernels) -> Float[Array, "B R S E"]:
    """The image convolved with K[a, b] = rows[a] columns[b]: `long_convolution` along each row, then down each column.

    rows: weighs the R rows of the image against each other. columns: its S columns.
    """
    B, R, S, E = image.shape
    y = _along(image.reshape(B * R, S, E), columns).reshape(B, R, S, E)
    y = jnp.swapaxes(y, 1, 2).reshape(B * S, R, E)
    return jnp.swapaxes(_along(y, rows).reshape(B, S, R, E), 1, 2)


def _along(u, kernels):
    return long_convolution(u, kernels[0], ahead=kernels[1] if len(kernels) == 2 else None)


def fast_length(n: int) -> int:
    """The smallest even number of at least `n` without prime factors above 5: a length that FFTs are fast at."""
    candidate = n + n % 2
    while not _is_smooth(candidate):
        candidate += 2
    return candidate


def _is_smooth(n: int) -> bool:
    for p in (2, 3, 5):
        while n % p == 0:
            n //= p
    return n == 1


def _around(n: int, behind: Float[Array, "E K"], ahead: Float[Array, "E M"] | None = None) -> Float[Array, "E n"]:
    """One kernel on a circle of n lags: lag j at index j, one step ahead at index n-1, two at n-2, ..."""
    if ahead is None:
        return jnp.pad(behind, ((0, 0), (0, n - behind.shape[1])))
    gap = jnp.zeros((behind.shape[0], n - behind.shape[1] - ahead.shape[1]), behind.dtype)
    return jnp.concatenate([behind, gap, ahead[:, ::-1]], axis=1)


@jax.custom_vjp
def _circular(u: Float[Array, "B E L"], k: Float[Array, "E n"]) -> Float[Array, "B E L"]:
    """The first L values of u, padded to n, convolved with k on a circle. No wrap-around: n is at least L + the lags of k."""
    n = k.shape[-1]
    product = jnp.fft.rfft(u, n=n) * jnp.fft.rfft(k)[None]
    return jnp.fft.irfft(product, n=n)[..., : u.shape[-1]]


def _forward(u, k):
    return _circular(u, k), (u, k)


def _backward(residuals, g):
    """Correlations with g. JAX would transpose a real FFT into a complex one of twice the cost."""
    u, k = residuals
    n = k.shape[-1]
    G = jnp.fft.rfft(g, n=n)
    du = jnp.fft.irfft(G * jnp.conj(jnp.fft.rfft(k))[None], n=n)[..., : u.shape[-1]]
    dk = jnp.fft.irfft(jnp.sum(G * jnp.conj(jnp.fft.rfft(u, n=n)), axis=0), n=n)
    return du, dk


_circular.defvjp(_forward, _backward)
