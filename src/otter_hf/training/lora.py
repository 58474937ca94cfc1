"""LoRA (https://huggingface.co/papers/2106.09685): low-rank updates of some linear layers are trained, nothing else.

With frozen weights in 4 bits this is QLoRA (https://huggingface.co/papers/2305.14314).
"""

import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.utils import is_bitsandbytes_available

from .arguments import ModelArguments, TrainingArguments


def quantization_config() -> BitsAndBytesConfig:
    """
    QLoRA's storage of the frozen weights: 4-bit NormalFloat with quantised scales, computed in bfloat16.

    Raises:
        ValueError: where bitsandbytes is not installed.
    """
    if not is_bitsandbytes_available():
        raise ValueError("load_in_4bit needs bitsandbytes: install it, or leave load_in_4bit out.")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def add_lora(model: PreTrainedModel, model_args: ModelArguments, training_args: TrainingArguments) -> PeftModel:
    """
    The model with low-rank updates at `lora_target_modules`, of which alone the parameters are trained and saved.

    Raises:
        ValueError: when no layer of the model has one of these names.
    """
    if model_args.load_in_4bit:
        model = prepare_model_for_kbit_training(
            model,
            use_gradient_checkpointing=training_args.activation_checkpointing,
            gradient_checkpointing_kwargs=training_args.activation_checkpointing_kwargs,
        )
    elif training_args.activation_checkpointing:
        # otherwise nothing that enters a checkpointed layer needs a gradient, and the layer would be left out
        model.enable_input_require_grads()
    config = LoraConfig(
        r=model_args.lora_r,
        lora_alpha=model_args.lora_alpha,
        lora_dropout=model_args.lora_dropout,
        target_modules=model_args.lora_target_modules,
    )
    return get_peft_model(model, config)
