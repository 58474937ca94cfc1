"""VQA accuracy (arXiv:1505.00468): an answer is right as far as it agrees with people's."""

from collections.abc import Mapping, Sequence

from . import percent


def accuracy(reply: str, answers: Sequence[str], normalise) -> float:
    """
    Mean over the annotators of min(1, a third of the *others* that gave this reply), from 0 to 1.

    Args:
        reply: the model's answer.
        answers: those of the annotators, ten as a rule; a single one counts in full, as the data then hold no others.
        normalise: brings an answer into the form it is compared in, see [`answer_normaliser`]. It is always applied;
            some copies of the official code leave answers alone where all ten agree.
    """
    reply, answers = normalise(reply), [normalise(answer) for answer in answers]
    if len(answers) == 1:
        return float(reply == answers[0])
    agreeing = sum(answer == reply for answer in answers)
    shares = [min(1.0, (agreeing - (answer == reply)) / 3) for answer in answers]
    return sum(shares) / len(shares)


def answer_normaliser():
    """The official treatment of punctuation, numbers, articles and contractions, as lmms-eval holds it."""
    from lmms_eval.tasks._task_utils.vqa_eval_metric import EvalAIAnswerProcessor

    return EvalAIAnswerProcessor()


def clean_reply(reply: str) -> str:
    """The short answer in a reply, as the 2023 suite cut it: up to the next `Question`, `Answer`, `Short` or `, `."""
    for stop in ("Question", "Answer", "Short", ", "):
        reply = reply.split(stop)[0]
    return reply.strip()


def score(records: Sequence[Mapping]) -> dict[str, float]:
    """Mean accuracy in percent; `records` have `accuracy`."""
    return {
        "vqa_accuracy": percent(sum(record["accuracy"] for record in records), len(records)),
        "questions": len(records),
    }
