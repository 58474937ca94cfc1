"""Fine-tuning from end to end: arguments in, a trained model and processor in the output folder."""

import copy
import importlib.util
import logging
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import torch
from transformers import (
    EarlyStoppingCallback,
    IdeficsProcessor,
    PreTrainedModel,
    TrainerState,
    set_seed,
)
from transformers.trainer import TRAINER_STATE_NAME

from ..data.collator import OtterCollator
from ..data.collator_flamingo import FlamingoCollator
from ..data.collator_idefics import IdeficsCollator, idefics_loss, prepare_idefics_tokenizer
from ..data.collator_otterhd import OtterHDCollator
from ..data.controls import CONTROLS
from ..data.mixture import MimicitMixture
from ..data.samples import VIDEO_TEXT, Sample, SampleOptions
from ..errors import ending_in_a_sentence
from ..extras import missing
from ..loading import read_config, read_model, read_processor
from ..models.flamingo import FlamingoProcessor
from ..models.generation import stop_generation_at
from ..models.otter import OtterProcessor
from ..models.otterhd import OtterHDProcessor
from ..models.quantization import quantization_config
from ..prompts import IMAGE_TOKEN, chat_template, get_format
from .arguments import DataArguments, ModelArguments, TrainingArguments, call
from .checkpoints import STOPPED_EXIT_CODE, claim_output, resume
from .features import store_media
from .freezing import freeze, train_only_rows
from .kernels import can_pack, choose_attention, use_liger_kernels
from .limits import check_metrics, check_numbers, check_sharding
from .lora import add_lora
from .metrics import answer_accuracy, most_likely_tokens
from .optimizer import check_precision
from .outlook import outlook
from .plan import make_plan, meta_model, sharding_of
from .publish import given_arguments
from .report import REPORT_FILE, TrainingReport, plot_history, sample_evenly
from .run_record import RunRecord
from .text_states import TextStateCache
from .trainer import OtterTrainer
from .vocabulary import check_vocabulary, ids_of_tokens, tell_positions


logger = logging.getLogger(__name__)

# model type -> instruction format, of others than Otter and Flamingo
_FORMATS = {"fuyu": "fuyu", "idefics": "idefics"}


def main(argv: Sequence[str] | None = None, *, transform: Callable[[Sample, Random], Sample] | None = None) -> None:
    """
    `run` for scripts: bad input ends the process with its one sentence on stderr and status 2, without a traceback.
    """
    with ending_in_a_sentence():
        run(argv, transform=transform)


def run(argv: Sequence[str] | None = None, *, transform: Callable[[Sample, Random], Sample] | None = None) -> None:
    """
    Fine-tunes with the arguments `[recipe.yaml] [--flag value ...]`, by default those of the process.

    Args:
        argv: the arguments, see `parse_arguments`.
        transform: see `train`.

    Raises:
        ValueError: one sentence on the argument, file or sample which is wrong.
    """
    call(train, argv, (ModelArguments, DataArguments, TrainingArguments), transform=transform)


def train(
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: TrainingArguments,
    *,
    transform: Callable[[Sample, Random], Sample] | None = None,
) -> OtterTrainer | None:
    """
    Fine-tunes, and leaves model, processor, `trainer_state.json`, `training_report.html` and the curves `training.png`
    in the output folder. SIGTERM ends it early with a checkpoint and the exit code `STOPPED_EXIT_CODE`.

    Args:
        transform: `(sample, generator) -> sample`, applied to training samples before they are tokenised: augmentation
            of their images, another order of their turns. See `MimicitMixture`.

    Returns:
        The trainer, with its `model` and `state`; None after a `dry_run`, which ends with the plan, and where a run
        that is gone on with is complete.
    """
    check_numbers(model_args, data_args, training_args)
    set_seed(training_args.seed)
    config = read_config(model_args.model_name_or_path, model_args.tokenizer)
    given = {**given_arguments(model_args), **given_arguments(data_args)}
    data_args = _fit(data_args, config)
    _check(model_args, data_args, training_args, config)
    attention = choose_attention(config, model_args, data_args, training_args)
    processor = read_processor(model_args.model_name_or_path, model_args.tokenizer, model_args.tokenizer_reference)
    check_vocabulary(processor.tokenizer, config)
    frames = data_args.num_frames or getattr(processor, "num_frames", None) or SampleOptions.num_frames
    data_args = replace(data_args, num_frames=frames)
    collator = _make_collator(processor, data_args)
    train_dataset = _load_mixture(data_args.train_mixture, data_args, training_args, processor, transform)
    logger.info(train_dataset.summary())
    eval_dataset = None
    if data_args.eval_mixture is not None or data_args.eval_fraction:
        path = data_args.eval_mixture or data_args.train_mixture
        eval_dataset = _load_mixture(path, data_args, training_args, processor, held_out=True)
    for dataset in (train_dataset, eval_dataset):
        _check_frames(config, dataset)
    _tell(config, data_args, train_dataset, eval_dataset)
    frames_of_films = _carry_frames(processor, data_args, train_dataset)
    shapes = meta_model(model_args, config, attention, autocast=training_args.bf16 or training_args.fp16)
    frames = train_dataset.most_frames()
    plan = make_plan(shapes, model_args, data_args, training_args, num_samples=len(train_dataset), frames=frames)
    logger.info(str(plan))
    if training_args.plan_device or plan.world_size != training_args.world_size:
        logger.info(outlook(plan, shapes, model_args, data_args, training_args, frames=frames))
    if not model_args.load_in_4bit:
        check_precision(shapes, training_args.fp16, plan.sharding)
    if training_args.dry_run:
        return None

    _check_sizes(train_dataset, eval_dataset, training_args)
    record = RunRecord.of(
        model_args,
        data_args,
        training_args,
        data=train_dataset.digest(),
        samples_per_step=plan.samples_per_step,
        steps=plan.steps,
    )
    with claim_output(training_args):
        record, checkpoint, is_complete = resume(record, training_args)
        if is_complete:
            return None
        # last, because it takes longest: a mistake in the data shows before
        model = _load_model(model_args, data_args, training_args, processor, config, attention)
        if model.dtype != shapes.dtype and not model_args.load_in_4bit:  # a config.json need not say it
            check_precision(model, training_args.fp16, plan.sharding)
        trainer = OtterTrainer(
            model=model,
            args=training_args,
            data_collator=collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processor,
            compute_loss_func=idefics_loss if config.model_type == "idefics" else None,
            compute_metrics=answer_accuracy,
            preprocess_logits_for_metrics=most_likely_tokens,
            flops=plan.flops,
            recipe=given,
            run=record,
        )
        samples = sample_evenly(eval_dataset, training_args.report_samples)
        controls = CONTROLS if training_args.report_controls else ()
        trainer.add_callback(
            TrainingReport(trainer, samples, settings=trainer.settings(), plan=str(plan), controls=controls)
        )
        if training_args.early_stopping_patience is not None:
            trainer.add_callback(_early_stopping(training_args, checkpoint))
        trainer.train(resume_from_checkpoint=checkpoint)
        for name, dataset in (("training", train_dataset), ("evaluation", eval_dataset)):
            if dataset is not None and dataset.skipped:
                logger.warning(f"Left out in {name}: {dataset.skipped}.")
        if trainer.stopped:
            raise SystemExit(STOPPED_EXIT_CODE)
        trainer.save_model(_internal_call=True)
        if trainer.is_world_process_zero():
            trainer.save_state()  # behind the model: it says that the run is complete
            _plot(trainer.state.log_history, Path(training_args.output_dir) / "training.png")
        if training_args.push_to_hub:
            trainer.push_to_hub()
        if trainer.is_world_process_zero():
            logger.info(_farewell(model_args, training_args, frames_of_films))
        return trainer


def _early_stopping(training_args: TrainingArguments, checkpoint: str | None) -> EarlyStoppingCallback:
    """Counts on from a checkpoint, where transformers' Trainer would begin again."""
    callback = EarlyStoppingCallback(training_args.early_stopping_patience, training_args.early_stopping_threshold)
    if checkpoint is not None:
        callbacks = TrainerState.load_from_json(str(Path(checkpoint, TRAINER_STATE_NAME))).stateful_callbacks
        counted = callbacks.get(EarlyStoppingCallback.__name__, {}).get("attributes", {})
        callback.early_stopping_patience_counter = counted.get("early_stopping_patience_counter", 0)
    return callback


def _farewell(model_args: ModelArguments, training_args: TrainingArguments, frames: int | None = None) -> str:
    """Where everything is, and what to type next; films are asked about with the `frames` they were trained with."""
    folder = Path(training_args.output_dir)
    medium = "--image PICTURE" if frames is None else f"--video FILM --num-frames {frames}"
    chat = f"otter-hf chat {shlex.quote(str(folder))} {medium}"
    if model_args.lora:
        saved, following = "adapter and processor", chat
    elif training_args.trainable_only:
        saved = "trained weights and processor"
        following = f"otter_hf.training.load_trainable({str(folder)!r}) in Python"
    else:
        saved, following = "model and processor", chat
    return f"saved: {saved} in {folder}\nreport: {folder / REPORT_FILE}\nnext: {following}"


def _fit(data_args: DataArguments, config) -> DataArguments:
    """What was left to the family of the model: format and packing."""
    format = data_args.instruction_format or _FORMATS.get(config.model_type, "simple")
    packing = can_pack(config) if data_args.packing is None else data_args.packing
    return replace(data_args, instruction_format=format, packing=packing)


def _check(model_args: ModelArguments, data_args: DataArguments, training_args: TrainingArguments, config) -> None:
    """Refuses, before anything is loaded, what does not go together."""
    check_metrics(training_args)
    evaluates = training_args.eval_strategy != "no"
    given = (
        "eval_mixture" if data_args.eval_mixture is not None else "eval_fraction" if data_args.eval_fraction else ""
    )
    if evaluates and not given:
        strategy = training_args.eval_strategy.value
        raise ValueError(f"eval_strategy is {strategy!r}: name an eval_mixture or eval_fraction, or set it to no.")
    if given and not evaluates:
        logger.warning(f"{given} will not be evaluated: set eval_strategy to epoch or steps for that.")
    if training_args.report_controls and not (evaluates and training_args.report_samples):
        raise ValueError(
            "report_controls asks the samples that are answered at evaluations, of which there are none: set "
            "eval_strategy to epoch or steps and report_samples above 0, or leave it out."
        )
    check_sharding(model_args, training_args, sharding_of(training_args))
    for name in ("media_store", "cache_text_states"):
        if getattr(model_args, name) and not hasattr(config, "perceiver_num_latents"):
            raise ValueError(f"{name} is for Otter and Flamingo, not {config.model_type}: leave it out.")
    if model_args.cache_text_states and (data_args.packing or model_args.lora):
        raise ValueError("cache_text_states tells rows apart, which packing and lora do not leave: set them to false.")
    if config.model_type == "idefics":
        if model_args.train_embedding_rows:
            raise ValueError("train_embedding_rows is for Otter, Flamingo and OtterHD, not Idefics: leave it out.")
        if "lm_head" in model_args.lora_target_modules:
            raise ValueError(
                "lora_target_modules: the lm_head of Idefics keeps the rows of added tokens apart and takes no "
                "updates: take lm_head out."
            )
    if data_args.packing and not can_pack(config):
        name = "Idefics" if config.model_type == "idefics" else "OPT"
        raise ValueError(
            f"packing needs a model that is told where samples begin, which {name} is not: set it to false."
        )


def _check_frames(config, dataset: MimicitMixture | None) -> None:
    """More frames than the model has embeddings would end the training at the first sample that has them."""
    limit = getattr(config, "max_num_frames", None)
    if dataset is not None and limit is not None and (most := dataset.longest_medium()) > limit:
        raise ValueError(
            f"The mixture has {most} frames in a medium, and the model embeddings for {limit} (max_num_frames): set "
            "num_frames lower, and put records of many images into VIDEO_TEXT, or give them images_as: media."
        )


def _tell(config, data_args: DataArguments, train_dataset, eval_dataset) -> None:
    """Warns of what trains, or measures, something else than it seems."""
    tell_positions(data_args.max_length, config)
    if getattr(config, "max_num_frames", 0) is None and VIDEO_TEXT in train_dataset.task_groups:
        logger.warning(
            "The model has no frame embeddings (max_num_frames): it sees the frames of a film, but not their order."
        )
    if not data_args.use_task_description and any(entry.task_description for entry in train_dataset.entries):
        logger.warning("The mixture has task_description, which nothing reads without use_task_description.")
    if eval_dataset is not None and not data_args.eval_fraction and eval_dataset.digest() == train_dataset.digest():
        logger.warning("eval_mixture is what is trained on: its loss says nothing about other data.")


def _carry_frames(processor, data_args: DataArguments, dataset: MimicitMixture) -> int | None:
    """Has the processor, which is saved, say how many frames of a film are trained on: these, None without films."""
    if not dataset.shows_films():
        return None
    processor.num_frames = data_args.num_frames
    return data_args.num_frames


def _check_sizes(train_dataset, eval_dataset, training_args: TrainingArguments) -> None:
    """Nothing to train on or to measure is a mistake, not a run of no steps."""
    for name, dataset in (("train_mixture", train_dataset), ("eval_mixture", eval_dataset)):
        if dataset is not None and len(dataset) == 0:
            raise ValueError(f"{name} has no samples: look at its files and num_samples.")
    batch = training_args.per_device_train_batch_size * training_args.world_size
    if training_args.dataloader_drop_last and len(train_dataset) < batch:
        raise ValueError(
            f"dataloader_drop_last leaves out a last batch that is not full, and the {len(train_dataset)} samples are "
            f"fewer than the {batch} of one: set it to false, or lower per_device_train_batch_size."
        )


def _load_model(
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: TrainingArguments,
    processor,
    config,
    attention: str | dict[str, str] | None,
) -> PreTrainedModel:
    """The model, ready to be trained: what is frozen is frozen, adapters are in place."""
    if training_args.use_liger_kernel:
        use_liger_kernels(config, training_args.liger_kernel_config)
    model = read_model(
        model_args.model_name_or_path,
        model_args.tokenizer,
        dtype=model_args.dtype,
        attn_implementation=attention,
        quantization_config=quantization_config() if model_args.load_in_4bit else None,
    )
    end = "" if data_args.remove_end_of_turn_token else get_format(data_args.instruction_format).end
    end = end or processor.tokenizer.eos_token
    stop_generation_at(model, processor.tokenizer.convert_tokens_to_ids(end))
    rows = ids_of_tokens(model_args.train_embedding_rows, processor.tokenizer)
    if model_args.lora:
        model = add_lora(model, model_args, training_args, rows)
    else:
        freeze(model, model_args.freeze)
        if rows:
            train_only_rows(model, rows)
    if model_args.media_store:
        autocast = torch.bfloat16 if training_args.bf16 else torch.float16 if training_args.fp16 else None
        core = model.get_base_model() if model_args.lora else model
        store_media(core.model, model_args.media_store, int(model_args.media_store_gb * 10**9), autocast)
    if model_args.cache_text_states:
        TextStateCache(model)
    return model


@dataclass
class _DrawResolution:
    """OtterHD's dynamic resolution, drawn like all else about a sample: the same after a restart, in any worker."""

    sides: list[int]
    transform: Callable[[Sample, Random], Sample] | None

    def __call__(self, sample: Sample, generator: Random) -> Sample:
        if self.transform is not None:
            sample = self.transform(sample, generator)
        return {**sample, "resolution": generator.choice(self.sides)}


def _make_collator(processor, data_args: DataArguments) -> OtterCollator | OtterHDCollator | IdeficsCollator:
    """The collator for a processor, whose chat template becomes the form of the training text."""
    if isinstance(processor, OtterHDProcessor):
        for name in ("remove_answer_token", "remove_end_of_turn_token"):
            if getattr(data_args, name):
                raise ValueError(f"{name} is for Otter: OtterHD's format needs its tokens, leave it out.")
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
            packing=data_args.packing,
        )
    if data_args.remove_answer_token and not isinstance(processor, OtterProcessor):
        raise ValueError(
            f"remove_answer_token is for Otter: a {type(processor).__name__} has no <answer>, leave it out."
        )
    for name in ("resolution", "dynamic_resolution", "max_pixels"):
        if getattr(data_args, name):
            raise ValueError(f"{name} is for OtterHD: {type(processor).__name__} has one resolution, leave it out.")
    if isinstance(processor, IdeficsProcessor):
        return _idefics_collator(processor, data_args)
    if not isinstance(processor, (OtterProcessor, FlamingoProcessor)):
        raise ValueError(
            f"model_name_or_path has a {type(processor).__name__}, Otter, Flamingo, OtterHD and Idefics are trained: "
            "hand a collator of your own to transformers' Trainer."
        )
    options = {
        "format": data_args.instruction_format,
        "max_length": data_args.max_length,
        "on_overlong": data_args.on_overlong,
        "packing": data_args.packing,
        "remove_end_of_turn_token": data_args.remove_end_of_turn_token,
    }
    if isinstance(processor, OtterProcessor):
        collator = OtterCollator(processor, remove_answer_token=data_args.remove_answer_token, **options)
    else:
        collator = FlamingoCollator(processor, **options)
    # the saved model shall be asked in the form it was trained on
    processor.chat_template = chat_template(
        data_args.instruction_format,
        processor.reserved_tokens,
        removed_tokens=collator.removed_tokens,
        answer_lead=collator.answer_lead if isinstance(collator, FlamingoCollator) else None,
        bos=collator.adds_bos,
    )
    return collator


def _idefics_collator(processor, data_args: DataArguments) -> IdeficsCollator:
    if data_args.instruction_format != "idefics":
        raise ValueError(
            f"instruction_format is {data_args.instruction_format!r}, which Idefics does not know: set it to idefics."
        )
    vocabulary = processor.tokenizer.get_vocab()
    for token in (IMAGE_TOKEN, "<fake_token_around_image>", get_format("idefics").end):
        if token not in vocabulary:
            raise ValueError(
                f"The tokenizer lacks {token}: train an Idefics that has it, such as idefics-9b-instruct."
            )
    return IdeficsCollator(
        # <answer> only tells what is learned, the model has no row for it
        prepare_idefics_tokenizer(copy.deepcopy(processor.tokenizer)),
        processor.image_processor,
        max_length=data_args.max_length,
        on_overlong=data_args.on_overlong,
        remove_answer_token=True,
        remove_end_of_turn_token=data_args.remove_end_of_turn_token,
    )


def _side_of(processor) -> int | None:
    """What the shorter side of a picture is resized to; None where that depends on the picture."""
    size = getattr(processor.image_processor, "size", None)
    if isinstance(processor, OtterHDProcessor) or size is None:
        return None
    size = dict(size)
    return size.get("shortest_edge") or max(size.get("height") or 0, size.get("width") or 0) or None


def _load_mixture(
    path,
    data_args: DataArguments,
    training_args: TrainingArguments,
    processor,
    transform=None,
    *,
    held_out: bool = False,
) -> MimicitMixture:
    options = SampleOptions(
        num_frames=data_args.num_frames,
        max_context=data_args.max_context,
        keep_symbols=data_args.keep_symbols,
        use_task_description=data_args.use_task_description,
        legacy_pictures=data_args.legacy_pictures,
        max_image_pixels=data_args.max_image_pixels,
        frame_side=_side_of(processor),
    )
    if data_args.dynamic_resolution:
        transform = _DrawResolution(data_args.dynamic_resolution, transform)
    # one process converts the files to the memory-mapped form; the others wait for it at the lock of the cache, which
    # takes as long as it takes, not at a barrier, which ends them after `ddp_timeout`
    return MimicitMixture(
        path,
        options,
        populate_rel_ins=data_args.populate_rel_ins,
        on_error=data_args.on_error,
        seed=training_args.seed,
        transform=transform,
        eval_fraction=data_args.eval_fraction,
        held_out=held_out and data_args.eval_fraction > 0,
    )


def _plot(log_history: list[dict], path: Path) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        logger.info(f"No curves were drawn: {missing('that', 'plots')}")
    else:
        plot_history(log_history, path)
