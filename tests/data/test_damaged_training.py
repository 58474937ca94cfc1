"""A store with 1 % damaged pictures: training skips and counts them, or stops and names the sample."""

import pytest
from transformers import TrainingArguments

from otter_hf.data.collator import OtterCollator
from otter_hf.data.formats import write_mimicit
from otter_hf.data.images import image_bytes
from otter_hf.data.mixture import MimicitMixture, MixtureEntry
from otter_hf.data.samples import SampleError
from otter_hf.training.trainer import OtterTrainer


COUNT = 300
BAD = {7: b"no picture", 107: b"", 207: b"\x89PNG\r\n\x1a\n and no more"}


@pytest.fixture
def train(tmp_path, pictures, model, processor):
    encoded = [image_bytes(picture) for picture in pictures]
    images = {f"i{n}": BAD.get(n, encoded[n % len(encoded)]) for n in range(COUNT)}
    records = {f"r{n}": {"instruction": "Q", "answer": "A", "image_ids": [f"i{n}"]} for n in range(COUNT)}
    files = write_mimicit(tmp_path, "D", records, images)
    entry = MixtureEntry("IMAGE_TEXT", "D", str(files.instructions_path), str(files.images_path))

    def run(on_error, workers=0):
        mixture = MimicitMixture([entry], on_error=on_error, cache_dir=tmp_path / "cache")
        arguments = TrainingArguments(
            output_dir=str(tmp_path / "out"),
            per_device_train_batch_size=20,
            num_train_epochs=1,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_num_workers=workers,
        )
        trainer = OtterTrainer(
            model=model, args=arguments, train_dataset=mixture, data_collator=OtterCollator(processor)
        )
        trainer.train()
        return trainer.state.global_step, mixture.skipped

    return run


@pytest.mark.parametrize("workers", [0, 2])
def test_skip_counts_them(train, workers):
    assert train("skip", workers) == (COUNT // 20, {"unreadable image": 3})


def test_raise_names_the_sample(train):
    with pytest.raises(SampleError, match="Sample 'r(7|107|207)' needs image 'i(7|107|207)', which cannot be decoded"):
        train("raise")
