"""What the GPU kit measures: models with random weights at real and at tiny shapes, their inputs, and the clock."""

import dataclasses
import functools
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from transformers import CONFIG_MAPPING, FuyuConfig, FuyuForCausalLM, IdeficsConfig, IdeficsForVisionText2Text

from otter_hf import (
    FlamingoConfig,
    FlamingoForConditionalGeneration,
    OtterConfig,
    OtterForConditionalGeneration,
    OtterHDConfig,
    OtterHDForConditionalGeneration,
)


FACTS = Path(__file__).parents[1] / "model_cards" / "facts.yaml"
CLASSES = {
    OtterConfig: OtterForConditionalGeneration,
    FlamingoConfig: FlamingoForConditionalGeneration,
    OtterHDConfig: OtterHDForConditionalGeneration,
    FuyuConfig: FuyuForCausalLM,
    IdeficsConfig: IdeficsForVisionText2Text,
}


@dataclasses.dataclass
class Machine:
    """
    Where the kit runs.

    Args:
        device: `cuda` or `cpu`.
        tiny: shapes for a CPU in place of those of the published models.
        cuda: what tells time and memory of a card: `torch.cuda`, or a stand-in.
    """

    device: torch.device
    tiny: bool
    cuda: object = torch.cuda

    @property
    def on_card(self) -> bool:
        return self.device.type == "cuda"

    def wait(self) -> None:
        if self.on_card:
            self.cuda.synchronize()

    def seconds(self, function: Callable, repeats: int = 3) -> float:
        """Median seconds of a call after one to warm up; on a card between two of its events."""
        function()
        times = []
        for _ in range(1 if self.tiny else repeats):
            if self.on_card:
                start, end = self.cuda.Event(enable_timing=True), self.cuda.Event(enable_timing=True)
                start.record()
                function()
                end.record()
                self.cuda.synchronize()
                times.append(start.elapsed_time(end) / 1000)
            else:
                start = time.perf_counter()
                function()
                times.append(time.perf_counter() - start)
        return statistics.median(times)

    def peak_bytes(self, function: Callable) -> int | None:
        """The most memory that was in use during a call, all that was there before included; None on a CPU."""
        if not self.on_card:
            function()
            return None
        self.cuda.synchronize()
        self.cuda.reset_peak_memory_stats()
        function()
        self.cuda.synchronize()
        return self.cuda.max_memory_allocated()

    def free(self) -> None:
        """Give back the memory of models that nobody holds any more."""
        if self.on_card:
            gc.collect()
            self.cuda.empty_cache()

    @functools.cached_property
    def peak_flops(self) -> float:
        """Operations per second of a multiplication of large square matrices in bfloat16."""
        size = 64 if self.tiny else 8192
        left, right = torch.randn(2, size, size, device=self.device).bfloat16()
        return 2 * size**3 / self.seconds(lambda: left @ right, 5)

    @functools.cached_property
    def copy_rate(self) -> float:
        """Bytes per second that the memory reads and writes together when it copies."""
        source = torch.empty(2**16 if self.tiny else 2**30, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2 * source.numel() / self.seconds(lambda: target.copy_(source), 5)


def build(config, machine: Machine, dtype: torch.dtype, attention: str | dict | None = None):
    """A model with random weights, made on the device, in evaluation mode; open gates for what has gates."""
    torch.manual_seed(0)
    with torch.device(machine.device):
        model = CLASSES[type(config)]._from_config(config, dtype=dtype, attn_implementation=attention)
    return model.eval()


def small(family: str, tiny: bool):
    """Configurations of the comparisons: two layers, heads of 64, which every kernel takes, or of 16."""
    head = 16 if tiny else 64
    width = {"hidden_size": 2 * head, "intermediate_size": 4 * head, "num_hidden_layers": 2, "num_attention_heads": 2}
    if family == "otterhd":
        text = {**width, "model_type": "persimmon", "vocab_size": 512, "rope_theta": 25000.0, "initializer_range": 0.1}
        return OtterHDConfig(patch_size=8, image_token_id=500, bos_token_id=1, eos_token_id=2, text_config=text)
    text = {**width, "model_type": "llama", "vocab_size": 512, "num_key_value_heads": 2, "initializer_range": 0.1}
    if family == "otter-mpt":
        text = {"model_type": "otter_mpt", "vocab_size": 512, "d_model": 2 * head, "n_heads": 2, "n_layers": 2}
        text |= {"expansion_ratio": 2, "max_seq_len": 512, "initializer_range": 0.1}
    vision = {"model_type": "clip_vision_model", "image_size": 28, "patch_size": 14, "hidden_size": head}
    vision |= {"intermediate_size": 2 * head, "num_hidden_layers": 1, "num_attention_heads": 1}
    config_class = FlamingoConfig if family == "flamingo" else OtterConfig
    return config_class(
        text_config=text,
        vision_config=vision,
        cross_attn_every_n_layers=2,
        cross_attn_num_heads=2,
        cross_attn_head_dim=head,
        cross_attn_gate_init=1.0,
        perceiver_depth=1,
        perceiver_num_latents=8,
        perceiver_num_heads=1,
        perceiver_head_dim=head,
        image_token_id=500,
        initializer_range=0.1,
    )


def published(name: str, tiny: bool):
    """The configuration of a model of the decoding and training sections: `otter-mpt`, `otter-llama`, `otterhd` ..."""
    if name == "idefics":
        return _idefics(tiny)
    if name == "fuyu":
        ours = published("otterhd", tiny).to_dict()
        kept = {key: ours[key] for key in ("patch_size", "image_token_id", "text_config")}
        return FuyuConfig(**kept)
    if tiny:
        return small(name, tiny)
    if name == "otterhd":
        return OtterHDConfig()
    repository = {"otter-mpt": "luodian/OTTER-Image-MPT7B", "otter-llama": "luodian/OTTER-Image-LLaMA7B-LA-InContext"}
    cards = yaml.safe_load(FACTS.read_text(encoding="utf-8"))["models"].values()
    facts = next(card for card in cards if card["repository"] == repository[name])["config"]
    config = CONFIG_MAPPING[facts["model_type"]].from_dict(dict(facts))
    config.cross_attn_gate_init = 1.0
    config.image_token_id = min(32000, config.get_text_config().vocab_size) - 1  # below which random text is
    return config


def _idefics(tiny: bool) -> IdeficsConfig:
    """Idefics at the shape of its 9B checkpoint."""
    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    vision = {"embed_dim": 1280, "image_size": 224, "intermediate_size": 5120, "num_hidden_layers": 32}
    perceiver = {"resampler_depth": 6, "resampler_n_heads": 16, "resampler_head_dim": 96, "resampler_n_latents": 64}
    if tiny:
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        vision = {"embed_dim": 16, "image_size": 28, "intermediate_size": 32, "num_hidden_layers": 1}
        perceiver = {"resampler_depth": 1, "resampler_n_heads": 1, "resampler_head_dim": 16, "resampler_n_latents": 8}
    return IdeficsConfig(
        **sizes,
        vocab_size=512 if tiny else 32000,
        additional_vocab_size=0,
        cross_layer_interval=2 if tiny else 4,
        alpha_initializer="ones",
        use_resampler=True,
        tie_word_embeddings=False,
        vision_config={**vision, "patch_size": 14, "num_attention_heads": 1 if tiny else 16},
        perceiver_config={**perceiver, "use_resampler": True},
    )


def is_otterhd(config) -> bool:
    return isinstance(config, (OtterHDConfig, FuyuConfig))


def samples(config, machine: Machine, lengths: list[int], media: list[int], side: int = 2) -> list[dict]:
    """
    Samples of random text with images among it, each `input_ids (L,)`, `labels (L,)` with half of the text, and the
    images: `pixel_values (T, 1, 3, H, W)`, of OtterHD the patches `(T * side^2, 3 P P)` of squares.
    """
    generator = torch.Generator().manual_seed(0)
    rows = []
    image = getattr(config, "image_token_id", None) or 9  # Idefics has a mask in place of the token
    vocabulary = min(config.get_text_config().vocab_size, 32000, image if image > 100 else 32000)
    for length, count in zip(lengths, media, strict=True):
        text = torch.randint(10, vocabulary, (length,), generator=generator)
        if is_otterhd(config):
            patches = count * side**2
            ids = torch.cat([torch.full((patches,), image), text[patches:]])
            pixels = torch.randn(patches, 3 * config.patch_size**2, generator=generator)
        else:
            ids = text.clone()
            ids[: count * (length // max(1, count)) : length // max(1, count)] = image
            size = config.vision_config.image_size
            pixels = torch.randn(count, 1, 3, size, size, generator=generator)
        labels = ids.masked_fill(ids == image, -100)
        labels[: length // 2] = -100
        rows.append({"input_ids": ids, "labels": labels, "pixel_values": pixels})
    return rows


def padded(config, rows: list[dict], machine: Machine, side: str = "right", labels: bool = True) -> dict:
    """The samples as a padded batch."""
    length = max(len(row["input_ids"]) for row in rows)

    def pad(values, fill):
        missing = length - len(values)
        return torch.nn.functional.pad(values, (0, missing) if side == "right" else (missing, 0), value=fill)

    batch = {
        "input_ids": torch.stack([pad(row["input_ids"], 5) for row in rows]),
        "attention_mask": torch.stack([pad(torch.ones_like(row["input_ids"]), 0) for row in rows]),
    }
    if labels:
        batch["labels"] = torch.stack([pad(row["labels"], -100) for row in rows])
    if is_otterhd(config):
        batch["pixel_values"] = torch.cat([row["pixel_values"] for row in rows])
    else:
        most = max(len(row["pixel_values"]) for row in rows)
        fill = [torch.nn.functional.pad(p, (0, 0) * 4 + (0, most - len(p))) for p in (r["pixel_values"] for r in rows)]
        batch["pixel_values"] = torch.stack(fill)
    return {key: value.to(machine.device) for key, value in batch.items()}


def packed(config, rows: list[dict], machine: Machine) -> dict:
    """The samples in one row, as our collators pack them, with the numbers that training hands to the model."""
    from otter_hf.models.host_reads import known_on_host

    lengths = [len(row["input_ids"]) for row in rows]
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    batch = {
        "input_ids": torch.cat([row["input_ids"] for row in rows])[None],
        "labels": torch.cat([row["labels"] for row in rows])[None],
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }
    batch["pixel_values"] = torch.cat([row["pixel_values"] for row in rows])
    if not is_otterhd(config):
        batch["pixel_values"] = batch["pixel_values"][None]
        seen, index = 0, []
        for row in rows:
            own = (row["input_ids"] == config.image_token_id).cumsum(0)
            index.append(torch.where(own > 0, own + seen, 0))
            seen += len(row["pixel_values"])
        batch["media_index"] = torch.cat(index)[None]
    batch |= known_on_host(batch, config.image_token_id)
    return {key: value.to(machine.device) if torch.is_tensor(value) else value for key, value in batch.items()}
