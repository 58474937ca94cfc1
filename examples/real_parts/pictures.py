"""
Tasks with exact truths, made from pictures and films in wheels.

Each function makes the records of a task and the pictures they are about, for training or for testing: no picture,
photograph or stretch of film is in both. Two pictures of a record are either each at an `<image>` in its instruction,
or the frames of one medium.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from itertools import permutations
from pathlib import Path
from random import Random

from PIL import Image, ImageDraw, ImageEnhance, ImageFont, ImageOps


SIDE = 112
WORDS = ("apple", "bird", "boat", "bread", "chair", "cloud", "dog", "fish", "house", "key", "lamp", "tree")
# each change and what undoes it: shown the other way round, the pictures have the other answer
CHANGES = {
    "brighter": "darker",
    "turned left": "turned right",
    "closer": "farther away",
    "without colors": "with colors",
}
SHAPES = ("circle", "rectangle", "triangle")


@dataclass
class Task:
    """
    Args:
        group: the task group of the training YAML.
        records: id -> record of MIMIC-IT.
        pictures: id -> picture or file.
        ordered: whether the answer depends on the order of the pictures.
    """

    group: str = "IMAGE_TEXT"
    records: dict[str, dict] = field(default_factory=dict)
    pictures: dict[str, Image.Image | Path] = field(default_factory=dict)
    ordered: bool = False

    def ask(self, instruction: str, answer: str, *pictures: str) -> None:
        record = {"instruction": instruction, "answer": answer, "image_ids": list(pictures)}
        if "<image>" in instruction:
            record["images_in_text"] = True
        self.records[f"INS_{len(self.records):05d}"] = record


def shapes_task(
    questions: list[tuple[str, str, int]], paths: dict[int, str], num_pictures: int, per_picture: int, explain: bool
) -> Task:
    """
    Questions of easy-VQA, `per_picture` at random about each of its first pictures.

    Whether something is there depends on what is asked and what is seen, which one gated block in front of the last
    layers can not compare. With `explain` answers begin with what is seen, "red circle, no": behind that it is a
    matter of the text.
    """
    task, generator = Task(), Random(0)
    about, seen = defaultdict(list), defaultdict(dict)
    names = {answer for _, answer, _ in questions} - {"yes", "no"}
    for question, answer, image in questions:
        about[image].append((question, answer))
        asked = {answer} if answer in names else names & {*question.rstrip("?").split()}
        is_negated = not {"no", "not"}.isdisjoint(question.split())
        if answer in names or (answer == "yes") != is_negated:
            seen[image] |= {name in SHAPES: name for name in asked}
    for image in sorted(about)[:num_pictures]:
        task.pictures[f"SHAPE_{image}"] = Path(paths[image])
        for question, answer in generator.sample(about[image], min(per_picture, len(about[image]))):
            if explain and answer not in names:
                if len(seen[image]) < 2:
                    continue  # no question says what it is
                answer = f"{seen[image][False]} {seen[image][True]}, {answer}"
            task.ask(question, answer, f"SHAPE_{image}")
    return task


def digit_tasks(images, labels, num_pairs: int, num_sums: int, seed: int, explain: bool) -> dict[str, Task]:
    """
    Handwritten digits (scikit-learn, 8x8): which one it is, which of two is larger (the frames of one medium), and the
    sum of two (each at an `<image>`).

    Args:
        images: `(N, 8, 8)`, 0 to 16.
        labels: `(N,)`, 0 to 9.
        explain: whether an answer to which is larger begins with what both are, "3 and 5, the second".
    """
    generator = Random(seed)
    digit, larger, total = Task(), Task(ordered=True), Task()
    pictures = {f"DIGIT_{i}": draw_digit(image) for i, image in enumerate(images)}
    for task in (digit, larger, total):
        task.pictures = pictures
    for i, label in enumerate(labels):
        digit.ask("which digit is it?", str(label), f"DIGIT_{i}")
    while len(larger.records) < num_pairs or len(total.records) < num_sums:
        i, j = generator.sample(range(len(labels)), 2)
        names = (f"DIGIT_{i}", f"DIGIT_{j}")
        a, b = int(labels[i]), int(labels[j])
        if len(total.records) < num_sums:
            total.ask("<image> plus <image>: what is the sum?", str(a + b), *names)
        if a != b and len(larger.records) < num_pairs:
            answer = "the first" if a > b else "the second"
            larger.ask("which digit is larger?", f"{a} and {b}, {answer}" if explain else answer, *names)
    return {"digit": digit, "larger": larger, "sum": total}


def draw_digit(image) -> Image.Image:
    """`(8, 8)` of 0 to 16 -> a white digit on black."""
    grey = Image.fromarray((image * 15.9375).astype("uint8")).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return grey.convert("RGB")


def words_task(fonts: list[Path], num_pictures: int, seed: int) -> Task:
    """One of `WORDS` to read, in a font, size, colour and place drawn at random."""
    task, generator = Task(), Random(seed)
    for i in range(num_pictures):
        word = WORDS[i % len(WORDS)]
        name = f"WORD_{i}"
        task.pictures[name] = draw_word(word, generator.choice(fonts), generator)
        task.ask("what word is written?", word, name)
    return task


def draw_word(word: str, font: Path, generator: Random) -> Image.Image:
    """Dark on light, or light on dark, as large as fits or down to two thirds of it."""
    width = generator.uniform(0.72, 0.98) * SIDE
    at_100 = ImageFont.truetype(str(font), 100)
    left, _, right, _ = at_100.getbbox(word)
    typeface = ImageFont.truetype(str(font), min(100 * width / (right - left), 40))
    dark, light = (tuple(generator.randint(*span) for _ in "rgb") for span in ((0, 90), (170, 255)))
    ink, paper = (dark, light) if generator.random() < 0.5 else (light, dark)
    picture = Image.new("RGB", (SIDE, SIDE), paper)
    left, top, right, bottom = typeface.getbbox(word)
    x = generator.uniform(0, SIDE - (right - left)) - left
    y = generator.uniform(0, SIDE - (bottom - top)) - top
    ImageDraw.Draw(picture).text((x, y), word, fill=ink, font=typeface)
    return picture


def changes_task(photographs: list[Path], num_crops: int, seed: int) -> Task:
    """Two pictures as the frames of one medium: what happened to a photograph between the first and the second."""
    task, generator = Task(ordered=True), Random(seed)
    opened = [Image.open(path).convert("RGB") for path in photographs]
    for i in range(num_crops):
        photograph = opened[i % len(opened)]
        side = int(min(photograph.size) * generator.uniform(0.5, 0.95))
        x, y = (generator.randint(0, length - side) for length in photograph.size)
        crop = photograph.crop((x, y, x + side, y + side))
        task.pictures[f"PHOTO_{i}"] = crop.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        for k, (change, undone) in enumerate(CHANGES.items()):
            other = f"PHOTO_{i}_{k}"
            task.pictures[other] = change_photograph(crop, change, generator)
            question = "what happened to the photograph?"
            task.ask(question, change, f"PHOTO_{i}", other)
            task.ask(question, undone, other, f"PHOTO_{i}")
    return task


def change_photograph(picture: Image.Image, change: str, generator: Random) -> Image.Image:
    """One of the first of `CHANGES`."""
    if change == "brighter":
        picture = ImageEnhance.Brightness(picture).enhance(generator.uniform(1.5, 2.0))
    elif change == "turned left":
        picture = picture.transpose(Image.Transpose.ROTATE_90)
    elif change == "closer":
        border = int(picture.width * generator.uniform(0.2, 0.3))
        picture = ImageOps.crop(picture, border)
    elif change == "without colors":
        picture = ImageOps.grayscale(picture).convert("RGB")
    return picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def film_tasks(films: dict[str, list[Image.Image]], num_clips: int, seed: int) -> dict[str, Task]:
    """
    Clips of four frames: which film a clip is of, and which of two comes first in a clip of two halves.

    Args:
        films: name -> frames in their order; a clip takes frames of it in their order.
    """
    generator = Random(seed)
    which, first = Task("VIDEO_TEXT"), Task("VIDEO_TEXT", ordered=True)
    for task in (which, first):
        task.pictures = {
            f"{name.upper()}_{i:03d}": frame.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
            for name, frames in films.items()
            for i, frame in enumerate(frames)
        }

    def some(name: str, count: int) -> list[str]:
        return [f"{name.upper()}_{i:03d}" for i in sorted(generator.sample(range(len(films[name])), count))]

    for i in range(num_clips):
        name = [*films][i % len(films)]
        which.ask("what is this film about?", name, *some(name, 4))
    pairs = [*permutations(films, 2)]
    for i in range(num_clips):
        a, b = pairs[i % len(pairs)]
        first.ask("what does the film show first?", a, *some(a, 2), *some(b, 2))
    return {"film": which, "film first": first}
