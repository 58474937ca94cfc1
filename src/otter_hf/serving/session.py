"""A conversation with a model, which reads each word and picture once."""

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.generation.streamers import BaseStreamer
from transformers.processing_utils import ProcessorMixin

from ..models.flamingo import FlamingoForConditionalGeneration
from ..models.otterhd import OtterHDForConditionalGeneration
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
    """

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin, reuse_cache: bool = True):
        self.model = model
        self.processor = processor
        self.reuse_cache = reuse_cache and isinstance(
            model, (FlamingoForConditionalGeneration, OtterHDForConditionalGeneration)
        )
        self.clear()

    def clear(self) -> None:
        """Forget the conversation."""
        self.messages: list[dict] = []
        self._forget_cache()

    def add_example(self, question: str, answer: str, media: list[dict] = ()) -> None:
        """A worked example for the model to follow; for `question` and `media` see `ask`."""
        self.messages += [make_message("user", question, media), make_message("assistant", answer)]

    @torch.inference_mode()
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
            ValueError: if `<image>` and media differ in number, or the processor or `generate` refuses the input. The
                conversation is then as it was, as it is after any other interruption.
        """
        messages = [*self.messages, make_message("user", question, media)]
        inputs = self.processor.apply_chat_template(
            fit_media(messages, self.processor),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(self.model.device, self.model.dtype)
        all_media = [part for message in messages for part in message["content"] if part["type"] != "text"]
        reuse = self.reuse_cache and generation.get("num_beams", 1) == 1
        if reuse:
            self._keep_common_prefix(inputs["input_ids"], all_media)
            generation["past_key_values"] = self._cache
        cache, self._cache = self._cache, None  # what an interrupted answer leaves in it is unknown
        output = self.model.generate(
            **inputs, streamer=streamer, tokenizer=self.processor.tokenizer, **generation
        )  # (1, L + L_new)
        if reuse:
            # the last token was not fed to the model
            self._cache, self._cached_ids, self._cached_media = cache, output[:, : cache.get_seq_length()], all_media
        answer = self.processor.post_process_image_text_to_text(output[:, inputs["input_ids"].shape[1] :])[0]
        stops = generation.get("stop_strings") or ()
        for stop in [stops] if isinstance(stops, str) else stops:
            answer = answer.split(stop)[0].rstrip()
        self.messages = [*messages, make_message("assistant", answer)]
        return answer

    def _forget_cache(self) -> None:
        self._cache: DynamicCache | None = None
        self._cached_ids = torch.zeros(1, 0, dtype=torch.long)
        self._cached_media: list[dict] = []

    def _keep_common_prefix(self, input_ids: torch.LongTensor, media: list[dict]) -> None:
        """Leave in the cache what the new prompt `(1, L)` begins with; its last token is always computed anew."""
        shared = min(len(media), len(self._cached_media))
        same_media = all(old is new for old, new in zip(self._cached_media[:shared], media[:shared], strict=True))
        length = min(input_ids.shape[1] - 1, self._cached_ids.shape[1])
        equal = (input_ids[0, :length] == self._cached_ids.to(input_ids.device)[0, :length]).long()
        kept = int(equal.cumprod(0).sum()) if same_media else 0
        if self._cache is not None and kept:
            try:
                self._cache.crop(kept - self._cache.get_seq_length())
                return
            except RuntimeError:  # a sliding window has forgotten the tokens before it
                pass
        self._forget_cache()
        self._cache = DynamicCache(config=self.model.config.get_text_config())


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
