"""What is in a toy picture: the robot (subject_fidelity), the right background, the right shape and color.

No network and no learnt features: the world's backgrounds are plain, so whatever differs from the picture's left and
right edge is the object. Every measure crops to the object first, hence ignores its position and size.

    python score.py            # what the measures say about real renderings and about known failures
"""

from __future__ import annotations

import random
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from world import (
    COLORS,
    PINK,
    SHADE,
    SHAPES,
    TEAL,
    held_out_robots,
    render_figure,
    render_robot,
    render_shape,
)

EDGE = 3  # pixels at the left and right edge that are background for sure
CROP = 32  # side of the crop in which objects are compared
SUBJECT_COLORS = np.array([TEAL, PINK, (250, 250, 250), (20, 20, 20)], dtype=np.float32)
WORLD_COLORS = np.array(list(COLORS.values()), dtype=np.float32)

Array = NDArray[np.float32]


def to_array(image: Image.Image) -> Array:
    """Bytes as floats, (H, W, 3) in 0..255."""
    return np.asarray(image.convert("RGB"), dtype=np.float32)


def box_blur(fields: Array) -> Array:
    """Mean over each pixel's 3 x 3 neighbours, (H, W, C)."""
    padded = np.pad(fields, ((1, 1), (1, 1), (0, 0)), mode="edge")
    height, width = fields.shape[:2]
    return np.mean([padded[i : i + height, j : j + width] for i in range(3) for j in range(3)], axis=0)


def foreground(pixels: Array) -> NDArray[np.bool_]:
    """Where the object is, holes filled, (H, W): whatever differs from its row's edges, without lone pixels."""
    edges = np.concatenate([pixels[:, :EDGE], pixels[:, -EDGE:]], axis=1)
    differs = np.abs(pixels - np.median(edges, axis=1, keepdims=True)).max(axis=2) > 40
    solid = box_blur(differs[..., None].astype(np.float32))[..., 0] > 0.5

    def spanned(mask: NDArray[np.bool_], axis: int) -> NDArray[np.bool_]:
        forth = np.maximum.accumulate(mask, axis=axis)
        back = np.flip(np.maximum.accumulate(np.flip(mask, axis), axis=axis), axis)
        return forth & back

    return spanned(solid, 0) & spanned(solid, 1)  # a black pupil on a black background is a hole


def crop_object(pixels: Array) -> tuple[Array, Array] | None:
    """The object in a square box, (32, 32, 3), and its mask, (32, 32) in [0, 1]; None if there is none."""
    mask = foreground(pixels)
    if mask.sum() < 40:
        return None
    ends = []
    for axis in (1, 0):
        inside = np.flatnonzero(mask.sum(axis=axis) > 0)
        ends.append((inside[0], inside[-1] + 1))
    (top, bottom), (left, right) = ends
    side, row, column = max(bottom - top, right - left), (top + bottom) / 2, (left + right) / 2
    box = (column - side / 2, row - side / 2, column + side / 2, row + side / 2)

    def cut(values: NDArray[np.uint8]) -> Array:
        image, size = Image.fromarray(values), (CROP, CROP)
        return np.float32(image.transform(size, Image.Transform.EXTENT, box, Image.Resampling.BILINEAR))

    return cut(pixels.astype(np.uint8)), cut((255 * mask).astype(np.uint8)) / 255


def subject_map(image: Image.Image) -> Array:
    """How much of each of the subject's four colors is where on the object, (32, 32, 4), background left out."""
    crop = crop_object(to_array(image))
    if crop is None:
        return np.zeros((CROP, CROP, len(SUBJECT_COLORS)), dtype=np.float32)
    colors, mask = crop
    distances = np.linalg.norm(colors[:, :, None] - SUBJECT_COLORS, axis=3)
    return box_blur(np.exp(-((distances / 80) ** 2)) * mask[..., None])  # blurred: half a pixel's shift is no fault


def subject_similarity(first: Array, second: Array) -> float:
    """Overlap of two maps (soft intersection over union), mean over colors: eyes count as much as the large body."""
    overlaps = np.minimum(first, second).sum(axis=(0, 1)) / (np.maximum(first, second).sum(axis=(0, 1)) + 1e-6)
    return float(overlaps.mean())


@cache
def real_robots() -> tuple[list[Array], float]:
    """Maps of the held-out renderings, and how similar these are to each other."""
    maps = [subject_map(image) for image in held_out_robots()]
    pairs = [subject_similarity(a, b) for i, a in enumerate(maps) for b in maps[:i]]
    return maps, float(np.mean(pairs))


def subject_fidelity(images: list[Image.Image]) -> float:
    """Similarity of pictures to held-out renderings of the robot, as a fraction of theirs to each other."""
    maps, real = real_robots()
    return float(np.mean([subject_similarity(subject_map(image), other) for image in images for other in maps])) / real


def background_of(image: Image.Image) -> str | None:
    """The color whose shaded background is nearest to the picture's edges, if it is near at all."""
    pixels = to_array(image)
    light = np.linspace(SHADE, 1.0, len(pixels))[:, None]
    edges = np.median(np.concatenate([pixels[:, :EDGE], pixels[:, -EDGE:]], axis=1), axis=1)
    distances = [np.linalg.norm(edges - light * color, axis=1).mean() for color in WORLD_COLORS]
    return list(COLORS)[int(np.argmin(distances))] if min(distances) < 40 else None


def color_of(image: Image.Image) -> str | None:
    """The world's color nearest to the object's, None without an object."""
    crop = crop_object(to_array(image))
    if crop is None:
        return None
    inside = crop[0][crop[1] > 0.9]
    if not len(inside):
        return None
    return list(COLORS)[int(np.linalg.norm(WORLD_COLORS - np.median(inside, axis=0), axis=1).argmin())]


@cache
def shape_templates() -> dict[str, Array]:
    """Mean mask of some renderings of each shape, (32, 32)."""
    rng = random.Random(0)
    templates = {}
    for shape in SHAPES:
        images = [render_shape(shape, COLORS["white"], COLORS["black"], rng) for _ in range(8)]
        templates[shape] = np.mean([crop_object(to_array(image))[1] for image in images], axis=0)
    return templates


def shape_of(image: Image.Image) -> str | None:
    """The shape whose mask overlaps the object's best, if any overlaps well."""
    crop = crop_object(to_array(image))
    if crop is None:
        return None
    overlaps = {
        shape: np.minimum(crop[1], mask).sum() / np.maximum(crop[1], mask).sum()
        for shape, mask in shape_templates().items()
    }
    best = max(overlaps, key=overlaps.get)
    return best if overlaps[best] > 0.75 else None


def background_correct(image: Image.Image, background: str) -> bool:
    """Whether the background has this color."""
    return background_of(image) == background


def color_correct(image: Image.Image, color: str) -> bool:
    """Whether the object has this color."""
    return color_of(image) == color


def shape_correct(image: Image.Image, shape: str) -> bool:
    """Whether the object has this shape."""
    return shape_of(image) == shape


def main() -> None:
    rng = random.Random(5)
    right = np.zeros(3)
    for _ in range(1000):
        shape, (color, background) = rng.choice(SHAPES), rng.sample(list(COLORS), 2)
        image = render_shape(shape, COLORS[color], COLORS[background], rng)
        right += shape_correct(image, shape), color_correct(image, color), background_correct(image, background)
    print("real shapes: shape, color, background right", *right / 1000)
    robots = [render_robot(background, rng) for background in COLORS for _ in range(3)]
    looks = {
        "other robots": robots,
        "blurred robots": [image.filter(ImageFilter.GaussianBlur(1)) for image in robots],
        "figures of random parts": [render_figure(rng.choice(list(COLORS)), rng) for _ in range(48)],
        "teal body alone": [render_robot(background, rng, details=False) for background in COLORS],
    }
    for shape in SHAPES:
        looks[shape] = [render_shape(shape, COLORS[color], COLORS["green"], rng) for color in ("white", "blue")]
    print(f"similarity of held-out robots to each other {real_robots()[1]:.3f}; as fractions of it:")
    for name, images in looks.items():
        print(f"  {name}: {subject_fidelity(images):.3f}")


if __name__ == "__main__":
    main()
