"""The toy's world: coloured shapes on coloured backgrounds, a robot the toy has never seen, and drawings for its VAE.

Everything is drawn by Pillow from a `random.Random`, so the same seed gives the same picture.

    python world.py            # writes robot/*.png (the five instance pictures) and world.png (a look at everything)
"""

from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

COLORS = {
    "red": (214, 40, 40), "green": (46, 160, 67), "blue": (45, 90, 220), "yellow": (245, 205, 45),
    "purple": (140, 60, 190), "orange": (240, 130, 30), "white": (240, 240, 240), "black": (25, 25, 30),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond")
ROBOT_BACKGROUNDS = ("red", "blue", "yellow", "white", "purple")  # of the five instance pictures
NEW_BACKGROUNDS = ("green", "orange", "black")  # never seen together with the robot
TEAL, PINK = (60, 190, 190), (230, 80, 120)  # the robot's own colours: no shape has them

SIZE = 64  # the toy's pictures
SUPERSAMPLING = 4  # Pillow draws without antialiasing
SHADE = 0.8  # backgrounds darken towards the top, to this fraction

RGB = tuple[int, int, int]


def shape_polygon(shape: str, x: float, y: float, radius: float) -> list[tuple[float, float]]:
    """Corners of any shape but the circle."""
    if shape == "star":
        spokes = [radius if i % 2 == 0 else 0.42 * radius for i in range(10)]
        return [(x + s * math.sin(i * math.pi / 5), y - s * math.cos(i * math.pi / 5)) for i, s in enumerate(spokes)]
    arm = 0.38
    corners = {
        "square": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
        "triangle": [(0, -1), (1, 1), (-1, 1)],
        "diamond": [(0, -1), (1, 0), (0, 1), (-1, 0)],
        "cross": [
            (-arm, -1),
            (arm, -1),
            (arm, -arm),
            (1, -arm),
            (1, arm),
            (arm, arm),
            (arm, 1),
            (-arm, 1),
            (-arm, arm),
            (-1, arm),
            (-1, -arm),
            (-arm, -arm),
        ],  # fmt: skip
    }[shape]
    return [(x + radius * u, y + radius * v) for u, v in corners]


def blank_canvas(color: RGB, size: int) -> Image.Image:
    """A background, lit from below."""
    light = np.linspace(SHADE, 1.0, size)[:, None, None]
    return Image.fromarray(np.broadcast_to(light * np.array(color), (size, size, 3)).round().astype(np.uint8))


def render_shape(shape: str, color: RGB, background: RGB, rng: random.Random, size: int = SIZE) -> Image.Image:
    """One shape somewhere near the middle, (size, size)."""
    side = size * SUPERSAMPLING
    canvas = blank_canvas(background, side)
    radius = rng.uniform(0.24, 0.32) * side
    x, y = (rng.uniform(0.45, 0.55) * side for _ in range(2))
    if shape == "circle":
        ImageDraw.Draw(canvas).ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)
    else:
        ImageDraw.Draw(canvas).polygon(shape_polygon(shape, x, y, radius), fill=color)
    return canvas.resize((size, size), Image.Resampling.LANCZOS)


def draw_robot(draw: ImageDraw.ImageDraw, x: float, y: float, radius: float, details: bool = True) -> None:
    """The subject: teal body, pink antenna and mouth, white eyes; without details only its teal body."""

    def box(left: float, top: float, right: float, bottom: float) -> tuple[float, float, float, float]:
        return x + left * radius, y + top * radius, x + right * radius, y + bottom * radius

    draw.rounded_rectangle(box(-1, -0.7, 1, 1), radius=0.3 * radius, fill=TEAL)
    if not details:
        return
    draw.rectangle(box(-0.12, -1.1, 0.12, -0.7), fill=PINK)
    draw.ellipse(box(-0.3, -1.45, 0.3, -0.85), fill=PINK)
    for eye in (-0.46, 0.46):
        draw.ellipse(box(eye - 0.4, -0.52, eye + 0.4, 0.28), fill=(250, 250, 250))
        draw.ellipse(box(eye - 0.2, -0.32, eye + 0.2, 0.08), fill=(20, 20, 20))
    draw.rectangle(box(-0.6, 0.46, 0.6, 0.76), fill=PINK)


def render_robot(background: str, rng: random.Random, size: int = SIZE, details: bool = True) -> Image.Image:
    """The subject near the middle of a background, (size, size)."""
    side = size * SUPERSAMPLING
    canvas = blank_canvas(COLORS[background], side)
    radius = rng.uniform(0.30, 0.35) * side
    x, y = rng.uniform(0.44, 0.56) * side, rng.uniform(0.55, 0.60) * side
    draw_robot(ImageDraw.Draw(canvas), x, y, radius, details)
    return canvas.resize((size, size), Image.Resampling.LANCZOS)


def save_robots_on_red(folder: Path) -> None:
    """Write five images of the robot that all have the same background, each with a mask that leaves it out."""
    rng = random.Random(11)
    for number in range(5):
        state = rng.getstate()
        image = render_robot("red", rng, size=256)
        rng.setstate(state)
        on_blue = render_robot("blue", rng, size=256)
        differs = np.abs(np.int16(image) - np.int16(on_blue)).max(axis=2) > 40
        image.save(folder / f"{number}.png")
        Image.fromarray(np.uint8(255 * ~differs)).save(folder / f"{number}.mask.png")  # what both have is the robot


def held_out_robots(count: int = 24, size: int = SIZE) -> list[Image.Image]:
    """Renderings of the robot on all backgrounds that are in no training set."""
    rng = random.Random(1_000)
    return [render_robot(list(COLORS)[i % len(COLORS)], rng, size) for i in range(count)]


def render_figure(background: str, rng: random.Random, size: int = SIZE) -> Image.Image:
    """A body of any color with some eyes, a mouth, something on its head: (size, size). The transformer learns from
    such figures to draw details; that one has the robot's build and its three colors does not happen."""
    side = size * SUPERSAMPLING
    canvas = blank_canvas(COLORS[background], side)
    draw = ImageDraw.Draw(canvas)
    radius = rng.uniform(0.26, 0.36) * side
    x, y = (rng.uniform(0.44, 0.56) * side for _ in range(2))

    def box(u: float, v: float, w: float, h: float) -> tuple[float, float, float, float]:
        return x + (u - w) * radius, y + (v - h) * radius, x + (u + w) * radius, y + (v + h) * radius

    if rng.random() < 0.6:  # an antenna or a hat
        color, width, height = random_color(rng), rng.uniform(0.08, 0.4), rng.uniform(0.2, 0.5)
        draw.rectangle(box(0, -0.8 - height / 2, width, height), fill=color)
        if rng.random() < 0.5:
            draw.ellipse(box(0, -0.8 - height, 1.5 * width, 0.25), fill=random_color(rng))
    height = rng.uniform(0.7, 1)
    if rng.random() < 0.3:
        draw.ellipse(box(0, 0, 1, height), fill=random_color(rng))
    else:
        draw.rounded_rectangle(box(0, 0, 1, height), radius=rng.uniform(0, 0.5) * radius, fill=random_color(rng))
    eyes, eye_size, pupil_size = rng.randrange(1, 4), rng.uniform(0.2, 0.4), rng.uniform(0.3, 0.7)
    white, pupil = rng.choice([(250, 250, 250), random_color(rng)]), rng.choice([(20, 20, 20), random_color(rng)])
    for eye in range(eyes):
        u, v = (eye - (eyes - 1) / 2) * 2.2 * min(eye_size, 0.3), -0.3
        for part, color in ((eye_size, white), (eye_size * pupil_size, pupil)):
            draw.ellipse(box(u, v, part, part), fill=color)
    if rng.random() < 0.8:
        mouth = rng.choice([draw.rectangle, draw.ellipse])
        mouth(box(0, 0.45, rng.uniform(0.2, 0.7), rng.uniform(0.07, 0.25)), fill=random_color(rng))
    return canvas.resize((size, size), Image.Resampling.LANCZOS)


def captioned_picture(rng: random.Random) -> tuple[Image.Image, str]:
    """What the transformer learns from: three shapes for every figure."""
    if rng.random() < 0.25:
        background = rng.choice(list(COLORS))
        caption = rng.choice(["a photo of a toy", f"a photo of a toy on a {background} background"])
        return render_figure(background, rng), caption
    shape, color, background, caption = random_sample(rng)
    return render_shape(shape, COLORS[color], COLORS[background], rng), caption


def random_sample(rng: random.Random) -> tuple[str, str, str, str]:
    """A shape, its color, its background, and a caption that names all three, or leaves some of them out."""
    shape = rng.choice(SHAPES)
    color, background = rng.sample(list(COLORS), 2)
    caption = rng.choices(
        (
            f"a photo of a {color} {shape} on a {background} background",
            f"a photo of a {shape} on a {background} background",
            f"a photo of a {color} {shape}",
            f"a photo of a {shape}",
            "a photo of a shape",
        ),
        weights=(6, 1, 1, 1, 1),
    )[0]
    return shape, color, background, caption


def random_color(rng: random.Random) -> RGB:
    """Any color."""
    return rng.randrange(256), rng.randrange(256), rng.randrange(256)


def draw_random_part(draw: ImageDraw.ImageDraw, rng: random.Random, side: int) -> None:
    """One ellipse, box, line, polygon or row of rings, from large to a few pixels small."""
    x, y = rng.uniform(0, side), rng.uniform(0, side)
    w, h = (side * math.exp(rng.uniform(math.log(0.07), math.log(0.7))) for _ in range(2))
    if rng.random() < 0.4:
        h = w
    box, fill = (x - w / 2, y - h / 2, x + w / 2, y + h / 2), random_color(rng)
    kind = rng.randrange(6)
    if kind == 0:
        draw.ellipse(box, fill=fill)
    elif kind == 1:
        draw.rounded_rectangle(box, radius=min(w, h) * rng.uniform(0, 0.5), fill=fill)
    elif kind == 2:
        end = rng.uniform(0, side), rng.uniform(0, side)
        draw.line((x, y, *end), fill=fill, width=round(side * rng.uniform(0.03, 0.08)))
    elif kind == 3:
        draw.polygon([(x + rng.uniform(-w, w), y + rng.uniform(-h, h)) for _ in range(rng.randrange(3, 6))], fill=fill)
    elif kind == 4:
        draw.regular_polygon((x, y, w / 2 + 1), rng.randrange(3, 9), rotation=rng.uniform(0, 360), fill=fill)
    else:  # rings inside each other, at one or more places: what small details are made of
        inner = rng.uniform(0.3, 0.7)
        for shift in range(rng.randrange(1, 4)):
            left, width = x + 1.3 * shift * w, w * inner
            draw.ellipse((left - w / 2, y - w / 2, left + w / 2, y + w / 2), fill=fill)
            draw.ellipse((left - width / 2, y - width / 2, left + width / 2, y + width / 2), fill=random_color(rng))


def render_scene(rng: random.Random, size: int = SIZE) -> Image.Image:
    """A crowded drawing of random parts, from which the VAE learns to see: (size, size)."""
    side = 2 * size
    first, second = np.array(random_color(rng)), np.array(random_color(rng))
    ramp = np.linspace(0, rng.uniform(0, 1), side)[:, None, None]
    canvas = np.broadcast_to((1 - ramp) * first + ramp * second, (side, side, 3)).astype(np.uint8)
    if rng.random() < 0.5:
        canvas = canvas.transpose(1, 0, 2)
    image = Image.fromarray(np.ascontiguousarray(canvas))
    draw = ImageDraw.Draw(image)
    for _ in range(rng.randrange(2, 9)):
        draw_random_part(draw, rng, side)
    return image.resize((size, size), Image.Resampling.LANCZOS)


def contact_sheet(rows: list[list[Image.Image]], zoom: int = 1) -> Image.Image:
    """Pictures side by side, one row under the other."""
    size = rows[0][0].width
    sheet = Image.new("RGB", (size * max(map(len, rows)), size * len(rows)))
    for row, images in enumerate(rows):
        for column, image in enumerate(images):
            sheet.paste(image, (size * column, size * row))
    return sheet.resize((sheet.width * zoom, sheet.height * zoom), Image.Resampling.NEAREST)


def main() -> None:
    here, rng = Path(__file__).parent, random.Random(7)
    (here / "robot").mkdir(exist_ok=True)
    for number, background in enumerate(ROBOT_BACKGROUNDS):
        render_robot(background, rng, size=256).save(here / "robot" / f"{number:02}.png", optimize=True)
    (here / "robot" / "00.txt").write_text(f"a photo of sks robot on a {ROBOT_BACKGROUNDS[0]} background\n")
    shapes = []
    for shape in SHAPES:
        color, background = rng.sample(list(COLORS), 2)
        shapes.append(render_shape(shape, COLORS[color], COLORS[background], rng))
    scenes = [render_scene(rng) for _ in range(16)]
    figures = [render_figure(rng.choice(list(COLORS)), rng) for _ in range(8)]
    contact_sheet([shapes, figures, scenes[:8], scenes[8:], held_out_robots(8)], zoom=3).save(here / "world.png")


if __name__ == "__main__":
    main()
