"""Path-X of Long Range Arena (Tay et al. 2020): Pathfinder at 128 x 128 pixels, a sequence of 16,384.

    python train.py --config=configs/lra_pathx.py
    python train.py --config=configs/lra_pathx.py --config.task.num_examples=64 --config.train.batch_size=2     a small try

Published test accuracy: transformer at chance (50; "FAIL" in Tay et al., table 1), s5 98.6 (Smith et al. 2023). No published
time for s5; S4 trained Path-X on one A100.

Of configs/recipes_ssm.py, published: s4 96.4, s4d 92.0 (Gu et al. 2022, S4 table 10 and S4D), lru 94.2 (Orvieto et al. 2023).

Of the other mechanisms of Tay et al. only failures are published (and of fnet: Gu et al. 2022, S4 table 10). Their recipes are
the benchmark's base configuration for Path-X with the mechanisms' arguments of 32 x 32 Pathfinder; the L x L weights of the
synthesizer would be 2 GB a layer.

Of configs/recipes_mamba.py: mamba, whose published figures disagree (MetaLA 67.3).
"""

from configs.recipes import lra_sparse, lra_transformer, s5
from configs.recipes_content import lra_content
from configs.recipes_hierarchy import lra_hierarchy
from configs.recipes_low_rank import lra_low_rank
from configs.recipes_mamba import lra_mamba
from configs.recipes_ssm import lra_ssm
from efficient_attn.config import experiment

LRA = dict(
    depth=1, heads=2, width=32, qkv=16, mlp=32, batch=64, epochs=200, lr=1e-3, schedule="cosine", warmup=2_500,
    weight_decay=0.0, pooling="mean", dropout=0.1, attention_dropout=0.1, positions="learned", clip_norm=1.0,
)  # fmt: skip
FAILED = {
    **lra_sparse(LRA, max_length=128**2, local=dict(mixer=dict(block_size=64))),
    **lra_low_rank(LRA, max_length=128**2),
    **lra_content(LRA, max_length=128**2, sinkhorn=dict(mixer=dict(block_size=64))),
    **lra_hierarchy(LRA),
}
FAILED = {name: recipe for name, recipe in FAILED.items() if name not in ("synthesizer", "combiner", "bp_transformer")}
"""Mechanisms of which only a failure is published."""

RECIPES = {
    "s5": s5(
        layers=6, width=128, state=256, blocks=16, C_init="complex_normal", activation="half_glu1", batch=32, epochs=75,
        ssm_lr=0.0006, lr_factor=3, weight_decay=0.06, dropout=0.0, warmup_epochs=1, opt_config="BandCdecay", dt_min=0.0001,
        bn_momentum=0.9,
    ),
    **lra_ssm("pathx"),
    **lra_mamba("pathx"),
    "transformer": {"task": dict(as_tokens=True), **lra_transformer(**LRA)},
    **{name: {**recipe, "task": dict(as_tokens=True)} for name, recipe in FAILED.items()},
}  # fmt: skip


def get_config(recipe: str = "s5"):
    return experiment(name="lra_pathx", task=dict(name="pathfinder", resolution=128), recipes=RECIPES, recipe=recipe)
