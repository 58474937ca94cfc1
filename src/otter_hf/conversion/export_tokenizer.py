"""A tokenizer in the files that transformers of 2023 reads: 4.28 to 4.35, with tokenizers 0.13 to 0.15."""

import json
import struct
from pathlib import Path

from ..models.legacy_tokens import REFERENCES
from .tensors import ConversionError


# of the parts of a tokenizer.json, what was not known in 2023 yet and says nothing where it has this value
_NEW_FIELDS = {"ignore_merges": False}


def save_tokenizer_2023(tokenizer, folder: Path) -> None:
    """
    Write the files of a tokenizer: for a LLaMA tokenizer of 2023 its `tokenizer.model` (field numbers of
    sentencepiece_model.proto) again, otherwise tokenizer.json in the format of that time; and those that name its
    special tokens.

    Raises:
        ConversionError: for a tokenizer that works as none of 2023 could.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    named = dict(tokenizer.special_tokens_map)
    additional = [
        token["content"]
        for token in backend["added_tokens"]
        if token["special"] and token["content"] not in named.values()
    ]
    max_length = tokenizer.model_max_length
    config = {**named, "model_max_length": max_length, "clean_up_tokenization_spaces": False}
    files = {"special_tokens_map.json": {**named, "additional_special_tokens": additional}}
    if tokenizer.init_kwargs.get("tokenizer_reference") in REFERENCES:
        config |= {"tokenizer_class": "LlamaTokenizer", "legacy": True}
        template = json.dumps(backend["post_processor"])
        config |= {"add_bos_token": f'"{tokenizer.bos_token}"' in template}
        config |= {"add_eos_token": f'"{tokenizer.eos_token}"' in template}
        vocabulary = backend["model"]["vocab"]
        added = {token["content"]: token["id"] for token in backend["added_tokens"]}
        files["added_tokens.json"] = {token: added[token] for token in added if token not in vocabulary}
        (folder / "tokenizer.model").write_bytes(_sentencepiece_model(backend["model"], named["unk_token"]))
    else:
        config |= {"tokenizer_class": "PreTrainedTokenizerFast"}
        files["tokenizer.json"] = _backend_of_2023(backend)
    files["tokenizer_config.json"] = config
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _sentencepiece_model(model: dict, unk_token: str) -> bytes:
    """A BPE vocabulary with its merges as a SentencePiece model of LLaMA's settings."""
    # a piece is as good as its first merge is early; single characters come last
    scores = {}
    for left, right in model["merges"]:
        scores.setdefault(left + right, -float(len(scores)))
    types = {unk_token: 2, "<s>": 3, "</s>": 3} | {f"<0x{byte:02X}>": 6 for byte in range(256)}
    content = b""
    for piece in sorted(model["vocab"], key=model["vocab"].get):
        score = struct.pack("<f", scores.get(piece, -float(len(scores))))
        content += _field(1, _field(1, piece.encode()) + b"\x15" + score + _field(3, types.get(piece, 1)))
    trainer = _field(3, 2) + _field(4, len(model["vocab"])) + _field(35, 1)  # BPE, size, bytes for unknown characters
    normalizer = _field(1, b"identity") + _field(3, 1) + _field(4, 0)  # a blank in front, no blanks dropped
    return content + _field(2, trainer) + _field(3, normalizer)


def _field(number: int, value: int | bytes) -> bytes:
    """A field of a protocol buffer, https://protobuf.dev/programming-guides/encoding: the packages that write them
    bind each release of sentencepiece to one of protobuf."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    low, rest = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + _varint(rest) if rest else bytes([low])


def _backend_of_2023(backend: dict) -> dict:
    """A parsed tokenizer.json without what came later."""

    def clean(part):
        if isinstance(part, list):
            return [clean(item) for item in part]
        if not isinstance(part, dict):
            return part
        if part.get("type") == "Metaspace":
            raise ConversionError(
                "The tokenizer puts its blanks by Metaspace as transformers does since 2024, which gives other ids in "
                "2023: this model cannot be exported with its tokenizer."
            )
        for name, value in part.items():
            if name in _NEW_FIELDS and value != _NEW_FIELDS[name]:
                raise ConversionError(f"The tokenizer has {name}={value}, which the tokenizers of 2023 do not know.")
        return {name: clean(value) for name, value in part.items() if name not in _NEW_FIELDS}

    model = backend["model"]
    if "merges" in model:
        pairs = [pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"]]
        if any(" " in piece for pair in pairs for piece in pair):
            raise ConversionError("The tokenizer merges pieces with blanks in them, which no file of 2023 can hold.")
        model = model | {"merges": [" ".join(pair) for pair in pairs]}
    parts = {name: clean(backend[name]) for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder")}
    model = {name: value for name, value in model.items() if name not in _NEW_FIELDS}
    return backend | parts | {"model": model}
