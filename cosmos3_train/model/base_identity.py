"""Which checkpoint a run or an adapter belongs to: a fingerprint, cheap for 130 GB, the same however it is sharded.

Names, dtypes and shapes of every tensor of the transformer are hashed whole, and of each tensor 64 bytes from its
beginning, middle and end. Two trainings of one architecture differ in nearly every weight, so this tells them apart;
not one of which rows of the token embedding alone were trained since, for which `digest_rows` is there.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from cosmos3_train.config import UserError

PROBE_BYTES = 64
_UNIMPORTANT = ("_diffusers_version", "_name_or_path")


@dataclass(frozen=True)
class BaseIdentity:
    """name: Hub id or folder as the run named it;  config, weights: hexadecimal fingerprints of the transformer."""

    name: str
    config: str
    weights: str

    def plain(self) -> dict[str, str]:
        return asdict(self)


def identify_base(folder: Path, name: str | None = None, only: Callable[[str], bool] | None = None) -> BaseIdentity:
    """The identity of a checkpoint folder in the diffusers layout.

    Args:
        name: how users get it, such as a Hub id; None takes the folder's own name.
        only: which tensors are looked at, by their names; None looks at all of them.

    Raises:
        UserError: no readable transformer in the folder.
    """
    transformer = folder / "transformer"
    try:
        config = json.loads((transformer / "config.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{transformer}/config.json cannot be read ({error}); give a checkpoint folder") from None
    kept = {key: value for key, value in config.items() if key not in _UNIMPORTANT}
    probes: dict[str, tuple[str, list[int], bytes]] = {}
    for shard in shard_files(transformer):
        probes.update(_probe(shard))
    digest = hashlib.blake2b(digest_size=16)
    for tensor in sorted(name for name in probes if only is None or only(name)):
        dtype, shape, content = probes[tensor]
        digest.update(json.dumps([tensor, dtype, shape]).encode())
        digest.update(content)
    return BaseIdentity(
        name=name or folder.resolve().name,
        config=hashlib.blake2b(json.dumps(kept, sort_keys=True).encode(), digest_size=16).hexdigest(),
        weights=digest.hexdigest(),
    )


def digest_rows(folder: Path, tensor: str, rows: Iterable[int]) -> dict[int, str]:
    """Hexadecimal digests of rows of one of the transformer's matrices, of a checkpoint folder.

    Raises:
        UserError: no readable transformer in the folder, or it has no such matrix.
    """
    for shard in shard_files(folder / "transformer"):
        with shard.open("rb") as file:
            length, header = _read_header(file, shard)
            if tensor not in header:
                continue
            begin, end = header[tensor]["data_offsets"]
            width, found = (end - begin) // header[tensor]["shape"][0], {}
            for row in sorted(set(rows)):
                file.seek(8 + length + begin + row * width)
                found[row] = hashlib.blake2b(file.read(width), digest_size=8).hexdigest()
            return found
    raise UserError(f"{folder}/transformer: no {tensor} in it; fetch it again")


def check_shards(part: Path) -> int:
    """Bytes of a part's weights on disk. Reads the files' headers alone, which say how long the files must be.

    Args:
        part: the folder of a checkpoint's transformer or video tokenizer.

    Raises:
        UserError: a file is missing, damaged or cut short; names it.
    """
    for shard in shard_files(part):
        with shard.open("rb") as file:
            _read_header(file, shard)
    return sum(shard.stat().st_size for shard in shard_files(part))


def read_index(folder: Path) -> dict[str, str] | None:
    """Which file of a sharded folder holds each tensor, by its index; None where it has none.

    Raises:
        UserError: the index cannot be read.
    """
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if not indexes:
        return None
    try:
        content = json.loads(indexes[0].read_text(encoding="utf-8"))
        return {name: str(file) for name, file in content["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{indexes[0]}: not a readable index of shards; fetch it again") from None


def shard_files(transformer: Path) -> list[Path]:
    """The safetensors files that hold the transformer: those of its index, or the single one.

    Raises:
        UserError: there is none, the index cannot be read, or it names a file that is missing.
    """
    index = read_index(transformer)
    if index is None:
        files = sorted(transformer.glob("*.safetensors"))
    else:
        files = [transformer / name for name in sorted(set(index.values()))]
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        raise UserError(f"{transformer}: {missing[0] if missing else 'safetensors files'} missing; fetch it again")
    return files


def _probe(shard: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Dtype, shape and a few bytes of every tensor of a file, by name."""
    found: dict[str, tuple[str, list[int], bytes]] = {}
    with shard.open("rb") as file:
        length, header = _read_header(file, shard)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            content = b""
            for place in (begin, (begin + end) // 2, max(begin, end - PROBE_BYTES)):
                file.seek(8 + length + place)
                content += file.read(min(PROBE_BYTES, end - place))
            found[name] = (entry["dtype"], entry["shape"], content)
    return found


def _read_header(file: BinaryIO, shard: Path) -> tuple[int, dict[str, Any]]:
    """Length of a safetensors file's header, and the dtype, shape and place of every tensor by name."""
    try:
        (length,) = struct.unpack("<Q", file.read(8))
        header: dict[str, Any] = json.loads(file.read(length))
        header.pop("__metadata__", None)
        end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (struct.error, ValueError, OverflowError, MemoryError, AttributeError, KeyError, TypeError):
        raise UserError(f"{shard}: damaged (no safetensors header); fetch it again") from None
    size = shard.stat().st_size
    if size != end:
        raise UserError(f"{shard}: damaged ({size:,} bytes, but its header says {end:,}); fetch it again")
    return length, header
