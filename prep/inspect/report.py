"""report.json and report.html of a packed folder: pure functions of its shards, index and ledger."""

import json
from dataclasses import replace
from pathlib import Path

from formats.dataset import REPORT_NAMES, PackedDataset
from formats.manifest import Manifest, write_manifest
from formats.shard import FileEntry, atomic_write, file_digest, json_bytes, read_json
from prep.inspect.facts import facts
from prep.inspect.lint import lint_packed
from prep.ledger import LEDGER_NAME, Ledger

REPORT_NAME, PAGE_NAME = REPORT_NAMES


def make_report(dataset: PackedDataset, ledger: Ledger | None = None) -> dict:
    """The facts, the ledger and the lint of a packed folder, JSON-compatible. `ledger`: by default the folder's own."""
    account = ledger.to_json() if ledger else read_json(dataset.folder / LEDGER_NAME)
    return {**facts(dataset), "ledger": account, "lint": lint_packed(dataset, account)}


def write_reports(folder: Path, manifest: Manifest, ledger: Ledger | None = None, *, page: bool = True):
    """Write report.json and, with `page`, report.html, where their bytes differ from what is there; returns their
    entries for the manifest."""
    report = make_report(PackedDataset(folder, manifest), ledger)
    entries = [_write(Path(folder) / REPORT_NAME, json_bytes(report))]
    if page:
        # matplotlib takes half a second to import: only a page pays for it.
        from prep.inspect.page import render

        entries.append(_write(Path(folder) / PAGE_NAME, render(report).encode()))
    return entries


def refresh_reports(folder: Path, *, page: bool = True) -> dict:
    """Write the reports of a finished folder anew where they are missing or differ (a newer version may show more), and
    list them in the manifest; returns the report."""
    dataset = PackedDataset(folder)
    manifest = dataset.manifest
    entries = write_reports(folder, manifest, page=page)
    others = [e for e in manifest.files if e.name not in REPORT_NAMES]
    kept = [e for e in manifest.files if e.name == PAGE_NAME and not page and (Path(folder) / PAGE_NAME).is_file()]
    if (files := (*others, *entries, *kept)) != manifest.files:
        write_manifest(folder, replace(manifest, files=files))
    return json.loads((Path(folder) / REPORT_NAME).read_bytes())


def _write(path: Path, data: bytes) -> FileEntry:
    if not path.is_file() or path.read_bytes() != data:
        with atomic_write(path) as file:
            file.write(data)
    return FileEntry(path.name, len(data), file_digest(path))
