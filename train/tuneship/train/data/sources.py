"""Rows as they lie on disk, one after another: never a whole file in memory.

What cannot be read as a row is a `Raw` with an error, so that all of them can be reported. Lines and rows are counted
from 1.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tuneship.core import data_source
from tuneship.core.data_source import Folder
from tuneship.core.errors import DataError

_BATCH = 256
"""Rows of a Parquet or Arrow file at a time."""
_CHUNK = 1 << 16
"""Characters of a JSON array at a time."""
_BOM = b"\xef\xbb\xbf"
"""What Windows puts before a text."""
_BETWEEN = re.compile(r"[\s,]*")
_SURROGATE = re.compile("[\udc80-\udcff]")


class Raw(NamedTuple):
    """A row, or why there is none. `place` is `file:line`, for what has no lines `name:row`."""

    place: str
    row: Any
    error: str = ""


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
    ending = file.suffix.lower()
    if ending in {".csv", ".tsv"}:
        return _csv(file, "\t" if ending == ".tsv" else ",")
    if ending in {".parquet", ".arrow"}:
        return _columns(file)
    if ending == ".json" and _is_array(file):
        return _array(file)
    return _lines(file)


def _lines(file: Path) -> Iterator[Raw]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if number == 1:
                line = line.removeprefix(_BOM)  # noqa: PLW2901
            if not line.strip():
                continue
            place = f"{file.name}:{number}"
            try:
                yield Raw(place, json.loads(line.decode()))
            except UnicodeDecodeError:
                yield Raw(place, None, "not UTF-8")
            except (json.JSONDecodeError, RecursionError) as error:
                yield Raw(place, None, f"not JSON: {error}")


def _csv(file: Path, delimiter: str) -> Iterator[Raw]:
    csv.field_size_limit(sys.maxsize)  # the library's own, 128 KiB, is less than a conversation may take
    # Bytes that are no UTF-8 come through as surrogates, so that one of them costs its own row and not the file.
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
        rows = csv.reader(text, delimiter=delimiter, strict=True)
        header: list[str] = []
        while True:
            line = rows.line_num + 1
            place = f"{file.name}:{line}"
            try:
                fields = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                yield Raw(place, None, f"not CSV: {error}")
                continue
            if not fields:
                continue
            if not header:
                header = fields
                twice = sorted({name for name in header if header.count(name) > 1})
                if twice:
                    yield Raw(place, None, f"the header has {twice[0]!r} twice")
                    return
                continue
            yield _csv_row(place, header, fields)


def _csv_row(place: str, header: list[str], fields: list[str]) -> Raw:
    if len(fields) != len(header):
        return Raw(place, None, f"{len(fields)} fields, and the header has {len(header)}")
    if any(map(_is_torn, fields)):
        return Raw(place, None, "not UTF-8")
    return Raw(place, dict(zip(header, fields, strict=True)))


def _is_array(file: Path) -> bool:
    with file.open("rb") as content:
        return content.read(_CHUNK).removeprefix(_BOM).lstrip().startswith(b"[")


def _array(file: Path) -> Iterator[Raw]:
    """The elements of one JSON array, each by the line on which it begins; nothing is read after a mistake."""
    decoder = json.JSONDecoder()
    with file.open(encoding="utf-8-sig", errors="surrogateescape") as content:
        buffer = content.read(_CHUNK)
        at = buffer.index("[") + 1
        line = 1 + buffer.count("\n", 0, at)
        while True:
            between = _BETWEEN.match(buffer, at)
            assert between
            line += between[0].count("\n")
            at = between.end()
            if buffer.startswith("]", at):
                return
            place, fault = f"{file.name}:{line}", "the array has no end"
            try:
                element, end = decoder.raw_decode(buffer, at)
            except (json.JSONDecodeError, RecursionError) as error:
                end, fault = len(buffer), str(error)
            if end == len(buffer):  # not all of it was there, or it is wrong
                more = content.read(max(_CHUNK, end - at))
                if not more:
                    yield Raw(place, None, f"not JSON: {fault}")
                    return
                buffer, at = buffer[at:] + more, 0
                continue
            yield Raw(place, None, "not UTF-8") if _is_torn(buffer[at:end]) else Raw(place, element)
            line += buffer.count("\n", at, end)
            at = end


def _is_torn(text: str) -> bool:
    """Whether bytes that are no UTF-8 came through as surrogates."""
    return not text.isascii() and bool(_SURROGATE.search(text))


def _columns(file: Path) -> Iterator[Raw]:
    import pyarrow as pa  # noqa: PLC0415 - only where such files are read
    from pyarrow import ipc, parquet  # noqa: PLC0415

    number = 0
    try:
        if file.suffix.lower() == ".parquet":
            with parquet.ParquetFile(file) as content:
                for batch in content.iter_batches(_BATCH):
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
        yield Raw(f"{name}:{number}", _without_nulls(row))


def _folder(folder: Folder) -> Iterator[Raw]:
    """What `datasets` saved there, or can load from there."""
    import datasets  # noqa: PLC0415 - a second, and only where such a folder is read

    try:
        rows = _saved(folder) if (folder.path / "state.json").is_file() or _is_dict(folder.path) else _loaded(folder)
        for number, row in enumerate(rows, start=1):
            yield Raw(f"{folder.name}:{number}", _without_nulls(row))
    except (datasets.exceptions.DatasetsError, ValueError, OSError) as error:
        raise DataError(f"{folder.path} cannot be read: {error}") from None


def _is_dict(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file()


def _saved(folder: Folder) -> Any:
    import datasets  # noqa: PLC0415

    if not _is_dict(folder.path):
        if folder.split:
            raise DataError(f"{folder.path} is one split: it has no {folder.split!r} in it")
        return datasets.load_from_disk(str(folder.path))
    splits = sorted(path.name for path in folder.path.iterdir() if path.is_dir())
    return datasets.load_from_disk(str(folder.path / _split(folder, splits)))


def _loaded(folder: Folder) -> Any:
    import datasets  # noqa: PLC0415

    configs = datasets.get_dataset_config_names(str(folder.path))
    if (folder.config or len(configs) > 1) and folder.config not in configs:
        raise DataError(f"{folder.name} has the configurations {', '.join(configs)}", hint="hub:owner/name/config")
    config = folder.config or configs[0]
    split = _split(folder, datasets.get_dataset_split_names(str(folder.path), config))
    return datasets.load_dataset(str(folder.path), config, split=split, streaming=True)


def _split(folder: Folder, splits: list[str]) -> str:
    """The one that is wanted; which it is, is not guessed: training on what is held out would go unseen."""
    if folder.split in splits:
        return folder.split
    if not folder.split and len(splits) == 1:
        return splits[0]
    what = f"no split {folder.split!r}, but" if folder.split else "the splits"
    raise DataError(f"{folder.path} has {what} {', '.join(splits)}", hint="say which: path:train, or owner/name:train")


def _without_nulls(value: Any) -> Any:
    """Without the keys that Arrow adds, since every object of a column has the keys of all of them there."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value
