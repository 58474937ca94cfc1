"""What the models need to be imported: on a machine with a GPU at hand for minutes, little is installed."""

import json
import subprocess
import sys

import pytest


# of the package's own dependencies, all that only data, training and adapters need
ABSENT = ["accelerate", "av", "datasets", "pandas", "peft", "pyarrow", "sentencepiece", "torchvision"]

WITHOUT_PACKAGES = f"""
import importlib.util, sys
sys.modules.update(dict.fromkeys({ABSENT}))
import otter_hf
assert "transformers" not in sys.modules
importlib.util.find_spec("transformers")  # as others ask whether it is installed
from transformers import AutoConfig, AutoModelForImageTextToText
assert type(AutoConfig.for_model("fuyu")).__name__ == "OtterHDConfig"
assert type(AutoConfig.for_model("otter")) is otter_hf.OtterConfig in AutoModelForImageTextToText._model_mapping
otter_hf.OtterConfig()
"""
FIRST = """
import otter_hf.{}
from transformers import AutoConfig
assert type(AutoConfig.for_model("fuyu")).__name__ == "OtterHDConfig"
"""
# as in builds of torch without it, such as AMD's for Windows
WITHOUT_DISTRIBUTED = """
import sys, torch
torch.distributed.is_available = lambda: False
sys.modules["torch.distributed.fsdp"] = None
from otter_hf.models.lm_loss import supervised_loss
head = torch.nn.Linear(4, 8, bias=True)
supervised_loss(head, torch.zeros(1, 3, 4), torch.ones(1, 3, dtype=torch.long), vocab_size=8).backward()
"""
# imported first in a process of its own: what loads transformers itself and is needed by the models, and what is above
MODULES = ["pictures", "films", "data.parquet_store", "loading", "training.run", "evaluation.model", "testing"]

# runs each program in a child that has nothing but torch from its parent: to load that takes longer than all the rest
RUN_EACH = """
import json, os, sys
import torch, torch._dynamo, torch.distributed

assert not {"transformers", "otter_hf", "pandas", "pyarrow", "torchvision"} & sys.modules.keys()
for line in sys.stdin:
    child = os.fork()
    if not child:
        exec(json.loads(line), {})
        os._exit(0)
    print(os.waitpid(child, 0)[1], flush=True)
"""


@pytest.fixture(scope="module")
def run():
    """`run(program)`: the status that a process of its own ended with."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", RUN_EACH], text=True, **pipes) as process:

        def run(program: str) -> int:
            process.stdin.write(json.dumps(program) + "\n")
            process.stdin.flush()
            return int(process.stdout.readline())

        yield run


def test_models_are_imported_without_the_packages_of_data_and_training(run):
    """Nor does the package alone load transformers; once that is loaded, the Auto classes know the families."""
    assert run(WITHOUT_PACKAGES) == 0


def test_models_are_imported_without_distributed_torch(run):
    assert run(WITHOUT_DISTRIBUTED) == 0


@pytest.mark.parametrize("name", MODULES)
def test_any_module_can_be_the_first(name, run):
    assert run(FIRST.format(name)) == 0
