"""Shared set-up: cheap compilation, run-time shape checking, strict rank promotion, and where the oracle arrays lie."""

import os
import pathlib
from importlib.metadata import version

import jax
import pytest
from jaxtyping import install_import_hook

# XLA's MLIR code generator, and its split of a program into 32 modules, make the small programs of tests three times as slow
# to compile; the switch of the former is gone from JAX 0.11 on. Programs that tests start inherit both, and optimise little too.
QUICK_CODE = ["--xla_cpu_parallel_codegen_split_count=1"]
if version("jaxlib").startswith("0.10."):
    QUICK_CODE.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join(dict.fromkeys([*QUICK_CODE, *os.environ.get("XLA_FLAGS", "").split()]))
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
jax.config.update("jax_disable_most_optimizations", False)  # in this process the fixture `quick_compile` decides

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
    """Compile without most of LLVM's optimisations, for all tests but those of rounding and those that compute for long."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
