"""Conversions from one Flamingo or Otter folder to another: 2023 to today, Flamingo to Otter, LoRA, training files."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from ..models.legacy import lora_scaling, merge_lora_pair, split_lora_key
from ..models.legacy_tokens import PAD_TOKEN
from ..models.otter import OtterConfig, OtterProcessor
from .job import Job, open_flamingo_folder, read_raw_config, resolve_folder
from .names import HEAD, rename_2023
from .plan import TensorSource, build_meta_model, embedding_name, mean_row, plan_model, source_files
from .report import ConversionReport
from .tensors import ConversionError, LazyTensor, open_checkpoint


def plan_folder(
    source: str | Path,
    tokenizer: str | None = None,
    conversion: str = "dtype",
    tokenizer_reference: str | None = None,
) -> Job:
    """
    A Flamingo or Otter folder, of 2023 or of today -> the same model in today's names; used to change the dtype too.

    Args:
        source: folder or Hub repository.
        tokenizer: folder of its tokenizer, for repositories of 2023 without one.
        tokenizer_reference: for a LLaMA tokenizer of 2023, see [`FlamingoProcessor.from_pretrained`].
    """
    report = ConversionReport(conversion)
    config, tensors, processor = open_flamingo_folder(source, tokenizer, tokenizer_reference)
    lora_config = read_raw_config(resolve_folder(source)).get("lora_config")
    if lora_config:
        tensors = merge_lora_source(tensors, lora_config, report)
    return Job(config, plan_model(config, [tensors], report), processor, report, [str(source)])


def plan_lora(source: str | Path, tokenizer: str | None = None, tokenizer_reference: str | None = None) -> Job:
    """
    An Otter folder of 2023 that was saved with its LoRA factors, by any version of peft -> a merged model.

    Raises:
        ConversionError: if the folder has no `lora_config` or no factors.
    """
    if not read_raw_config(resolve_folder(source)).get("lora_config"):
        raise ConversionError(f"{source} has no lora_config in its config.json, so nothing to merge.")
    return plan_folder(source, tokenizer, "lora", tokenizer_reference)


def merge_lora_source(source: TensorSource, lora_config: dict, report: ConversionReport) -> TensorSource:
    """A source in which low-rank factors are folded into the weights they belong to."""
    merged, factors = {}, {}
    for key, tensor in source.tensors.items():
        name, part = split_lora_key(key)
        if part == "base":
            merged[name] = tensor
        else:
            factors.setdefault(name, {})[part] = (key, tensor)
    if not factors:
        raise ConversionError(f"{source.label} has a lora_config, but its weights hold no LoRA factors.")
    scaling = lora_scaling(lora_config)
    for name, pair in factors.items():
        if name not in merged or set(pair) != {"A", "B"}:
            raise ConversionError(f"{source.label} lacks a part of the LoRA weights of {name}.")
        (a_key, a), (b_key, b) = pair["A"], pair["B"]
        merged[name] = merged[name].map(lambda weight, a=a, b=b: merge_lora_pair(weight, a.load(), b.load(), scaling))
        for key in (a_key, b_key):
            report.tensors[f"{source.label}: {key}"] = source.rename(name)
    report.notes.append(f"LoRA factors of {len(factors)} weights merged with alpha / r = {scaling:g}")
    return replace(source, tensors=merged)


def lora_adapter(
    source: str | Path, tokenizer: str | None = None, tokenizer_reference: str | None = None
) -> tuple[Job, dict[str, LazyTensor], dict]:
    """
    An Otter folder of 2023 with LoRA factors -> the model without them, and the factors as a PEFT adapter.

    Returns:
        the model's job, the adapter's tensors under PEFT's names, and its `adapter_config.json`.
    """
    report = ConversionReport("lora --adapter")
    folder = resolve_folder(source)
    lora_config = read_raw_config(folder).get("lora_config")
    if not lora_config:
        raise ConversionError(f"{source} has no lora_config in its config.json, so no adapter.")
    config, weights, processor = open_flamingo_folder(source, tokenizer, tokenizer_reference)
    base, adapter, modules = {}, {}, set()
    for key, tensor in weights.tensors.items():
        name, part = split_lora_key(key)
        if part == "base":
            base[name] = tensor
            continue
        module = weights.rename(name).removesuffix(".weight")
        target = f"base_model.model.{module}.lora_{part}.weight"
        adapter[target] = tensor
        modules.add(module.rpartition(".")[2])
        report.tensors[f"{weights.label}: {key}"] = f"adapter/{target}"
    if not adapter:
        raise ConversionError(f"{source} has a lora_config, but its weights hold no LoRA factors.")
    adapter_config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": lora_config["r"],
        "lora_alpha": lora_config["lora_alpha"],
        "lora_dropout": lora_config.get("lora_dropout", 0.0),
        # only the layers of the language model: other parts have projections of the same names
        "target_modules": rf"model\.language_model\..*\.decoder_layer\..*\.({'|'.join(sorted(modules))})",
        "bias": "none",
    }
    tensors = plan_model(config, [replace(weights, tensors=base)], report)
    return Job(config, tensors, processor, report, [str(source)]), adapter, adapter_config


def plan_flamingo_to_otter(
    source: str | Path,
    tokenizer: str | None = None,
    answer_init: str = "mean",
    tokenizer_reference: str | None = None,
) -> Job:
    """
    A Flamingo -> an Otter: its tokenizer gets `<answer>`, and the embeddings a row for it where they lack one.

    The token gets the next free id, so `<PAD>` keeps its own; the 2023 scripts gave `<answer>` the row that had been
    trained as `<PAD>`.

    Args:
        answer_init: `"mean"` (of all tokens), or a text whose tokens' mean row the new row starts from.
        tokenizer_reference: for a LLaMA tokenizer of 2023, see [`FlamingoProcessor.from_pretrained`].
    """
    report = ConversionReport("flamingo-to-otter")
    flamingo, weights, processor = open_flamingo_folder(source, tokenizer, tokenizer_reference)
    if flamingo.model_type != "flamingo":
        raise ConversionError(f"{source} is a model of type {flamingo.model_type!r} already; expected a Flamingo.")
    old_size = len(processor.tokenizer)
    answer_init_ids = None
    if answer_init != "mean":
        answer_init_ids = processor.tokenizer(answer_init, add_special_tokens=False)["input_ids"]
        if not answer_init_ids:
            raise ConversionError(f"--answer-init {answer_init!r} holds no tokens.")
    tokenizer = OtterProcessor.prepare_tokenizer(processor.tokenizer)
    processor = OtterProcessor(processor.image_processor, tokenizer)
    answer_id = tokenizer.convert_tokens_to_ids("<answer>")

    fields = flamingo.to_dict()
    fields.pop("model_type")
    config = OtterConfig(**fields)
    config.answer_token_id, config.tokenizer_vocab_size = answer_id, len(tokenizer)
    old_rows = config.text_config.vocab_size
    config.text_config.vocab_size = max(old_rows, len(tokenizer))

    resized = (HEAD, embedding_name(build_meta_model(config)))
    tensors = {}
    for key, tensor in weights.tensors.items():
        target = weights.rename(key)
        if target in resized and answer_id >= old_size:
            shape = (config.text_config.vocab_size, *tensor.shape[1:])
            tensor = tensor.map(_new_rows(answer_id, old_size, shape[0], answer_init_ids), shape)
            how = "all tokens" if answer_init == "mean" else repr(answer_init)
            report.initialised[f"{target}[{answer_id}]"] = f"<answer>, the mean of the rows of {how}"
        tensors[key] = tensor
    planned = plan_model(config, [replace(weights, tensors=tensors)], report)
    pad_id = tokenizer.convert_tokens_to_ids(PAD_TOKEN)
    if pad_id is not None and pad_id < answer_id:
        report.notes.append(f"<PAD> keeps its id {pad_id}, below <answer> at {answer_id}")
    return Job(config, planned, processor, report, [str(source)])


def _new_rows(
    row: int, num_tokens: int, num_rows: int, init_ids: list[int] | None
) -> Callable[[torch.Tensor], torch.Tensor]:
    def new_rows(value: torch.Tensor) -> torch.Tensor:
        mean = mean_row(value[:num_tokens])
        value = torch.cat([value, mean.expand(num_rows - value.shape[0], -1)])
        value[row] = (mean if init_ids is None else mean_row(value[init_ids]))[0]
        return value

    return new_rows


def plan_trainer_pt(
    checkpoint: str | Path,
    base: str | Path,
    tokenizer: str | None = None,
    tokenizer_reference: str | None = None,
) -> Job:
    """
    What the 2023 training scripts saved, on the model they started from.

    Args:
        checkpoint: `final_weights.pt` (trainable weights only) or `checkpoint_*.pt` (with the optimizer's state),
            flat or wrapped.
        base: folder or Hub repository of the model that was trained.
        tokenizer_reference: for a LLaMA tokenizer of 2023, see [`FlamingoProcessor.from_pretrained`].
    """
    report = ConversionReport("trainer-pt")
    config, base_source, processor = open_flamingo_folder(base, tokenizer, tokenizer_reference)
    trained = TensorSource(
        Path(checkpoint).name,
        open_checkpoint(checkpoint),
        rename_2023(config.text_config),
        paths=source_files(checkpoint),
    )
    tensors = plan_model(config, [trained, base_source], report)
    return Job(config, tensors, processor, report, [str(base), str(checkpoint)])
