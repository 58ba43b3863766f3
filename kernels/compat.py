"""The only file that knows which JAX version is running: what the GPU kernels need that differs between 0.10 and 0.12.

Pallas's Triton backend is deprecated since JAX 0.11 and still there in 0.12. Without compiler parameters, `pl.pallas_call` goes
to Mosaic GPU on 0.10 and to Triton from 0.11 on; so every call here states them.
"""

import contextlib
import inspect
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental.pallas import triton  # Mosaic where it is called: it takes half a second to import

TRITON_CALL = "__gpu$xla.gpu.triton"
"""The target of the custom call that a Pallas kernel becomes when it is lowered for CUDA through Triton."""

MOSAIC_CALL = "mosaic_gpu_v2"
"""The same through Mosaic GPU."""

warnings.filterwarnings("ignore", message=re.escape("The Pallas Triton backend is deprecated"), category=DeprecationWarning)


def triton_params(num_warps: int, num_stages: int) -> triton.CompilerParams:
    """What makes `pl.pallas_call` compile through Triton: warps of a program, and stages of its loads' software pipeline."""
    return triton.CompilerParams(num_warps=num_warps, num_stages=num_stages)


def triton_call(kernel: Callable, *arrays: jax.Array, out: Sequence[jax.ShapeDtypeStruct], **options: Any) -> list[jax.Array]:
    """Run a kernel in Triton's language through jax-triton, whose 0.4 calls `out_type` what was `out_shape`."""
    import jax_triton

    name = "out_type" if "out_type" in inspect.signature(jax_triton.triton_call).parameters else "out_shape"
    return list(jax_triton.triton_call(*arrays, kernel=kernel, **{name: list(out)}, **options))


def abstract_gpu() -> contextlib.AbstractContextManager:
    """A context in which Pallas kernels lower for an H200 where there is no GPU, which JAX needs from 0.11 on."""
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    axis_types = (jax.sharding.AxisType.Auto,)
    mesh = jax.sharding.AbstractMesh((1,), ("device",), axis_types=axis_types, abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


def mosaic_load(ref, layout) -> jax.Array:
    """From shared memory in a layout of registers; JAX 0.10 asks for an index beside the reference, and to be told that bytes
    are read with conflicts of banks."""
    from jax.experimental.pallas import mosaic_gpu

    if inspect.signature(mosaic_gpu.load).parameters["idx"].default is not inspect.Parameter.empty:
        return mosaic_gpu.load(ref, layout=layout)
    return mosaic_gpu.load(ref, (), layout=layout, optimized=ref.dtype.itemsize > 1)


def mosaic_transposed(ref) -> Any:
    """A reference to the transpose of a matrix in shared memory; references themselves have it since JAX 0.11."""
    from jax.experimental.pallas import mosaic_gpu

    return ref.transpose((1, 0)) if jax.__version_info__ >= (0, 11) else mosaic_gpu.transpose_ref(ref, (1, 0))


def mosaic_interpreter() -> Any:
    """What makes `mosaic_gpu.kernel` run on a CPU; public since JAX 0.11."""
    from jax.experimental.pallas import mosaic_gpu

    if hasattr(mosaic_gpu, "InterpretGPUParams"):
        return mosaic_gpu.InterpretGPUParams()
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    return InterpretGPUParams()
