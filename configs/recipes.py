"""Parts that the recipes of several Long Range Arena tasks share, with their sources."""

from collections.abc import Mapping, Sequence
from typing import Any

Mixer = Mapping[str, Any] | Sequence[Mapping[str, Any]]


def attention_mixer(shared: Mapping[str, Any], mixer: Mixer | None) -> Mixer:
    """Softmax attention with the `shared` arguments, or `mixer` (one or several for the layers in turn) with them."""
    if mixer is None:
        return dict(name="softmax", **shared)
    if isinstance(mixer, Mapping):
        return {**shared, **mixer}
    return tuple({**shared, **layer} for layer in mixer)


def s5_rules(ratio: float, opt_config: str, *, dt_global: bool = False) -> tuple:
    """Optimiser rules of the released S5 code.

    ratio: the SSM learning rate over the global one (1 / lr_factor there). Lambda and, unless `dt_global`, the step sizes
        train at the SSM rate without weight decay, everything else at the global rate with it.
    opt_config: what happens to B and C instead. "standard": B as Lambda; "BandCdecay": B at the SSM rate with decay;
        "BfastandCdecay": both as everything else; "noBCdecay": B, C and D as Lambda.
    """
    ssm = {"lr_mult": ratio, "weight_decay": 0.0}
    special = {
        "standard": ((r".*/mixer/B", ssm),),
        "BandCdecay": ((r".*/mixer/B", {"lr_mult": ratio}),),
        "BfastandCdecay": (),
        "noBCdecay": ((r".*/mixer/[BCD]", ssm),),
    }
    slow = "Lambda_re|Lambda_im" if dt_global else "Lambda_re|Lambda_im|log_step"
    return ((rf".*/mixer/({slow})", ssm), *special[opt_config], (r".*", {}))


def lra_transformer(
    *, depth: int, heads: int, width: int, mlp: int, batch: int, lr: float, warmup: int, weight_decay: float,
    steps: int = 0, epochs: int = 0, schedule: str = "rsqrt", pooling: str = "cls", qkv: int = 0, dropout: float = 0.1,
    attention_dropout: float = 0.1, positions: str = "sinusoidal", clip_norm: float = 0.0, mixer: Mixer | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The Transformer of the google-research/long-range-arena repository's configs (not of the paper's appendix, which differs).

    lr: the repository's base learning rate; its rsqrt schedule multiplies it by 1/sqrt(warmup) at the peak.
    warmup: in steps. qkv: heads x head size, if it is not `width`. mixer: what takes the place of softmax attention.
    """
    shared = dict(num_heads=heads, head_dim=(qkv or width) // heads, dropout=attention_dropout, use_bias=False)
    return {
        "model": dict(
            depth=depth,
            width=width,
            feed_forward_width=mlp,
            pooling=pooling,
            dropout=dropout,
            embed_dropout=dropout,
            embed_stddev=1.0,
            positions=dict(name=positions),
            mixer=attention_mixer(shared, mixer),
        ),
        "optimizer": dict(
            learning_rate=lr / warmup**0.5 if schedule == "rsqrt" else lr,
            schedule=schedule,
            warmup=f"{warmup} steps",
            weight_decay=weight_decay,
            clip_norm=clip_norm,
            b2=0.98,
            eps=1e-9,
        ),
        "train": dict(
            batch_size=batch,
            duration=f"{steps} steps" if steps else f"{epochs} epochs",
            eval_every=f"{max(1, steps // 20)} steps" if steps else "1 epochs",
        ),
    }


def lra_sparse(base: Mapping[str, Any], *, max_length: int, **changes: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The sparse and synthetic attention of the google-research/long-range-arena repository, by the mechanism's name.

    base: arguments of `lra_transformer` that they share. changes: by mechanism, the arguments in which it differs from them, and
        under "mixer" the mixer's. max_length: positions of the model, with the CLS vector where there is one.

    Where the code there does otherwise than the papers, this is: local attends blocks of neighbours (there a reshape makes each
    block of positions a constant distance apart); sparse_transformer is causal with a CLS vector that sees all, as there, but
    blocks are counted from CLS on and the first column of a block is no summary; longformer has no global tokens, as there;
    bigbird draws random blocks of each layer and head by seed.
    """
    cls = base.get("pooling", "cls") == "cls"
    mixers = {
        "local": dict(name="block_local", block_size=50),
        "sparse_transformer": dict(
            name="sparse_transformer", kind="fixed", stride=50, width=10, distinct=False, one_sided=True, global_tokens=int(cls)
        ),
        "longformer": dict(name="longformer", window=512),
        "bigbird": dict(name="bigbird", block_size=64, num_random=3),
        "synthesizer": dict(name="synthesizer", mode="random", dot_product=True, max_length=max_length),
    }  # fmt: skip
    recipes = {}
    for name, mixer in mixers.items():
        own = dict(changes.get(name, {}))
        mixer |= own.pop("mixer", {})
        arguments = {**base, **own}
        layers = tuple({**mixer, "seed": layer} for layer in range(arguments["depth"])) if name == "bigbird" else mixer
        recipes[name] = lra_transformer(**arguments, mixer=layers)
    return recipes


def small_transformer(
    *, batch: int, steps: int, warmup: int, lr: float = 1e-4, mixer: Mixer | None = None
) -> dict[str, Any]:  # fmt: skip
    """The small protocol of Xiong et al. (2021) that FlashAttention and Skyformer use: 2 layers, width 64, 2 heads of 32,
    feed-forward 128, dropout 0.1, mean pooling, learned positions, no weight decay (mlpen/Nystromformer, LRA/code)."""
    return {
        "model": dict(
            depth=2,
            width=64,
            feed_forward_width=128,
            pooling="mean",
            dropout=0.1,
            embed_dropout=0.1,
            positions=dict(name="learned"),
            mixer=attention_mixer(dict(num_heads=2, dropout=0.1), mixer),
        ),
        "optimizer": dict(learning_rate=lr, schedule="linear", warmup=f"{warmup} steps"),
        "train": dict(batch_size=batch, duration=f"{steps} steps", eval_every=f"{max(1, steps // 20)} steps"),
    }


def s5(
    *, layers: int, width: int, state: int, blocks: int, C_init: str, activation: str, batch: int, epochs: int, ssm_lr: float,
    lr_factor: float, weight_decay: float, dropout: float, warmup_epochs: int, opt_config: str, dt_global: bool = False,
    dt_min: float = 0.001, clip_eigs: bool = False, bn_momentum: float = 0.95,
) -> dict[str, Any]:  # fmt: skip
    """S5 as published (Smith et al. 2023, table 11; lindermanlab/S5, bin/run_experiments): one argument for each flag there."""
    return {
        "model": dict(
            depth=layers,
            width=width,
            norm="batch",
            norm_momentum=bn_momentum,
            final_norm=False,
            embed_stddev=0.25,
            mixer=dict(
                name="s5", state_dim=state, blocks=blocks, C_init=C_init, activation=activation, dropout=dropout,
                dt_min=dt_min, clip_eigs=clip_eigs,
            ),
        ),
        "optimizer": dict(
            learning_rate=ssm_lr * lr_factor,
            weight_decay=weight_decay,
            schedule="cosine",
            warmup=f"{warmup_epochs} epochs",
            rules=s5_rules(1 / lr_factor, opt_config, dt_global=dt_global),
        ),
        "train": dict(batch_size=batch, duration=f"{epochs} epochs"),
    }  # fmt: skip
