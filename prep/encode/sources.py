"""What to read: sources and their files."""

import fnmatch
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from prep.encode import files
from prep.encode.made import raw_files

FORMATS = ("jsonl", "json", "parquet", "arrow", "csv", "tsv", "text", "hf")
TEXT_BY = ("line", "paragraph", "document")
FIELDS = (
    *("input_ids", "labels", "loss_mask", "attention_mask", "position_ids", "chosen", "rejected", "messages"),
    *("conversations", "system", "tools", "instruction", "input", "output", "segments", "input_output"),
    *("prompt", "completion", "text"),
)
"""Fields of records; see `records`."""
SHARES = ("weight", "repeat", "limit_tokens", "max_epochs")
"""Fields of a source that say how much of it is used."""
_ENDINGS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".csv": "csv",
    ".tsv": "tsv",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
}
_PEEK = 4096


@dataclass(frozen=True)
class SourceSpec:
    """One source of documents.

    name: stands in the ledger; unique in a run.
    paths: files, folders, globs, addresses, `hf:name[:config]#split`.
    format: one of FORMATS; by the ending of the names without it.
    template: chat template (file or built-in name) instead of the run's.
    columns: our field → the record's field (`{"text": "body"}`).
    text_by: what a document of a plain text file is: a line, a paragraph (between blank lines) or the document.
    weight, repeat, limit_tokens, max_epochs: how much of it is used; see `mix`.
    """

    name: str
    paths: tuple[str, ...]
    format: str | None = None
    template: str | None = None
    columns: tuple[tuple[str, str], ...] = ()
    text_by: str = "line"
    weight: float | None = None
    repeat: float | None = None
    limit_tokens: int | None = None
    max_epochs: float | None = None

    def __post_init__(self):
        if self.format is not None and self.format not in FORMATS:
            raise ValueError(
                f"source {self.name}: format {self.format!r} is unknown; choose one of {', '.join(FORMATS)}"
            )
        ours = [name for name, _ in self.columns]
        for name in ours:
            if name not in FIELDS:
                raise ValueError(
                    f"source {self.name}: column {name} is no field of a record here; known are {', '.join(FIELDS)}"
                )
            if ours.count(name) > 1:
                raise ValueError(f"source {self.name}: two columns are to be {name}; name one")
        if self.text_by not in TEXT_BY:
            raise ValueError(f"source {self.name}: text_by is {self.text_by!r}; choose one of {', '.join(TEXT_BY)}")

    @property
    def has_share(self) -> bool:
        """Whether anything but all of it, once, may be used."""
        return any(getattr(self, name) is not None for name in SHARES)


@dataclass(frozen=True)
class InputFile:
    """A file to read: where it lies, and what it is called in everything that is written.

    stamp: see `stamp_of`; taken before the hash.
    """

    path: str
    name: str
    source: int
    format: str
    bytes: int
    stamp: tuple
    known_hash: str | None
    """Where the size could not be had without reading it all; else that waits until the hash is asked for."""

    @cached_property
    def xxh3_128(self) -> str:
        """xxh3-128 of its bytes, in hex.

        Raises:
            ValueError: it has not the size any more that it was found with.
        """
        if self.known_hash is not None:
            return self.known_hash
        size, digest = hash_of(self.path)
        if size != self.bytes:
            raise ValueError(f"{self.path}: changed while it was read; encode again when nobody writes to it")
        return digest

    def to_json(self) -> dict:
        """Without the path: the same content somewhere else is the same input."""
        return {"name": self.name, "bytes": self.bytes, "xxh3_128": self.xxh3_128}


@dataclass(frozen=True)
class Unit:
    """Part `start:stop` of a file; in bytes (`jsonl`, `text` by line), row groups or record batches; all of it else.

    `stamp`: the file's, see `stamp_of`. `begun`: the store may hold it already.
    """

    index: int
    source: int
    path: str
    name: str
    format: str
    start: int
    stop: int
    bytes: int
    first_row: int = 0
    stamp: tuple = ()
    begun: bool = False


def as_sources(inputs: Sequence["str | os.PathLike | SourceSpec"], **defaults) -> list[SourceSpec]:
    """Inputs as a user names them → sources with unique names. `defaults` are fields of those given by path alone.

    Raises:
        ValueError: nothing given, or two sources of one name.
    """
    if not inputs:
        raise ValueError("no input given; name at least one file")
    specs, seen = [], {}
    for item in inputs:
        if isinstance(item, SourceSpec):
            specs.append(item)
            continue
        path = os.fspath(item)
        name = path if path.startswith("hf:") else os.path.basename(path.rstrip("/")) or path
        if path.startswith("hf:"):
            name = "hf:" + os.path.basename(path[3:].rstrip("/"))
        count = seen[name] = seen.get(name, 0) + 1
        specs.append(SourceSpec(name if count == 1 else f"{name}#{count}", (path,), **defaults))
    names = [spec.name for spec in specs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two sources are called {name}; give each a name of its own")
    return specs


def check_place(place: str, specs: Sequence[SourceSpec]) -> None:
    """Refuse a place of output inside a folder of input, or where a glob leads: the run that resumes this one would
    read what it wrote.

    Raises:
        ValueError: it is inside one; the message names both.
    """
    place = files.absolute(place.removeprefix("file://"))
    for spec in specs:
        for path in spec.paths:
            folder = files.absolute(path.removeprefix("file://").partition("#")[0]).rstrip("/")
            within = f"{place.rstrip('/')}/".startswith(f"{folder}/") and files.is_folder(folder)
            is_glob = not files.GLOB.isdisjoint(folder)
            if within or (is_glob and _reaches(folder.split("/"), place.rstrip("/").split("/"))):
                raise ValueError(f"--out {place} lies inside the input {path}, which would then hold it; name another")


def _reaches(pattern: Sequence[str], place: Sequence[str]) -> bool:
    """Whether a glob, part by part, may lead to something inside a place."""
    if not pattern or not place:
        return bool(pattern)
    if pattern[0] == "**":
        return _reaches(pattern[1:], place) or _reaches(pattern, place[1:])
    return fnmatch.fnmatchcase(place[0], pattern[0]) and _reaches(pattern[1:], place[1:])


def find_inputs(specs: Sequence[SourceSpec]) -> tuple[list[InputFile], dict[str, list[str]]]:
    """The files of all sources, in order, each with its size; and the names of files that folders and globs hold beside
    them, of no known format: {source: names}.

    Raises:
        ValueError: a name that leads nowhere, or a file of unknown format; the message names it.
        OSError: an address that does not answer.
    """
    found: list[InputFile] = []
    read: set[tuple] = set()
    left_out: dict[str, list[str]] = {}
    seen: dict[str, int] = {}
    for number, spec in enumerate(specs):
        for path in spec.paths:
            entries, others = _expand(path.removeprefix("file://"), spec)
            if others:
                left_out.setdefault(spec.name, []).extend(others)
            for entry in entries:
                place = entry.path if files.is_remote(entry.path) else os.path.realpath(entry.path)
                how = (place, replace(spec, name="", paths=()))
                if how in read:
                    raise ValueError(f"{path}: {entry.path} is named twice; name it once (--mix has repeat)")
                read.add(how)
                count = seen[entry.name] = seen.get(entry.name, 0) + 1
                name = entry.name if count == 1 else f"{entry.name}#{count}"
                found.append(InputFile(entry.path, name, number, entry.format, entry.bytes, entry.stamp, entry.hash))
    return found, left_out


def without_tokenizer(specs: Sequence[SourceSpec]) -> ValueError:
    """The error for raw input without a tokenizer, or rather, where a name leads nowhere, the one that says so."""
    try:
        for path in (path.removeprefix("file://") for spec in specs for path in spec.paths):
            if not path.startswith("hf:") and _saved_dataset(path.rstrip("/")) is None:
                raw_files(path)
    except ValueError as error:
        return error
    return ValueError("raw input needs --tokenizer: a folder with tokenizer.json and the chat template")


@dataclass(frozen=True)
class _Entry:
    path: str
    name: str
    format: str
    bytes: int
    stamp: tuple
    hash: str | None


def stamp_of(path: str) -> tuple:
    """What is another as soon as the file is: a file with the stamp that it had before it was hashed still has that
    hash. `touch` gives another to the same bytes.

    Raises:
        OSError: the file is gone, or the address does not answer.
    """
    if path.startswith("hf:"):
        from prep.encode.hub import stamp  # `datasets` takes a second to import: only its own sources pay for it

        return stamp(path)
    return files.file_stamp(path)


def hash_of(path: str) -> tuple[int, str]:
    """(bytes, xxh3-128) of an input, or what stands for them."""
    if path.startswith("hf:"):
        from prep.encode.hub import describe  # as above

        return describe(path)
    return files.file_facts(path)


def _expand(path: str, spec: SourceSpec) -> tuple[list[_Entry], list[str]]:
    """The files of a path, and the names of those of no known format."""
    if path.startswith("hf:"):
        stamp = stamp_of(path)
        size, digest = hash_of(path)
        return [_Entry(path, os.path.basename(path.rstrip("/")), "hf", size, stamp, digest)], []
    saved = _saved_dataset(path.rstrip("/"))
    found = saved if saved is not None else raw_files(path)
    entries, others = [], []
    for place, name in found.files:
        kind = spec.format or _format(place) or ("jsonl" if found.is_file else None)
        if kind is None:
            others.append(name)
            continue
        if kind in ("parquet", "arrow") and _is_compressed(place):
            raise ValueError(
                f"{place}: is not read as {kind}, which is compressed within: decompress the file, or rename it if "
                "only its name says that it is compressed"
            )
        stamp = stamp_of(place)
        size, digest = hash_of(place) if files.is_remote(place) else (files.file_size(place), None)
        if kind == "json":
            kind = "json" if size and _is_array(place) else "jsonl"
        entries.append(_Entry(place, name, kind, size, stamp, digest))
    if not entries:
        raise ValueError(
            f"{path}: no file of a known format (but {others[0]}); endings known are {', '.join(_ENDINGS)} (and .gz, "
            ".zst), --input-format names one for all"
        )
    return entries, others


def _format(path: str) -> str | None:
    """Format by the ending of the name."""
    base, suffix = os.path.splitext(files.bare(path).lower())
    if suffix in files.COMPRESSIONS:
        suffix = os.path.splitext(base)[1]
    return _ENDINGS.get(suffix)


def _is_compressed(path: str) -> bool:
    """By its name."""
    return files.bare(path).lower().endswith(files.COMPRESSIONS)


def _is_array(path: str) -> bool:
    with files.open_decompressed(path) as file:
        return file.read(_PEEK).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")


def _saved_dataset(path: str) -> files.Found | None:
    """The Arrow files of a folder (or FOLDER#SPLIT) that `datasets` wrote with save_to_disk; None when it is none."""
    if files.is_web(path) or path.endswith(tuple(_ENDINGS)) or set("*?[") & set(path):
        return None
    folder, _, split = path.rpartition("#") if "#" in path else (path, "", "")
    if split and files.is_file(f"{path}/state.json"):  # a # of the folder's own name
        folder, split = path, ""
    splits = f"{folder}/dataset_dict.json"
    if files.is_file(splits):
        names = _json_at(splits)["splits"]
        if split not in names:
            wanted = f"no split {split!r}" if split else "several splits"
            raise ValueError(f"{folder}: holds {wanted}; name one as {folder}#SPLIT, of {', '.join(names)}")
        folder = f"{folder}/{split}"
    elif split:
        return None
    if not files.is_file(f"{folder}/state.json"):
        return None
    names = [entry["filename"] for entry in _json_at(f"{folder}/state.json")["_data_files"]]
    return files.Found([(f"{folder}/{name}", name) for name in names], False)


def _json_at(path: str) -> dict:
    with files.open_binary(path) as file:
        try:
            return json.loads(file.read())
        except ValueError as error:
            raise ValueError(f"{path}: not readable as JSON ({error})") from None
