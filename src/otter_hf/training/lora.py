"""LoRA (https://huggingface.co/papers/2106.09685): low-rank updates of some linear layers are trained, nothing else.

With frozen weights in 4 bits this is QLoRA (https://huggingface.co/papers/2305.14314); with the lengths of the weights
trained apart from their directions, DoRA (https://huggingface.co/papers/2402.09353).
"""

import re
from collections.abc import Sequence

from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from .arguments import ModelArguments, TrainingArguments
from .fields import ALL_LINEAR, PARTS
from .freezing import group_of, parameter_groups


def add_lora(
    model: PreTrainedModel, model_args: ModelArguments, training_args: TrainingArguments, rows: Sequence[int] = ()
) -> PeftModel:
    """
    The model with low-rank updates, of which alone, and of `lora_train_groups`, the parameters are trained and saved.

    `lora_target_modules` are names of linear layers of the decoder, `lm_head`, or `PART:all-linear` for all of a part.
    The vision tower and the gated blocks have layers of the same names, which are left alone.

    Args:
        rows: of the input embedding (and of an output layer tied to it), trained too.

    Raises:
        ValueError: when no layer of the decoder has one of these names.
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
    return with_updates(model, model_args, rows, autocast=training_args.bf16 or training_args.fp16)


def with_updates(
    model: PreTrainedModel, model_args: ModelArguments, rows: Sequence[int] = (), *, autocast: bool = False
) -> PeftModel:
    """PEFT's model. With autocast all that is trained is float32: in 16 bits, small steps would be lost."""
    model = get_peft_model(model, lora_config(model_args, rows, model))
    refuse_tied_head(model)
    if autocast:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    return model


def refuse_tied_head(model: PreTrainedModel | PeftModel) -> None:
    """
    Raises ValueError for updates of an output layer that is tied to the input embedding.

    PEFT 0.21 merges them into both, with `ensure_weight_tying` twice: the merged model is another one.
    """
    head = model.get_output_embeddings()
    if isinstance(head, LoraLayer) and model.config.tie_word_embeddings:
        raise ValueError(
            "The updates are of lm_head, which this model shares with its input embedding, and cannot be merged: take "
            "lm_head out of lora_target_modules; train_embedding_rows trains single tokens."
        )


def lora_config(
    model_args: ModelArguments, rows: Sequence[int] = (), model: PreTrainedModel | None = None
) -> LoraConfig:
    """PEFT's configuration of the updates; for `rows` see `add_lora`. `PART:all-linear` needs the model."""
    return LoraConfig(
        r=model_args.lora_r,
        lora_alpha=model_args.lora_alpha,
        lora_dropout=model_args.lora_dropout,
        use_dora=model_args.lora_dora,
        target_modules=_target_pattern(model_args.lora_target_modules, model),
        trainable_token_indices=[*rows] or None,
        modules_to_save=[name for group in model_args.lora_train_groups for name in _modules_of(group, model)] or None,
    )


def _modules_of(group: str, model: PreTrainedModel | None) -> list[str]:
    """What the names of the modules of a group end with."""
    if model is not None and not parameter_groups(model)[group]:
        raise ValueError(f"lora_train_groups: this model has no {group}; take it out.")
    if model is not None and model.config.model_type == "idefics":
        blocks = range(len(model.model.gated_cross_attn_layers))
        return ["perceiver_resampler"] if group == "perceiver" else [f"gated_cross_attn_layers.{i}" for i in blocks]
    return ["perceiver"] if group == "perceiver" else ["gated_cross_attn_layer"]


def _target_pattern(names: list[str], model: PreTrainedModel | None) -> str:
    patterns = ["lm_head"] if "lm_head" in names else []
    patterns += [_all_linear(name.removesuffix(ALL_LINEAR), model) for name in names if name.endswith(ALL_LINEAR)]
    inside = "|".join(re.escape(name) for name in names if name != "lm_head" and not name.endswith(ALL_LINEAR))
    if inside:
        patterns.append(rf"model\.(?:language_model|layers)\.(?!.*gated_cross_attn_layer).*\.(?:{inside})")
    return "|".join(patterns)


def _all_linear(part: str, model: PreTrainedModel) -> str:
    """A pattern of the linear layers of a part, for all blocks at once where that matches no other layer."""
    embeddings = {id(parameter) for parameter in parameter_groups(model)["embeddings"]}
    layers, others = [], []
    for name, module in model.named_modules():
        is_one = isinstance(module, nn.Linear) and id(module.weight) not in embeddings
        is_one = is_one and group_of(f"{name}.") == PARTS[part]
        (layers if is_one else others).append(name)
    names = set()
    for name in layers:
        of_all_blocks = re.sub(r"\d+", r"\\d+", re.escape(name))
        if of_all_blocks not in names:
            unique = not any(re.fullmatch(of_all_blocks, other) for other in others)
            names.add(of_all_blocks if unique else re.escape(name))
    if not names:
        raise ValueError(
            f"lora_target_modules: this model has no linear layers in {part}; take {part}:all-linear out."
        )
    return "|".join(sorted(names))
