"""
FSDP2 on CPUs, for tests: `accelerate` shards on accelerators only and trains with DDP on CPUs without a word.

Once it believes in FSDP, everything below runs as on GPUs: `fully_shard`, the collectives (over gloo), checkpoints.
"""

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType


_init = AcceleratorState.__init__


def _init_with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
    _init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        self.fsdp_plugin = fsdp_plugin
    if "fsdp_plugin" in self.__dict__:  # shared by all instances
        self.distributed_type = DistributedType.FSDP


AcceleratorState.__init__ = _init_with_fsdp
