"""
Writes this folder's numbers from all those of the original code, which are too large for the repository:

    python tests/golden/extract.py ../shared/golden
"""

import json
import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file


# case -> files, tensors
KEPT = {
    # its weights are computed from their names: tests/models/test_golden_otter.py
    "otter/otter_mpt_vis1024": (
        ["config.json", "golden.json", "weights_index.json", "tokenizer.json", "tokenizer_config.json"],
        ["lang_x", "attention_mask", "labels", "vision_x", "logits", "loss", "gen_lang_x.0", "gen_truth.0"],
    ),
    # what its processor makes of a picture and a text; it has no weights here
    "otterhd/single": (
        ["golden.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "image_0.png"],
        ["input_ids", "attention_mask", "image_patches_0"],
    ),
}


def main(source: Path) -> None:
    for case, (files, names) in KEPT.items():
        folder = Path(__file__).parent / case
        folder.mkdir(parents=True, exist_ok=True)
        for name in files:
            if name.endswith(".json"):
                content = json.loads((source / case / name).read_text(encoding="utf-8"))
                text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
                (folder / name).write_text(text + "\n", encoding="utf-8")
            else:
                shutil.copy(source / case / name, folder)
        tensors = load_file(source / case / "golden.safetensors")
        save_file({name: tensors[name] for name in names}, folder / "golden.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
