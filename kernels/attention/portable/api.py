"""The kernels as one differentiable function, and the calls that they cannot run."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels.attention.adjoint import differentiable, rows_of
from kernels.attention.call import Call, Spec
from kernels.attention.portable.backward import backward, run_dkv, run_dq
from kernels.attention.portable.forward import forward, run_forward
from kernels.attention.portable.lists import is_stored
from kernels.attention.portable.tiling import Blocks, plan

MAX_HEAD_SIZE = 256


def why_not(spec: Spec) -> str | None:
    """The reason the kernels cannot run this call: what Pallas's Triton backend cannot lower, or what only the host knows."""
    on_gpu = spec.platform != "cpu"
    whole = [n for n in spec.bias_whole_axes if n & (n - 1)]
    reasons = {
        f"it is written for NVIDIA GPUs, and interpreted on cpu, not for {spec.platform}": spec.platform not in ("cpu", "gpu"),
        "a mask that looks values up, or differs by head, must be evaluated before positions are known": (
            spec.traced_positions and is_stored(spec.mask)
        ),
        f"on a GPU its tiles hold head sizes up to {MAX_HEAD_SIZE}, not {spec.head_dim} and {spec.v_head_dim}": (
            on_gpu and max(spec.head_dim, spec.v_head_dim) > MAX_HEAD_SIZE
        ),
        f"on a GPU the bias {spec.bias} indexes an array, which Triton kernels cannot": on_gpu and spec.bias_gathers,
        f"on a GPU the bias {spec.bias} must hold arrays of powers of two, not {whole}": on_gpu and bool(whole),
        "on a GPU it has no float64": on_gpu and spec.dtype == "float64",
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


def attend(
    call: Call, blocks: dict[str, Blocks] | None = None, interpret: bool | None = None
) -> tuple[Float[Array, "B L H Dv"], Float[Array, "B L H"]]:
    """The same function as `reference.attend`. Memory O(B H (L + S) D); deterministic.

    Args:
      blocks: block sizes of each pass, in place of those of `tiling.BLOCKS`.
      interpret: run Pallas's interpreter; None: where the default device is a CPU.
    """
    out, lse = _attend(plan(call, _interpret(interpret), blocks), call)
    return out, jnp.moveaxis(lse, 1, 2)


def visits(call: Call, blocks: dict[str, Blocks] | None = None, interpret: bool | None = None) -> dict[str, Array]:
    """How many tiles each program visits, counted by the kernels: "forward" and "dq" [B, H, rows], "dkv" [B, G, columns]."""
    tilings = plan(call, _interpret(interpret), blocks)
    out, lse = forward(tilings.forward, call)
    rows = rows_of(out, lse, jnp.ones_like(out), jnp.zeros_like(lse))
    outputs = {
        "forward": run_forward(tilings.forward, call),
        "dkv": run_dkv(tilings.dkv, call, rows),
        "dq": run_dq(tilings.dq, call, rows),
    }
    return {name: output["visits"] for name, output in outputs.items()}


def _interpret(given: bool | None) -> bool:
    return jax.default_backend() == "cpu" if given is None else given


_attend = differentiable(lambda plan, call: forward(plan.forward, call), backward)
