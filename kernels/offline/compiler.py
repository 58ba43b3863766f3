"""The compilers of the offline checks: lowered programs' Triton kernels, Triton's compiler with ptxas, and XLA for an H200."""

import dataclasses
import datetime
import functools
import importlib.metadata
import math
import pathlib
import platform
import re
import subprocess
import tempfile
from collections.abc import Sequence
from typing import Any

import jax

from kernels import compat

POINTERS = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}

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
class TritonCall:
    """A Pallas kernel as lowered for CUDA: Triton's IR as text, and how it is to be compiled and launched."""

    name: str
    ttir: str
    num_warps: int
    num_stages: int
    grid: tuple[int, int, int]


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


def requested_bytes(call: TritonCall) -> int:
    """What all programs of a launch load and store together, read off the IR; loops must have constant bounds.

    A load whose value nothing uses, which the compiler drops, does not count; one that a cache will serve does.

    Raises:
      ValueError: the bounds of a loop depend on data.
    """
    from jaxlib.mlir import ir
    from jaxlib.triton import dialect

    with ir.Context() as context:
        dialect.register_dialect(context)
        module = ir.Module.parse(call.ttir)
        return math.prod(call.grid) * _bytes_of(module.operation)


def _bytes_of(op) -> int:
    op = op.operation
    if op.name == "tt.store":
        return _size(op.operands[1].type)
    if op.name == "tt.load":
        return _size(op.results[0].type) if any(True for _ in op.results[0].uses) else 0
    inside = sum(_bytes_of(inner) for region in op.regions for block in region.blocks for inner in block.operations)
    if op.name != "scf.for" or not inside:
        return inside
    start, end, step = (_constant(value) for value in list(op.operands)[:3])
    return len(range(start, end, step)) * inside


def _size(type) -> int:
    from jaxlib.mlir import ir

    if not isinstance(type, ir.RankedTensorType):
        return _bits(type) // 8
    return math.prod(type.shape) * _bits(type.element_type) // 8


def _bits(type) -> int:
    return int(re.search(r"\d+$", str(type))[0])  # f32, bf16, i32


def _constant(value) -> int:
    """A loop's bound, of constants and what is added to them."""
    from jaxlib.mlir import ir

    op = value.owner if isinstance(value.owner, ir.Operation) else getattr(value.owner, "operation", None)
    if op is not None and op.name == "arith.constant":
        return ir.IntegerAttr(op.attributes["value"]).value
    if op is not None and op.name in ("arith.addi", "arith.subi"):
        left, right = (_constant(operand) for operand in op.operands)
        return left + right if op.name == "arith.addi" else left - right
    raise ValueError(f"a loop's bound is {value}; only loops of constant bounds have countable bytes")


def compile_triton(call: TritonCall) -> dict[str, int]:
    """What Triton's compiler and ptxas make of a Pallas kernel for compute capability 9.0. Needs Triton's wheel."""
    with tempfile.TemporaryDirectory() as folder:
        source = pathlib.Path(folder) / f"{call.name}.ttir"
        source.write_text(call.ttir)
        return _figures(_compile(str(source), call.num_warps, call.num_stages))


def compile_source(kernel, arrays: Sequence, constants: dict[str, Any], num_warps: int, num_stages: int = 1) -> dict[str, int]:
    """The same of a kernel in Triton's language, for pointers to `arrays` (`jax.ShapeDtypeStruct`s), aligned as XLA's are."""
    from triton.compiler import ASTSource

    pointers = [name for name in kernel.arg_names if name not in constants]
    signature = {name: POINTERS[str(x.dtype)] for name, x in zip(pointers, arrays, strict=True)}
    signature |= dict.fromkeys(constants, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(pointers))}
    return _figures(_compile(ASTSource(kernel, signature, constants, aligned), num_warps, num_stages))


def _compile(source, num_warps: int, num_stages: int):
    import triton
    from triton.backends.compiler import GPUTarget

    options = {"num_warps": num_warps, "num_stages": num_stages}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def _figures(compiled) -> dict[str, int]:
    with tempfile.TemporaryDirectory() as folder:
        cubin = pathlib.Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage, assembly = (_tool("cuobjdump", option, str(cubin)) for option in ("--dump-resource-usage", "--dump-sass"))
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spilled_bytes": sum(int(re.search(rf"{kind}:(\d+)", usage)[1]) for kind in ("STACK", "LOCAL")),
        "shared_bytes": compiled.metadata.shared,
        "tensor_core": len(re.findall(r"\bH(?:G)?MMA\b", assembly)),
        "wgmma": len(re.findall(r"\bHGMMA\b", assembly)),
        "loop": longest_loop(assembly),
    }


def longest_loop(assembly: str) -> dict[str, int]:
    """Instructions in the body of a kernel's longest loop, loops inside it once, from what `cuobjdump --dump-sass` prints.

    exponentials: those of the special-function unit, which takes a warp's in 8 cycles: powers, logarithms, reciprocals.
    """
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?(\w+)([^;\n]*);", assembly)
    found = [(int(address, 16), name, rest) for address, name, rest in lines]
    jumps = [(int(to[1], 16), at) for at, name, rest in found if name == "BRA" and (to := re.search(r"0x([0-9a-f]+)", rest))]
    start, end = max((jump for jump in jumps if jump[0] < jump[1]), key=lambda jump: jump[1] - jump[0], default=(0, -1))
    names = [name for at, name, _ in found if start <= at <= end]
    return {"instructions": len(names), "exponentials": names.count("MUFU"), "shuffles": names.count("SHFL")}


@functools.cache
def h200() -> jax.sharding.Mesh:
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


def link_cuda(folder: pathlib.Path) -> None:
    """The parts of a CUDA toolkit that XLA looks for, from Triton's wheel; the newer of its two assemblers."""
    links = {"bin/ptxas": "bin/ptxas-blackwell", "nvvm/libdevice/libdevice.10.bc": "lib/libdevice.10.bc"}
    for link, target in links.items():
        (folder / link).parent.mkdir(parents=True)
        (folder / link).symlink_to(_triton_folder() / target)


def environment(compiled: bool) -> dict[str, str]:
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
