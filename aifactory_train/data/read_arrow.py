"""Parquet, Arrow and the data set folders of ``datasets``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aifactory_train.core.errors import UserError
from aifactory_train.data.blocks import BLOCK_ROWS, Block, in_blocks
from aifactory_train.private import vault


def parquet_rows(path: Path) -> Iterator[Block]:
    import pyarrow
    import pyarrow.parquet

    first = 1
    try:
        file = pyarrow.parquet.ParquetFile(vault.open_source(path))
        _check_names(file.schema_arrow, path)
        for batch in file.iter_batches(batch_size=BLOCK_ROWS):
            rows = [_without_nulls(row) for row in batch.to_pylist()]
            yield Block(f"{path}:row", first, rows=rows)
            first += len(rows)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"not a readable Parquet file: {str(error).splitlines()[0][:200]}",
            where=str(path),
            fix="write or copy it again",
        ) from None
    except (ValueError, OverflowError) as error:  # text that is not UTF-8, moments that Python has no date for
        raise UserError(
            f"a value of rows {first} to {first + BLOCK_ROWS - 1} cannot be read ({type(error).__name__})",
            where=str(path),
            fix="write text as UTF-8, and moments in microseconds",
        ) from None


def _check_names(schema: Any, path: Path) -> None:
    """Refuse a table two of whose columns bear one name: a row would hold the last of them in silence."""
    twice = next((name for name in schema.names if schema.names.count(name) > 1), None)
    if twice is not None:
        raise UserError(
            f"two columns bear the name '{twice}'", where=str(path), fix="give each column a name of its own"
        )


def _without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """The row without the nulls that Arrow writes where an object inside a column lacks a key that another row has: it
    knows no other way to leave a key out. Columns that are null stay."""
    return {name: _pruned(value) if isinstance(value, (dict, list)) else value for name, value in row.items()}


def _pruned(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _pruned(v) if isinstance(v, (dict, list)) else v for k, v in value.items() if v is not None}
    return [_pruned(v) if isinstance(v, (dict, list)) else v for v in value]


def arrow_rows(path: Path) -> Iterator[Block]:
    import pyarrow

    try:
        encrypted = vault.is_encrypted(path)
        with pyarrow.BufferReader(vault.active().read(path)) if encrypted else pyarrow.memory_map(str(path)) as source:
            try:
                reader: Any = pyarrow.ipc.open_stream(source)
            except pyarrow.ArrowInvalid:
                opened = pyarrow.ipc.open_file(source)
                _check_names(opened.schema, path)
                reader = (opened.get_batch(i) for i in range(opened.num_record_batches))
            else:
                _check_names(reader.schema, path)
            first = 1
            for batch in reader:
                for at in range(0, batch.num_rows, BLOCK_ROWS):
                    rows = [_without_nulls(row) for row in batch.slice(at, BLOCK_ROWS).to_pylist()]
                    yield Block(f"{path}:row", first, rows=rows)
                    first += len(rows)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"not a readable Arrow file: {str(error).splitlines()[0][:200]}", where=str(path)) from None


def hugging_face_rows(path: Path, split: str | None) -> Iterator[Block]:
    """A data set folder of ``datasets`` (saved to disk, or a snapshot of the hub), read without the network."""
    import datasets

    subset, _, name = (split or "").rpartition("/")
    try:
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            loaded: Any = datasets.load_from_disk(str(path))
        else:
            loaded = datasets.load_dataset(str(path), name=subset or None, streaming=True)
    except Exception as error:  # datasets raises many kinds; all mean that this folder cannot be read as asked
        raise UserError(
            f"cannot be read as a data set: {str(error).splitlines()[0][:300]}",
            where=str(path),
            fix="name subset and split as data.train.0.split=SUBSET/SPLIT",
        ) from None
    if isinstance(loaded, dict):
        wanted = name or ("train" if "train" in loaded else "")
        if wanted not in loaded:
            raise UserError(
                f"the data set has no split '{wanted or name}'",
                where=str(path),
                fix=f"splits are: {', '.join(map(str, loaded))}; choose one with data.train.0.split=...",
            )
        loaded = loaded[wanted]
        label = f"{path.name}[{wanted}]:row"
    else:
        label = f"{path.name}:row"
    yield from in_blocks((_without_nulls(dict(row)) for row in loaded), label)
