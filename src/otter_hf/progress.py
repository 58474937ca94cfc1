"""Progress bars of what any process may be doing."""

import multiprocessing
from collections.abc import Iterable
from typing import TypeVar

from transformers.utils import logging


Item = TypeVar("Item")


def with_progress(items: Iterable[Item], **options) -> Iterable[Item]:
    """
    transformers' bar over `items`, with the options of tqdm; none in a process that another has started.

    A forked process, such as one of a `DataLoader`, shares tqdm's lock with the one that started it: killed while it
    draws, it would hold that up at its next bar, for ever.
    """
    return items if multiprocessing.parent_process() is not None else logging.tqdm(items, **options)


__all__ = ["with_progress"]
