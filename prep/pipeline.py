"""`prep pack` from end to end: inputs → store → split → plan → shards → index, ledger, manifest."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import xxhash

from formats.dataset import INDEX_NAME, write_index
from formats.layout import align_up
from formats.manifest import MANIFEST_NAME, Manifest, Source, fingerprint, read_manifest, write_manifest
from formats.schema import BATCH_PACKS
from formats.shard import TEMPORARY_SUFFIX, FileEntry, file_digest, write_json
from prep.alone import alone
from prep.encode.command import progress_note
from prep.encode.files import is_remote
from prep.encode.options import EncodeOptions
from prep.encode.run import write_store
from prep.encode.sources import SourceSpec, as_sources
from prep.encode.storage import fetch_store, read_remote_store
from prep.encode.store import DocumentStore, check_units, read_store
from prep.inspect.facts import packed_folders
from prep.inspect.report import PAGE_NAME, REPORT_NAME, write_reports
from prep.inspect.subject import is_packed
from prep.inspect.verify import verify
from prep.ledger import LEDGER_NAME
from prep.materialize import Layout, materialize
from prep.plan import PackOptions, make_plan
from prep.progress import Progress
from prep.remix import remix, shares
from prep.splits import check_eval_sources, choose_parts, part_ledger

SHARD_BYTES = 256 << 20
"""Size that a shard aims at: large enough to stream, small enough that two fit beside a model on any machine."""


@dataclass(frozen=True)
class Encoding:
    """How raw input becomes a store; see `prep.encode.run.write_store`. `store`: its address, else it lies beside the
    packed folder."""

    sources: list
    options: EncodeOptions
    runner: str = "local"
    ray_address: str | None = None
    store: str | None = None


@dataclass(frozen=True)
class Stored:
    """A finished store, by folder or address. `mix`: shares of its sources in place of its own (`prep.remix`)."""

    place: str
    mix: Sequence[SourceSpec] = ()


@dataclass(frozen=True)
class OutputOptions:
    """What becomes of the packs. `eval_fraction`, `eval_sources`: see `prep.splits.choose_parts`. `compress`: None or
    `zstd`, for shipping: such shards are decompressed when read instead of mapped. `page`: write report.html."""

    eval_fraction: float = 0.0
    eval_sources: tuple[str, ...] = ()
    shard_size: int = SHARD_BYTES
    compress: str | None = None
    page: bool = True


def pack_inputs(
    origin: Encoding | Stored,
    out: Path,
    options: PackOptions,
    *,
    output: OutputOptions = OutputOptions(),
    workers: int = 1,
    resume: bool = False,
    progress: Progress | None = None,
) -> list[Path]:
    """Pack raw files, or a document store, into `out`; returns the packed folders (`out`, or its train and eval).

    Raw files are encoded into a store at `out` + ".store" first, a store behind an address is copied there. Nothing is
    written before all options are checked.
    An interrupted run leaves no manifest and is finished by the same call with `resume`. ValueError says what to
    change in one sentence; one is that another process is packing into `out` (see `prep.alone`).
    """
    progress = progress or Progress(quiet=True)
    options.check()
    if not 0 <= output.eval_fraction < 1:
        raise ValueError(f"--eval-fraction {output.eval_fraction} is not in the range 0 to 1 (1 left out)")
    if isinstance(origin, Encoding):
        check_eval_sources(output.eval_sources, [spec.name for spec in as_sources(origin.sources)])
    with alone(out):
        check_output(out, resume)
        return _pack(origin, out, options, output, workers, resume, progress)


def _pack(origin, out, options, output, workers, resume, progress) -> list[Path]:
    store = open_store(origin, out, workers=workers, resume=resume, progress=progress)
    try:
        parts, plans = _plans(store, options, output, progress)
    except ValueError as error:
        if isinstance(origin, Stored):
            raise
        # The encoding is done and need not be repeated: say where it lies.
        raise ValueError(f"{error}; the token ids are kept, go on from them: prep pack {store.path} …") from None
    return [
        _write_part(name, parts, chosen, plan, store, origin, out, output, workers, progress)
        for name, chosen, plan in plans
    ]


def _plans(store, options, output, progress) -> tuple[dict, list]:
    """The parts, and (name, options, plan) of each. All plans are made before the first byte is written: what cannot be
    packed leaves nothing behind."""
    parts, plans = choose_parts(store, output.eval_fraction, output.eval_sources), []
    for name, rows in parts.items():
        # Held-out packs are read from first to last, never permuted, and none is left out.
        chosen = replace(options, order="input", drop_last=False) if name == "eval" else options
        plan = make_plan(store.lengths[rows], rows, chosen)
        if plan.certificate:
            progress.say(f"{name} packs: {plan.certificate}")
        if plan.num_packs == 0:
            raise ValueError(
                f"no document is left{'' if name == 'all' else f' for {name}'} after --overlong {options.overlong}; "
                "take a larger --seq-len, or --overlong truncate or split"
            )
        plans.append((name, chosen, plan))
    return parts, plans


def check_output(out: Path, resume: bool) -> None:
    """Refuse a folder that holds anything but what an unfinished run left (and that, too, without `resume`)."""
    if not any(out.iterdir()):
        return
    parts = [p for p in (out, out / "train", out / "eval") if p.is_dir()]
    expected = {"shards", INDEX_NAME, LEDGER_NAME, REPORT_NAME, PAGE_NAME, MANIFEST_NAME, "train", "eval"}
    strangers = sorted(
        p.name for part in parts for p in part.iterdir() if p.name.removesuffix(TEMPORARY_SUFFIX) not in expected
    )
    if strangers:
        raise ValueError(
            f"--out {out} already holds {strangers[0]}, which is none of ours; name an empty or new folder"
        )
    if (out / MANIFEST_NAME).exists() or all((out / p / MANIFEST_NAME).exists() for p in ("train", "eval")):
        raise ValueError(f"--out {out} already holds finished shards; name another folder, or remove this one first")
    if not resume:
        raise ValueError(f"--out {out} holds an unfinished run; go on with --resume, or remove it first")


def find_store(inputs: Sequence[str]) -> str | None:
    """The document store that `inputs` is, or None for raw input; ValueError for packed shards, which are neither, and
    for a store among others."""
    if is_packed(inputs):
        folder = Path(inputs[0])
        parts = " and ".join(str(part) for part in packed_folders(folder) if part != folder)
        store = store_path(folder) if _is_store(str(store_path(folder))) else "OUT.store"
        raise ValueError(
            f"{folder} holds packed shards{f' in {parts}' if parts else ''}: pack the raw files or the document store "
            f"that they were made of ({store}), or change their form with prep convert"
        )
    stores = [place for place in inputs if _is_store(place)]
    if stores and len(inputs) > 1:
        raise ValueError(f"{stores[0]} is a document store: pack it alone, or name the raw files of all")
    return stores[0] if stores else None


def open_store(origin: Encoding | Stored, out: Path, *, workers, resume, progress) -> DocumentStore:
    """The store to pack: the one named, or one made from raw input."""
    if isinstance(origin, Stored):
        store = _here(origin.place, out, progress)
        with progress.stage("checking the store", "files") as update:
            check_units(store.path, update)  # it may have lain for long, and the packs would bless what it holds now
        return remix(store, origin.mix) if origin.mix else store
    place = origin.store or str(store_path(out))
    with progress.stage("encoding", "units") as update:
        begin = time.monotonic()

        def report(p) -> None:
            update(p.units_done, p.units, progress_note(p, time.monotonic() - begin))

        # Bad input leaves no store behind, but for the rejected records where there are too many: they are kept.
        write_store(
            origin.sources,
            place,
            origin.options,
            workers=workers,
            resume=resume,
            progress=report,
            runner=origin.runner,
            ray_address=origin.ray_address,
        )
    return _here(place, out, progress)


def _is_store(place: str) -> bool:
    if is_remote(place):
        return read_remote_store(place) is not None
    return Path(place).is_dir() and read_store(Path(place)) is not None


def _here(place: str, out: Path, progress: Progress) -> DocumentStore:
    """A store, opened; one behind an address is copied to where one made from raw input would lie."""
    if is_remote(place):
        progress.say(f"copying {place} to {store_path(out)}")
        fetch_store(place, store_path(out))
        place = store_path(out)
    return DocumentStore.open(place)


def store_path(out: Path) -> Path:
    """The document store that stands beside a packed folder."""
    return out.with_name(out.name + ".store")


def _write_part(name, parts, options, plan, store, origin, out, output, workers, progress) -> Path:
    folder = out if name == "all" else out / name
    info = store.info
    pad_id = next((i for i in (info.pad_id, info.eos_id) if i is not None), 0)
    packages = {**info.packages, **{p: version(p) for p in ("meshpack", "numpy", "pyarrow")}}
    stated = {
        **asdict(options),
        **{k: v for k, v in asdict(output).items() if k != "page"},
        "store": file_digest(store.path / "store.json"),
        "packages": packages,
    }
    if isinstance(origin, Stored) and origin.mix:
        stated["mix"] = shares(origin.mix)
    essentials = {
        "capacity": options.seq_len,
        "align": options.align,
        "cp": options.cp,
        "split": name,
        "order": options.order,
        "block": plan.block,
        "seed": options.seed,
        "algorithm": options.algo,
        "shards": -(-plan.num_packs // shard_packs(options, output.shard_size)),
        "sources": [list(source) for source in info.sources],
        "pad_id": pad_id,
        "bos_id": info.bos_id,
        "eos_id": info.eos_id,
        "vocab_size": info.vocab_size,
        "largest_id": info.largest_id,
        "tokenizer_hash": info.tokenizer_hash,
        "template_hash": info.template_hash,
        "plan": xxhash.xxh3_128(json.dumps(stated, sort_keys=True).encode()).hexdigest(),
    }
    if (folder / MANIFEST_NAME).exists():
        if read_manifest(folder).options["plan"] != essentials["plan"]:
            raise ValueError(f"{folder}: was finished with other options or input; remove {out}, or name another --out")
        if problems := verify(folder).problems:
            raise ValueError(f"{problems[0]} (to make it anew, remove {folder} and go on with --resume)")
        return folder
    with progress.stage(f"writing {folder}", "packs") as update:
        written = 0

        def report(job, result) -> None:
            nonlocal written
            if result.mended:
                progress.say(f"{job.path}: what the interrupted run left was damaged; written anew")
            written += len(job.offsets) - 1
            update(written, plan.num_packs)

        files, columns = materialize(
            plan,
            store,
            folder,
            Layout(options.format, options.seq_len, options.align, pad_id, info.largest_id, output.compress),
            essentials=essentials,
            shard_packs=shard_packs(options, output.shard_size),
            workers=workers,
            on_done=report,
        )
    files.append(write_index(folder / INDEX_NAME, columns))
    ledger = part_ledger(name, parts, plan, store)
    files.append(write_json(folder / LEDGER_NAME, ledger.to_json()))
    manifest = Manifest(
        kind=options.format,
        capacity=options.seq_len,
        align=options.align,
        cp=options.cp,
        order=options.order,
        block=plan.block,
        seed=options.seed,
        algorithm=options.algo,
        options={**stated, "plan": essentials["plan"]},
        split=name,
        tokenizer_hash=info.tokenizer_hash,
        template_hash=info.template_hash,
        vocab_size=info.vocab_size,
        largest_id=info.largest_id,
        pad_id=pad_id,
        bos_id=info.bos_id,
        eos_id=info.eos_id,
        packages=packages,
        inputs=tuple(FileEntry(**entry) for entry in info.inputs),
        sources=tuple(Source(*source) for source in info.sources),
        totals={
            "packs": plan.num_packs,
            "documents": len(np.unique(plan.doc)),
            "slots": len(plan.doc),
            "tokens": int(plan.length.sum(dtype=np.int64)),
            "target_tokens": int(columns["target_tokens"].sum(dtype=np.int64)),
            "slot_tokens": int(align_up(plan.length, options.align).sum(dtype=np.int64)),
            "lower_bound_packs": plan.lower_bound,
        },
        files=tuple(files),
        fingerprint=fingerprint(columns["xxh3"], kind=options.format, capacity=options.seq_len, align=options.align),
    )
    with progress.stage(f"looking at {folder}", "reports"):
        manifest = replace(manifest, files=(*files, *write_reports(folder, manifest, ledger, page=output.page)))
    write_manifest(folder, manifest)
    return folder


def shard_packs(options: PackOptions, shard_size: int) -> int:
    """Packs a shard of about `shard_size` bytes: whole record batches where it is that large."""
    bytes_per_token = 5 if options.format == "thd" else 16
    packs = max(1, shard_size // (bytes_per_token * options.seq_len))
    return packs if packs < BATCH_PACKS else packs // BATCH_PACKS * BATCH_PACKS
