"""Text from data, made safe to look at."""

_PICTURES = {code: 0x2400 + code for code in range(0x20)} | {0x7F: 0x2421}
_TURNING = (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
_TABLE = _PICTURES | {code: f"‹U+{code:04X}›" for code in (*range(0x80, 0xA0), *_TURNING)}
_IN_LINES = {code: picture for code, picture in _TABLE.items() if chr(code) not in "\n\t"}


def visible(text: str, *, lines: bool = False) -> str:
    """`text` with everything that a terminal or a browser obeys shown instead: control characters by their pictures
    (␛), the others and those that turn the direction of writing by their numbers (‹U+202E›). `lines` keeps line ends
    and tabs."""
    return text.translate(_IN_LINES if lines else _TABLE)
