"""What has been found out about kernels on a kind of device, committed as JSON: numerics checked, speed, and block sizes.

`numerics/<device>.json` says which implementations were found right there. A kernel that compiles for a GPU and has only been
interpreted on a CPU is not chosen on that GPU without being asked for by name, until `python -m benchmarks.attention_numerics`
(of scans `benchmarks.scan_numerics`) has run there and the file it writes is committed. Of scans it also holds, under
`fastest`, the order that `python -m benchmarks.gpu_scan --commit` measured there. `blocks/<device>.json` holds block sizes,
which `python -m benchmarks.attention_tuning` and `benchmarks.scan_tuning` write. All are looked up by the device's kind alone,
never tuned or checked while a program runs.
"""

import functools
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax

FOLDER = pathlib.Path(__file__).parent
FALLBACK = "NVIDIA H200"
"""Whose block sizes hold for devices without a file of their own."""

SHARED_BYTES = 227 * 1024
"""What a program may have of a Hopper processor's shared memory."""


def slug(kind: str) -> str:
    """The kind of a device as a file's name: NVIDIA H200 is nvidia-h200."""
    return "-".join(kind.lower().split())


def here() -> str:
    """The kind of the default device."""
    return jax.devices()[0].device_kind


def numerics_file(kind: str) -> pathlib.Path:
    return FOLDER / "numerics" / f"{slug(kind)}.json"


def blocks_file(kind: str) -> pathlib.Path:
    return FOLDER / "blocks" / f"{slug(kind)}.json"


@functools.cache
def verified(op: str, kind: str) -> frozenset[str]:
    """The implementations of `op` that passed all checks on such a device."""
    found = _read(numerics_file(kind)).get(op, {})
    return frozenset(name for name, record in found.items() if record["passed"])


def preference(op: str, platform: str, otherwise: Sequence[str]) -> tuple[str, ...]:
    """`otherwise`; on a GPU the order measured there instead, with its kernels among them if they were found right there."""
    if platform != "gpu":
        return tuple(otherwise)
    checked = verified(op, here())
    measured = [name for name in _fastest(op, here()) if name in checked or name in otherwise]
    return (*measured, *(name for name in otherwise if name not in measured))


@functools.cache
def _fastest(op: str, kind: str) -> tuple[str, ...]:
    return tuple(_read(numerics_file(kind)).get("fastest", {}).get(op, ()))


@functools.cache
def blocks(implementation: str, kind: str) -> dict[str, dict[int, dict[str, Any]]]:
    """For each pass and head size (of scans, number of states), the fields of the implementation's `Blocks`."""
    table = _read(blocks_file(kind)).get(implementation) or _read(blocks_file(FALLBACK))[implementation]
    return {name: {int(size): entry for size, entry in entries.items()} for name, entries in table.items()}


def _read(path: pathlib.Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}
