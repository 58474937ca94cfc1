"""What the 2023 code wrote and how it is called today: configuration dialects, token ids, weight names, LoRA.

The names on the left are those of Luodian/Otter and mlfoundations/open_flamingo as published in 2023. Everything here
works on JSON and on dictionaries of tensors; nothing reaches out for a repository that the caller did not name.
"""

import json
import re
from pathlib import Path

from transformers.core_model_loading import WeightRenaming
from transformers.utils import cached_file, logging

from .legacy_tokens import SPECIAL_TOKENS, TokenTable, read_token_table
from .mpt import MOSAIC_GPT_RENAMES, OtterMptConfig


logger = logging.get_logger(__name__)

# Fields the 2023 configurations carry that say nothing about the model: training switches and bookkeeping, a flag that
# was never read (`only_attend_previous`), and the random placement of `use_media_placement_augmentation`, which is a
# choice of `media_index` and not of the model. `architectures` may be a plain string, or name the wrong class.
_DROPPED_FIELDS = frozenset(
    "architectures only_attend_previous special_tokens train_full_model train_lang_encoder train_vision_encoder "
    "transformers_version use_media_placement_augmentation _commit_hash".split()
)
# In the nested configurations also the number format, which there never meant that of the weights.
_DROPPED_SUB_FIELDS = frozenset("_commit_hash _name_or_path architectures torch_dtype transformers_version".split())

# class name in `architectures` -> the model type of its configuration, where `text_config` does not say
_TEXT_MODEL_TYPES = {
    "LlamaForCausalLM": "llama",
    "MPTForCausalLM": "mpt",
    "MosaicGPT": "mosaic_gpt",
    "RWForCausalLM": "RefinedWebModel",
}
# whose tokenizer a repository without one needs, where the configuration does not say
_BASE_TOKENIZERS = {
    "llama": "the Llama model it was built on",
    "mpt": "EleutherAI/gpt-neox-20b (MPT)",
    "mosaic_gpt": "EleutherAI/gpt-neox-20b (MPT)",
    "RefinedWebModel": "tiiuae/falcon-7b",
}
# layers that Otter's conversion script gave LoRA factors to; it never stored their names
_LORA_TARGET_MODULES = {
    "falcon": ["query_key_value"],
    "gpt_neox": ["query_key_value"],
    "llama": ["q_proj", "v_proj"],
    "opt": ["q_proj", "v_proj"],
    "otter_mpt": ["Wqkv"],
}
# rows of embeddings were filled up to a multiple of 128 at most; LLaMA's tokenizer has two thirds of MPT's rows
_LEAST_OF_ROWS = 0.75
_REFINED_WEB_NAMES = {"n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "n_head_kv": "num_kv_heads"}

# Recomputed or unused buffers that old versions of transformers stored.
STALE_KEYS = re.compile(
    r"(rotary_emb\.inv_freq|embeddings\.position_ids|attention\.(bias|masked_bias)|attn\.attn_bias)$"
)


def is_legacy_config(config_dict: dict) -> bool:
    """Whether a parsed `config.json` was written by the 2023 code, which never stored the resampler's shape."""
    return "text_config" in config_dict and "perceiver_depth" not in config_dict


def upgrade_config_dict(config_dict: dict, name_or_path: str | None = None, tokenizer=None, **hub_kwargs) -> dict:
    """
    Translate a 2023 Otter or Flamingo configuration; anything newer is returned untouched.

    Args:
        config_dict: the parsed `config.json`. Not modified.
        name_or_path: folder, file in a folder, or Hub repository it came from, where the tokenizer files are looked
            for.
        tokenizer: a tokenizer, or the folder or repository of one, used instead: see [`read_token_table`].
        hub_kwargs: those of `HUB_ARGUMENTS` that belong to `name_or_path`.

    Returns:
        a new dictionary with the token ids resolved from the tokenizer (the 2023 code looked them up at construction
        and never stored them) and the text model in today's dialect.

    Raises:
        OSError: if `name_or_path` holds no tokenizer and none is given: without the id of `<image>` the model would
            not see any image, and say nothing.
        ValueError: for a text model that cannot be told, or computes something no decoder here does, and for the
            tokenizer of another model.
    """
    if not is_legacy_config(config_dict):
        return config_dict
    config = {key: value for key, value in config_dict.items() if key not in _DROPPED_FIELDS}
    text_config = dict(config["text_config"])
    text_config["model_type"] = _text_model_type(text_config)
    config["text_config"] = upgrade_text_config(text_config)
    if config.get("lora_config") is not None:
        targets = _LORA_TARGET_MODULES.get(config["text_config"]["model_type"])
        config["lora_config"] = {"target_modules": targets} | config["lora_config"]
    if config.get("vision_config"):
        config["vision_config"] = _without(config["vision_config"], _DROPPED_SUB_FIELDS)
    # the head is tied or not as the language model says: the outer field was never meant, and ties Llama by default
    config["tie_word_embeddings"] = config["text_config"].get("tie_word_embeddings")

    if tokenizer is None and name_or_path is None:
        return config
    num_rows = text_config.get("vocab_size")
    if tokenizer is None:
        table = read_token_table(name_or_path, config.get("model_type"), num_rows, **hub_kwargs)
    else:
        table = read_token_table(tokenizer, config.get("model_type"), num_rows)
    if "<image>" not in table.ids:
        raise OSError(_missing_tokenizer_message(name_or_path, config_dict["text_config"], text_config["model_type"]))
    if num_rows is not None and table.size < _LEAST_OF_ROWS * num_rows:
        raise ValueError(
            f"The tokenizer has {table.size} tokens, but {name_or_path or 'the model'} embeddings of {num_rows} rows: "
            "it is not the one that the model was trained with, which would take other words for `<image>`."
        )
    for token, field in SPECIAL_TOKENS.items():
        if config.get(field) is None:
            config[field] = table.ids.get(token)
    config["tokenizer_vocab_size"] = table.size
    config["pad_token_id"] = table.ids.get(table.pad_token, config["text_config"].get("pad_token_id"))
    # an answer ends with its chunk; the 2023 code left that to its demo scripts, and models talked on for ever
    eos_token_id = config["text_config"].get("eos_token_id")
    eos_token_id = table.ids.get(table.eos_token) if eos_token_id is None else eos_token_id
    ends = [*(eos_token_id if isinstance(eos_token_id, list) else [eos_token_id]), config["end_of_chunk_token_id"]]
    config["eos_token_id"] = [token_id for token_id in ends if token_id is not None]
    _explain_token_order(table, name_or_path)
    return config


def upgrade_text_config(text_config: dict) -> dict:
    """
    A 2023 language model's configuration -> one that today's decoders read: MosaicML's `mpt` and `mosaic_gpt` become
    `otter_mpt`, `RefinedWebModel` becomes `falcon`, others keep their type.

    Raises:
        ValueError: from [`OtterMptConfig.from_legacy`].
    """
    model_type = text_config["model_type"]
    text_config = _without(text_config, _DROPPED_SUB_FIELDS)
    if model_type in ("mpt", "mosaic_gpt"):
        return OtterMptConfig.from_legacy(text_config).to_diff_dict() | {"model_type": OtterMptConfig.model_type}
    if model_type in ("RefinedWebModel", "RefinedWeb"):
        renamed = {_REFINED_WEB_NAMES.get(key, key): value for key, value in text_config.items()}
        return renamed | {"model_type": "falcon", "new_decoder_architecture": model_type == "RefinedWeb"}
    return text_config


def _without(mapping: dict, names: frozenset) -> dict:
    return {key: value for key, value in mapping.items() if key not in names}


def _text_model_type(text_config: dict) -> str:
    """The model type of a nested 2023 configuration, which may name only a class or only a repository."""
    if text_config.get("model_type"):
        return text_config["model_type"]
    for architecture in text_config.get("architectures") or ():
        if architecture in _TEXT_MODEL_TYPES:
            return _TEXT_MODEL_TYPES[architecture]
    if "llama" in text_config.get("_name_or_path", "").lower():
        return "llama"
    raise ValueError(
        f"text_config names neither a model_type nor one of the architectures {', '.join(_TEXT_MODEL_TYPES)}; add "
        '"model_type" to it in config.json.'
    )


def _missing_tokenizer_message(name_or_path, text_config: dict, model_type: str) -> str:
    base = text_config.get("tokenizer_name") or text_config.get("_name_or_path") or _BASE_TOKENIZERS.get(model_type)
    return (
        f"{name_or_path} holds no tokenizer that knows <image>, as many repositories of 2023 do; pass tokenizer= "
        f"(on the command line --tokenizer) with a tokenizer or a folder of one (it was built on that of "
        f"{base or 'its language model'})."
    )


def _explain_token_order(table: TokenTable, name_or_path) -> None:
    answer, pad = table.ids.get("<answer>"), table.ids.get("<PAD>")
    if answer is not None and pad is not None and pad < answer:
        logger.warning_once(
            f"The tokenizer of {name_or_path} has <PAD> at {pad} and <answer> at {answer}: <answer> was added to a "
            "Flamingo that had its <PAD> already. These ids are used as they are; Otter's own code of 2023 would have "
            "swapped the two and read the wrong rows."
        )


def weight_renamings() -> list[WeightRenaming]:
    """2023 weight names -> ours, in the form `register_checkpoint_conversion_mapping` wants."""
    return [
        WeightRenaming(r"^lang_encoder\.lm_head\.", "lm_head."),
        WeightRenaming(r"^lang_encoder\.embed_out\.", "lm_head."),
        WeightRenaming(r"^lang_encoder\.model\.", "model.language_model."),
        WeightRenaming(r"^lang_encoder\.gpt_neox\.", "model.language_model."),
        WeightRenaming(r"^lang_encoder\.transformer\.", "model.language_model."),
        WeightRenaming(r"^vision_encoder\.vision_model\.", "model.vision_tower."),
        WeightRenaming(r"^vision_encoder\.", "model.vision_tower."),
        WeightRenaming(r"^perceiver\.", "model.perceiver."),
    ]


def mosaic_gpt_renamings() -> list[WeightRenaming]:
    """As [`weight_renamings`], for an MPT decoder inside or outside a Flamingo: MosaicGPT's names -> MPT's."""
    return [WeightRenaming(old, new) for old, new in MOSAIC_GPT_RENAMES.items()]


def is_stale_key(key: str) -> bool:
    """Whether a stored tensor is one that no version computes with: recomputed tables and masks."""
    return STALE_KEYS.search(key) is not None


# what peft wrote around a language model: up to 0.6 the adapted layer keeps its own name, from 0.7 on it is
# `base_layer`
_LORA_ROOT = "base_model.model."
_LORA_WEIGHT = re.compile(r"\.lora_([AB])(?:\.default)?\.weight$")


def split_lora_key(key: str) -> tuple[str, str]:
    """
    A stored name -> the name without peft's additions, and what it is: `"A"` or `"B"` (the two factors), or `"base"`.
    """
    key = key.replace(_LORA_ROOT, "", 1)
    if match := _LORA_WEIGHT.search(key):
        return key[: match.start()] + ".weight", match.group(1)
    return key.replace(".base_layer.", "."), "base"


def lora_scaling(lora_config: dict) -> float:
    """The factor alpha / r of the low-rank update (Hu et al. 2021, https://huggingface.co/papers/2106.09685)."""
    return lora_config["lora_alpha"] / lora_config["r"]


def merge_lora_pair(weight, lora_a, lora_b, scaling: float):
    """`weight (out, in)` + scaling * `lora_b (out, r)` @ `lora_a (r, in)`, rounded once, to `weight`'s dtype."""
    return (weight.double() + scaling * (lora_b.double() @ lora_a.double())).to(weight.dtype)


def name_lora_layers(state_dict: dict, lora_config: dict) -> dict:
    """
    A state dict with LoRA factors, as any version of peft named them -> the names of today's peft inside the model.

    Args:
        state_dict: names -> tensors as the 2023 code stored them, with peft up to 0.6 or from 0.7 on.
        lora_config: the configuration's, whose `target_modules` the factors must belong to.

    Raises:
        ValueError: if there are no factors, or they belong to other layers.
    """
    parts = {key: split_lora_key(key) for key in state_dict}
    adapted = {name for name, part in parts.values() if part != "base"}
    if not adapted:
        raise ValueError("config.json has a lora_config, but the weights hold no LoRA factors: remove lora_config.")
    targets = sorted({name.split(".")[-2] for name in adapted})
    if targets != sorted(lora_config["target_modules"]):
        raise ValueError(
            f"lora_config in config.json has the target_modules {lora_config['target_modules']}, but the weights hold "
            f"LoRA factors of {targets}: write these into lora_config."
        )
    renamed = {}
    for key, (name, part) in parts.items():
        module, _, parameter = name.rpartition(".")
        if part != "base":
            name = f"{module}.lora_{part}.default.weight"
        # a bias belongs to the adapted layer, too
        elif f"{module}.weight" in adapted:
            name = f"{module}.base_layer.{parameter}"
        renamed[name] = state_dict[key]
    return renamed


def find_raw_config(name_or_path, **hub_kwargs) -> dict:
    """The parsed `config.json` of a folder or repository; empty without one."""
    path = cached_file(str(name_or_path), "config.json", _raise_exceptions_for_missing_entries=False, **hub_kwargs)
    return json.loads(Path(path).read_text(encoding="utf-8")) if path else {}
