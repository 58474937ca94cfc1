"""What all conversions share: reading folders, checking, writing everything a model folder needs, pushing it."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    BatchFeature,
    CLIPImageProcessorPil,
    GenerationConfig,
    PreTrainedConfig,
)
from transformers.utils import logging

from ..errors import config_told
from ..model_names import check_model_name, split_revision
from ..models.flamingo import FlamingoProcessor
from ..models.legacy import is_legacy_config, split_lora_key, upgrade_text_config
from ..models.legacy_tokens import SPECIAL_TOKENS, load_tokenizer
from ..models.otter import OtterProcessor
from .memory import load_model_config
from .model_card import conversion_card
from .names import Rename, rename_2023, vision_tower_rename
from .plan import TensorSource, model_class, source_files
from .report import ConversionReport
from .tensors import ConversionError, LazyTensor, open_checkpoint
from .writer import output_folder, write_safetensors


logger = logging.get_logger(__name__)

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
PROCESSORS = {"flamingo": FlamingoProcessor, "otter": OtterProcessor}


@dataclass
class Job:
    """
    A planned conversion: the model's configuration, its tensors, its processor, and what became of the sources. Its
    methods are what families differ in.
    """

    config: PreTrainedConfig
    tensors: dict[str, LazyTensor]
    processor: object
    report: ConversionReport
    lineage: list[str] = field(default_factory=list)

    def stored(self) -> dict[str, LazyTensor]:
        """The tensors under the names that the result has."""
        return self.tensors

    def token_table(self) -> dict[str, int]:
        """Special tokens and their ids."""
        table = {token: getattr(self.config, name) for token, name in SPECIAL_TOKENS.items()}
        table["<PAD>"] = self.config.pad_token_id
        return {token: token_id for token, token_id in table.items() if token_id is not None}

    def generation_config(self) -> GenerationConfig:
        """Where generation begins and ends."""
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        return GenerationConfig(**{name: getattr(self.config, name) for name in names})

    def inputs(self) -> Mapping[str, torch.Tensor]:
        """One row of tokens with a picture, for `verify_folder`: random ones, the same each time."""
        config, generator = self.config, torch.Generator().manual_seed(0)
        size = getattr(config.vision_config, "image_size", 224)  # convolutional towers take any
        text_size = config.tokenizer_vocab_size or config.text_config.vocab_size
        input_ids = torch.randint(0, text_size, (1, 12), generator=generator)
        special = [id for id in (config.image_token_id, config.end_of_chunk_token_id) if id is not None]
        input_ids[torch.isin(input_ids, torch.tensor(special))] = 0
        input_ids[0, 1] = config.image_token_id
        return {"input_ids": input_ids, "pixel_values": torch.randn(1, 3, size, size, generator=generator)}


def finish(
    job: Job,
    output: str | Path,
    *,
    dtype: str | None = None,
    allow: bool = False,
    verify: bool = False,
    max_shard_size: int = 5 * 10**9,
    push_to_hub: str | None = None,
) -> ConversionReport:
    """
    Check a planned conversion and write it: weights in shards, configuration, processor, generation config, model
    card and report. The folder appears when everything is in it.

    Args:
        output: a new or empty folder.
        dtype: a key of `DTYPES`, for all floating-point tensors; None keeps each as it is.
        allow: write the result even if something in the sources is unexplained.
        verify: load the result and compare its logits with a model assembled from the sources.
        max_shard_size: of a weight file, in bytes.
        push_to_hub: repository to create or update with the folder.

    Raises:
        ConversionError: if something is unexplained or the verification fails.
    """
    report, config = job.report, job.config
    report.token_table = job.token_table()
    writing = {"dtype": dtype, "allow": allow, "max_shard_size": max_shard_size, "push_to_hub": push_to_hub}
    with written_folder(report, output, job.stored(), **writing) as folder:
        config.dtype, config.architectures = report.dtype, [model_class(config).__name__]
        config.save_pretrained(folder)
        job.generation_config().save_pretrained(folder)
        job.processor.save_pretrained(folder)
        if verify:
            report.verification = verify_folder(folder, config, job.inputs(), job.tensors, dtype)
        (folder / "README.md").write_text(conversion_card(config, report, job.lineage), encoding="utf-8")
    return report


@contextmanager
def written_folder(
    report: ConversionReport,
    output: str | Path,
    tensors: dict[str, LazyTensor],
    *,
    dtype: str | None = None,
    allow: bool = False,
    max_shard_size: int = 5 * 10**9,
    push_to_hub: str | None = None,
) -> Iterator[Path]:
    """
    A folder with the weights, for a block that writes what else belongs there. Behind it the report is saved, the
    folder gets its name, and is pushed; arguments and errors as for [`finish`].
    """
    report.check(allow)
    report.dtype = dtype or most_common_dtype(tensors)
    with output_folder(output) as folder:
        report.files = write_safetensors(folder, cast(tensors, dtype), max_shard_size, allow=allow)
        yield folder
        report.save(folder)
    if push_to_hub:
        push_folder(output, push_to_hub)


def finish_with_adapter(
    job: Job,
    adapter: dict[str, LazyTensor],
    adapter_config: dict,
    output: str | Path,
    *,
    push_to_hub: str | None = None,
    **options,
) -> ConversionReport:
    """[`finish`], with a PEFT adapter for this model in the folder `adapter` of the output."""
    adapter_config = adapter_config | {"base_model_name_or_path": push_to_hub or str(output)}
    with output_folder(output) as folder:
        model = folder / "model"
        report = finish(job, model, **options)
        (model / "adapter").mkdir()
        factors, allow = cast(adapter, options.get("dtype")), options.get("allow", False)
        write_safetensors(model / "adapter", factors, name="adapter_model", allow=allow)
        (model / "adapter" / "adapter_config.json").write_text(json.dumps(adapter_config, indent=2) + "\n")
        for path in list(model.iterdir()):
            path.rename(folder / path.name)
        model.rmdir()
    if push_to_hub:
        push_folder(output, push_to_hub)
    return report


def cast(tensors: dict[str, LazyTensor], dtype: str | None) -> dict[str, LazyTensor]:
    """Floating-point tensors in another dtype (a key of `DTYPES`); others, and all with None, as they are."""
    if dtype is None:
        return tensors
    if dtype not in DTYPES:
        raise ConversionError(f"dtype {dtype!r} is unknown; use one of {', '.join(DTYPES)}.")
    target = DTYPES[dtype]
    return {
        name: tensor.map(lambda value: value.to(target), dtype=target) if tensor.dtype.is_floating_point else tensor
        for name, tensor in tensors.items()
    }


def most_common_dtype(tensors: dict[str, LazyTensor]) -> str:
    """The dtype of most floating-point tensors, as configurations write it."""
    dtypes = [tensor.dtype for tensor in tensors.values() if tensor.dtype.is_floating_point]
    return str(max(set(dtypes), key=dtypes.count)).removeprefix("torch.")


# what of a repository is downloaded: no code, no other frameworks' weights
_PATTERNS = ["*.json", "*.txt", "*.model"]
# of these the first that are there, as `weight_files` reads them: many repositories hold their weights in both forms
_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")


def resolve_folder(name_or_path: str | Path, *, weights: bool = True) -> Path:
    """
    A local folder as it is; otherwise the named Hub repository, downloaded or from the cache.

    Args:
        weights: False where it is asked for its tokenizer only, whatever else it holds.
    """
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    folder = Path(_download(snapshot_download, name_or_path, allow_patterns=_PATTERNS))
    for pattern in _WEIGHTS if weights else ():
        _download(snapshot_download, name_or_path, allow_patterns=pattern)
        if any(folder.glob(pattern)):
            break
    return folder


def resolve_checkpoint(name_or_path: str | Path) -> Path:
    """A file or folder, or what has the name of a file, as it is; otherwise `checkpoint.pt` of the Hub repository."""
    path = Path(name_or_path)
    if path.exists() or path.suffix in (".pt", ".pth", ".bin", ".safetensors"):
        return path
    return Path(_download(hf_hub_download, name_or_path, filename="checkpoint.pt"))


def _download(download: Callable[..., str], name: str | Path, **options: Any) -> str:
    # a tokenizer's repository has no config.json
    try:
        check_model_name(name, config=False)
    except ValueError as error:
        raise ConversionError(error) from None
    path, revision = split_revision(str(name))
    try:
        return download(path, revision=revision, **options)
    except OSError as error:
        raise ConversionError(f"{name} cannot be downloaded from the Hub: {error}") from error


def read_raw_config(folder: str | Path) -> dict:
    """The parsed `config.json` of a folder. Raises ConversionError without one."""
    path = Path(folder) / "config.json"
    if not path.is_file() and (path.parent / "adapter_config.json").is_file():
        raise ConversionError(
            f"{folder} is an adapter: put it into its model first (merge_and_unload() of PEFT), and name the folder "
            "that you save."
        )
    if not path.is_file():
        raise ConversionError(f"{folder} holds no config.json.")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConversionError(f"{path} is damaged: {error}.") from error


def load_text_config(folder: str | Path) -> PreTrainedConfig:
    """The configuration of a causal language model, of 2023 (MosaicML's dialects, RefinedWeb) or of today."""
    raw = read_raw_config(folder)
    if raw.get("model_type") in ("mpt", "mosaic_gpt", "RefinedWebModel", "RefinedWeb"):
        upgraded = upgrade_text_config(raw)
        with config_told(folder):
            return AutoConfig.for_model(upgraded.pop("model_type"), **upgraded)
    with config_told(folder):
        return AutoConfig.from_pretrained(folder)


def open_tokenizer(folder: Path, *, legacy: bool, reference: str | None):
    """
    The tokenizer of a folder, see [`~models.legacy_tokens.load_tokenizer`]. Raises ConversionError without one, naming
    the option to give another.
    """
    try:
        return load_tokenizer(folder, legacy=legacy, reference=reference)
    except (OSError, ValueError) as error:
        raise ConversionError(f"{error} Name a folder or repository of a tokenizer by --tokenizer.") from error


def make_processor(model_type: str, tokenizer, vision_config: PreTrainedConfig, vision_folder: Path | None = None):
    """The processor of a model type (`"flamingo"` or `"otter"`): special tokens added, CLIP's image processor unless
    the folder of the vision tower has its own."""
    if vision_folder is not None and (vision_folder / "preprocessor_config.json").is_file():
        image_processor = AutoImageProcessor.from_pretrained(vision_folder, backend="pil")
    else:
        size = getattr(vision_config, "image_size", 224)  # convolutional towers take any
        image_processor = CLIPImageProcessorPil(
            size={"shortest_edge": size}, crop_size={"height": size, "width": size}
        )
    processor_class = PROCESSORS[model_type]
    return processor_class(image_processor, processor_class.prepare_tokenizer(tokenizer))


def set_token_ids(config: PreTrainedConfig, tokenizer) -> None:
    """Write the ids of a prepared tokenizer into a configuration."""
    vocabulary = tokenizer.get_vocab()
    for token, name in SPECIAL_TOKENS.items():
        setattr(config, name, vocabulary.get(token))
    config.tokenizer_vocab_size = len(tokenizer)
    config.bos_token_id, config.pad_token_id = tokenizer.bos_token_id, tokenizer.pad_token_id
    config.eos_token_id = [tokenizer.eos_token_id, config.end_of_chunk_token_id]


def open_flamingo_folder(
    name_or_path: str | Path, tokenizer: str | None = None, tokenizer_reference: str | None = None
):
    """
    A Flamingo or Otter folder, of 2023 or of today.

    Args:
        tokenizer: folder of a tokenizer, for a folder that has none.
        tokenizer_reference: see [`FlamingoProcessor.from_pretrained`].

    Returns:
        the configuration, the source of its tensors under our names, and its processor. LoRA factors are left out;
        see `convert_lora`.
    """
    config, source = open_flamingo_weights(name_or_path, tokenizer)
    try:
        processor = PROCESSORS[config.model_type].from_pretrained(
            resolve_folder(name_or_path), tokenizer=tokenizer, tokenizer_reference=tokenizer_reference
        )
    except (OSError, ValueError) as error:
        raise ConversionError(_as_typed(error)) from error
    return config, source, processor


def open_flamingo_weights(
    name_or_path: str | Path, tokenizer: str | None = None, *, tokens: bool = True
) -> tuple[PreTrainedConfig, TensorSource]:
    """
    As `open_flamingo_folder`, without the processor: a `tokenizer` says which tokens a folder of 2023 has, if the ids
    of `tokens` matter.
    """
    folder = resolve_folder(name_or_path)
    raw = read_raw_config(folder)
    if raw.get("model_type") not in PROCESSORS:
        raise ConversionError(
            f"{folder} has the model type {raw.get('model_type')!r}; expected a Flamingo or Otter folder."
        )
    try:
        with config_told(folder):
            config = AutoConfig.from_pretrained(folder, tokenizer=tokenizer) if tokens else load_model_config(folder)
    except (OSError, ValueError) as error:
        raise ConversionError(_as_typed(error)) from error
    config.lora_config = None
    rename = _rename_stored(config) if is_legacy_config(raw) else _rename_saved(config)
    return config, TensorSource(str(name_or_path), open_checkpoint(folder), rename, paths=source_files(folder))


def _as_typed(error: Exception) -> str:
    return str(error).replace("tokenizer= (on the command line --tokenizer)", "--tokenizer")


def _rename_stored(config) -> Rename:
    rename = rename_2023(config.text_config)
    return lambda key: rename(split_lora_key(key)[0])


def _rename_saved(config) -> Rename:
    """transformers saves the layers of some vision towers under names of before."""
    prefix, rename = "model.vision_tower.", vision_tower_rename(config.vision_config)
    return lambda key: rename(key.removeprefix(prefix)) if key.startswith(prefix) else key


def verify_folder(
    folder: Path, config, inputs: Mapping[str, torch.Tensor], tensors: dict[str, LazyTensor], dtype: str | None
) -> dict:
    """
    Load a folder and compare it with a model assembled in memory from the source tensors.

    Returns:
        the largest difference of logits, their largest magnitude, and the share of equal most likely tokens.

    Raises:
        ConversionError: if names are missing or left over, or, with the dtype unchanged, logits differ by over 1e-4.
    """
    loaded, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True, dtype="auto")
    if any(info.values()):
        problems = {key: sorted(names) for key, names in info.items() if names}
        raise ConversionError(f"The result does not load cleanly: {problems}.")

    def logits_of(model):
        with torch.no_grad():
            return model.eval()(**BatchFeature(inputs).to(model.dtype)).logits.float()

    result = logits_of(loaded)
    del loaded
    reference = model_class(config)(config).to(DTYPES[most_common_dtype(tensors)])
    reference.load_state_dict({name: tensor.load() for name, tensor in tensors.items()}, strict=False)
    reference.tie_weights()
    expected = logits_of(reference)
    difference = (result - expected).abs().max().item()
    if dtype is None and difference > 1e-4:
        raise ConversionError(f"The result computes other logits than its sources: they differ by {difference:.3g}.")
    agreement = (result.argmax(-1) == expected.argmax(-1)).float().mean().item()
    return {
        "max_logit_difference": difference,
        "max_logit": expected.abs().max().item(),
        "equal_most_likely_tokens": agreement,
    }


def push_folder(folder: str | Path, repo_id: str, private: bool | None = None) -> str:
    """Upload a converted folder to the Hub, creating the repository if needed. Returns the address of the commit."""
    api = HfApi()
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    commit = api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Convert with otter-hf")
    logger.info(f"pushed {folder} to {commit.commit_url}")
    return commit.commit_url
