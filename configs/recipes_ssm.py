"""Long Range Arena recipes of S4, S4D and LRU, one published table each; `lra_ssm(task)` is what a task's file includes.

s4: the current configurations of the S4 repository (state-spaces/s4, configs/experiment/lra/s4-*.yaml).
s4_v3: its third generation (configs/experiment/lra/old/v3-*.yaml), whose results Gu et al. 2022 (S4D) print.
s4d: the same with S4D-LegS for the layer, as Gu et al. 2022 (S4D) compare them.
lru: Orvieto et al. 2023, table 9. They tuned the base learning rate per task and do not print it: 0.001 is ours.
"""

from collections.abc import Mapping
from typing import Any

TASKS: Mapping[str, Mapping[str, Any]] = {
    "listops": dict(max_tokens=2048),
    "text": dict(max_bytes=4096),
    "retrieval": {},
    "image": dict(as_tokens=False),
    "pathfinder": {},
    "pathx": {},
}
"""Task arguments that all these recipes share."""

S4: Mapping[str, Mapping[str, Any]] = {
    "listops": dict(width=256, state=4, copies=1, prenorm=False, batch=32, steps=120_000, warmup=12_000),
    "text": dict(width=256, state=4, copies=1, batch=16, steps=50_000, warmup=5_000),
    "retrieval": dict(width=256, state=4, copies=1, batch=64, steps=50_000, warmup=5_000),
    "image": dict(
        width=512, copies=1, prenorm=False, dropout=0.1, slow_steps=True, batch=50, steps=180_000, warmup=18_000
    ),
    "pathfinder": dict(width=256, slow_steps=True, lr=0.004, batch=64, steps=500_000, warmup=50_000),
    "pathx": dict(width=256, slow_steps=True, dt_min=1e-4, lr=0.001, batch=16, steps=500_000, warmup=50_000),
}  # fmt: skip

S4_V3: Mapping[str, Mapping[str, Any]] = {
    "listops": dict(depth=8, width=128, prenorm=False, batch=50, steps=80_000, warmup=1_000),
    "text": dict(width=256, batch=16, steps=50_000, warmup=1_000),
    "retrieval": dict(width=256, batch=64, steps=50_000, warmup=2_500),
    "image": dict(
        width=512, copies=2, norm="layer", prenorm=False, dropout=0.1, batch=50, steps=180_000, warmup=900
    ),
    "pathfinder": dict(
        width=256, pooling="last", slow_steps=True, lr=0.004, weight_decay=0.03, batch=64, steps=500_000, warmup=2_500
    ),
    "pathx": dict(
        width=256, slow_steps=True, dt_min=1e-4, lr=0.001, ssm_lr=5e-4, batch=16, steps=500_000, warmup=50_000
    ),
}  # fmt: skip

LRU: Mapping[str, Mapping[str, Any]] = {
    "listops": dict(width=128, state=256, factor=0.5, ring=(0.0, 0.99), batch=32, steps=80_000),
    "text": dict(width=256, state=192, factor=0.1, dropout=0.1, ring=(0.5, 0.9), batch=32, steps=50_000),
    "retrieval": dict(width=128, state=256, factor=0.5, dropout=0.1, ring=(0.5, 0.9), batch=64, steps=100_000),
    "image": dict(width=512, state=384, factor=0.25, dropout=0.1, ring=(0.9, 0.999), batch=50, steps=180_000),
    "pathfinder": dict(width=192, state=256, factor=0.25, ring=(0.9, 0.999), causal=False, batch=64, steps=500_000),
    "pathx": dict(
        width=128, state=256, factor=0.25, ring=(0.999, 0.9999), max_phase=0.314, causal=False, batch=32, steps=250_000
    ),
}  # fmt: skip


def s4_rules(ratio: float, *, slow_steps: bool) -> tuple:
    """Optimiser rules of the released S4 code: Lambda, P and B at their own rate, and they and the step sizes without decay.

    ratio: the rate of Lambda, P and B over the global one. slow_steps: the step sizes have that rate too ("lr.dt").
    """
    steps = {"lr_mult": ratio if slow_steps else 1.0, "weight_decay": 0.0}
    return (
        (r".*/mixer/(Lambda_log_neg_re|Lambda_im|P|B)", {"lr_mult": ratio, "weight_decay": 0.0}),
        (r".*/mixer/step", steps),
        (r".*", {}),
    )


def s4(
    *, width: int, batch: int, steps: int, warmup: int, depth: int = 6, state: int = 64, copies: int = 0, norm: str = "batch",
    prenorm: bool = True, pooling: str = "mean", dropout: float = 0.0, lr: float = 0.01, ssm_lr: float = 0.001,
    slow_steps: bool = False, weight_decay: float = 0.05, dt_min: float = 0.001, **mixer: Any,
) -> dict[str, Any]:  # fmt: skip
    """A recipe of the S4 repository: bidirectional, GELU and GLU, dropout of whole channels, cosine after `warmup` steps.

    copies: of (Lambda, P, B), "n_ssm" there; 0 for one for each channel. mixer: `name`, and further arguments of the mixer.
    """
    layer = dict(state_dim=state, copies=copies, dropout=dropout, dt_min=dt_min, **mixer)
    return {
        "model": dict(
            depth=depth, width=width, norm=norm, prenorm=prenorm, final_norm=prenorm, pooling=pooling, embed_stddev=1.0,
            mixer=layer,
        ),
        "optimizer": dict(
            learning_rate=lr, weight_decay=weight_decay, schedule="cosine", warmup=f"{warmup} steps",
            rules=s4_rules(ssm_lr / lr, slow_steps=slow_steps),
        ),
        "train": _train(batch, steps),
    }  # fmt: skip


def lru(
    *, width: int, state: int, factor: float, ring: tuple[float, float], batch: int, steps: int, dropout: float = 0.0,
    max_phase: float = 6.283, causal: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """A row of table 9: six layers, batch norm before each, 10 % warm-up, then cosine; Lambda, gamma and B at `factor` times the
    rate, without decay. Bidirectional on Pathfinder and Path-X alone. ring: r_min and r_max."""
    slow = {"lr_mult": factor, "weight_decay": 0.0}
    return {
        "model": dict(
            depth=6, width=width, norm="batch", final_norm=False, embed_stddev=0.25,
            mixer=dict(
                name="lru", state_dim=state, r_min=ring[0], r_max=ring[1], max_phase=max_phase, dropout=dropout, causal=causal
            ),
        ),
        "optimizer": dict(
            learning_rate=0.001, weight_decay=0.05, schedule="cosine", warmup=f"{steps // 10} steps",
            rules=((r".*/mixer/(nu_log|theta_log|gamma_log|B)", slow), (r".*", {})),
        ),
        "train": _train(batch, steps),
    }  # fmt: skip


def _train(batch: int, steps: int) -> dict[str, Any]:
    return dict(batch_size=batch, duration=f"{steps} steps", eval_every=f"{steps // 50} steps")


def lra_ssm(task: str) -> dict[str, dict[str, Any]]:
    """All recipes of this file for one task of Long Range Arena. LRU's image is in colour, as its paper's."""
    recipes = {
        "s4": s4(name="s4", step_transform="softplus", **S4[task]),
        "s4_v3": s4(name="s4", **S4_V3[task]),
        "s4d": s4(name="s4d", A_init="legs", **S4_V3[task]),
        "lru": lru(**LRU[task]),
    }
    recipes = {name: {"task": dict(TASKS[task]), **recipe} for name, recipe in recipes.items()}
    if task == "image":
        recipes["lru"]["task"]["colour"] = True
    return recipes
