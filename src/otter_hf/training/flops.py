"""Operations of a training step, counted from shapes."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel


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


def count_training_flops(model: PreTrainedModel) -> TrainingFlops:
    """
    Counts for a Flamingo, Otter or OtterHD.

    A matrix multiplication counts twice as many operations as it has weights for each position: once forward, once
    backward for its input, and once more for a weight that is trained. What is in front of the first trained parameter
    has no backward pass: so a frozen vision tower, and with it a frozen resampler.

    Args:
        model: on the meta device, where nothing is computed, with the parameters to train marked.
    """
    text = model.config.get_text_config()
    per_token = per_medium = 0
    per_pixel = 0.0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".language_model." in name:
            if name.endswith("gated_cross_attn_layer.attn.to_kv"):
                per_medium += model.config.perceiver_num_latents * _of_weight(module)
            else:
                per_token += _of_weight(module)
    core = model.get_base_model().model if hasattr(model, "get_base_model") else model.model
    if hasattr(core, "vision_tower"):
        per_pixel, resampler = _count_vision(core)
        per_medium += resampler
    head_width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    # scores and values, 2 operations each, forward and twice backward, over the half that is not in the future
    per_square = 3 * 4 * text.num_hidden_layers * text.num_attention_heads * head_width // 2
    return TrainingFlops(per_token, _of_weight(model.get_output_embeddings()), per_pixel, per_medium, per_square)


def _count_vision(core: nn.Module) -> tuple[float, int]:
    """Operations for each pixel of a frame, and beside these for each medium."""
    config = core.config.vision_config
    passes = 3 if any(parameter.requires_grad for parameter in core.vision_tower.parameters()) else 1
    size = getattr(config, "image_size", 224)  # convolutional towers take any
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    frame = torch.empty(1, config.num_channels, height, width, device="meta", dtype=core.vision_tower.dtype)
    with FlopCounterMode(display=False) as tower:
        features = core.vision_tower(frame).last_hidden_state
    features = features.flatten(2).transpose(1, 2) if features.ndim == 4 else features
    counts = []
    for length in (1, 2):
        with FlopCounterMode(display=False) as resampler:
            core.perceiver(features.repeat(1, length, 1)[:, None])
        counts.append(resampler.get_total_flops())
    source = counts[1] - counts[0]
    trained = 3 if passes == 3 or any(parameter.requires_grad for parameter in core.perceiver.parameters()) else 1
    return (passes * tower.get_total_flops() + trained * source) / (height * width), trained * (counts[0] - source)


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
