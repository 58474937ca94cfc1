"""Replies of translation runs to one instructions file per language."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...data.formats import MimicitFiles, write_mimicit
from ...data.image_store import ImageStore
from ...data.json_stream import iter_json_object
from .build import InvalidFile, write_counts
from .replies import tolerant_json
from .run import SyphusRun


# Codes and letters that a longer text of the language has. Ideographs also write Japanese.
LANGUAGES: Mapping[str, str] = {
    "zh": r"[\u4e00-\u9fff]",
    "es": r"[a-zA-Z]",
    "ja": r"[\u3040-\u30ff\u4e00-\u9fff]",
    "de": r"[a-zA-Z]",
    "fr": r"[a-zA-Z]",
    "ko": r"[\uac00-\ud7af]",
    "ar": r"[\u0600-\u06ff]",
}
# shorter texts may be names and numbers, which are the same everywhere
_WORDS_TO_TELL = 4


@dataclass
class TranslationReport:
    """What `build_translations` wrote: files, and the number of records and of what is left out, by language."""

    files: dict[str, MimicitFiles] = field(default_factory=dict)
    records: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, dict[str, int]] = field(default_factory=dict)


def build_translations(
    runs: Sequence[SyphusRun],
    instructions_path: str | Path,
    folder: str | Path,
    name: str,
    images_path: str | Path | Sequence[str | Path] = (),
    *,
    train_config_path: str | Path | None = None,
    languages: Sequence[str] = tuple(LANGUAGES),
    cache_dir: str | Path | None = None,
) -> TranslationReport:
    """Writes a MIMIC-IT dataset in other languages, `<name>_<language>_instructions.json` each.

    Ids, `image_ids` and order are those of the original. A record without a good translation is left out of the
    language that it lacks, of `rel_ins_ids` and of the train config there, and written down in
    `<name>_<language>_invalid.jsonl`.

    Args:
        runs: runs of `translate.Translation` over `instructions_path`.
        images_path: the image store of the original, needed if its records have pictures.
        train_config_path: the train config of the original, if there is one, written for each language.
        languages: codes out of `LANGUAGES`.

    Raises:
        ValueError: if a language is unknown, or nothing remains of one.
    """
    unknown = [language for language in languages if language not in LANGUAGES]
    if unknown or not languages:
        raise ValueError(f"languages must be some of {', '.join(LANGUAGES)}, got {list(languages)}.")
    if any(run.dataset.parse is not None for run in runs):
        raise ValueError("build_translations needs runs of translate.Translation.")
    store = ImageStore(images_path, cache_dir) if images_path else None
    report = TranslationReport()
    Path(folder).mkdir(parents=True, exist_ok=True)
    for language in languages:
        title = f"{name}_{language}"
        with ExitStack() as stack:
            journals = [stack.enter_context(run.journal()) for run in runs]
            invalid = stack.enter_context(InvalidFile(Path(folder, f"{title}_invalid.jsonl")))
            texts = _Translations(journals, language)
            records = iter_json_object(instructions_path, "data")
            good = {id for id, record in records if texts.check(id, record, invalid)}
            if not good:
                raise ValueError(f"No record has a good translation to {language}: {dict(invalid.counts)}.")
            config = None
            if train_config_path:
                config = {
                    id: [other for other in context if other in good]
                    for id, context in iter_json_object(train_config_path)
                    if id in good
                }
            records = _records(instructions_path, texts, good)
            report.files[language] = write_mimicit(folder, title, records, store, config)
            report.records[language] = len(good)
            report.left_out[language] = dict(invalid.counts)
    write_counts(Path(folder, f"{name}_translations.json"), report)
    return report


class _Translations:
    """Replies to one language."""

    def __init__(self, journals: Sequence, language: str):
        self.journals, self.language = journals, language

    def reply(self, id: str) -> str | None:
        return next((reply["text"] for journal in self.journals if (reply := journal.reply(id))), None)

    def texts(self, id: str) -> tuple[str, str]:
        reply = self.reply(id)
        if reply is None:
            raise ValueError("not answered")
        return parse_translation(reply, self.language)

    def check(self, id: str, record: dict[str, Any], invalid: InvalidFile) -> bool:
        try:
            for key, text in zip(("instruction", "answer"), self.texts(id), strict=True):
                if len(record[key].split()) >= _WORDS_TO_TELL and not re.search(LANGUAGES[self.language], text):
                    raise ValueError(f"the {key} is not in {self.language}")
        except ValueError as error:
            invalid.add(id, self.reply(id) or "", str(error))
            return False
        return True


def parse_translation(reply: str, language: str) -> tuple[str, str]:
    """The instruction (`a`) and the answer (`b`) of a reply `{"a": {language: text}, "b": {language: text}}`.

    Raises:
        ValueError: if the JSON cannot be read, or lacks them in this language.
    """
    content = tolerant_json(reply)
    texts = []
    for key in ("a", "b"):
        part = content.get(key)
        text = part.get(language) if isinstance(part, dict) else None
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"there is no {language} in {key!r}")
        texts.append(text.strip())
    return texts[0], texts[1]


def _records(path: str | Path, texts: _Translations, good: set[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    for id, record in iter_json_object(path, "data"):
        if id in good:
            instruction, answer = texts.texts(id)
            related = [other for other in record.get("rel_ins_ids") or [] if other in good]
            yield id, {**record, "instruction": instruction, "answer": answer, "rel_ins_ids": related}
