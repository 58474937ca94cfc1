"""
Tokenizers of 2023, read to the ids of 2023.

From the same LLaMA files (SentencePiece, Kudo and Richardson 2018, https://huggingface.co/papers/1808.06226)
transformers of 2023 made other ids than today's, and two generations of it different ones:

- `"4.28"`: the slow tokenizer of 4.28 to 4.33, with which Otter's published LLaMA models were trained. White space
  beside an added token is dropped.
- `"4.35"`: 4.34 and 4.35, slow and fast. Nothing is dropped.

In both, every piece of text between added tokens gets a blank in front, and the whole a BOS token unless the folder
says no. Tokenizers of the other language models (GPT-NeoX for MPT, OPT, Falcon) give the same ids in all versions.
"""

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerFast
from transformers.utils import cached_file, logging

from ..model_names import split_revision


if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor


logger = logging.get_logger(__name__)

# token text -> field of the configuration, in the order in which the 2023 code added them to a base tokenizer
SPECIAL_TOKENS = {
    "<|endofchunk|>": "end_of_chunk_token_id",
    "<image>": "image_token_id",
    "<answer>": "answer_token_id",
}
PAD_TOKEN = "<PAD>"
# arguments of `from_pretrained` that say where and as whom to look for a file of a repository
HUB_ARGUMENTS = ("cache_dir", "revision", "token", "local_files_only", "subfolder")
# version of transformers -> whether white space beside an added token is dropped
REFERENCES = {"4.28": True, "4.35": False}

_VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LLAMA_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
# what tells a LLaMA vocabulary from others of SentencePiece: blanks, case and all characters stay as they are
_PROBES = ("Hello world", "  two  blanks ", "a\n\tb", "№ ﬁ Ａ é 12345 的 \u200b😀", "")


@dataclass(frozen=True)
class TokenTable:
    """Added tokens of a tokenizer (text -> id), its size (one more than its largest id), its eos and padding token."""

    ids: Mapping[str, int]
    size: int
    eos_token: str | None = None
    pad_token: str | None = None


class _Files:
    """The files of a tokenizer in a folder or repository: parsed JSON (empty where missing) and paths (or None)."""

    def __init__(self, name_or_path, **hub_kwargs):
        self.name = str(Path(name_or_path).parent if Path(name_or_path).is_file() else name_or_path)
        self._hub_kwargs = hub_kwargs
        self.config = self._read("tokenizer_config.json")
        self.added = self._read("added_tokens.json")
        # the later file has the last word, as in 2023; an empty text says nothing
        self.named = {key: self.config[key] for key in _NAMED_TOKENS if self.config.get(key)}
        special_tokens_map = self._read("special_tokens_map.json")
        self.named |= {key: special_tokens_map[key] for key in _NAMED_TOKENS if special_tokens_map.get(key)}
        # saved by us as this version of transformers read it
        self.reference = self.config.get("tokenizer_reference")
        # of these a text and an AddedToken meant different things, see `_read_llama`
        self.plain = {key for key in _NAMED_TOKENS if isinstance(special_tokens_map.get(key), str)}
        for source in (self.config, special_tokens_map):
            for key in ("additional_special_tokens", "extra_special_tokens"):
                if isinstance(source.get(key), list):
                    self.additional = [_text(token) for token in source[key]]
        for token_id, entry in (self.config.get("added_tokens_decoder") or {}).items():
            self.added.setdefault(_text(entry), int(token_id))

    additional: Sequence[str] = ()

    def path(self, filename: str) -> str | None:
        return cached_file(
            self.name,
            filename,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
            **self._hub_kwargs,
        )

    def _read(self, filename: str) -> dict:
        path = self.path(filename)
        return json.loads(Path(path).read_text(encoding="utf-8")) if path else {}

    def token(self, key: str) -> str | None:
        return _text(self.named[key]) if key in self.named else None

    def read_backend(self) -> dict:
        """The parsed tokenizer.json; its added tokens join `added`."""
        backend = self._read("tokenizer.json")
        for entry in backend.get("added_tokens") or ():
            self.added.setdefault(entry["content"], entry["id"])
        return backend


def _at_revision(name_or_path, hub_kwargs: dict) -> tuple[str, dict]:
    """`owner/name@revision` as the name and the arguments that say the same; others as they are."""
    name, revision = split_revision(str(name_or_path))
    return name, hub_kwargs | ({"revision": revision} if name != str(name_or_path) else {})


def _text(token) -> str:
    """A token as JSON files write it: its text, or the fields of an AddedToken."""
    return token["content"] if isinstance(token, dict) else token


def load_tokenizer(
    name_or_path, *, legacy: bool = False, reference: str | None = None, **hub_kwargs
) -> PreTrainedTokenizerFast:
    """
    The tokenizer of a folder or repository; one of 2023 with the ids of 2023, which it keeps when it is saved.

    Args:
        name_or_path: a revision may follow an `@`.
        legacy: whether it is to serve a model of 2023. Otherwise those are taken as of 2023 that say so themselves:
            saved by us from one, or a LLaMA `tokenizer.model` without the tokenizer.json that everyone writes today.
        reference: a key of `REFERENCES`, for a LLaMA tokenizer of 2023; by default as it was saved, or `"4.28"`.
        hub_kwargs: those of `HUB_ARGUMENTS`.

    Raises:
        OSError: if there is no tokenizer.
        ValueError: if `reference` is unknown or the tokenizer is not of 2023, or for a vocabulary that was not read
            as LLaMA's in 2023.
    """
    name_or_path, hub_kwargs = _at_revision(name_or_path, hub_kwargs)
    files = _Files(name_or_path, **hub_kwargs)
    tokenizer = _load(files, legacy, reference, **hub_kwargs)
    if (read := tokenizer.init_kwargs.get("tokenizer_reference")) != files.reference:
        logger.warning(
            f"{files.name}: a LLaMA tokenizer of 2023, read to the ids of transformers {read} (tokenizer_reference "
            f"can be {' or '.join(REFERENCES)}); today's AutoTokenizer gives others."
        )
    return tokenizer


def _load(files: "_Files", legacy: bool, reference: str | None, **hub_kwargs) -> PreTrainedTokenizerFast:
    if reference is not None and reference not in REFERENCES:
        raise ValueError(f"tokenizer_reference is {reference!r}; use one of {', '.join(map(repr, REFERENCES))}.")
    if not any(map(files.path, _VOCABULARY_FILES)):
        # transformers would make an empty tokenizer, and say nothing
        raise OSError(f"{files.name} holds no tokenizer.")
    if files.reference is not None:
        tokenizer = AutoTokenizer.from_pretrained(files.name, config=PreTrainedConfig(), **hub_kwargs)
        return tokenizer if reference in (None, files.reference) else _change_reference(tokenizer, reference)
    tokenizer = _read_llama(files, reference or next(iter(REFERENCES)), legacy)
    if tokenizer is not None:
        return tokenizer
    if legacy:
        return _read_other(files, **hub_kwargs)
    if reference is not None:
        raise ValueError(
            f"tokenizer_reference is {reference!r}, but {files.name} holds no tokenizer of 2023: leave it out."
        )
    return AutoTokenizer.from_pretrained(files.name, **hub_kwargs)


def _read_llama(files: _Files, reference: str, legacy: bool) -> PreTrainedTokenizerFast | None:
    """The tokenizer of a LLaMA folder of 2023; None if it holds another."""
    model_file, backend = files.path("tokenizer.model"), files.read_backend()
    if not legacy and (model_file is None or backend):
        return None
    pieces = None if model_file is None else _read_sentencepiece(model_file)
    if pieces is not None:
        vocabulary, merges = _merges_by_score(pieces)
    elif _is_llama_backend(backend, files.config):
        vocabulary, merges = backend["model"]["vocab"], backend["model"]["merges"]
        merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in merges]
    else:
        return None
    tokenizer = Tokenizer(BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    if pieces is not None and any(tokenizer.encode(text).ids != pieces.encode(text) for text in _PROBES):
        if not legacy:
            return None
        raise ValueError(
            f"{model_file} is no vocabulary of LLaMA's kind, which those of 2023 were: pass tokenizer= with the one "
            "that the model was trained with."
        )

    named = _LLAMA_TOKENS | {key: _text(token) for key, token in files.named.items()}
    # 2023 gave a named token without an id the next one; <PAD> comes behind the tokens of the model
    missing = [token for token in named.values() if token not in files.added and token != PAD_TOKEN]
    if PAD_TOKEN not in files.added and named.get("pad_token") == PAD_TOKEN:
        del named["pad_token"]
    # Beside a token that it knew as an AddedToken 2023 kept white space. Its class turned the texts of these three
    # into AddedTokens, and the map, if it holds texts, back.
    keeping = [key for key, token in files.named.items() if isinstance(token, dict)]
    keeping = {named.get(key) for key in (*keeping, *_LLAMA_TOKENS) if key not in files.plain}
    special = {*named.values(), *files.additional, *SPECIAL_TOKENS, PAD_TOKEN}
    for token in dict.fromkeys([*_LLAMA_TOKENS.values(), *sorted(files.added, key=files.added.get), *missing]):
        strips = REFERENCES[reference] and token not in keeping
        flags = {"lstrip": strips, "rstrip": strips, "normalized": False, "special": token in special}
        tokenizer.add_tokens([AddedToken(token, **flags)])
    for token, token_id in files.added.items():
        if tokenizer.token_to_id(token) != token_id:
            raise ValueError(
                f"{files.name} gives {token!r} the id {token_id}, but behind a vocabulary of {len(vocabulary)} it "
                f"would be {tokenizer.token_to_id(token)}: added_tokens.json must name all ids without a gap."
            )
    tokenizer.decoder = _decoder(tokenizer, reference)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **named,
        **{key: files.config[key] for key in ("model_max_length", "chat_template") if files.config.get(key)},
        add_bos_token=files.config.get("add_bos_token") is not False,
        add_eos_token=bool(files.config.get("add_eos_token")),
        clean_up_tokenization_spaces=False,
        extra_special_tokens=[token for token in files.additional if token in files.added],
        model_input_names=["input_ids", "attention_mask"],
        name_or_path=files.name,
        tokenizer_reference=reference,
    )


def _change_reference(tokenizer: PreTrainedTokenizerFast, reference: str) -> PreTrainedTokenizerFast:
    """What `_read_llama` made for the other reference, for this one."""
    backend = tokenizer.backend_tokenizer
    flags = {"lstrip": REFERENCES[reference], "rstrip": REFERENCES[reference], "normalized": False}
    for token in backend.get_added_tokens_decoder().values():
        backend.add_tokens([AddedToken(token.content, special=token.special, **flags)])
    backend.decoder = _decoder(backend, reference)
    tokenizer.init_kwargs["tokenizer_reference"] = reference
    return tokenizer


def _read_sentencepiece(path: str) -> "SentencePieceProcessor | None":
    """A SentencePiece model with pieces for all bytes, as LLaMA's; None for another kind of file or model."""
    from sentencepiece import SentencePieceProcessor

    try:
        pieces = SentencePieceProcessor(model_file=path)
    except (OSError, RuntimeError):
        return None
    return pieces if any(map(pieces.is_byte, range(pieces.get_piece_size()))) else None


def _merges_by_score(pieces: "SentencePieceProcessor") -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Pieces -> ids, and the pairs of pieces that make a piece, those of the best score first."""
    size = pieces.get_piece_size()
    vocabulary = {pieces.id_to_piece(token_id): token_id for token_id in range(size)}
    merges = []
    for piece, token_id in vocabulary.items():
        if not (pieces.is_control(token_id) or pieces.is_unknown(token_id) or pieces.is_byte(token_id)):
            pairs = ((piece[:end], piece[end:]) for end in range(1, len(piece)))
            score = pieces.get_score(token_id)
            merges += [(score, pair) for pair in pairs if pair[0] in vocabulary and pair[1] in vocabulary]
    merges.sort(key=lambda merge: -merge[0])  # equal scores belong to one piece
    return vocabulary, [pair for _, pair in merges]


def _is_llama_backend(backend: dict, config: dict) -> bool:
    """Whether a tokenizer.json is LLaMA's and was read by its class, which leaves no trace in the file."""
    tokenizer_class = (config.get("tokenizer_class") or "LlamaTokenizer").lower().removesuffix("fast")
    return tokenizer_class == "llamatokenizer" and (backend.get("model") or {}).get("byte_fallback") is True


def _decoder(tokenizer: Tokenizer, reference: str) -> decoders.Decoder:
    """Pieces -> text as 2023 wrote it: the earlier code put a blank in front of an added token."""
    added = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    spaced = [token for token in added if REFERENCES[reference] and token not in _LLAMA_TOKENS.values()]
    return decoders.Sequence(
        [
            *(decoders.Replace(token, f" {token}") for token in spaced),
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )


def _read_other(files: _Files, **hub_kwargs) -> PreTrainedTokenizerFast:
    """A tokenizer whose ids are those of 2023, with the special tokens that its files of 2023 name."""
    # without its model's configuration, which is read through this function itself
    tokenizer = AutoTokenizer.from_pretrained(files.name, config=PreTrainedConfig(), **hub_kwargs)
    if "pad_token" not in files.named and not files.read_backend().get("padding"):
        # today's class of GPT-NeoX names its <|padding|>; that of 2023 did not, so that <PAD> was added
        tokenizer.pad_token = None
    return add_special_tokens(tokenizer, [token for token in files.additional if token in files.added], pad=False)


def add_special_tokens(tokenizer, tokens: Sequence[str], *, pad: bool = True, num_rows: int | None = None):
    """
    Make `tokens` special tokens of a tokenizer: those it lacks get the next free ids, in this order.

    Args:
        pad: add `<PAD>`, too, if the tokenizer has no padding token.
        num_rows: of the model's embeddings. A `<PAD>` for which there is no row is not added: `eos_token` pads.

    Returns:
        the tokenizer.
    """
    reference = tokenizer.init_kwargs.get("tokenizer_reference")
    strips = REFERENCES.get(reference, False)
    known = {str(token): token for token in tokenizer.added_tokens_decoder.values()}

    def special(text):
        if text in known and known[text].special:
            return known[text]
        return AddedToken(text, lstrip=strips, rstrip=strips, normalized=False, special=True)

    tokens = {"extra_special_tokens": [special(token) for token in tokens]}
    tokenizer.add_special_tokens(tokens, replace_extra_special_tokens=False)
    if pad and tokenizer.pad_token is None:
        if num_rows is not None and len(tokenizer) >= num_rows and PAD_TOKEN not in known:
            tokenizer.pad_token = tokenizer.eos_token
        else:
            tokenizer.add_special_tokens({"pad_token": special(PAD_TOKEN)})
    if reference is not None:
        tokenizer.backend_tokenizer.decoder = _decoder(tokenizer.backend_tokenizer, reference)
    return tokenizer


def read_token_table(source, model_type: str | None = None, num_rows: int | None = None, **hub_kwargs) -> TokenTable:
    """
    The token ids of a tokenizer for a model of 2023.

    Args:
        source: a tokenizer; or a folder or Hub repository, of which no tokenizer is made if its files tell all.
            A base tokenizer is read as the 2023 code extended it: `<|endofchunk|>`, `<image>`, for Otter `<answer>`,
            and `<PAD>` if it has no padding token, at the next free ids.
        model_type: `"otter"` or `"flamingo"`, for a base tokenizer.
        num_rows: see [`add_special_tokens`].
        hub_kwargs: those of `HUB_ARGUMENTS` that belong to a folder or repository.

    Returns:
        an empty table if a folder or repository holds no tokenizer.
    """
    wanted = [token for token in SPECIAL_TOKENS if token != "<answer>" or model_type == "otter"]
    if isinstance(source, (str, Path)):
        source, hub_kwargs = _at_revision(source, hub_kwargs)
        files = _Files(source, **hub_kwargs)
        table = _read_table(files)
        if {*wanted, table.eos_token, table.pad_token} <= set(table.ids):
            return table
        try:
            source = _load(files, True, None, **hub_kwargs)
        except OSError:
            return table
    else:
        source = copy.deepcopy(source)
    add_special_tokens(source, wanted, num_rows=num_rows)
    ids = source.get_added_vocab()
    ids |= {token: source.convert_tokens_to_ids(token) for token in source.all_special_tokens}
    return TokenTable(ids, len(source), source.eos_token, source.pad_token)


def _read_table(files: _Files) -> TokenTable:
    """What the files tell before a tokenizer is made of them."""
    vocabulary = (files.read_backend().get("model") or {}).get("vocab") or {}
    # Unigram models list their tokens, in the order of their ids
    largest = max(vocabulary.values()) if isinstance(vocabulary, dict) and vocabulary else len(vocabulary) - 1
    ids, eos_token, model_file = dict(files.added), files.token("eos_token"), files.path("tokenizer.model")
    pieces = None if model_file is None else _read_sentencepiece(model_file)
    if pieces is not None:
        eos_token = eos_token or _LLAMA_TOKENS["eos_token"]
        ids.setdefault(eos_token, pieces.piece_to_id(eos_token))
        largest = max(largest, pieces.get_piece_size() - 1)
    return TokenTable(ids, max([largest, *ids.values()]) + 1, eos_token, files.token("pad_token"))
