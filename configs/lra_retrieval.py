"""Retrieval of Long Range Arena (Tay et al. 2020): does one of two papers of the ACL Anthology Network cite the other?
Two documents of 4,000 bytes, encoded apart by the same model.

    python train.py --config=configs/lra_retrieval.py:s5 --config.task.data_dir=DIR

The data are the release's new_aan_pairs.{train,eval,test}.tsv: 7.7 GB to download where there is a network, else put in
`config.task.data_dir`.

Published test accuracy: transformer 57.5, local 53.4, sparse_transformer 59.6, longformer 56.9, bigbird 59.3, synthesizer
54.7 (Tay et al., table 1), bigbird_small 80.3 (Skyformer, table 1, after 50,000 steps), transformer_small 80.7 to 81.6
(Skyformer, table 1; FlashAttention, table 3), s5 91.4 (Smith et al. 2023). Published time: transformer_small 8.3 h for 50,000
steps on a V100 (Skyformer, table 2); its schedule here is the 30,000 steps of mlpen/Nystromformer.

Of configs/recipes_ssm.py, published: s4 90.9, s4d 89.5 (Gu et al. 2022, S4 table 10 and S4D), lru 89.9 (Orvieto et al. 2023).

Of configs/recipes_low_rank.py, whose table has the published figures: linformer, performer, linear_attention and, in the small
protocol, these and nystrom (NAME_small).

Of configs/recipes_content.py, whose table has the published figures: reformer, sinkhorn and, in the small protocol,
reformer_small.

Of configs/recipes_hierarchy.py, whose table has the published figures: fnet, h_transformer_1d, combiner, bp_transformer.

Of configs/recipes_mamba.py: mamba, whose published figures disagree (MetaLA 72.1, xLSTM 90.2).
"""

from configs.recipes import lra_sparse, lra_transformer, s5, small_transformer
from configs.recipes_content import lra_content, small_content
from configs.recipes_hierarchy import lra_hierarchy
from configs.recipes_low_rank import lra_low_rank, small_low_rank
from configs.recipes_mamba import lra_mamba
from configs.recipes_ssm import lra_ssm
from efficient_attn.config import experiment

LRA = dict(depth=4, heads=4, width=128, mlp=512, batch=32, steps=5_000, lr=0.05, warmup=8_000, weight_decay=0.1)
SMALL = dict(batch=32, steps=30_000, warmup=800)

RECIPES = {
    "s5": s5(
        layers=6, width=128, state=256, blocks=16, C_init="trunc_standard_normal", activation="half_glu1", batch=32, epochs=20,
        ssm_lr=0.001, lr_factor=2, weight_decay=0.05, dropout=0.0, warmup_epochs=1, opt_config="standard", dt_global=True,
    ),
    **lra_ssm("retrieval"),
    **lra_mamba("retrieval"),
    "transformer": lra_transformer(**LRA),
    **lra_sparse(LRA, max_length=4001),
    **lra_low_rank(LRA, max_length=4001),
    **lra_hierarchy(LRA),
    **lra_content(LRA, max_length=4001),
    "transformer_small": small_transformer(**SMALL),
    "bigbird_small": small_transformer(**SMALL, mixer=dict(name="bigbird")),
    **small_low_rank(SMALL, max_length=4000),
    **small_content(SMALL),
}  # fmt: skip


def get_config(recipe: str = "s5"):
    return experiment(name="lra_retrieval", task=dict(name="retrieval"), recipes=RECIPES, recipe=recipe)
