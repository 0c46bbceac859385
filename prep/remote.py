"""Packed folders behind an address: made in a temporary folder, and put object by object, the manifest last."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from formats.manifest import MANIFEST_NAME
from prep.encode.files import is_remote
from prep.encode.storage import RemoteStorage
from prep.progress import Progress
from prep.room import advising
from prep.scratch import ScratchFolder


@contextmanager
def destination(out: str, resume: bool, progress: Progress) -> Iterator[Path]:
    """The folder to pack into: `out`, or a temporary one whose files are put to the address `out` when the block ends.

    An address has no lock. A run that finds objects there which were not there when it began puts nothing; of two that
    put at the same moment, equal ones put the same bytes, and others a mixture that `prep verify` refuses.

    Raises:
        ValueError: finished shards or anything else is at the address; an interrupted put needs `resume`; another run
            put something meanwhile.
        OSError: an object cannot be put; those that are there stay, and `resume` puts all again.
    """
    if not is_remote(out):
        with advising(f"make room and go on with --resume, what is finished is kept in {out}"):
            yield Path(out.removeprefix("file://"))
        return
    storage = RemoteStorage(out)
    there = storage.names()
    _check(storage.name, there, resume)
    with ScratchFolder() as folder:
        packed = Path(folder) / "packed"
        with advising("it is made there and then put: set TMPDIR to a folder with more room"):
            yield packed
        files = sorted((p for p in packed.rglob("*") if p.is_file()), key=lambda p: (p.name == MANIFEST_NAME, p))
        others = sorted(set(there) - {str(path.relative_to(packed)) for path in files})
        if others:
            raise ValueError(f"--out {out} holds {others[0]} of a run with other options; remove it first")
        if new := sorted(set(storage.names()) - set(there)):
            raise ValueError(f"--out {out}: another run put {new[0]} there meanwhile; wait for it, or name another")
        with progress.stage(f"putting {out}", "objects") as update:
            for number, path in enumerate(files, 1):
                storage.put(path, str(path.relative_to(packed)))
                update(number, len(files))


def _check(out: str, names: list[str], resume: bool) -> None:
    """Refuse what is there already, but with `resume` what an unfinished run put."""
    parts = {name.removesuffix(MANIFEST_NAME) for name in names if name.endswith(MANIFEST_NAME)}
    if "" in parts or {"train/", "eval/"} <= parts:
        raise ValueError(f"--out {out} already holds finished shards; name another address, or remove them first")
    strangers = [name for name in names if not _is_ours(name)]
    if strangers:
        raise ValueError(f"--out {out} already holds {strangers[0]}, which is none of ours; name an empty address")
    if names and not resume:
        raise ValueError(f"--out {out} holds an unfinished run; go on with --resume, or remove it first")


def _is_ours(name: str) -> bool:
    name = name.removeprefix("train/").removeprefix("eval/")
    return name.startswith("shards/") or name.rpartition(".")[0] in ("manifest", "packs", "ledger", "report")
