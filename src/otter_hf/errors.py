"""What is told of bad input: one sentence, with which commands and training scripts end, status 2, no traceback."""

import difflib
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any


# what torch says of a tensor with a negative size, with more numbers than 64 bits can count, or counted downwards
_SIZES_THAT_ARE_NONE = ("negative dimension", "overflow", "inconsistent with step")
# what is raised by who believes what is written there
_OF_VALUES = (LookupError, AttributeError, TypeError, ArithmeticError, AssertionError)


def sentence_of(error: Exception) -> str:
    """What is wrong, as one who gave the input is told."""
    # those of the system begin with a number
    sentence = f"{error.strerror}: {error.filename}" if getattr(error, "filename", None) else str(error)
    if sentence.startswith("Caught ") and " in DataLoader worker process " in sentence:
        # torch puts the worker's whole traceback into the message, of which the last line is the error
        sentence = sentence.strip().splitlines()[-1].partition(": ")[2]
    return sentence


@contextmanager
def config_told(name: Any, file: str = "config.json") -> Iterator[None]:
    """
    For a block that reads this file of the model `name`, and may make what it describes.

    Raises:
        ValueError: naming it, for values that transformers or the model have no use for.
    """
    from huggingface_hub.errors import StrictDataclassError  # which takes a while, and commands begin at once

    try:
        yield
    except (StrictDataclassError, *_OF_VALUES, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(words in str(error).lower() for words in _SIZES_THAT_ARE_NONE):
            raise
        reason = " ".join(str(error).split()) if isinstance(error, StrictDataclassError) else repr(error)
        raise ValueError(f"{name} cannot be used, a value in its {file} is wrong: {reason:.300}") from error


def did_you_mean(word: str, known: Iterable[str], otherwise: str | None = None) -> str:
    """The end of a sentence on a word that is not known: the nearest that is, or else `otherwise`, or all."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {close[0]!r}?" if close else otherwise or f"there are {', '.join(known)}."


@contextmanager
def ending_in_a_sentence() -> Iterator[None]:
    """Bad input (a ValueError or OSError inside) ends the process with its sentence."""
    try:
        yield
    except (ValueError, OSError) as error:
        sys.stderr.write(f"otter-hf: {sentence_of(error)}\n")
        raise SystemExit(2) from None
