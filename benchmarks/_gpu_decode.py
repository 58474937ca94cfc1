"""Sections `decode`, `compiled` and `host`: ms per token, the share of the memory's rate, and waits of the host."""

import functools
from collections.abc import Iterator

import torch
from _gpu_host import host_waits
from _gpu_models import Machine, build, is_otterhd, packed, padded, published, samples, small


IMAGES, PROMPT = 4, 128


def rows(machine: Machine) -> Iterator:
    """Pairs of a workload and the function that measures it; a model is made once for its rows, and then let go."""
    for name in ("otter-mpt", "otter-llama", "otterhd", "idefics"):
        holder: dict = {}
        for batch_size in (1, 2) if machine.tiny else (1, 8, 32):
            yield (
                f"{name}: a decoding step, {batch_size} rows, {IMAGES} images, bfloat16",
                functools.partial(decoding, name, batch_size, "dynamic", machine, holder),
            )
        holder.clear()
        machine.free()


def static_rows(machine: Machine) -> Iterator:
    """The same for a static cache, which is compiled on a card."""
    for name in ("otter-mpt", "otter-llama", "otterhd"):
        yield (
            f"{name}: a decoding step, 1 row, {IMAGES} images, bfloat16, static cache, compiled",
            functools.partial(decoding, name, 1, "static", machine, {}),
        )


def decoding(name: str, batch_size: int, cache: str, machine: Machine, holder: dict) -> dict:
    config = published(name, machine.tiny)
    if "model" not in holder:
        holder["model"] = build(config, machine, torch.bfloat16, "sdpa")
    model = holder["model"]
    prompt, steps = (48, 2) if machine.tiny else (PROMPT, 32)
    if is_otterhd(config) and not machine.tiny:
        prompt += IMAGES * 10**2  # four images of 300 x 300 pixels
    texts = samples(config, machine, [prompt] * batch_size, [IMAGES] * batch_size, 2 if machine.tiny else 10)
    batch = padded(config, texts, machine, labels=False)
    if name == "idefics":
        index = torch.arange(prompt, device=machine.device) // (prompt // IMAGES)  # (L,)
        mask = torch.nn.functional.one_hot(index.clamp(max=IMAGES - 1), IMAGES)
        batch["image_attention_mask"] = mask.expand(batch_size, -1, -1)
        batch["pixel_values"] = batch["pixel_values"].flatten(1, 2)
    batch["pixel_values"] = batch["pixel_values"].to(torch.bfloat16)
    settings = {"do_sample": False, "pad_token_id": 0}
    if cache == "static":
        settings["cache_implementation"] = "static"
    if getattr(config, "image_token_id", None) is not None:
        settings["suppress_tokens"] = [config.image_token_id]

    @torch.no_grad()
    def generate(count: int):
        return model.generate(**batch, **settings, min_new_tokens=count, max_new_tokens=count)

    one, all_ = (machine.seconds(lambda count=count: generate(count)) for count in (1, 1 + steps))
    seconds = (all_ - one) / steps
    if seconds <= 0:  # a model of nothing on a machine that is busy otherwise
        return {"left_out": "a step takes less than the timings differ by", "first_token": round(1000 * one, 3)}
    moved = decoder_bytes(model) + cache_bytes(config, batch_size, prompt + steps // 2)
    return {
        "unit": "ms",
        "first_token": round(1000 * one, 3),
        "ours" if name != "idefics" else "peer": round(1000 * seconds, 3),
        "tokens_per_second": round(batch_size / seconds, 1),
        "share_of_memory_rate": round(moved / seconds / machine.copy_rate, 3),
        "memory_rate_gb_per_second": round(machine.copy_rate / 1e9, 1),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def decoder_bytes(model) -> int:
    """Of the weights that a decoding step reads: not the embeddings, the vision tower and the resampler."""
    left_out = ("vision", "perceiver", "embed_tokens", "wte", "to_kv")
    tied = model.get_output_embeddings().weight
    counted = [p for n, p in model.named_parameters() if p is not tied and not any(part in n for part in left_out)]
    return sum(p.numel() * p.element_size() for p in [*counted, tied])


def cache_bytes(config, batch_size: int, tokens: int) -> int:
    """Keys and values of the text in bfloat16, and of the one image that each row looks at."""
    text = config.get_text_config()
    size = 2 * text.num_hidden_layers * text.hidden_size * tokens
    if hasattr(config, "cross_attn_every_n_layers"):
        gated = text.num_hidden_layers // config.cross_attn_every_n_layers
        width = config.cross_attn_num_heads * config.cross_attn_head_dim
        size += 2 * gated * width * config.perceiver_num_latents
    return 2 * batch_size * size


def host_rows(machine: Machine) -> Iterator:
    """Pairs of a workload and the function that counts, of the section `host`."""
    for family in ("otter-llama", "otter-mpt", "flamingo", "otterhd"):
        yield f"{family}: waits in a decoding step", functools.partial(waits_of_decoding, family, machine)
        yield f"{family}: waits in a training step, packed", functools.partial(waits_of_training, family, machine)


@torch.no_grad()
def waits_of_decoding(family: str, machine: Machine) -> dict:
    config = small(family, machine.tiny)
    model = build(config, machine, torch.bfloat16 if machine.on_card else torch.float32, "sdpa")
    batch = padded(config, samples(config, machine, [24, 17], [2, 1]), machine, side="left", labels=False)
    batch["pixel_values"] = batch["pixel_values"].to(model.dtype)
    outputs = model(**batch, use_cache=True)
    mask, count = batch["attention_mask"], 3
    token = torch.full_like(mask[:, :1], 7)
    one = torch.ones_like(token)
    with host_waits(machine.device) as waits:
        for _ in range(count):
            mask = torch.cat([mask, one], dim=1)
            outputs = model(input_ids=token, attention_mask=mask, past_key_values=outputs.past_key_values)
    return _told(waits, count, 0)


def waits_of_training(family: str, machine: Machine) -> dict:
    """Forward, backward, and an optimizer's step which looks once whether loss and gradient are finite."""
    config = small(family, machine.tiny)
    attention = "varlen_sdpa"
    model = build(config, machine, torch.float32, attention).train()
    batch = packed(config, samples(config, machine, [48, 31, 17], [3, 1, 0]), machine)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step():
        with torch.autocast(machine.device.type, torch.bfloat16, enabled=machine.on_card):
            loss = model(**batch).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if not torch.stack([loss.detach(), norm]).isfinite().all():
            raise ValueError("The loss or a gradient is not finite.")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()  # what is read once, at the first
    with host_waits(machine.device) as waits:
        step()
    return _told(waits, 1, 1)


def _told(waits, steps: int, goal: int) -> dict:
    told = {place: round(count / steps, 2) for place, count in waits.places.items()}
    return {"unit": "waits per step", "ours": round(waits.total / steps, 2), "goal": goal, "places": told}
