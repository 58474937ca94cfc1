"""How commands and training scripts end on bad input: one sentence, status 2, no traceback."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


def sentence_of(error: Exception) -> str:
    """What is wrong, as one who gave the input is told."""
    # those of the system begin with a number
    sentence = f"{error.strerror}: {error.filename}" if getattr(error, "filename", None) else str(error)
    if sentence.startswith("Caught ") and " in DataLoader worker process " in sentence:
        # torch puts the worker's whole traceback into the message, of which the last line is the error
        sentence = sentence.strip().splitlines()[-1].partition(": ")[2]
    return sentence


@contextmanager
def ending_in_a_sentence() -> Iterator[None]:
    """Bad input (a ValueError or OSError inside) ends the process with its sentence."""
    try:
        yield
    except (ValueError, OSError) as error:
        sys.stderr.write(f"otter-hf: {sentence_of(error)}\n")
        raise SystemExit(2) from None
