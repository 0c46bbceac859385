"""Whatever makes the host wait for a device, noted on a CPU."""

from torch.overrides import TorchFunctionMode

READS = {"tolist", "item", "numpy", "cpu", "nonzero", "masked_select", "unique", "bincount", "argwhere"}
READS |= {"__bool__", "__int__", "__float__", "__index__", "__contains__", "__iter__"}


class HostReads(TorchFunctionMode):
    """Notes in `seen` what needs values of a tensor on the host: on a GPU it would wait for all that came before."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.__name__
        if name in READS or (name == "repeat_interleave" and "output_size" not in kwargs):
            self.seen.append(name)
        return func(*args, **kwargs)
