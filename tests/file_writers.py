"""Writers of shards of MDS and of tars of WebDataset, from the descriptions of the formats."""

import io
import itertools
import json
import struct
import tarfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

_ENCODERS: dict[str, Callable[[Any], bytes]] = {
    "str": str.encode,
    "json": lambda value: json.dumps(value).encode(),
    "int": lambda value: struct.pack("<q", value),
    "uint8": lambda value: struct.pack("<B", value),
    "float32": lambda value: struct.pack("<f", value),
}


def write_mds(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str], **form: Any) -> bytes:
    """Return a shard of MDS, whose columns have these encodings. A cell that is bytes is written as it is.

    form: values to change in the description of the shard.
    """
    names = sorted(columns)
    sizes = [{"int": 8, "uint8": 1, "float32": 4}.get(columns[name]) for name in names]
    description = {
        "column_encodings": [columns[name] for name in names],
        "column_names": names,
        "column_sizes": sizes,
        "compression": None,
        "format": "mds",
        "hashes": [],
        "size_limit": 67108864,
        "version": 2,
    }
    text = json.dumps(description | form, sort_keys=True).encode()
    contents = [_encode_row(row, columns, names, sizes) for row in rows]
    head = 4 + 4 * (len(rows) + 1) + len(text)
    places = itertools.accumulate(map(len, contents), initial=head)
    return struct.pack(f"<{len(rows) + 2}I", len(rows), *places) + text + b"".join(contents)


def _encode_row(
    row: Mapping[str, Any], columns: Mapping[str, str], names: Sequence[str], sizes: Sequence[int | None]
) -> bytes:
    cells = [row[name] if isinstance(row[name], bytes) else _ENCODERS[columns[name]](row[name]) for name in names]
    stated = [len(cell) for cell, size in zip(cells, sizes, strict=True) if size is None]
    return struct.pack(f"<{len(stated)}I", *stated) + b"".join(cells)


def write_index(shards: Mapping[str, bytes], **compressed: bytes) -> str:
    """Return the index of a folder of MDS shards. compressed: the form of each of them that is compressed, by name."""
    entries = []
    for name, content in shards.items():
        entry: dict[str, Any] = {"format": "mds", "raw_data": {"basename": name, "bytes": len(content), "hashes": {}}}
        packed = next((name_ for name_ in compressed if name_.startswith(f"{name}.")), None)
        entry["zip_data"] = packed and {"basename": packed, "bytes": len(compressed[packed]), "hashes": {}}
        entries.append(entry)
    return json.dumps({"shards": entries, "version": 2})


def write_tar(files: Iterable[tuple[str, bytes | str]], kind: int = tarfile.PAX_FORMAT) -> bytes:
    """Return a tar with these files, in this order."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as tar:
        for name, content in files:
            data = content.encode() if isinstance(content, str) else content
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return buffer.getvalue()


def write_tar_of_texts(texts: Sequence[str]) -> bytes:
    """Return a tar whose rows have the column `text`."""
    return write_tar((f"{number:05}.text", text) for number, text in enumerate(texts))
