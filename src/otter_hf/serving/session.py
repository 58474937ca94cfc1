"""A conversation with a model, which reads each word and picture once."""

from collections.abc import Mapping, Sequence

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.generation.streamers import BaseStreamer
from transformers.processing_utils import ProcessorMixin

from ..data.controls import control_messages, media_of
from ..models.chat_processing import ChatProcessorMixin, map_parts, media_parts_of
from ..models.generation import context_length
from ..models.prefix_cache import can_share_prefixes, common_length
from ..models.skills import Skill
from ..prompts import IMAGE_TOKEN
from .media import fit_media


class ChatSession:
    """
    A conversation that grows by questions and answers.

    The keys and values of a turn are kept for the next one, as far as its tokens begin alike: only new tokens and new
    pictures go through the model, and the answers are those of a model that reads everything again. (A model other
    than Otter, Flamingo and OtterHD, beam search, and a sliding window that has slid read everything again.)

    Args:
        model: in evaluation mode.
        processor: with a chat template.
        reuse_cache: False reads the whole conversation for every answer.
        skill: worked examples of this model, with which every conversation begins, and which are not read again.
    """

    def __init__(
        self, model: PreTrainedModel, processor: ProcessorMixin, reuse_cache: bool = True, skill: Skill | None = None
    ):
        self.model = model
        self.processor = processor
        self.reuse_cache = reuse_cache and can_share_prefixes(model)
        self.skill = skill
        self.clear()

    def clear(self) -> None:
        """Forget the conversation, but for the skill."""
        self.messages: list[dict] = [] if self.skill is None else list(self.skill.messages)
        self._prepared: dict[int, tuple[object, dict]] = {}
        self._forget_cache()

    def add_example(self, question: str, answer: str, media: list[dict] = ()) -> None:
        """A worked example for the model to follow; for `question` and `media` see `ask`."""
        self.messages += [make_message("user", question, media), make_message("assistant", answer)]

    def ask(self, question: str, media: list[dict] = (), streamer: BaseStreamer | None = None, **generation) -> str:
        """
        The answer to a question about the conversation so far.

        Args:
            question: what the user says. If it holds an `<image>` for each of the media, they stand there.
            media: pictures and videos in front of it, as `image_part` and `video_part` make them.
            streamer: receives the tokens as they come; not with beam search.
            generation: for `generate`: `max_new_tokens`, `num_beams`, `stop_strings` and the like. An answer ends
                before a stop string.

        Raises:
            ValueError: if `<image>` and media differ in number, the conversation is longer than the model reads, or
                the processor or `generate` refuses the input. The conversation is then as it was, as it is after any
                other interruption.
        """
        messages = [*self.messages, make_message("user", question, media)]
        answer = self._answer(messages, streamer, generation)
        self.messages = [*messages, make_message("assistant", answer)]
        return answer

    def ask_with_control(self, control: str, others: Sequence[list[dict]] = (), **generation) -> str | None:
        """
        What the model would have answered to the last question with other pictures and films in the last message that
        has any: whether it looked. The conversation stays as it is.

        Args:
            control: `blank`, in grey, or `swapped`, with the first of `others` that are not the same.
            others: media of other questions, as `image_part` and `video_part` make them.
            generation: see `ask`.

        Returns:
            the answer; None where the conversation has no pictures, or no others are given.
        """
        start = 0 if self.skill is None else len(self.skill.messages)
        own = self.messages[start:-1]
        rows = [own, *([make_message("user", "", media)] for media in others)]
        changed = control_messages(control, own, 0, len(rows), rows.__getitem__)
        if changed is own or media_of(changed) == media_of(own):
            return None
        again = ChatSession(self.model, self.processor, self.reuse_cache, self.skill)
        return again._answer([*again.messages, *changed], None, generation)

    @torch.inference_mode()
    def _answer(self, messages: list[dict], streamer: BaseStreamer | None, generation: dict) -> str:
        inputs = self.processor.apply_chat_template(
            self._prepare(fit_media(messages, self.processor)),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(self.model.device, self.model.dtype)
        length, context = inputs["input_ids"].shape[1], context_length(self.model)
        if context is not None:
            if length >= context:
                raise ValueError(
                    f"The conversation has {length} tokens, but the model reads at most {context - 1}: clear it, or "
                    "say less."
                )
            if wanted := generation.get("max_new_tokens"):
                generation["max_new_tokens"] = min(wanted, context - length)
        all_media = media_parts_of(messages)
        num_beams = generation.get("num_beams", 1)
        reuse = self.reuse_cache and num_beams == 1
        if reuse:
            self._keep_common_prefix(inputs, all_media)
            generation["past_key_values"] = self._cache
        elif self.skill is not None:
            generation["past_key_values"] = self.skill.cache_for(inputs, num_beams)
        cache, self._cache = self._cache, None  # what an interrupted answer leaves in it is unknown
        output = self.model.generate(
            **inputs, streamer=streamer, tokenizer=self.processor.tokenizer, **generation
        )  # (1, L + L_new)
        if reuse:
            # the last token was not fed to the model
            self._cache, self._cached_ids, self._cached_media = cache, output[:, : cache.get_seq_length()], all_media
        answer = self.processor.post_process_image_text_to_text(output[:, length:])[0]
        stops = generation.get("stop_strings") or ()
        for stop in [stops] if isinstance(stops, str) else stops:
            answer = answer.split(stop)[0].rstrip()
        return answer

    def _prepare(self, messages: list[dict]) -> list[dict]:
        """The messages with media that are ready: those of earlier turns are not resized again."""
        if not isinstance(self.processor, ChatProcessorMixin):
            return messages

        def prepare(part: dict) -> list[dict]:
            medium = part.get(part["type"])
            if part["type"] == "text" or medium is None:
                return [part]
            if id(medium) not in self._prepared:
                (ready,) = self.processor.prepare_media([{"role": "user", "content": [part]}])
                self._prepared[id(medium)] = medium, ready["content"][0]  # the medium, so that its id stays its own
            return [self._prepared[id(medium)][1]]

        return map_parts(messages, prepare)

    def _forget_cache(self) -> None:
        self._cache: DynamicCache | None = None
        self._cached_ids = torch.zeros(1, 0, dtype=torch.long)
        self._cached_media: list[dict] = []

    def _keep_common_prefix(self, inputs: Mapping, media: list[dict]) -> None:
        """Leave in the cache what the new prompt `(1, L)` begins with; its last token is always computed anew."""
        input_ids = inputs["input_ids"]
        shared = min(len(media), len(self._cached_media))
        same_media = all(old is new for old, new in zip(self._cached_media[:shared], media[:shared], strict=True))
        kept = common_length(input_ids[0, :-1], self._cached_ids[0]) if same_media else 0
        of_skill = None
        if self.skill is not None and kept < self.skill.input_ids.shape[1]:
            of_skill = self.skill.cache_for(inputs)
        if self._cache is not None and kept and of_skill is None:
            try:
                self._cache.crop(kept - self._cache.get_seq_length())
                return
            except RuntimeError:  # a sliding window has forgotten the tokens before it
                pass
        self._forget_cache()
        self._cache = DynamicCache(config=self.model.config.get_text_config()) if of_skill is None else of_skill


def make_message(role: str, text: str, media: list[dict] = ()) -> dict:
    """
    What somebody says about media, which stand where its `<image>` are, or else in front.

    Raises:
        ValueError: if `<image>` and media differ in number.
    """
    texts = text.split(IMAGE_TOKEN)
    if not media or len(texts) == 1:
        return {"role": role, "content": [*media, {"type": "text", "text": text}]}
    if len(texts) - 1 != len(media):
        raise ValueError(
            f"The message has {len(texts) - 1} {IMAGE_TOKEN} for {len(media)} pictures and videos; write one for "
            "each, or none to have them in front."
        )
    content = [{"type": "text", "text": texts[0]}]
    for part, words in zip(media, texts[1:], strict=True):
        content += [part, {"type": "text", "text": words}]
    return {"role": role, "content": content}
