"""Text of Long Range Arena (Tay et al. 2020): sentiment of IMDb reviews, read byte by byte. 25,000 + 25,000 reviews.

    python train.py --config=configs/lra_text.py:s5

The data are TFDS's imdb_reviews: downloaded where there is a network, else looked for in `config.task.data_dir`. The published
protocol selects checkpoints on the test set; here 10 % of train is held out for that, so numbers are comparable but stricter.

Published test accuracy: transformer 64.3, local 53.0, sparse_transformer 63.6, longformer 62.9, bigbird 64.0, synthesizer
61.7 (Tay et al., table 1), bigbird_small 63.9 (Skyformer, table 1, after 50,000 steps), transformer_small 61.9 to 63.6
(Skyformer, table 1; FlashAttention, table 3), s5 89.3 (Smith et al. 2023). Published time: transformer_small 4.3 h for 50,000
steps on a V100 (Skyformer, table 2).

Of configs/recipes_ssm.py, published: s4 86.8, s4d 86.2 (Gu et al. 2022, S4 table 10 and S4D), lru 89.4 (Orvieto et al. 2023).

Of configs/recipes_low_rank.py, whose table has the published figures: linformer, performer, linear_attention and, in the small
protocol, these and nystrom (NAME_small).

Of configs/recipes_content.py, whose table has the published figures: reformer, sinkhorn and, in the small protocol,
reformer_small.

Of configs/recipes_hierarchy.py, whose table has the published figures: fnet, h_transformer_1d, combiner, bp_transformer; and
han, of which none is known on bytes.

Of configs/recipes_cpu.py: NAME_cpu, in miniature, of which nothing is published.

Of configs/recipes_mamba.py: mamba, whose published figures disagree (MetaLA 83.0).
"""

from configs.recipes import lra_sparse, lra_transformer, s5, small_transformer
from configs.recipes_content import lra_content, small_content
from configs.recipes_cpu import lra_cpu
from configs.recipes_hierarchy import HAN, lra_hierarchy
from configs.recipes_low_rank import lra_low_rank, small_low_rank
from configs.recipes_mamba import lra_mamba
from configs.recipes_ssm import lra_ssm
from efficient_attn.config import experiment

LRA = dict(depth=4, heads=4, width=256, mlp=1024, batch=32, steps=20_000, lr=0.05, warmup=8_000, weight_decay=0.1)
FACTORIZED = dict(
    max_length=1001, synthesizer=dict(mixer=dict(mode="factorized_random", rank=32, dot_product=False))
)  # fmt: skip
LOW_RANK = dict(max_length=1001, linformer=dict(mixer=dict(projected_length=32)))
SMALL = dict(batch=32, steps=20_000, warmup=8_000)

RECIPES = {
    "s5": {
        "task": dict(max_bytes=4096),
        **s5(
            layers=6, width=256, state=192, blocks=12, C_init="lecun_normal", activation="half_glu2", batch=50, epochs=35,
            ssm_lr=0.001, lr_factor=4, weight_decay=0.07, dropout=0.1, warmup_epochs=0, opt_config="standard", dt_global=True,
        ),
    },
    **lra_ssm("text"),
    **lra_mamba("text"),
    "transformer": {"task": dict(max_bytes=1000), **lra_transformer(**LRA)},
    **{name: {"task": dict(max_bytes=1000), **recipe} for name, recipe in lra_sparse(LRA, **FACTORIZED).items()},
    **{name: {"task": dict(max_bytes=1000), **recipe} for name, recipe in lra_low_rank(LRA, **LOW_RANK).items()},
    **lra_hierarchy(LRA, task=dict(max_bytes=1000)),
    **{n: {"task": dict(max_bytes=1000), **recipe} for n, recipe in lra_content(LRA, max_length=1001).items()},
    "han": HAN,
    "transformer_small": {"task": dict(max_bytes=4000), **small_transformer(**SMALL)},
    "bigbird_small": {"task": dict(max_bytes=4000), **small_transformer(**SMALL, mixer=dict(name="bigbird"))},
    **{n: {"task": dict(max_bytes=4000), **recipe} for n, recipe in small_low_rank(SMALL, max_length=4000).items()},
    **{n: {"task": dict(max_bytes=4000), **recipe} for n, recipe in small_content(SMALL).items()},
    **lra_cpu("text"),
}  # fmt: skip


def get_config(recipe: str = "s5"):
    return experiment(name="lra_text", task=dict(name="text"), recipes=RECIPES, recipe=recipe)
