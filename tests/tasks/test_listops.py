"""ListOps: the distribution against a plain recursive generator and exact enumeration, keys, values, floors, release files."""

import dataclasses
import hashlib
import itertools
import random
import time

import numpy as np
import pytest
import scipy.stats

from efficient_attn.tasks import listops
from efficient_attn.tasks.base import SPLITS, TaskError
from efficient_attn.tasks.listops import CLOSE, DIGIT, OPERATOR, Grammar, ListOps, evaluate, expressions, parse_release

CROWDED = Grammar(max_depth=3, max_args=2, min_length=3, max_length=8)  # 32,400 expressions, 400 of them common


def take(grammar: Grammar, count: int, key: int = 0, seed: int = 0) -> list[tuple[np.ndarray, int]]:
    return list(itertools.islice(expressions(grammar, (seed, key), key, batch=1024), count))


def reference_tree(grammar: Grammar, rng: random.Random, depth: int = 1) -> list[int]:
    """The tokens of one tree, as the LRA script draws it."""
    r = rng.random() if depth < grammar.max_depth else 1
    if r > 0.25:
        return [DIGIT + rng.randrange(10)]
    children = [reference_tree(grammar, rng, depth + 1) for _ in range(rng.randint(2, grammar.max_args))]
    return [OPERATOR + rng.randrange(4), *itertools.chain(*children), CLOSE]


def reference(grammar: Grammar, count: int) -> list[np.ndarray]:
    rng, kept = random.Random(0), []
    while len(kept) < count:
        tree = reference_tree(grammar, rng)
        if grammar.min_length < len(tree) < grammar.max_length:
            kept.append(np.array(tree, np.uint8))
    return kept


def shape_law(grammar: Grammar, depth: int = 1) -> dict[str, float]:
    """The exact probability of every shape below a node, written with d for a digit."""
    if depth == grammar.max_depth:
        return {"d": 1.0}
    law, below = {"d": 0.75}, shape_law(grammar, depth + 1)
    for arity in range(2, grammar.max_args + 1):
        for children in itertools.product(below, repeat=arity):
            shape = f"({''.join(children)})"
            law[shape] = 0.25 / (grammar.max_args - 1) * np.prod([below[child] for child in children])
    return law


def shape(tokens: np.ndarray) -> str:
    return "".join("d" if token < OPERATOR else ")" if token == CLOSE else "(" for token in tokens.tolist())


@pytest.mark.parametrize(("min_length", "max_length"), [(3, 100), (7, 11)])
def test_shapes_follow_the_exact_law_given_the_length(min_length, max_length):
    grammar = Grammar(3, 3, min_length, max_length)
    law = {s: p for s, p in shape_law(grammar).items() if min_length < len(s) < max_length}
    seen = [shape(tokens) for tokens, _ in take(grammar, 40_000)]
    assert set(seen) <= set(law)
    observed = np.array([seen.count(s) for s in law])
    expected = np.array(list(law.values()))
    assert scipy.stats.chisquare(observed, len(seen) * expected / expected.sum()).pvalue > 1e-3


@pytest.mark.parametrize(("grammar", "count"), [(listops.SHORT, 1500), (Grammar(7, 6, 60, 300), 400), (listops.PUBLISHED, 300)])
def test_distribution_equals_the_recursive_generators(grammar, count):
    ours = [tokens for key in range(10) for tokens, _ in take(grammar, count, key)]
    theirs = reference(grammar, count)
    for statistic in (len, shape_depth, lambda t: (t >= OPERATOR).mean(), lambda t: t[t < OPERATOR].mean()):
        samples = [[statistic(tokens) for tokens in sample] for sample in (ours, theirs)]
        assert scipy.stats.ks_2samp(*samples).pvalue > 1e-3
    for category, classes in ((evaluate, 10), (lambda t: t[0], 16), (lambda t: t[1], 16), (lambda t: t[t < OPERATOR][-1], 16)):
        counts = [np.bincount([category(tokens) for tokens in sample], minlength=classes) for sample in (ours, theirs)]
        table = np.array(counts)
        assert scipy.stats.chi2_contingency(table[:, table.sum(0) > 0]).pvalue > 1e-3


def shape_depth(tokens: np.ndarray) -> int:
    return int(np.cumsum(np.where(tokens == CLOSE, -1, tokens >= OPERATOR)).max())


@pytest.mark.parametrize("grammar", [CROWDED, listops.SHORT, listops.PUBLISHED])
def test_values_and_lengths_of_the_batched_generator(grammar):
    for tokens, value in take(grammar, 150, key=7):
        assert grammar.min_length < len(tokens) < grammar.max_length
        assert evaluate(tokens) == value


def test_keys_divide_all_expressions_into_disjoint_shards():
    tiny = Grammar(max_depth=2, max_args=2, min_length=1, max_length=5)  # [OP d d]: 400 expressions
    shards = [{tokens.tobytes() for tokens, _ in take(tiny, 100, key, seed=key % 3)} for key in range(listops.KEYS)]
    assert [len(shard) for shard in shards] == [4] * 100
    assert len(set.union(*shards)) == 400


def test_the_draw_is_pinned():
    digest = hashlib.sha256(b"".join(tokens.tobytes() for tokens, _ in take(listops.PUBLISHED, 50)))
    assert digest.hexdigest()[:16] == "8bc932879def4b06"


def test_one_published_example_takes_less_than_three_milliseconds():
    start = time.process_time()
    take(listops.PUBLISHED, 400)
    assert (time.process_time() - start) / 400 < 3e-3  # 100,000 in three minutes on two cores allow 3.6 ms


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("( ( ( [MAX 4 ) 3 ) ] )", 4),
        ("[MIN 4 3 7 ]", 3),
        ("[SM 9 8 7 ]", 4),
        ("[MED 1 9 4 ]", 4),
        ("[MED 1 4 ]", 2),
        ("[MED 9 9 0 3 ]", 6),
        ("[MAX 2 9 [MIN 4 7 ] 0 ]", 9),
        ("[MED [SM 5 6 ] [MAX 0 8 ] 3 2 ]", 2),
        ("7", 7),
    ],
)
def test_evaluate(text, value):
    assert evaluate(parse_release(text)) == value


def test_evaluate_to_a_depth():
    tokens = parse_release("[SM [MIN 5 6 ] [MAX 0 [MED 1 1 ] ] 3 ]")
    assert [evaluate(tokens, depth) for depth in (0, 1, 2, 3, None)] == [5, 0 + 9 + 3 - 10, (5 + 4 + 3) % 10, 9, 9]


@pytest.mark.parametrize("text", ["[MAX 1 2", "1 2", "[MAX 1 2 ] ]", "[FIRST 1 2 ]", "", "10"])
def test_malformed_expressions_are_refused(text):
    with pytest.raises((ValueError, IndexError)):
        evaluate(parse_release(text))


@pytest.fixture(scope="module")
def crowded(tmp_path_factory) -> ListOps:
    task = ListOps(1000, *dataclasses.astuple(CROWDED), max_tokens=7, data_dir=str(tmp_path_factory.mktemp("data")))
    task.prepare()
    return task


def test_splits_never_overlap_where_collisions_happen(crowded):
    sources = {split: crowded.source(split) for split in SPLITS}
    rows = {split: [source[i] for i in range(len(source))] for split, source in sources.items()}
    assert {split: len(examples) for split, examples in rows.items()} == crowded.sizes
    distinct = {example["inputs"].tobytes() for examples in rows.values() for example in examples}
    assert len(distinct) == 1200
    drawn = [tokens.tobytes() for tokens, _ in take(CROWDED, 11)]
    assert len(set(drawn)) < len(drawn)
    for example in itertools.chain(*rows.values()):
        assert evaluate(example["inputs"][example["mask"]]) == example["targets"]


def test_a_shard_is_a_pure_function_of_split_and_shard(crowded):
    valid = crowded.source("valid")
    again = list(listops._generated(CROWDED, 0, crowded.sizes, "valid", 1))
    assert [e["tokens"].tolist() for e in again] == [valid[i]["inputs"][valid[i]["mask"]].tolist() for i in range(50, 100)]


def test_examples_have_the_interfaces_shapes(crowded):
    example = dataclasses.replace(crowded, max_tokens=12).source("train")[0]
    assert (example["inputs"].shape, example["inputs"].dtype, example["mask"].dtype) == ((12,), np.int32, np.bool_)
    assert not example["inputs"][~example["mask"]].any() and example["inputs"][example["mask"]].all()
    assert (example["targets"].dtype, example["weights"]) == (np.int32, 1.0)
    assert example["inputs"].max() < crowded.vocab_size


def test_too_few_expressions_end_in_an_error(monkeypatch):
    monkeypatch.setattr(listops, "MAX_FRUITLESS", 5000)
    tiny = Grammar(max_depth=2, max_args=2, min_length=1, max_length=5)
    with pytest.raises(TaskError, match="too few different expressions"):
        list(listops._generated(tiny, 0, {"train": 96 * 5, "valid": 2, "test": 2}, "train", 0))
    with pytest.raises(TaskError, match="makes such lengths too rare"):
        take(Grammar(2, 2, 50, 100), 1)


def test_name_holds_all_that_changes_the_data_and_nothing_else():
    assert ListOps().name == "listops-d10-a10-500-2000-n96000-s0"
    changes = {"num_examples": 1000, "max_depth": 9, "max_args": 9, "min_length": 400, "max_length": 1900, "seed": 1}
    names = {ListOps(**{field: value}).name for field, value in changes.items()}
    assert len(names | {ListOps().name, ListOps(release_dir="x").name}) == 8
    assert {ListOps(max_tokens=2048).name, ListOps(data_dir="x").name} == {ListOps().name}
    assert ListOps().sizes == {"train": 96_000, "valid": 2000, "test": 2000}
    assert ListOps(num_examples=5000).sizes == {"train": 5000, "valid": 500, "test": 500}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_examples": 10}, "num_examples=10: expected at least 100"),
        ({"max_depth": 1}, "max_depth=1: expected at least 2"),
        ({"min_length": 1999}, "no length lies strictly between"),
        ({"max_tokens": 1000}, "max_tokens=1000 would cut expressions of 1999 tokens"),
        ({"release_dir": "x", "seed": 3}, "release_dir fixes the distribution"),
    ],
)
def test_impossible_fields_are_refused(fields, message):
    with pytest.raises(TaskError, match=message):
        ListOps(**fields)


def test_floors_of_a_small_data_set():
    def source(*rows: tuple[str, int]) -> list[dict]:
        return [
            {"inputs": (t := parse_release(text)).astype(np.int32), "mask": np.ones(len(t), bool), "targets": np.int32(value)}
            for text, value in rows
        ]

    train = source(
        ("[MIN 1 2 ]", 1), ("[MIN 1 3 ]", 1), ("[MAX 1 8 ]", 8), ("[MAX 2 8 ]", 8), ("[MAX 2 7 ]", 7), ("[SM 0 1 ]", 1)
    )
    test = source(
        ("[MIN 1 9 ]", 1),  # all rules
        ("[MAX 8 7 ]", 8),  # all but the majority
        ("[SM 2 3 ]", 5),  # depth 1
        ("[SM 2 [MIN 4 5 ] ]", 6),  # depth 2: MIN stands for 0
        ("[SM 2 [MIN 4 [MAX 2 1 ] ] ]", 4),  # depth 3: MAX stands for 9
    )
    floors = listops.heuristic_floors(train, test)
    assert floors == {"majority": 0.2, "root_operator": 0.4, "depth_1": 0.6, "depth_2": 0.8, "depth_3": 1.0}


def test_floors_are_given_for_the_two_measured_grammars():
    rules = ["majority", "root_operator", "depth_1", "depth_2", "depth_3"]
    for task in (ListOps(), ListOps(30_000, *dataclasses.astuple(listops.SHORT))):
        assert list(task.floors) == rules and sorted(task.floors.values()) == list(task.floors.values())
    assert ListOps(max_depth=9).floors == {}


def test_cost_is_a_line_before_and_after(crowded, tmp_path):
    assert crowded.cost().endswith("already there")
    assert "to be generated, about" in dataclasses.replace(crowded, data_dir=str(tmp_path)).cost()
    assert not list(tmp_path.iterdir())


# The official release.


def release_text(tokens: np.ndarray) -> str:
    """An expression as the LRA script writes it: every argument joined by a pair of parentheses."""
    stack: list[list[str]] = [[]]
    for token in tokens.tolist():
        if token == CLOSE:
            operator, *arguments = [*stack.pop(), "]"]
            for argument in arguments:
                operator = f"( {operator} {argument} )"
            stack[-1].append(operator)
        elif token >= OPERATOR:
            stack.append(["[" + listops.OPERATORS[token - OPERATOR]])
        else:
            stack[-1].append(str(token - DIGIT))
    return stack[0][0]


@pytest.fixture
def release(tmp_path):
    """A folder like the release's, of 1000 + 100 + 100 short expressions, and those expressions."""
    sizes, stream = {"train": 1000, "val": 100, "test": 100}, expressions(CROWDED, (1,), 1, batch=1024)
    rows = {split: [next(stream) for _ in range(size)] for split, size in sizes.items()}
    for split, examples in rows.items():
        lines = [f"{release_text(tokens)}\t{value}\n" for tokens, value in examples]
        (tmp_path / f"basic_{split}.tsv").write_text("Source\tTarget\n" + "".join(lines))
    return tmp_path, rows


def test_release_is_read_in_order(release, tmp_path):
    folder, rows = release
    task = ListOps(1000, release_dir=str(folder), data_dir=str(tmp_path / "data"))
    task.prepare()
    for split, name in zip(SPLITS, ("train", "val", "test")):
        source = task.source(split)
        read = [(source[i]["inputs"][source[i]["mask"]].tolist(), int(source[i]["targets"])) for i in range(len(source))]
        assert read == [(tokens.tolist(), value) for tokens, value in rows[name]]


def test_damaged_release_is_refused(release):
    folder, _ = release
    sizes = ListOps(1000).sizes
    text = (folder / "basic_test.tsv").read_text()
    damages = {
        "example 3, has the target 'x'": text.splitlines(keepends=True)[:3] + ["7\tx\n"] * 97,
        "example 1, is not a ListOps expression": "Source\tTarget\n" + "[MAX 1\t1\n",
        "expected the columns Source and Target": "7\t7\n",
        "has only 3 examples; num_examples asks for 100": text.splitlines(keepends=True)[:4],
    }
    for message, damaged in damages.items():
        (folder / "basic_test.tsv").write_text("".join(damaged))
        with pytest.raises(TaskError, match=message):
            list(listops._released(str(folder), sizes, "test", 0))
    (folder / "basic_val.tsv").unlink()
    with pytest.raises(TaskError, match=r"lacks \['basic_val.tsv'\]"):
        ListOps(1000, release_dir=str(folder), data_dir=str(folder / "data")).prepare()
