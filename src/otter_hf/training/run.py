"""Fine-tuning from end to end: arguments in, a trained model and processor in the output folder."""

import importlib.util
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, set_seed

from ..data.collator import OtterCollator
from ..data.collator_otterhd import OtterHDCollator
from ..data.mixture import MimicitMixture
from ..data.prompts import chat_template, get_format
from ..data.samples import Sample, SampleOptions
from ..models.otterhd import OtterHDProcessor
from .arguments import DataArguments, ModelArguments, TrainingArguments, parse_arguments
from .freezing import freeze, parameter_table
from .lora import add_lora, quantization_config
from .metrics import answer_accuracy, most_likely_tokens
from .report import plot_history
from .trainer import OtterTrainer


logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None, *, transform: Callable[[Sample, Random], Sample] | None = None) -> None:
    """
    Fine-tunes with the arguments `[recipe.yaml] [--flag value ...]`, by default those of the process.

    Args:
        argv: the arguments, see `parse_arguments`.
        transform: see `train`.

    Raises:
        ValueError: one sentence on the argument, file or sample which is wrong.
    """
    logging.basicConfig(format="%(message)s")
    logging.getLogger("otter_hf").setLevel(logging.INFO)
    train(*parse_arguments(sys.argv[1:] if argv is None else argv), transform=transform)


def train(
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: TrainingArguments,
    *,
    transform: Callable[[Sample, Random], Sample] | None = None,
) -> OtterTrainer:
    """
    Fine-tunes, and leaves model, processor, `trainer_state.json` and the curves `training.png` in the output folder.

    Args:
        transform: `(sample, generator) -> sample`, applied to training samples before they are tokenised: augmentation
            of their images, another order of their turns. See `MimicitMixture`.

    Returns:
        The trainer, with its `model` and `state`.
    """
    set_seed(training_args.seed)
    processor = AutoProcessor.from_pretrained(model_args.model_name_or_path)
    collator = _make_collator(processor, data_args)
    train_dataset = _load_mixture(data_args.train_mixture, data_args, training_args, transform)
    logger.info(train_dataset.summary())
    eval_dataset = None
    if data_args.eval_mixture is not None:
        eval_dataset = _load_mixture(data_args.eval_mixture, data_args, training_args)

    # last, because it takes longest: a mistake in the data shows before
    model = AutoModelForImageTextToText.from_pretrained(
        model_args.model_name_or_path,
        dtype=model_args.dtype,
        attn_implementation=model_args.attn_implementation,
        quantization_config=quantization_config() if model_args.load_in_4bit else None,
    )
    end = get_format(data_args.instruction_format).end or processor.tokenizer.eos_token
    _stop_generation_at(model, processor.tokenizer.convert_tokens_to_ids(end))
    if model_args.lora:
        model = add_lora(model, model_args, training_args)
        logger.info("LoRA: {:,} of {:,} parameters are trained".format(*model.get_nb_trainable_parameters()))
    else:
        freeze(model, model_args.freeze)
        logger.info(parameter_table(model))

    trainer = OtterTrainer(
        model=model,
        args=training_args,
        data_collator=collator,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=processor,
        compute_metrics=answer_accuracy,
        preprocess_logits_for_metrics=most_likely_tokens,
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    if trainer.is_world_process_zero():
        trainer.save_state()
        _plot(trainer.state.log_history, Path(training_args.output_dir) / "training.png")
    return trainer


def _make_collator(processor, data_args: DataArguments) -> OtterCollator | OtterHDCollator:
    """The collator for a processor, whose chat template becomes the form of the training text."""
    if isinstance(processor, OtterHDProcessor):
        if data_args.instruction_format != "fuyu":
            raise ValueError(
                f"instruction_format is {data_args.instruction_format!r}, which OtterHD does not know: set it to fuyu."
            )
        return OtterHDCollator(
            processor,
            resolution=data_args.resolution,
            dynamic_resolution=data_args.dynamic_resolution or None,
            max_pixels=data_args.max_pixels,
            max_length=data_args.max_length,
            on_overlong=data_args.on_overlong,
        )
    for name in ("resolution", "dynamic_resolution", "max_pixels"):
        if getattr(data_args, name):
            raise ValueError(f"{name} is for OtterHD: {type(processor).__name__} has one resolution, leave it out.")
    # the saved model shall be asked in the form it was trained on
    processor.chat_template = chat_template(data_args.instruction_format)
    return OtterCollator(
        processor,
        format=data_args.instruction_format,
        max_length=data_args.max_length,
        on_overlong=data_args.on_overlong,
    )


def _load_mixture(path, data_args: DataArguments, training_args: TrainingArguments, transform=None) -> MimicitMixture:
    options = SampleOptions(
        num_frames=data_args.num_frames,
        max_context=data_args.max_context,
        keep_symbols=data_args.keep_symbols,
        use_task_description=data_args.use_task_description,
    )
    # one process converts the files to the memory-mapped form, the others find it in the cache
    with training_args.main_process_first(desc=f"reading {path}"):
        return MimicitMixture(
            path,
            options,
            populate_rel_ins=data_args.populate_rel_ins,
            on_error=data_args.on_error,
            seed=training_args.seed,
            transform=transform,
        )


def _stop_generation_at(model: PreTrainedModel, token_id: int) -> None:
    """The token that ends answers in training also ends generation with the saved model."""
    for config in (model.config, model.generation_config):
        known = config.eos_token_id
        known = [] if known is None else known if isinstance(known, list) else [known]
        config.eos_token_id = [*known, *({token_id} - {*known})]


def _plot(log_history: list[dict], path: Path) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        logger.info("No curves were drawn: install matplotlib for that.")
    else:
        plot_history(log_history, path)
