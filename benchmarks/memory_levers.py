"""What each memory lever of a configuration saves: temporary bytes of one compiled training step, never run.

    python -m benchmarks.memory_levers --out=results/cpu/memory_levers.json

One language model: layers of softmax attention and feed-forward network, and a vocabulary whose logits outweigh them. Levers of
the layers are therefore measured with the loss in chunks, as they would be used. XLA's own analysis of the compiled step on
this machine: arguments and results (parameters, optimiser state) are not counted.
"""

import argparse
import functools
import pathlib

import jax
import optax

from benchmarks import harness
from efficient_attn import models
from efficient_attn.models.blocks import REMAT_POLICIES
from efficient_attn.plan import example_batch
from efficient_attn.steps import init_state, train_step
from efficient_attn.tasks.synthetic import MultiQueryRecall

MIXER = dict(name="softmax", num_heads=4, causal=True)


def levers(length: int) -> dict[str, tuple[dict, dict]]:
    """Lever -> (fields of config.model, fields of config.train)."""
    chunk, loss = dict(feed_forward_chunk=length // 8), dict(loss_chunk=length // 8)
    layers = {
        **{f"remat={name}": dict(remat=name) for name in REMAT_POLICIES if name != "none"},
        "residual=reversible": dict(residual="reversible"),
        f"feed_forward_chunk={length // 8}": chunk,
    }
    return {
        "none": ({}, {}),
        "train.accumulate=8": ({}, dict(accumulate=8)),
        f"train.loss_chunk={length // 8}": ({}, loss),
        **{f"the same, model.{name}": (fields, loss) for name, fields in layers.items()},
        "the same, remat=full, feed_forward_chunk, accumulate=8": (dict(remat="full", **chunk), dict(accumulate=8, **loss)),
    }


def compiled_step(args: argparse.Namespace, model_fields: dict, train_fields: dict):
    """The training step with these fields, compiled for the shapes of `args`."""
    task = MultiQueryRecall(length=args.length, vocab_size=args.vocab)
    common = dict(depth=args.depth, width=args.width, feed_forward_width=4 * args.width, mixer=MIXER)
    model = models.build({**common, **model_fields}, task)
    tx = optax.adamw(1e-3)
    batch = example_batch(task, args.batch)
    state = jax.eval_shape(functools.partial(init_state, model, tx, 0, ema=False), batch)
    step = jax.jit(functools.partial(train_step, model, tx, **train_fields), donate_argnums=0)
    return step.lower(state, batch).compile()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = dict(batch=8, length=1024, depth=4, width=256, vocab=32768)
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=pathlib.Path, help="write the figures to this JSON file")
    args = parser.parse_args()
    rows = []
    for name, (model_fields, train_fields) in levers(args.length).items():
        compiled = compiled_step(args, model_fields, train_fields)
        megabytes = compiled.memory_analysis().temp_size_in_bytes / 2**20
        first = rows[0]["temporaries, MB"] if rows else megabytes
        rows.append({"lever": name, "temporaries, MB": round(megabytes), "of none": round(megabytes / first, 3)})
        print(rows[-1], flush=True)
    print(harness.markdown(rows))
    harness.write(args.out, rows, unit="MB (2^20 bytes) of temporaries", **{name: getattr(args, name) for name in sizes})


if __name__ == "__main__":
    main()
