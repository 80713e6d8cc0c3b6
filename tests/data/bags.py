"""MCAP bags for the tests, written with the real libraries; pictures carry their number (`logs.numbered_frame`)."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from mcap_ros2.writer import Writer
from PIL import Image

SECOND = 1_000_000_000
START = 1_700_000_000 * SECOND

_HEADER = """
================================================================================
MSG: std_msgs/Header
builtin_interfaces/Time stamp
string frame_id
================================================================================
MSG: builtin_interfaces/Time
int32 sec
uint32 nanosec
"""
TYPES = {
    "sensor_msgs/msg/Image": "std_msgs/Header header\nuint32 height\nuint32 width\nstring encoding\n"
    "uint8 is_bigendian\nuint32 step\nuint8[] data" + _HEADER,
    "sensor_msgs/msg/CompressedImage": "std_msgs/Header header\nstring format\nuint8[] data" + _HEADER,
    "sensor_msgs/msg/JointState": "std_msgs/Header header\nstring[] name\nfloat64[] position\nfloat64[] velocity\n"
    "float64[] effort" + _HEADER,
    "geometry_msgs/msg/PoseStamped": "std_msgs/Header header\ngeometry_msgs/Pose pose"
    + _HEADER
    + """================================================================================
MSG: geometry_msgs/Pose
geometry_msgs/Point position
geometry_msgs/Quaternion orientation
================================================================================
MSG: geometry_msgs/Point
float64 x
float64 y
float64 z
================================================================================
MSG: geometry_msgs/Quaternion
float64 x
float64 y
float64 z
float64 w
""",
    "std_msgs/msg/Float64MultiArray": "std_msgs/MultiArrayLayout layout\nfloat64[] data\n"
    + "=" * 80
    + "\nMSG: std_msgs/MultiArrayLayout\nstd_msgs/MultiArrayDimension[] dim\nuint32 data_offset\n"
    + "=" * 80
    + "\nMSG: std_msgs/MultiArrayDimension\nstring label\nuint32 size\nuint32 stride\n",
    "std_msgs/msg/String": "string data",
    "std_msgs/msg/Int32": "int32 data",
}


class Sent(NamedTuple):
    """One message: its topic and type, its stamp and its reception in seconds from START, and its fields."""

    topic: str
    kind: str
    stamp: float
    received: float
    fields: dict[str, Any]


def write_bag(path: Path, messages: Sequence[Sent], chunk_size: int = 20_000) -> Path:
    """Write messages in the order in which they were received."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        writer = Writer(file, chunk_size=chunk_size)
        schemas = {kind: writer.register_msgdef(kind, TYPES[kind]) for kind in dict.fromkeys(m.kind for m in messages)}
        for sent in sorted(messages, key=lambda message: message.received):
            fields = dict(sent.fields)
            if "std_msgs/Header header" in TYPES[sent.kind]:
                whole = START + round(sent.stamp * SECOND)
                stamp = {"sec": whole // SECOND, "nanosec": whole % SECOND}
                fields["header"] = {"stamp": stamp, "frame_id": ""}
            writer.write_message(sent.topic, schemas[sent.kind], fields, START + round(sent.received * SECOND))
        writer.finish()
    return path


def raw(picture: np.ndarray, encoding: str = "rgb8", padding: int = 0) -> dict[str, Any]:
    """Fields of a raw Image of uint8 [H, W, 3]."""
    height, width = picture.shape[:2]
    pixels = picture if encoding == "rgb8" else picture[:, :, ::-1]
    rows = np.pad(pixels.reshape(height, -1), ((0, 0), (0, padding)))
    content = {"height": height, "width": width, "encoding": encoding, "is_bigendian": 0, "step": rows.shape[1]}
    return content | {"data": rows.tobytes()}


def compressed(picture: np.ndarray, kind: str = "jpeg") -> dict[str, Any]:
    """Fields of a CompressedImage of uint8 [H, W, 3]."""
    content = io.BytesIO()
    Image.fromarray(picture).save(content, kind)
    return {"format": kind, "data": content.getvalue()}


def joints(names: Sequence[str], values: Sequence[float]) -> dict[str, Any]:
    """Fields of a JointState."""
    return {"name": list(names), "position": list(values), "velocity": [], "effort": []}


def pose(position: Sequence[float], quaternion: Sequence[float]) -> dict[str, Any]:
    """Fields of a PoseStamped."""
    place = dict(zip("xyz", map(float, position), strict=True))
    return {"pose": {"position": place, "orientation": dict(zip("xyzw", map(float, quaternion), strict=True))}}


def numbers(values: Sequence[float]) -> dict[str, Any]:
    """Fields of a Float64MultiArray."""
    return {"layout": {"dim": [], "data_offset": 0}, "data": list(map(float, values))}
