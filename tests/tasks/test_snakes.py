"""Snakes: paddles, free pixels and extensions against dense computations on the whole window; scenes, images, statistics."""

import hashlib
import math
import sys

import numpy as np
import PIL.Image
import pytest
from scipy import ndimage, stats

from efficient_attn.tasks import snakes
from efficient_attn.tasks.snakes import FULL, SPECS, Occupancy, Snake, draw_paddle, geometry_of, translate

GEOMETRIES = [(side, margin) for side, spec in SPECS.items() for margin in spec.margins]


class Fixed(np.random.Generator):
    """A random generator whose `random()` gives the listed numbers in turn."""

    def __init__(self, *numbers):
        super().__init__(np.random.PCG64(0))
        self.numbers = list(numbers)

    def random(self):
        return self.numbers.pop(0)


def dense_stamp(spec, margin, drawn, pixel):
    """Occupancy 0..1 of a paddle drawn at an angle from a pixel, on a window of its own."""
    zone = draw_paddle(spec, margin, drawn)[1]
    reach, wide = zone.shape[0] // 2, spec.window + 2 * zone.shape[0]
    window = np.zeros((wide, wide))
    y, x = (each + zone.shape[0] - reach for each in pixel)
    window[y : y + zone.shape[0], x : x + zone.shape[0]] = zone / 255
    return window[zone.shape[0] : -zone.shape[0], zone.shape[0] : -zone.shape[0]]


def crowded(spec, margin, rng, paddles):
    """A map with some paddles on it, ours and as a dense array 0..1."""
    occupancy = Occupancy(geometry_of(spec, margin))
    dense = np.ones((spec.window, spec.window))
    dense[spec.padding : -spec.padding, spec.padding : -spec.padding] = 0
    for _ in range(paddles):
        degree, pixel = int(rng.integers(360)), tuple(map(int, rng.integers(spec.window, size=2)))
        occupancy.take(degree, pixel)
        dense = np.maximum(dense, dense_stamp(spec, margin, math.radians(degree - 180), pixel))
    np.testing.assert_allclose(occupancy.window / 255, dense)
    return occupancy, dense


def dense_free(spec, margin, degree, dense):
    """Pixels [window, window] where a snake may start, by a maximum filter whose element is the displaced stamp."""
    side = 2 * (spec.paddle_length + margin) + 1
    zone = draw_paddle(spec, margin, math.radians(degree - 180))[1]
    element = np.zeros((side + 2, side + 2), bool)  # displaced by one pixel, then cut to `side`
    cut = (zone.shape[0] - side) // 2
    element[2:, 2:] = (zone == FULL)[cut:-cut, cut:-cut]
    element = element[1:-1, 1:-1]
    outside = ndimage.maximum_filter(dense, footprint=element, mode="constant", cval=-1.0)
    return np.zeros_like(dense, bool) if outside.min() < 0 else outside <= 0.3


@pytest.mark.parametrize(("side", "margin"), GEOMETRIES)
def test_free_pixels_are_those_of_a_dense_maximum_filter(side, margin):
    spec, rng = SPECS[side], np.random.default_rng(side)
    geometry = geometry_of(spec, margin)
    y, x = np.divmod(np.arange(side * side), side)
    for degree in [*rng.choice(360, 8, replace=False).tolist(), 0, 90, 180, 270]:
        occupancy, dense = crowded(spec, margin, rng, paddles=side // 8)
        tested = occupancy.index(y, x)[:, None] + geometry.flat(geometry.footprint[degree])
        ours = (occupancy.levels.take(tested) <= snakes.OCCUPIED).all(axis=1) & geometry.can_start[degree]
        free = dense_free(spec, margin, degree, dense)
        np.testing.assert_array_equal(ours.reshape(side, side), free)
        pixel = occupancy.free_pixel(degree, rng)
        assert free[pixel] if free.any() else pixel is None


@pytest.mark.parametrize("few", [True, False])
def test_free_pixel_is_uniform(few):
    spec, geometry = SPECS[32], geometry_of(SPECS[32], 1)
    degree = int(np.flatnonzero(geometry.can_start)[0])
    occupancy = Occupancy(geometry)
    if few:  # a draw of 64 pixels usually misses them
        occupancy.window[:] = FULL
        occupancy.window[10:13, 20:26] = 0
    free = dense_free(spec, 1, degree, occupancy.window / FULL)
    rng = np.random.default_rng(0)
    counts = np.zeros((32, 32), int)
    for _ in range(3000):
        counts[occupancy.free_pixel(degree, rng)] += 1
    assert not counts[~free].any()
    assert stats.chisquare(counts[free]).pvalue > 1e-3


def test_no_free_pixel():
    geometry, rng = geometry_of(SPECS[256], 3), np.random.default_rng(0)
    occupancy = Occupancy(geometry)
    assert occupancy.free_pixel(0, rng) is not None
    occupancy.levels[:] = FULL
    assert occupancy.free_pixel(0, rng) is None


def dense_extension(spec, margin, dense, pivot, angle, draws):
    """The released algorithm on whole-window arrays: (new head, its direction) or None."""
    step, disc = spec.paddle_length + margin, snakes.disc(margin)
    dilated = ndimage.maximum_filter(dense, footprint=disc, mode="constant")
    weights = {}
    for bearing in np.arange(0, 2 * np.pi, 1 / step):
        y, x = math.floor(pivot[0] + step * math.sin(bearing)), math.floor(pivot[1] + step * math.cos(bearing))
        if 0 <= y < spec.window and 0 <= x < spec.window:
            turn = abs(math.atan2(y - pivot[0], x - pivot[1]) - angle)
            turn = min(spec.continuity * min(turn, 2 * np.pi - turn), np.pi / 2)
            weights[y, x] = math.cos(turn) ** 2 * (1 - dilated[y, x])
    if sum(weights.values()) < 1e-4:
        return None
    pixels = sorted(weights)
    cumulative = np.cumsum([weights[pixel] for pixel in pixels])
    for draw in draws:
        head = pixels[np.argmax(cumulative / cumulative[-1] > draw)]
        direction = math.atan2(head[0] - pivot[0], head[1] - pivot[1])
        if (dense + dense_stamp(spec, margin, snakes.flip(direction), head)).max() < 1.8 - 1e-9:
            return head, direction
    return None


@pytest.mark.parametrize(("side", "margin"), GEOMETRIES)
def test_extensions_are_those_of_a_dense_computation(side, margin):
    spec, rng = SPECS[side], np.random.default_rng(side)
    geometry, outcomes = geometry_of(spec, margin), []
    for _ in range(30):
        occupancy, dense = crowded(spec, margin, rng, paddles=int(rng.integers(side // 4)))
        first, last_pivot = int(rng.integers(360 + len(geometry.circle))), tuple(map(int, rng.integers(side, size=2)))
        pivot = translate(last_pivot, geometry.angles[first], spec.paddle_length + 2 * margin)
        draws = rng.random(3).tolist()
        expected = dense_extension(spec, margin, dense, pivot, geometry.angles[first], draws)
        snake = Snake([(first, (side // 2, side // 2))], last_pivot)
        added = snakes.extend_snake(occupancy, snake, Fixed(*draws))
        outcomes.append(added)
        assert added == (expected is not None)
        if added:
            angle, head = snake.paddles[-1]
            assert (head, pytest.approx(geometry.angles[angle])) == expected
            assert snake.pivot == pivot
            drawn = snakes.flip(geometry.angles[first]) if first >= 360 else geometry.angles[first]
            dense = np.maximum(dense, dense_stamp(spec, margin, drawn, (side // 2, side // 2)))
        np.testing.assert_allclose(occupancy.window / 255, dense)  # the paddle before is taken now, the new one is not
    assert len(set(outcomes)) == 2, "the cases should cover success and failure"


def test_degrees_at_which_snakes_start():
    """Facts of the released generator (its restarts and its numbers of distractors follow from them)."""
    counts = {pair: int(geometry_of(SPECS[pair[0]], pair[1]).can_start.sum()) for pair in GEOMETRIES}
    assert counts == {(32, 1): 30, (64, 1): 95, (128, 2): 354, (128, 3): 360, (256, 3): 360}


@pytest.mark.parametrize(("side", "contour_length", "count"), [(32, 14, 6), (32, 9, 6), (64, 6, 6), (128, 6, 4), (256, 14, 6)])
def test_scenes_keep_the_rules(side, contour_length, count):
    spec, labels = SPECS[side], set()
    for rng in np.random.default_rng(side).spawn(count):
        scene = snakes.sample_scene(spec, contour_length, rng)
        margin, tails = scene.geometry.margin, [snake.paddles[0][1] for snake in scene.targets]
        assert [len(snake.paddles) for snake in scene.targets] == [contour_length] * 2
        assert {len(snake.paddles) for snake in scene.distractors} <= {contour_length // 3}
        assert len(scene.distractors) <= spec.distractor_paddles // (contour_length // 3)
        assert abs(math.dist(*tails) - spec.seed_distance) <= 0.5 * math.sqrt(2)
        # the first target's footprint, which begins a pixel further down and right, keeps to the centre
        assert all(2 * spec.seed_distance - 1 <= each <= side - 2 * spec.seed_distance + spec.paddle_length for each in tails[0])
        for snake in (*scene.targets, *scene.distractors):
            heads = np.array([pixel for _, pixel in snake.paddles[1:]])
            assert heads.min() >= 0
            assert heads.max() < side
            gaps = np.linalg.norm(np.diff(heads, axis=0), axis=1)
            assert (np.abs(gaps - spec.paddle_length - 2 * margin) < spec.paddle_length).all()
        begins = [tails.index(scene.markers[0])]
        ends = [snake.paddles[-1][1] for snake in scene.targets]
        assert scene.label == (scene.markers[1] == ends[begins[0]])
        assert scene.markers[1] in ends
        labels.add(scene.label)
    assert labels == {0, 1}


def test_render_scales_and_marks():
    scene = snakes.sample_scene(SPECS[32], 6, np.random.default_rng(1))
    image = snakes.render(scene)
    assert (image.min(), image.max()) == (0, 255)
    alone = snakes.Scene(scene.geometry, scene.targets, [], scene.marked, scene.label)
    brighter = snakes.render(alone)
    for y, x in scene.markers:
        assert brighter[y, x] == 255  # nothing is brighter than a disc where there are no distractors
        assert (brighter[y - 1 : y + 1, x - 1 : x + 1] > 200).all()  # its centre is the corner between these pixels
    far = np.ones((32, 32), bool)
    for snake in (*scene.targets, *scene.distractors):
        for _, (y, x) in snake.paddles:
            far[max(y - 4, 0) : y + 5, max(x - 4, 0) : x + 5] = False
    assert far.any()
    assert not image[far].any()


def test_a_paddle_is_a_line_of_its_length():
    ink, zone = draw_paddle(SPECS[128], 2, 0.0)  # to the right: columns grow with cos
    centre = ink.shape[0] // 2
    assert (ink[centre, centre : centre + 5] > 200).all()
    assert (ink[centre, : centre - 1] < 10).all()
    assert (ink[: centre - 2] < 10).all()
    assert (zone[centre - 2 : centre + 3, centre : centre + 6] > 200).all()
    ink, _ = draw_paddle(SPECS[128], 2, math.pi / 2)  # down: rows grow with sin
    assert (ink[centre : centre + 5, centre] > 150).all()


def test_images_are_what_they_were():
    """The same key gives the same layout for ever: data sets of equal names must hold equal images."""
    scene = snakes.sample_scene(SPECS[32], 14, np.random.default_rng([0, 32, 14, 0, 0, 0]))
    text = repr([snake.paddles for snake in (*scene.targets, *scene.distractors)] + [scene.marked, scene.label])
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "5947b12ae0c341fe", (
        "The generator gives other images than it did. If that is intended, data made before are no longer what their names say: "
        "change Pathfinder.name as well as this value."
    )


# Mean, standard deviation and fraction of zeros of images (0..255) of the original generator at contour length 14, and the
# standard deviation of the mean from one image to the next. From 800, 20, 30 and 10 images made with it.
ORIGINAL = {
    32: (20.21, 51.10, 0.6577, 2.1),
    64: (13.23, 40.81, 0.7422, 0.97),
    128: (7.93, 35.72, 0.8621, 0.30),
    256: (2.949, 24.13, 0.9609, 0.05),
}


@pytest.mark.parametrize(
    ("side", "count"),
    [(32, 60), (256, 20), *(pytest.param(*case, marks=pytest.mark.exhaustive) for case in [(64, 20), (128, 20)])],
)
def test_images_have_the_statistics_of_the_original_generator(side, count):
    mean, deviation, zeros, spread = ORIGINAL[side]
    images = np.stack([snakes.generate_image(side, 14, rng)[0] for rng in np.random.default_rng(0).spawn(count)])
    assert abs(images.mean() - mean) < 4 * spread / math.sqrt(count) + 0.01 * mean
    assert abs(images.std() - deviation) < 0.05 * deviation
    assert abs((images == 0).mean() - zeros) < 0.02


def held_out_accuracy(features, labels):
    """Accuracy on the second half of a logistic regression on features and their squares, fitted on the first."""
    features = (features - features.mean(0)) / features.std(0)
    features = np.concatenate([np.ones((len(features), 1)), features, features**2], axis=1)
    half, weights = len(labels) // 2, np.zeros(features.shape[1])
    x, y = features[:half], labels[:half]
    for _ in range(20):  # Newton steps, with a little shrinkage
        p = 1 / (1 + np.exp(-x @ weights))
        curvature = (x.T * (p * (1 - p))) @ x + 0.1 * np.eye(len(weights))
        weights -= np.linalg.solve(curvature, x.T @ (p - y) + 0.1 * weights)
    return ((features[half:] @ weights > 0) == labels[half:]).mean()


@pytest.mark.parametrize(
    ("side", "count"), [(32, 600), *(pytest.param(side, 1200, marks=pytest.mark.exhaustive) for side in SPECS)]
)
def test_intensities_say_nothing_of_the_class(side, count):
    made = [snakes.generate_image(side, 14, rng) for rng in np.random.default_rng(5).spawn(count)]
    labels = np.array([label for _, label in made])
    features = np.array([[image.mean(), image.std(), (image == 0).mean(), (image > 127).mean()] for image, _ in made])
    assert abs(labels.mean() - 0.5) < 3 * 0.5 / math.sqrt(count)
    assert held_out_accuracy(features, labels) < 0.5 + 3 * 0.5 / math.sqrt(count / 2)
    assert held_out_accuracy(features + 3 * labels[:, None] * features.std(0), labels) > 0.9, "the regression should find a cue"


def test_command_writes_a_sheet(tmp_path, monkeypatch, capsys):
    sheet = tmp_path / "sheet.png"
    monkeypatch.setattr(sys, "argv", ["snakes", "--contour_length=6", "--benchmark=12", f"--sheet={sheet}"])
    snakes.main()
    assert "images/s of CPU time" in capsys.readouterr().out
    with PIL.Image.open(sheet) as image:
        assert image.size == (4 * 34, 4 * 34)
