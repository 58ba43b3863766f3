"""Jamba (Lieber et al. 2024, arXiv 2403.19887): attention and Mamba layers 1 : 7, a mixture of experts in every second layer.

    python train.py --config=configs/lm_jamba.py                      the small model, on bytes of text as in configs/lm_text.py
    python train.py --config=configs/lm_jamba.py:jamba_52b --check    the published shape; nothing is allocated

Blocks of 8 layers: attention is layer 4, the experts are in layers 1, 3, 5 and 7; RMS norms on the step sizes, B and C inside
Mamba; no positions; SwiGLU; no biases but those of the convolution and the step sizes (section 3.1; AI21's released Jamba-v0.1).
The weights of the two chosen experts are not renormalised, and the balance loss has weight 0.001 (modeling_jamba.py and
configuration_jamba.py in transformers).

Published: 52B parameters, 12B of them active for a token; `jamba_52b` has 51,570,323,328 and 12,110,311,296. Its training recipe
is not published and that of `small` stands in for it; no task here has its vocabulary of 65,536, so associative recall over as
many tokens stands in for text. `small` has 1.13M parameters, 0.79M of them active, and the published ratios of heads to key/value
heads and of feed-forward to model width; learning rate and duration are ours. Expected time: about 10 minutes on two CPU
cores.
"""

from efficient_attn.config import experiment


def jamba(*, blocks: int, width: int, heads: int, kv_heads: int, feed_forward: int, experts: int, **model) -> dict:
    """`blocks` blocks of eight layers."""
    mamba = dict(name="mamba", inner_norm=True)
    attention = dict(name="softmax", num_heads=heads, num_kv_heads=kv_heads, use_bias=False)
    mixture = dict(name="top_k", num_experts=experts, k=2, renormalise=False, balance_weight=0.001)
    return dict(
        depth=8 * blocks,
        width=width,
        mixer=(*[mamba] * 4, attention, *[mamba] * 3),
        feed_forward="swiglu",
        feed_forward_width=feed_forward,
        experts=(dict(name="none"), mixture),
        use_bias=False,
        norm="rms",
        **model,
    )


OPTIMIZER = dict(
    learning_rate=2e-3, schedule="cosine", warmup="100 steps", b2=0.99, weight_decay=0.1, clip_norm=1.0,
    rules=((r".*/(scale|bias|A_log|D|dt_bias)", dict(weight_decay=0.0)), (r".*", {})),
)  # fmt: skip

RECIPES = {
    "small": {
        "model": jamba(blocks=1, width=64, heads=4, kv_heads=1, feed_forward=224, experts=4),
        "optimizer": OPTIMIZER,
        "task": dict(name="lm_text", context=128),
    },
    "jamba_52b": {
        "model": jamba(
            blocks=4, width=4096, heads=32, kv_heads=8, feed_forward=14336, experts=16, remat="full", dtype="bfloat16"
        ),
        "optimizer": OPTIMIZER,
        "task": dict(name="multi_query_recall", vocab_size=65536, length=4096, num_pairs=64),
    },
}

TRAIN = dict(
    batch_size=32, duration="750 steps", eval_every="125 steps", checkpoint_every="250 steps", log_every=50, max_eval_batches=40
)


def get_config(recipe: str = "small"):
    return experiment(name="lm_jamba", task={}, recipes=RECIPES, recipe=recipe, train=TRAIN)
