"""
What is new in a model begins at the size of what is there: a data-dependent initialisation.

    python examples/real_parts/begin.py --model out/demo-real/untrained --data out/demo-real/data

Of random weights the first thousands of steps go into two differences of size, which a few training samples show
(Krähenbühl et al. 2016, https://huggingface.co/papers/1511.06856):

- Each channel of a tower's features has a mean and a deviation of its own, and what differs from picture to picture is
  a small part of them. The resampler's norm of them begins as the one that leaves mean 0 and deviation 1.
- Likewise what differs from question to question is a small part of the states that an answer is read from: a gated
  block's norms begin with mean 0 and deviation 1 there.
- The states of a decoder grow from layer to layer: beside those of the last ones, what a new block adds is nothing.
  The last matrices of its attention and feed-forward begin as large as makes that a share of the states. That of the
  attention is small: the feed-forward layer reads the sum, and what tells questions apart is a sixth of the states.
"""

import argparse
from collections import defaultdict
from pathlib import Path
from random import Random

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import otter_hf  # noqa: F401  registers the models with the Auto classes
from otter_hf.data import MimicitMixture, OtterCollator, SampleOptions


NUM_SAMPLES_PER_TASK = 16
ATTENTION_SHARE = 0.1
FEED_FORWARD_SHARE = 0.5


def main(model_folder: Path, data: Path) -> None:
    """Writes the model in `model_folder` anew."""
    processor = AutoProcessor.from_pretrained(model_folder)
    model = AutoModelForImageTextToText.from_pretrained(model_folder)
    mixture = MimicitMixture(data / "train.yaml", SampleOptions(num_frames=4))
    of_task = defaultdict(list)
    for sample in mixture:
        of_task[sample["dataset"]].append(sample)
    # of each task as many: what is large in one of them only is no measure for the others
    drawn = [s for task in of_task.values() for s in Random(0).sample(task, min(NUM_SAMPLES_PER_TASK, len(task)))]
    begin(model, OtterCollator(processor)(drawn))
    model.save_pretrained(model_folder)


@torch.no_grad()
def begin(model, inputs: dict) -> None:
    """One pass over a batch, in which each new part is set before the next one reads what it gives."""
    hooks = []
    for block in model.model.perceiver.layers:
        hooks.append(block.norm_media.register_forward_hook(standardise()))
    # a token's state gives the next one
    following = inputs["labels"].roll(-1, dims=1)
    gives_answers = (following != -100) & (following != model.config.end_of_chunk_token_id)
    for layer in model.model.decoder_layers:
        if (block := layer.gated_cross_attn_layer) is not None:
            for norm in (block.attn.norm, block.feed_forward[0]):
                hooks.append(norm.register_forward_hook(standardise(gives_answers)))
            hooks += scale_branches(block)
    model(**inputs)
    for hook in hooks:
        hook.remove()


def standardise(where: torch.Tensor | None = None):
    """Forward hook of a LayerNorm over `(..., D)`: mean 0 and deviation 1 of each channel, over the tokens `where`."""

    def hook(norm, _, output: torch.Tensor) -> torch.Tensor:
        deviation, mean = torch.std_mean(output.flatten(0, -2) if where is None else output[where], dim=0)
        norm.weight.div_(deviation)
        norm.bias.sub_(mean).div_(deviation)
        return (output - mean) / deviation

    return hook


def scale_branches(block) -> list:
    """Hooks on a gated block, whose gates are open: attention and feed-forward begin with their shares."""
    size = {}

    def measure(_, args):
        # the first token of a text has states many times as large as all others
        size["states"] = args[0].flatten(0, -2).pow(2).mean(dim=-1).sqrt().median()

    def scale(gate, share):
        def hook(linear, _, output):
            factor = share * size["states"] / (gate.tanh() * output.pow(2).mean().sqrt())
            linear.weight.mul_(factor)
            return output * factor

        return hook

    return [
        block.register_forward_pre_hook(measure),
        block.attn.to_out.register_forward_hook(scale(block.attn_gate, ATTENTION_SHARE)),
        block.feed_forward[3].register_forward_hook(scale(block.ff_gate, FEED_FORWARD_SHARE)),
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("out/demo-real/untrained"))
    parser.add_argument("--data", type=Path, default=Path("out/demo-real/data"))
    arguments = parser.parse_args()
    main(arguments.model, arguments.data)
