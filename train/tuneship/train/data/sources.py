"""Rows as they lie on disk, one after another: never a whole file in memory.

What cannot be read as a row is a `Raw` with an error, so that all of them can be reported. Lines and rows are counted
from 1.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tuneship.core import data_source
from tuneship.core.data_source import ENDINGS, Folder
from tuneship.core.errors import DataError
from tuneship.train.data import text_files
from tuneship.train.data.raw import Raw

__all__ = ["Raw", "read"]

_BATCH = 256
"""Rows of a Parquet or Arrow file at a time."""
_BUFFER = 1 << 16
"""Bytes of a Parquet column at a time."""


def read(pattern: str) -> Iterator[Raw]:
    """The rows that `data.train` or `data.heldout` stands for, in order.

    Raises:
        DataError: nothing is there, or a file of a binary format cannot be read at all.

    """
    found = data_source.locate(pattern)
    if isinstance(found, Folder):
        yield from _folder(found)
        return
    for file in found:
        yield from _file(file)


def _file(file: Path) -> Iterator[Raw]:
    ending = _ending(file)
    try:
        if ending in {".csv", ".tsv"}:
            yield from text_files.table(file, "\t" if ending == ".tsv" else ",")
        elif ending in {".parquet", ".arrow"}:
            yield from _columns(file)
        elif ending == ".json" and text_files.is_array(file):
            yield from text_files.array(file)
        else:
            yield from text_files.lines(file)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file} cannot be read: {error}") from None


def _ending(file: Path) -> str:
    return Path(file.name.lower().removesuffix(text_files.PACKED)).suffix


def _columns(file: Path) -> Iterator[Raw]:
    import pyarrow as pa  # noqa: PLC0415 - only where such files are read
    from pyarrow import ipc, parquet  # noqa: PLC0415

    number = 0
    try:
        if file.suffix.lower() == ".parquet":
            # Without a buffer a whole column of it is read at once; threads read ahead.
            with parquet.ParquetFile(file, buffer_size=_BUFFER, pre_buffer=False) as content:
                for batch in content.iter_batches(_BATCH, use_threads=False):
                    yield from _batch(file.name, number, batch)
                    number += len(batch)
            return
        with pa.memory_map(str(file)) as mapped, ipc.open_stream(mapped) as batches:
            for whole in batches:
                for begin in range(0, len(whole), _BATCH):
                    yield from _batch(file.name, number, whole.slice(begin, _BATCH))
                    number += len(whole.slice(begin, _BATCH))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file} cannot be read: {error}") from None


def _batch(name: str, before: int, batch: Any) -> Iterator[Raw]:
    for number, row in enumerate(batch.to_pylist(), start=before + 1):
        yield Raw(f"{name}:{number}", _row(row))


def _folder(folder: Folder) -> Iterator[Raw]:
    """What `datasets` saved there, or would load from there."""
    import datasets  # noqa: PLC0415 - a second, and only where such a folder is read

    try:
        if _is_dict(folder.path) or (folder.path / "state.json").is_file():
            split = f":{folder.split}" if folder.split else ""
            for number, row in enumerate(_saved(folder), start=1):
                yield Raw(f"{folder.name}{split}:{number}", _row(row))
            return
        files = _files(folder)
    except (datasets.exceptions.DatasetsError, ValueError, OSError) as error:
        raise DataError(f"{folder.name} cannot be read: {error}") from None
    for file in files:
        if _ending(file) not in ENDINGS:
            raise DataError(f"{folder.name} has its rows in {file.name}, which is none of {', '.join(ENDINGS)}")
        yield from _file(file)


def _is_dict(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file()


def _saved(folder: Folder) -> Any:
    import datasets  # noqa: PLC0415

    if not _is_dict(folder.path):
        if folder.split:
            raise DataError(f"{folder.name} is one split: it has no {folder.split!r} in it")
        return datasets.load_from_disk(str(folder.path))
    splits = sorted(path.name for path in folder.path.iterdir() if path.is_dir())
    return datasets.load_from_disk(str(folder.path / _split(folder, splits)))


def _files(folder: Folder) -> list[Path]:
    """Those that `datasets` takes for the split, by their names or by the folder's card.

    It is not asked for the rows: it reads ahead, whole files of them.
    """
    import datasets  # noqa: PLC0415

    configs = datasets.get_dataset_config_names(str(folder.path))
    if (folder.config or len(configs) > 1) and folder.config not in configs:
        raise DataError(f"{folder.name} has the configurations {', '.join(configs)}", hint="hub:owner/name/config")
    with TemporaryDirectory() as cache:
        builder = datasets.load_dataset_builder(str(folder.path), folder.config or configs[0], cache_dir=cache)
    files = {str(split): paths for split, paths in builder.config.data_files.items()}
    return [Path(path) for path in files[_split(folder, sorted(files))]]


def _split(folder: Folder, splits: list[str]) -> str:
    """The one that is wanted; which it is, is not guessed: training on what is held out would go unseen."""
    if folder.split in splits:
        return folder.split
    if not folder.split and len(splits) == 1:
        return splits[0]
    what = f"no split {folder.split!r}, but" if folder.split else "the splits"
    raise DataError(f"{folder.name} has {what} {', '.join(splits)}", hint="say which: path:train, or owner/name:train")


def _row(row: dict[str, Any]) -> dict[str, Any]:
    """A row of columns; one without a value is still there."""
    return {key: _without_nulls(value) for key, value in row.items()}


def _without_nulls(value: Any) -> Any:
    """Without the keys that Arrow adds, since every object of a column has the keys of all of them there."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value
