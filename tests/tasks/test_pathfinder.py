"""Pathfinder: the task's contract, its generated data, the release's folders, and refusals of what is wrong."""

import itertools
import sys

import numpy as np
import PIL.Image
import pytest

from efficient_attn.tasks import pathfinder, snakes
from efficient_attn.tasks.base import SPLITS, TaskError
from efficient_attn.tasks.pathfinder import Pathfinder

FOLDER = "pathfinder32/curv_contour_length_14"


def pixels(number):
    """Image `number` of the release written below."""
    return np.random.default_rng(number).integers(0, 256, (32, 32), dtype=np.uint8)


def write_release(root, folder=FOLDER, batches=(25, 5, 10)):
    """A release in the official layout: the label of image n is 1 where n is a multiple of 3. One metadata file is an array."""
    number = 0
    for batch, count in enumerate(batches):
        images = root / folder / "imgs" / str(batch)
        images.mkdir(parents=True)
        rows = []
        for k in range(count):
            PIL.Image.fromarray(pixels(number)).save(images / f"sample_{k}.png")
            rows.append(
                [f"imgs/{batch}", f"sample_{k}.png", str(k), str(int(number % 3 == 0)), "1.0", "14", "4", "2", "0.5", "1", "1"]
            )
            number += 1
        metadata = root / folder / "metadata" / f"{batch}.npy"
        metadata.parent.mkdir(exist_ok=True)
        if batch == 1:
            np.save(metadata, np.array(rows))
        else:
            metadata.write_text("".join(" ".join(row) + "\n" for row in rows))
    return root


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    task = Pathfinder(contour_length=6, num_examples=16, data_dir=str(tmp_path_factory.mktemp("data")))
    task.prepare()
    return task


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    root = write_release(tmp_path_factory.mktemp("release"))
    task = Pathfinder(num_examples=32, release_dir=str(root), data_dir=str(tmp_path_factory.mktemp("data")))
    task.prepare()
    return task


def all_images(task):
    return {split: [task.source(split)[i]["inputs"].tobytes() for i in range(task.sizes[split])] for split in SPLITS}


@pytest.mark.parametrize("as_tokens", [False, True])
def test_examples_are_the_keyed_images(generated, as_tokens):
    task = Pathfinder(contour_length=6, num_examples=16, as_tokens=as_tokens, data_dir=generated.data_dir)
    assert task.sizes == {"train": 16, "valid": 2, "test": 2}
    for number, split in enumerate(SPLITS):
        source = task.source(split)
        assert len(source) == task.sizes[split]
        for i in range(len(source)):
            image, label = snakes.generate_image(32, 6, np.random.default_rng([0, 32, 6, number, 0, i]))
            example = source[i]
            assert set(example) == {"inputs", "targets", "weights"}
            assert example["targets"] == label
            assert example["weights"] == 1
            if as_tokens:
                assert example["inputs"].dtype == np.int32
                np.testing.assert_array_equal(example["inputs"], image.ravel().astype(int) + 1)
                assert example["inputs"].max() < task.vocab_size
            else:
                assert example["inputs"].dtype == np.float32
                np.testing.assert_allclose(example["inputs"], (image.reshape(-1, 1) / 255 - 0.5) / 0.5, atol=1e-6)
                assert example["inputs"].shape == (task.length, task.channels)


def test_facts():
    for side, length in {32: 1024, 64: 4096, 128: 16_384, 256: 65_536}.items():
        task = Pathfinder(resolution=side)
        assert (task.length, task.num_outputs, task.channels, task.vocab_size) == (length, 2, 1, None)
        assert task.sizes == {"train": 160_000, "valid": 20_000, "test": 20_000}
        assert task.name == f"pathfinder{side}-cl14-n160000-s0"
        assert 0.5 == task.floors["chance"] <= task.floors["disc_distance"] < 0.7
    tokens = Pathfinder(as_tokens=True)
    assert (tokens.channels, tokens.vocab_size) == (0, 257)


def test_no_image_occurs_twice(generated):
    images = [*itertools.chain.from_iterable(all_images(generated).values())]
    assert len(set(images)) == len(images) == 20


def test_shards_make_up_the_split_and_a_small_set_is_part_of_a_large_one(monkeypatch):
    monkeypatch.setattr(pathfinder, "IMAGES_PER_SHARD", 3)

    def images(size, shards):
        parts = [list(pathfinder.generated(32, 6, 0, {"valid": size}, "valid", shard)) for shard in range(shards)]
        return [[example["image"].tobytes() for example in part] for part in parts]

    large = images(8, 3)
    assert [len(part) for part in large] == [3, 3, 2]
    assert len({image for part in large for image in part}) == 8
    assert images(5, 2) == [large[0], large[1][:2]]
    other_seed = list(pathfinder.generated(32, 6, 1, {"valid": 8}, "valid", 0))
    assert not {example["image"].tobytes() for example in other_seed} & set(itertools.chain.from_iterable(large))


def test_release_images_are_read_and_split(release):
    known = {((pixels(n).reshape(-1, 1) / 255 - 0.5) / 0.5).astype(np.float32).tobytes(): n for n in range(40)}
    assert len(known) == 40
    found = []
    for split in SPLITS:
        source = release.source(split)
        for i in range(len(source)):
            number = np.rint((source[i]["inputs"][:, 0] + 1) * 127.5).astype(np.uint8)
            matches = [n for n in range(40) if (pixels(n).ravel() == number).all()]
            assert len(matches) == 1
            assert source[i]["targets"] == (matches[0] % 3 == 0)
            found += matches
    assert sorted(found) == list(range(40)), "80 / 10 / 10 % of 40 images, none of them twice"
    assert found != sorted(found)


def test_the_seed_chooses_the_split(release):
    splits = [pathfinder.release_split(release.release_folder, seed, release.sizes) for seed in (0, 0, 1)]
    assert splits[0] == splits[1]
    assert set(splits[0]["test"]) != set(splits[2]["test"])
    fewer = pathfinder.release_split(release.release_folder, 0, {"train": 8, "valid": 1, "test": 1})
    assert all(fewer[split] == splits[0][split][: len(fewer[split])] for split in SPLITS)


def test_prepared_data_need_no_release(release):
    elsewhere = Pathfinder(num_examples=32, release_dir="nowhere", data_dir=release.data_dir)
    elsewhere.prepare()
    assert all_images(elsewhere) == all_images(release)


def test_known_empty_file_is_left_out(tmp_path):
    write_release(tmp_path, "pathfinder32/curv_baseline", batches=(200,))
    folder = Pathfinder(contour_length=6, release_dir=str(tmp_path)).release_folder
    (folder / "imgs/0/sample_172.png").write_bytes(b"")
    rows = pathfinder.release_rows(folder)
    assert len(rows) == 199
    assert "imgs/0/sample_172.png" not in dict(rows)


def test_missing_release(tmp_path):
    task = Pathfinder(resolution=128, release_dir=str(tmp_path), data_dir=str(tmp_path / "data"))
    with pytest.raises(TaskError, match=r"pathfinder128/curv_contour_length_14/metadata/0\.npy.*lra_release\.gz.*release_dir"):
        task.prepare()
    assert not task.directory.exists()


def test_too_small_release_says_what_to_set(release):
    task = Pathfinder(num_examples=160_000, release_dir=release.release_dir, data_dir=release.data_dir)
    with pytest.raises(TaskError, match=r"lists 40 images.*set num_examples to at most 32\."):
        task.prepare()
    pathfinder.release_split(task.release_folder, 0, Pathfinder(num_examples=32).sizes)
    with pytest.raises(TaskError):
        pathfinder.release_split(task.release_folder, 0, Pathfinder(num_examples=33).sizes)


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "absent", "size"])
def test_damaged_png_is_named(tmp_path, damage):
    path = tmp_path / "sample_7.png"
    PIL.Image.fromarray(pixels(7)).save(path)
    np.testing.assert_array_equal(pathfinder.read_png(path, 32), pixels(7))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "absent":
        path.unlink()
    else:
        path.write_bytes({"empty": b"", "cut": content[:200], "flipped": content, "size": path.read_bytes()}[damage])
    with pytest.raises(TaskError, match=r"sample_7\.png"):
        pathfinder.read_png(path, 64 if damage == "size" else 32)


def test_damaged_png_stops_preparation(tmp_path):
    write_release(tmp_path)
    (tmp_path / FOLDER / "imgs/1/sample_2.png").write_bytes(b"not a picture")
    task = Pathfinder(num_examples=32, release_dir=str(tmp_path), data_dir=str(tmp_path / "data"))
    with pytest.raises(TaskError, match=r"imgs/1/sample_2\.png cannot be read"):
        task.prepare()


@pytest.mark.parametrize("line", ["imgs/0 sample_0.png 0", "imgs/0 sample_0.png 0 2 1.0"])
def test_bad_metadata_is_named(tmp_path, line):
    write_release(tmp_path)
    path = tmp_path / FOLDER / "metadata" / "2.npy"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(TaskError, match=r"2\.npy, line 11, is .*label"):
        pathfinder.release_rows(tmp_path / FOLDER)


@pytest.mark.parametrize(
    ("field", "value"), [("resolution", 48), ("contour_length", 10), ("num_examples", 7), ("seed", -1), ("seed", 2**32)]
)
def test_bad_fields_are_refused(field, value):
    with pytest.raises(TaskError, match=f"{field}={value}"):
        Pathfinder(**{field: value})


def test_source_before_prepare(tmp_path):
    with pytest.raises(TaskError, match="prepare"):
        Pathfinder(data_dir=str(tmp_path)).source("train")


def test_cost_is_said_before_and_after(generated, tmp_path):
    assert "already there" in generated.cost()
    small, large = (Pathfinder(num_examples=n, data_dir=str(tmp_path)).cost() for n in (1600, 160_000))
    assert "2,000 images to be generated" in small
    assert "200,000 images to be generated" in large
    assert "release" in Pathfinder(release_dir=str(tmp_path), data_dir=str(tmp_path)).cost()
    assert list(tmp_path.iterdir()) == []


def test_disc_distance_floor(monkeypatch):
    """The rule finds a distance that tells, and finds nothing where there is nothing."""
    snake, geometry, rng = snakes.Snake, snakes.geometry_of(snakes.SPECS[32], 1), np.random.default_rng(0)

    def scene(spec, contour_length, stream, cue):
        begins = [tuple(rng.integers(100, size=2).tolist()) for _ in range(2)]
        near = [(y + 30 + int(rng.integers(5)), x) for y, x in begins]
        ends = near if cue else [tuple(rng.integers(100, size=2).tolist()) for _ in range(2)]
        targets = tuple(snake([(0, begin), (0, end)], (0, 0)) for begin, end in zip(begins, ends))
        return snakes.Scene(geometry, targets, [], 0, 0)

    for cue, low, high in ((True, 0.85, 1.0), (False, 0.42, 0.58)):
        monkeypatch.setattr(snakes, "sample_scene", lambda *arguments, cue=cue: scene(*arguments, cue))
        assert low < pathfinder.disc_distance_floor(32, 14, 600) < high


def test_command_prepares(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pathfinder", "--resolution=48"])
    with pytest.raises(SystemExit):
        pathfinder.main()
    assert "expected one of [32, 64, 128, 256]" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["pathfinder", "--contour_length=6", "--floor=20"])
    pathfinder.main()
    assert capsys.readouterr().out.startswith("32: 0.")
