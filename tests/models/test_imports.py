"""What the models need to be imported: on a machine with a GPU at hand for minutes, little is installed."""

import subprocess
import sys


# of the package's own dependencies, all that only data, training and adapters need
ABSENT = ["accelerate", "av", "datasets", "pandas", "peft", "pyarrow", "sentencepiece", "torchvision"]


def test_models_are_imported_without_the_packages_of_data_and_training():
    code = f"import sys; sys.modules.update(dict.fromkeys({ABSENT})); import otter_hf; otter_hf.OtterConfig()"
    subprocess.run([sys.executable, "-c", code], check=True)
