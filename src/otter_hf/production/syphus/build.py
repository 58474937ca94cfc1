"""Replies to a MIMIC-IT dataset: read, filtered, given ids, pictures and context."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, TextIO

from ...data.formats import MimicitFiles, make_train_config, write_mimicit
from ...data.image_store import ImageStore
from ...files import claim, replacing, write_text
from .filters import FilterRules
from .pictures import PictureFinder
from .queries import Query
from .replies import Pair, ParsedReply
from .run import SyphusRun
from .verify import AGREEMENT, Verdicts, drop_cut_pair


@dataclass
class BuildReport:
    """What `build_dataset` made of the replies.

    `left_out` counts what is no record, by reason; each of it is in the file `invalid_path` with its text.
    """

    files: MimicitFiles
    invalid_path: Path
    queries: int = 0
    replies: int = 0
    records: int = 0
    left_out: dict[str, int] = field(default_factory=dict)


def build_dataset(
    runs: Sequence[SyphusRun],
    folder: str | Path,
    name: str | None = None,
    images_path: str | Path | Sequence[str | Path] = (),
    *,
    rules: FilterRules | None = None,
    image_prefix: str | None = None,
    agreement: float = AGREEMENT,
    cache_dir: str | Path | None = None,
) -> BuildReport:
    """Writes the replies of runs over one kind of annotations, such as all shards of it, as a MIMIC-IT dataset.

    Records are numbered `<name>_INS_<n>` in the order of the queries. `rel_ins_ids` are the other pairs of the query,
    and the train config is derived from them as `make_train_config` does. Rounds of conversations are named
    `<name>_00_INS_<query>_activity<k>_round<r>`, refer to the earlier rounds, and the last one of each is trained.

    Args:
        name: of the dataset, default: the kind's short name.
        images_path: image store, whose ids begin with `image_prefix`; none for a dataset without pictures.
        rules: which pairs are used, default: `FilterRules()`.
        image_prefix: default: `<short name of the kind>_IMG_`.
        agreement: of runs that are verified, see `agrees`.
        cache_dir: as for `ImageStore`.

    Raises:
        ValueError: if the runs are of different kinds, or nothing remains.
    """
    kinds = {run.dataset.name for run in runs}
    if len(kinds) != 1:
        raise ValueError(f"build needs runs over one kind of annotations, got {sorted(kinds) or 'none'}.")
    kind = runs[0].dataset
    if kind.parse is None:
        raise ValueError(f"Runs of {kind.name} are built by build_translations.")
    name = name or kind.short_name
    store = ImageStore(images_path, cache_dir) if images_path else None
    finder = None if store is None else PictureFinder(store, image_prefix or f"{kind.short_name}_IMG_", kind)
    report = BuildReport(MimicitFiles(Path()), Path(folder, f"{name}_invalid.jsonl"))
    Path(folder).mkdir(parents=True, exist_ok=True)
    with InvalidFile(report.invalid_path) as invalid:
        builder = _Builder(name, rules or FilterRules(), finder, invalid, report, agreement)
        train_config: dict[str, list[str]] = {}
        records = builder.records(runs, train_config)
        meta = {"version": "0.0.1", "time": date.today().isoformat(), "source": f"syphus {kind.name}"}
        report.files = write_mimicit(folder, name, records, store, train_config, meta)
        report.left_out = dict(invalid.counts)
        write_counts(Path(folder, f"{name}_build.json"), report)
    return report


class InvalidFile:
    """
    The file of what could not be used, with `id`, `response`, `error_message`; complete when it has its name.

    OSError where another process is writing it.
    """

    def __init__(self, path: Path):
        self.path, self.counts = path, Counter()

    def __enter__(self):
        with ExitStack() as stack:
            stack.enter_context(claim(self.path.with_name(f".{self.path.name}.lock"), self.path))
            written = stack.enter_context(replacing(self.path))
            self._file: TextIO = stack.enter_context(open(written, "w", encoding="utf-8", errors="replace"))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error):
        self._stack.__exit__(*error)

    def add(self, id: str, text: str, reason: str, group: str | None = None) -> None:
        """Writes one down and counts it under `group`, by default the reason."""
        self.counts[group or reason] += 1
        line = {"id": id, "response": text, "error_message": reason}
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")


def write_counts(path: Path, report: Any) -> None:
    """Writes a report as JSON, complete or not at all."""
    write_text(path, json.dumps(asdict(report), ensure_ascii=False, indent=1, default=str))


class _Builder:
    def __init__(
        self,
        name: str,
        rules: FilterRules,
        finder: PictureFinder | None,
        invalid: InvalidFile,
        report: BuildReport,
        agreement: float,
    ):
        self.name, self.rules, self.finder, self.agreement = name, rules, finder, agreement
        self.invalid, self.report = invalid, report

    def records(self, runs: Iterable[SyphusRun], train_config: dict) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yields the records, and fills the train config on the way."""
        seen: set[str] = set()
        for run in runs:
            verdicts = Verdicts(run, self.agreement) if run.settings.get("verify") else None
            with run.journal() as journal:
                for query in run.queries():
                    if query.id in seen:
                        raise ValueError(f"Query {query.id!r} is in two of the runs: build each shard once.")
                    seen.add(query.id)
                    self.report.queries += 1
                    reply = journal.reply(query.id)
                    if reply is None:
                        reason = journal.failed.get(query.id)
                        text = f"not answered: {reason}" if reason else "not answered yet"
                        self.invalid.add(query.id, "", text, "not answered")
                        continue
                    self.report.replies += 1
                    parsed = run.dataset.parse(reply["text"], query)
                    pairs = self._usable(query, reply, parsed, verdicts)
                    yield from self._records_of(query, pairs, train_config)
        if not self.report.records:
            ids = "" if self.finder is None else self.finder.example()
            raise ValueError(
                f"Nothing of {self.report.queries} queries can be used; left out: {dict(self.invalid.counts)}.{ids}"
            )

    def _usable(
        self, query: Query, reply: dict[str, Any], parsed: ParsedReply, verdicts: Verdicts | None
    ) -> list[Pair]:
        drop_cut_pair(reply, parsed)
        for text, reason in parsed.invalid:
            self.invalid.add(query.id, text, reason)
        seen: set[str] = set()
        usable, ended = [], set()
        for pair in parsed.pairs:
            reason = self.rules.reason_to_drop(pair, seen)
            if pair.conversation in ended:
                reason = reason or "behind a round that is left out"
            if reason is None and verdicts is not None:
                reason = verdicts.reason_to_drop(query, pair)
            if reason is None:
                usable.append(pair)
                continue
            self.invalid.add(query.id, f"{pair.question}\n{pair.answer}", reason)
            if pair.conversation is not None:
                ended.add(pair.conversation)
        return usable

    def _records_of(self, query: Query, pairs: list[Pair], train_config: dict) -> Iterator[tuple[str, dict[str, Any]]]:
        images = [] if self.finder is None else self.finder.find(query)
        if self.finder is not None and not images:
            for pair in pairs:
                self.invalid.add(query.id, f"{pair.question}\n{pair.answer}", "no pictures in the image store")
            return
        ids = self._ids(query, pairs)
        records = {}
        for number, (id, pair) in enumerate(zip(ids, pairs, strict=True)):
            if pair.conversation is None:
                related = ids[:number] + ids[number + 1 :]
            else:
                related = [ids[i] for i in range(number) if pairs[i].conversation == pair.conversation]
            records[id] = {
                "instruction": pair.question,
                "answer": pair.answer,
                "image_ids": images,
                "rel_ins_ids": related,
            }
        if pairs and pairs[0].conversation is not None:
            last = {pair.conversation: id for id, pair in zip(ids, pairs, strict=True)}
            train_config.update((id, records[id]["rel_ins_ids"]) for id in last.values())
        else:
            train_config.update(make_train_config(records))
        self.report.records += len(records)
        yield from records.items()

    def _ids(self, query: Query, pairs: list[Pair]) -> list[str]:
        if not pairs or pairs[0].conversation is None:
            first = self.report.records
            return [f"{self.name}_INS_{number:05d}" for number in range(first, first + len(pairs))]
        rounds: Counter[int | None] = Counter()
        ids = []
        for pair in pairs:
            ids.append(f"{self.name}_00_INS_{query.id}_activity{pair.conversation}_round{rounds[pair.conversation]}")
            rounds[pair.conversation] += 1
        return ids
