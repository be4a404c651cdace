"""Image data in files for other libraries: WebDataset's tar shards, and Parquet as Hugging Face datasets reads it."""

from __future__ import annotations

__all__: list[str] = []

import io
import json
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from lightning_locality.datamodules.image_files import new_output

PER_SHARD = 10_000  # images in a file
PER_GROUP = 1_000  # and in memory, of Parquet

Sample = tuple[str, bytes, int]  # name, PNG file and label


def write_shards(
    out: Path,
    kind: Literal["webdataset", "parquet"],
    splits: Mapping[str, Iterable[tuple[Tensor, Tensor]]],
    sizes: Mapping[str, int],
    names: Sequence[str],
    parameters: Mapping[str, Any],
) -> None:
    """Write uint8 images and labels, ``sizes`` of each split in batches, to files SPLIT-NUMBER in the folder ``out``.

    The same images give the same bytes. data/README.md describes the files.
    """
    write = _write_tar if kind == "webdataset" else _parquet_writer(names, parameters)
    with new_output(out) as part:
        part.mkdir()
        for split, batches in splits.items():
            samples, shards = _samples(batches), -(-sizes[split] // PER_SHARD)
            for shard in range(shards):
                name = f"{shard:06}.tar" if kind == "webdataset" else f"{shard:05}-of-{shards:05}.parquet"
                write(part / f"{split}-{name}", islice(samples, PER_SHARD))


def _samples(batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[Sample]:
    samples = (sample for batch in batches for sample in zip(*batch, strict=True))
    for number, (image, label) in enumerate(samples):
        file = io.BytesIO()
        to_pil_image(image).save(file, "PNG")
        yield f"{number:08}", file.getvalue(), int(label)


def _write_tar(path: Path, samples: Iterable[Sample]) -> None:
    # TarInfo has no time and no owner unless given: the same bytes whoever writes them
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, png, label in samples:
            for suffix, content in (("cls", str(label).encode()), ("png", png)):
                member = tarfile.TarInfo(f"{name}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def _parquet_writer(names: Sequence[str], parameters: Mapping[str, Any]) -> Any:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "format 'parquet' needs pyarrow: pip install 'lightning-locality[data]'", name="pyarrow"
        ) from error
    types = {bool: ("bool", pa.bool_()), int: ("int64", pa.int64()), float: ("float64", pa.float64())}
    fields = [("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("label", pa.int64())]
    features: dict[str, Any] = {"image": {"_type": "Image"}, "label": {"names": list(names), "_type": "ClassLabel"}}
    constants = {}
    for name, value in parameters.items():
        if value is not None:
            dtype, column = types.get(type(value), ("string", pa.string()))
            constants[name] = value if type(value) in (*types, str) else json.dumps(value)
            features[name] = {"dtype": dtype, "_type": "Value"}
            fields.append((name, column))
    # where Hugging Face datasets looks for its features: images are decoded, labels have names
    schema = pa.schema(fields, {"huggingface": json.dumps({"info": {"features": features}})})

    def write(path: Path, samples: Iterator[Sample]) -> None:
        with pq.ParquetWriter(path, schema) as file:
            while rows := list(islice(samples, PER_GROUP)):
                columns: dict[str, Any] = {
                    "image": [{"bytes": png, "path": f"{name}.png"} for name, png, _ in rows],
                    "label": [label for *_, label in rows],
                }
                columns |= {name: [value] * len(rows) for name, value in constants.items()}
                file.write_table(pa.table(columns, schema))

    return write
