"""What the models need to be imported: on a machine with a GPU at hand for minutes, little is installed."""

import subprocess
import sys

import pytest


# of the package's own dependencies, all that only data, training and adapters need
ABSENT = ["accelerate", "av", "datasets", "pandas", "peft", "pyarrow", "sentencepiece", "torchvision"]


def test_models_are_imported_without_the_packages_of_data_and_training():
    """Nor does the package alone load transformers; once that is loaded, the Auto classes know the families."""
    code = f"""
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
    subprocess.run([sys.executable, "-c", code], check=True)


# imported first in a process of its own: what loads transformers itself and is needed by the models, and what is above
FIRST = ["pictures", "films", "data.parquet_store", "loading", "training.run", "evaluation.model"]


@pytest.mark.parametrize("name", FIRST)
def test_any_module_can_be_the_first(name):
    code = f"""
import otter_hf.{name}
from transformers import AutoConfig
assert type(AutoConfig.for_model("fuyu")).__name__ == "OtterHDConfig"
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
