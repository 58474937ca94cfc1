"""The models a server answers with."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from transformers import PreTrainedModel
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import Modality

from ..loading import load_model, load_processor
from ..model_names import check_model_name
from ..models.continuous_batching import ContinuousBatch
from ..models.offloading import let_threads_take_turns
from ..models.skills import Skill, describe_skill
from .batch_thread import BatchThread


class ServedModels(ModelManager):
    """
    The model manager of `transformers serve` for models that transformers itself does not hold, and for those named
    only: nobody makes this server download another one.

    Args:
        names: folders or Hub ids. Clients call a model by the name given here. The first is loaded at once.
        skills: further names that clients may call, with the model and the file of worked examples of each.
        model_timeout: seconds without a request after which a model is unloaded; -1 keeps it.
        tokenizer, chat_template, tokenizer_reference: see `load_processor`.
        loading: further keyword arguments of `load_model`.

    Raises:
        ValueError: for a name that cannot be a model, and as `load_model` and `load_processor`.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        skills: Mapping[str, tuple[str, Path]] | None = None,
        model_timeout: int = -1,
        tokenizer: str | None = None,
        chat_template: str | None = None,
        tokenizer_reference: str | None = None,
        **loading,
    ):
        for name in names:
            check_model_name(name, weights=True)
        self.skills = dict(skills or {})
        self._reading_skills = threading.Lock()
        for _, path in self.skills.values():
            describe_skill(path)  # what is no skill is told before a model is loaded
        super().__init__(model_timeout=model_timeout)
        self.names = tuple(names)
        self.created = int(time.time())
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.tokenizer_reference = tokenizer_reference
        self.loading = loading
        loaded = self.load_model_and_processor(self.process_model_name(self.names[0]))
        for name, (model, _) in self.skills.items():
            if model == self.names[0]:
                self.skill_of(name, *loaded)

    def _load_processor(self, model_id_and_revision: str, gguf_file: str | None = None):
        return load_processor(model_id_and_revision, self.tokenizer, self.chat_template, self.tokenizer_reference)

    def _load_model(self, model_id_and_revision: str, tqdm_class=None, progress_callback=None, gguf_file=None):
        # a batch, beginnings of prompts and beams are read in threads of their own
        return let_threads_take_turns(load_model(model_id_and_revision, tokenizer=self.tokenizer, **self.loading))

    @staticmethod
    def get_model_modality(model, processor=None) -> Modality:
        """Pictures and text, for every family of this package."""
        return Modality.VLM

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict]:
        """The models of this server as the OpenAI API lists them."""
        return [
            {"id": name, "object": "model", "created": self.created, "owned_by": Path(name).parent.name or "otter-hf"}
            for name in (*self.names, *self.skills)
        ]

    def batch_of(self, name: str, model, make: Callable[[PreTrainedModel], BatchThread]) -> BatchThread:
        """The batch of a loaded model, made at its first request; it goes when the model is unloaded."""
        loaded = self.loaded_models.get(self.process_model_name(name))
        if loaded is None or loaded.model is not model:  # unloaded meanwhile
            return make(model)
        if not hasattr(loaded, "batch"):
            loaded.batch = make(model)
        return loaded.batch

    @contextmanager
    def in_use(self, name: str, model) -> Iterator[None]:
        """
        Within, a loaded model is not idle, however long its answer takes: unloaded meanwhile it would be in memory
        twice, once for this answer and once for the next request.
        """
        loaded = self.loaded_models.get(self.process_model_name(name))
        if loaded is None or loaded.model is not model:
            yield
            return
        if not hasattr(loaded, "users"):
            loaded.users, unload = 0, loaded._timeout_reached
            loaded._timeout_reached = lambda: loaded.reset_timer() if loaded.users else unload()
        loaded.users += 1
        loaded.reset_timer()
        try:
            yield
        finally:
            loaded.users -= 1
            if loaded.model is model:
                loaded.reset_timer()

    @property
    def batches(self) -> list[ContinuousBatch]:
        """Those of loaded models."""
        return [loaded.batch.batch for loaded in self.loaded_models.copy().values() if hasattr(loaded, "batch")]

    def skill_of(self, name: str, model, processor) -> Skill | None:
        """
        The skill that a request calls a loaded model by, read at its first request; None where it calls the model.

        Raises:
            ValueError: for the skill of another model, and a damaged one.
        """
        if name not in self.skills:
            return None
        loaded = self.loaded_models.get(self.process_model_name(self.model_of(name)))
        kept = {} if loaded is None or loaded.model is not model else loaded.__dict__.setdefault("skills", {})
        with self._reading_skills:
            if name not in kept:
                # all weights are read for it: once for all skills of a model
                fingerprint = next((skill.fingerprint for skill in kept.values()), None)
                kept[name] = Skill.load(self.skills[name][1], model, processor, fingerprint)
        return kept[name]

    def refusal_of(self, name: str) -> str:
        """What is said to a request for another model."""
        return f"This server has no model {name!r:.80}; it has {', '.join((*self.names, *self.skills))}."

    def model_of(self, name: str) -> str:
        """The name of the model behind a name that a request may call."""
        return self.skills[name][0] if name in self.skills else name

    def find(self, name: str | None) -> str:
        """The name of the model a request asks for: its own, or the first without one. KeyError for another."""
        if name is None:
            return self.names[0]
        if name not in self.names and name not in self.skills:
            raise KeyError(name)
        return name
