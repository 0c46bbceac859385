"""Records → document store: plan the units, run them, write store.json last."""

import fcntl
import functools
import importlib.metadata
import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import xxhash

from formats.shard import atomic_write, read_json, write_json
from prep.encode.builtin import load_template
from prep.encode.files import is_remote
from prep.encode.mix import check_shares, select
from prep.encode.options import EncodeOptions
from prep.encode.sources import InputFile, SourceSpec, Unit, as_sources, cut_units, find_inputs
from prep.encode.store import (
    STORE_VERSION,
    DocumentStore,
    UnitResult,
    read_store,
    source_ranges,
    store_content,
    unit_path,
    write_selection,
)
from prep.encode.tokenizer import TokenizerFolder, forget_tokenizers, read_tokenizer
from prep.encode.tokens import can_be_fast
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
    inputs: Sequence[str | Path | SourceSpec],
    store_dir: str | Path,
    options: EncodeOptions,
    *,
    workers: int = 1,
    resume: bool = False,
    progress: Callable[[Progress], None] | None = None,
    runner: str = "local",
    ray_address: str | None = None,
    unit_range: tuple[int, int] | None = None,
) -> DocumentStore | None:
    """Encode records into a document store and open it.

    The bytes of the store depend on the inputs, the options and the package versions, not on the workers or on crashes.
    A finished store of equal inputs, options and versions is opened as it is.

    Args:
        inputs: files, folders, globs, addresses, `hf:name[:config]#split`, or sources with options of their own.
        store_dir: folder of the store; made if missing.
        workers: processes.
        resume: go on where an unfinished store stopped. Without it such a folder is refused.
        progress: called after every unit.
        runner: `local` runs units on processes of this machine, `ray` on a Ray cluster (`ray_address`, else a new one).
        unit_range: (i, n) does only units i−1, i−1+n, … (a task of a Slurm array), finishes nothing and returns None;
            several may run at once. A last call without it and with `resume` finishes the store.

    Raises:
        ValueError: bad input or options, or a store of something else in the folder; one sentence that names it.
    """
    if is_remote(str(store_dir)):
        raise ValueError(
            f"{store_dir}: a store is written to a local folder; give one and copy it, e.g. with aws s3 sync or rclone"
        )
    store = Path(store_dir)
    folder = read_tokenizer(options.tokenizer)
    engine = _engine(folder, options)
    sources = as_sources(inputs)
    check_shares(sources)
    files = find_inputs(sources)
    plan = _plan(folder, sources, files, options, engine)
    if (finished := read_store(store)) is not None:
        _refuse_difference(store, finished, plan)
        return DocumentStore.open(store)
    units = cut_units(files, sources, options.unit_bytes)
    fresh = not (store / "plan.json").exists() and unit_range is None
    _claim(store, plan, resume or unit_range is not None)
    if runner != "local" or min(workers, len(units)) > 1:
        del folder  # each worker loads its own
        forget_tokenizers()
    run = _runner(runner, ray_address, workers)
    job = Job(str(store), options, tuple(sources), engine)
    with _alone(store, shared=unit_range is not None):
        if unit_range is not None:
            units = units[unit_range[0] - 1 :: unit_range[1]]
        try:
            results = run(functools.partial(encode_unit, job), units, _reporter(units, options, progress))
            return _finish(job, results, plan) if unit_range is None else None
        except TooManyErrorsError:
            raise
        except ValueError:
            # Bad input: whoever mends it has another input, so nothing of this store could ever be used. What a full
            # disk or a kill leaves can be finished, and stays.
            if fresh:
                shutil.rmtree(store, ignore_errors=True)
            raise


class TooManyErrorsError(ValueError):
    """More bad records than allowed; the store keeps the list of them."""


def _runner(name: str, ray_address: str | None, workers: int) -> Callable:
    """Who runs the units: a function (function, units, on_done) → results in order."""
    if name == "local":
        return functools.partial(_run_locally, workers)
    from prep.engine.ray import run_units as run_on_ray  # ray is an extra

    return functools.partial(run_on_ray, address=ray_address)


def _run_locally(workers: int, function: Callable, units: Sequence[Unit], on_done) -> list:
    return run_units(function, units, workers, on_done)


def _finish(job: Job, results: Sequence[UnitResult], plan: dict) -> DocumentStore:
    """All units are done: add up the ledger, choose the rows, write store.json."""
    store, options, sources = Path(job.store), job.options, job.sources
    ledger = Ledger()
    for source in sources:
        ledger.open(source.name)
    for result in results:
        ledger.merge(Ledger.from_json(result.ledger))
    ledger.check()
    _check_errors(results, ledger, options)
    names = [source.name for source in sources]
    counts = [sum(result.rows for result in results if result.source == name) for name in names]
    content = store_content(plan, results, ledger, source_ranges(names, counts))
    if any(counts):
        content = _select(store, content, sources, ledger, options)
    if content["rows"] == 0:
        dropped = ledger.total()["dropped"]
        reasons = ", ".join(f"{count['documents']} {reason}" for reason, count in sorted(dropped.items()))
        raise ValueError(f"no document is left to store ({reasons or 'the inputs are empty'}); check the inputs")
    _collect_rejects(store, results)
    write_json(store / "store.json", content)
    return DocumentStore.open(store)


@contextmanager
def _alone(store: Path, shared: bool) -> Iterator[None]:
    """Hold the folder's lock, which goes with the process, however that ends; `shared` with others of its kind."""
    descriptor = os.open(store, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{store}: another process is writing this store; wait for it or give another folder"
            ) from None
        yield
    finally:
        os.close(descriptor)


def _select(store: Path, content: dict, sources: Sequence[SourceSpec], ledger: Ledger, options: EncodeOptions) -> dict:
    """Leave out duplicates and apply the shares of the sources."""
    whole = DocumentStore(store, content)
    bounds = [(first, last) for _, first, last in content["sources"]]
    chosen = select(whole, bounds, sources, ledger, dedup=options.dedup == "exact")
    if chosen is None:
        return content
    ledger.check()
    rows = np.concatenate(chosen)
    kept = ledger.total()["kept"]
    ranges = source_ranges([source.name for source in sources], [len(part) for part in chosen])
    return {
        **content,
        "rows": kept["documents"],
        "tokens": kept["tokens"],
        "target_tokens": int(whole.target_tokens[rows].sum(dtype=np.int64)),
        "sources": [list(source) for source in ranges],
        "selection": write_selection(store, rows),
        "ledger": ledger.to_json(),
    }


def _engine(folder: TokenizerFolder, options: EncodeOptions) -> str:
    """Which engine encodes: decided once, before any work."""
    if options.engine == "hf":
        return "hf"
    fast = can_be_fast(folder)
    if options.engine == "fast" and not fast:
        missing = importlib.util.find_spec("fastokens") is None
        raise ValueError(
            "engine fast needs the package fastokens; pip install fastokens or take engine hf"
            if missing
            else f"engine fast cannot take the tokenizer {folder.path.name}; take engine hf"
        )
    return "fast" if fast else "hf"


def _plan(
    folder: TokenizerFolder,
    sources: Sequence[SourceSpec],
    files: Sequence[InputFile],
    options: EncodeOptions,
    engine: str,
) -> dict:
    templates = [load_template(source.template or options.chat_template, folder) or "" for source in sources]
    same = len(set(templates)) == 1
    packages = (*_PACKAGES, "fastokens") if engine == "fast" else _PACKAGES
    return {
        "store_version": STORE_VERSION,
        "inputs": [file.to_json() for file in files],
        "input_formats": [[sources[file.source].name, file.format] for file in files],
        "options": {**options.identity(), "sources": [_source_identity(source) for source in sources]},
        "engine": engine,
        "packages": {name: importlib.metadata.version(name) for name in packages},
        "tokenizer_hash": folder.hash,
        "template_hash": _hash(templates[0] if same else json.dumps(templates)),
        "vocab_size": folder.vocab_size,
        "pad_id": folder.pad_id,
        "bos_id": folder.bos_id,
        "eos_id": folder.eos_id,
    }


def _source_identity(source: SourceSpec) -> dict:
    value = asdict(source)
    del value["paths"], value["template"]  # inputs and template are hashed by content
    value["columns"] = dict(source.columns)
    return value


def _hash(text: str) -> str:
    return xxhash.xxh3_128(text.encode()).hexdigest()


def _check_errors(results: Sequence[UnitResult], ledger: Ledger, options: EncodeOptions) -> None:
    rejected = sum(result.rejected for result in results)
    records = ledger.total()["read"]["documents"]
    if rejected > options.error_limit(records):
        raise TooManyErrorsError(
            f"{rejected} of {records} records are bad, more than --max-errors {options.max_errors} allows; "
            "see units/*.rejects.jsonl in the store"
        )


def _collect_rejects(store: Path, results: Sequence[UnitResult]) -> None:
    """Join the rejected records of all units into rejects.jsonl."""
    if not any(result.rejected for result in results):
        return
    with atomic_write(store / "rejects.jsonl") as out:
        for result in results:
            if result.rejected:
                out.write(unit_path(store, result.index, ".rejects.jsonl").read_bytes())


def _claim(store: Path, plan: dict, resume: bool) -> None:
    """Take the folder for this plan: an empty one, or an unfinished store of the same plan."""
    file = store / "plan.json"
    if file.is_file():
        _refuse_difference(store, read_json(file), plan)
        if not resume:
            raise ValueError(f"{store}: holds an unfinished store of the same input; go on with --resume or remove it")
    else:
        if store.exists() and any(not entry.name.endswith(".tmp") for entry in store.iterdir()):
            raise ValueError(f"{store}: already holds something that is no document store; give an empty folder")
        store.mkdir(parents=True, exist_ok=True)
        try:
            write_json(file, plan)
        except FileNotFoundError:  # another task of the same array was faster
            _refuse_difference(store, read_json(file), plan)
    (store / "units").mkdir(exist_ok=True)  # after the plan: a kill in between leaves nothing that looks foreign


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


def _reporter(units: Sequence[Unit], options: EncodeOptions, progress):
    """Count what is done, stop as soon as there are more bad records than a count allows, and tell the caller."""
    total = sum(unit.bytes for unit in units)
    done = {"units": 0, "bytes": 0, "documents": 0, "tokens": 0, "dropped": 0, "rejected": 0}
    stop = options.error_limit(0) if options.max_errors and not options.max_errors.endswith("%") else float("inf")

    def report(unit: Unit, result: UnitResult) -> None:
        done["units"] += 1
        done["bytes"] += unit.bytes
        done["documents"] += result.rows
        done["tokens"] += result.tokens
        done["dropped"] += sum(count["documents"] for count in result.ledger["total"]["dropped"].values())
        done["rejected"] += result.rejected
        if done["rejected"] > stop:
            raise TooManyErrorsError(
                f"{done['rejected']} records are bad, more than --max-errors {options.max_errors} allows; "
                "see units/*.rejects.jsonl in the store"
            )
        if progress is not None:
            progress(
                Progress(
                    done["units"],
                    len(units),
                    done["bytes"],
                    total,
                    done["documents"],
                    done["tokens"],
                    done["dropped"],
                )
            )

    return report
