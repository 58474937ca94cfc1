"""
Pretrain a Flamingo on WebDataset shards: interleaved documents (MMC4), image-caption pairs (LAION, CC3M, CC12M), both.

    python examples/pretrain_flamingo.py --model_name_or_path untrained-flamingo --train_sets sets.yaml \
        --output_dir out --freeze vision language --train_embedding_rows "<image>" "<|endofchunk|>" --max_steps 10000
    torchrun --nproc_per_node 8 examples/pretrain_flamingo.py recipe.yaml

`sets.yaml` names the sets, of which each step has a batch:

    mmc4:
      kind: interleaved              # documents: json parts with their pictures, as `otter-hf data mmc4-to-tar` writes
      shards: mmc4/docs_shard_{0..99}_v2.000.tar
      batch_size: 8
      num_samples: 100000            # of an epoch
      min_similarity: 0.32
    laion:
      kind: pairs                    # pictures and captions: img2dataset's output, `otter-hf data laion-to-tar`
      shards: laion                  # a folder, or a pattern
      batch_size: 8
      loss_weight: 0.2

Arguments: `ModelArguments` and `TrainingArguments` of `otter_hf.training.arguments`, `PretrainingDataArguments` of
`otter_hf.training.pretraining`; `--help` lists them. `--resume_from_checkpoint auto` goes on with the next batch.
docs/pretraining.md tells the rest.
"""

from accelerate import PartialState

from otter_hf.training.pretraining import main


if __name__ == "__main__":
    main()
    # a process group that is still there at the exit may abort the process: torchrun would call the training failed
    PartialState().destroy_process_group()
