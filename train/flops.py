"""Floating-point operations of a step from its real document lengths, and MFU: their share of what the device could do.

Only real tokens count, padding does not; a window counts as a window, recomputation not at all (Chowdhery et al.,
"PaLM", arXiv 2204.02311, appendix B).
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from formats.cost import TRAINING, Model
from train import hf
from train.data import StepFacts

PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.4,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.4,
    "A100": 312.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "MI300X": 1307.4,
}
"""Dense bfloat16 TFLOP/s by a part of the device's name, from the vendors' data sheets; the first that fits counts."""


class StepFlops:
    """Counts the FLOPs of steps of the model whose `config.json` lies in `folder`."""

    def __init__(self, folder: Path):
        shape = Model.from_config(json.loads((Path(folder) / "config.json").read_bytes()))
        # The windows of the layers that are trained, not a second reading of them.
        layers = hf.read_config(folder).layers
        self._model = replace(shape, windows=tuple(layer.window or 0 for layer in layers))
        self.windows = tuple(sorted({window for window in self._model.windows if window}))
        """Window sizes whose query-key pairs the loader has to count, for no index states them."""

    def of(self, facts: StepFacts, windowed: Mapping[int, int]) -> float:
        """FLOPs of forward and backward of a step; `windowed`: pairs inside each of `windows`, over all ranks."""
        pairs = {0: (facts.sum_sq + facts.tokens) // 2, **windowed}
        attention = sum(pairs[window] for window in self._model.windows)
        return TRAINING * (self._model.linear * facts.tokens + self._model.pair * attention)


def peak_flops(given_tflops: float, device: torch.device, dtype: torch.dtype) -> float | None:
    """What one device could do in a second: `given_tflops` if not 0, else the table's figure for bfloat16 on a known
    GPU, else None (there is no honest figure for a CPU or an unknown device)."""
    if given_tflops:
        return given_tflops * 1e12
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    return next((tflops * 1e12 for part, tflops in PEAK_TFLOPS.items() if part in name), None)
