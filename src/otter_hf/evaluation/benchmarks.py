"""What the tasks in `tasks/*.yaml` call: prompts from rows, records from replies, scores from records.

Rows are read in the layout of the 2023 data sets (`Otter-AI/*`) and in that of lmms-eval's copies. A record is a small
dict per row, which goes into the sample log and from which everything is scored.
"""

import ast
import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import pyarrow as pa
from transformers.utils import logging

from ..data.controls import visual_gains
from ..pictures import read_image
from .judge import Judge, lmms_eval_constant
from .scoring import magnifierbench, mathvista, mmbench, mme, mmvet, pope, ranking, scienceqa, seedbench
from .scoring.choices import parse_choice
from .scoring.replies import fate, is_answered, read_reply


logger = logging.get_logger(__name__)

# the judge of the 2023 figures
DEFAULT_JUDGE = "gpt-4-0613"


@dataclass(frozen=True)
class Options:
    """
    How replies become records.

    Args:
        judge: for MagnifierBench's free form, MM-Vet and MathVista; None if there is none.
        legacy_parse: read MagnifierBench's letters as the 2023 code did.
        num_run: times MM-Vet's judge grades each reply.
        quick_extract: MathVista: take what stands in `The answer is ".."`.
        shot_type: MathVista: the form its question was asked in, see [`~otter_hf.evaluation.scoring.mathvista`].
        likelihood: SEED-Bench: rank options by `mean` or `sum` of their tokens' losses, over what the task says.
    """

    judge: Judge | None = None
    legacy_parse: bool = False
    num_run: int = 1
    quick_extract: bool = False
    shot_type: str | None = None
    likelihood: str | None = None


@lru_cache(maxsize=1)
def options_from_environment() -> Options:
    """For lmms-eval's own command: a judge called `MODEL_VERSION` where `OPENAI_API_KEY` is set."""
    if not os.environ.get("OPENAI_API_KEY"):
        return Options()
    return Options(judge=Judge(os.environ.get("MODEL_VERSION", DEFAULT_JUDGE)))


def images(row: Mapping) -> list:
    """
    The pictures of a row in RGB: `image` or `images`, pictures, bytes, base64 texts or paths.

    Raises:
        ValueError: if there are none, which would be a question about nothing, or one cannot be read.
    """
    if not (found := images_if_any(row)):
        raise ValueError(f"Row {row_id(row)!r} has no picture: take it out of the data.")
    return found


def images_if_any(row: Mapping) -> list:
    """As `images`; none where a row has none."""
    return [read_image(cell, f"image of row {row_id(row)!r}") for cell in _picture_cells(row)[1]]


def with_paths(row: Mapping, place: Callable[[str], str]) -> Mapping:
    """The row, in which texts for pictures are what `place` makes of them: the paths of those that are names."""
    name, cells = _picture_cells(row)
    if not any(isinstance(cell, str) for cell in cells):
        return row
    return {**row, name: [place(cell) if isinstance(cell, str) else cell for cell in cells]}


def _picture_cells(row: Mapping) -> tuple[str, list]:
    """The column that pictures are in, and what it has of them."""
    name = next((name for name in ("decoded_image", "image", "images") if row.get(name) is not None), "image")
    cell = row.get(name)
    cells = cell if isinstance(cell, (list, tuple)) else [cell]
    return name, [cell for cell in cells if cell is not None]


def row_id(row: Mapping) -> str:
    """What a row calls itself, '' if nothing."""
    names = ("id", "question_id", "index", "pid")
    return str(next((row[name] for name in names if row.get(name) is not None), ""))


def question(row: Mapping, prompts: Mapping | None = None) -> str:
    """The question of a row as it is, after `prompt` where there is one."""
    text = row.get("question") or row["instruction"]
    prompt = (prompts or {}).get("prompt")
    return f"{prompt} {text}" if prompt else text


def answer(row: Mapping) -> str:
    """The right answer, as text, where the row has one."""
    return str(row.get("answer", ""))


def letter(row: Mapping, letters: Iterable[str]) -> str:
    """The letter of the right option; ValueError if it is none of `letters`, as nobody could then be right."""
    told, letters = str(row["answer"]).strip().upper(), list(letters)
    if told not in letters:
        raise ValueError(f"Row {row_id(row)!r} has the answer {row['answer']!r:.80}, none of {', '.join(letters)}.")
    return told


# MagnifierBench


def magnifierbench_rows(rows):
    """Rows with exactly one picture, as in 2023; the others are left out with a warning."""
    cells = enumerate(_arrow_cells(rows, "images"))
    single = [n for n, cell in cells if cell.is_valid and (not isinstance(cell, pa.ListScalar) or len(cell) == 1)]
    kept = rows.select(single)
    if len(kept) < len(rows):
        logger.warning(f"MagnifierBench: {len(rows) - len(kept)} rows without exactly one image are left out.")
    return kept


def magnifierbench_freeform_question(row: Mapping, prompts: Mapping | None = None) -> str:
    """The question without its options."""
    return magnifierbench.split_instruction(row["instruction"])[0]


def magnifierbench_record(row: Mapping, replies: list[str], options: Options) -> dict:
    """Which option the reply names."""
    prediction = magnifierbench.parse_answer(replies[0], row["instruction"], legacy=options.legacy_parse)
    return {"id": row_id(row), "prediction": prediction, "answer": letter(row, magnifierbench.LETTERS)}


def magnifierbench_freeform_record(row: Mapping, replies: list[str], options: Options) -> dict:
    """What the judge says about the reply."""
    asked, choices = magnifierbench.split_instruction(row["instruction"])
    truth = choices[letter(row, choices)]
    judge = _require(options.judge, "MagnifierBench in free form")
    if fate(replies[0]) in ("failed", "empty"):
        return {"id": row_id(row), "truth": truth, "judge": None, "verdict": "no"}
    said = judge.ask(magnifierbench.judge_messages(asked, replies[0], truth))
    verdict = "failed" if said is None else magnifierbench.parse_verdict(said)
    return {"id": row_id(row), "truth": truth, "judge": said, "verdict": verdict}


# MME


def mme_record(row: Mapping, replies: list[str], options: Options) -> dict:
    """Yes or no, and which picture and category it counts for."""
    if row.get("image_ids") is not None:
        category, image_id = row["id"].partition("_")[0], row["image_ids"][0]
    else:
        category, image_id = row["category"], row["question_id"]
    prediction = mme.parse_answer(replies[0])
    return {
        "category": mme.category_name(category),
        "image_id": image_id,
        "prediction": prediction,
        "answer": row["answer"],
    }


# POPE


def pope_record(row: Mapping, replies: list[str], options: Options) -> dict:
    """Yes or no by the official rule."""
    return {"category": row["category"], "prediction": pope.parse_answer(replies[0]), "answer": row["answer"]}


# MMBench


def mmbench_question(row: Mapping, prompts: Mapping | None = None) -> str:
    """Hint, question, `sys_prompt` and the options, a line each."""
    hint = f"{row['hint']} " if mmbench.present(row.get("hint")) else ""
    lines = [f"{hint}{row['question']} {(prompts or {}).get('sys_prompt', 'There are several options:')}"]
    return "\n".join([*lines, *(f"{letter}. {text}" for letter, text in mmbench.options_of(row).items())])


def mmbench_record(row: Mapping, replies: list[str], options: Options) -> dict:
    """Which option the reply names, and the row for the server's table."""
    table_row = {name: row.get(name) for name in mmbench.SUBMISSION_COLUMNS if name != "prediction"}
    table_row["l2-category"] = row.get("l2-category", row.get("L2-category"))
    choices = mmbench.options_of(row)
    return {
        "index": row["index"],
        "category": row.get("category"),
        "l2-category": table_row["l2-category"],
        "num_options": len(choices),
        "prediction": parse_choice(replies[0], choices),
        "answer": letter(row, choices) if mmbench.present(row.get("answer")) else None,
        "row": {**table_row, "prediction": "" if fate(replies[0]) == "failed" else read_reply(replies[0])},
    }


# ScienceQA


def scienceqa_question(row: Mapping, prompts: Mapping | None = None) -> str:
    """The 2023 prompt, the question, and the options, a line each."""
    prompt = (prompts or {}).get("prompt")
    choices = [f"{chr(ord('A') + i)}. {text}" for i, text in enumerate(row["choices"])]
    return "\n".join([*([prompt] if prompt else []), row["question"], *choices, ""])


def scienceqa_answer(row: Mapping) -> str:
    """The letter of the right choice."""
    number, count = int(row["answer"]), len(row["choices"])
    if not 0 <= number < count:
        raise ValueError(f"Row {row_id(row)!r} has the answer {number}, counted from 0, of {count} choices.")
    return chr(ord("A") + number)


def scienceqa_rows(rows):
    """The rows, each told whether it has a picture: pictures are not at hand when replies are read."""
    told = [cell.is_valid for cell in _arrow_cells(rows, "image")]
    others = [name for name in rows.column_names if name != "has_image"]
    return rows.select_columns(others).add_column("has_image", told)


def _arrow_cells(rows, column: str) -> Iterator:
    """The cells of a column as Arrow has them: no picture is decoded, and none written anew."""
    for batch in rows.select_columns(column).with_format("arrow").iter(batch_size=256):
        yield from batch[column]


def scienceqa_record(row: Mapping, replies: list[str], options: Options) -> dict:
    """Which option the reply names."""
    return {
        "prediction": scienceqa.parse_answer(replies[0], row["choices"]),
        "answer": scienceqa_answer(row),
        "has_image": row["has_image"],
        "has_text": None if row.get("hint") is None else bool(row["hint"].strip()),
        "subject": row.get("subject"),
        "grade": row.get("grade"),
    }


# SEED-Bench


def seedbench_question(row: Mapping, prompts: Mapping | None = None) -> str:
    """The question followed by its options, as in 2023."""
    listed = " ".join(f"{letter}. {text}" for letter, text in zip("ABCD", seedbench_texts(row), strict=True))
    return f"{row['question']} There are several options: {listed}"


def seedbench_texts(row: Mapping) -> list[str]:
    """The four options, which the official evaluation ranks."""
    return [str(row[f"choice_{letter}"]) for letter in "abcd"]


def seedbench_choices(row: Mapping) -> list[str]:
    """The four options with their letters, which the 2023 code ranked."""
    return [f"{letter}. {text}" for letter, text in zip("ABCD", seedbench_texts(row), strict=True)]


def seedbench_target(row: Mapping) -> int:
    """The number of the right option."""
    return "ABCD".index(letter(row, "ABCD"))


def seedbench_record(row: Mapping, replies: list, options: Options, likelihood: str = "mean") -> dict:
    """The option of the smallest loss."""
    # lmms-eval hands tuples on as text
    scored = [ast.literal_eval(reply) if isinstance(reply, str) else reply for reply in replies]
    losses = [
        ranking.likelihood(loss * tokens, tokens, options.likelihood or likelihood) for loss, _, tokens in scored
    ]
    return {
        "question_id": row.get("question_id"),
        "losses": losses,
        "prediction": seedbench.rank(losses),
        "answer": letter(row, "ABCD"),
        "question_type": row.get("question_type_id"),
        "data_type": row.get("data_type"),
    }


# MM-Vet


def mmvet_record(row: Mapping, replies: list[str], options: Options) -> dict:
    """The judge's grades."""
    judge = _require(options.judge, "MM-Vet")
    # the copy in lmms-eval 0.7.3 has lost an empty line and a word to a search and replace
    table = lmms_eval_constant("tasks.mmvet.utils", "MM_VET_PROMPT").replace("\ngpt_query_prompt |", "\n\nQuestion |")
    prompt = mmvet.grading_prompt(table, question(row), row["answer"], replies[0])
    capabilities = row["capability"]
    if isinstance(capabilities, str):
        capabilities = [name.strip() for name in capabilities.split(",")]
    unanswered = fate(replies[0]) in ("failed", "empty")
    grades = [0.0 if unanswered else _grade(judge, prompt, run) for run in range(options.num_run)]
    return {"id": row_id(row), "capabilities": list(capabilities), "grades": grades}


def _grade(judge: Judge, prompt: str, run: int) -> float | None:
    """As MM-Vet does: ask again more plainly, then warmer, when the reply is no grade."""
    for temperature in (None, 0.0, 0.5, 1.0, 1.5):
        plain = "" if temperature is None else "\nPredict the correctness of the answer (digit): "
        messages = [{"role": "user", "content": prompt + plain}]
        said = judge.ask(messages, temperature=temperature or 0.0, max_tokens=3, run=run)
        if said is None:
            return None
        if (grade := mmvet.parse_grade(said)) is not None:
            return grade
    return None


# MathVista


def mathvista_question(row: Mapping, prompts: Mapping | None = None) -> str:
    """MathVista's query, in the form `shot_type` where there is one."""
    return mathvista.build_query(row, (prompts or {}).get("shot_type"))


def mathvista_record(row: Mapping, replies: list[str], options: Options) -> dict:
    """The extracted and normalised answer."""
    extraction = mathvista.extract_directly(replies[0], row, options.quick_extract)
    if not extraction and is_answered(replies[0]):
        if options.judge:
            examples = lmms_eval_constant("tasks.mathvista.mathvista_evals", "DEMO_PROMPT")
            query = mathvista.build_query(row, options.shot_type)
            prompt = mathvista.extraction_prompt(examples, query, replies[0])
            extraction = options.judge.ask([{"role": "user", "content": prompt}])
        else:
            extraction = mathvista.choice_in_prose(replies[0], row)
    metadata = row.get("metadata") or {}
    metadata = ast.literal_eval(metadata) if isinstance(metadata, str) else metadata
    kinds = {kind: row[kind] for kind in ("question_type", "answer_type")}
    kinds |= {kind: metadata.get(kind) for kind in mathvista.METADATA_KINDS}
    return {
        "id": row_id(row),
        "extraction": extraction,
        "prediction": mathvista.normalise(extraction, row) if extraction else None,
        "answer": row.get("answer"),
        "failed": not extraction,
        "kinds": kinds,
    }


def _require(judge: Judge | None, name: str) -> Judge:
    if judge is None:
        raise ValueError(f"{name} needs a judge: set OPENAI_API_KEY in the environment.")
    return judge


@dataclass(frozen=True)
class Benchmark:
    """
    How a task's replies are scored: a record per row, `score` of the records, and the figures lmms-eval shows.

    Where several rows are one question, as MME's two about a picture, `question` tells which rows are, and `numbered`
    gives a record another number, so that a question may be drawn several times.
    """

    record: Callable[[Mapping, list, Options], dict]
    score: Callable[[list[Mapping]], dict]
    metrics: tuple[str, ...]
    question: Callable[[Mapping], Hashable] | None = None
    numbered: Callable[[Mapping, int], dict] = lambda record, number: record

    def gains(self, shown: Sequence[Mapping], swapped: Sequence[Mapping], blank: Sequence[Mapping]) -> dict[str, dict]:
        """
        For each score of a benchmark that with other and with blank pictures, and the visual gain with its interval.

        Args:
            shown: the records of all rows.
            swapped, blank: the same rows' with the pictures of other rows, and with blank ones.
        """
        questions: dict[Hashable, list[int]] = {}
        for place, record in enumerate(shown):
            questions.setdefault(place if self.question is None else self.question(record), []).append(place)
        scores = [self.score(list(records)) for records in (shown, swapped, blank)]
        names = [name for name in self.metrics if name not in NO_SCORES and scores[0].get(name) is not None]

        def metrics(drawn: list[list[Mapping]]) -> dict[str, float]:
            numbered = [self.numbered(r, number) for number, records in enumerate(drawn) for r in records]
            score = self.score(numbered)
            return {name: score.get(name) or 0.0 for name in names}

        units = [[[records[i] for i in places] for places in questions.values()] for records in (shown, swapped)]
        gains = visual_gains(metrics, *units) if names else {}
        return {name: {"swapped": scores[1][name], "blank": scores[2][name], **gains[name]} for name in names}


# figures that are better neither high nor low
NO_SCORES = ("yes_ratio",)


BENCHMARKS = {
    "otter_magnifierbench": Benchmark(magnifierbench_record, magnifierbench.score, ("accuracy",)),
    "otter_magnifierbench_freeform": Benchmark(
        magnifierbench_freeform_record, magnifierbench.score_freeform, ("freeform_accuracy",)
    ),
    "otter_mme": Benchmark(
        mme_record,
        mme.score,
        ("perception", "cognition"),
        question=lambda record: (record["category"], record["image_id"]),
        numbered=lambda record, number: {**record, "image_id": number},
    ),
    "otter_pope": Benchmark(pope_record, pope.score, ("accuracy", "f1", "yes_ratio")),
    "otter_mmbench": Benchmark(
        mmbench_record,
        mmbench.score,
        ("circular_accuracy",),
        question=mmbench.question_of,
        numbered=mmbench.with_number,
    ),
    "otter_scienceqa": Benchmark(scienceqa_record, scienceqa.score, ("accuracy", "image_accuracy")),
    "otter_seedbench_ppl": Benchmark(seedbench_record, seedbench.score, ("accuracy",)),
    "otter_seedbench_ppl_official": Benchmark(
        partial(seedbench_record, likelihood="sum"), seedbench.score, ("accuracy",)
    ),
    "otter_mmvet": Benchmark(mmvet_record, mmvet.score, ("total",)),
    "otter_mathvista": Benchmark(mathvista_record, mathvista.score, ("accuracy",)),
}


# what a benchmark's rows must have; several names of one thing are joined by "or"
_PICTURE, _QUESTION = "image or images", "question or instruction"
_SEED = (_QUESTION, "choice_a", "choice_b", "choice_c", "choice_d", "answer", _PICTURE)
COLUMNS = {
    "magnifierbench": ("instruction", "answer", "images"),
    "mme": (_QUESTION, "answer", "category or image_ids", "question_id or image_ids", _PICTURE),
    "pope": (_QUESTION, "answer", "category", _PICTURE),
    "mmbench": ("index", "question", "A", "B", _PICTURE),
    "scienceqa": ("question", "choices", "answer", "image"),
    "seedbench": _SEED,
    "seedbench_official": _SEED,
    "mmvet": (_QUESTION, "answer", "capability", _PICTURE),
    "mathvista": ("question", "question_type", "answer_type", "image or images or decoded_image"),
}


def results_function(benchmark: Benchmark, options: Options | None = None) -> Callable:
    """`process_results` for lmms-eval: the record of a row, under the name of each metric."""

    def process_results(row, replies):
        record = benchmark.record(row, replies, options or options_from_environment())
        return dict.fromkeys(benchmark.metrics, record)

    return process_results


def _functions(task: str) -> list[Callable]:
    """What a task's YAML names: `process_results`, and an `aggregation` for each metric."""
    benchmark = BENCHMARKS[task]

    def aggregation(metric: str) -> Callable:
        return lambda records: benchmark.score(records).get(metric)

    return [results_function(benchmark), *map(aggregation, benchmark.metrics)]


magnifierbench_results, magnifierbench_accuracy = _functions("otter_magnifierbench")
magnifierbench_freeform_results, magnifierbench_freeform_accuracy = _functions("otter_magnifierbench_freeform")
mme_results, mme_perception, mme_cognition = _functions("otter_mme")
pope_results, pope_accuracy, pope_f1, pope_yes_ratio = _functions("otter_pope")
mmbench_results, mmbench_circular_accuracy = _functions("otter_mmbench")
scienceqa_results, scienceqa_accuracy, scienceqa_image_accuracy = _functions("otter_scienceqa")
seedbench_results, seedbench_accuracy = _functions("otter_seedbench_ppl")
seedbench_official_results, _ = _functions("otter_seedbench_ppl_official")
mmvet_results, mmvet_total = _functions("otter_mmvet")
mathvista_results, mathvista_accuracy = _functions("otter_mathvista")
