"""The most bytes that the tensors of a process took at a time."""

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.weak import WeakIdKeyDictionary


class PeakMemory(TorchDispatchMode):
    """Sums, after every operator, the storages of all tensors that it saw and that still live. FSDP empties and fills
    storages without an operator, so their sizes are asked each time. What an operator needs inside it is not seen."""

    def __init__(self):
        super().__init__()
        self.storages = WeakIdKeyDictionary()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented  # it comes again, with the tensors of this rank
        result = func(*args, **(kwargs or {}))
        for value in tree_iter((args, kwargs, result)):
            # Fake tensors, with which DTensor asks for shapes, have storages on meta.
            if isinstance(value, torch.Tensor) and value.untyped_storage().device.type != "meta":
                self.storages[value.untyped_storage()] = None
        self.bytes = max(self.bytes, sum(storage.nbytes() for storage in list(self.storages)))
        return result
