"""`pipeline("image-text-to-text")` finds model and processor by itself."""

from transformers import pipeline

import otter_hf  # noqa: F401  registers the families


def test_pipeline_answers_messages_and_prompts(model, processor, pictures, tmp_path):
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    pipe = pipeline("image-text-to-text", model=str(tmp_path))
    content = [{"type": "image", "image": pictures[0]}, {"type": "text", "text": "what is it?"}]
    messages = [{"role": "user", "content": content}]
    (result,) = pipe(text=messages, max_new_tokens=4, generate_kwargs={"do_sample": False})
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    expected = processor.post_process_image_text_to_text(model.generate(**inputs, max_new_tokens=4, do_sample=False))
    reply = result["generated_text"][-1]
    assert reply == {"role": "assistant", "content": expected[0]}
    (result,) = pipe(
        images=pictures[1],
        text="<image>User: what? GPT:<answer>",
        max_new_tokens=2,
        return_full_text=False,
    )
    assert isinstance(result["generated_text"], str)
