"""The thread in which a model answers."""

import threading

from ..models.continuous_batching import BatchRow, ContinuousBatch


class BatchThread:
    """
    Takes the steps of a batch, in a thread that is there while the batch has rows: an idle model is held by nobody.

    Args:
        batch: of a model; nobody else takes its steps.
    """

    def __init__(self, batch: ContinuousBatch):
        self.batch = batch
        self._lock = threading.Lock()
        self._is_running = False

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
            self.batch.step()
