"""Converting checkpoints of 2023, and back: readers, name tables, a report of every tensor, a streaming writer.

A conversion is planned (`plan_*`, which reads only headers and shapes) and then written (`finish`, which streams one
tensor at a time). See `otter-hf convert --help` for the commands. Names are imported when they are first used.
"""

from ..importing import lazy_names


__all__, __getattr__ = lazy_names(
    __name__,
    {
        "delta": ("apply_delta", "make_delta"),
        "export": ("export_legacy",),
        "folders": ("lora_adapter", "plan_flamingo_to_otter", "plan_folder", "plan_lora", "plan_trainer_pt"),
        "fuyu": ("convert_fuyu", "plan_fuyu"),
        "job": ("Job", "finish", "finish_with_adapter", "push_folder"),
        "memory": ("estimate_memory", "memory_table"),
        "openflamingo": ("plan_inject_lm", "plan_openflamingo"),
        "report": ("ConversionReport",),
        "tensors": ("ConversionError",),
    },
)
