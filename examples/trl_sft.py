"""
Supervised fine-tuning of Otter, Flamingo or OtterHD with TRL (https://huggingface.co/docs/trl).

    pip install -e ".[trl]"
    accelerate launch examples/trl_sft.py --model_name_or_path MODEL --dataset_name DATA --output_dir out \\
        --max_length 1024 --per_device_train_batch_size 4 --learning_rate 1e-5
    accelerate launch examples/trl_sft.py ... --use_peft --lora_target_modules q_proj v_proj

A row of the dataset has `images` (a list), and `prompt` and `completion` (messages), of which completions alone are
learned, or `messages`, of which all answers are.
`otter-hf train` is the way for MIMIC-IT data: it packs, follows the 2023 formats and measures; this is the way to
everything that TRL has.
"""

from datasets import load_dataset
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import ModelConfig, ScriptArguments, SFTConfig, SFTTrainer, TrlParser, get_peft_config

import otter_hf  # noqa: F401  registers the models with the Auto classes
from otter_hf.training.trl_rows import TRLCollator


def main(script_args: ScriptArguments, training_args: SFTConfig, model_args: ModelConfig) -> None:
    """Trains, and leaves model and processor in the output folder."""
    name = model_args.model_name_or_path
    processor = AutoProcessor.from_pretrained(name)
    model = AutoModelForImageTextToText.from_pretrained(name, dtype=model_args.dtype)
    trainer = SFTTrainer(
        model,
        args=training_args,
        train_dataset=load_dataset(script_args.dataset_name)[script_args.dataset_train_split],
        processing_class=processor,
        # TRL's own tokenises prompt and answer apart, which gives other tokens
        data_collator=TRLCollator(processor, training_args.max_length),
        peft_config=get_peft_config(model_args),
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main(*TrlParser((ScriptArguments, SFTConfig, ModelConfig)).parse_args_and_config())
