"""The thread in which a model answers."""

import threading
from collections.abc import Callable, Mapping

from transformers.cache_utils import Cache
from transformers.utils import logging

from ..models.continuous_batching import BatchRow, ContinuousBatch
from ..models.prefix_store import PrefixStore


logger = logging.get_logger(__name__)


class BatchThread:
    """
    Takes the steps of a batch, in a thread that is there while the batch has rows: an idle model is held by nobody.

    Args:
        batch: of a model; nobody else takes its steps.
        prefixes: what prompts begin with, found as they come.
    """

    def __init__(self, batch: ContinuousBatch, prefixes: PrefixStore | None = None):
        self.batch, self.prefixes = batch, prefixes
        self._lock = threading.Lock()
        self._is_running = False

    def prefix_of(self, inputs: Mapping, is_cancelled: Callable[[], bool]) -> Cache | None:
        """What is known of the beginning of a prompt, for `submit`; see [`PrefixStore.prefix_of`]."""
        return None if self.prefixes is None else self.prefixes.prefix_of(inputs, is_cancelled)

    def submit(self, *args, **kwargs) -> BatchRow:
        """As [`ContinuousBatch.submit`]; the row's future ends with its answer."""
        row = self.batch.submit(*args, **kwargs)
        with self._lock:
            if not self._is_running:
                self._is_running = True
                threading.Thread(target=self._run, name="batch", daemon=True).start()
        return row

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self.batch.has_work:
                    self._is_running = False
                    return
            try:
                self.batch.step()
            except Exception as error:  # which nobody foresaw: rows shall end, and later ones be answered
                logger.exception("A step of the batch failed.")
                self.batch.fail(error)
