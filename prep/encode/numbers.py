"""JSON with whole numbers of any size.

orjson, the fast parser, makes floats of whole numbers over 64 bits, and a template would write 1.2345678901234568e+29
for 123456789012345678901234567890. Numbers reach a document through a template alone, so only what was rendered by one
is looked at, and only what holds so many digits in a row is parsed again, by the standard library.
"""

import json

import orjson

_AS_ZEROS = bytes.maketrans(b"123456789", b"000000000")
_LONG = b"0" * 19  # digits of the least whole number that may need more than 64 bits


def parse_json(text: bytes | str) -> object:
    """Fast; a whole number over 64 bits becomes a float.

    Raises:
        ValueError: no JSON.
    """
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"not readable as JSON ({error})") from None


def holds_long_number(text: bytes | str) -> bool:
    """Whether digits enough for more than 64 bits follow each other anywhere. A table beats a pattern six times."""
    data = text if isinstance(text, bytes) else text.encode()
    return _LONG in data.translate(_AS_ZEROS)


def parse_exactly(text: bytes | str) -> object:
    """As `parse_json`, with every whole number as it stands."""
    value = parse_json(text)  # stricter than the standard library: no NaN, no lone surrogates
    return json.loads(text) if holds_long_number(text) else value
