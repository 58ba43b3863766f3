"""Pathfinder images: two long dashed contours ("snakes") among short ones, and discs at two ends of one or of both long ones.

The generator behind Long Range Arena's Pathfinder data (Linsley et al., 2018; Kim et al., 2020; Tay et al., 2021, section 2.5
and its released parameters), for windows of 32, 64, 128 and 256 pixels. A snake is a chain of straight paddles. Both target
snakes are present in both classes and have equally many paddles: only following a contour from disc to disc tells them apart.

An image is laid out first (`sample_scene`: which paddle lies where) and drawn afterwards (`render`). Layout is a random
walk with collisions, done on an occupancy map of levels 0..255. It is fast because every paddle is one of finitely many:
a snake starts at an integer degree, and each later paddle points from an integer pixel to one of the pixels of a circle around
it. `Geometry` holds the stamps and the candidates of all of those exactly, and every test reads a crop of the map only.

Coordinates are (y, x) pixels, angles are radians with y = d sin, x = d cos, and every computed point is rounded up.

    python -m efficient_attn.tasks.snakes --resolution=32 --benchmark=200 --sheet=sheet.png
"""

import argparse
import dataclasses
import functools
import itertools
import math
import time

import numpy as np
from jaxtyping import Bool, Int, UInt8
from PIL import Image, ImageDraw
from scipy import ndimage

Point = tuple[int, int]

ANTIALIAS = 2  # paddles and discs are drawn this much larger, then reduced
PADDLE_TRIES = 3  # draws of one paddle before its snake is given up
DISTRACTOR_TRIES = 5  # attempts at one distractor before it is left out
FULL = 255  # occupancy of a pixel that is wholly taken
OCCUPIED = 0.3 * FULL  # a snake may not start where occupancy exceeds this
COLLISION = 1.8 * FULL  # two paddles collide where their occupancies add up to this
MIN_WEIGHT = 1e-4  # a snake whose candidates weigh less than this in all has reached a dead end
MIN_FREE = 0.01  # no distractor is started when less than this fraction of the window is free


@dataclasses.dataclass(frozen=True)
class Spec:
    """Parameters of one resolution. Lengths are in pixels; `margins` holds the half-gaps between paddles, one drawn per image."""

    window: int
    padding: int
    margins: tuple[int, ...]
    seed_distance: int
    marker_radius: float
    paddle_length: int
    paddle_thickness: float
    continuity: float
    distractor_paddles: int
    snake_contrast: float
    paddle_contrast: float


# As documented by Long Range Arena; what it does not name has the value of the original generator.
SPECS = {
    32: Spec(32, 1, (1,), 7, 1.5, 2, 0.5, 1.0, 20, 2.0, 0.75),
    64: Spec(64, 1, (1,), 12, 2.5, 5, 1.0, 1.8, 22, 0.8, 1.0),
    128: Spec(128, 1, (2, 3), 20, 3.0, 5, 1.5, 1.8, 35, 0.9, 1.0),
    256: Spec(256, 22, (3,), 27, 5.0, 5, 2.0, 1.8, 30, 1.0, 1.0),
}


def translate(point: Point, angle: float, distance: int) -> Point:
    """The point `distance` away in direction `angle`, rounded up on both axes."""
    return math.ceil(point[0] + distance * math.sin(angle)), math.ceil(point[1] + distance * math.cos(angle))


def flip(angle: float) -> float:
    """The opposite direction, in [-pi, pi)."""
    return angle + math.pi if angle < 0 else angle - math.pi


def disc(radius: int) -> Bool[np.ndarray, "n n"]:
    """Pixels within `radius` of the centre of a square of side 2 radius + 1."""
    y, x = np.ogrid[-radius : radius + 1, -radius : radius + 1]
    return y**2 + x**2 <= radius**2


def shrink(image: UInt8[np.ndarray, "n n"], side: int) -> UInt8[np.ndarray, "m m"]:
    """Reduce a square image with a Lanczos filter, clipped to 0..255."""
    return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.LANCZOS))


def draw_paddle(spec: Spec, margin: int, angle: float) -> tuple[UInt8[np.ndarray, "n n"], UInt8[np.ndarray, "n n"]]:
    """Ink and occupancy (levels 0..255) of a paddle that leaves the centre of the stamp in direction `angle`.

    The occupancy is the line widened by `margin` pixels on all sides.
    """
    reach = spec.paddle_length + math.ceil(spec.paddle_thickness) + margin
    centre = reach * ANTIALIAS
    y, x = translate((centre, centre), angle, spec.paddle_length * ANTIALIAS)
    canvas = Image.new("L", (2 * centre + 1, 2 * centre + 1))
    ImageDraw.Draw(canvas).line([(centre, centre), (x, y)], fill=FULL, width=round(spec.paddle_thickness * ANTIALIAS))
    line = np.asarray(canvas)
    zone = ndimage.binary_dilation(line, disc(margin * ANTIALIAS)).astype(np.uint8) * np.uint8(FULL)
    return shrink(line, 2 * reach + 1), shrink(zone, 2 * reach + 1)


def circle_pixels(radius: int) -> Int[np.ndarray, "K 2"]:
    """Distinct pixels of a circle around the origin: points one pixel of arc apart, rounded down."""
    bearings = np.arange(0.0, 2 * np.pi, 1.0 / radius)
    return np.unique(np.floor(radius * np.stack([np.sin(bearings), np.cos(bearings)], axis=1)).astype(int), axis=0)


def turn_weights(angles: np.ndarray, directions: np.ndarray, continuity: float) -> np.ndarray:
    """cos^2(continuity * turn) from each angle to each direction, 0 from a right angle on. Shape [angles, directions]."""
    turn = np.abs(angles[:, None] - directions[None, :])
    turn = continuity * np.minimum(turn, 2 * np.pi - turn)
    return np.where(turn < np.pi / 2, np.cos(turn) ** 2, 0.0)


class Geometry:
    """All that is known of paddles before they are placed, for one spec and margin.

    Angles are numbered: 0..359 are the integer degrees -180..179 at which a snake may start, 360 + k is the direction of
    `circle[k]`, in which it may go on. Per angle a, `ink[a]` and `occupancy[a]` are the stamps of the paddle that is laid then
    (a first paddle leaves its tail forwards; a later one is drawn from its head backwards, so that its stamp is flipped).

    `footprint[a]` are the offsets that must be free for a snake to start at degree a: the fully occupied pixels of the stamp.
    Two quirks of the original generator shape its images and are kept. The footprint is taken one pixel down and right of where
    the paddle will lie. And it finds no free pixel at all (its dilation gives a negative value) where the footprint of some
    pixel of the window would lie wholly outside, so that only the degrees of `can_start` occur: 30 of 360 at resolution 32,
    95 at 64, nearly all above. `central` lists those at which the first snake finds room in the centre, and where.

    `ahead[a]` are the numbers k of the circle's pixels that can follow angle a, `weight[a]` their weights, and `near[a]` the
    flat offsets of the pixels within `margin` of each in a map of row length `stride`.

    A map is a window in a frame of width `reach`: `inside` is the window, `border` the occupancy before anything is laid.
    """

    def __init__(self, spec: Spec, margin: int):
        self.spec, self.margin = spec, margin
        self.step = spec.paddle_length + margin
        self.reach = self.step + math.ceil(spec.paddle_thickness)
        self.stride = spec.window + 2 * self.reach
        self.inside = np.pad(np.ones((spec.window, spec.window), bool), self.reach)
        free = np.pad(np.ones((spec.window - 2 * spec.padding,) * 2, bool), self.reach + spec.padding)
        self.border = np.where(self.inside & ~free, FULL, 0).astype(np.int16)
        self.circle = circle_pixels(self.step)
        directions = np.arctan2(self.circle[:, 0], self.circle[:, 1])
        degrees = np.arange(-180, 180) * np.pi / 180
        self.angles = np.concatenate([degrees, directions]).tolist()
        self._set_stamps([*degrees.tolist(), *map(flip, directions.tolist())])
        self._set_candidates(directions)

    def _set_stamps(self, drawn: list[float]) -> None:
        stamps = [draw_paddle(self.spec, self.margin, angle) for angle in drawn]
        self.ink = np.stack([ink for ink, _ in stamps])
        self.occupancy = np.stack([zone for _, zone in stamps]).astype(np.int16)
        offsets = [np.argwhere(zone == FULL) - self.reach + 1 for _, zone in stamps[:360]]
        self.footprint = [each[np.abs(each).max(axis=1) <= self.step] for each in offsets]
        self.can_start = np.array([self._stays_inside(each) for each in self.footprint])
        self.central = [
            (degree, box) for degree in np.flatnonzero(self.can_start).tolist() if all(box := self._central_box(degree))
        ]

    def _central_box(self, degree: int) -> tuple[range, range]:
        """Rows and columns of the tails whose footprint stays twice `seed_distance` away from every border."""
        border, offsets = 2 * self.spec.seed_distance, self.footprint[degree]
        low, high = border - offsets.min(axis=0), self.spec.window - border - offsets.max(axis=0)
        return range(low[0], high[0]), range(low[1], high[1])

    @staticmethod
    def _stays_inside(offsets: np.ndarray) -> bool:
        """Whether some offset lies in each closed quadrant, so that no pixel of a window has the whole footprint outside it."""
        quadrants = np.array([(-1, -1), (-1, 1), (1, -1), (1, 1)])
        return bool((offsets[:, None] * quadrants >= 0).all(axis=2).any(axis=0).all())

    def _set_candidates(self, directions: np.ndarray) -> None:
        weights = turn_weights(np.asarray(self.angles), directions, self.spec.continuity)
        near = self.flat(self.circle)[:, None] + self.flat(np.argwhere(disc(self.margin)) - self.margin)[None, :]
        self.ahead = [np.flatnonzero(row) for row in weights]
        self.weight = [row[ahead] for row, ahead in zip(weights, self.ahead)]
        self.near = [near[ahead] for ahead in self.ahead]

    def flat(self, offsets: np.ndarray) -> np.ndarray:
        """Offsets [..., 2] as differences of flat indices."""
        return offsets[..., 0] * self.stride + offsets[..., 1]


geometry_of = functools.lru_cache(Geometry)


class Occupancy:
    """Map of taken pixels: levels 0..255 in the window, and always 0 in a frame of width `reach` around it."""

    def __init__(self, geometry: Geometry):
        self.geometry = geometry
        self.levels = geometry.border.copy()
        self.window = self.levels[geometry.reach : -geometry.reach, geometry.reach : -geometry.reach]

    def index(self, y: int | np.ndarray, x: int | np.ndarray) -> int | np.ndarray:
        """Flat indices of pixels."""
        return (y + self.geometry.reach) * self.geometry.stride + x + self.geometry.reach

    def collides(self, angle: int, point: Point) -> bool:
        """Whether a paddle laid here would overlap what is taken."""
        return bool((self.levels[self._crop(point)] + self.geometry.occupancy[angle]).max() >= COLLISION)

    def take(self, angle: int, point: Point) -> None:
        """Mark the pixels of a paddle as taken."""
        crop = self._crop(point)
        np.maximum(self.levels[crop], self.geometry.occupancy[angle], out=self.levels[crop], where=self.geometry.inside[crop])

    def _crop(self, point: Point) -> tuple[slice, slice]:
        side = 2 * self.geometry.reach + 1
        return slice(point[0], point[0] + side), slice(point[1], point[1] + side)

    def free_pixel(self, degree: int, rng: np.random.Generator) -> Point | None:
        """A pixel drawn uniformly from those where a snake may start at `degree`, or None where there are none.

        Draws pixels of the whole window first, which finds one at once if there are many; lists all of them if there are few.
        """
        if not self.geometry.can_start[degree]:
            return None
        side = self.geometry.spec.window
        for draw in (functools.partial(rng.integers, size=64), rng.permutation):
            y, x = np.divmod(draw(side * side), side)
            tested = self.index(y, x)[:, None] + self.geometry.flat(self.geometry.footprint[degree])[None, :]
            free = np.flatnonzero((self.levels.take(tested) <= OCCUPIED).all(axis=1))
            if free.size:
                return int(y[free[0]]), int(x[free[0]])
        return None


@dataclasses.dataclass
class Snake:
    """Paddles (angle number, pixel) from the origin tip to the terminal tip, and the point that the next one is reckoned from."""

    paddles: list[tuple[int, Point]]
    pivot: Point


@dataclasses.dataclass(frozen=True)
class Scene:
    """The layout of one image. `marked` is the number of the target snake whose origin tip bears a disc."""

    geometry: Geometry
    targets: tuple[Snake, Snake]
    distractors: list[Snake]
    marked: int
    label: int

    @property
    def markers(self) -> tuple[Point, Point]:
        """Pixels of the two discs: both ends of one snake if `label` is 1, ends of both snakes if it is 0."""
        other = self.marked if self.label else 1 - self.marked
        return self.targets[self.marked].paddles[0][1], self.targets[other].paddles[-1][1]


def start_snake(geometry: Geometry, degree: int, tail: Point) -> Snake:
    """A snake of one paddle. Its pivot lies `margin` behind the tail."""
    angle = geometry.angles[degree]
    head = translate(tail, angle, geometry.spec.paddle_length)
    return Snake([(degree, tail)], translate(head, flip(angle), geometry.step))


def extend_snake(occupancy: Occupancy, snake: Snake, rng: np.random.Generator) -> bool:
    """Add a paddle to the snake, and only now take the pixels of the one before it. False if none fits."""
    geometry = occupancy.geometry
    angle = snake.paddles[-1][0]
    pivot = translate(snake.pivot, geometry.angles[angle], geometry.spec.paddle_length + 2 * geometry.margin)
    ahead, weight, near = geometry.ahead[angle], geometry.weight[angle], geometry.near[angle]
    last = geometry.spec.window - 1 - geometry.step
    if not (geometry.step <= pivot[0] <= last and geometry.step <= pivot[1] <= last):
        pixels = geometry.circle[ahead] + pivot
        inside = ((pixels >= 0) & (pixels < geometry.spec.window)).all(axis=1)
        ahead, weight, near = ahead[inside], weight[inside], near[inside]
    taken = occupancy.levels.take(occupancy.index(*pivot) + near).max(axis=1, initial=0)
    cumulative = (weight * (FULL - taken)).cumsum()
    if not cumulative.size or cumulative[-1] < MIN_WEIGHT * FULL:
        return False
    for _ in range(PADDLE_TRIES):
        k = int(ahead[cumulative.searchsorted(rng.random() * cumulative[-1], side="right")])
        head = (pivot[0] + int(geometry.circle[k, 0]), pivot[1] + int(geometry.circle[k, 1]))
        if not occupancy.collides(360 + k, head):
            occupancy.take(*snake.paddles[-1])
            snake.paddles.append((360 + k, head))
            snake.pivot = pivot
            return True
    return False


def sample_targets(occupancy: Occupancy, contour_length: int, rng: np.random.Generator) -> tuple[Snake, Snake] | None:
    """Lay both target snakes by turns, or None where one gets stuck.

    The first starts in the centre, at least twice `seed_distance` from every border; the second `seed_distance` away from it,
    wherever that is (so no start can leave the window). The last paddle of the first snake is never marked as taken.
    """
    geometry = occupancy.geometry
    spec = geometry.spec
    degree, (rows, columns) = geometry.central[rng.integers(len(geometry.central))]
    y, x = rows[rng.integers(len(rows))], columns[rng.integers(len(columns))]
    bearing = int(rng.integers(360)) * math.pi / 180
    other = (round(y + spec.seed_distance * math.sin(bearing)), round(x + spec.seed_distance * math.cos(bearing)))
    snakes = start_snake(geometry, degree, (y, x)), start_snake(geometry, int(rng.integers(360)), other)
    for _ in range(contour_length - 1):
        for snake in snakes:
            if not extend_snake(occupancy, snake, rng):
                return None
    occupancy.take(*snakes[1].paddles[-1])
    return snakes


def sample_distractor(occupancy: Occupancy, length: int, rng: np.random.Generator) -> Snake | None:
    """Lay one snake of `length` paddles anywhere it fits, or None (the map is then as it was before)."""
    geometry, size = occupancy.geometry, occupancy.geometry.spec.window
    if np.count_nonzero(occupancy.window <= OCCUPIED) < MIN_FREE * size**2:
        return None
    for _ in range(PADDLE_TRIES):
        degree = int(rng.integers(360))
        tail = occupancy.free_pixel(degree, rng)
        if tail is None:
            return None
        snake = start_snake(geometry, degree, tail)
        head = translate(tail, geometry.angles[degree], geometry.spec.paddle_length)
        if all(0 <= each < size for each in (*head, *snake.pivot)):
            break
    else:
        return None
    before = occupancy.levels.copy()
    for _ in range(length - 1):
        if not extend_snake(occupancy, snake, rng):
            occupancy.levels[:] = before
            return None
    occupancy.take(*snake.paddles[-1])
    return snake


def sample_scene(spec: Spec, contour_length: int, rng: np.random.Generator) -> Scene:
    """Lay out one image: targets are retried until both are complete, distractors that find no place are left out."""
    label, margin = int(rng.integers(2)), int(rng.choice(spec.margins))
    targets = None
    while targets is None:
        occupancy = Occupancy(geometry_of(spec, margin))
        targets = sample_targets(occupancy, contour_length, rng)
    length, distractors = contour_length // 3, []
    for _ in range(spec.distractor_paddles // length):
        attempts = (sample_distractor(occupancy, length, rng) for _ in range(DISTRACTOR_TRIES))
        distractors.extend(itertools.islice(filter(None, attempts), 1))
    return Scene(occupancy.geometry, targets, distractors, marked=int(rng.integers(2)), label=label)


def draw_marker(spec: Spec, centre: Point) -> UInt8[np.ndarray, "H H"]:
    """A window with one filled disc, levels 0..255."""
    y, x = (ANTIALIAS * (np.arange(spec.window * ANTIALIAS) / ANTIALIAS - each) for each in centre)
    inside = y[:, None] ** 2 + x[None, :] ** 2 <= (ANTIALIAS * spec.marker_radius) ** 2
    return shrink(inside.astype(np.uint8) * np.uint8(FULL), spec.window)


def render(scene: Scene) -> UInt8[np.ndarray, "H H"]:
    """Draw a scene, scaled so that its darkest and brightest pixels are 0 and 255."""
    geometry, spec = scene.geometry, scene.geometry.spec
    frame = np.zeros((geometry.stride, geometry.stride), np.float32)
    for snakes, contrast in (
        (scene.targets, spec.snake_contrast * spec.paddle_contrast),
        (scene.distractors, spec.snake_contrast),
    ):
        for angle, (y, x) in itertools.chain.from_iterable(snake.paddles for snake in snakes):
            crop = frame[y : y + 2 * geometry.reach + 1, x : x + 2 * geometry.reach + 1]
            np.maximum(crop, (geometry.ink[angle] / FULL * contrast).astype(np.float32), out=crop)
    image = frame[geometry.reach :, geometry.reach :][: spec.window, : spec.window]
    image = np.maximum.reduce([image, *(draw_marker(spec, marker) / FULL for marker in scene.markers)])
    return ((image - image.min()) * (255 / np.ptp(image)) + 0.5).astype(np.uint8)


def generate_image(resolution: int, contour_length: int, rng: np.random.Generator) -> tuple[UInt8[np.ndarray, "H H"], int]:
    """One image (0..255) and its label: 1 if the two discs are the ends of one snake of `contour_length` paddles."""
    scene = sample_scene(SPECS[resolution], contour_length, rng)
    return render(scene), scene.label


def main() -> None:
    """Measure the generator on one core, and look at what it makes."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--resolution", type=int, choices=SPECS, default=32)
    parser.add_argument("--contour_length", type=int, default=14)
    parser.add_argument("--benchmark", type=int, default=100, metavar="N", help="make this many images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sheet", metavar="PNG", help="draw up to 16 of them there, 8 of label 1 above 8 of label 0")
    options = parser.parse_args()
    make = functools.partial(generate_image, options.resolution, options.contour_length)
    make(np.random.default_rng(options.seed))  # fills the caches
    started = time.process_time()
    images, labels = map(np.stack, zip(*map(make, np.random.default_rng(options.seed).spawn(options.benchmark))))
    rate = options.benchmark / (time.process_time() - started)
    print(f"resolution {options.resolution}, contour length {options.contour_length}: {rate:.1f} images/s of CPU time")
    print(f"mean {images.mean():.1f}, sd {images.std():.1f}, {np.mean(images == 0):.1%} zeros, {labels.mean():.1%} of label 1")
    if options.sheet:
        tiles = np.concatenate([np.resize(images[labels == label], (2, 4, *images.shape[1:])) for label in (1, 0)])
        tiles = np.pad(tiles, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=FULL)
        Image.fromarray(np.concatenate(np.concatenate(tiles, axis=1), axis=1)).save(options.sheet)


if __name__ == "__main__":
    main()
