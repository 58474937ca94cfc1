"""
Supervised fine-tuning of Otter, Flamingo or OtterHD with TRL (https://huggingface.co/docs/trl).

    pip install "otter-hf[trl]"
    accelerate launch examples/trl_sft.py --model_name_or_path MODEL --dataset_name DATA --output_dir out \\
        --max_length 1024 --per_device_train_batch_size 4 --learning_rate 1e-5
    accelerate launch examples/trl_sft.py ... --use_peft --lora_target_modules q_proj v_proj

A row of the dataset has `images` (a list), `prompt` and `completion` (messages); completions alone are learned.
`otter-hf train` is the way for MIMIC-IT data: it packs, follows the 2023 formats and measures; this is the way to
everything that TRL has.
"""

from datasets import load_dataset
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import ModelConfig, ScriptArguments, SFTConfig, SFTTrainer, TrlParser, get_peft_config

import otter_hf  # registers the models with the Auto classes


def main(script_args: ScriptArguments, training_args: SFTConfig, model_args: ModelConfig) -> None:
    """Trains, and leaves model and processor in the output folder."""
    name = model_args.model_name_or_path
    processor = AutoProcessor.from_pretrained(name)
    # TRL tokenises without special tokens, so the template writes the one in front; OtterHD's comes with the image
    if processor.tokenizer.bos_token and not isinstance(processor, otter_hf.OtterHDProcessor):
        processor.chat_template = "{{ bos_token }}" + processor.chat_template.removeprefix("{{ bos_token }}")
    model = AutoModelForImageTextToText.from_pretrained(name, dtype=model_args.dtype)
    trainer = SFTTrainer(
        model,
        args=training_args,
        train_dataset=load_dataset(script_args.dataset_name)[script_args.dataset_train_split],
        processing_class=processor,
        peft_config=get_peft_config(model_args),
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main(*TrlParser((ScriptArguments, SFTConfig, ModelConfig)).parse_args_and_config())
