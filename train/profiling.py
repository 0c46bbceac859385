"""`--profile N`: a trace of N steps of every rank, for chrome://tracing or Perfetto."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, schedule

SKIPPED = 2
"""Steps before the trace: the first ones compile, allocate and fill the queue."""


class StepProfiler:
    """Records steps SKIPPED+1 … SKIPPED+N of this process into OUT/profile/rank-R.json.gz; does nothing for N = 0."""

    def __init__(self, out: Path, steps: int, device: torch.device):
        self._profile: profile | None = None
        if not steps:
            return
        self._path = Path(out) / "profile" / f"rank-{dist.get_rank()}.json.gz"
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
        self._profile = profile(
            activities=activities,
            schedule=schedule(wait=SKIPPED - 1, warmup=1, active=steps, repeat=1),
            on_trace_ready=self._write,
        )
        self._profile.start()

    def step(self) -> None:
        """To be called after every step."""
        if self._profile is not None:
            self._profile.step()

    def close(self) -> None:
        if self._profile is not None:
            self._profile.stop()
            self._profile = None

    def _write(self, trace: profile) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        trace.export_chrome_trace(str(self._path))
