"""
Fine-tunes Otter on MIMIC-IT data, with a YAML recipe, flags, or both (a flag wins).

    python examples/finetune_otter.py recipe.yaml --learning_rate 1e-5
    python examples/finetune_otter.py --model_name_or_path MODEL --train_mixture data.yaml --output_dir out \\
        --freeze vision language --per_device_train_batch_size 4 --num_train_epochs 3 --bf16 True
    torchrun --nproc_per_node 8 examples/finetune_otter.py recipe.yaml

`data.yaml` names the datasets, in one of four groups:

    IMAGE_TEXT:                    # also IMAGE_TEXT_IN_CONTEXT, VIDEO_TEXT, TEXT_ONLY
      LADD:
        mimicit_path: LA/LADD_instructions.json
        images_path: LA/LA.parquet
        num_samples: -1            # all

Arguments: `ModelArguments`, `DataArguments` and `TrainingArguments` of `otter_hf.training.arguments`; `--help` lists
them. The output folder gets the model, its processor, checkpoints and the curves `training.png`. A recipe to start
from is `examples/easy_vqa/recipe.yaml`; `otter-hf train` is the same command.
"""

from accelerate import PartialState

from otter_hf.training.run import main


if __name__ == "__main__":
    main()
    # a process group that is still there at the exit may abort the process: torchrun would call the training failed
    PartialState().destroy_process_group()
