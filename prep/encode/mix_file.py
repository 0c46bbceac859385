"""Sources and their shares from a YAML file: `sources: [{name, paths, format, template, columns, weight, …}]`."""

import os
from collections.abc import Mapping

import yaml

from prep.encode import files
from prep.encode.builtin import BUILTIN
from prep.encode.sources import SourceSpec

_TEXT = "a text"
_NUMBER = "a number"
_EXPECTED = {
    "name": _TEXT,
    "paths": "a path or a list of paths",
    "format": _TEXT,
    "template": "a text: a built-in name or a file",
    "columns": "names of ours and of theirs, e.g. {text: body}",
    "text_by": _TEXT,
    "weight": _NUMBER,
    "repeat": _NUMBER,
    "max_epochs": _NUMBER,
    "limit_tokens": "a whole number",
}


def read_mix(path: str, *, encoded: bool = False) -> list[SourceSpec]:
    """The sources of the file. Relative paths and templates count from its folder. `encoded`: they lie in a document
    store already, so they need no paths.

    Raises:
        ValueError: not such a file; the message names the entry.
    """
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.safe_load(file)
    except OSError as error:
        raise ValueError(f"--mix {path}: {error.strerror}; name a YAML file with a list of sources") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: not readable as YAML ({error})") from None
    entries = content.get("sources") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path}: expected a list under `sources`")
    return [_entry(path, number, entry, encoded) for number, entry in enumerate(entries, 1)]


def _entry(path: str, number: int, entry: object, encoded: bool) -> SourceSpec:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str):
        raise ValueError(f"{path}: source {number} must be an object with a name")
    given = {field: value for field, value in entry.items() if value is not None}
    for field, value in given.items():
        if field not in _EXPECTED:
            raise ValueError(
                f"{path}: source {entry['name']} has unknown field {field}; known are {', '.join(sorted(_EXPECTED))}"
            )
        if not _is_of(field, value):
            raise ValueError(f"{path}: source {entry['name']}: {field} is {value!r}; expected {_EXPECTED[field]}")
    paths = given.get("paths") or []
    if not paths and not encoded:
        raise ValueError(f"{path}: source {entry['name']} names no paths")
    folder = os.path.dirname(os.path.abspath(path))
    given["paths"] = tuple(_from(folder, p) for p in ([paths] if isinstance(paths, str) else paths))
    given["columns"] = tuple(sorted(given.get("columns", {}).items()))
    if given.get("template") and given["template"] not in BUILTIN:
        given["template"] = _from(folder, given["template"])
    if "limit_tokens" in given:
        given["limit_tokens"] = int(given["limit_tokens"])
    return SourceSpec(**given)


def _is_of(field: str, value: object) -> bool:
    if field == "paths":
        return isinstance(value, str) or (isinstance(value, list) and all(isinstance(path, str) for path in value))
    if field == "columns":
        return isinstance(value, dict) and all(isinstance(name, str) for pair in value.items() for name in pair)
    if _EXPECTED[field] == _NUMBER or field == "limit_tokens":
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return is_number and (field != "limit_tokens" or float(value).is_integer())
    return isinstance(value, str)


def _from(folder: str, path: str) -> str:
    return path if files.is_remote(path) or path.startswith("hf:") else os.path.join(folder, path)
