"""OpenFlamingo checkpoints, and fresh Flamingos: a language model and a vision tower become one model."""

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import AutoConfig, PreTrainedConfig

from ..errors import config_told
from ..models.flamingo import FlamingoConfig
from ..models.flamingo.decoders_flamingo import SUPPORTED_DECODERS
from ..models.legacy import is_stale_key
from ..models.otter import OtterConfig
from .job import (
    Job,
    load_text_config,
    make_processor,
    open_flamingo_weights,
    open_tokenizer,
    read_raw_config,
    resolve_checkpoint,
    resolve_folder,
    set_token_ids,
)
from .names import (
    HEAD,
    from_open_clip,
    gated_layer_indices,
    language_model_rename,
    open_clip_config,
    rename_openflamingo,
    vision_tower_rename,
)
from .plan import TensorSource, build_meta_model, embedding_name, fresh_weights, mean_row, plan_model, source_files
from .report import ConversionReport
from .tensors import ConversionError, LazyTensor, open_checkpoint


_CONFIGS = {"flamingo": FlamingoConfig, "otter": OtterConfig}
_FIELDS_OF_NEW_PARTS = [
    field.name
    for field in fields(FlamingoConfig)
    if field.name.startswith(("perceiver_", "cross_attn_", "initializer_"))
    and field.name != "cross_attn_every_n_layers"
]
_FIELDS_OF_THE_RESAMPLER = [
    *(field.name for field in fields(FlamingoConfig) if field.name.startswith("perceiver_")),
    "max_num_frames",
    "vision_feature_select_strategy",
]
# two-tower models store their text side too
_OTHER_TOWER = ("text_model.", "text_projection", "logit_scale", "logit_bias", "visual_projection", "transformer.")
_OPEN_CLIP_TEXT = ("proj", "token_embedding.", "text_projection", "logit_scale", "ln_final.")
# input embeddings of Llama and OPT, MPT, GPT-NeoX, Falcon
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
# towers whose first token stands for the whole image
_CLASS_TOKEN = ("clip_vision_model", "deit", "dinov2", "dinov2_with_registers", "vit")


def plan_openflamingo(
    checkpoint: str | Path,
    language_model: str | Path,
    vision_tower: str | Path,
    tokenizer: str | Path | None = None,
    open_clip_head_dim: int = 64,
    open_clip_activation: str = "quick_gelu",
    tokenizer_reference: str | None = None,
) -> Job:
    """
    An OpenFlamingo checkpoint (Awadalla et al. 2023, https://huggingface.co/papers/2308.01390; v1 or v2) -> Flamingo.

    The checkpoint holds only what was trained; the rest comes from the models it was trained on. Where the gated
    layers sit and how large the resampler is are read from it. Patch tokens go to the resampler without the tower's
    last norm, as in open_clip up to 2.22, with which the published models were trained.

    Args:
        checkpoint: `checkpoint.pt`, or the Hub repository of one; flat, wrapped in `model_state_dict` or `model`, with
            or without `module.`.
        language_model: folder or Hub repository of the language model.
        vision_tower: the same of a CLIP (or its vision part), or a file of open_clip.
        tokenizer: folder or Hub repository, where the language model's has none.
        open_clip_head_dim, open_clip_activation: what an open_clip file does not tell; the defaults are OpenAI's.
        tokenizer_reference: for a LLaMA tokenizer of 2023, see [`FlamingoProcessor.from_pretrained`].
    """
    report = ConversionReport("openflamingo")
    file = resolve_checkpoint(checkpoint)
    trained = open_checkpoint(file)
    text_config, text_source, text_folder = open_language_model(language_model)
    rename = rename_openflamingo(text_config)
    renamed = {rename(key): tensor for key, tensor in trained.items()}
    if "model.perceiver.latents" not in renamed or not gated_layer_indices(renamed):
        raise ConversionError(
            f"{checkpoint} holds no resampler or no gated layers, so it is no OpenFlamingo checkpoint."
        )
    vision_config, vision_source, vision_folder = open_vision_tower(
        vision_tower, open_clip_head_dim, open_clip_activation
    )
    tokenizer_folder = text_folder if tokenizer is None else resolve_folder(tokenizer, weights=False)
    tokenizer = open_tokenizer(tokenizer_folder, legacy=True, reference=tokenizer_reference)
    processor = make_processor("flamingo", tokenizer, vision_config, vision_folder)

    embeddings = [tensor for key, tensor in trained.items() if key.endswith(_EMBEDDINGS)]
    rows = embeddings[0].shape[0] if embeddings else len(processor.tokenizer)
    if rows < len(processor.tokenizer):
        raise ConversionError(
            f"{checkpoint} has {rows} embedding rows, but the tokenizer with Flamingo's special tokens has "
            f"{len(processor.tokenizer)}; name the tokenizer it was trained with by --tokenizer."
        )
    text_config.vocab_size = rows
    config = FlamingoConfig(
        vision_config=vision_config,
        text_config=text_config,
        cross_attn_every_n_layers=_every_n_layers(renamed, text_config, checkpoint),
        **resampler_shape(renamed),
    )
    set_token_ids(config, processor.tokenizer)
    source = TensorSource(
        file.name,
        trained,
        rename,
        ignore=lambda key: (
            "a second copy of the gated layers, which v1 stored twice"
            if key.startswith("lang_encoder.gated_cross_attn_layers.")
            else None
        ),
        paths=source_files(file),
    )
    tensors = plan_model(config, [source, text_source, vision_source], report)
    report.notes.append(
        "image features are taken before the vision tower's last norm, as in open_clip up to 2.22; its activation is "
        f"{vision_config.hidden_act}"
    )
    lineage = [str(path) for path in (checkpoint, language_model, vision_tower)]
    return Job(config, tensors, processor, report, lineage)


def plan_inject_lm(
    language_model: str | Path,
    vision_tower: str | Path,
    tokenizer: str | Path | None = None,
    model_type: str = "flamingo",
    cross_attn_every_n_layers: int = 4,
    max_num_frames: int | None = None,
    seed: int = 0,
    tokenizer_reference: str | None = None,
    init_rows: Mapping[str, str] | None = None,
    resampler_from: str | Path | None = None,
    **config_kwargs,
) -> Job:
    """
    A Flamingo or Otter to be trained, on any supported language model and vision tower.

    The resampler and the gated layers are initialised at random with their gates closed, so that the language model
    answers as before; rows of new tokens are the mean of the others, or of those in `init_rows`.

    Args:
        language_model, vision_tower, tokenizer: folders or Hub repositories.
        model_type: `"flamingo"` or `"otter"`.
        seed: of the new weights.
        tokenizer_reference: for a LLaMA `tokenizer.model` without the tokenizer.json of today, see
            [`FlamingoProcessor.from_pretrained`].
        init_rows: token of the model -> a text whose tokens' mean row it starts from. `{"<|endofchunk|>": "</s>"}`
            ends answers with what the language model ends its own with, so that embeddings need no training.
        resampler_from: folder or Hub repository of a Flamingo or Otter behind the same vision tower, whose trained
            resampler, with its shape, is taken in place of a random one (`docs/experiments.md` has what it saves).
        config_kwargs: fields of [`FlamingoConfig`] that shape the new parts: `perceiver_*`, `cross_attn_*`,
            `initializer_range`.

    Raises:
        ConversionError: for parts that do not make a model, for another field or a value of a wrong type, for a row
            of a token that the model does not add, or of no tokens, and for a resampler of another shape than asked
            for, or that was trained behind another tower.
    """
    for name in config_kwargs:
        if name not in _FIELDS_OF_NEW_PARTS:
            raise ConversionError(f"{name} is no field of the new parts; there are {', '.join(_FIELDS_OF_NEW_PARTS)}.")
    report = ConversionReport("inject-lm")
    text_config, text_source, text_folder = open_language_model(language_model)
    vision_config, vision_source, vision_folder = open_vision_tower(vision_tower)
    tokenizer_folder = text_folder if tokenizer is None else resolve_folder(tokenizer, weights=False)
    tokenizer = open_tokenizer(tokenizer_folder, legacy=False, reference=tokenizer_reference)
    processor = make_processor(model_type, tokenizer, vision_config, vision_folder)
    if vision_folder is None or not (vision_folder / "preprocessor_config.json").is_file():
        report.notes.append(
            f"{vision_tower} has no preprocessor_config.json: pictures are prepared as for CLIP, with its mean and "
            "standard deviation"
        )
    # a vocabulary that is already larger than its tokenizer has room for the new tokens
    text_config.vocab_size = max(text_config.vocab_size, len(processor.tokenizer))
    shape = {"vision_feature_select_strategy": "default" if vision_config.model_type in _CLASS_TOKEN else "full"}
    shape |= config_kwargs | ({} if max_num_frames is None else {"max_num_frames": max_num_frames})
    sources = [text_source, vision_source]
    if resampler_from is not None:
        shape, resampler = _take_resampler(resampler_from, shape, vision_source)
        sources.insert(0, resampler)
    try:
        config = _CONFIGS[model_type](
            vision_config=vision_config,
            text_config=text_config,
            cross_attn_every_n_layers=cross_attn_every_n_layers,
            **shape,
        )
    except StrictDataclassFieldValidationError as error:
        raise ConversionError(" ".join(str(error).split()) + ".") from error
    set_token_ids(config, processor.tokenizer)
    tensors = plan_model(config, sources, report, fresh_weights(config, seed))
    for token, text in (init_rows or {}).items():
        _init_row(tensors, config, processor, token, text, report)
    lineage = [str(part) for part in (language_model, vision_tower, resampler_from) if part is not None]
    return Job(config, tensors, processor, report, lineage)


def _take_resampler(name_or_path: str | Path, shape: dict, tower: TensorSource) -> tuple[dict, TensorSource]:
    """`shape` with the fields of a trained resampler, and the source of its tensors."""
    config, source = open_flamingo_weights(name_or_path, tokens=False)
    resampler, seen = {}, {}
    for key, tensor in source.tensors.items():
        target = source.rename(key) or ""
        if target.startswith("model.perceiver."):
            resampler[key] = tensor
        elif target.startswith("model.vision_tower."):
            seen[target] = tensor
    for key, tensor in tower.tensors.items():
        if is_stale_key(key) or tower.ignore(key) is not None:
            continue
        other = seen.get(tower.rename(key))
        # another precision of the same tower will do
        if (
            other is None
            or other.shape != tensor.shape
            or not torch.allclose(other.load().float(), tensor.load().float(), rtol=1e-2, atol=1e-2)
        ):
            raise ConversionError(
                f"The resampler of {name_or_path} was trained behind another vision tower than {tower.label} ({key} "
                "differs): give the tower it saw, or leave --resampler-from out."
            )
    taken = {name: getattr(config, name) for name in _FIELDS_OF_THE_RESAMPLER}
    for name, value in taken.items():
        if name != "vision_feature_select_strategy" and shape.get(name, value) != value:
            raise ConversionError(
                f"{name} is {shape[name]!r}, but {value!r} of the resampler of {name_or_path}: leave it out, or take "
                "a resampler of that shape."
            )
    return shape | taken, replace(source, tensors=resampler)


def _init_row(tensors: dict[str, LazyTensor], config, processor, token: str, text: str, report) -> None:
    """Start the row of a token, in place, from the mean of the rows of a text."""
    if token not in processor.special_tokens:
        raise ConversionError(f"{token!r} is no token of this model: use {', '.join(processor.special_tokens)}.")
    row, ids = (processor.tokenizer(part, add_special_tokens=False)["input_ids"] for part in (token, text))
    if not ids:
        raise ConversionError(f"The row of {token} cannot start from {text!r}, which holds no tokens.")

    def with_row(value: torch.Tensor) -> torch.Tensor:
        value[row] = mean_row(value[ids])
        return value

    for name in {embedding_name(build_meta_model(config)), HEAD} & tensors.keys():
        tensors[name] = tensors[name].map(with_row)
        report.initialised[f"{name}[{row[0]}]"] = f"{token}, the mean of the rows of {text!r}"


def open_language_model(name_or_path: str | Path) -> tuple[PreTrainedConfig, TensorSource, Path]:
    """Configuration, tensors and folder of a causal language model. Raises ConversionError for an unsupported one."""
    folder = resolve_folder(name_or_path)
    try:
        config = load_text_config(folder)
    except ValueError as error:
        raise ConversionError(f"{folder} is no language model that transformers knows: {error}") from error
    if config.model_type not in SUPPORTED_DECODERS:
        raise ConversionError(
            f"{folder} is a {config.model_type!r} model, whose layers images cannot reach; use one of "
            f"{', '.join(sorted(SUPPORTED_DECODERS))}."
        )
    tensors = open_checkpoint(folder)
    source = TensorSource(
        str(name_or_path), tensors, language_model_rename(config), resize=True, paths=source_files(folder)
    )
    return config, source, folder


def open_vision_tower(
    name_or_path: str | Path, open_clip_head_dim: int = 64, open_clip_activation: str = "quick_gelu"
) -> tuple[PreTrainedConfig, TensorSource, Path | None]:
    """
    Configuration, tensors and (of a transformers model) folder of a vision tower.

    Raises:
        ConversionError: for what reads no pictures.
    """
    if Path(name_or_path).is_file():
        tensors = from_open_clip(open_checkpoint(name_or_path))
        config = open_clip_config(tensors, open_clip_head_dim, open_clip_activation)
        source = TensorSource(
            Path(name_or_path).name,
            tensors,
            lambda key: f"model.vision_tower.{key}",
            ignore=_other_tower(_OPEN_CLIP_TEXT),
            paths=source_files(name_or_path),
        )
        return config, source, None
    folder = resolve_folder(name_or_path)
    read_raw_config(folder)
    with config_told(folder):
        config = AutoConfig.from_pretrained(folder)
    config = getattr(config, "vision_config", config)
    if not hasattr(config, "num_channels"):
        raise ConversionError(
            f"{folder} is a {config.model_type!r} model, which reads no pictures: name a vision tower."
        )
    source = TensorSource(
        str(name_or_path),
        open_checkpoint(folder),
        vision_tower_rename(config),
        ignore=_other_tower(_OTHER_TOWER),
        paths=source_files(folder),
    )
    return config, source, folder


def _other_tower(prefixes: tuple[str, ...]):
    return lambda key: "no part of the vision tower" if key.startswith(prefixes) else None


def resampler_shape(tensors: dict[str, LazyTensor]) -> dict:
    """The fields of [`FlamingoConfig`] that the resampler's tensors (under our names) tell; heads are 64 wide."""
    prefix = "model.perceiver."
    layers = {name.split(".")[3] for name in tensors if name.startswith(f"{prefix}layers.")}
    num_latents, width = tensors[f"{prefix}latents"].shape
    frames = tensors.get(f"{prefix}frame_embs")
    return {
        "perceiver_depth": len(layers),
        "perceiver_num_latents": num_latents,
        "perceiver_num_heads": tensors[f"{prefix}layers.0.to_q.weight"].shape[0] // 64,
        "perceiver_ff_mult": tensors[f"{prefix}layers.0.feed_forward.1.weight"].shape[0] // width,
        "max_num_frames": None if frames is None else frames.shape[0],
    }


def _every_n_layers(tensors, text_config, checkpoint) -> int:
    gated = gated_layer_indices(tensors)
    every, num_layers = gated[0] + 1, text_config.num_hidden_layers
    if gated != list(range(every - 1, num_layers, every)):
        raise ConversionError(
            f"{checkpoint} has gated layers at {gated}, which do not fit a language model of {num_layers} layers; it "
            "was trained on another one."
        )
    return every
