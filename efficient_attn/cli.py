"""What the command lines share: flags, the default workdir, and errors as one clear line."""

import pathlib
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from efficient_attn import distributed
from efficient_attn.arguments import ConfigError, shown, suggest
from efficient_attn.checkpoints import CheckpointError
from efficient_attn.distributed import LOST_STATUS, PeerError, PeerLost
from efficient_attn.preemption import Preempted
from efficient_attn.tables import load_module
from efficient_attn.tasks.base import TaskError
from efficient_attn.training import TrainingDiverged
from efficient_attn.workdir import WorkdirBusy, WorkdirError

EXIT_CODES = {
    ConfigError: 2, TaskError: 2, WorkdirError: 2, CheckpointError: 3, TrainingDiverged: 4, WorkdirBusy: 5,
    PeerError: LOST_STATUS, Preempted: 75,
}  # fmt: skip
"""Exit status by error, else by its nearest ancestor; 5: another run has the folder; 6: another process of the run failed; 75 is
sysexits' EX_TEMPFAIL: the same command continues the run."""


def define_config() -> flags.FlagHolder:
    """--config=FILE[:RECIPE], whose every field is a flag too: --config.model.mixer.state_dim=64."""
    return config_flags.DEFINE_config_file("config", None, "Configuration file, and after a colon one of its recipes.")


def default_workdir(config: ConfigDict) -> pathlib.Path:
    last = config.seed + config.train.replicas - 1
    seeds = f"{config.seed}-{last}" if last > config.seed else f"{config.seed}"
    return pathlib.Path("runs") / f"{config.name}-{config.recipe}-s{seeds}"


def run(main: Callable[[], None]) -> None:
    """Parse flags, run `main`, and end every foreseen error with its message and a non-zero exit status."""

    def guarded(_: Sequence[str]) -> None:
        try:
            main()
        except PeerLost as error:
            distributed.end(error)
        except tuple(EXIT_CODES) as error:
            _fail(f"{error}", next(EXIT_CODES[kind] for kind in type(error).__mro__ if kind in EXIT_CODES))
        except KeyboardInterrupt:
            _fail("interrupted; the same command continues", 130)

    logging.set_verbosity(logging.WARNING)
    logging.use_absl_handler()
    app.run(guarded, flags_parser=parse_flags)


def parse_flags(argv: Sequence[str]) -> list[str]:
    """absl's parser; what is wrong with a flag, a configuration file or an override comes as one line."""
    try:
        check_config_file(argv)
        left = flags.FLAGS(argv)
    except ConfigError as error:
        _fail(str(error), EXIT_CODES[ConfigError])
    except Exception as error:  # whatever a configuration file may raise: it ends here, said in a line
        _fail(explain(error), EXIT_CODES[ConfigError])
    if len(left) > 1:
        _fail(f"unexpected argument {left[1]!r}; write overrides as --config.FIELD=VALUE", EXIT_CODES[ConfigError])
    return left


def check_config_file(argv: Sequence[str]) -> None:
    """Raise `ConfigError` where --config names no Python file, which ml_collections reports only later and less clearly."""
    for value in _config_values(argv):
        path = pathlib.Path(value.split(":")[0])
        if not path.is_file() or path.suffix != ".py":
            near = suggest(path.name, (p.name for p in path.parent.glob("*.py")))
            raise ConfigError(f"there is no configuration file {path}{near}")


def _config_values(argv: Sequence[str]) -> Iterator[str]:
    """What is given as --config."""
    for argument, following in zip(argv, [*argv[1:], ""]):
        flag, equals, value = argument.partition("=")
        if flag in ("--config", "-config"):
            yield value if equals else following


def explain(error: Exception) -> str:
    """The error in a line: the override that names no field with the nearest one that does, or where a file broke."""
    text = str(error.args[0] if error.args else error)
    overrides = [a.split("=")[0] for a in sys.argv if a.startswith("--config.")]
    field = re.search(r"'(\w+)\\?'", text)
    below = re.search(r"Attempting to lookup: (\S+)", text)  # of a field that has none
    wrong = f"--config.{below[1]}" if below else next((o for o in overrides if field and field[1] in o.split(".")), None)
    frames = traceback.extract_tb(error.__traceback__)
    files = {pathlib.Path(value.split(":")[0]).resolve() for value in _config_values(sys.argv)}
    of_file = any(pathlib.Path(frame.filename).resolve() in files for frame in frames)
    if isinstance(error, AttributeError | KeyError) and wrong and not of_file:
        near = re.search(r'Did you mean "(\w+)"', text)
        return f"the configuration has no field {wrong}" + (f" (did you mean {near[1]!r}?)" if near else _fields_beside(wrong))
    if isinstance(error, TypeError | LookupError | ValueError) and not of_file and (told := _of_a_sequence(overrides)):
        return told
    if isinstance(error, flags.Error):
        return text.splitlines()[0]
    where = (error.filename, error.lineno) if isinstance(error, SyntaxError) else (frames[-1].filename, frames[-1].lineno)
    return f"{type(error).__name__} at {where[0]} line {where[1]}: {text.splitlines()[0] if text else ''}"


def _of_a_sequence(overrides: Sequence[str]) -> str | None:
    """What to write in place of the first override that is wrong of a sequence or one of its fields; None where there is none."""
    path, _, recipe = next(_config_values(sys.argv)).partition(":")
    config = load_module(pathlib.Path(path)).get_config(*filter(None, [recipe]))
    for override in overrides:
        node, where = config, "--config"
        for part in re.sub(r"\[", ".[", override).split(".")[1:]:
            if isinstance(node, tuple | list):
                index = re.fullmatch(r"\[(\d+)\]", part)
                if not index or int(index[1]) >= len(node):
                    example = f"{where}[0].NAME=VALUE ... {where}[{len(node) - 1}].NAME=VALUE"
                    return f"{override}: {where} is a sequence of {len(node)}; set fields of one by {example}, or write a recipe"
                node, where = node[int(index[1])], where + part
            elif where.endswith("]") and part not in node:
                return f"the configuration has no field {override}{suggest(part, node)}; {where} has: {', '.join(node)}"
            else:
                node, where = node.get(part) if hasattr(node, "get") else None, f"{where}.{part}"
    return None


def _fields_beside(override: str) -> str:
    """What there is where an override names something that is not there."""
    path, _, recipe = next(_config_values(sys.argv)).partition(":")
    node, where = load_module(pathlib.Path(path)).get_config(*filter(None, [recipe])), "config"
    for part in override.split(".")[1:]:
        if not isinstance(node, ConfigDict):
            return f"; {where} is {shown(node)}"
        if part not in node:
            return f"; {where} has: {', '.join(node)}"
        node, where = node[part], f"{where}.{part}"
    return ""


def _fail(message: str, status: int) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(status)
