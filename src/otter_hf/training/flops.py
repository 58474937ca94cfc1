"""Operations of a training step, counted from shapes."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedConfig, PreTrainedModel

from .freezing import is_trained


@dataclass(frozen=True)
class TrainingFlops:
    """
    Floating-point operations of forward and backward pass, without what checkpointing computes again.

    Args:
        per_token: of a token in the decoder's linear layers.
        per_label: of a token with a label in the output layer.
        per_pixel: of a pixel of a frame, all channels, in the vision tower and as a source of the resampler.
        per_medium: of the latents of an image or video, in the resampler and in the keys and values of gated blocks.
        per_square: of a sample in self-attention, for each token of its length squared.
    """

    per_token: int
    per_label: int
    per_pixel: float
    per_medium: int
    per_square: int

    def count(self, tokens: int, labels: int, pixels: int, media: int, squares: int) -> float:
        """Operations of a batch: `squares` is the sum of its samples' squared lengths."""
        return (
            self.per_token * tokens
            + self.per_label * labels
            + self.per_pixel * pixels
            + self.per_medium * media
            + self.per_square * squares
        )


def count_training_flops(
    model: PreTrainedModel, *, cache_text_states: bool = False, media_store: bool = False
) -> TrainingFlops:
    """
    Counts for a Flamingo, Otter or OtterHD.

    A matrix multiplication counts twice as many operations as it has weights for each position: once forward, once
    backward for its input, and once more for a weight that is trained. What is in front of the first trained parameter
    has no backward pass: so frozen decoder layers below it, and a frozen vision tower, and with it a frozen resampler.

    Args:
        model: on the meta device, where nothing is computed, with the parameters to train marked.
        cache_text_states: leave out the frozen layers below the first gated block, whose states are kept.
        media_store: leave out a frozen vision tower, and with it a frozen resampler, whose features are kept.
    """
    text = model.config.get_text_config()
    core = model.get_base_model().model if hasattr(model, "get_base_model") else model.model
    has_blocks = hasattr(core, "decoder_layers")
    layers = list(core.decoder_layers if has_blocks else core.language_model.layers)
    trains_media = has_blocks and (is_trained(core.vision_tower) or is_trained(core.perceiver))
    first = _first_reached(core, layers, trains_media)
    kept = 0
    if cache_text_states and has_blocks:
        gated = [number for number, layer in enumerate(layers) if layer.gated_cross_attn_layer is not None]
        kept = min(first, gated[0])
    below = {id(module): number for number, layer in enumerate(layers[:first]) for module in layer.modules()}
    per_token = per_medium = 0
    per_pixel = 0.0
    for name, module in model.named_modules():
        # PEFT keeps what is trained whole as it was, beside the copy that is computed
        if not isinstance(module, nn.Linear) or ".language_model." not in name or ".original_module." in name:
            continue
        if (number := below.get(id(module))) is not None:
            work = 0 if number < kept else 2 * module.weight.numel()
        else:
            work = _of_weight(module)
        if ".gated_cross_attn_layer." in name and ".to_kv" in name:
            if id(module) not in below and not trains_media and ".lora_B." not in name:
                work -= 2 * module.weight.numel()  # what comes in has no gradient
            per_medium += model.config.perceiver_num_latents * work
        else:
            per_token += work
    if has_blocks:
        per_pixel, resampler = _count_vision(core, media_store)
        per_medium += resampler
    head_width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    # scores and values, 2 operations each, over the half that is not in the future; backward twice as many
    times = 3 * len(layers) - 2 * first - kept
    per_square = 4 * times * text.num_attention_heads * head_width // 2
    return TrainingFlops(per_token, _of_weight(model.get_output_embeddings()), per_pixel, per_medium, per_square)


def _first_reached(core: nn.Module, layers: list[nn.Module], trains_media: bool) -> int:
    """Number of the first decoder layer that a gradient reaches; their number if none does."""
    patches = getattr(core, "vision_embed_tokens", None)  # of OtterHD
    if is_trained(core.get_input_embeddings()) or (patches is not None and is_trained(patches)):
        return 0
    for number, layer in enumerate(layers):
        if is_trained(layer) or (trains_media and layer.gated_cross_attn_layer is not None):
            return number
    return len(layers)


def _count_vision(core: nn.Module, is_stored: bool) -> tuple[float, int]:
    """Operations for each pixel of a frame, and beside these for each medium."""
    config = core.config.vision_config
    passes = 3 if is_trained(core.vision_tower) else 0 if is_stored else 1
    size = getattr(config, "image_size", 224)  # convolutional towers take any
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    frame = torch.empty(1, config.num_channels, height, width, device="meta", dtype=core.vision_tower.dtype)
    counts = []
    with _eager(core):
        with FlopCounterMode(display=False) as tower:
            features = core.vision_tower(frame).last_hidden_state
        features = features.flatten(2).transpose(1, 2) if features.ndim == 4 else features
        for length in (1, 2):
            with FlopCounterMode(display=False) as resampler:
                core.perceiver(features.repeat(1, length, 1)[:, None])
            counts.append(resampler.get_total_flops())
    source = counts[1] - counts[0]
    again = 3 if passes == 3 or is_trained(core.perceiver) else passes
    return (passes * tower.get_total_flops() + again * source) / (height * width), again * (counts[0] - source)


@contextlib.contextmanager
def _eager(core: nn.Module) -> Iterator[None]:
    """Attention in products of matrices, which are counted: flash attention neither is, nor runs without a card."""
    # of all modules: what PEFT trains whole is a copy with a configuration of its own
    owners = [
        module.config for module in core.modules() if isinstance(getattr(module, "config", None), PreTrainedConfig)
    ]
    chosen = {id(config): (config, config._attn_implementation) for config in owners}
    for config, _ in chosen.values():
        config._attn_implementation = {"": "eager"}
    try:
        yield
    finally:
        for config, name in chosen.values():
            config._attn_implementation = {"": name}


def _of_weight(layer: nn.Module) -> int:
    # a wrapper, as of a layer of which PEFT trains single rows, has the weight only
    return (6 if layer.weight.requires_grad else 4) * layer.weight.numel()


def measure_peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second that a multiplication of large square matrices reaches on the device."""
    from torch.utils.benchmark import Timer

    size = 1024 if device.type == "cpu" else 8192
    left, right = torch.randn(2, size, size, device=device).to(dtype)
    # the timer waits for the device, and takes one thread unless it is told the number in use
    timer = Timer("left @ right", globals={"left": left, "right": right}, num_threads=torch.get_num_threads())
    timer.timeit(1)
    return 2 * size**3 / min(timer.timeit(1).median for _ in range(3))
