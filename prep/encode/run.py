"""Records → document store: plan the units, run them, write store.json last."""

import functools
import importlib.util
import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from prep.encode.builtin import BUILTIN, hash_template, load_template
from prep.encode.cuts import cut_units
from prep.encode.files import absolute, is_remote
from prep.encode.identity import make_plan, of_units, refuse_difference
from prep.encode.mix import check_shares, select
from prep.encode.options import EncodeOptions
from prep.encode.preload import begin_fast
from prep.encode.sources import (
    InputFile,
    SourceSpec,
    Unit,
    as_sources,
    check_place,
    find_inputs,
    hash_of,
    stamp_of,
)
from prep.encode.storage import PLAN_NAME, FolderStorage, RemoteStorage, storage_at
from prep.encode.store import (
    STORE_NAME,
    DocumentStore,
    UnitResult,
    check_version,
    source_ranges,
    store_content,
    unit_path,
    write_selection,
)
from prep.encode.tokenizer import TokenizerFolder, check_tokenizer_folder, forget_tokenizers, load_tokenizer
from prep.encode.tokens import can_be_fast
from prep.encode.unit import Job, encode_unit
from prep.engine.local import Workers
from prep.ledger import LEDGER_NAME, Ledger

_NAMES_SHOWN = 20  # of the files that were left out of a source; the ledger has their number
_TIMES_WRITTEN_ANEW = 3  # that a run goes on by itself; each time all inputs are hashed


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
    rejected: int


def encode(inputs: Sequence[str | Path | SourceSpec], store_dir: str | Path, options: EncodeOptions, **how):
    """`write_store` into a folder of this machine, opened: a `DocumentStore`, or None for a part (`unit_range`)."""
    content = write_store(inputs, store_dir, options, **how)
    return None if content is None else DocumentStore.open(store_dir)


def write_store(
    inputs: Sequence[str | Path | SourceSpec],
    place: str | Path,
    options: EncodeOptions,
    *,
    workers: int = 1,
    resume: bool = False,
    progress: Callable[[Progress], None] | None = None,
    runner: str = "local",
    ray_address: str | None = None,
    unit_range: tuple[int, int] | None = None,
) -> dict | None:
    """Encode records into a document store; returns what its store.json says.

    The bytes of the store depend on the inputs, the options and the package versions, not on the workers, on crashes or
    on where it lies. A finished store of equal inputs, options and versions is left as it is.

    Args:
        inputs: files, folders, globs, addresses, `hf:name[:config]#split`, or sources with options of their own.
        place: folder or address (`s3://…`) of the store; a folder is made if missing.
        workers: processes.
        resume: go on where an unfinished store stopped. Without it such a store is refused.
        progress: called after every unit.
        runner: `local` runs units on processes of this machine, `ray` on a Ray cluster (`ray_address`, else a new one).
        unit_range: (i, n) does only units i−1, i−1+n, … (a task of a Slurm array), finishes nothing and returns None;
            several may run at once. A last call without it and with `resume` finishes the store.

    Raises:
        ValueError: bad input or options, or a store of something else in the place; one sentence that names it.
        OSError: the place cannot be written (a full disk, a refused put); what is finished is kept.
    """
    once = functools.partial(
        _write_store_once, inputs, place, options, workers, progress, runner, ray_address, unit_range
    )
    for _ in range(_TIMES_WRITTEN_ANEW):
        with suppress(WrittenAnewError):
            return once(resume)
        resume = True
    return once(resume)


def _write_store_once(
    inputs, place, options, workers, progress, runner, ray_address, unit_range, resume: bool
) -> dict | None:
    """As `write_store`, with WrittenAnewError where an input is written meanwhile with the bytes that it has."""
    if ray_address and runner != "ray":
        raise ValueError("--ray-address is for --engine ray; give both, or none")
    storage = storage_at(place)
    check_tokenizer_folder(options.tokenizer)
    sources = as_sources(inputs)
    check_shares(sources)
    check_place(str(place), sources)
    files, left_out = find_inputs(sources)
    units = cut_units(files, sources, options.unit_bytes)
    count = min(workers, len(units)) if runner == "local" else 1
    with Workers(count, functools.partial(_tokenizer_facts, options, tuple(sources)), _early(options)) as pool:
        for file in files:
            _ = file.xxh3_128  # reads it, while the tokenizer is loaded
        plan = make_plan(pool.setup_result(), sources, files, options)
        if (finished := storage.read_json(STORE_NAME)) is not None:
            refuse_difference(storage.name, check_version(storage.name, finished), plan)
            return finished
        fresh = _claim(storage, of_units(plan), resume or unit_range is not None) and unit_range is None
        run = pool.run if runner == "local" else _on_ray(ray_address)
        # Workers of this machine leave the syncs to this process, which has time to wait for the disk.
        job = Job(str(place), options, tuple(sources), plan["engine"], sync=runner != "local")
        if runner == "ray":
            job, units = _from_anywhere(job, units)
        with storage.alone(shared=unit_range is not None):
            begun = frozenset() if fresh else storage.begun_units()
            units = [replace(unit, begun=True) if unit.index in begun else unit for unit in units]
            if unit_range is not None:
                units = units[unit_range[0] - 1 :: unit_range[1]]
            try:
                report = _reporter(units, options, progress)
                with storage.syncing() if not job.sync else nullcontext() as sync:
                    results = run(functools.partial(encode_unit, job), units, _after(sync, report))
                return _finish(storage, job, results, plan, left_out) if unit_range is None else None
            except (OSError, ValueError) as found:
                error = _cause(found, files)
                if isinstance(error, OSError):  # a full disk, an input that vanished, a worker that was killed
                    way = f"; what is finished is kept in {place}, go on with --resume"
                    error = OSError(str(error) if "--resume" in str(error) else f"{error}{way}")
                elif fresh and not isinstance(error, KeptError):
                    # Bad input: whoever mends it has another input, so nothing of this store could ever be used.
                    storage.remove()
                raise error from None


class KeptError(ValueError):
    """Not what the units were made of is at fault: they can be used when its cause is gone."""


class TooManyErrorsError(KeptError):
    """More bad records than allowed; the store keeps the list of them."""


class UnmetSharesError(KeptError):
    """No such mix can be made of the documents that are there; of what is encoded another can."""


class WrittenAnewError(KeptError):
    """An input was written while it was read, with the bytes that it had: what is finished is right."""


def _cause(error: Exception, files: Sequence[InputFile]) -> Exception:
    """Why a run failed: an input that was written since it was hashed goes before the error that was found."""
    for file in files:
        try:
            if stamp_of(file.path) == file.stamp:
                continue
            same = hash_of(file.path) == (file.bytes, file.xxh3_128)
        except (OSError, ValueError):  # it is gone, or its address does not answer: the error that was found says so
            continue
        if same:
            return WrittenAnewError(
                f"{file.path}: is written again and again while it is read; what is finished is kept, go on with "
                "--resume when nobody writes to it"
            )
        return ValueError(f"{file.path}: changed while it was read; encode again when nobody writes to it")
    return error


def _after(sync: Callable[[int], None] | None, report: Callable[[Unit, UnitResult], None]) -> Callable:
    """What is done when a unit is: its sync, if there is one, and the report."""

    def on_done(unit: Unit, result: UnitResult) -> None:
        if sync is not None:
            sync(unit.index)
        report(unit, result)

    return on_done


def _early(options: EncodeOptions) -> Callable[[], None] | None:
    """What a process that loads the tokenizer begins with."""
    if options.engine == "hf" or is_remote(str(options.tokenizer)):
        return None
    return functools.partial(begin_fast, str(options.tokenizer))


def _on_ray(address: str | None) -> Callable:
    """Runs units on Ray: a function (function, units, on_done) → results in order."""
    from prep.engine.ray import run_units  # ray is an extra

    forget_tokenizers()  # each node loads its own
    return functools.partial(run_units, address=address)


def _from_anywhere(job: Job, units: Sequence[Unit]) -> tuple[Job, list[Unit]]:
    """The same with absolute paths: the processes of a cluster have other working directories."""

    def template(name: str | None) -> str | None:
        return name if name is None or name in BUILTIN else absolute(name)

    options = replace(
        job.options, tokenizer=absolute(job.options.tokenizer), chat_template=template(job.options.chat_template)
    )
    sources = tuple(replace(source, template=template(source.template)) for source in job.sources)
    units = [replace(unit, path=absolute(unit.path)) for unit in units]
    return replace(job, store=absolute(job.store), options=options, sources=sources), units


def _finish(
    storage: FolderStorage | RemoteStorage, job: Job, results: Sequence[UnitResult], plan: dict, left_out: dict
) -> dict:
    """All units are done: add up the ledger, choose the rows, write store.json."""
    options, sources = job.options, job.sources
    ledger = Ledger()
    for source in sources:
        ledger.open(source.name)
    for source, others in left_out.items():
        ledger.note(source, "files_of_unknown_format", len(others))
    for result in results:
        ledger.merge(Ledger.from_json(result.ledger))
    ledger.check()
    _check_errors(results, ledger, options)
    names = [source.name for source in sources]
    counts = [sum(result.rows for result in results if result.source == name) for name in names]
    content = store_content(plan, results, ledger, source_ranges(names, counts))
    content["left_out"] = {source: others[:_NAMES_SHOWN] for source, others in left_out.items()}
    if any(counts):
        content = _select(storage, content, sources, ledger, options)
    if content["rows"] == 0:
        dropped = ledger.total()["dropped"]
        reasons = ", ".join(f"{count['documents']} {reason}" for reason, count in sorted(dropped.items()))
        raise ValueError(f"no document is left to store ({reasons or 'the inputs are empty'}); check the inputs")
    _collect_rejects(storage, results)
    refuse_difference(storage.name, storage.read_json(PLAN_NAME) or {}, of_units(plan))
    storage.write_json(LEDGER_NAME, content["ledger"])
    storage.write_json(STORE_NAME, content)
    return content


def _select(storage, content: dict, sources: Sequence[SourceSpec], ledger: Ledger, options: EncodeOptions) -> dict:
    """Leave out duplicates and apply the shares of the sources."""
    dedup = options.dedup == "exact"
    if not dedup and not any(source.has_share for source in sources):
        return content
    with storage.local(content) as folder:
        whole = DocumentStore(folder, content)
        bounds = [(first, last) for _, first, last in content["sources"]]
        try:
            chosen = select(whole, bounds, sources, ledger, dedup=dedup)
        except ValueError as error:
            raise UnmetSharesError(
                f"{error}; what is encoded is kept in {storage.name}: go on with --resume and other shares"
            ) from None
        rows = np.concatenate(chosen)
        targets = int(whole.target_tokens[rows].sum(dtype=np.int64))
    ledger.check()
    kept = ledger.total()["kept"]
    ranges = source_ranges([source.name for source in sources], [len(part) for part in chosen])
    with storage.writing("rows.arrow") as file:
        write_selection(file, rows)
    return {
        **content,
        "rows": kept["documents"],
        "tokens": kept["tokens"],
        "target_tokens": targets,
        "sources": [list(source) for source in ranges],
        "selection": {"name": "rows.arrow", "bytes": file.bytes, "xxh3_128": file.hexdigest()},
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


def _tokenizer_facts(options: EncodeOptions, sources: Sequence[SourceSpec]) -> dict:
    """What the plan says of the tokenizer and the templates. Loads what workers need, so it runs where they come from.

    Raises:
        ValueError: see `read_tokenizer`, `load_template` and `_engine`.
    """
    folder = load_tokenizer(options.tokenizer, fast=options.engine != "hf")
    templates = [load_template(source.template or options.chat_template, folder) or "" for source in sources]
    same = len(set(templates)) == 1
    return {
        "engine": _engine(folder, options),
        "tokenizer_hash": folder.hash,
        "template_hash": hash_template(templates[0] if same else json.dumps(templates)),
        "source_templates": [hash_template(template) for template in templates],
        "vocab_size": folder.vocab_size,
        "pad_id": folder.pad_id,
        "bos_id": folder.bos_id,
        "eos_id": folder.eos_id,
    }


def _check_errors(results: Sequence[UnitResult], ledger: Ledger, options: EncodeOptions) -> None:
    rejected = sum(result.rejected for result in results)
    records = ledger.total()["read"]["documents"]
    if rejected > options.error_limit(records):
        raise TooManyErrorsError(
            f"{rejected} of {records} records are bad, more than --max-errors {options.max_errors} allows; "
            "see units/*.rejects.jsonl in the store"
        )


def _collect_rejects(storage: FolderStorage | RemoteStorage, results: Sequence[UnitResult]) -> None:
    """Join the rejected records of all units into rejects.jsonl."""
    if not any(result.rejected for result in results):
        return
    with storage.writing("rejects.jsonl") as out:
        for result in results:
            if result.rejected:
                out.write(storage.read(str(unit_path(Path(), result.index, ".rejects.jsonl"))))


def _claim(storage: FolderStorage | RemoteStorage, plan: dict, resume: bool) -> bool:
    """Take the place for this plan: an empty one (then True), or an unfinished store of the same plan."""
    theirs = storage.read_json(PLAN_NAME)
    if theirs is not None:
        refuse_difference(storage.name, theirs, plan)
        if not resume:
            raise ValueError(
                f"{storage.name}: holds an unfinished store of the same input; go on with --resume or remove it"
            )
        return False
    if storage.is_occupied():
        raise ValueError(f"{storage.name}: already holds something that is no document store; give an empty folder")
    try:
        storage.create(plan)
    except FileNotFoundError:  # another task of the same array was faster
        refuse_difference(storage.name, storage.read_json(PLAN_NAME) or {}, plan)
    return True


def _reporter(units: Sequence[Unit], options: EncodeOptions, progress):
    """Count what is done, stop as soon as there are more bad records than a count allows, and tell the caller."""
    total = sum(unit.bytes for unit in units)
    done = dict.fromkeys(("units_done", "bytes_done", "documents", "tokens", "dropped", "rejected"), 0)
    stop = options.error_limit(0) if options.max_errors and not options.max_errors.endswith("%") else float("inf")

    def report(unit: Unit, result: UnitResult) -> None:
        done["units_done"] += 1
        done["bytes_done"] += unit.bytes
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
            progress(Progress(units=len(units), bytes=total, **done))

    return report
