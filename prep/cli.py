"""The `prep` command: names, where their code lies, and how errors are shown.

The modules of the commands import click alone; what a command needs is imported when it runs, so that help is instant.
"""

import importlib
import os

import click

from prep.room import advising

COMMANDS = {
    "encode": "prep.encode.command:encode",
    "pack": "prep.pack_command:pack",
    "report": "prep.inspect.commands:report",
    "verify": "prep.inspect.commands:verify",
    "lint": "prep.inspect.commands:lint",
    "view": "prep.inspect.commands:view",
    "plan": "prep.inspect.plan_command:plan",
    "convert": "prep.convert.command:convert",
}
"""Name → module:function, in the order in which help lists them."""

EPILOG = """\b
Exit codes:
  0  done
  1  something is wrong with the input, the options or a folder (one sentence
     says what), or lint or verify found an error
  2  the command line is not understood
  3  a --gate is not met (everything was written)

\b
Completion for your shell (or zsh_source, fish_source):
  eval "$(_PREP_COMPLETE=bash_source prep)"
"""


class Commands(click.Group):
    """Finds commands by name, and turns the errors a user can mend into one sentence and exit code 1; anything else
    keeps its traceback, as do all with MESHPACK_TRACEBACK=1."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, function = COMMANDS[cmd_name].split(":")
        return getattr(importlib.import_module(module), function)

    def invoke(self, ctx: click.Context):
        try:
            with advising("make room and run the same command again"):
                return super().invoke(ctx)
        except KeyboardInterrupt:
            raise click.ClickException("stopped; run the same command once more") from None
        except (ValueError, OSError) as error:
            if os.environ.get("MESHPACK_TRACEBACK"):
                raise
            raise click.ClickException(_sentence(error)) from None


def _sentence(error: ValueError | OSError) -> str:
    """Without the number that an OSError of the system begins with."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    return str(error)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]}, epilog=EPILOG)
@click.version_option(package_name="meshpack")
def main() -> None:
    """Pack tokenized documents into Arrow shards, offline and once, for training on any mesh."""


if __name__ == "__main__":
    main()
