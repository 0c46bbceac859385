"""What can be combined: one table that gives the error message, a test and the README's matrix."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from train.config import SPLIT_BACKWARD, Config, flatten


@dataclass(frozen=True)
class Combination:
    """A row of the table. `refused` is None for what is supported; `note` is then where it is proven, else the
    reason of the refusal and the way out. `example` are flags (and the world size) that make the combination."""

    name: str
    example: dict[str, Any]
    note: str
    refused: Callable[[Config], bool] | None = None


PIPELINES = "tests/dist/test_pp.py"
COMPILED = "tests/dist/test_compile.py"
BACKENDS_TEST = "tests/dist/test_cp_attention.py"


def splits_backward(config: Config) -> bool:
    return config.layout.pp > 1 and config.layout.pp_schedule in SPLIT_BACKWARD


COMBINATIONS = (
    Combination("FSDP2 (dp_shard)", {}, "tests/dist/test_parity.py"),
    Combination("HSDP (dp_replicate × dp_shard)", {"dp_replicate": 2}, "tests/dist/test_parity.py"),
    Combination("gradient accumulation", {"batch_packs": 6, "micro_packs": 2}, "tests/dist/test_parity.py"),
    Combination("gradients reduced after each row", {"defer_sync": False}, "tests/dist/test_parity.py"),
    Combination(
        "pipeline, gradients reduced after each row",
        {"pp": 2, "defer_sync": False},
        "--no-defer-sync with --pp {pp} is not possible: a pipeline reduces once a step; leave it out",
        lambda c: c.layout.pp > 1 and not c.layout.defer_sync,
    ),
    Combination("activation recompute", {"recompute": "full"}, "tests/dist/test_parity.py"),
    Combination("recompute, costly results kept", {"recompute": "selective"}, "tests/dist/test_parity.py"),
    Combination("compiled blocks", {"compile": True}, COMPILED),
    Combination("compiled, recomputed blocks", {"compile": True, "recompute": "selective"}, COMPILED),
    Combination("compiled blocks, tensor parallelism", {"compile": True, "tp": 2}, COMPILED),
    Combination("compiled blocks, context parallelism", {"compile": True, "cp": 2}, COMPILED),
    Combination(
        "compiled blocks, only some keys exchanged",
        {"compile": True, "cp": 2, "cp_method": "needed"},
        "--compile needs the same shapes in every row, and --cp-method {cp_method} sends another number of keys for "
        "each: take gather or ulysses, or leave --compile out",
        lambda c: c.model.compile and c.layout.cp > 1 and c.layout.cp_method in ("needed", "ring"),
    ),
    Combination("weights gathered ahead, or kept", {"prefetch": 2, "reshard": False}, "tests/dist/test_parity.py"),
    Combination("parameters in host memory", {"cpu_offload": True}, "tests/dist/test_parity.py"),
    Combination(
        "bfloat16, gradients summed in it too",
        {"dtype": "bfloat16", "reduce_dtype": "bfloat16"},
        "tests/train/test_main.py",
    ),
    Combination("checkpoints in the background", {}, "tests/train/test_resume.py"),
    Combination("checkpoints in turn with the steps", {"async_save": False}, "tests/train/test_resume.py"),
    Combination("context parallelism, all keys gathered", {"cp": 2}, "tests/dist/test_cp.py"),
    Combination("context parallelism, needed keys only", {"cp": 2, "cp_method": "needed"}, "tests/dist/test_cp.py"),
    Combination("context parallelism, heads for tokens", {"cp": 2, "cp_method": "ulysses"}, "tests/dist/test_cp.py"),
    Combination("context parallelism, ring", {"cp": 2, "cp_method": "ring"}, "tests/dist/test_cp.py"),
    Combination("flash-attn 2, 3 or 4, with any --cp-method", {"attention": "flash"}, BACKENDS_TEST),
    Combination("Transformer Engine", {"attention": "te", "cp": 2}, BACKENDS_TEST),
    Combination(
        "Transformer Engine, its own ring (no windows)",
        {"attention": "te", "cp": 2, "cp_method": "ring"},
        BACKENDS_TEST,
    ),
    Combination(
        "compiled blocks, Transformer Engine",
        {"compile": True, "attention": "te"},
        "--compile with --attention te: its module breaks the graph of a block; take another --attention, or leave "
        "--compile out",
        lambda c: c.model.compile and c.model.attention == "te",
    ),
    Combination("tensor × context parallelism, ring", {"tp": 2, "cp": 2, "cp_method": "ring"}, "tests/dist/test_cp.py"),
    Combination("tensor and sequence parallelism", {"tp": 2}, "tests/dist/test_tp.py"),
    Combination("tensor parallelism, whole sequences", {"tp": 2, "sp": False}, "tests/dist/test_tp.py"),
    Combination("tensor × context parallelism", {"tp": 2, "cp": 2}, "tests/dist/test_tp.py"),
    Combination(
        "compiled blocks, tensor × context parallelism",
        {"compile": True, "tp": 2, "cp": 2},
        "tests/dist/test_compile.py",
    ),
    Combination("pipeline, all forwards before all backwards", {"pp": 2, "pp_schedule": "gpipe"}, PIPELINES),
    Combination("pipeline, one forward one backward", {"pp": 2}, PIPELINES),
    Combination("pipeline, interleaved stages", {"pp": 2, "pp_schedule": "interleaved"}, PIPELINES),
    Combination("pipeline, interleaved, backward split", {"pp": 2, "pp_schedule": "interleaved-zb"}, PIPELINES),
    Combination("pipeline, V-shaped, backward split", {"pp": 2, "pp_schedule": "zbv"}, PIPELINES),
    Combination("pipeline, from both ends of a V", {"pp": 2, "pp_schedule": "dualpipev"}, PIPELINES),
    Combination("pipeline, recomputed blocks", {"pp": 2, "recompute": "full"}, PIPELINES),
    Combination("pipeline, compiled blocks", {"pp": 2, "compile": True}, PIPELINES),
    Combination("pipeline × context parallelism", {"pp": 2, "cp": 2}, PIPELINES),
    Combination("pipeline × tensor parallelism", {"pp": 2, "tp": 2}, PIPELINES),
    Combination("pipeline × tensor × context parallelism", {"pp": 2, "tp": 2, "cp": 2}, PIPELINES),
    Combination("pipeline, replicas (HSDP)", {"pp": 2, "dp_replicate": 2}, PIPELINES),
    Combination(
        "pipeline with a split backward, recomputed blocks",
        {"pp": 2, "pp_schedule": "zbv", "recompute": "full"},
        "--pp-schedule {pp_schedule} comes back for the gradient of each weight, and --recompute would run the block "
        "again for every one of them: take 1f1b or interleaved, or leave --recompute out",
        lambda c: splits_backward(c) and c.model.recompute != "none",
    ),
    Combination(
        "pipeline with a split backward, compiled blocks",
        {"pp": 2, "pp_schedule": "zbv", "compile": True},
        "--pp-schedule {pp_schedule} takes the gradients of inputs and weights apart, and a compiled block gives them "
        "at once: take 1f1b or interleaved, or leave --compile out",
        lambda c: splits_backward(c) and c.model.compile,
    ),
    Combination("expert parallelism", {"ep": 2}, "tests/dist/test_ep.py"),
    Combination("expert and tensor parallelism", {"ep": 2, "tp": 2}, "tests/dist/test_ep.py"),
    Combination("expert and context parallelism, any method", {"ep": 2, "cp": 2}, "tests/dist/test_ep.py"),
    Combination("expert, tensor and context parallelism", {"ep": 2, "tp": 2, "cp": 2}, "tests/dist/test_ep.py"),
    Combination("expert parallelism, replicas (HSDP)", {"ep": 2, "dp_replicate": 2}, "tests/dist/test_ep.py"),
    Combination(
        "expert parallelism, attention and blocks without experts compiled", {"ep": 2, "compile": True}, COMPILED
    ),
    Combination(
        "expert parallelism, compiled attention, costly results kept",
        {"ep": 2, "compile": True, "recompute": "selective"},
        COMPILED,
    ),
    Combination(
        "expert and tensor parallelism, whole sequences", {"ep": 2, "tp": 2, "sp": False}, "tests/dist/test_ep.py"
    ),
    Combination("pipeline × expert parallelism", {"ep": 2, "pp": 2}, "tests/dist/test_ep.py"),
    Combination("pipeline × expert × tensor parallelism", {"ep": 2, "pp": 2, "tp": 2}, "tests/dist/test_pp_experts.py"),
    Combination(
        "pipeline × expert parallelism, any schedule",
        {"ep": 2, "pp": 2, "pp_schedule": "zbv"},
        "tests/dist/test_pp_experts.py",
    ),
)
"""THE table: `refuse` takes its error from it, a test walks it, `matrix` prints it for the README."""


def as_arguments(values: dict[str, Any]) -> list[str]:
    """The command line that says `values` (flag name with underscores → value)."""
    arguments = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        arguments += (
            [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
        )
    return arguments


def matrix() -> str:
    """The table of supported combinations in Markdown."""
    lines = ["| combination | flags | supported | proof, or reason |", "|---|---|---|---|"]
    for row in COMBINATIONS:
        flags = " ".join(f"`{' '.join(as_arguments({n: v}))}`" for n, v in row.example.items()) or "default"
        note = row.note.format(**row.example)
        lines.append(f"| {row.name} | {flags} | {'no' if row.refused else 'yes'} | {note} |")
    return "\n".join(lines)


def refuse(config: Config) -> None:
    """Raise a ValueError of one sentence for a combination that the table refuses."""
    for row in COMBINATIONS:
        if row.refused and row.refused(config):
            raise ValueError(row.note.format(**flatten(config)))
