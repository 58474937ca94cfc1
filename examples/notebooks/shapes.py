"""
Pictures of coloured shapes, and an Otter small enough to learn them while you read: the notebooks' stand-ins for your
pictures and for a model of the Hub.
"""

import contextlib
import io
from pathlib import Path
from random import Random

import torch
import yaml
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, LlamaConfig, PreTrainedTokenizerFast, ResNetConfig

from otter_hf import OtterConfig, OtterForConditionalGeneration, OtterProcessor
from otter_hf.data import chat_template, write_mimicit


COLORS = {"red": (208, 52, 44), "green": (40, 150, 80), "blue": (44, 92, 200), "yellow": (240, 200, 40)}
SHAPES = ("circle", "square")
SIZE = 64


def draw(color: str, shape: str, center: tuple[float, float] = (0.5, 0.5), radius: float = 0.28) -> Image.Image:
    """A 64x64 picture; center and radius as shares of its width."""
    scale = 4 * SIZE  # drawn large and shrunk: smooth edges
    picture = Image.new("RGB", (scale, scale), (250, 248, 240))
    x, y = center[0] * scale, center[1] * scale
    box = (x - radius * scale, y - radius * scale, x + radius * scale, y + radius * scale)
    pen = ImageDraw.Draw(picture)
    (pen.ellipse if shape == "circle" else pen.rectangle)(box, fill=COLORS[color])
    return picture.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def random_shape(generator: Random) -> tuple[Image.Image, str, str]:
    """A picture with its color and shape."""
    color, shape = generator.choice(list(COLORS)), generator.choice(SHAPES)
    center = (generator.uniform(0.35, 0.65), generator.uniform(0.35, 0.65))
    return draw(color, shape, center, generator.uniform(0.2, 0.3)), color, shape


def write_shapes(folder: Path, name: str, count: int, seed: int) -> Path:
    """`count` random pictures with a question about color and one about shape each, as MIMIC-IT files; a mixture."""
    generator = Random(seed)
    records, images = {}, {}
    for i in range(count):
        picture, color, shape = random_shape(generator)
        images[f"IMG_{i}"] = picture
        for question, answer in (("what color is it?", color), ("what shape is it?", shape)):
            records[f"INS_{i}_{answer}"] = {"instruction": question, "answer": answer, "image_ids": [f"IMG_{i}"]}
    paths = write_mimicit(folder, name, records, images)
    mixture = folder / f"{name}.yaml"
    mixture.write_text(
        f"IMAGE_TEXT:\n  shapes:\n    mimicit_path: {paths.instructions_path}\n    images_path: {paths.images_path}\n"
    )
    return mixture


def build_otter(folder: Path, of_2023: bool = False) -> Path:
    """
    A small untrained Otter and its processor, saved to `folder`.

    Args:
        of_2023: with a CLIP tower and the sizes of perceiver and cross-attention that were fixed in the code of 2023.
    """
    words = "what color shape is it? a " + " ".join([*COLORS, *SHAPES])
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>", *OtterProcessor.special_tokens],
        show_progress=False,
    )
    backend.train_from_iterator([f"User:{words} GPT:"] * 2, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    processor = OtterProcessor(
        CLIPImageProcessorPil(size={"height": SIZE, "width": SIZE}, do_center_crop=False),
        OtterProcessor.prepare_tokenizer(tokenizer),
        chat_template=chat_template("simple"),
    )
    processor.save_pretrained(folder)
    torch.manual_seed(0)
    OtterForConditionalGeneration(_config(processor, of_2023)).save_pretrained(folder)
    return folder


def _config(processor: OtterProcessor, of_2023: bool) -> OtterConfig:
    tokenizer = processor.tokenizer
    if of_2023:
        parts = {
            "vision_config": CLIPVisionConfig(
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                image_size=SIZE,
                patch_size=16,
            ),
            "cross_attn_every_n_layers": 2,
        }
    else:
        parts = {
            "vision_config": ResNetConfig(
                embedding_size=16,
                hidden_sizes=[32, 64],
                depths=[1, 1],
                layer_type="basic",
                downsample_in_first_stage=False,
            ),
            "perceiver_depth": 1,
            "perceiver_num_latents": 8,
            "perceiver_num_heads": 4,
            "perceiver_head_dim": 24,
            "cross_attn_every_n_layers": 1,
            "cross_attn_num_heads": 4,
            "cross_attn_head_dim": 24,
        }
    return OtterConfig(
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=512,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        # closed gates would keep a pretrained decoder as it is; this one has nothing to keep
        cross_attn_gate_init=1.0,
        initializer_range=0.05,
        image_token_id=processor.image_token_id,
        end_of_chunk_token_id=processor.end_of_chunk_token_id,
        answer_token_id=processor.answer_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.eos_token_id, processor.end_of_chunk_token_id],
        pad_token_id=tokenizer.pad_token_id,
        **parts,
    )


def train_otter(folder: Path, epochs: int = 3) -> Path:
    """An Otter that knows colors and shapes, in `folder`; about a minute on a CPU. See `finetune.ipynb`."""
    from otter_hf.training.run import run

    with contextlib.redirect_stdout(io.StringIO()):  # the losses, which are another notebook's subject
        run(training_arguments(folder, epochs))
    return folder / "trained"


def training_arguments(folder: Path, epochs: int) -> list[str]:
    """What `otter-hf train` is told: 400 pictures, from the untrained model in `folder`, on the CPU."""
    build_otter(folder / "untrained")
    options = {
        "model_name_or_path": folder / "untrained",
        "train_mixture": write_shapes(folder, "train", 400, seed=0),
        "output_dir": folder / "trained",
        "packing": False,
        "per_device_train_batch_size": 16,
        "num_train_epochs": epochs,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": "none",
        "dataloader_num_workers": 0,
        "use_cpu": True,
        "disable_tqdm": True,
        "log_level": "error",
    }
    recipe = folder / "recipe.yaml"
    options = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
    recipe.write_text(yaml.safe_dump(options))
    return [str(recipe)]
