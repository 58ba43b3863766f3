"""Continue a text with the best checkpoint of a run: python -m efficient_attn.generation --workdir=runs/lm --prompt="..."

Prints the prompt and what follows, as it comes. Equal seeds give equal texts.
"""

import pathlib

from absl import flags

from efficient_attn import cli

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run, a language model's.", required=True)
PROMPT = flags.DEFINE_multi_string("prompt", None, "Text to continue; several times for several texts at once.", required=True)
MAX_TOKENS = flags.DEFINE_integer(
    "max_tokens",
    None,
    "Tokens to generate, fewer where the model ends the text; by default 200, or what the trained length leaves.",
)
TEMPERATURE = flags.DEFINE_float("temperature", None, "What scores are divided by; 0 takes the best token. By default 0.8.")
TOP_K = flags.DEFINE_integer("top_k", 0, "Draw from so many best tokens; 0 from all.")
TOP_P = flags.DEFINE_float("top_p", 1.0, "Draw from the best tokens with this much probability; 1 from all.")
NUM_SAMPLES = flags.DEFINE_integer("num_samples", 1, "Continuations of each prompt.")
NUM_BEAMS = flags.DEFINE_integer("num_beams", 1, "Search with so many beams for the most probable continuation; 1 samples.")
SEED = flags.DEFINE_integer("seed", 0, "Of the draws.")


def main() -> None:
    from efficient_attn.generation.command import Options, run
    from efficient_attn.generation.sampling import Sampling

    unsaid = 0.8 if NUM_BEAMS.value == 1 else 0.0
    sampling = Sampling(unsaid if TEMPERATURE.value is None else TEMPERATURE.value, TOP_K.value, TOP_P.value)
    options = Options(PROMPT.value, MAX_TOKENS.value, NUM_SAMPLES.value, NUM_BEAMS.value, sampling, SEED.value)
    run(pathlib.Path(WORKDIR.value), options)


if __name__ == "__main__":
    cli.run(main)
