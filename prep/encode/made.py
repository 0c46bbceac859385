"""Folders that prep or `datasets` wrote are no raw input: read file by file, their descriptions would be records."""

from prep.encode import files


def raw_files(path: str) -> files.Found:
    """The files of a path. ValueError where a document store, packed shards or a saved dataset lies there; the message
    names each folder and what to do."""
    found = files.expand(path)
    there = {place for place, _ in found.files}
    if stores := _folders_of(there, "store.json", "plan.json"):
        named = f" and no raw input; pack it: prep pack {stores[0]}"
        if stores != [path.rstrip("/")]:
            named = f" in {' and '.join(stores)}; name the raw files, or pack one store alone: prep pack {stores[0]}"
        raise ValueError(f"{path}: holds a document store{named}")
    if begun := [
        folder
        for folder in sorted({place.removesuffix("/plan.json") for place in there if place.endswith("/plan.json")})
        if any(place.startswith(f"{folder}/units/") for place in there)
    ]:
        raise ValueError(
            f"{path}: holds an unfinished document store in {' and '.join(begun)}; finish it with prep encode --resume"
        )
    if packed := _folders_of(there, "manifest.json", "packs.arrow"):
        raise ValueError(
            f"{path}: holds packed shards in {' and '.join(packed)}; name the raw files, or pack the document store "
            "that they were made of"
        )
    if saved := _folders_of(there, "state.json", "dataset_info.json"):
        raise ValueError(f"{path}: holds saved datasets in {' and '.join(saved)}; name one of them")
    return found


def _folders_of(there: set[str], first: str, second: str) -> list[str]:
    """Folders that hold files of both names."""
    folders = {place.removesuffix(f"/{first}") for place in there if place.endswith(f"/{first}")}
    return sorted(folder for folder in folders if f"{folder}/{second}" in there)
