"""Tokenizers of 2023: the ids that transformers 4.28.1 and 4.35.2 gave, through everything that reads one here."""

import importlib.util
import json
import os
import shutil
from pathlib import Path

import pytest
from make_tokens_2023 import DIALECTS, OTTER_TOKENS, TEXTS, write_llama
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from transformers import AutoConfig, AutoProcessor, AutoTokenizer, IdeficsImageProcessorPil

from otter_hf import FlamingoProcessor, OtterProcessor
from otter_hf.cli.chat import loading_options
from otter_hf.conversion.export_tokenizer import save_tokenizer_2023
from otter_hf.data import OtterCollator
from otter_hf.loading import load_processor, read_processor
from otter_hf.models.legacy_tokens import PAD_TOKEN, SPECIAL_TOKENS, load_tokenizer, read_token_table
from otter_hf.models.otterhd.processing_otterhd import TokenizersBackend
from otter_hf.prompts import FORMATS, render
from otter_hf.testing.otter import build_tokenizer


DATA = Path(__file__).parent / "tokens_2023"
IDS = {reference: json.loads((DATA / f"ids_{reference}.json").read_text()) for reference in ("4.28", "4.35")}
SIZE = IDS["4.28"]["llama_size"]
VISION = {"model_type": "clip_vision_model", "image_size": 28}
LLAMA = {"model_type": "llama", "_name_or_path": "luodian/llama-7b-hf", "vocab_size": SIZE + 4}
REFERENCES = pytest.mark.parametrize("reference", IDS)


def write_config(folder, text_config=LLAMA, model_type="otter"):
    config = {"model_type": model_type, "text_config": text_config, "vision_config": VISION}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture
def folder(tmp_path):
    """An Otter of spring 2023, but for its weights."""
    write_llama(tmp_path, "class_only", SIZE)
    write_config(tmp_path)
    return tmp_path


@pytest.fixture
def base(tmp_path):
    """The LLaMA such a folder names: a vocabulary and a tokenizer_config.json of the oldest kind."""
    path = tmp_path / "base"
    path.mkdir()
    write_llama(path, "no_map", SIZE)
    (path / "added_tokens.json").unlink()
    return path


def ids_of(tokenizer, texts=TEXTS, **kwargs):
    return [tokenizer(text, **kwargs)["input_ids"] for text in texts]


class TestIds:
    @REFERENCES
    @pytest.mark.parametrize("dialect", DIALECTS)
    def test_every_dialect_saved_and_read_again(self, tmp_path, dialect, reference):
        write_llama(tmp_path, dialect, SIZE)
        write_config(tmp_path)
        expected = IDS[reference][dialect]
        tokenizer = AutoProcessor.from_pretrained(tmp_path, tokenizer_reference=reference).tokenizer
        assert ids_of(tokenizer) == expected["ids"]
        assert [tokenizer.decode(ids, skip_special_tokens=True) for ids in expected["ids"]] == expected["decoded"]
        assert (len(tokenizer), tokenizer.pad_token_id) == (expected["size"], expected["pad"])
        without = [ids[1:] if dialect != "no_bos" else ids for ids in expected["ids"]]
        assert ids_of(tokenizer, add_special_tokens=False) == without

        tokenizer.save_pretrained(tmp_path / "saved")
        alone = Tokenizer.from_file(str(tmp_path / "saved" / "tokenizer.json"))
        assert [alone.encode(text).ids for text in TEXTS] == expected["ids"]
        again = AutoTokenizer.from_pretrained(tmp_path / "saved")
        assert ids_of(again) == expected["ids"]
        assert [again.decode(ids) for ids in expected["ids"]] == [tokenizer.decode(ids) for ids in expected["ids"]]

    def test_the_earlier_reading_is_the_default_and_told_in_one_line(self, folder, caplog):
        assert ids_of(OtterProcessor.from_pretrained(folder).tokenizer) == IDS["4.28"]["class_only"]["ids"]
        (line,) = [record.message for record in caplog.records if "2023" in record.message]
        assert "ids of transformers 4.28 (tokenizer_reference can be 4.28 or 4.35)" in line
        caplog.clear()
        OtterProcessor.from_pretrained(folder).save_pretrained(folder / "saved")
        caplog.clear()
        saved = AutoProcessor.from_pretrained(folder / "saved")
        assert not caplog.records
        assert ids_of(saved.tokenizer) == IDS["4.28"]["class_only"]["ids"]
        other = AutoProcessor.from_pretrained(folder / "saved", tokenizer_reference="4.35")
        assert ids_of(other.tokenizer) == IDS["4.35"]["class_only"]["ids"]

    def test_a_text_model_s_configuration_beside_it_changes_nothing(self, folder):
        OtterProcessor.from_pretrained(folder).tokenizer.save_pretrained(folder / "saved")
        (folder / "saved" / "config.json").write_text('{"model_type": "llama"}')
        assert ids_of(AutoTokenizer.from_pretrained(folder / "saved")) == IDS["4.28"]["class_only"]["ids"]

    @REFERENCES
    def test_a_tokenizer_json_of_the_class_of_llama(self, folder, reference):
        processor = OtterProcessor.from_pretrained(folder)
        processor.tokenizer.save_pretrained(folder)
        (folder / "tokenizer.model").unlink()
        (folder / "tokenizer_config.json").write_text(json.dumps(DIALECTS["class_only"][0]))
        tokenizer = OtterProcessor.from_pretrained(folder, tokenizer_reference=reference).tokenizer
        assert ids_of(tokenizer) == IDS[reference]["class_only"]["ids"]

    @REFERENCES
    def test_the_folder_of_a_base(self, folder, base, reference):
        for file in folder.glob("*token*"):
            file.unlink()
        options = {"tokenizer": str(base), "tokenizer_reference": reference}
        tokenizer = OtterProcessor.from_pretrained(folder, **options).tokenizer
        assert ids_of(tokenizer) == IDS[reference]["no_map"]["ids"]
        assert ids_of(load_processor(str(folder), **options).tokenizer) == IDS[reference]["no_map"]["ids"]
        config = AutoConfig.from_pretrained(folder, tokenizer=str(base))
        added = [config.end_of_chunk_token_id, config.image_token_id, config.answer_token_id, config.pad_token_id]
        assert added == [SIZE, SIZE + 1, SIZE + 2, SIZE + 3]
        assert config.eos_token_id == [2, SIZE]

    def test_llama_of_mistral_with_the_golden_ids(self, golden, tmp_path):
        vocabulary = os.environ.get("OTTER_LLAMA_VOCABULARY")
        package = importlib.util.find_spec("mistral_common")
        if vocabulary is None and package is not None:
            vocabulary = Path(package.origin).parent / "data" / "tokenizer.model.v1"
        if vocabulary is None or not Path(vocabulary).is_file():
            pytest.skip("set OTTER_LLAMA_VOCABULARY to tokenizer.model.v1 of the wheel mistral-common 1.13.1")
        facts = json.loads((golden / "tokens" / "llama_2023.json").read_text())
        for name, files in facts["folders"].items():
            folder = tmp_path / name
            folder.mkdir()
            for file, content in files.items():
                (folder / file).write_text(json.dumps(content))
            shutil.copy(vocabulary, folder / "tokenizer.model")
            for reference, rows in (("4.28", facts["R1"]["rows"]), ("4.35", facts["R2"]["rows"])):
                tokenizer = OtterProcessor.from_pretrained(folder, tokenizer_reference=reference).tokenizer
                expected = [row["ids_without_special" if name == "bosF" else "ids"] for row in rows]
                different = [
                    text for text, ids in enumerate(ids_of(tokenizer, facts["texts"])) if ids != expected[text]
                ]
                assert not different or (reference, name, different) in (
                    ("4.28", "mapdicts", [24]),
                    ("4.28", "nomap", [24]),
                )
                for row in rows:
                    text = tokenizer.decode(row["ids_without_special"], skip_special_tokens=True)
                    assert text == row["decoded_skip_special"]


class TestOtherTokenizers:
    @REFERENCES
    @pytest.mark.parametrize("name", ["neox", "opt"])
    def test_of_mpt_neox_and_opt(self, tmp_path, name, reference):
        expected = IDS[reference][name]
        tokenizer = load_tokenizer(DATA / name, legacy=True, reference=reference)
        tokenizer = OtterProcessor.prepare_tokenizer(tokenizer)
        assert ids_of(tokenizer) == expected["ids"]
        assert (len(tokenizer), tokenizer.pad_token_id) == (expected["size"], expected["pad"])
        tokenizer.save_pretrained(tmp_path)
        assert ids_of(AutoTokenizer.from_pretrained(tmp_path)) == expected["ids"]
        table = read_token_table(DATA / name, "otter")
        assert (table.size, table.ids[table.pad_token]) == (expected["size"], expected["pad"])

    def test_of_otterhd(self):
        # with the class that `OtterHDProcessor` takes; the one that the files name gives other ids today
        tokenizer = TokenizersBackend.from_pretrained(DATA / "fuyu")
        for reference in IDS:
            assert ids_of(tokenizer) == IDS[reference]["fuyu"]["ids"]
        assert ids_of(AutoTokenizer.from_pretrained(DATA / "fuyu")) != IDS["4.35"]["fuyu"]["ids"]


class TestEntryPoints:
    @REFERENCES
    def test_chat_and_training_write_the_same_ids(self, folder, reference):
        processor = AutoProcessor.from_pretrained(folder, tokenizer_reference=reference)
        messages = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "a cat."}]},
        ]
        prompt = processor.apply_chat_template(messages[:1], add_generation_prompt=True, tokenize=False)
        index = TEXTS.index(prompt)
        assert processor.tokenizer(prompt)["input_ids"] == IDS[reference]["class_only"]["ids"][index]
        sample = {"id": "0", "turns": [["what is it?", "a cat."]], "media_per_turn": [1], "media": [[None]]}
        for name, pieces in FORMATS.items():
            if "<answer>" not in pieces.reply or "<image>" not in pieces.media:
                continue
            if pieces.end not in processor.tokenizer.get_vocab():
                continue
            collator = OtterCollator(processor, format=name)
            text = render(sample["turns"], name, sample["media_per_turn"])
            (tokens,) = collator._tokenize([sample])
            assert collator._prefix + tokens == processor.tokenizer(text)["input_ids"]

    def test_special_tokens_are_not_shown(self, folder):
        # today's classes take tokens for special only if tokenizer_config.json names them, too
        for name in (folder, DATA / "neox"):
            tokenizer = OtterProcessor.prepare_tokenizer(load_tokenizer(name, legacy=True))
            ids = tokenizer("<image>User: what? GPT:<answer> a cat<|endofchunk|>")["input_ids"]
            stream, shown = DecodeStream(skip_special_tokens=True), []
            for token_id in ids:
                shown.append(stream.step(tokenizer.backend_tokenizer, token_id) or "")
            assert "".join(shown).strip() == tokenizer.decode(ids, skip_special_tokens=True).strip()
            assert "<" not in "".join(shown)

    def test_idefics_has_those_of_its_fast_tokenizer(self, tmp_path):
        write_llama(tmp_path, "class_only", SIZE)
        old = {"model_type": "idefics", "transformers_version": "4.32.0.dev0"}
        (tmp_path / "config.json").write_text(json.dumps(old))
        IdeficsImageProcessorPil(image_size=28).save_pretrained(tmp_path)
        processor = read_processor(str(tmp_path))
        assert ids_of(processor.tokenizer) == IDS["4.35"]["class_only"]["ids"]
        asked = read_processor(str(tmp_path), tokenizer_reference="4.28")
        assert ids_of(asked.tokenizer) == IDS["4.28"]["class_only"]["ids"]
        processor.save_pretrained(tmp_path / "saved")
        (tmp_path / "saved" / "config.json").write_text('{"model_type": "idefics", "transformers_version": "5.23.0"}')
        assert ids_of(read_processor(str(tmp_path / "saved")).tokenizer) == IDS["4.35"]["class_only"]["ids"]

    def test_the_command_line_names_the_reading(self, folder):
        from otter_hf.cli import build_parser

        arguments = build_parser().parse_args(["serve", str(folder), "--tokenizer-reference", "4.35"])
        options = loading_options(arguments)
        assert options["tokenizer_reference"] == "4.35"
        processor = load_processor(str(folder), tokenizer_reference="4.35")
        assert ids_of(processor.tokenizer) == IDS["4.35"]["class_only"]["ids"]

    @REFERENCES
    def test_exported_it_is_a_folder_of_2023_again(self, folder, reference):
        # the ids of these files in 4.28.1 and 4.35.2 themselves were compared when this was written
        tokenizer = OtterProcessor.from_pretrained(folder, tokenizer_reference=reference).tokenizer
        exported = folder / "exported"
        exported.mkdir()
        save_tokenizer_2023(tokenizer, exported)
        assert not (exported / "tokenizer.json").exists()
        write_config(exported)
        again = OtterProcessor.from_pretrained(exported, tokenizer_reference=reference).tokenizer
        assert ids_of(again) == IDS[reference]["class_only"]["ids"]

    def test_another_tokenizer_is_exported_in_the_format_of_2023(self, tmp_path):
        tokenizer = OtterProcessor.prepare_tokenizer(load_tokenizer(DATA / "neox", legacy=True))
        save_tokenizer_2023(tokenizer, tmp_path)
        content = json.loads((tmp_path / "tokenizer.json").read_text())
        assert all(isinstance(merge, str) for merge in content["model"]["merges"])
        assert ids_of(AutoTokenizer.from_pretrained(tmp_path)) == IDS["4.35"]["neox"]["ids"]


class TestGapsAndRefusals:
    def test_a_padding_token_without_an_id_gets_the_next_one(self, folder):
        (folder / "added_tokens.json").write_text(json.dumps({t: SIZE + i for i, t in enumerate(OTTER_TOKENS)}))
        processor = AutoProcessor.from_pretrained(folder)
        assert processor.tokenizer.pad_token_id == AutoConfig.from_pretrained(folder).pad_token_id == SIZE + 3
        assert processor(text=["a", "a b c"])["attention_mask"]

    def test_a_padding_token_without_a_row_is_not_added(self, folder):
        (folder / "added_tokens.json").write_text(json.dumps({t: SIZE + i for i, t in enumerate(OTTER_TOKENS)}))
        write_config(folder, LLAMA | {"vocab_size": SIZE + 3})
        tokenizer = AutoProcessor.from_pretrained(folder).tokenizer
        assert PAD_TOKEN not in tokenizer.get_vocab()
        assert tokenizer.pad_token_id == AutoConfig.from_pretrained(folder).pad_token_id == tokenizer.eos_token_id == 2

    def test_a_gap_between_the_ids(self, folder):
        added = {"<|endofchunk|>": SIZE, "<image>": SIZE + 1, "<answer>": SIZE + 3}
        (folder / "added_tokens.json").write_text(json.dumps(added))
        with pytest.raises(ValueError, match=f"gives '<answer>' the id {SIZE + 3}, .* it would be {SIZE + 2}"):
            OtterProcessor.from_pretrained(folder)

    def test_answer_added_to_a_flamingo_drops_blanks_like_the_others(self, base):
        tokenizer = FlamingoProcessor.prepare_tokenizer(load_tokenizer(base, legacy=True))
        tokenizer = OtterProcessor.prepare_tokenizer(tokenizer)
        image, answer = tokenizer.convert_tokens_to_ids(["<image>", "<answer>"])
        word = tokenizer("a", add_special_tokens=False)["input_ids"]
        assert tokenizer("<image> a <answer> a")["input_ids"] == [1, image, *word, answer, *word]

    def test_new_models_keep_their_tokenizers(self, tmp_path):
        OtterProcessor.prepare_tokenizer(build_tokenizer()).save_pretrained(tmp_path)
        before = ids_of(AutoTokenizer.from_pretrained(tmp_path))
        assert ids_of(load_tokenizer(tmp_path)) == before
        with pytest.raises(ValueError, match="tokenizer_reference is '4.35', but .* holds no tokenizer of 2023"):
            load_tokenizer(tmp_path, reference="4.35")

    def test_wrong_references(self, folder):
        with pytest.raises(ValueError, match="tokenizer_reference is '4.31'; use one of '4.28', '4.35'"):
            OtterProcessor.from_pretrained(folder, tokenizer_reference="4.31")
        tokenizer = OtterProcessor.from_pretrained(folder).tokenizer
        with pytest.raises(ValueError, match="but tokenizer is a tokenizer already"):
            OtterProcessor.from_pretrained(folder, tokenizer=tokenizer, tokenizer_reference="4.35")

    def test_no_tokenizer(self, tmp_path):
        write_config(tmp_path)
        with pytest.raises(OSError, match="holds no tokenizer"):
            OtterProcessor.from_pretrained(tmp_path)
        assert not read_token_table(tmp_path, "otter").size

    def test_the_order_of_added_tokens(self):
        assert list(SPECIAL_TOKENS) == OTTER_TOKENS


def test_a_revision_of_a_repository(monkeypatch):
    """As every command takes it, and as `tokenizer=` of `from_pretrained`."""
    asked = set()

    def find(name, filename, revision=None, **kwargs):
        asked.add((name, revision))

    monkeypatch.setattr("otter_hf.models.legacy_tokens.cached_file", find)
    with pytest.raises(OSError, match="lab/tokenizer holds no tokenizer"):
        load_tokenizer("lab/tokenizer@v1", legacy=True)
    assert not read_token_table("lab/tokenizer@v1").ids
    assert asked == {("lab/tokenizer", "v1")}
