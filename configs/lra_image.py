"""Image of Long Range Arena (Tay et al. 2020): grey CIFAR-10 as a sequence of 1,024 pixels, 10 classes.

    python train.py --config=configs/lra_image.py:s5

The data are the official binary archive: downloaded where there is a network, else looked for in `config.task.data_dir`.

Published test accuracy: transformer 42.4, local 41.5, sparse_transformer 44.2, longformer 42.2, bigbird 40.8, synthesizer
41.6 (Tay et al., table 1), bigbird_small 43.2 (Skyformer, table 1, after 50,000 steps), transformer_small 40.6 to 42.3
(Skyformer, table 1; FlashAttention, table 3), s5 88.0 (Smith et al. 2023). Published time: transformer_small 4.2 h on a V100
(Skyformer, table 2). The transformers read intensities as tokens, s5 as real numbers.

Of configs/recipes_ssm.py, published: s4 88.7, s4d 88.2 (Gu et al. 2022, S4 table 10 and S4D), lru 89.0 (Orvieto et al. 2023,
in colour).

Of configs/recipes_low_rank.py, whose table has the published figures: linformer, performer, linear_attention and, in the small
protocol, these and nystrom (NAME_small).

Of configs/recipes_content.py, whose table has the published figures: reformer, sinkhorn and, in the small protocol,
reformer_small.

Of configs/recipes_hierarchy.py, whose table has the published figures: fnet, h_transformer_1d, combiner, bp_transformer.

Of configs/recipes_mamba.py: mamba, whose published figures disagree (MetaLA 69.8, xLSTM 68.9).
"""

from configs.recipes import lra_sparse, lra_transformer, s5, small_transformer
from configs.recipes_content import lra_content, small_content
from configs.recipes_hierarchy import lra_hierarchy
from configs.recipes_low_rank import lra_low_rank, small_low_rank
from configs.recipes_mamba import lra_mamba
from configs.recipes_ssm import lra_ssm
from efficient_attn.config import experiment

LRA = dict(
    depth=1, heads=8, width=128, qkv=64, mlp=128, batch=256, epochs=200, lr=5e-4, schedule="cosine", warmup=175,
    weight_decay=0.0, dropout=0.3, attention_dropout=0.2, positions="learned",
)  # fmt: skip
SMALL = dict(batch=256, steps=35_000, warmup=175)

RECIPES = {
    "s5": {
        "task": dict(as_tokens=False),
        **s5(
            layers=6, width=512, state=384, blocks=3, C_init="lecun_normal", activation="half_glu1", batch=50, epochs=250,
            ssm_lr=0.001, lr_factor=4.5, weight_decay=0.07, dropout=0.1, warmup_epochs=1, opt_config="BfastandCdecay",
            clip_eigs=True,
        ),
    },
    **lra_ssm("image"),
    **lra_mamba("image"),
    "transformer": lra_transformer(**LRA),
    **lra_sparse(
        LRA, max_length=1025,
        local=dict(heads=2, pooling="mean", mixer=dict(block_size=64)),
        longformer=dict(depth=4, heads=4, pooling="mean"),
        bigbird=dict(heads=4),
    ),
    **lra_low_rank(LRA, max_length=1025),
    **lra_hierarchy(LRA),
    **lra_content(
        LRA, max_length=1025,
        reformer=dict(depth=4, width=64, qkv=32, mlp=64),
        sinkhorn=dict(heads=1, width=32, qkv=32, mlp=64, weight_decay=0.7, dropout=0.1, mixer=dict(block_size=64)),
    ),
    "transformer_small": small_transformer(**SMALL),
    "bigbird_small": small_transformer(**SMALL, mixer=dict(name="bigbird")),
    **small_low_rank(SMALL, max_length=1024),
    **small_content(SMALL),
}  # fmt: skip


def get_config(recipe: str = "s5"):
    return experiment(name="lra_image", task=dict(name="image"), recipes=RECIPES, recipe=recipe)
