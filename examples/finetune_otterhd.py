"""
Fine-tunes OtterHD (or Fuyu) on MIMIC-IT data, with a YAML recipe, flags, or both (a flag wins).

    torchrun --nproc_per_node 8 examples/finetune_otterhd.py examples/recipes/otterhd_full.yaml
    python examples/finetune_otterhd.py examples/recipes/otterhd_lora.yaml --train_mixture data.yaml --output_dir out
    python examples/finetune_otterhd.py examples/recipes/otterhd_qlora.yaml --learning_rate 1e-4

`data.yaml` names the datasets, see `examples/finetune_otter.py`; the images may have any size. Each sample is read at
a resolution of its own (`resolution`, `dynamic_resolution`, `max_pixels`), and the samples of a batch are packed into
one row without padding. One process uses one GPU: start one for each with torchrun.

With `lora: true` the output folder holds the updates alone, and loads like a model where the base model is at hand:
`AutoModelForImageTextToText.from_pretrained("out")`.
"""

from accelerate import PartialState

from otter_hf.training.run import main


if __name__ == "__main__":
    main()
    # a process group that is still there at the exit may abort the process: torchrun would call the training failed
    PartialState().destroy_process_group()
