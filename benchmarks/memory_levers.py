"""What each memory lever of a configuration saves: temporary bytes of one compiled training step, never run.

    python -m benchmarks.memory_levers --out=results/cpu/memory_levers.json

One language model: layers of softmax attention and feed-forward network, and a vocabulary whose logits outweigh them. Levers of
the layers are therefore measured with the loss in chunks, as they would be used. Two figures: XLA's own analysis of
the compiled step on this machine (arguments and results, which are parameters and optimiser state, are not counted), and
the bytes that JAX keeps of a forward pass for the backward pass, whatever the compiler makes of them. XLA for CPUs was seen to
show little of what rematerialisation saves; the second figure shows it.
"""

import argparse
import functools
import pathlib

import jax
import optax

from benchmarks import harness
from efficient_attn import models
from efficient_attn.models.blocks import REMAT_POLICIES
from efficient_attn.plan import example_batch, nbytes
from efficient_attn.steps import context, init_state, loss_sums, train_step
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


class Step:
    """The training step with these fields, for the shapes of `args`."""

    def __init__(self, args: argparse.Namespace, model_fields: dict, train_fields: dict):
        task = MultiQueryRecall(length=args.length, vocab_size=args.vocab)
        common = dict(depth=args.depth, width=args.width, feed_forward_width=4 * args.width, mixer=MIXER)
        self.model = models.build({**common, **model_fields}, task)
        self.tx, self.fields = optax.adamw(1e-3), train_fields
        self.batch = example_batch(task, args.batch)
        self.micro = example_batch(task, args.batch // train_fields.get("accumulate", 1))
        self.state = jax.eval_shape(functools.partial(init_state, self.model, self.tx, 0, ema=False), self.batch)

    def temporaries(self) -> int:
        """Bytes that the compiled step allocates besides its arguments and results."""
        step = jax.jit(functools.partial(train_step, self.model, self.tx, **self.fields), donate_argnums=0)
        return step.lower(self.state, self.batch).compile().memory_analysis().temp_size_in_bytes

    def kept(self) -> int:
        """Bytes that the backward pass is given by the forward pass of a micro-batch, parameters where it needs them."""
        chunk = self.fields.get("loss_chunk", 0)

        def loss(params, batch):
            fields = {"project": False} if chunk else {}
            output = self.model.apply({"params": params}, batch["inputs"], context(batch, train=True), **fields)
            return loss_sums(output, batch["targets"], batch["weights"], loss_chunk=chunk)["loss"][0]

        params = self.state.params
        residuals = jax.eval_shape(lambda params, batch: jax.vjp(lambda p: loss(p, batch), params)[1], params, self.micro)
        return nbytes(residuals)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = dict(batch=8, length=1024, depth=4, width=256, vocab=32768)
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=pathlib.Path, help="write the figures to this JSON file")
    args = parser.parse_args()
    rows = []
    for name, (model_fields, train_fields) in levers(args.length).items():
        step = Step(args, model_fields, train_fields)
        kept, temporaries = (round(size / 2**20) for size in (step.kept(), step.temporaries()))
        rows.append({"lever": name, "kept for the backward pass, MB": kept, "temporaries, MB": temporaries})
        print(rows[-1], flush=True)
    print(harness.markdown(rows))
    harness.write(args.out, rows, unit="MB (2^20 bytes)", **{name: getattr(args, name) for name in sizes})


if __name__ == "__main__":
    main()
