"""Whole train steps on the device that is here: a language model of 124M parameters by context, Mamba, and Path-X.

    python -m benchmarks.gpu_train                        all workloads; results/<device>/train.json
    python -m benchmarks.gpu_train --jobs=4 --budget=150  four processes, which compile at the same time; ends after 150 seconds
    python -m benchmarks.gpu_train --quick                a small form on any device, under a minute on a CPU

The step is the train loop's own (`steps.train_step`: loss in chunks, gradients, clipping, AdamW), on random tokens without
padding or documents, in bfloat16 with float32 parameters and statistics (Path-X as its recipes say). A step of the language
models takes the same number of tokens at every context, so that what changes is attention. The contestants of a workload take
turns, a few steps each.

Of each: median milliseconds of a step, tokens a second, the gigabytes that the compiled step needs, and MFU: the model's
operations a second over those of a square bfloat16 matrix product measured in the same run. The model's operations are, for
each token, 6 for each weight of a matrix, the output layer's among them, and 6 E L for each causal attention layer (half of all
pairs), forward and backward together; what is computed twice counts once, scans and elementwise work not at all. Path-X has no
such count. `over cudnn` is how many times as fast as the same model on cuDNN's attention. Written after each workload; the same
command goes on where it stopped.
"""

import argparse
import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Mapping
from concurrent import futures
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import cards, harness
from benchmarks.gpu_attention import matmul_tflops
from configs import lra_pathx
from efficient_attn import optim
from efficient_attn.models.decoder import LanguageModel
from efficient_attn.plan import example_batch, make_plan
from efficient_attn.steps import init_state, train_step
from kernels import devices

VOCABULARY = 50304
"""GPT-2's 50257, in whole tiles of 128."""
CHUNK = 8192
"""Tokens whose logits are there at a time."""
TRANSFORMER = dict(depth=12, width=768, feed_forward_width=3072, use_bias=False)
HEADS = dict(name="softmax", num_heads=12, causal=True, use_bias=False, rotation=dict(name="rotary"))
MAMBA = dict(depth=24, width=768, norm="rms", use_bias=False, remat="full")
SMALL = dict(depth=2, width=64, use_bias=False)


@dataclasses.dataclass(frozen=True)
class Workload:
    """What a step computes: `rows` sequences of `length`; the contestants are values of the mixer's `implementation`."""

    name: str
    length: int
    rows: int
    contestants: tuple[str | None, ...]

    @property
    def tokens(self) -> int:
        return self.rows * self.length


@dataclasses.dataclass(frozen=True)
class Step:
    """A train step, compiled but for its arrays: the pure function, what makes its state, its batch, the model's operations."""

    run: Callable[[Any, Any], tuple[Any, Any]]
    init: Callable[[], Any]
    batch: Mapping[str, Any]
    operations: float | None


def lm(fields: Mapping[str, Any], mixer: Mapping[str, Any], vocabulary: int, work: Workload, implementation: str | None) -> Step:
    """A step of a language model with tied vectors, whose mixer runs `implementation`."""
    mixer = {**mixer, "implementation": implementation}
    sizes = dict(vocab_size=vocabulary, num_outputs=vocabulary, length=work.length)
    model = LanguageModel(**fields, **sizes, mixer=mixer, tied=True, dtype=jnp.bfloat16)
    tokens = np.random.default_rng(0).integers(1, vocabulary, (work.rows, work.length + 1)).astype(np.int32)
    ones = np.ones((work.rows, work.length), np.float32)
    batch = {"inputs": tokens[:, :-1], "mask": None, "targets": tokens[:, 1:], "weights": ones}

    def init(tx):
        return init_state(model, tx, 0, {"inputs": jnp.zeros((1, work.length), jnp.int32), "mask": None}, ema=False)

    params = jax.eval_shape(lambda: init(optax.identity())).params
    config = optim.OptimizerConfig(learning_rate=6e-4, warmup="100 steps", b2=0.95, weight_decay=0.1, clip_norm=1.0)
    tx = optim.build(config, params, warmup=100, total=1000)
    run = functools.partial(train_step, model, tx, loss_chunk=max(1, min(work.length, CHUNK // work.rows)))
    weights = sum(x.size for x in jax.tree.leaves(params) if x.ndim > 1)
    attention = fields["depth"] * fields["width"] * work.length if mixer["name"] == "softmax" else 0
    return Step(run, lambda: init(tx), batch, 6.0 * work.tokens * (weights + attention))


def pathx(recipe: str, work: Workload, implementation: str | None) -> Step:
    """A step of a Path-X recipe, on as many rows as the workload says."""
    config = lra_pathx.get_config(recipe).to_dict()
    config["train"]["batch_size"] = work.rows
    if implementation is not None:
        config["model"]["mixer"]["implementation"] = implementation
    plan = make_plan(config)
    rng = np.random.default_rng(0)
    drawn = {
        "inputs": lambda x: rng.integers(1, 256, x.shape) if x.dtype == np.int32 else rng.normal(size=x.shape),
        "mask": lambda x: np.ones(x.shape),
        "targets": lambda x: rng.integers(0, 2, x.shape),
        "weights": lambda x: np.ones(x.shape),
    }
    batch = {name: drawn[name](x).astype(x.dtype) for name, x in example_batch(plan.task, work.rows).items()}
    return Step(functools.partial(train_step, plan.model, plan.tx, **plan.step_options), plan.init_state, batch, None)


STEPS: Mapping[str, Callable[[Workload, str | None], Step]] = {
    "LM 124M": functools.partial(lm, TRANSFORMER, HEADS, VOCABULARY),
    "Mamba 129M": functools.partial(lm, MAMBA, dict(name="mamba", causal=True), VOCABULARY),
    "Path-X s5": functools.partial(pathx, "s5"),
    "Path-X transformer": functools.partial(pathx, "transformer"),
    "LM, small": functools.partial(lm, SMALL | dict(feed_forward_width=128), HEADS | dict(num_heads=1), 512),
    "Mamba, small": functools.partial(lm, SMALL, dict(name="mamba", causal=True), 512),
}


def workloads(tokens: int) -> list[Workload]:
    """All of them, the headline first; Mamba's step takes half of the tokens, since its layers keep more."""
    attention = ("mosaic", "cudnn")
    first = [Workload("LM 124M", length, tokens // length, attention) for length in (16384, 4096, 65536, 1024)]
    mamba = [Workload("Mamba 129M", length, tokens // 2 // length, ("triton", "portable")) for length in (16384, 1024)]
    return [*first, *mamba, Workload("Path-X s5", 16384, 8, (None,)), Workload("Path-X transformer", 16384, 4, (None,))]


QUICK = [Workload("LM, small", 128, 2, ("chunked", "reference")), Workload("Mamba, small", 128, 2, ("chunked",))]


def measure(args: argparse.Namespace, matmul: float, work: Workload) -> dict[str, Any]:
    """The row of one workload."""
    steps, lowered, reasons = {}, {}, {}
    with cards.compiling():
        for name in work.contestants:
            try:
                steps[name] = step = STEPS[work.name](work, name)
                state = jax.eval_shape(step.init)
                lowered[name] = jax.jit(step.run, donate_argnums=0).lower(state, step.batch), jax.jit(step.init).lower()
            except Exception as error:  # an implementation that cannot run here: the others are still measured
                reasons[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        with futures.ThreadPoolExecutor(max(1, 2 * len(lowered))) as pool:
            pending = {name: [pool.submit(program.compile) for program in programs] for name, programs in lowered.items()}
    running: dict[str | None, Running] = {}
    with cards.alone():
        for name, programs in pending.items():
            try:
                running[name] = Running(steps[name], *(program.result() for program in programs))
            except Exception as error:  # whatever a compiler or a device raises
                reasons[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        times = {name: [] for name in running}
        for _ in range(args.repeats):
            for name, contestant in running.items():
                times[name].append(contestant.milliseconds(args.seconds))
    return _row(work, running, times, reasons, matmul)


class Running:
    """A contestant's compiled step and its state."""

    def __init__(self, step: Step, program, init):
        self.step, self.program = step, program
        found = program.memory_analysis()
        parts = "temp_size_in_bytes", "argument_size_in_bytes", "output_size_in_bytes"
        self.gigabytes = (sum(getattr(found, part) for part in parts) - found.alias_size_in_bytes) / 1e9
        self.state = init()
        self.parameters = sum(x.size for x in jax.tree.leaves(self.state.params))
        self.batch = jax.device_put(dict(step.batch))
        self._take(1)  # warm-up
        self.once = self._take(1)

    def _take(self, count: int) -> float:
        """Seconds of a step, of so many."""
        start = time.perf_counter()
        for _ in range(count):
            self.state, sums = self.program(self.state, self.batch)
        loss = float(sums["loss"][0] / sums["loss"][1])
        if not np.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} after {int(self.state.step)} steps")
        return (time.perf_counter() - start) / count

    def milliseconds(self, seconds: float) -> float:
        """Of a step, of as many as take `seconds`."""
        return 1e3 * self._take(max(1, round(seconds / self.once)))


def _row(work: Workload, running: dict[str | None, Running], times, reasons, matmul: float) -> dict[str, Any]:
    ms = {name: cards.median(taken) for name, taken in times.items()}
    found = {}
    for name, taken in ms.items():
        entry = {"ms": taken, "tokens_per_second": 1e3 * work.tokens / taken, "gigabytes": running[name].gigabytes}
        if running[name].step.operations is not None:
            entry["tflops"] = running[name].step.operations / taken / 1e9
            entry["mfu"] = entry["tflops"] / matmul
        if "cudnn" in ms:
            entry["over cudnn"] = ms["cudnn"] / taken
        found[name or "default"] = entry | {"parameters": running[name].parameters, "times": times[name]}
    row = {"workload": work.name, "length": work.length, "rows": work.rows, "tokens": work.tokens}
    return row | {"contestants": found, "left out": {name or "default": reason for name, reason in reasons.items()}}


def table(rows: list[dict[str, Any]]) -> str:
    """A line for each contestant of each workload."""
    lines = []
    for row in rows:
        for name, x in row["contestants"].items():
            figures = {"ms": f"{x['ms']:.4g}", "tokens/s": f"{x['tokens_per_second']:,.0f}"}
            figures |= {"MFU": f"{x['mfu']:.1%}" if "mfu" in x else "–", "GB": f"{x['gigabytes']:.1f}"}
            ratio = f"{x['over cudnn']:.2f}" if "over cudnn" in x else "–"
            lines.append(
                {"step": f"{row['workload']}, {row['rows']} x {row['length']}", "by": name} | figures | {"over cudnn": ratio}
            )
    return harness.markdown(lines)


def line(row: dict[str, Any]) -> str:
    """A row in short."""
    parts = [
        f"{name} {x['ms']:.4g} ms, {x['tokens_per_second']:,.0f} tokens/s, {x.get('mfu', float('nan')):.1%} MFU, "
        f"{x['gigabytes']:.1f} GB"
        for name, x in row["contestants"].items()
    ]
    parts += [f"{name} left out: {reason}" for name, reason in row["left out"].items()]
    return "\n  ".join([f"{row['workload']}, {row['rows']} x {row['length']}", *parts])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workloads", nargs="+", help="these alone", choices=STEPS)
    parser.add_argument("--lengths", nargs="+", type=int, help="these alone")
    parser.add_argument("--contestants", nargs="+", help="in place of each workload's own")
    parser.add_argument("--tokens", type=int, default=65536, help="of a step")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each contestant")
    parser.add_argument("--seconds", type=float, default=0.5, help="of one turn, in whole steps")
    parser.add_argument("--jobs", type=int, default=1, help="processes, which compile at the same time and time one by one")
    parser.add_argument("--budget", type=float, default=600, help="seconds after which no more workloads are taken in")
    parser.add_argument("--quick", action="store_true", help="256 tokens of models of 2 layers of width 64")
    parser.add_argument("--out", help="by default results/<device>/train.json")
    args, start = parser.parse_args(), time.perf_counter()
    out = args.out or f"results/{devices.slug(devices.here())}/train.json"
    facts = {"clocks": cards.clocks(), "assembler": cards.assembler()}
    facts["matmul_tflops"] = matmul_tflops(512 if jax.default_backend() == "cpu" else 8192)
    rows = cards.resumed(out)
    done = {(row["workload"], row["length"], row["tokens"]) for row in rows}
    work = [w for w in (QUICK if args.quick else workloads(args.tokens)) if (w.name, w.length, w.tokens) not in done]
    work = [w for w in work if w.name in (args.workloads or STEPS) and w.length in (args.lengths or [w.length])]
    work = [dataclasses.replace(w, contestants=tuple(args.contestants or w.contestants)) for w in work]
    for row in cards.spread(functools.partial(measure, args, facts["matmul_tflops"]), work, args.jobs, each=1):
        print(line(row), f"\n  after {time.perf_counter() - start:.0f} s", flush=True)
        if row["contestants"]:
            rows.append(row)
            harness.write(out, rows, vocabulary=VOCABULARY, loss_chunk=CHUNK, **facts)
            title = f"{devices.here()}, whose square bfloat16 products reach {facts['matmul_tflops']:.0f} TFLOP/s"
            pathlib.Path(out).with_suffix(".md").write_text(f"{title}\n\n{table(rows)}\n")
        if time.perf_counter() - start > args.budget:
            print(f"{args.budget:g} seconds are over; the same command measures what is left")
            break


if __name__ == "__main__":
    main()
