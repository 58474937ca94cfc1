"""Converting checkpoints of 2023, and back: readers, name tables, a report of every tensor, a streaming writer.

A conversion is planned (`plan_*`, which reads only headers and shapes) and then written (`finish`, which streams one
tensor at a time). See `otter-hf convert --help` for the commands.
"""

from .delta import apply_delta, make_delta
from .export import export_legacy
from .folders import lora_adapter, plan_flamingo_to_otter, plan_folder, plan_lora, plan_trainer_pt
from .fuyu import convert_fuyu
from .job import Job, finish
from .memory import estimate_memory, memory_table
from .openflamingo import plan_inject_lm, plan_openflamingo
from .report import ConversionReport
from .tensors import ConversionError


__all__ = [
    "ConversionError",
    "ConversionReport",
    "Job",
    "apply_delta",
    "convert_fuyu",
    "estimate_memory",
    "export_legacy",
    "finish",
    "lora_adapter",
    "make_delta",
    "memory_table",
    "plan_flamingo_to_otter",
    "plan_folder",
    "plan_inject_lm",
    "plan_lora",
    "plan_openflamingo",
    "plan_trainer_pt",
]
