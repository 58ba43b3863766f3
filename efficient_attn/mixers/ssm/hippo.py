"""HiPPO matrices and their normal plus low-rank forms, where state-space models start from (NumPy, float64).

x'(t) = A x(t) + B u(t) keeps in x the coefficients of the history of u in a basis of orthogonal functions (Gu et al. 2020,
arXiv 2008.07669). In every measure here A + P^T P is normal for a P of rank one or two (Gu et al. 2022, theorem 1).
"""

from collections.abc import Callable

import numpy as np

Matrices = tuple[np.ndarray, np.ndarray, np.ndarray]
"""A [n, n], B [n] and P [rank, n]."""


def _roots(n: int) -> np.ndarray:
    return np.sqrt(2.0 * np.arange(n) + 1.0)


def legs(n: int) -> Matrices:
    """Scaled Legendre, the whole history (Gu et al. 2020, theorem 2): -sqrt((2i+1)(2k+1)) below the diagonal, -(i+1) on it.

    The paper's equation is x' = (A x + B u) / t; S4 takes it without the 1/t (Gu et al. 2022, section 2.2).
    """
    r = _roots(n)
    A = -(np.tril(np.outer(r, r)) - np.diag(np.arange(n, dtype=np.float64)))
    return A, r, r[None] / np.sqrt(2)


def legt(n: int) -> Matrices:
    """Translated Legendre, the last unit of time (Gu et al. 2020, theorem 1): -sqrt((2i+1)(2k+1)), by (-1)^(i-k) where i < k."""
    r, i = _roots(n), np.arange(n)
    sign = np.where(i[:, None] < i[None, :], (-1.0) ** (i[:, None] - i[None, :]), 1.0)
    even = i % 2 == 0
    return -np.outer(r, r) * sign, r, np.stack([np.where(even, r, 0.0), np.where(even, 0.0, r)])


def lagt(n: int) -> Matrices:
    """Translated Laguerre, exponentially fading history (Gu et al. 2020, theorem 1, alpha = 0, beta = 1): -1 on and below."""
    return -np.tril(np.ones((n, n))), np.ones(n), np.full((1, n), np.sqrt(0.5))


def fourier(n: int) -> Matrices:
    """Fourier, the last unit of time (Gu et al. 2023, "How to train your HiPPO", theorem 7), n even.

    Pairs (2k, 2k+1) turn at frequency k; both components of pair 0 stand still, and its second one is never written to.
    """
    if n % 2:
        raise ValueError(f"the Fourier measure has pairs of components: state size {n} must be even")
    turns = np.zeros(n - 1)
    turns[::2] = 2 * np.pi * np.arange(n // 2)
    b = np.where(np.arange(n) % 2 == 0, np.sqrt(2.0), 0.0)
    b[0] = 1.0
    return np.diag(turns, -1) - np.diag(turns, 1) - 2 * np.outer(b, b), 2 * b, np.sqrt(2) * b[None]


MEASURES: dict[str, Callable[[int], Matrices]] = {"legs": legs, "legt": legt, "lagt": lagt, "fourier": fourier}
"""Each measure's matrices by state size."""


def dplr(measure: str, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Lambda [n/2], P [rank, n/2], B [n/2] and V [n, n/2]: A = V (Lambda - P* P) V* with all quantities in conjugate pairs.

    The diagonal plus low-rank form (Gu et al. 2022, theorem 3), of which one of each pair is kept, that with Im Lambda <= 0.
    A + P^T P is skew-symmetric but for its constant diagonal, so V is unitary and eigenvalues share one real part.
    """
    if n % 2:
        raise ValueError(f"eigenvalues come in conjugate pairs: state size {n} must be even")
    A, B, P = MEASURES[measure](n)
    Lambda, V = _diagonalise(A + P.T @ P)
    Lambda, V = Lambda[: n // 2], V[:, : n // 2]
    if abs(Lambda[-1].imag) < 1e-9:  # zero twice (Fourier): eigh need not pair its two vectors, so pair them here
        V[:, -1] = np.eye(n)[:, :2] @ np.array([1.0, 1j]) / np.sqrt(2)
    return Lambda, P @ V.conj(), V.conj().T @ B, V


def _diagonalise(normal: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues by ascending imaginary part, and unitary eigenvectors, of a constant diagonal plus a skew-symmetric matrix."""
    real = np.full(len(normal), np.mean(np.diagonal(normal)))
    imaginary, V = np.linalg.eigh(normal * -1j)
    return real + 1j * imaginary, V


def diagonalised_legs_n(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues Lambda [n] and eigenvectors V [n, n] of HiPPO-N, the normal part of HiPPO-LegS.

    Real parts equal -1/2; eigenvalues come sorted by imaginary part, conjugates mirrored about the middle.
    """
    A, _, P = legs(n)
    return _diagonalise(A + P.T @ P)


def block_diagonal_legs_n(n: int, blocks: int, conjugate_pairs: bool) -> tuple[np.ndarray, np.ndarray]:
    """Lambda [P] and V [n, P] of `blocks` copies of HiPPO-N of size n / blocks (Smith et al. 2023, appendix B.1.1).

    With `conjugate_pairs` only one of each conjugate pair of eigenvalues is kept: P = n / 2, otherwise P = n.
    """
    if n % blocks or (conjugate_pairs and (n // blocks) % 2):
        even = "even " if conjugate_pairs else ""
        raise ValueError(f"state_dim={n} must split into blocks={blocks} blocks of equal {even}size")
    eigenvalues, v = diagonalised_legs_n(n // blocks)
    kept = n // blocks // (2 if conjugate_pairs else 1)
    return np.tile(eigenvalues[:kept], blocks), np.kron(np.eye(blocks), v[:, :kept])
