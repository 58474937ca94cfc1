"""
Group relative policy optimisation (https://huggingface.co/papers/2402.03300) of Otter, Flamingo or OtterHD with TRL.

    pip install -e ".[trl]"
    accelerate launch examples/trl_grpo.py --model_name_or_path MODEL --dataset_name DATA --output_dir out \\
        --num_generations 8 --max_completion_length 64 --per_device_train_batch_size 8 --learning_rate 1e-6

A row of the dataset has `image`, `prompt` (messages) and `answer`. The reward is 1 for the very answer, and falls with
the share of its characters that are missing.
"""

from difflib import SequenceMatcher

from datasets import load_dataset
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import GRPOConfig, GRPOTrainer, ModelConfig, ScriptArguments, TrlParser, get_peft_config

import otter_hf  # noqa: F401  registers the models with the Auto classes


def likeness(completions: list, answer: list[str], **kwargs) -> list[float]:
    """How much of each true answer its completion, a list of messages, has."""
    said = [messages[0]["content"].strip() for messages in completions]
    return [SequenceMatcher(None, *pair).ratio() for pair in zip(said, answer, strict=True)]


def main(script_args: ScriptArguments, training_args: GRPOConfig, model_args: ModelConfig) -> None:
    """Trains, and leaves model and processor in the output folder."""
    name = model_args.model_name_or_path
    # TRL pads prompts itself, and takes what is padded already for part of them
    training_args.chat_template_kwargs = {"processor_kwargs": {"padding": False}}
    model = AutoModelForImageTextToText.from_pretrained(name, dtype=model_args.dtype)
    trainer = GRPOTrainer(
        model,
        reward_funcs=likeness,
        args=training_args,
        train_dataset=load_dataset(script_args.dataset_name)[script_args.dataset_train_split],
        processing_class=AutoProcessor.from_pretrained(name),
        peft_config=get_peft_config(model_args),
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main(*TrlParser((ScriptArguments, GRPOConfig, ModelConfig)).parse_args_and_config())
