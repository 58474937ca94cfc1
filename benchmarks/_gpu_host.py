"""Where the host waits for the device: counted on a card by CUDA itself, elsewhere by the calls that would wait."""

import collections
import contextlib
import traceback
import warnings

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


# what hands values of a tensor to Python
_READS = ("__bool__", "__complex__", "__float__", "__index__", "__int__", "item", "numpy", "tolist")
# what cannot say the shape of its result without looking at values, below Python too
_SHAPED_BY_VALUES = (
    "_local_scalar_dense",
    "_unique2",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "unique_consecutive",
    "unique_dim",
)


class _Calls(TorchFunctionMode):
    def __init__(self, note):
        super().__init__()
        self.note = note

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        tensor = args[0] if args else None
        # a number put on a named device is copied there, and the host waits for the copy
        placed = func in (torch.tensor, torch.as_tensor) and (kwargs or {}).get("device") is not None
        if placed or name == "cpu" or (name in _READS and isinstance(tensor, torch.Tensor)):
            self.note(f"{name} of a number for a device" if placed else name)
        return func(*args, **(kwargs or {}))


class _Operations(TorchDispatchMode):
    def __init__(self, note):
        super().__init__()
        self.note = note

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        counted = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None and len(args) < 3
        if name in _SHAPED_BY_VALUES or by_mask or counted:
            self.note(f"{name} by a mask" if by_mask else name)
        return func(*args, **(kwargs or {}))


class HostWaits:
    """
    Counts where the host would wait, by the line of code that does it. Works on the CPU too, where nothing waits: what
    is counted are reads of values, and operations whose result has a shape that depends on values.

        with HostWaits() as waits:
            model(**inputs)
        waits.places  # Counter: "modeling_llama.py:12 item" -> 1

    Args:
        forbid: raise at the first one.
        ignore: parts of paths whose lines do not count, such as `generation/utils.py`.
    """

    def __init__(self, forbid: bool = False, ignore: tuple[str, ...] = ()):
        self.forbid, self.ignore = forbid, ignore
        self.places: collections.Counter[str] = collections.Counter()
        self._stack = contextlib.ExitStack()
        self._last = None

    @property
    def total(self) -> int:
        return sum(self.places.values())

    def __enter__(self):
        self._stack.enter_context(_Calls(self._note))
        self._stack.enter_context(_Operations(self._note))
        return self

    def __exit__(self, *exception):
        return self._stack.__exit__(*exception)

    def _note(self, name: str):
        frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and f.filename != __file__]
        frame = frames[-1]
        if any(part in frame.filename for part in self.ignore):
            return
        # `.item()` is seen as the call and as the operation below it
        below = name in _SHAPED_BY_VALUES
        if below and self._last == (frame.filename, frame.lineno):
            self._last = None
            return
        self._last = None if below else (frame.filename, frame.lineno)
        place = f"{frame.filename.rpartition('site-packages/')[2].rpartition('src/')[2]}:{frame.lineno} {name}"
        self.places[place] += 1
        if self.forbid:
            raise AssertionError(f"The host would wait for the device: {place}")


class CudaWaits:
    """As `HostWaits`, told by CUDA: every synchronising call is a warning in this mode of torch."""

    def __init__(self):
        self.places: collections.Counter[str] = collections.Counter()

    @property
    def total(self) -> int:
        return sum(self.places.values())

    def __enter__(self):
        self._warnings = warnings.catch_warnings(record=True)
        self._caught = self._warnings.__enter__()
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        return self

    def __exit__(self, *exception):
        torch.cuda.set_sync_debug_mode("default")
        self._warnings.__exit__(*exception)
        for warning in self._caught:
            if "synchronizing CUDA operation" in str(warning.message):
                place = warning.filename.rpartition("site-packages/")[2].rpartition("src/")[2]
                self.places[f"{place}:{warning.lineno}"] += 1


def host_waits(device: torch.device, **kwargs) -> HostWaits | CudaWaits:
    """The counter for a device."""
    return CudaWaits() if device.type == "cuda" else HostWaits(**kwargs)
