"""Text and images for Otter: a Flamingo processor that also knows `<answer>` and Otter's prompt."""

from ...prompts import chat_template as otter_chat_template
from ...prompts import reserved_tokens_of
from ..flamingo.processing_flamingo import FlamingoProcessor


class OtterProcessor(FlamingoProcessor):
    r"""
    As [`FlamingoProcessor`], with `<answer>` in the tokenizer and Otter's chat template:

    ```python
    content = [{"type": "image", "image": image}, {"type": "text", "text": "What is this?"}]
    messages = [{"role": "user", "content": content}]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    answer = processor.post_process_image_text_to_text(model.generate(**inputs))[0]
    ```

    Args:
        chat_template (`str`, *optional*): by default the form the published checkpoints are prompted with,
            `<image>User: {question} GPT:<answer>`. A model trained on another form is saved with its own.
    """

    answer_token = "<answer>"
    special_tokens = (*FlamingoProcessor.special_tokens, answer_token)
    answer_start_token = answer_token

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, num_frames=None, **kwargs):
        chat_template = chat_template or otter_chat_template("spaced", reserved_tokens_of(tokenizer))
        super().__init__(image_processor, tokenizer, chat_template=chat_template, num_frames=num_frames, **kwargs)
        self.answer_token_id = tokenizer.convert_tokens_to_ids(self.answer_token)


__all__ = ["OtterProcessor"]
