"""Fuyu-8B and OtterHD-8B as published in 2023 -> a folder of today: names, RoPE base, tokens and processor stated.

The result keeps Fuyu's `model_type` and has its tensor names of 2023, so it loads in plain transformers too.
"""

import re
from pathlib import Path

import numpy as np
from PIL import Image
from transformers import GenerationConfig

from ..models.otterhd import OtterHDConfig, OtterHDForConditionalGeneration, OtterHDProcessor
from ..models.otterhd.processing_otterhd import ANSWER_TOKEN, END_OF_TEXT_TOKEN, IMAGE_NEWLINE_TOKEN, IMAGE_TOKEN
from .job import read_raw_config, resolve_folder, verify_folder, written_folder
from .memory import memory_table
from .model_card import note_on_prompt, prompt_of, render_card, usage
from .plan import TensorSource, plan_model, source_files
from .report import ConversionReport
from .tensors import ConversionError, open_checkpoint


_DECODER = "model.language_model."
_TOKENS = (IMAGE_TOKEN, IMAGE_NEWLINE_TOKEN, END_OF_TEXT_TOKEN, ANSWER_TOKEN)


def convert_fuyu(
    source: str | Path,
    output: str | Path,
    *,
    dtype: str | None = None,
    allow: bool = False,
    verify: bool = False,
    max_shard_size: int = 5 * 10**9,
    push_to_hub: str | None = None,
) -> ConversionReport:
    """
    Write a Fuyu or OtterHD folder of any date as an OtterHD folder.

    The configuration states what the files of 2023 leave to defaults that have changed since (above all the RoPE base
    25000), `generation_config.json` stops at `|ENDOFTEXT|`, the processor is OtterHD's with its chat template.

    Args:
        source: folder or Hub repository, with its tokenizer and processor.
        output: a new or empty folder.
        dtype: of the floating-point tensors, a key of `DTYPES`; None keeps each as it is.
        allow: write the result even if a tensor is unexplained.
        verify: load the result and compare its logits on a random picture with a model assembled from the sources.
        max_shard_size: of a weight file, in bytes.
        push_to_hub: repository to create or update with the folder.

    Raises:
        ConversionError: for another kind of model, an unexplained tensor, or a verification that fails.
    """
    report = ConversionReport("fuyu-to-otterhd")
    folder = resolve_folder(source)
    raw = read_raw_config(folder)
    if raw.get("model_type") != OtterHDConfig.model_type:
        raise ConversionError(f"{folder} has the model type {raw.get('model_type')!r}; expected 'fuyu'.")
    processor = _load_processor(folder)
    config = _load_config(raw, processor, report)
    tensors = plan_model(
        config,
        [TensorSource(str(source), open_checkpoint(folder), _name_of_today, paths=source_files(folder))],
        report,
    )
    report.token_table = {token: processor.tokenizer.convert_tokens_to_ids(token) for token in _TOKENS}
    stored = {_name_of_2023(name): tensor for name, tensor in tensors.items()}
    writing = {"dtype": dtype, "allow": allow, "max_shard_size": max_shard_size, "push_to_hub": push_to_hub}
    with written_folder(report, output, stored, **writing) as new_folder:
        config.dtype = report.dtype
        config.save_pretrained(new_folder)
        end = processor.end_of_text_id
        GenerationConfig(bos_token_id=end, eos_token_id=end, pad_token_id=end).save_pretrained(new_folder)
        processor.save_pretrained(new_folder)
        if verify:
            side = 4 * config.patch_size
            picture = Image.fromarray(np.random.default_rng(0).integers(256, size=(side, side, 3), dtype=np.uint8))
            inputs = processor(text="User: What is this? Assistant:", images=picture)
            report.verification = verify_folder(new_folder, config, inputs, tensors, dtype)
        (new_folder / "README.md").write_text(_card(config, report, str(source)), encoding="utf-8")
    return report


def _name_of_today(name: str) -> str:
    """A name of either Hub revision of 2023, or as transformers 5 saves it -> that of the module's parameter."""
    name = re.sub(r"^(language_model\.)?(?=lm_head\.)", "", name)
    name = re.sub(r"^(model\.|language_model\.)*(?=(embed_tokens|layers|final_layernorm)\.)", _DECODER, name)
    return re.sub(r"^(?=vision_embed_tokens\.)", "model.", name)


def _name_of_2023(name: str) -> str:
    """The name that every reader of Fuyu knows, from transformers 4.35 on."""
    name = re.sub(r"^(?=lm_head\.)", "language_model.", name)
    return name.replace(_DECODER, "language_model.model.").removeprefix("model.")


def _load_processor(folder: Path) -> OtterHDProcessor:
    try:
        return OtterHDProcessor.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ConversionError(f"The tokenizer or image processor in {folder} cannot be read: {error}") from error


def _load_config(raw: dict, processor: OtterHDProcessor, report: ConversionReport) -> OtterHDConfig:
    config = OtterHDConfig.from_dict(raw)
    theta = config.text_config.rope_parameters["rope_theta"]
    stated = (raw.get("text_config") or {}).get("rope_parameters") or raw.get("text_config") or {}
    if "rope_theta" not in stated:
        report.notes.append(f"RoPE base {theta:g} is now stated in text_config, where the source had none")
    if config.image_token_id != processor.image_token_id:
        report.notes.append(f"image_token_id is {processor.image_token_id}, the id of {IMAGE_TOKEN} in the tokenizer")
    config.image_token_id = processor.image_token_id
    config.bos_token_id = config.eos_token_id = processor.end_of_text_id
    config.text_config.bos_token_id = config.text_config.eos_token_id = processor.end_of_text_id
    if len(processor.tokenizer) < config.text_config.vocab_size:
        config.tokenizer_vocab_size = len(processor.tokenizer)
    config.architectures = [OtterHDForConditionalGeneration.__name__]
    return config


def _card(config: OtterHDConfig, report: ConversionReport, source: str) -> str:
    return render_card(
        name="OtterHD, converted with otter-hf",
        summary="Written by `otter-hf convert fuyu-to-otterhd`. What became of every source tensor is in "
        "`conversion_report.json`.",
        metadata={"library_name": "otter-hf", "pipeline_tag": "image-text-to-text", "tags": ["otterhd", "fuyu"]},
        lineage=[f"`{source}`"],
        prompt=prompt_of("otterhd"),
        tokens=report.token_table,
        licences={"all": "those of the source; the weights of Fuyu-8B are CC-BY-NC-4.0"},
        memory=memory_table(config),
        commands=usage("PATH"),
        notes=[*note_on_prompt("otterhd"), *report.notes],
    )
