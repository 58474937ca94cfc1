"""A model in this process, which answers as it is told."""

import threading
import time

from otter_hf.production.syphus import ChatReply


REPLY = "Question: Q of {id}?\nAnswer: A of {id}."


class Model:
    """Answers with 100 + 20 tokens; `script` gives the outcomes of an id's first attempts."""

    def __init__(self, script=None, usage=(100, 20)):
        self.script, self.usage = script or {}, usage
        self.asked = []
        self.at_once = self.most_at_once = 0
        self._lock = threading.Lock()

    def complete(self, messages):
        id = messages[-1]["content"].split()[-1]
        with self._lock:
            self.asked.append(id)
            outcomes = self.script.get(id, [])
            outcome = outcomes.pop(0) if outcomes else None
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        time.sleep(0.003)
        with self._lock:
            self.at_once -= 1
        if isinstance(outcome, Exception):
            raise outcome
        return ChatReply(outcome or REPLY.format(id=id), "stop", *self.usage)


def ask(run, model, budget=None, **kwargs):
    return run.ask(model, budget, **{"concurrency": 4, "first_pause": 0.001, **kwargs})
