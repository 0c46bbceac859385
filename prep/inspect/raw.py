"""The options of `prep encode` that say how raw input is read, for commands that only look at it."""

from collections.abc import Mapping, Sequence

import click

from prep.encode.command import encode, options_of, sources_of
from prep.options import given_options

_READING = frozenset(
    {
        *("input_format", "text_by", "columns", "chat_template", "template_date", "train_on", "roles", "end_of_turn"),
        *("allow_special", "on_error"),
    }
)


OPTIONS = [parameter for parameter in encode.params if parameter.name in _READING]
"""For the end of a command's own parameters; it hands what it gets on to `raw_input`."""


def raw_input(inputs: Sequence[str], tokenizer: str | None, given: Mapping):
    """(sources, how to encode them: an `EncodeOptions`, or None without a tokenizer) of INPUTS, should they be raw.

    `given` holds these options (and may hold others). ClickException where one is given for what is encoded already.
    """
    from prep.inspect.subject import is_packed, is_store

    if (useless := given_options(_READING)) and (is_store(inputs) or is_packed(inputs)):
        raise click.ClickException(
            f"{inputs[0]} is encoded already: leave out {', '.join(useless)}, or name the raw files"
        )
    sources = sources_of(inputs, None, given["columns"], given)
    reading = {name: given[name] for name in _READING}
    return sources, None if tokenizer is None else options_of(given["roles"], {**reading, "tokenizer": tokenizer})
