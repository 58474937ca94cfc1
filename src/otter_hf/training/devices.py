"""Cards that a training can be planned for, on any machine."""

import difflib
from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """
    Args:
        gibibytes: memory, of which the driver and torch take about one.
        teraflops: 10^12 operations per second of dense multiplications in 16 bits that are summed in float32.
        bfloat16: whether it computes in bfloat16 too; all compute in float16.
        source: where the figures stand.
    """

    gibibytes: int
    teraflops: float
    bfloat16: bool
    source: str


_NVIDIA, _AMD = "NVIDIA's data sheet", "AMD's data sheet"
DEVICES = {
    "b200-180gb": Device(180, 2250, True, f"{_NVIDIA} of the DGX B200"),
    "h200-141gb": Device(141, 989, True, f"{_NVIDIA} of the H200 SXM"),
    "h100-80gb": Device(80, 989, True, f"{_NVIDIA} of the H100 SXM"),
    "h100-pcie-80gb": Device(80, 756, True, f"{_NVIDIA} of the H100 PCIe"),
    "a100-80gb": Device(80, 312, True, f"{_NVIDIA} of the A100"),
    "a100-40gb": Device(40, 312, True, f"{_NVIDIA} of the A100"),
    "l40s-48gb": Device(48, 362, True, f"{_NVIDIA} of the L40S"),
    "l4-24gb": Device(24, 121, True, f"{_NVIDIA} of the L4"),
    "a10-24gb": Device(24, 125, True, f"{_NVIDIA} of the A10"),
    "rtx4090-24gb": Device(24, 165, True, "NVIDIA's white paper on the Ada architecture"),
    "rtx3090-24gb": Device(24, 71, True, "NVIDIA's white paper on the GA102 architecture"),
    "v100-32gb": Device(32, 125, False, f"{_NVIDIA} of the V100 SXM2"),
    "v100-16gb": Device(16, 125, False, f"{_NVIDIA} of the V100 SXM2"),
    "t4-16gb": Device(16, 65, False, f"{_NVIDIA} of the T4"),
    "mi300x-192gb": Device(192, 1307, True, f"{_AMD} of the MI300X"),
    "mi250x-128gb": Device(128, 383, True, f"{_AMD} of the MI250X"),
}


def find_device(name: str) -> Device:
    """The card of a name, in any case. Raises ValueError with the nearest names, or all, for another."""
    if name.lower() in DEVICES:
        return DEVICES[name.lower()]
    close = difflib.get_close_matches(name.lower(), DEVICES, n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(DEVICES)}."
    raise ValueError(f"plan_device: {name!r} is not known; {hint}")


def check_dtype(name: str, dtype: str) -> None:
    """Raise ValueError for a card that does not compute in `bfloat16`, where it should."""
    if dtype == "bfloat16" and not find_device(name).bfloat16:
        raise ValueError(f"plan_device: {name} does not compute in bfloat16: set bf16 to false and fp16 to true.")
