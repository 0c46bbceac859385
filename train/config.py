"""What a run is told: one tree of frozen dataclasses. Every leaf of it is a flag (see train/flags.py)."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

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
        "auto",
        "parameters in forward and backward; the optimizer keeps float32. auto: bfloat16 on CUDA, float32 on CPU",
        ("auto", "float32", "bfloat16"),
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
    """Sizes of the five mesh axes (ep regroups three of them), and what runs on them."""

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
    ep: int = _flag(
        1,
        "expert-parallel ranks, of a second mesh over the same ranks: ep × ep_shard is dp_shard × cp × tp; experts are "
        "distributed over ep and sharded over ep_shard",
    )
    reshard: bool = _flag(
        True,
        "free a block's gathered weights after its forward; without, and always in a pipeline, backward need not "
        "gather them again",
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
    save_last: bool = _flag(True, "checkpoint after the last step")
    async_save: bool = _flag(
        True, "write checkpoints in the background, beside the next steps, from a copy in host memory; without, in turn"
    )
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
