"""
What `test_legacy_tokens.py` compares with: tiny tokenizers in `tokens_2023/`, and their ids in transformers of 2023.

    python make_tokens_2023.py vocabularies                # with today's packages: trains llama/, neox/, opt/, fuyu/
    pip install transformers==4.28.1 "numpy<2" sentencepiece protobuf==3.20.3
    python make_tokens_2023.py ids                         # writes ids_4.28.json
    pip install transformers==4.35.2
    python make_tokens_2023.py ids                         # writes ids_4.35.json
"""

import json
import sys
import tempfile
from pathlib import Path


FOLDER = Path(__file__).parent / "tokens_2023"
OTTER_TOKENS = ["<|endofchunk|>", "<image>", "<answer>"]
TEXTS = [
    "<image>User: what is it? GPT:<answer> a cat.<|endofchunk|>",
    "<image>User:what is it? GPT:<answer>a cat.<|endofchunk|>",
    "<image>User: what is it? GPT:<answer>",
    " <image> User: what?  GPT: <answer> a  cat. <|endofchunk|> ",
    " a blank in front, one behind ",
    "<image>User: two\nlines\n\n\there? GPT:<answer> yes\nno\n<|endofchunk|>\n",
    "<image> <image><image>User: compare. GPT:<answer>    ok<|endofchunk|>",
    "<image>User: a? GPT:<answer> b<|endofchunk|>User: c? GPT:<answer> d<|endofchunk|><image>User: e? GPT:<answer>",
    "<image>User: 1234, 5.6% (x) #7! GPT:<answer> 42<|endofchunk|>",
    "<image>User:这是什么? GPT:<answer>一只猫😀。<|endofchunk|>",
    "<image>User: Что это? GPT:<answer> Кот.<|endofchunk|>",
    "<image>.User: x GPT:<answer>, y.<|endofchunk|>",
    "<image>[INST]{q}[/INST]<answer>a<|endofchunk|>",
    "",
    "   ",
    "<answer>\ta\u3000tab\xa0<|endofchunk|>",
    "<image>User: a </s> b <s> c <unk> d <PAD> GPT:<answer> d<|endofchunk|>",
]
MAP = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<PAD>"}
MAP["additional_special_tokens"] = OTTER_TOKENS
NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "model_max_length": 2048}
LLAMA = {**NAMES, "tokenizer_class": "LlamaTokenizer"}
AS_DICT = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
MAP_OF_DICTS = {key: {"content": MAP[key], **AS_DICT} for key in ("bos_token", "eos_token", "unk_token", "pad_token")}
# name -> tokenizer_config.json, special_tokens_map.json
DIALECTS = {
    "class_only": (LLAMA, MAP),
    "bos_legacy": ({**LLAMA, "add_bos_token": True, "add_eos_token": False, "legacy": True}, MAP),
    "no_bos": ({**LLAMA, "add_bos_token": False}, MAP),
    "empty_names": ({"tokenizer_class": "LLaMATokenizer", "bos_token": "", "eos_token": "", "unk_token": ""}, MAP),
    "no_class": (NAMES, MAP),
    "fast_class": ({**LLAMA, "tokenizer_class": "LlamaTokenizerFast"}, MAP),
    "map_of_dicts": (LLAMA, MAP_OF_DICTS),
    "no_map": (LLAMA, None),
}


def write_llama(folder: Path, dialect: str, size: int) -> None:
    """A folder of a dialect: the vocabulary, and Otter's tokens behind its `size` pieces."""
    config, special_tokens_map = DIALECTS[dialect]
    added = {token: size + index for index, token in enumerate([*OTTER_TOKENS, "<PAD>"])}
    files = {
        "tokenizer_config.json": config,
        "added_tokens.json": added,
        "special_tokens_map.json": special_tokens_map,
    }
    for name, content in files.items():
        if content is not None:
            (folder / name).write_text(json.dumps(content))
    (folder / "tokenizer.model").write_bytes((FOLDER / "llama" / "tokenizer.model").read_bytes())


def make_vocabularies() -> None:
    import sentencepiece
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    words = [path.read_text() for path in sorted((FOLDER.parents[2] / "docs").glob("*.md"))]
    lines = [line for text in words for line in text.splitlines() if line] + [text for text in TEXTS if text.strip()]
    (FOLDER / "llama").mkdir(exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(FOLDER / "llama" / "tokenizer"),
        model_type="bpe",
        vocab_size=640,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        num_threads=1,
    )
    (FOLDER / "llama" / "tokenizer.vocab").unlink()

    byte_level = {"vocab_size": 400, "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    neox = Tokenizer(models.BPE())
    neox.normalizer = normalizers.NFC()
    neox.pre_tokenizer, neox.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    neox.train_from_iterator(
        lines, trainers.BpeTrainer(special_tokens=["<|endoftext|>", "<|padding|>"], show_progress=False, **byte_level)
    )
    save_backend(neox, "neox")
    names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    write_config("neox", {**names, "add_prefix_space": False, "tokenizer_class": "GPTNeoXTokenizer"})

    opt = Tokenizer(models.BPE())
    opt.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    opt.train_from_iterator(
        lines,
        trainers.BpeTrainer(special_tokens=["<s>", "<pad>", "</s>", "<unk>"], show_progress=False, **byte_level),
    )
    (FOLDER / "opt").mkdir(exist_ok=True)
    model = json.loads(opt.to_str())["model"]
    (FOLDER / "opt" / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False))
    merges = [" ".join(pair) for pair in model["merges"]]
    (FOLDER / "opt" / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    names = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    config = {
        "add_bos_token": True,
        "add_prefix_space": False,
        "errors": "replace",
        "tokenizer_class": "GPT2Tokenizer",
    }
    write_config("opt", {**names, **config})

    fuyu = Tokenizer(models.Unigram())
    fuyu.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "|ENDOFTEXT|", "<s>", "</s>", "|SPEAKER|", "|NEWLINE|"]
    trainer = trainers.UnigramTrainer(
        vocab_size=400, special_tokens=special, unk_token="<unk>", show_progress=False, max_piece_length=8
    )
    fuyu.train_from_iterator([line.replace(" ", " ▁") for line in lines], trainer)
    fuyu.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    save_backend(fuyu, "fuyu")
    names = {"bos_token": "|ENDOFTEXT|", "eos_token": "|ENDOFTEXT|", "unk_token": "<unk>"}
    write_config(
        "fuyu", {**names, "add_bos_token": False, "add_eos_token": False, "tokenizer_class": "LlamaTokenizer"}
    )


def save_backend(tokenizer, name: str) -> None:
    """tokenizer.json as tokenizers 0.13 wrote it: a merge is a text."""
    (FOLDER / name).mkdir(exist_ok=True)
    backend = json.loads(tokenizer.to_str())
    model = {key: value for key, value in backend["model"].items() if key != "ignore_merges"}
    if "merges" in model:
        model["merges"] = [" ".join(pair) for pair in model["merges"]]
    (FOLDER / name / "tokenizer.json").write_text(json.dumps(backend | {"model": model}, ensure_ascii=False))


def write_config(name: str, config: dict) -> None:
    (FOLDER / name / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def make_ids() -> None:
    import sentencepiece
    import transformers
    from transformers import AutoTokenizer, LlamaTokenizer, LlamaTokenizerFast

    def rows(tokenizer, otter=True):
        if otter:
            tokenizer.add_special_tokens({"additional_special_tokens": OTTER_TOKENS})
            if tokenizer.pad_token is None:
                tokenizer.add_special_tokens({"pad_token": "<PAD>"})
        ids = [tokenizer(text)["input_ids"] for text in TEXTS]
        decoded = [tokenizer.decode(row, skip_special_tokens=True) for row in ids]
        return {"size": len(tokenizer), "pad": tokenizer.pad_token_id, "ids": ids, "decoded": decoded}

    version = transformers.__version__.rpartition(".")[0]
    size = sentencepiece.SentencePieceProcessor(model_file=str(FOLDER / "llama" / "tokenizer.model")).get_piece_size()
    result = {"made_with": f"transformers {transformers.__version__}", "texts": TEXTS, "llama_size": size}
    for dialect in DIALECTS:
        with tempfile.TemporaryDirectory() as folder:
            write_llama(Path(folder), dialect, size)
            # the slow one is what Otter used in the spring; in the autumn both gave the same
            tokenizer_class = LlamaTokenizer if version == "4.28" else LlamaTokenizerFast
            result[dialect] = rows(tokenizer_class.from_pretrained(folder))
    for name in ("neox", "opt"):
        result[name] = rows(AutoTokenizer.from_pretrained(FOLDER / name))
    result["fuyu"] = rows(LlamaTokenizerFast.from_pretrained(FOLDER / "fuyu"), otter=False)
    (FOLDER / f"ids_{version}.json").write_text(json.dumps(result, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    {"vocabularies": make_vocabularies, "ids": make_ids}[sys.argv[1]]()
