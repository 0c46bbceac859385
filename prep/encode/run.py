"""Records → document store: plan the units, run them, write store.json last."""

import functools
import importlib.metadata
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

from formats.shard import write_json
from prep.encode.options import EncodeOptions
from prep.encode.sources import Unit, cut_units, find_inputs
from prep.encode.store import STORE_VERSION, DocumentStore, UnitResult, read_store, write_store
from prep.encode.tokenizer import TokenizerFolder, read_tokenizer
from prep.encode.unit import Job, encode_unit
from prep.engine.local import run_units
from prep.ledger import Ledger

_PACKAGES = ("jinja2", "numpy", "orjson", "pyarrow", "tokenizers", "xxhash")


@dataclass(frozen=True)
class Progress:
    """How far the encoding is; handed to the callback after every unit."""

    units_done: int
    units: int
    bytes_done: int
    bytes: int
    documents: int
    tokens: int
    dropped: int


def encode(
    inputs: Sequence[str],
    store_dir: str | Path,
    options: EncodeOptions,
    *,
    workers: int = 1,
    resume: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> DocumentStore:
    """Encode records into a document store and open it.

    The bytes of the store depend on the inputs, the options and the package versions, not on the workers or on crashes.
    A finished store of equal inputs, options and versions is opened as it is.

    Args:
        inputs: files to read.
        store_dir: folder of the store; made if missing.
        workers: processes.
        resume: go on where an unfinished store stopped. Without it such a folder is refused.
        progress: called after every unit.

    Raises:
        ValueError: bad input or options, or a store of something else in the folder; one sentence that names it.
    """
    store = Path(store_dir)
    folder = read_tokenizer(options.tokenizer)
    files = find_inputs(inputs)
    plan = _plan(folder, [file.to_json() for file in files], options)
    if (finished := read_store(store)) is not None:
        _refuse_difference(store, finished, plan)
        return DocumentStore.open(store)
    _claim(store, plan, resume)
    units = cut_units(files, options.unit_bytes)
    job = Job(str(store), options)
    results = run_units(functools.partial(encode_unit, job), units, workers, _reporter(units, progress))
    ledger = Ledger()
    for file in files:
        ledger.open(file.name)
    for result in results:
        ledger.merge(Ledger.from_json(result.ledger))
    ledger.check()
    if not any(result.rows for result in results):
        dropped = ledger.total()["dropped"]
        reasons = ", ".join(f"{count['documents']} {reason}" for reason, count in sorted(dropped.items()))
        raise ValueError(f"no document is left to store ({reasons or 'the inputs are empty'}); check the inputs")
    write_store(store, plan, results, ledger)
    return DocumentStore.open(store)


def _plan(folder: TokenizerFolder, inputs: list[dict], options: EncodeOptions) -> dict:
    template = folder.chat_template or ""
    return {
        "store_version": STORE_VERSION,
        "inputs": inputs,
        "options": options.identity(),
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "tokenizer_hash": folder.hash,
        "template_hash": xxhash.xxh3_128(template.encode()).hexdigest(),
        "vocab_size": folder.vocab_size,
        "pad_id": folder.pad_id,
        "bos_id": folder.bos_id,
        "eos_id": folder.eos_id,
    }


def _claim(store: Path, plan: dict, resume: bool) -> None:
    """Take the folder for this plan: an empty one, or an unfinished store of the same plan."""
    file = store / "plan.json"
    if file.is_file():
        _refuse_difference(store, json.loads(file.read_text(encoding="utf-8")), plan)
        if not resume:
            raise ValueError(f"{store}: holds an unfinished store of the same input; go on with --resume or remove it")
        return
    if store.exists() and any(not entry.name.endswith(".tmp") for entry in store.iterdir()):
        raise ValueError(f"{store}: already holds something that is no document store; give an empty folder")
    (store / "units").mkdir(parents=True, exist_ok=True)
    write_json(file, plan)


def _refuse_difference(store: Path, theirs: dict, ours: dict) -> None:
    different = list(_differences("", theirs, ours))
    if different:
        raise ValueError(
            f"{store}: was made with other {', '.join(different)}; use the same again or give another folder"
        )


def _differences(prefix: str, theirs: object, ours: object):
    if theirs == ours:
        return
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in sorted(ours.keys() & theirs.keys()):
            yield from _differences(f"{prefix}{key}.", theirs[key], ours[key])
        if not prefix:  # a finished store holds more than its plan
            return
        yield from (f"{prefix}{key}" for key in sorted(ours.keys() ^ theirs.keys()))
    else:
        yield f"{prefix[:-1]} ({_short(theirs)}, now {_short(ours)})"


def _short(value: object) -> str:
    if isinstance(value, list):
        value = [item.get("name", item) if isinstance(item, dict) else item for item in value]
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else text[:117] + "…"


def _reporter(units: Sequence[Unit], progress):
    if progress is None:
        return None
    total = sum(unit.stop - unit.start for unit in units)
    done = {"units": 0, "bytes": 0, "documents": 0, "tokens": 0, "dropped": 0}

    def report(unit: Unit, result: UnitResult) -> None:
        account = result.ledger["total"]
        done["units"] += 1
        done["bytes"] += unit.stop - unit.start
        done["documents"] += result.rows
        done["tokens"] += result.tokens
        done["dropped"] += sum(count["documents"] for count in account["dropped"].values())
        progress(
            Progress(
                done["units"], len(units), done["bytes"], total, done["documents"], done["tokens"], done["dropped"]
            )
        )

    return report
