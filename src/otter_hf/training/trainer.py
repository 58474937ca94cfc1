"""The HF `Trainer` with batches of one task group each."""

from torch.utils.data import Dataset, Sampler
from transformers import Trainer, TrainerCallback

from ..data.mixture import GroupedSampler


class OtterTrainer(Trainer):
    """
    A `Trainer` for a `MimicitMixture`: each global batch is of one task group, as in Otter's training, so that rows
    with one image are not padded to those with several.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.add_callback(_TellEpoch())

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int]:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return GroupedSampler(dataset.task_groups, self.args.train_batch_size * self.args.world_size, seed)


class _TellEpoch(TrainerCallback):
    # in distributed training accelerate tells the epoch to a sampler or to the dataset, not to both
    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        train_dataloader.dataset.set_epoch(int(state.epoch))
