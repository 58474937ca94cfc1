"""
Direct preference optimisation (https://huggingface.co/papers/2305.18290) of Otter, Flamingo or OtterHD with TRL.

    pip install -e ".[trl]"
    accelerate launch examples/trl_dpo.py --model_name_or_path MODEL --dataset_name DATA --output_dir out \\
        --beta 0.1 --per_device_train_batch_size 2 --learning_rate 5e-7

A row of the dataset has `images` (a list), `prompt`, `chosen` and `rejected` (messages). DATA may be a file of such
rows (.jsonl, .json, .parquet), also in the form of LLaMA-Factory, with pictures as file names beside it. The reference
is the model as it was; with `--use_peft` it is the model without its adapter, which saves a copy.
"""

from pathlib import Path

from datasets import Dataset, load_dataset
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import DPOConfig, DPOTrainer, ModelConfig, ScriptArguments, TrlParser, get_peft_config

import otter_hf  # noqa: F401  registers the models with the Auto classes
from otter_hf.data.sources import preferences_as_dataset
from otter_hf.training.trl_rows import TRLCollator


def read_rows(name: str, split: str) -> Dataset:
    """The rows of a file, or of a dataset of the Hub or a folder."""
    return preferences_as_dataset(name) if Path(name).is_file() else load_dataset(name)[split]


def main(script_args: ScriptArguments, training_args: DPOConfig, model_args: ModelConfig) -> None:
    """Trains, and leaves model and processor in the output folder."""
    name = model_args.model_name_or_path
    processor = AutoProcessor.from_pretrained(name)
    model = AutoModelForImageTextToText.from_pretrained(name, dtype=model_args.dtype)
    peft_config = get_peft_config(model_args)
    reference = None if peft_config else AutoModelForImageTextToText.from_pretrained(name, dtype=model_args.dtype)
    trainer = DPOTrainer(
        model,
        reference,
        args=training_args,
        train_dataset=read_rows(script_args.dataset_name, script_args.dataset_train_split),
        processing_class=processor,
        # TRL's own tokenises prompt and answer apart, which gives other tokens
        data_collator=TRLCollator(processor, training_args.max_length),
        peft_config=peft_config,
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main(*TrlParser((ScriptArguments, DPOConfig, ModelConfig)).parse_args_and_config())
