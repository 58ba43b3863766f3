"""The scans on the device that is here: Mamba's selective scan, Mamba-2's SSD and the linear scan, forward and backward.

    python -m benchmarks.gpu_scan                       all cases; results/<device>/scan.json
    python -m benchmarks.gpu_scan --jobs=4 --budget=85  four processes, which compile at the same time; ends after 85 seconds
    python -m benchmarks.gpu_scan --commit              and their order, fastest first, to kernels/numerics/<device>.json
    python -m benchmarks.gpu_scan --quick               a small form on any device, under a minute on a CPU

All contestants of a case take turns in one process; their programs are compiled side by side. A row has each one's median
milliseconds and its share of the bandwidth that a copy reaches in the same run (bytes read and written). Bytes are the least
there are, every input read once and every output written once; `with states` counts besides them the states that the
implementation's forward pass keeps for its backward pass (as `kernels.offline.scan` does). `over` compares with `lax.scan` and
`lax.associative_scan`. The forward pass is that of inference, which keeps nothing; the backward pass is of an earlier forward. A
contestant whose first run takes more than a tenth of a second is timed by that run; one that needs more memory than there is, or
fails, is in the row with the reason. Written after each case, with a table beside; the same command goes on where it stopped.
"""

import argparse
import functools
import pathlib
import time
from collections.abc import Callable
from concurrent import futures
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks import cards, harness
from kernels import devices
from kernels.scan import (
    api,
    explain,
    explain_selective,
    explain_ssd,
    linear_scan,
    selective,
    selective_chunked,
    selective_portable,
    selective_scan,
    ssd,
    triton,
)
from kernels.scan.ssd import IMPLEMENTATIONS as SSD

SLOW = 0.1
"""Seconds of a run above which it is not repeated."""
HEAD = 64
"""Channels of a head of SSD."""
PEERS = {"reference": "lax.scan", "associative": "lax.associative_scan"}
PASSES = ("forward", "backward")
LONGEST = {"reference": 2**12, "associative": 2**11}
"""The longest sequences of these: one launches kernels at each step, the other holds all states several times."""


class Case(NamedTuple):
    """One shape: B sequences of L steps of E channels, each of `states`; those of the linear scan are channels."""

    op: str
    batch: int
    length: int
    channels: int
    states: int = 1
    dtype: str = "bfloat16"


CASES = (
    Case("selective_scan", 8, 4096, 2048, 16),
    Case("ssd", 8, 4096, 2048, 128),
    Case("linear_scan", 8, 4096, 2048, dtype="float32"),
    Case("selective_scan", 8, 2048, 2048, 16),
    Case("selective_scan", 8, 16384, 2048, 16),
    Case("linear_scan", 8, 2048, 2048, dtype="float32"),
    Case("ssd", 8, 16384, 2048, 128),
    Case("selective_scan", 8, 4096, 4096, 16),
    Case("selective_scan", 8, 16384, 4096, 16),
    Case("selective_scan", 8, 4096, 2048, 64),
    Case("linear_scan", 16, 2048, 128, dtype="complex64"),
    Case("linear_scan", 8, 16384, 2048, dtype="float32"),
)
"""The first of each op decides the order that --commit writes."""
NAMES = ("triton", "portable", "chunked", "associative", "reference")
QUICK = (Case("selective_scan", 1, 64, 32, 4), Case("ssd", 1, 64, 64, 16), Case("linear_scan", 1, 64, 32, dtype="float32"))


def selective_arguments(case: Case) -> dict[str, jax.Array]:
    """With the step sizes of a fresh Mamba layer."""
    shape, states = case[1:4], (*case[1:3], case.states)
    keys = jax.random.split(jax.random.key(0), 5)
    u, delta, z = (jax.random.normal(key, shape, case.dtype) for key in keys[:3])
    B, C = (jax.random.normal(key, states, case.dtype) for key in keys[3:])
    A = -jnp.broadcast_to(jnp.arange(1.0, case.states + 1), (case.channels, case.states))
    D, bias = jnp.ones(case.channels), jnp.full(case.channels, -4.6)
    return {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": bias}


def ssd_arguments(case: Case) -> dict[str, jax.Array]:
    """Heads of 64 channels, one group."""
    heads, states = case.channels // HEAD, (*case[1:3], 1, case.states)
    keys = jax.random.split(jax.random.key(0), 4)
    x, dt = (jax.random.normal(key, (*case[1:3], heads, *rest), case.dtype) for key, rest in zip(keys, ((HEAD,), ())))
    B, C = (jax.random.normal(key, states, case.dtype) for key in keys[2:])
    A, D, bias = -jnp.arange(1.0, heads + 1), jnp.ones(heads), jnp.full(heads, -4.6)
    return {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "dt_bias": bias}


def linear_arguments(case: Case) -> dict[str, jax.Array]:
    """Decays that vary in time, or complex ones that do not, as S5's."""
    keys = jax.random.split(jax.random.key(0), 2)
    fixed = case.dtype == "complex64"
    a = jax.random.uniform(keys[0], case[3:4] if fixed else case[1:4], minval=0.9, maxval=0.999)
    return {"a": a * jnp.exp(1j * a) if fixed else a, "b": jax.random.normal(keys[1], case[1:4], case.dtype)}


def kept_states(steps: int) -> Callable[[Case], int]:
    """Bytes of one float32 state for every so many steps."""
    return lambda case: 4 * case.batch * -(-case.length // steps) * case.channels * case.states


class Op(NamedTuple):
    """An op: its arguments, the function that is timed, what says why it cannot run, its implementations, what each keeps."""

    arguments: Callable[[Case], dict[str, jax.Array]]
    run: Callable[..., Any]
    explain: Callable[..., Any]
    implementations: dict[str, Any]
    kept: dict[str, Callable[[Case], int]]


OPS = {
    "selective_scan": Op(
        selective_arguments,
        selective_scan,
        explain_selective,
        selective.IMPLEMENTATIONS,
        {
            "triton": lambda case: kept_states(triton.blocks_of(case.states).K)(case),
            "portable": lambda case: kept_states(selective_portable.blocks_of(case.states).K)(case),
            "chunked": kept_states(selective_chunked.K),
        },
    ),
    "ssd": Op(ssd_arguments, ssd, explain_ssd, SSD, {}),
    "linear_scan": Op(linear_arguments, linear_scan, explain, api.IMPLEMENTATIONS, {}),
}


class Programs(NamedTuple):
    """A contestant's compiled programs: inference, the forward pass of training, the backward pass."""

    forward: Any
    training: Any
    backward: Any

    def megabytes(self) -> float:
        """The most that one of them allocates."""
        return max(_allocated(program) for program in self) / 1e6


def _allocated(program) -> int:
    found = program.memory_analysis()
    return found.temp_size_in_bytes + found.output_size_in_bytes + found.argument_size_in_bytes


def compiled(op: Op, name: str, arrays, cotangent) -> Programs:
    """The programs of one contestant."""

    def run(arrays):
        return op.run(**arrays, implementation=name)[0]

    training = jax.jit(lambda arrays: jax.vjp(run, arrays)).lower(arrays)
    _, pullback = training.out_info
    backward = jax.jit(lambda pullback, g: pullback(g)).lower(pullback, cotangent)
    return Programs(jax.jit(run).lower(arrays).compile(), training.compile(), backward.compile())


def measure(args: argparse.Namespace, bandwidth: float, case: Case) -> list[dict[str, Any]]:
    """The rows of one case, one for each pass; none where nothing could be run. Arrays exist once it is this case's turn."""
    op = OPS[case.op]
    make = jax.jit(functools.partial(_arrays, case))
    arrays, cotangent = jax.eval_shape(make)
    reasons = {name: _why_not(args, op, name, case, arrays) for name in op.implementations}
    able = [name for name, reason in reasons.items() if reason is None]
    with cards.compiling(), futures.ThreadPoolExecutor(max(1, len(able))) as pool:
        pending = {name: pool.submit(compiled, op, name, arrays, cotangent) for name in able}
    with cards.alone():
        arrays, cotangent = make()
        found = Found(bandwidth, _io(arrays, cotangent), reasons, args.jobs)
        for name, future in pending.items():
            try:
                found.start(name, future.result(), arrays, cotangent)
                del reasons[name]
            except Exception as error:  # whatever a compiler or a device raises: the others are still measured
                reasons[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        return [found.row(case, which, args.repeats) for which in PASSES if any(which in key for key in found.seconds)]


def _arrays(case: Case) -> tuple[dict[str, jax.Array], jax.Array]:
    """The arguments, and a cotangent."""
    arrays = OPS[case.op].arguments(case)
    y = jax.eval_shape(lambda arrays: OPS[case.op].run(**arrays, implementation="reference")[0], arrays)
    return arrays, jax.random.normal(jax.random.key(1), y.shape, y.dtype)


class Found:
    """What one case's contestants turn out to do. Those that are slow are timed by their first run and hold no memory."""

    def __init__(self, bandwidth: float, io: dict[str, int], reasons: dict[str, str | None], jobs: int):
        self.bandwidth, self.io, self.reasons, self.jobs = bandwidth, io, reasons, jobs
        self.runs: dict[str, dict[str, Callable[[], Any]]] = {which: {} for which in PASSES}
        self.seconds: dict[tuple[str, str], float] = {}
        self.megabytes: dict[str, float] = {}

    def start(self, name: str, programs: Programs, arrays, cotangent) -> None:
        """Run each of a contestant's programs once."""
        _check_memory(programs.megabytes(), self.jobs)
        forward = functools.partial(programs.forward, arrays)
        seconds = {(name, "forward"): _first(forward)}
        _, pullback = jax.block_until_ready(programs.training(arrays))
        passes = {"forward": forward, "backward": functools.partial(programs.backward, pullback, cotangent)}
        seconds[name, "backward"] = _first(passes["backward"])
        self.seconds |= seconds
        self.megabytes[name] = programs.megabytes()
        for which, run in passes.items():
            if seconds[name, which] <= SLOW:
                self.runs[which][name] = run

    def row(self, case: Case, which: str, repeats: int) -> dict[str, Any]:
        """One pass of all of them, in turns but for the slow ones."""
        times = {
            name: [1e3 * taken] for (name, of), taken in self.seconds.items() if of == which and name not in self.runs[which]
        }
        times |= cards.turns(self.runs[which], repeats)
        ms = {name: cards.median(repeated) for name, repeated in times.items()}
        found = {}
        for name, taken in ms.items():
            rate = 1e-6 / taken / self.bandwidth
            kept = OPS[case.op].kept.get(name, lambda case: 0)(case) if which == "backward" else 0
            found[name] = {
                "ms": taken,
                "timed": len(times[name]),
                "of bandwidth": self.io[which] * rate,
                "with states": (self.io[which] + kept) * rate,
                "over": {peer: ms[key] / taken for key, peer in PEERS.items() if key in ms},
                "megabytes": self.megabytes[name],
            }
        size = {"io_gigabytes": self.io[which] / 1e9}
        return case._asdict() | {"pass": which} | size | {"contestants": found, "left out": self.reasons}


def _first(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def _check_memory(megabytes: float, jobs: int) -> None:
    """Where several processes take turns, the one before may not have given its memory back yet: half of all is there."""
    limit = 0.9 * (jax.devices()[0].memory_stats() or {}).get("bytes_limit", 32e9) / min(jobs, 2) / 1e6
    if megabytes > limit:
        raise MemoryError(f"it needs {megabytes / 1e3:.1f} GB, of {limit / 1e3:.1f}")


def _why_not(args: argparse.Namespace, op: Op, name: str, case: Case, arrays) -> str | None:
    if name not in (args.contestants or op.implementations):
        return "not asked for"
    others = op.explain(**arrays, implementation="reference").others
    if others.get(name, "").startswith("cannot"):
        return others[name].removeprefix("cannot: ")
    if name == "portable" and jax.default_backend() == "cpu":
        return "interpreted on a CPU: its time would mean nothing"
    if case.length > LONGEST.get(name, case.length):
        return f"not run above {LONGEST[name]} steps"
    return None


def _io(arrays, cotangent) -> dict[str, int]:
    """The least bytes of each pass; the backward one reads what the forward pass read, but writes no output."""
    inputs = sum(x.nbytes for x in arrays.values())
    return {"forward": inputs + cotangent.nbytes, "backward": 2 * inputs + cotangent.nbytes}


def copy_bandwidth(gigabytes: float) -> float:
    """GB/s of a program that reads and writes so many gigabytes, both counted."""
    x = jax.random.normal(jax.random.key(0), (int(gigabytes * 1e9) // 4,))
    copy = jax.jit(jnp.negative)
    return 2 * x.nbytes / cards.median(cards.milliseconds(lambda: copy(x), 5)) / 1e6


def fastest(rows: list[dict[str, Any]]) -> dict[str, list[str]]:
    """For each op its implementations, by the time of both passes of the first case measured."""
    order = {}
    for op in dict.fromkeys(row["op"] for row in rows):
        cases = [case._asdict() for case in CASES if case.op == op]
        found = [[row for row in rows if case.items() <= row.items()] for case in cases]
        first = next(both for both in found if len(both) == 2)
        names = [name for name in first[0]["contestants"] if name in first[1]["contestants"]]
        order[op] = sorted(names, key=lambda name: sum(row["contestants"][name]["ms"] for row in first))
    return order


def table(rows: list[dict[str, Any]]) -> str:
    """Of each contestant milliseconds and, with the states that it keeps, its share of the bandwidth, in the order of `CASES`."""
    order = {case: i for i, case in enumerate(CASES)}
    lines = []
    for row in sorted(rows, key=lambda row: order.get(Case(*(row[field] for field in Case._fields)), len(order))):
        found = row["contestants"]
        cells = {name: f"{found[name]['ms']:.3g} ({found[name]['with states']:.0%})" if name in found else "–" for name in NAMES}
        shape = " x ".join(str(row[field]) for field in ("batch", "length", "channels", "states"))
        lines.append({"op": row["op"], "B x L x E x N": shape, "pass": row["pass"]} | cells)
    return harness.markdown(lines)


def line(row: dict[str, Any]) -> str:
    """A row in short."""
    found = ", ".join(f"{name} {x['ms']:.3g} ms ({x['with states']:.0%})" for name, x in row["contestants"].items())
    return f"{' '.join(str(row[field]) for field in Case._fields)} {row['pass']}: {found}"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ops", nargs="+", default=list(OPS), choices=OPS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--contestants", nargs="+", help="these implementations alone")
    parser.add_argument("--jobs", type=int, default=1, help="processes, which compile at the same time and time one by one")
    parser.add_argument("--budget", type=float, default=600, help="seconds after which no more cases are taken in")
    parser.add_argument("--quick", action="store_true", help="64 steps of 32 channels")
    parser.add_argument("--commit", action="store_true", help="write the order measured, for this kind of device; on a GPU only")
    parser.add_argument("--out", help="by default results/<device>/scan.json")
    args = parser.parse_args()
    if args.commit and (args.quick or jax.default_backend() != "gpu"):
        parser.error(f"--commit needs the whole table on a GPU; here is {devices.here()}")
    return args


def main() -> None:
    args, start = parse(), time.perf_counter()
    out = args.out or f"results/{devices.slug(devices.here())}/scan.json"
    facts = {"clocks": cards.clocks(), "assembler": cards.assembler()}
    facts["bandwidth"] = copy_bandwidth(0.1 if jax.default_backend() == "cpu" else 1)
    rows = cards.resumed(out)
    done = [Case(*(row[field] for field in Case._fields)) for row in rows]
    cases = [case for case in (QUICK if args.quick else CASES) if case.op in args.ops and case not in done]
    for measured in cards.spread(functools.partial(measure, args, facts["bandwidth"]), cases, args.jobs, each=1):
        rows += measured
        harness.write(out, rows, **facts)
        title = f"{devices.here()}: milliseconds (share of the {facts['bandwidth']:.0f} GB/s that a copy reads and writes)"
        pathlib.Path(out).with_suffix(".md").write_text(f"{title}\n\n{table(rows)}\n")
        print("\n".join(map(line, measured)), f"\n  after {time.perf_counter() - start:.0f} s", flush=True)
        if time.perf_counter() - start > args.budget:
            print(f"{args.budget:g} seconds are over; the same command measures what is left")
            break
    if args.commit:
        print(f"wrote {cards.commit('fastest', fastest(rows), device=devices.here())}")


if __name__ == "__main__":
    main()
