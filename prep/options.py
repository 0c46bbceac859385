"""Parameter types and options that several commands share."""

import os
import re
from collections.abc import Collection
from pathlib import Path

import click
from click.core import ParameterSource

FOLDER = click.Path(path_type=Path)

_CLOSED = {"packed shards": ("manifest.json", "packs.arrow"), "a document store": ("store.json", "plan.json")}
"""Folders that are whole as they are, by their files: what else lies in them is damage to `prep verify`."""

workers = click.option(
    "--workers",
    type=click.IntRange(min=1),
    default=lambda: len(os.sched_getaffinity(0)),
    help="Processes; default: the cores of this machine.",
)

as_json = click.option("--json", "as_json", is_flag=True, help="Print the facts as JSON.")

quiet = click.option("--quiet", is_flag=True, help="Print errors only.")


class Output(click.ParamType):
    """A place to write: a folder, which is made if missing, or a file in a folder that exists. What cannot be written
    is refused before any work is done. file:// is this machine; with `address` another (s3://…) passes as it is."""

    name = "path"

    def __init__(self, *, file: bool = False, address: bool = False):
        self._file, self._address = file, address

    def convert(self, value, param, ctx) -> str:
        text, kind = str(value), "file" if self._file else "folder"
        option = f"{param.opts[0]} {text}"
        if "://" in text and not text.startswith("file://"):
            if not self._address:
                raise click.ClickException(f"{option}: name a {kind} of this machine, and copy it from there")
            return text
        if not text:
            raise click.ClickException(f"{param.opts[0]} is empty; name a {kind}")
        path = Path(text.removeprefix("file://"))
        above = path.parent if self._file else next(p for p in (path, *path.parents) if os.path.lexists(p))
        if self._file and path.is_dir():
            raise click.ClickException(f"{option} is a folder; name a file")
        if not above.is_dir():
            what = f"{above} is a file" if above.is_file() else f"there is no folder {above}"
            raise click.ClickException(f"{option}: {what}; name another {kind}")
        for folder in path.absolute().parents:
            if held := next(
                (what for what, names in _CLOSED.items() if all((folder / n).is_file() for n in names)), ""
            ):
                raise click.ClickException(
                    f"{option} lies inside {folder}, which holds {held} and nothing else; name another {kind}"
                )
        if not os.access(above, os.W_OK | os.X_OK):
            raise click.ClickException(f"{option}: nothing may be written in {above}; name another {kind}")
        return str(path)


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


def given_options(among: Collection[str]) -> list[str]:
    """The options of these parameters that stand on the command line of the running command."""
    context = click.get_current_context()
    return [
        max(parameter.opts, key=len)
        for parameter in context.command.params
        if parameter.name in among and context.get_parameter_source(parameter.name) is ParameterSource.COMMANDLINE
    ]


def echo_json(value: object) -> None:
    """Print JSON with sorted keys."""
    import json

    click.echo(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False))
