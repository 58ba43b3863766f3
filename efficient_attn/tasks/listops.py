"""ListOps: evaluate nested list operations, the first task of Long Range Arena.

An expression such as `[MAX 4 3 [MIN 2 3 ] 1 0 [MED 1 5 8 9 2 ] ]` is a tree; its value, a digit, is the class. The
distribution is that of the LRA generator (Tay et al., "Long Range Arena", 2021, section 2.2.1; the data set is that of Nangia
and Bowman, "ListOps", 2018). A node at depth < max_depth is, with probability 1/4, an operator drawn uniformly from MIN, MAX,
MED, SM with uniformly 2..max_args arguments; otherwise, and at max_depth, it is a uniform digit. An expression is kept if
min_length < tokens < max_length, both bounds strict, and it has not been seen before. MED is the median truncated to an
integer, SM the sum modulo 10. As in LRA, the model sees no parentheses: one token per operator with its opening bracket, one
per digit, one for the closing bracket.

**Speed.** Whether a tree is kept depends on its shape alone, and its length never shrinks as nodes are added. So `_shapes`
draws only shapes, many trees at once, level by level, and drops a tree the moment it cannot fit; operators, digits, token
order and values are worked out only for the kept ones. Nodes are independent, so the order of drawing changes nothing.

**No duplicates, without communication.** Every tree has a key in 0..99: the last two digits that occur in it, as a number,
plus a hash of all its other tokens, modulo 100. Given the rest of the tree the last two digits are uniform, so the key is
uniform and independent of the rest, and `_impose_key` draws from exactly the generator's distribution given a key by setting
those two digits. Shard s of train owns key s (0..95), valid owns 96 and 97, test 98 and 99. Equal trees have equal keys, so
they can only meet inside one shard, where a set finds them. Hence a shard is a pure function of (seed, parameters, split,
shard), whatever the number of processes and whichever shards exist, and no split overlaps another, not even that of another
seed or size.
"""

import argparse
import dataclasses
import functools
import hashlib
import itertools
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import ClassVar

import numpy as np
import tensorflow_datasets as tfds

from efficient_attn.tasks import records
from efficient_attn.tasks.base import SPLITS, Example, Head, MapSource, Source, Split, Task, TaskError, sequence_example

OPERATORS = ("MIN", "MAX", "MED", "SM")
DIGIT, OPERATOR, CLOSE, VOCAB_SIZE = 1, 11, 15, 16  # tokens: padding, digits 0..9, OPERATORS, the closing bracket
STAND_IN = (0, 9, 4, 5)  # the likeliest value of each operator; that of SM is uniform, so the middle
MAX_FRUITLESS = 1 << 19  # trees tried, or repeats drawn, in a row before giving up
KEYS = 100
SHARDS = {"train": 96, "valid": 2, "test": 2}
FEATURES = tfds.features.FeaturesDict(
    {"tokens": tfds.features.Tensor(shape=(None,), dtype=np.uint8, encoding="bytes"), "label": tfds.features.Scalar(np.uint8)}
)


@dataclasses.dataclass(frozen=True)
class Grammar:
    """The parameters of the distribution. Lengths are in tokens and both bounds are excluded."""

    max_depth: int
    max_args: int
    min_length: int
    max_length: int


@dataclasses.dataclass(frozen=True)
class Level:
    """The nodes of one depth, for many trees at once, in order. Children of a node are consecutive in the next level."""

    tree: np.ndarray  # [nodes] which tree, ascending
    arity: np.ndarray  # [nodes] number of children, 0 for a digit


def _shapes(grammar: Grammar, rng: np.random.Generator, trees: int) -> list[Level]:
    """Draws the shapes of `trees` trees with an operator at the root, and keeps those of admissible length.

    (A digit at the root has length 1 and is never admissible.) Kept trees are renumbered from 0, in order.
    """
    wide = grammar.max_args - 1  # number of possible arities 2..max_args
    tree = np.arange(trees)
    arity = rng.integers(2, grammar.max_args, trees, endpoint=True)
    length = np.ones(trees, np.int64)
    levels = []
    for depth in range(1, grammar.max_depth + 1):
        levels.append(Level(tree, arity))
        length += np.bincount(tree, weights=arity + (arity > 0), minlength=trees).astype(np.int64)  # a digit (1) became 2 + arity
        tree = np.repeat(tree, arity)
        tree = tree[length[tree] < grammar.max_length]
        if depth + 1 < grammar.max_depth:
            draw = rng.integers(4 * wide, size=len(tree))  # one in four is an operator, its arities equally likely
            arity = np.where(draw < wide, draw + 2, 0)
        else:
            arity = np.zeros(len(tree), np.int64)
    kept = (grammar.min_length < length) & (length < grammar.max_length)
    number = np.cumsum(kept) - 1
    chosen = [kept[level.tree] for level in levels]
    return [Level(number[level.tree[nodes]], level.arity[nodes]) for level, nodes in zip(levels, chosen)]


def _families(level: Level) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The operators of a level: their positions in it, the position of their first child in the next, their arities."""
    operators = np.flatnonzero(level.arity)
    arity = level.arity[operators]
    return operators, np.cumsum(arity) - arity, arity


def _places(levels: Sequence[Level]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Where every node begins, and its length in tokens, when the trees are written depth-first, one after another."""
    lengths = [np.ones(len(level.arity), np.int64) for level in levels]
    for level, length, below in reversed(list(zip(levels[:-1], lengths[:-1], lengths[1:]))):
        operators, first, _ = _families(level)
        length[operators] = 2 + np.add.reduceat(below, first)
    begins = [np.cumsum(lengths[0]) - lengths[0]]
    for level, below in zip(levels[:-1], lengths[1:]):
        operators, first, arity = _families(level)
        before = np.cumsum(below) - below
        begins.append(np.repeat(begins[-1][operators] + 1 - before[first], arity) + before)
    return begins, lengths


def _impose_key(tokens: np.ndarray, key: int) -> None:
    """Sets the last two digits of one expression, in place, so that its key (module docstring) is `key`."""
    last_two = np.flatnonzero((tokens >= DIGIT) & (tokens < OPERATOR))[-2:]
    tokens[last_two] = 0
    rest = int.from_bytes(hashlib.blake2b(tokens.tobytes(), digest_size=8).digest(), "little")
    tokens[last_two] = np.add(DIGIT, divmod((key - rest) % KEYS, 10))


def _root_values(tokens: np.ndarray, levels: Sequence[Level], begins: Sequence[np.ndarray]) -> np.ndarray:
    """The value of every tree [trees], from its digits up, all nodes of a level at once."""
    values = tokens[begins[-1]].astype(np.int64) - DIGIT
    for level, begin in reversed(list(zip(levels[:-1], begins[:-1]))):
        operators, first, arity = _families(level)
        family = np.repeat(np.arange(len(arity)), arity)
        ordered = np.sort(16 * family + values) % 16  # the arguments of each operator in ascending order
        lower, upper = ordered[first + (arity - 1) // 2], ordered[first + arity // 2]
        results = [ordered[first], ordered[first + arity - 1], (lower + upper) // 2, np.add.reduceat(values, first) % 10]
        values = tokens[begin].astype(np.int64) - DIGIT
        values[operators] = np.choose(tokens[begin[operators]] - OPERATOR, results)
    return values


def expressions(grammar: Grammar, seed: Sequence[int], key: int, batch: int) -> Iterator[tuple[np.ndarray, int]]:
    """An endless stream of (tokens uint8 [length], value), independent draws from the grammar given the key `key`.

    `batch` trees are tried at once; the stream depends on it. Raises `TaskError` if admissible trees are too rare.
    """
    rng = np.random.default_rng(seed)
    fruitless = 0
    while fruitless < MAX_FRUITLESS:
        levels = _shapes(grammar, rng, batch)
        if len(levels[0].tree) == 0:
            fruitless += batch
            continue
        fruitless = 0
        begins, lengths = _places(levels)
        tokens = np.zeros(lengths[0].sum(), np.uint8)
        for level, begin, length in zip(levels, begins, lengths):
            tokens[begin] = np.where(
                level.arity > 0,
                OPERATOR + rng.integers(len(OPERATORS), size=len(begin)),
                DIGIT + rng.integers(10, size=len(begin)),
            )
            tokens[(begin + length - 1)[level.arity > 0]] = CLOSE
        rows = np.split(tokens, begins[0][1:])  # views
        for row in rows:
            _impose_key(row, key)
        yield from zip(rows, _root_values(tokens, levels, begins).tolist())
    raise TaskError(f"None of {fruitless} trees in a row has an admissible length: {grammar} makes such lengths too rare")


def evaluate(tokens: np.ndarray, max_depth: int | None = None) -> int:
    """The value of one expression, by a stack: the plain definition of the task.

    With `max_depth`, operators deeper than that (the root has depth 1) are not worked out but count as
    their STAND_IN. Raises ValueError or IndexError if `tokens` is not one well-formed expression.
    """
    functions: Sequence[Callable[[list[int]], int]] = (min, max, lambda v: int(statistics.median(v)), lambda v: sum(v) % 10)
    stack: list[list[int]] = [[]]
    for token in tokens.tolist():
        if token == CLOSE:
            operator, *arguments = stack.pop()
            shallow = max_depth is None or len(stack) <= max_depth
            stack[-1].append(functions[operator](arguments) if shallow else STAND_IN[operator])
        elif token >= OPERATOR:
            stack.append([token - OPERATOR])
        else:
            stack[-1].append(token - DIGIT)
    ((value,),) = stack
    return value


def heuristic_floors(train: Source, test: Source) -> dict[str, float]:
    """Accuracies on `test` of rules that understand little; examples are those of `ListOps.source`.

    majority: the most frequent class of `train`. root_operator: its most frequent class given the root's operator.
    depth_k: the top k levels are worked out exactly, with STAND_IN for the operators below them.
    """
    counts = np.zeros((len(OPERATORS), 10), np.int64)
    for i in range(len(train)):
        example = train[i]
        counts[example["inputs"][0] - OPERATOR, example["targets"]] += 1
    majority, by_root = counts.sum(0).argmax(), counts.argmax(1)
    names = ("majority", "root_operator", "depth_1", "depth_2", "depth_3")
    right = np.zeros(len(names))
    for i in range(len(test)):
        example = test[i]
        tokens = example["inputs"][example["mask"]]
        guesses = [majority, by_root[tokens[0] - OPERATOR], *(evaluate(tokens, max_depth) for max_depth in (1, 2, 3))]
        right += np.array(guesses) == example["targets"]
    return dict(zip(names, (right / len(test)).tolist()))


def _generated(grammar: Grammar, seed: int, sizes: Mapping[Split, int], split: Split, shard: int) -> Iterator[dict]:
    """The examples of one shard: distinct draws given the shard's key."""
    key = shard + sum(SHARDS[earlier] for earlier in SPLITS[: SPLITS.index(split)])
    begin, end = _rows(sizes[split], split, shard)
    stream = expressions(grammar, (seed, key), key, batch=min(1024, 4 * (end - begin)))
    seen, repeats = set(), 0
    while len(seen) < end - begin:
        tokens, value = next(stream)
        if (content := tokens.tobytes()) not in seen:
            seen.add(content)
            repeats = 0
            yield {"tokens": tokens, "label": value}
        elif (repeats := repeats + 1) > MAX_FRUITLESS:
            raise TaskError(f"{grammar} has too few different expressions for {sizes}: ask for fewer, or for longer ones")


def _rows(size: int, split: Split, shard: int) -> tuple[int, int]:
    """The range of a split's examples that one of its shards holds."""
    return size * shard // SHARDS[split], size * (shard + 1) // SHARDS[split]


_RELEASE_FILES = {"train": "basic_train.tsv", "valid": "basic_val.tsv", "test": "basic_test.tsv"}
_RELEASE_SYMBOLS = (*"0123456789", *(f"[{name}" for name in OPERATORS), "]")  # in the order of our tokens


def parse_release(text: str) -> np.ndarray:
    """Tokens of an expression as the release writes it, `( ( ( [MAX 4 ) 3 ) ] )`. ValueError if it holds anything else."""
    words = text.replace("(", " ").replace(")", " ").split()
    return np.array([DIGIT + _RELEASE_SYMBOLS.index(word) for word in words], np.uint8)


def _released(folder: str, sizes: Mapping[Split, int], split: Split, shard: int) -> Iterator[dict]:
    """One shard's rows of the official files, each checked by working the expression out."""
    path = pathlib.Path(folder) / _RELEASE_FILES[split]
    begin, end = _rows(sizes[split], split, shard)
    row = begin
    with path.open(encoding="utf-8", errors="replace") as lines:  # what is not text is then no ListOps expression
        if (header := lines.readline().split()) != ["Source", "Target"]:
            raise TaskError(f"{path} begins with {header}; expected the columns Source and Target of the LRA release")
        for row, line in enumerate(itertools.islice(lines, begin, end), begin + 1):
            source, _, target = line.rstrip("\n").partition("\t")
            try:
                tokens = parse_release(source)
                value = evaluate(tokens)
            except (ValueError, IndexError) as error:
                raise TaskError(f"{path}, example {row}, is not a ListOps expression: {error}") from error
            if str(value) != target:
                raise TaskError(f"{path}, example {row}, has the target {target[:40]!r}, but its value is {value}")
            yield {"tokens": tokens, "label": value}
    if row != end:
        raise TaskError(f"{path} has only {row} examples; num_examples asks for {sizes[split]}")


PUBLISHED = Grammar(max_depth=10, max_args=10, min_length=500, max_length=2000)
SHORT = Grammar(max_depth=5, max_args=5, min_length=20, max_length=100)
_FLOORS = {  # on the test split of seed 0, by `python -m efficient_attn.tasks.listops --floors`, and the same with
    # --num_examples=30000 --max_depth=5 --max_args=5 --min_length=20 --max_length=100
    PUBLISHED: {"majority": 0.1535, "root_operator": 0.3535, "depth_1": 0.5890, "depth_2": 0.7545, "depth_3": 0.8345},
    SHORT: {"majority": 0.1130, "root_operator": 0.2550, "depth_1": 0.4725, "depth_2": 0.6855, "depth_3": 0.8315},
}


@dataclasses.dataclass(frozen=True)
class ListOps(Task):
    """LRA ListOps: classify an expression of up to 2000 tokens by its value, one of ten digits.

    The defaults are the published data set: 96,000 / 2,000 / 2,000 examples for train / valid / test. A smaller
    `num_examples` (of train) leaves min(2000, num_examples // 10) for each of the others. The short variant has
    max_depth=5, max_args=5, min_length=20, max_length=100, max_tokens=100.

    Attributes:
      num_examples: size of train, at least 100.
      max_depth, max_args, min_length, max_length: the distribution (module docstring).
      seed: chooses the draw.
      max_tokens: L; inputs are padded to it. It does not change the data on disk.
      data_dir: folder that holds the data set's folder.
      release_dir: folder of the official release's basic_{train,val,test}.tsv; if given, they are the data, and the
        distribution's fields must stay at their defaults.
    """

    num_examples: int = 96_000
    max_depth: int = 10
    max_args: int = 10
    min_length: int = 500
    max_length: int = 2000
    seed: int = 0
    max_tokens: int = 2000
    data_dir: str = "data"
    release_dir: str = ""

    head: ClassVar[Head] = "classify"

    def __post_init__(self):
        for field, least in {"num_examples": 100, "max_depth": 2, "max_args": 2, "min_length": 1, "seed": 0}.items():
            if getattr(self, field) < least:
                raise TaskError(f"ListOps {field}={getattr(self, field)}: expected at least {least}")
        if self.max_length < self.min_length + 2:
            raise TaskError(f"ListOps: no length lies strictly between {self.min_length=} and {self.max_length=}")
        if self.max_tokens < self.max_length - 1:
            raise TaskError(f"ListOps max_tokens={self.max_tokens} would cut expressions of {self.max_length - 1} tokens")
        if self.release_dir and (self.grammar, self.seed) != (PUBLISHED, 0):
            raise TaskError("ListOps release_dir fixes the distribution: leave max_depth, ..., seed at their defaults")

    @property
    def grammar(self) -> Grammar:
        return Grammar(self.max_depth, self.max_args, self.min_length, self.max_length)

    @property
    def name(self) -> str:
        if self.release_dir:
            return f"listops-release-n{self.num_examples}"
        return f"listops-d{self.max_depth}-a{self.max_args}-{self.min_length}-{self.max_length}-n{self.num_examples}-s{self.seed}"

    @property
    def length(self) -> int:
        return self.max_tokens

    @property
    def num_outputs(self) -> int:
        return 10

    @property
    def vocab_size(self) -> int:
        return VOCAB_SIZE

    @property
    def sizes(self) -> Mapping[Split, int]:
        held_out = min(2000, self.num_examples // 10)
        return {"train": self.num_examples, "valid": held_out, "test": held_out}

    @property
    def floors(self) -> Mapping[str, float]:
        """`heuristic_floors` of the published and the short grammar. 2000 examples: 1 percentage point standard error."""
        return _FLOORS.get(self.grammar, {})

    @property
    def directory(self) -> pathlib.Path:
        return pathlib.Path(self.data_dir) / self.name

    def cost(self) -> str:
        if records.is_prepared(self.directory):
            return f"{self.directory}: already there"
        count = sum(self.sizes.values())
        if self.release_dir:
            return f"{self.directory}: to be read from {self.release_dir}, about 10 s and {count * 750e-6:.0f} MB"
        start, probe = time.process_time(), 200
        tokens = sum(len(tokens) for tokens, _ in itertools.islice(expressions(self.grammar, (self.seed,), 0, batch=1024), probe))
        seconds = count * (time.process_time() - start) / probe / records.num_cores()
        megabytes = count * (380 + 0.36 * tokens / probe) / 1e6  # measured: array_record's overhead, and compressed tokens
        return f"{self.directory}: to be generated, about {1 + seconds:.0f} s on this machine's CPUs and {megabytes:.0f} MB"

    def prepare(self) -> None:
        if self.release_dir:
            missing = [name for name in _RELEASE_FILES.values() if not (pathlib.Path(self.release_dir) / name).is_file()]
            if missing:
                raise TaskError(f"release_dir={self.release_dir} lacks {missing}: unpack the LRA release's listops files there")
            generate = functools.partial(_released, self.release_dir, self.sizes)
        else:
            generate = functools.partial(_generated, self.grammar, self.seed, self.sizes)
        records.prepare(self.directory, features=FEATURES, shards=SHARDS, generate=generate)

    def source(self, split: Split) -> Source:
        return MapSource(records.open_split(self.directory, split), functools.partial(_example, length=self.max_tokens))


def _example(record: Mapping[str, np.ndarray], length: int) -> Example:
    return sequence_example(record["tokens"], int(record["label"]), length)


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes a ListOps data set; with --floors, says what heuristics reach on it.")
    parser.add_argument("--floors", action="store_true")
    for field in dataclasses.fields(ListOps):
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    arguments = vars(parser.parse_args())
    floors = arguments.pop("floors")
    try:
        task = ListOps(**arguments)
        task.prepare()
    except TaskError as error:
        parser.error(str(error))
    if floors:
        for rule, accuracy in heuristic_floors(task.source("train"), task.source("test")).items():
            print(f"  {rule:15s} {100 * accuracy:6.2f} %")


if __name__ == "__main__":
    from efficient_attn.tasks import listops  # so that workers find its functions under their importable names

    listops.main()
