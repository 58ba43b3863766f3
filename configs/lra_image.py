"""Image of Long Range Arena (Tay et al. 2020): grey CIFAR-10 as a sequence of 1,024 pixels, 10 classes.

    python train.py --config=configs/lra_image.py:s5

The data are the official binary archive: downloaded where there is a network, else looked for in `config.task.data_dir`.

Published test accuracy: transformer 42.4 (Tay et al., table 1), transformer_small 40.6 to 42.3 (Skyformer, table 1;
FlashAttention, table 3), s5 88.0 (Smith et al. 2023). Published time: transformer_small 4.2 h on a V100 (Skyformer, table 2).
The transformers read intensities as tokens, s5 as real numbers.
"""

from configs.recipes import lra_transformer, s5, small_transformer
from efficient_attn.config import experiment

RECIPES = {
    "s5": {
        "task": dict(as_tokens=False),
        **s5(
            layers=6, width=512, state=384, blocks=3, C_init="lecun_normal", activation="half_glu1", batch=50, epochs=250,
            ssm_lr=0.001, lr_factor=4.5, weight_decay=0.07, dropout=0.1, warmup_epochs=1, opt_config="BfastandCdecay",
            clip_eigs=True,
        ),
    },
    "transformer": lra_transformer(
        depth=1, heads=8, width=128, qkv=64, mlp=128, batch=256, epochs=200, lr=5e-4, schedule="cosine", warmup=175,
        weight_decay=0.0, dropout=0.3, attention_dropout=0.2, positions="learned",
    ),
    "transformer_small": small_transformer(batch=256, steps=35_000, warmup=175),
}  # fmt: skip


def get_config(recipe: str = "s5"):
    return experiment(name="lra_image", task=dict(name="image"), recipes=RECIPES, recipe=recipe)
