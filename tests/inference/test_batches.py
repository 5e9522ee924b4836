"""Tables in, tables out: typed columns, and what Ray Data makes of the callable."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import scene
from PIL import Image

import lostreg
from lostreg.errors import OptionError
from lostreg.models.backbone import Backbone

pa = pytest.importorskip("pyarrow", reason="needs pyarrow, which comes with lostreg[ray]")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def find(backbone: Backbone) -> lostreg.MapBatches:
    return lostreg.MapBatches(backbone, device="cpu", max_objects=3, min_score=0.05)


@pytest.fixture
def contents(tmp_path: Path) -> list[bytes | None]:
    found: list[bytes | None] = []
    for number in range(3):
        Image.fromarray(scene(number, 98, 70)).save(tmp_path / f"{number}.png")
        found.append((tmp_path / f"{number}.png").read_bytes())
    return [*found, b"no picture", None]


def test_columns_are_typed_and_hold_what_a_discoverer_finds(
    find: lostreg.MapBatches, contents: list[bytes | None]
) -> None:
    table = find(pa.table({"bytes": contents, "name": list("abcde")}))
    kinds = [pa.int32(), pa.int32(), pa.list_(pa.list_(pa.float32(), 4)), pa.list_(pa.float32()), pa.string()]
    assert [table.schema.field(name).type for name in ("width", "height", "boxes", "scores", "error")] == kinds
    rows = table.to_pylist()
    assert [row["name"] for row in rows] == list("abcde")
    for row, found in zip(rows, find.discoverer.discover_many([one for one in contents[:3] if one]), strict=False):
        assert (row["width"], row["height"], row["error"]) == (98, 70, None)
        np.testing.assert_array_equal(np.array(row["boxes"], np.float32), found.xyxy)
        np.testing.assert_array_equal(np.array(row["scores"], np.float32), found.scores)
    assert all(row["width"] is None and row["boxes"] == [] and "image" in row["error"] for row in rows[3:])


def test_structs_and_batches_of_records_are_taken_too(find: lostreg.MapBatches, contents: list[bytes | None]) -> None:
    structs = [{"bytes": one, "path": "a.png"} for one in contents]
    batch = find(pa.RecordBatch.from_pylist([{"bytes": one} for one in structs]))
    assert isinstance(batch, pa.RecordBatch)
    assert batch.column("boxes").to_pylist() == find(pa.table({"bytes": contents}))["boxes"].to_pylist()
    assert find(batch.slice(0, 0).select(["bytes"])).num_rows == 0


@pytest.mark.parametrize("kind", [dict, list, np.array])
def test_tables_of_other_libraries_are_told_the_way(find: lostreg.MapBatches, kind: Any) -> None:
    with pytest.raises(OptionError, match=r"not (dict|list|ndarray): .*batch_format=\"pyarrow\".*from_pandas"):
        find(kind([("bytes", [b""])]) if kind is dict else kind([b""]))


def test_columns_that_lack_or_clash_are_named(find: lostreg.MapBatches, backbone: Backbone) -> None:
    with pytest.raises(OptionError, match="no column 'bytes' of images: expected one of jpg, width"):
        find(pa.table({"jpg": [b""], "width": [3]}))
    with pytest.raises(OptionError, match="the table has width already: choose another prefix"):
        find(pa.table({"bytes": [b""], "width": [3]}))
    for wrong in ("a.jpg", 3, [1, 2]):
        with pytest.raises(OptionError, match="expected column 'bytes' to hold contents of files"):
            find(pa.table({"bytes": [wrong]}))
    other = lostreg.MapBatches(backbone, column="jpg", prefix="lost_", device="cpu")
    table = other(pa.table({"jpg": [b""], "width": [3]}))
    assert table.column_names[2:] == ["lost_width", "lost_height", "lost_boxes", "lost_scores", "lost_error"]
