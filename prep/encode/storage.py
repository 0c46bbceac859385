"""Where a document store is written: a folder of this machine, or an address that fsspec opens (`s3://…`, `gs://…`).

Both do the same few things. In a folder, a file is written under a temporary name and renamed. Behind an address, it is
made in a temporary folder of this machine and put: the put of one object is the atomic step there. The record of a
unit follows its data, `store.json` comes last, and what a record says is compared with the bytes that are there, so a
kill between any two puts costs one unit.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import xxhash

from formats.shard import TEMPORARY_SUFFIX, atomic_write, file_digest, json_bytes, read_json, sync_file, sync_folder
from prep.encode.files import filesystem, is_remote
from prep.encode.store import STORE_NAME, UnitResult, check_version, unit_path
from prep.scratch import ScratchFolder

_BLOCK = 1 << 20
PLAN_NAME = "plan.json"


def storage_at(place: str | Path) -> "FolderStorage | RemoteStorage":
    """The storage at a path or an address."""
    place = str(place).removeprefix("file://")
    return RemoteStorage(place) if is_remote(place) else FolderStorage(Path(place))


class FolderStorage:
    """A store in a folder of this machine."""

    def __init__(self, path: Path):
        self.name = str(path)
        self._path = path

    def read_json(self, name: str) -> dict | None:
        """What a JSON file of the store holds, or None where there is none."""
        file = self._path / name
        return read_json(file) if file.is_file() else None

    def read(self, name: str) -> bytes:
        return (self._path / name).read_bytes()

    @contextmanager
    def writing(self, name: str) -> Iterator:
        """A file to write (see `formats.shard.atomic_write`); it is there when the block ends without an error."""
        with atomic_write(self._path / name) as file:
            yield file

    def write_json(self, name: str, value: object) -> None:
        """Deterministic JSON, written atomically."""
        with self.writing(name) as file:
            file.write(json_bytes(value))

    def is_occupied(self) -> bool:
        """Whether anything but a half-written plan is there."""
        if self._path.is_file():
            return True
        half = PLAN_NAME + TEMPORARY_SUFFIX
        return self._path.exists() and any(entry.name != half for entry in self._path.iterdir())

    def create(self, plan: dict) -> None:
        """Make the store, with its plan. FileNotFoundError when another process does so at the same moment."""
        self._path.mkdir(parents=True, exist_ok=True)
        self.write_json(PLAN_NAME, plan)

    @contextmanager
    def alone(self, shared: bool) -> Iterator[None]:
        """Hold the folder's lock, which goes with the process, however that ends; `shared` with others of its kind."""
        descriptor = os.open(self._path, os.O_RDONLY)
        try:
            try:
                fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(
                    f"{self.name}: another process is writing this store; wait for it or give another folder"
                ) from None
            yield
        finally:
            os.close(descriptor)

    def remove(self) -> None:
        """Take the whole store away."""
        shutil.rmtree(self._path, ignore_errors=True)

    def begun_units(self) -> frozenset[int]:
        """Units that have a record; `finished_unit` says whether their data is whole."""
        return frozenset(int(path.stem) for path in (self._path / "units").glob("*[0-9].json"))

    def finished_unit(self, index: int) -> UnitResult | None:
        """The result of a unit that is done and whole, or None."""
        record, data = unit_path(self._path, index, ".json"), unit_path(self._path, index)
        if not record.is_file() or not data.is_file():
            return None
        try:
            result = UnitResult(**json.loads(record.read_bytes()))
        except (ValueError, TypeError):  # the machine went down before the record was on the disk
            return None
        return result if result.is_of(data.stat().st_size, lambda: file_digest(data)) else None

    @contextmanager
    def syncing(self) -> Iterator[Callable[[int], None]]:
        """Makes units durable that were written without a sync: the function takes each as it is done. They are all
        durable when the block ends without an error."""
        with ThreadPoolExecutor(1) as pool:  # it waits for the disk, so that no worker has to
            syncs = []
            yield lambda index: syncs.append(pool.submit(self._sync_unit, index))
            for sync in syncs:
                sync.result()
        if syncs:
            sync_folder(self._path / "units")

    def _sync_unit(self, index: int) -> None:
        sync_file(unit_path(self._path, index))
        sync_file(unit_path(self._path, index, ".json"))

    @contextmanager
    def unit_folder(self) -> Iterator[Path]:
        """A folder in which a unit's files are written, the record last: the store itself."""
        (self._path / "units").mkdir(exist_ok=True)
        yield self._path

    @contextmanager
    def local(self, content: dict) -> Iterator[Path]:
        """A folder of this machine with all units of the store."""
        yield self._path


class RemoteStorage:
    """A store behind an address.

    There is no lock: two runs of the same plan write the same bytes, and one of another plan is refused by the plan
    that it finds, before its first unit and again before `store.json`.
    """

    def __init__(self, address: str):
        self.name = address.rstrip("/")
        # What others put must be seen: no listing is ever kept.
        self._fs, inner = filesystem(self.name, use_listings_cache=False)
        self._inner = inner.rstrip("/")

    def _at(self, name: str) -> str:
        return f"{self._inner}/{name}"

    @contextmanager
    def _named(self, name: str, doing: str) -> Iterator[None]:
        """Errors of the storage, of whatever kind (each library has its own), as OSError with the object's address."""
        try:
            yield
        except FileNotFoundError:
            raise
        except Exception as error:
            raise OSError(
                f"{self.name}/{name}: cannot be {doing} ({type(error).__name__}: {error}); "
                "what is finished is kept, go on with --resume"
            ) from None

    def read_json(self, name: str) -> dict | None:
        """What a JSON object of the store holds, or None where there is none."""
        try:
            text = self.read(name)
        except FileNotFoundError:
            return None
        try:
            return json.loads(text)
        except ValueError as error:
            raise ValueError(f"{self.name}/{name}: not readable as JSON ({error}); make the store again") from None

    def read(self, name: str) -> bytes:
        with self._named(name, "read"):
            return self._fs.cat_file(self._at(name))

    @contextmanager
    def writing(self, name: str) -> Iterator:
        """As `FolderStorage.writing`: made here, and put when the block ends."""
        with ScratchFolder() as folder:
            path = Path(folder) / Path(name).name
            with atomic_write(path) as file:
                yield file
            self.put(path, name)

    def write_json(self, name: str, value: object) -> None:
        with self.writing(name) as file:
            file.write(json_bytes(value))

    def put(self, path: Path, name: str) -> None:
        """One file as one object."""
        with self._named(name, "written"):
            self._fs.put_file(str(path), self._at(name))

    def names(self) -> list[str]:
        """All objects, by name within the store."""
        with self._named("", "listed"):
            try:
                found = self._fs.find(self._inner)
            except FileNotFoundError:
                return []
        # An empty object named like a folder is how some tools make one.
        return [name[len(self._inner) + 1 :] for name in found if not name.endswith("/")]

    def is_occupied(self) -> bool:
        return bool(self.names())

    def create(self, plan: dict) -> None:
        self.write_json(PLAN_NAME, plan)

    @contextmanager
    def alone(self, shared: bool) -> Iterator[None]:
        yield

    def remove(self) -> None:
        """Take away the objects below the address, and nothing else."""
        with self._named("", "removed"):
            if found := self._fs.find(self._inner):
                self._fs.rm(found)

    def begun_units(self) -> frozenset[int]:
        stems = (name[len("units/") : -len(".json")] for name in self.names() if name.endswith(".json"))
        return frozenset(int(stem) for stem in stems if stem.isdigit())

    def finished_unit(self, index: int) -> UnitResult | None:
        """As `FolderStorage.finished_unit`; the unit's data is read once, and never held."""
        try:
            record = self.read_json(_unit_name(index, ".json"))
        except ValueError:  # a torn put, on storage that does not put atomically
            return None
        if record is None:
            return None
        result, name = UnitResult(**record), _unit_name(index)
        with self._named(name, "read"):
            try:
                size = self._fs.size(self._at(name))
                return result if result.is_of(size, lambda: self._digest(name)) else None
            except FileNotFoundError:
                return None

    def _digest(self, name: str) -> str:
        digest = xxhash.xxh3_128()
        with self._fs.open(self._at(name), "rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
        return digest.hexdigest()

    @contextmanager
    def syncing(self) -> Iterator[Callable[[int], None]]:
        """Nothing to do: an object that was put is durable."""
        yield lambda index: None

    @contextmanager
    def unit_folder(self) -> Iterator[Path]:
        """A temporary folder; what a unit leaves in it is put, the record last."""
        with ScratchFolder() as folder:
            (Path(folder) / "units").mkdir()
            yield Path(folder)
            for path in sorted((Path(folder) / "units").iterdir(), key=lambda path: (path.suffix == ".json", path)):
                self.put(path, f"units/{path.name}")

    @contextmanager
    def local(self, content: dict) -> Iterator[Path]:
        """A temporary folder with copies of all units."""
        with ScratchFolder() as folder:
            self.fetch_units(content, Path(folder))
            yield Path(folder)

    def fetch_units(self, content: dict, folder: Path) -> None:
        """Copy the units that `content` (store.json) lists into a folder; those that it has already stay."""
        (folder / "units").mkdir(parents=True, exist_ok=True)
        for index, unit in enumerate(content["units"]):
            self._fetch(_unit_name(index), folder, unit["bytes"], unit["xxh3_128"])
        if content.get("selection"):
            chosen = content["selection"]
            self._fetch(chosen["name"], folder, chosen["bytes"], chosen["xxh3_128"])

    def _fetch(self, name: str, folder: Path, size: int, digest: str) -> None:
        path = folder / name
        if path.is_file() and path.stat().st_size == size and file_digest(path) == digest:
            return
        temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
        with self._named(name, "read"):
            self._fs.get_file(self._at(name), str(temporary))
        if temporary.stat().st_size != size or file_digest(temporary) != digest:
            temporary.unlink()
            raise ValueError(f"{self.name}/{name}: is damaged (its checksum differs); remove it and encode again")
        temporary.rename(path)


def _unit_name(index: int, suffix: str = ".arrow") -> str:
    return str(unit_path(Path(), index, suffix))


def read_remote_store(address: str) -> dict | None:
    """store.json of a finished store behind an address, or None."""
    content = RemoteStorage(address).read_json(STORE_NAME)
    return None if content is None else check_version(address, content)


def fetch_store(address: str, folder: Path) -> None:
    """Copy a finished store into a folder; what an interrupted copy left there is used.

    Raises:
        ValueError: no finished store at the address, a damaged unit, or something else in the folder.
    """
    remote = RemoteStorage(address)
    content = read_remote_store(address)
    if content is None:
        raise ValueError(f"{address}: no finished document store; make it with prep encode, or finish it with --resume")
    plan = remote.read_json(PLAN_NAME)
    here = FolderStorage(folder)
    if here.is_occupied() and here.read_json(PLAN_NAME) != plan:
        raise ValueError(f"{folder}: holds something else than {address}; remove it, or give another --out")
    if here.read_json(STORE_NAME) == content:
        return
    here.create(plan)
    remote.fetch_units(content, folder)
    here.write_json(STORE_NAME, content)
