"""Fuyu-8B and OtterHD-8B as published in 2023 -> a folder of today: names, RoPE base, tokens and processor stated.

The result keeps Fuyu's `model_type` and has its tensor names of 2023, so it loads in plain transformers too.
"""

import re
from pathlib import Path

import numpy as np
from PIL import Image
from transformers import BatchFeature, GenerationConfig

from ..models.otterhd import OtterHDConfig, OtterHDProcessor
from ..models.otterhd.processing_otterhd import ANSWER_TOKEN, END_OF_TEXT_TOKEN, IMAGE_NEWLINE_TOKEN, IMAGE_TOKEN
from .job import Job, finish, read_raw_config, resolve_folder
from .plan import TensorSource, plan_model, source_files
from .report import ConversionReport
from .tensors import ConversionError, LazyTensor, open_checkpoint


_DECODER = "model.language_model."
_TOKENS = (IMAGE_TOKEN, IMAGE_NEWLINE_TOKEN, END_OF_TEXT_TOKEN, ANSWER_TOKEN)


class FuyuJob(Job):
    """The conversion of a Fuyu or OtterHD; its files have the names of 2023."""

    def stored(self) -> dict[str, LazyTensor]:
        return {_name_of_2023(name): tensor for name, tensor in self.tensors.items()}

    def token_table(self) -> dict[str, int]:
        return {token: self.processor.tokenizer.convert_tokens_to_ids(token) for token in _TOKENS}

    def generation_config(self) -> GenerationConfig:
        end = self.processor.end_of_text_id
        return GenerationConfig(bos_token_id=end, eos_token_id=end, pad_token_id=end)

    def inputs(self) -> BatchFeature:
        side = 4 * self.config.patch_size
        picture = Image.fromarray(np.random.default_rng(0).integers(256, size=(side, side, 3), dtype=np.uint8))
        return self.processor(text="User: What is this? Assistant:", images=picture)


def plan_fuyu(source: str | Path) -> FuyuJob:
    """
    A Fuyu or OtterHD folder of any date -> an OtterHD folder.

    The configuration states what the files of 2023 leave to defaults that have changed since (above all the RoPE base
    25000), `generation_config.json` stops at `|ENDOFTEXT|`, the processor is OtterHD's with its chat template.

    Args:
        source: folder or Hub repository, with its tokenizer and processor.

    Raises:
        ConversionError: for another kind of model.
    """
    report = ConversionReport("fuyu-to-otterhd")
    folder = resolve_folder(source)
    raw = read_raw_config(folder)
    if raw.get("model_type") != OtterHDConfig.model_type:
        raise ConversionError(f"{folder} has the model type {raw.get('model_type')!r}; expected 'fuyu'.")
    processor = _load_processor(folder)
    config = _load_config(raw, processor, report)
    weights = TensorSource(str(source), open_checkpoint(folder), _name_of_today, paths=source_files(folder))
    return FuyuJob(config, plan_model(config, [weights], report), processor, report, [str(source)])


def convert_fuyu(source: str | Path, output: str | Path, **options) -> ConversionReport:
    """[`plan_fuyu`] and [`finish`], whose options it takes."""
    return finish(plan_fuyu(source), output, **options)


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
    return config
