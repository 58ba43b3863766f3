"""Arguments for every position method, small enough that short sequences pass each one's limits."""

from efficient_attn import positions

ROTATION_ARGUMENTS = {
    "linear": dict(factor=2.0),
    "ntk": dict(factor=2.0),
    "dynamic_ntk": dict(factor=2.0, trained_length=6),
    "ntk_by_parts": dict(factor=2.0, trained_length=40),
    "yarn": dict(factor=2.0, trained_length=40, truncate=False),
    "llama3": dict(factor=2.0, trained_length=40),
    "longrope": dict(factor=2.0, trained_length=6, short_factor=(1.0, 1.1), long_factor=(1.0, 1.9)),
    "giraffe_power": dict(exponent=0.5),
    "giraffe_truncated": dict(low=1e-3, high=0.5, middle=0.1),
    "rerope": dict(window=3),
    "leaky_rerope": dict(window=3, factor=4.0),
    "self_extend": dict(window=3, group=2),
    "rotary": dict(interleaved=True),
    "xpos": dict(scale_base=8.0),
}
BIAS_ARGUMENTS = {"t5": dict(num_buckets=8, max_distance=10), "shaw": dict(clip=2), "sandwich": dict(dim=8)}

ROTATIONS = {name: dict(name=name, **ROTATION_ARGUMENTS.get(name, {})) for name in positions.ROTATIONS}
BIASES = {name: dict(name=name, **BIAS_ARGUMENTS.get(name, {})) for name in positions.BIASES}
EMBEDDINGS = {
    "none": dict(name="none"),
    "sinusoidal": dict(name="sinusoidal"),
    "sinusoidal, halves": dict(name="sinusoidal", halves=True),
    "learned": dict(name="learned"),
    "learned, per layer": dict(name="learned", per_layer=True),
}
SAMPLINGS = {
    "none": dict(name="none"),
    "shifted": dict(name="shifted", max_shift=7),
    "randomised": dict(name="randomised", max_position=64),
}
