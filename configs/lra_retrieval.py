"""Retrieval of Long Range Arena (Tay et al. 2020): does one of two papers of the ACL Anthology Network cite the other?
Two documents of 4,000 bytes, encoded apart by the same model.

    python train.py --config=configs/lra_retrieval.py:s5 --config.task.data_dir=DIR

The data are the release's new_aan_pairs.{train,eval,test}.tsv: 7.7 GB to download where there is a network, else put in
`config.task.data_dir`.

Published test accuracy: transformer 57.5 (Tay et al., table 1), transformer_small 80.7 to 81.6 (Skyformer, table 1;
FlashAttention, table 3), s5 91.4 (Smith et al. 2023). Published time: transformer_small 8.3 h for 50,000 steps on a V100
(Skyformer, table 2); its schedule here is the 30,000 steps of mlpen/Nystromformer.
"""

from configs.recipes import lra_transformer, s5, small_transformer
from efficient_attn.config import experiment

RECIPES = {
    "s5": s5(
        layers=6, width=128, state=256, blocks=16, C_init="trunc_standard_normal", activation="half_glu1", batch=32, epochs=20,
        ssm_lr=0.001, lr_factor=2, weight_decay=0.05, dropout=0.0, warmup_epochs=1, opt_config="standard", dt_global=True,
    ),
    "transformer": lra_transformer(
        depth=4, heads=4, width=128, mlp=512, batch=32, steps=5_000, lr=0.05, warmup=8_000, weight_decay=0.1
    ),
    "transformer_small": small_transformer(batch=32, steps=30_000, warmup=800),
}  # fmt: skip


def get_config(recipe: str = "s5"):
    return experiment(name="lra_retrieval", task=dict(name="retrieval"), recipes=RECIPES, recipe=recipe)
