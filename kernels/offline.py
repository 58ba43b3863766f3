"""Compiles every Pallas kernel for an H200 on a machine without a GPU, and reports what the compilers made of it.

    python -m kernels.offline                                  lowers every kernel to Triton's IR; needs only the requirements
    python -m kernels.offline --compile --memory --out=results/offline/attention-h200.json

Lowering is what JAX does before XLA compiles, so it finds every operation that Pallas's Triton dialect lacks. `--compile` hands
the IR to Triton's own compiler and ptxas for compute capability 9.0, and reads registers of a thread, bytes that a thread spills,
shared memory of a program, and tensor-core instructions (all, and Hopper's wgmma: HGMMA). XLA carries a Triton of its own, so the
figures are close to what it makes, not the same. It fails if an entry of the block table spills at head size 64 or 128, lacks
tensor-core instructions or asks for more shared memory than there is. `--memory` has XLA itself compile forward and backward of
causal attention, and reads the temporary bytes at lengths 1K to 64K. These two need wheels, about 2 GB, in an environment of
their own:

    python -m venv H200 && H200/bin/pip install -r requirements.txt triton==3.9.0
    H200/bin/pip install --no-deps jax-cuda13-plugin==V jax-cuda13-pjrt==V          V: the version of jax there; for --memory
    JAX_PLATFORMS=cpu H200/bin/python -m kernels.offline --compile --memory

Kernels: attention's, each pass with each entry of its block table on each of `MASKS`; `table` is the kernel for the gradient of a
dense bias, which uses the entries of dq.
"""

import argparse
import dataclasses
import datetime
import functools
import importlib.metadata
import json
import pathlib
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels import compat
from kernels.attention import biases, masks, portable
from kernels.attention.call import Call
from kernels.attention.portable import backward, forward, lists
from kernels.attention.portable.tiling import BLOCKS, FLOAT32_BLOCKS, Blocks, Tiling, plan

LENGTH, HEADS, KV_HEADS = 4096, 8, 4
MASKS = {"full": masks.Full(), "causal": masks.Causal(), "window": masks.Causal() & masks.Window(1024)}
MEMORY_LENGTHS = tuple(1024 * 2**i for i in range(7))
SHARED_BYTES = 227 * 1024
"""What a program may have of an H200's shared memory."""

TARGET = """
gpu_device_info {
  cuda_compute_capability { major: 9 } core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 l2_cache_size: 62914560
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 device_memory_size: 150000000000
}
platform_name: "CUDA" device_description_str: "NVIDIA H200"
dnn_version_info { major: 9 minor: 12 } runtime_version { major: 13 }
"""
"""An H200 as XLA describes devices; the fields are from its data sheet, not read from a card."""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel and how it is cut: the pass, its type, head size and block sizes, and the pattern, a key of `MASKS`."""

    name: str
    dtype: str
    head_size: int
    blocks: Blocks
    mask: str


@dataclasses.dataclass(frozen=True)
class TritonCall:
    """A Pallas kernel as lowered for CUDA: Triton's IR as text, and how it is to be compiled and launched."""

    name: str
    ttir: str
    num_warps: int
    num_stages: int
    grid: tuple[int, int, int]


PASSES: dict[str, Callable[[Tiling, Call, backward.Rows], Any]] = {
    "forward": lambda tiling, call, rows: forward.run_forward(tiling, call),
    "dkv": backward.run_dkv,
    "dq": backward.run_dq,
    "table": lambda tiling, call, rows: backward.run_table(tiling, call, rows, leaf=0),
}


def kernels() -> Iterator[Kernel]:
    """Every pass of attention with every entry of its block table, on every pattern; in float32, slow to compile, on one."""
    for name in PASSES:
        for head_size, blocks in BLOCKS["dq" if name == "table" else name].items():
            yield from (Kernel(name, "bfloat16", head_size, blocks, mask) for mask in MASKS)
        for head_size, blocks in FLOAT32_BLOCKS.items():
            yield Kernel(name, "float32", head_size, blocks, "causal")


def lower(kernel: Kernel, length: int = LENGTH) -> jax.stages.Lowered:
    """The program that runs `kernel` alone, lowered for CUDA."""
    dtype = jnp.dtype(kernel.dtype)
    q, kv = (jax.ShapeDtypeStruct((1, length, heads, kernel.head_size), dtype) for heads in (HEADS, KV_HEADS))
    row = jax.ShapeDtypeStruct((1, HEADS, length), jnp.float32)
    table = biases.Dense(jax.ShapeDtypeStruct((1, HEADS, length, length), dtype)) if kernel.name == "table" else None
    call = _call(q, kv, MASKS[kernel.mask], table)
    run = functools.partial(PASSES[kernel.name], _tiling(call, kernel.blocks))
    with compat.abstract_gpu():
        return jax.jit(run).trace(call, backward.Rows(q, row, row)).lower(lowering_platforms=("cuda",))


def tiles(kernel: Kernel, length: int = LENGTH) -> tuple[int, int]:
    """How many tiles a head has, and how many of them the kernel visits."""
    x = jax.ShapeDtypeStruct((1, length, 1, kernel.head_size), jnp.bfloat16)
    call = _call(x, x, MASKS[kernel.mask])
    tiling = _tiling(call, kernel.blocks)
    return tiling.rows * tiling.columns, int(lists.by_row(call, tiling).visits.sum())


def triton_calls(lowered: jax.stages.Lowered) -> list[TritonCall]:
    """The Triton kernels of a program lowered for CUDA."""
    from jaxlib.mlir import ir
    from jaxlib.triton import dialect

    found = []

    def visit(op):
        if op.name == "stablehlo.custom_call" and ir.StringAttr(op.attributes["call_target_name"]).value == compat.TRITON_CALL:
            found.append({field.name: field.attr for field in ir.DictAttr(op.attributes["mhlo.backend_config"])})
        return ir.WalkResult.ADVANCE

    lowered.compiler_ir("stablehlo").operation.walk(visit)
    with ir.Context() as context:
        dialect.register_dialect(context)
        return [
            TritonCall(
                config["name"].value,
                str(ir.Module.parse(config["ir"].value_bytes)),
                config["num_warps"].value,
                config["num_stages"].value,
                tuple(config[f"grid_{axis}"].value for axis in "xyz"),
            )
            for config in found
        ]


def compile_triton(call: TritonCall) -> dict[str, int]:
    """What Triton's compiler and ptxas make of a kernel for compute capability 9.0. Needs Triton's wheel."""
    import triton
    from triton.backends.compiler import GPUTarget

    with tempfile.TemporaryDirectory() as folder:
        source = pathlib.Path(folder) / f"{call.name}.ttir"
        source.write_text(call.ttir)
        options = {"num_warps": call.num_warps, "num_stages": call.num_stages}
        compiled = triton.compile(str(source), target=GPUTarget("cuda", 90, 32), options=options)
        cubin = source.with_suffix(".cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        usage, assembly = (_tool("cuobjdump", option, str(cubin)) for option in ("--dump-resource-usage", "--dump-sass"))
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spilled_bytes": sum(int(re.search(rf"{kind}:(\d+)", usage)[1]) for kind in ("STACK", "LOCAL")),
        "shared_bytes": compiled.metadata.shared,
        "tensor_core": len(re.findall(r"\bH(?:G)?MMA\b", assembly)),
        "wgmma": len(re.findall(r"\bHGMMA\b", assembly)),
    }


def temporary_bytes(length: int, head_size: int) -> int:
    """Of forward and backward of causal attention with 8 heads, compiled by XLA for an H200. Needs JAX's CUDA plug-in."""
    mesh = _mesh()
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    x = jax.ShapeDtypeStruct((1, length, HEADS, head_size), jnp.bfloat16, sharding=sharding)

    def loss(q, k, v):
        out, _ = portable.attend(_call(q, k, MASKS["causal"], v=v), interpret=False)
        return out.astype(jnp.float32).sum()

    with tempfile.TemporaryDirectory() as cuda, jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        _link_cuda(pathlib.Path(cuda))
        options = {"xla_gpu_cuda_data_dir": cuda, "xla_gpu_autotune_level": 0}
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x).compile(compiler_options=options)
    return compiled.memory_analysis().temp_size_in_bytes


def problems(rows: list[dict]) -> list[str]:
    """What the compiled kernels of the block table must not do, and do."""
    found = []
    for row in rows:
        name = f"{row['kernel']} at head size {row['head_size']}, {row['dtype']}, {row['mask']}"
        if row["head_size"] <= 128 and row["spilled_bytes"]:
            found.append(f"{name}: spills {row['spilled_bytes']} bytes")
        if row["dtype"] != "float32" and not row["tensor_core"]:
            found.append(f"{name}: no tensor-core instruction")
        if row["shared_bytes"] > SHARED_BYTES:
            found.append(f"{name}: {row['shared_bytes']} bytes of shared memory, of {SHARED_BYTES}")
    return found


def report(kernel: Kernel, compiled: bool) -> dict[str, Any]:
    """One line of the table."""
    [call] = triton_calls(lower(kernel))
    total, visited = tiles(kernel)
    row = {"kernel": kernel.name, "dtype": kernel.dtype, "head_size": kernel.head_size, "mask": kernel.mask}
    row |= kernel.blocks._asdict() | {
        "grid": "x".join(map(str, call.grid)),
        "tiles": total,
        "visited": visited,
        "ttir_bytes": len(call.ttir),
    }
    return row | (compile_triton(call) if compiled else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compile", action="store_true", help="compile with Triton: registers, spills, shared memory")
    parser.add_argument("--memory", action="store_true", help="compile with XLA: temporary bytes against length")
    parser.add_argument("--out", help="where to write the figures as JSON")
    options = parser.parse_args()
    rows = []
    for kernel in kernels():
        rows.append(report(kernel, options.compile))
        _print(rows[-1], header=len(rows) == 1)
    memory = []
    for head_size in (64, 128) if options.memory else ():
        found = {length: temporary_bytes(length, head_size) for length in MEMORY_LENGTHS}
        exponent = np.polyfit(np.log(list(found)), np.log(list(found.values())), 1)[0]
        memory.append({"head_size": head_size, "temporary_bytes": found, "exponent": round(float(exponent), 3)})
        _print(memory[-1] | {"temporary_bytes": "  ".join(f"{n}: {b}" for n, b in found.items())}, header=head_size == 64)
    if options.out:
        path = pathlib.Path(options.out)
        path.parent.mkdir(parents=True, exist_ok=True)
        command = " ".join(["python -m kernels.offline", *sys.argv[1:]])
        facts = {"command": command, "environment": _environment(options.compile), "target": "compute capability 9.0"}
        path.write_text(json.dumps(facts | {"rows": rows, "memory": memory}, indent=1) + "\n")
    if options.compile and (found := problems(rows)):
        sys.exit("\n".join(found))


def _call(q, k, mask: masks.Mask, bias=None, v=None) -> Call:
    v = k if v is None else v
    return Call(q, k, v, bias, None, None, None, None, None, mask=mask, softcap=None, scale=q.shape[3] ** -0.5)


def _tiling(call: Call, blocks: Blocks) -> Tiling:
    return plan(call, interpret=False, blocks=dict.fromkeys(BLOCKS, blocks)).forward


@functools.cache
def _mesh() -> jax.sharding.Mesh:
    """One H200 that need not be here."""
    from jax.experimental import topologies

    jax.devices()  # loads the plug-ins
    topology = topologies.get_topology_desc(platform="cuda", target_config=TARGET, topology="1x1x1")
    return topologies.make_mesh(topology, (1,), ("device",))


def _triton_folder() -> pathlib.Path:
    import triton

    return pathlib.Path(triton.__file__).parent / "backends" / "nvidia"


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([_triton_folder() / "bin" / name, *arguments], check=True, capture_output=True, text=True).stdout


def _link_cuda(folder: pathlib.Path) -> None:
    """The parts of a CUDA toolkit that XLA looks for, from Triton's wheel; the newer of its two assemblers."""
    links = {"bin/ptxas": "bin/ptxas-blackwell", "nvvm/libdevice/libdevice.10.bc": "lib/libdevice.10.bc"}
    for link, target in links.items():
        (folder / link).parent.mkdir(parents=True)
        (folder / link).symlink_to(_triton_folder() / target)


def _environment(compiled: bool) -> dict[str, str]:
    git = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=pathlib.Path(__file__).parent, capture_output=True, text=True, check=False
    )
    facts = {
        "jax": jax.__version__,
        "python": platform.python_version(),
        "commit": git.stdout.strip() or "not a git checkout",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    if compiled:
        facts["triton"] = importlib.metadata.version("triton")
        facts |= {tool: re.search(r"release.* V(\S+)", _tool(tool, "--version"))[1] for tool in ("ptxas", "ptxas-blackwell")}
    return facts


def _print(row: dict[str, Any], header: bool) -> None:
    for cells in ([list(row)] if header else []) + [list(row.values())]:
        print("  ".join(f"{cell!s:>{max(len(name), 7)}}" for name, cell in zip(row, cells)), flush=True)


if __name__ == "__main__":
    main()
