"""HiPPO-LegS and its diagonalised normal part, the initial state matrices of S4D and S5 (NumPy, float64)."""

import numpy as np


def hippo_legs(n: int) -> np.ndarray:
    """A of HiPPO-LegS (Gu et al. 2020, eq. 2): -sqrt((2i+1)(2j+1)) below the diagonal, -(i+1) on it. [n, n]"""
    p = np.sqrt(2.0 * np.arange(n) + 1.0)
    return -(np.tril(np.outer(p, p)) - np.diag(np.arange(n, dtype=np.float64)))


def diagonalised_legs_n(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues Lambda [n] and eigenvectors V [n, n] of HiPPO-N, the normal part of HiPPO-LegS.

    A = A_N - P P^T with P_i = sqrt(i + 1/2) (Gu et al. 2022, theorem 1); A_N + 1/2 I is skew-symmetric, so all real
    parts equal -1/2 and V is unitary. Eigenvalues come sorted by imaginary part, conjugates mirrored about the middle.
    """
    p = np.sqrt(np.arange(n) + 0.5)
    normal = hippo_legs(n) + np.outer(p, p)
    real = np.full(n, np.mean(np.diagonal(normal)))
    imaginary, v = np.linalg.eigh(normal * -1j)
    return real + 1j * imaginary, v


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
