"""What the 2023 code wrote and how it is called today: configuration dialects, token ids, weight names.

The facts are listed in the model cards; the names on the left are those of Luodian/Otter and
mlfoundations/open_flamingo as published in 2023.
"""

import json
from pathlib import Path

from transformers.core_model_loading import WeightRenaming
from transformers.utils import cached_file, logging


logger = logging.get_logger(__name__)

# token text -> field of the configuration
SPECIAL_TOKENS = {
    "<image>": "image_token_id",
    "<|endofchunk|>": "end_of_chunk_token_id",
    "<answer>": "answer_token_id",
}
# fields the 2023 configurations carry that have no meaning any more: `only_attend_previous` was never read, and the
# random placement of `use_media_placement_augmentation` is a choice of `media_index`, not of the model
_DROPPED_FIELDS = ("only_attend_previous", "use_media_placement_augmentation")


def is_legacy_config(config_dict: dict) -> bool:
    """Whether `config_dict` (a parsed `config.json`) was written by the 2023 code, which never stored the resampler."""
    return "text_config" in config_dict and "perceiver_depth" not in config_dict


def upgrade_config_dict(config_dict: dict, name_or_path: str | None = None) -> dict:
    """
    Translate a 2023 Otter or Flamingo configuration; anything newer is returned untouched.

    Args:
        config_dict: the parsed `config.json`.
        name_or_path: folder or Hub repository it came from, where the tokenizer files are looked for.

    Returns:
        a new dictionary with the token ids resolved from the tokenizer files beside the configuration (the 2023 code
        looked them up at construction and never stored them).
    """
    if not is_legacy_config(config_dict):
        return config_dict
    config = {key: value for key, value in config_dict.items() if key not in _DROPPED_FIELDS}
    # the head is tied or not as the language model says: the outer field was never meant, and ties Llama by default
    config["tie_word_embeddings"] = config["text_config"].get("tie_word_embeddings")
    token_ids = read_added_tokens(name_or_path) if name_or_path else {}
    for token, field in SPECIAL_TOKENS.items():
        if config.get(field) is None and token in token_ids:
            config[field] = token_ids[token]
    return config


def read_added_tokens(name_or_path: str) -> dict[str, int]:
    """
    Added tokens (text -> id) of the tokenizer files in a folder or Hub repository; `{}` if there are none.

    Reads JSON only: no tokenizer is built, and nothing but the repository itself is asked.
    """
    added = {}
    for filename in ("tokenizer.json", "tokenizer_config.json", "added_tokens.json"):
        path = cached_file(
            name_or_path,
            filename,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )
        if path is None:
            continue
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if filename == "tokenizer.json":
            added |= {entry["content"]: entry["id"] for entry in content.get("added_tokens") or []}
        elif filename == "tokenizer_config.json":
            entries = content.get("added_tokens_decoder") or {}
            added |= {entry["content"]: int(token_id) for token_id, entry in entries.items()}
        else:
            added |= content
    return added


def weight_renamings() -> list[WeightRenaming]:
    """2023 weight names -> ours, in the form `register_checkpoint_conversion_mapping` wants."""
    return [
        WeightRenaming(r"^lang_encoder\.lm_head\.", "lm_head."),
        WeightRenaming(r"^lang_encoder\.model\.", "model.language_model."),
        WeightRenaming(r"^lang_encoder\.transformer\.", "model.language_model."),
        WeightRenaming(r"^vision_encoder\.vision_model\.", "model.vision_tower."),
        WeightRenaming(r"^vision_encoder\.", "model.vision_tower."),
        WeightRenaming(r"^perceiver\.", "model.perceiver."),
    ]


def read_vision_image_size(name_or_path: str, **hub_kwargs) -> int:
    """Image side in pixels of the vision tower, from the `config.json` of a folder or Hub repository; else CLIP's 224."""
    path = cached_file(name_or_path, "config.json", _raise_exceptions_for_missing_entries=False, **hub_kwargs)
    config = json.loads(Path(path).read_text(encoding="utf-8")) if path else {}
    return (config.get("vision_config") or {}).get("image_size", 224)
