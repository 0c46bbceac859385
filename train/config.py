"""What a run is told: one tree of frozen dataclasses, its flags, and the table of supported combinations.

Every leaf of the tree is a flag: the field `batch_packs` is `--batch-packs` on the command line and `batch-packs` (or
`batch_packs`) in the file that `--config` names. The command line wins over the file, the file over the defaults.
"""

import argparse
import dataclasses
import difflib
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import yaml

from train.attention.choose import BACKENDS

PP_SCHEDULES = ("gpipe", "1f1b", "interleaved", "interleaved-zb", "zbv", "dualpipev")
SPLIT_BACKWARD = PP_SCHEDULES[3:]


def _flag(default: Any, help_text: str, choices: tuple[str, ...] = ()) -> Any:
    return field(default=default, metadata={"help": help_text, "choices": choices})


@dataclass(frozen=True)
class Data:
    """Where the packs come from and how many make a step."""

    shards: tuple[str, ...] = _flag(
        (),
        "folder of packed shards to train on (written by `prep pack`); several times for several folders, "
        "DIR:WEIGHT to mix them by weight",
    )
    eval_shards: tuple[str, ...] = _flag((), "folder of packed shards to evaluate on; several times for several sets")
    batch_packs: int = _flag(8, "packs per optimizer step, over all ranks")
    micro_packs: int = _flag(1, "packs in one forward row")
    verify: str = _flag(
        "pack",
        "pack: check every pack's xxh3 before it is used; full: every file's checksum at start, too",
        ("off", "pack", "full"),
    )


@dataclass(frozen=True)
class Model:
    """Which weights, and in which precision they are computed."""

    model: str | None = _flag(None, "Hugging Face folder of the model (config.json and safetensors)")
    init: bool = _flag(False, "train from scratch: --model has config.json (and a tokenizer), weights come from --seed")
    load: str = _flag(
        "direct", "who reads the weights: every rank what it holds, or rank 0 for all", ("direct", "broadcast")
    )
    dtype: str = _flag(
        "float32", "parameters in forward and backward; the optimizer keeps float32", ("float32", "bfloat16")
    )
    reduce_dtype: str = _flag("float32", "sum of the gradients over ranks", ("float32", "bfloat16"))
    attention: str = _flag(
        "auto", "attention kernel; auto takes the fastest that serves the model", ("auto", *BACKENDS)
    )
    recompute: str = _flag(
        "none",
        "activations computed again in backward: all, or all but what attention and matrix products gave",
        ("none", "selective", "full"),
    )
    compile: bool = _flag(False, "compile the blocks (static shapes, no graph break)")
    compile_backend: str = _flag(
        "inductor",
        "inductor generates kernels; the others trace without (to look for what cannot be compiled)",
        ("inductor", "aot_eager", "eager"),
    )


@dataclass(frozen=True)
class Layout:
    """Sizes of the five mesh axes, and what runs on them."""

    device: str = _flag("auto", "where to run; auto takes CUDA when there is any", ("auto", "cpu", "cuda"))
    threads: int = _flag(0, "CPU threads per rank; 0: the machine's cores divided among its ranks")
    pp: int = _flag(1, "pipeline-parallel ranks")
    pp_schedule: str = _flag(
        "1f1b",
        "order of the rows in a pipeline; gpipe keeps the activations of all, the last three split the backward",
        PP_SCHEDULES,
    )
    pp_split: str | None = _flag(None, "layers of each stage, as 6,6,5,3; left out: as even in cost as they can be")
    dp_replicate: int = _flag(1, "replicas of the sharded model (HSDP when more than 1)")
    dp_shard: int = _flag(-1, "ranks a replica is sharded over; -1: all that are left")
    cp: int = _flag(1, "context-parallel ranks")
    cp_method: str = _flag(
        "gather",
        "what context-parallel ranks exchange: all keys and values at once, those that are needed at once or in steps "
        "(ring), or heads for tokens",
        ("gather", "needed", "ring", "ulysses"),
    )
    tp: int = _flag(1, "tensor-parallel ranks")
    sp: bool = _flag(True, "with --tp: between attention and MLPs each tensor rank holds its share of the tokens")
    tp_plan: str | None = _flag(
        None,
        "with --tp: 'PATTERN=STYLE,…' over the family's plan (in the file: PATTERN: STYLE lines); a module takes a "
        "style, as lm_head=stream, a parameter how it is stored, shard(DIM) or replicate (see train/parallel/tp.py)",
    )
    ep: int = _flag(1, "expert-parallel ranks, out of those of dp_shard, cp and tp")
    reshard: bool = _flag(
        True, "free a block's gathered weights after its forward; without, backward need not gather them again"
    )
    prefetch: int = _flag(1, "blocks whose weights are gathered ahead of need, each way; 0: as FSDP itself does")
    defer_sync: bool = _flag(
        True,
        "add up the gradients of a step's rows on every rank and reduce them once; without, after each row: more "
        "traffic, but a rank never holds more than its share",
    )
    cpu_offload: bool = _flag(False, "keep parameters, gradients and optimizer state in host memory")

    @property
    def sequence(self) -> int:
        """Tensor ranks that share out the tokens of the residual stream."""
        return self.tp if self.sp else 1


@dataclass(frozen=True)
class Router:
    """How tokens are spread over the experts of a mixture; coefficients in config.json are not read."""

    router_aux_loss: float = _flag(0.0, "coefficient of the load-balancing loss of each layer, computed per pack")
    router_z_loss: float = _flag(0.0, "coefficient of the loss on large router logits of each layer")
    router_bias_rate: float = _flag(
        0.0, "step by which an expert's bias moves against its load (models that have such a bias; published: 0.001)"
    )
    router_log_every: int = _flag(10, "list the load of every expert in the metrics of every N-th step; 0: never")


@dataclass(frozen=True)
class Optim:
    """AdamW with warm-up and cosine decay."""

    lr: float = _flag(1e-5, "peak learning rate")
    warmup_steps: int = _flag(0, "steps of linear warm-up")
    min_lr_ratio: float = _flag(0.1, "learning rate at the end of the cosine over the peak")
    weight_decay: float = _flag(0.01, "decoupled weight decay of matrices (vectors have none)")
    beta1: float = _flag(0.9, "decay of AdamW's first moment")
    beta2: float = _flag(0.95, "decay of AdamW's second moment")
    max_grad_norm: float = _flag(1.0, "gradients are scaled down to this norm; 0: only measured")
    on_nonfinite: str = _flag(
        "stop", "what a loss or gradient that is not finite does before the optimizer step", ("stop", "skip")
    )


@dataclass(frozen=True)
class Run:
    """How long, where to, and what is kept."""

    out: str | None = _flag(None, "folder of the run: metrics, checkpoints, export")
    steps: int = _flag(0, "optimizer steps in all; 0: what --epochs makes")
    epochs: int = _flag(1, "passes over the shards (with --steps: at most that many steps)")
    seed: int = _flag(0, "seeds the order of the packs and everything random")
    eval_every: int = _flag(0, "evaluate every N steps as well as before and after; 0: never between")
    eval_packs: int = _flag(0, "packs of an evaluation, the first N; 0: all")
    save_every: int = _flag(0, "checkpoint every N steps; 0: only at the end or when told to stop")
    async_save: bool = _flag(False, "write checkpoints in the background, beside the next steps")
    keep: int = _flag(2, "checkpoints kept, the newest N; 0: all")
    resume: str = _flag("never", "never, auto (the last whole checkpoint under --out) or the PATH of a checkpoint")
    tensorboard: bool = _flag(False, "write TensorBoard events to OUT/tensorboard")
    wandb: str | None = _flag(None, "project at Weights & Biases that the run is logged to")
    peak_tflops: float = _flag(0.0, "what one device could do, for MFU; 0: known for common GPUs in bfloat16")
    profile: int = _flag(0, "trace N steps, after the first two, to OUT/profile")
    export: bool = _flag(True, "write OUT/hf at the end, a Hugging Face folder")


@dataclass(frozen=True)
class Config:
    data: Data = Data()
    model: Model = Model()
    layout: Layout = Layout()
    router: Router = Router()
    optim: Optim = Optim()
    run: Run = Run()


REQUIRED = ("shards", "model", "out")

POSITIVE = ("batch_packs", "micro_packs", "pp", "dp_replicate", "cp", "tp", "ep", "epochs", "lr")
NOT_NEGATIVE = (
    *("threads", "steps", "warmup_steps", "weight_decay", "max_grad_norm", "min_lr_ratio", "beta1", "beta2"),
    *("router_aux_loss", "router_z_loss", "router_bias_rate", "router_log_every"),
    *("eval_every", "eval_packs", "save_every", "keep", "prefetch", "peak_tflops", "profile"),
)


@dataclass(frozen=True)
class Combination:
    """A row of the table. `refused` is None for what is supported; `note` is then where it is proven, else the
    reason of the refusal and the way out. `example` are flags (and the world size) that make the combination."""

    name: str
    example: dict[str, Any]
    note: str
    refused: Callable[[Config], bool] | None = None


PIPELINES = "tests/dist/test_pp.py"
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
    Combination("compiled blocks", {"compile": True}, "tests/dist/test_compile.py"),
    Combination(
        "compiled, recomputed blocks", {"compile": True, "recompute": "selective"}, "tests/dist/test_compile.py"
    ),
    Combination("compiled blocks, tensor parallelism", {"compile": True, "tp": 2}, "tests/dist/test_compile.py"),
    Combination("compiled blocks, context parallelism", {"compile": True, "cp": 2}, "tests/dist/test_compile.py"),
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
    Combination("checkpoints in the background", {"async_save": True}, "tests/train/test_main.py"),
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
        "--compile with both --tp {tp} and --cp {cp} is not proven yet: leave --compile or one of them out",
        lambda c: c.model.compile and c.layout.tp > 1 and c.layout.cp > 1,
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
    Combination(
        "expert and tensor parallelism, whole sequences",
        {"ep": 2, "tp": 2, "sp": False},
        "--no-sp with --ep {ep}: every tensor rank routes tokens of its own, which only sequence parallelism gives it; "
        "leave --no-sp out",
        lambda c: c.layout.ep > 1 and c.layout.tp > 1 and not c.layout.sp,
    ),
    Combination("pipeline × expert parallelism", {"ep": 2, "pp": 2}, "tests/dist/test_ep.py"),
)
"""THE table: `check` takes its error from it, a test walks it, `matrix` prints it for the README."""


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


def check(config: Config) -> None:
    """Raise a ValueError of one sentence for a value out of range or a combination that the table refuses."""
    flat = flatten(config)
    for name in REQUIRED:
        if not flat[name]:
            raise ValueError(f"--{name} is missing; give it on the command line or in the --config file")
    for name in POSITIVE:
        if not flat[name] > 0:
            raise ValueError(f"--{name.replace('_', '-')} must be greater than 0, not {flat[name]}")
    for name in NOT_NEGATIVE:
        if not flat[name] >= 0:
            raise ValueError(f"--{name.replace('_', '-')} must not be negative, as {flat[name]} is")
    if config.layout.dp_shard != -1 and config.layout.dp_shard < 1:
        raise ValueError(f"--dp-shard must be at least 1, or -1 for all ranks left, not {config.layout.dp_shard}")
    if not (config.optim.beta1 < 1 and config.optim.beta2 < 1):
        raise ValueError(f"--beta1 and --beta2 must be below 1, not {config.optim.beta1} and {config.optim.beta2}")
    for row in COMBINATIONS:
        if row.refused and row.refused(config):
            raise ValueError(row.note.format(**flat))


def leaves() -> dict[str, tuple[str, dataclasses.Field]]:
    """Name of every flag → (section of the tree, its field)."""
    return {
        leaf.name: (section.name, leaf)
        for section in dataclasses.fields(Config)
        for leaf in dataclasses.fields(section.type)
    }


def flatten(config: Config) -> dict[str, Any]:
    """The tree as one dict of flag name (with underscores) → value, for messages and for the record of a run."""
    return {name: getattr(getattr(config, section), name) for name, (section, _) in leaves().items()}


def build(values: dict[str, Any]) -> Config:
    """A Config with `values` (flag name with underscores → value) over the defaults; nothing is checked."""
    sections: dict[str, dict[str, Any]] = {section.name: {} for section in dataclasses.fields(Config)}
    for name, value in values.items():
        sections[leaves()[name][0]][name] = value
    return Config(**{s.name: s.type(**sections[s.name]) for s in dataclasses.fields(Config)})


def parse(argv: list[str]) -> Config:
    """The checked Config of a command line.

    Raises: ValueError with one sentence for anything wrong in the flags, the file or the combination of both.
    SystemExit(0) after --help.
    """
    parser = _Parser(
        prog="train/main.py",
        description="Train on packed shards. Start it with torchrun, or with python on one device.",
    )
    parser.add_argument("--config", metavar="FILE.yaml", help="file with any of these flags; the command line wins")
    for section in dataclasses.fields(Config):
        group = parser.add_argument_group(section.type.__doc__.splitlines()[0])
        for leaf in dataclasses.fields(section.type):
            _add_flag(group, leaf)
    given = vars(parser.parse_args(argv))
    path = given.pop("config", None)
    values = (_read_file(Path(path)) if path else {}) | given
    config = build({name: _convert(name, value) for name, value in values.items()})
    check(config)
    return config


class _Parser(argparse.ArgumentParser):
    def __init__(self, **kwargs: Any):
        super().__init__(argument_default=argparse.SUPPRESS, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (train/main.py --help lists the flags)")


def _add_flag(group: argparse._ArgumentGroup, leaf: dataclasses.Field) -> None:
    name = "--" + leaf.name.replace("_", "-")
    default = "" if leaf.default is None else f" (default: {str(leaf.default).lower()})"
    help_text = (leaf.metadata["help"] + default).replace("%", "%%")
    if leaf.type is bool:
        group.add_argument(name, action=argparse.BooleanOptionalAction, help=leaf.metadata["help"] + default)
        return
    if _base_type(leaf) is tuple:
        group.add_argument(name, action="append", metavar="DIR", help=leaf.metadata["help"])
        return
    choices = leaf.metadata["choices"]
    group.add_argument(
        name, metavar="|".join(choices) if choices else _base_type(leaf).__name__.upper(), help=help_text
    )


def _read_file(path: Path) -> dict[str, Any]:
    try:
        # BaseLoader leaves every value the string that was typed: `verify: off` is not False, `lr: 1e-5` no surprise.
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except OSError as error:
        raise ValueError(f"--config {path} cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ValueError(f"--config {path}{line} is not YAML") from error
    if not content:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"--config {path} must hold `flag: value` lines, not a {type(content).__name__}")
    values = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in leaves():
            near = difflib.get_close_matches(name, leaves(), n=1)
            hint = f"; did you mean {near[0].replace('_', '-')}?" if near else ""
            raise ValueError(f"--config {path}: there is no flag {key}{hint}")
        values[name] = value
    return values


def _base_type(leaf: dataclasses.Field) -> type:
    """The type of a leaf without its `| None`; `tuple` for several strings."""
    if typing.get_origin(leaf.type) is tuple:
        return tuple
    if isinstance(leaf.type, types.UnionType):
        return next(t for t in typing.get_args(leaf.type) if t is not type(None))
    return leaf.type


def _convert(name: str, value: Any) -> Any:
    """`value`, the string of the command line or of the file (a bool for `--flag`, `--no-flag`), as its leaf's type."""
    leaf = leaves()[name][1]
    flag, kind, choices = "--" + name.replace("_", "-"), _base_type(leaf), leaf.metadata["choices"]
    if kind is bool:
        if value not in (True, False, "true", "false"):
            raise ValueError(f"{flag} must be true or false, not {value!r}")
        return value in (True, "true")
    if kind is tuple:  # a list from the command line, a list or one string from the file
        values = [value] if isinstance(value, str) else value
        if not (isinstance(values, list) and all(isinstance(item, str) and item for item in values)):
            raise ValueError(f"{flag} takes one string or a list of them, not {value!r}")
        return tuple(values)
    if name == "tp_plan" and isinstance(value, dict) and all(isinstance(style, str) for style in value.values()):
        value = ",".join(f"{pattern}={style}" for pattern, style in value.items())
    if not isinstance(value, str) or value == "":
        raise ValueError(f"{flag} takes one {kind.__name__}, not {value!r}")
    try:
        converted = kind(value)
    except ValueError:
        raise ValueError(f"{flag} takes one {kind.__name__}, not {value!r}") from None
    if choices and converted not in choices:
        raise ValueError(f"{flag} must be one of {', '.join(choices)}, not {value!r}")
    return converted
