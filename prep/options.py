"""Parameter types and options that several commands share."""

import os
import re
from pathlib import Path

import click

FOLDER = click.Path(path_type=Path)

workers = click.option(
    "--workers",
    type=click.IntRange(min=1),
    default=lambda: len(os.sched_getaffinity(0)),
    help="Processes; default: the cores of this machine.",
)

as_json = click.option("--json", "as_json", is_flag=True, help="Print the facts as JSON.")


class Size(click.ParamType):
    """A number of bytes: 65536, 64K, 256M, 2G (powers of 1024)."""

    name = "size"

    def convert(self, value, param, ctx) -> int:
        found = re.fullmatch(r"(\d+)([KMG]?)i?B?", str(value), re.IGNORECASE)
        if not found or not int(found[1]):
            self.fail(f"{value!r} is not a size like 65536, 64K, 256M or 2G")
        return int(found[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[found[2].upper()]


class Listed(click.ParamType):
    """Values separated by commas."""

    def __init__(self, kind: type):
        self._kind = kind
        self.name = f"{kind.__name__},…"

    def convert(self, value, param, ctx) -> tuple:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(self._kind(item) for item in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is not a list of {self._kind.__name__} separated by commas")


def echo_json(value: object) -> None:
    """Print JSON with sorted keys."""
    import json

    click.echo(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False))
