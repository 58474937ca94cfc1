"""VQA accuracy (arXiv:1505.00468): an answer is right as far as it agrees with people's."""

from collections.abc import Callable, Mapping, Sequence

from . import mean_by, percent
from .replies import fate, read_reply


def accuracy(reply: str, answers: Sequence[str], normalise) -> float:
    """
    Mean over the annotators of min(1, a third of the *others* that gave this reply), from 0 to 1.

    The authors' code tells annotators apart by their whole records. Where these lack `answer_id`, as VizWiz's do,
    equal answers are one annotator to it, and full agreement scores 0; here each annotator is one.

    Args:
        reply: the model's answer; an empty one agrees with nobody.
        answers: those of the annotators, ten as a rule; a single one counts in full, as the data then hold no others.
        normalise: brings an answer into the form it is compared in, see [`answer_normaliser`]. It is always applied;
            some copies of the official code leave answers alone where all ten agree.
    """
    reply, answers = normalise(reply), [normalise(answer) for answer in answers]
    if not reply:
        return 0.0
    if len(answers) == 1:
        return float(reply == answers[0])
    agreeing = sum(answer == reply for answer in answers)
    shares = [min(1.0, (agreeing - (answer == reply)) / 3) for answer in answers]
    return sum(shares) / len(shares)


NORMALISERS = ("official", "evalai")


def answer_normaliser(name: str = "official") -> Callable[[str], str]:
    """
    How answers are brought into the form they are compared in: punctuation, numbers, articles, contractions.

    Args:
        name: `official` for the steps of the VQA authors' `vqaEval.py`, which the 2023 suite and OpenFlamingo took
            over: a comma between words becomes a space ("red,blue" is "red blue"). `evalai` for the copy of the
            challenge server's that lmms-eval holds and most later papers used: it takes commas and question marks out
            first ("redblue"), and sets off "'s".

    Raises:
        ValueError: for another name.
    """
    from lmms_eval.tasks._task_utils.vqa_eval_metric import EvalAIAnswerProcessor

    if name not in NORMALISERS:
        raise ValueError(f"normaliser must be one of {', '.join(NORMALISERS)}, got {name!r}.")
    processor = EvalAIAnswerProcessor()
    if name == "evalai":
        return processor

    def official(text: str) -> str:
        # the same tables and steps, without those the server puts in front
        text = text.replace("\n", " ").replace("\t", " ").strip()
        return processor.process_digit_article(processor.process_punctuation(text))

    return official


def clean_reply(reply: str) -> str:
    """
    The short answer in a reply, as the 2023 suite cut it: up to the next `Question`, `Answer`, `Short` or `, `; "" of
    a failed request.
    """
    if fate(reply) == "failed":
        return ""
    reply = read_reply(reply)
    for stop in ("Question", "Answer", "Short", ", "):
        reply = reply.split(stop)[0]
    return reply.strip()


def score(records: Sequence[Mapping]) -> dict[str, float]:
    """
    Mean accuracy in percent, over all and, as the authors' code tells it, of each kind of answer.

    Args:
        records: with `accuracy`, and where the data tell it `answer_type`: yes/no, number, other.
    """
    return {
        "vqa_accuracy": percent(sum(record["accuracy"] for record in records), len(records)),
        "questions": len(records),
        **mean_by([record for record in records if record.get("answer_type")], "answer_type", "accuracy"),
    }
