"""Shared set-up: run-time shape checking, strict rank promotion, and where the oracle arrays lie."""

import os
import pathlib

import jax
import pytest
from jaxtyping import install_import_hook

install_import_hook(["kernels", "efficient_attn"], "beartype.beartype")

if "JAX_PLATFORMS" not in os.environ:
    jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_numpy_rank_promotion", "raise")

ORACLE_DIR = pathlib.Path(os.environ.get("ORACLE_DIR", pathlib.Path(__file__).parent / "oracles"))


@pytest.fixture(scope="session")
def oracle_dir() -> pathlib.Path:
    """Folder of `<case>.npz` and `<case>.json`; the environment variable ORACLE_DIR redirects it."""
    return ORACLE_DIR


@pytest.fixture
def quick_compile():
    """Compile without most of XLA's optimisations, for tests of identities; those of rounding, memory and training do without."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
