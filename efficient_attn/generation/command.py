"""Text from the best checkpoint of a run."""

import dataclasses
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from absl import logging

from efficient_attn import evaluation
from efficient_attn.arguments import ConfigError
from efficient_attn.generation.beam import beam_search
from efficient_attn.generation.decoding import Decoder
from efficient_attn.generation.engine import Engine, Request, seeds
from efficient_attn.generation.sampling import GREEDY, Sampling
from efficient_attn.plan import Plan
from efficient_attn.tasks.base import Text

MAX_TOKENS = 200
STREAMED = 4
"""Tokens between two looks at what is there, for text that is shown as it comes."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What to generate: from each prompt, so many continuations of up to `max_tokens` tokens, or the best by beam search.

    max_tokens: None means `MAX_TOKENS`, or fewer where the longest prompt with them is more than the run was trained on.
    """

    prompts: Sequence[str]
    max_tokens: int | None
    num_samples: int
    num_beams: int
    sampling: Sampling
    seed: int

    def __post_init__(self):
        for name in ("max_tokens", "num_samples", "num_beams"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed={self.seed} must be at least 0 and less than 2^32")
        if self.num_beams > 1 and self.num_samples > 1:
            raise ConfigError("num_beams finds the best continuation and num_samples draws several: leave one of them out")
        if self.num_beams > 1 and self.sampling != GREEDY:
            raise ConfigError("num_beams searches and draws nothing: leave temperature, top_k and top_p out")
        if not self.prompts or not all(self.prompts):
            raise ConfigError("prompt is empty; give at least one character to continue")


def run(folder: pathlib.Path, options: Options) -> None:
    """Print continuations: one prompt's as it comes, several with a line before each. Of replicas the first generates."""
    _, plan = evaluation.open_run(folder)
    task = plan.task
    if task.head != "lm" or not isinstance(task, Text):
        raise ConfigError(f"the run in {folder} is of task {plan.config['task']['name']!r}, which has no text to continue")
    prompts = [tuple(task.encode(prompt)) for prompt in options.prompts]
    longest = max(map(len, prompts))
    room = task.length - longest
    new = options.max_tokens or (min(MAX_TOKENS, room) if room > 0 else MAX_TOKENS)
    options, length = dataclasses.replace(options, max_tokens=new), longest + new
    _check_length(plan, longest, new)
    _, variables = evaluation.load_best(plan, folder)
    if plan.train.replicas > 1:
        variables = jax.tree.map(lambda x: x[0], variables)
    decoder = Decoder(plan.model, variables)
    if options.num_beams > 1:
        _show(options, task, _beams(decoder, prompts, options, task.stop_token))
        return
    requests = [prompt for prompt in prompts for _ in range(options.num_samples)]
    steps = STREAMED if len(requests) == 1 else length
    engine = Engine(decoder, len(requests), length, sampling=options.sampling, stop=task.stop_token, steps=steps)
    for prompt, seed in zip(requests, seeds(options.seed, len(requests))):
        engine.submit(Request(prompt, options.max_tokens, seed))
    _show(options, task, engine.run())


def _check_length(plan: Plan, prompt: int, new: int) -> None:
    """Raise `ConfigError` where the model has no place for so many tokens; warn where it was not trained on as many."""
    try:
        Decoder(plan.model, {}).init_shapes(1, prompt + new)
    except ValueError as error:
        raise ConfigError(f"a prompt of {prompt} tokens and max_tokens={new} are more than the model takes: {error}") from error
    if prompt + new > plan.task.length:
        logging.warning("%d tokens are more than the %d that the run was trained on", prompt + new, plan.task.length)


def _beams(decoder: Decoder, prompts: Sequence[tuple[int, ...]], options: Options, stop: int) -> Iterator[tuple[int, Any]]:
    for number, prompt in enumerate(prompts):
        found = beam_search(decoder, prompt, num_beams=options.num_beams, max_tokens=options.max_tokens, stop=stop)
        yield number, found[0].tokens


def _show(options: Options, task: Text, events: Iterator[tuple[int, Sequence[int]]]) -> None:
    """Print (number, new tokens): the text of one request at once, those of several when they are whole."""
    several = len(options.prompts) * options.num_samples > 1
    texts: dict[int, list[int]] = {}
    decode = task.decoder()
    if not several:
        print(options.prompts[0], end="", flush=True)
    for number, new in events:
        new = [token for token in new if token != task.stop_token]
        texts.setdefault(number, []).extend(new)
        if not several:
            print(decode(new), end="", flush=True)
    if not several:
        print(flush=True)
        return
    for number in sorted(texts):
        prompt = options.prompts[number // options.num_samples]
        print(f"--- {number + 1}", prompt + task.decoder()(texts[number]), sep="\n", flush=True, file=sys.stdout)
