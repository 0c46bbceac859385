"""Memory for large results that a CPU keeps and hands out again, as torch's allocator does on a GPU.

What malloc gives back to the kernel comes back page by page, each found and zeroed when it is first touched: for the
gradients of a layer of experts, and for the projections their backward needs, that costs an eighth of the layer's time.
A buffer is handed out again as soon as no tensor stands on it any more.
"""

import math
import threading
import weakref

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 64  # bytes: torch's own, what its vector instructions and matrix products like


class Kept:
    """At most `count` buffers; who asks for more at once gets memory that is not kept.

    So what is kept beyond its use is bounded by one layer's, however many layers are alive at once.
    """

    def __init__(self, count: int):
        self.count = count
        self._buffers: list[tuple[np.ndarray, weakref.ref[np.ndarray]]] = []  # and who has it, where anybody has
        self._lock = threading.Lock()

    def empty(self, like: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
        """[shape] of the type of `like`, with whatever stood there; from torch itself where that is not a CPU."""
        size = math.prod(shape) * like.element_size()
        if like.device.type != "cpu" or size == 0:
            return like.new_empty(shape)
        with self._lock:
            free = [i for i, (_, holder) in enumerate(self._buffers) if holder() is None]
            fitting = [i for i in free if self._buffers[i][0].nbytes >= size]
            if fitting:
                number = min(fitting, key=lambda i: self._buffers[i][0].nbytes)
                buffer = self._buffers.pop(number)[0]
            elif len(self._buffers) < self.count or free:
                if len(self._buffers) == self.count:
                    self._buffers.pop(free[0])
                buffer = _aligned(size)
            else:
                return like.new_empty(shape)
            held = buffer[:size]  # lives as long as the tensor's storage
            self._buffers.append((buffer, weakref.ref(held)))
        return torch.frombuffer(held, dtype=like.dtype).view(shape)


def _aligned(size: int) -> np.ndarray:
    """uint8[size] that begins at a multiple of ALIGNMENT."""
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size]
