"""The command line and the file behind --config, read into the tree of train/config.py.

Every leaf of the tree is a flag: the field `batch_packs` is `--batch-packs` on the command line and `batch-packs` (or
`batch_packs`) in the file that `--config` names. The command line wins over the file, the file over the defaults.
"""

import argparse
import dataclasses
import difflib
import math
import os
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from train.combinations import refuse
from train.config import Config, build, flatten, leaves

REQUIRED = ("shards", "model", "out")

POSITIVE = ("batch_packs", "micro_packs", "pp", "dp_replicate", "cp", "tp", "ep", "epochs", "lr")
NOT_NEGATIVE = (
    *("threads", "steps", "warmup_steps", "weight_decay", "max_grad_norm", "min_lr_ratio", "beta1", "beta2"),
    *("router_aux_loss", "router_z_loss", "router_bias_rate", "router_log_every"),
    *("eval_every", "eval_packs", "save_every", "keep", "prefetch", "peak_tflops", "profile"),
)
MEANS_OF = {
    "pp_schedule": "pp",
    "pp_split": "pp",
    "cp_method": "cp",
    "tp_plan": "tp",
    "sp": "tp",
    "compile_backend": "compile",
}
"""Flags that say how another works, and mean nothing without it."""


def check(config: Config) -> None:
    """Raise a ValueError of one sentence for a value out of range or a combination that the table refuses."""
    flat = flatten(config)
    for name in REQUIRED:
        if not flat[name]:
            raise ValueError(f"--{name} is missing; give it on the command line or in the --config file")
    for name, value in flat.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"--{name.replace('_', '-')} must be a finite number, not {value}")
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
    if config.optim.min_lr_ratio > 1:
        raise ValueError(f"--min-lr-ratio is a share of --lr, at most 1, not {config.optim.min_lr_ratio}")
    if config.data.micro_packs > config.data.batch_packs:
        raise ValueError(
            f"--micro-packs {config.data.micro_packs} makes rows longer than a step, all padding behind its packs; "
            f"take at most --batch-packs {config.data.batch_packs}"
        )
    for name, of in MEANS_OF.items():
        is_on = flat[of] if isinstance(flat[of], bool) else flat[of] > 1
        if not is_on and flat[name] != leaves()[name][1].default:
            flag = ("--no-" if flat[name] is False else "--") + name.replace("_", "-")
            wanted = f"--{of}" if isinstance(flat[of], bool) else f"--{of} 2 or more"
            raise ValueError(f"{flag} says how --{of} works and would be ignored: give {wanted}, or leave it out")
    refuse(config)


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
        group = parser.add_argument_group(section.type.__doc__.splitlines()[0].rstrip("."))
        for leaf in dataclasses.fields(section.type):
            _add_flag(group, leaf)
    given = vars(parser.parse_args(argv))
    path = given.pop("config", None)
    values = (_read_file(Path(path)) if path else {}) | given
    config = build({name: _convert(name, value) for name, value in values.items()})
    check(config)
    return config


def parse_shards(values: Sequence[str]) -> tuple[list[str], list[float] | None]:
    """`a:0.7`, `b:0.3` → folders and weights; without any weight None.

    Raises: ValueError for a weight that is not a positive number, a folder named twice, or weights on some only.
    """
    folders, weights = [], []
    for value in values:
        folder, colon, weight = value.rpartition(":")
        try:
            number = float(weight) if colon else None
        except ValueError:  # a colon of the path, as in s3://bucket
            number = None
        if number is not None and not 0 < number < math.inf:
            raise ValueError(f"--shards {value}: the weight must be a number greater than 0, not {weight}")
        folders.append(value if number is None else folder)
        weights.append(number)
    real = [os.path.realpath(folder) for folder in folders]
    for folder, path in zip(folders, real, strict=True):
        if real.count(path) > 1:
            raise ValueError(f"--shards {folder} is given more than once; name it once, with the sum of its weights")
    if None not in weights:
        return folders, weights
    if any(weight is not None for weight in weights):
        bare = folders[weights.index(None)]
        raise ValueError(
            f"--shards {bare} has no weight but others have; write {bare}:WEIGHT, or leave all weights out"
        )
    return folders, None


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
