"""
easy-VQA (https://github.com/vzhou842/easy-VQA, MIT licence; `pip install easy-vqa`) as MIMIC-IT files.

    python examples/easy_vqa/prepare.py --output out/demo/data

5,000 pictures of one shape each, 48,248 questions, 13 answers. The last 200 of the 4,000 training pictures are held
out to watch the training; the official test split is not touched. Written are

    train_*            questions, answers and pictures to train on, and two ways to make examples of them:
      train_train.json   a conversation per picture: its last question, with all the others as earlier turns
      shots_train.json   a question about each picture, after worked examples: questions about two other pictures
    validation_*       the questions about the pictures held out, one by one
    train.yaml, validation.yaml   which of these files to train and to evaluate on
"""

import argparse
import json
import random
from pathlib import Path

import easy_vqa
import yaml

from otter_hf.data import write_mimicit


NUM_HELD_OUT = 200


def main(output: Path) -> None:
    """Writes all files into the folder `output`."""
    paths = easy_vqa.get_train_image_paths()
    records = {image: {} for image in sorted(paths)}  # picture -> id -> record
    for question, answer, image in zip(*easy_vqa.get_train_questions(), strict=True):
        id = f"EVQA_INS_{image:04d}_{len(records[image]):02d}"
        records[image][id] = {"instruction": question, "answer": answer, "image_ids": [f"EVQA_IMG_{image:04d}"]}
    train = dict(list(records.items())[:-NUM_HELD_OUT])
    validation = dict(list(records.items())[-NUM_HELD_OUT:])

    for name, part, train_config in (("train", train, conversations(train)), ("validation", validation, None)):
        images = {f"EVQA_IMG_{image:04d}": Path(paths[image]) for image in part}
        all_records = {id: record for of_image in part.values() for id, record in of_image.items()}
        write_mimicit(output, name, all_records, images, train_config)
    (output / "shots_train.json").write_text(json.dumps(worked_examples(train)), encoding="utf-8")

    train_files = {"mimicit_path": "train_instructions.json", "images_path": "train.parquet"}
    train_yaml = {
        "IMAGE_TEXT": {"conversations": {**train_files, "train_config_path": "train_train.json"}},
        "IMAGE_TEXT_IN_CONTEXT": {
            "shots": {**train_files, "train_config_path": "shots_train.json", "num_samples": 1280}
        },
    }
    validation_files = {"mimicit_path": "validation_instructions.json", "images_path": "validation.parquet"}
    for name, content in (("train", train_yaml), ("validation", {"IMAGE_TEXT": {"questions": validation_files}})):
        (output / f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


def conversations(records: dict[int, dict]) -> dict[str, list[str]]:
    """Per picture: the id of its last question, and those of all others as context."""
    rows = [list(of_image) for of_image in records.values()]
    return {ids[-1]: ids[:-1] for ids in rows}


def worked_examples(records: dict[int, dict], num_shots: int = 2) -> dict[str, list[str]]:
    """Per picture: the id of one of its questions, and of one about each of `num_shots` other pictures as context."""
    generator = random.Random(0)
    ids = {image: list(of_image) for image, of_image in records.items()}
    config = {}
    for image in ids:
        others = generator.sample([other for other in ids if other != image], num_shots)
        config[generator.choice(ids[image])] = [generator.choice(ids[other]) for other in others]
    return config


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("out/demo/data"))
    main(parser.parse_args().output)
