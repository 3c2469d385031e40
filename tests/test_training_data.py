"""Tests of data sets in every format, and of batches of their images."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import run_python
from torch.utils.data import DataLoader

from relops.models.inference import MEAN, STD
from relops.training.data import (
    DetectionData,
    EpochSampler,
    Sample,
    Transformed,
    collate,
    open_data,
    prepare,
    save_proposals,
    warn_of_common_images,
    with_proposals,
)
from relops.training.data.images import read_image
from relops.training.data.masks import mask_area, run_lengths

Image = pytest.importorskip("PIL.Image")

VOC_BOX = (11, 6, 30, 25)  # in VOC's convention; counted from 0: columns 10 to 29, rows 5 to 24
READ_BOX = [10, 5, 30, 25]  # VOC_BOX after reading


def write_image(file: Path, width: int = 60, height: int = 40) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    # Noise cannot be compressed, so a file that is cut in half lacks a large part of the image.
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(noise).save(file)


def xml(*objects: tuple, size: tuple[int, int] | None = (60, 40)) -> str:
    """Return a VOC annotation with objects (name, xmin, ymin, xmax, ymax[, difficult])."""
    text = f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>" if size else ""
    for name, x1, y1, x2, y2, *difficult in objects:
        text += (
            f"<object><name>{name}</name><difficult>{int(bool(difficult))}</difficult><bndbox><xmin>{x1}</xmin>"
            f"<ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
        )
    return f"<annotation>{text}</annotation>"


def write_voc(root: Path, split: str, files: dict[str, str], images: str = "Images", ending: str = "png") -> str:
    """Write the folder of a split. Each name gets an annotation file and an image of 60 x 40 pixels."""
    for name, text in files.items():
        write_image(root / split / images / f"{name}.{ending}")
        (root / split / "Annotations").mkdir(exist_ok=True)
        (root / split / "Annotations" / f"{name}.xml").write_text(text)
    return f"voc:{root}"


def write_voc_lists(root: Path, lists: dict[str, list[str]]) -> str:
    """Write a data set in the original layout of VOC. Image n has one object, of the class "class n"."""
    for name in {name for names in lists.values() for name in names}:
        write_image(root / "JPEGImages" / f"{name}.jpg")
        (root / "Annotations").mkdir(exist_ok=True)
        (root / "Annotations" / f"{name}.xml").write_text(xml((f"class {name}", *VOC_BOX)))
    (root / "ImageSets" / "Main").mkdir(parents=True)
    for split, names in lists.items():
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
    return f"voc:{root}"


def stems(data: DetectionData) -> list[str]:
    return [Path(annotation.file).stem for annotation in data.annotations()]


class TestSpecification:
    @pytest.mark.parametrize(
        "spec",
        [
            "",
            "voc",
            "coco:",
            "imagenet:x",
            "shapes:",
            "shapes:four",
            "shapes:4",
            "shapes:-9",
            "shapes:" + "9" * 10,
            "shapes:" + "9" * 5000,
            "rotated-shapes:",
            "rotated-shapes:4",
            "rotated",
        ],
    )
    def test_error_names_the_allowed_formats(self, spec: str) -> None:
        with pytest.raises(ValueError, match="coco:DIR, voc:DIR, shapes, shapes:N, rotated-shapes or rotated-shapes:N"):
            open_data(spec, "train")

    @pytest.mark.parametrize("kind", ["voc", "coco"])
    def test_folder_must_exist(self, kind: str, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="nowhere must be a folder"):
            open_data(f"{kind}:{tmp_path / 'nowhere'}", "train")

    def test_split_must_be_train_or_test(self) -> None:
        with pytest.raises(ValueError, match="split must be 'train' or 'test', got 'val'"):
            open_data("shapes", "val")


class TestVOC:
    @pytest.mark.parametrize("images", ["Images", "JPEGImages"])
    @pytest.mark.parametrize("test", ["test", "val"])
    def test_layout_of_folders(self, tmp_path: Path, images: str, test: str) -> None:
        write_voc(
            tmp_path, "train", {"b": xml(("dog", *VOC_BOX), ("cat", 1, 1, 60, 40, "difficult")), "a": xml()}, images
        )
        spec = write_voc(tmp_path, test, {"c": xml(("dog", *VOC_BOX))}, images)
        (tmp_path / "train" / images / "b.txt").write_text("not an image")
        (tmp_path / "train" / "Annotations" / "b.xml").rename(tmp_path / "train" / "Annotations" / "b.XML")
        data = open_data(spec, "train")
        assert data.classes == ["cat", "dog"] and not data.has_masks and len(data) == 2 and stems(data) == ["a", "b"]

        sample = data[1]
        assert sample.image.shape == (40, 60, 3) and sample.image.dtype == np.uint8
        assert np.array_equal(sample.image, np.array(Image.open(sample.file)))
        assert sample.boxes.dtype == np.float32 and sample.boxes.tolist() == [READ_BOX, [0, 0, 60, 40]]
        assert sample.labels.dtype == np.int64 and sample.labels.tolist() == [1, 0]
        assert sample.ignore.tolist() == [False, True]
        assert sample.masks is None and sample.proposals is None
        assert sample.image_id == 1 and sample.original_size == (40, 60)

        assert data[0].boxes.shape == (0, 4) and data[0].labels.shape == (0,)
        assert open_data(spec, "test", data.classes)[0].labels.tolist() == [1]
        assert open_data(spec, "test").classes == data.classes  # classes of train; test has only dogs

    def test_layout_of_voc(self, tmp_path: Path) -> None:
        lists = {"train": ["1"], "val": ["2"], "trainval": ["1", "2"], "test": ["1", "3"]}
        spec = write_voc_lists(tmp_path, lists)
        data = open_data(spec, "train")
        assert stems(data) == ["1", "2"] and data.classes == ["class 1", "class 2"]
        assert data[1].boxes.tolist() == [READ_BOX]
        assert stems(open_data(spec, "test", ["class 1", "class 2", "class 3"])) == ["1", "3"]

    def test_training_excludes_val_without_a_test_list(self, tmp_path: Path) -> None:
        spec = write_voc_lists(tmp_path, {"train": ["1"], "val": ["2"], "trainval": ["1", "2"]})
        assert stems(open_data(spec, "train")) == ["1"]
        assert stems(open_data(spec, "test", ["class 2"])) == ["2"]

    def test_unknown_class_is_an_error(self, tmp_path: Path) -> None:
        write_voc(tmp_path, "train", {"a": xml(("cat", *VOC_BOX))})
        spec = write_voc(tmp_path, "test", {"strange": xml(("emu", *VOC_BOX))})
        with pytest.raises(
            ValueError, match=r"strange\.xml: the class of an object must be one of \['cat'\], got 'emu'"
        ):
            open_data(spec, "test")

    def test_invalid_boxes_are_left_out(self, tmp_path: Path) -> None:
        objects = [("cat", 50, 30, 70, 45), ("cat", 20, 20, 20, 20), ("dog", -5, 0, 10, 10), ("dog", 61, 1, 70, 20)]
        files = {
            "a": xml(("cat", *VOC_BOX)),
            "b": xml(*objects),
            "c": xml(("dog", "nan", 1, 5, 5), ("dog", 1, 1, "inf", 5), ("dog", 9, 9, 4, 12)),
        }
        spec = write_voc(tmp_path, "train", files)
        with pytest.warns(UserWarning, match=r"b\.xml: a box must be finite .* \(5 in this data set") as record:
            data = open_data(spec, "train")
        assert len(record) == 1
        assert data[1].boxes.tolist() == [[49, 29, 60, 40], [0, 0, 10, 10]] and data[1].labels.tolist() == [0, 1]
        assert len(data[2].boxes) == 0

    def test_size_may_be_missing(self, tmp_path: Path) -> None:
        spec = write_voc(
            tmp_path, "train", {"a": xml(("cat", *VOC_BOX), size=None), "b": xml(("cat", *VOC_BOX), size=(0, 0))}
        )
        data = open_data(spec, "train")
        assert [(a.height, a.width) for a in data.annotations()] == [(40, 60)] * 2 and data[0].boxes.tolist() == [
            READ_BOX
        ]

    @pytest.mark.parametrize(
        "text", ["<annotation><object>", "", xml(("cat", 1, "two", 3, 4)), xml().replace("60", "x")]
    )
    def test_broken_annotation_is_an_error(self, tmp_path: Path, text: str) -> None:
        spec = write_voc(tmp_path, "train", {"fine": xml(), "broken": text})
        with pytest.raises(ValueError, match=r"broken\.xml: the file must be a Pascal VOC annotation"):
            open_data(spec, "train")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("<annotation><object><bndbox/></object></annotation>", "an object must have an element bndbox/xmin"),
            (
                xml(("cat", *VOC_BOX)).replace("object>", "Object>"),
                "the name of an element must be <object>, got <Object>",
            ),
            (
                xml(("cat", *VOC_BOX)).replace("object>", "item>"),
                "<bndbox> must be inside <object>, got <item>",
            ),
            (xml(("cat", *VOC_BOX)).replace("xmin>", "XMIN>"), "an object must have an element bndbox/xmin"),
            (xml().replace("60", "60.5"), "width must be a whole number of pixels, got '60.5'"),
            ('<?xml version="1.0" encoding="foo"?>' + xml(), "unknown encoding"),
            (xml(("", *VOC_BOX)), "an object must have a name"),
            (xml((" ", *VOC_BOX)), "an object must have a name"),
            ("<annotations/>", "the root must be <annotation>, got <annotations>"),
            ("<html><object/></html>", "the root must be <annotation>, got <html>"),
            (xml(("cat", *VOC_BOX)).replace("<annotation>", '<annotation xmlns="x">'), "got <{x}annotation>"),
            (xml(("cat", *VOC_BOX)).replace("<object>", '<object xmlns="x">'), "got <{x}object>"),
            (xml(("cat", *VOC_BOX)).replace("difficult>", "Difficult>"), "must be <difficult>, got <Difficult>"),
            (xml(("cat", *VOC_BOX)).replace("t>0<", "t>perhaps<"), "difficult must be 0 or 1, got 'perhaps'"),
            (xml(("cat", *VOC_BOX)).replace("t>0<", "t>2<"), "difficult must be 0 or 1, got '2'"),
        ],
    )
    def test_annotation_whose_objects_would_be_missed_is_an_error(
        self, tmp_path: Path, text: str, message: str
    ) -> None:
        spec = write_voc(tmp_path, "train", {"fine": xml(), "broken": text})
        with pytest.raises(ValueError, match=rf"broken\.xml: the file must be a Pascal VOC annotation: .*({message})"):
            open_data(spec, "train")

    @pytest.mark.parametrize(
        ("text", "difficult"),
        [("True", True), ("yes", True), ("1.0", True), (" 0 ", False), ("No", False), ("", False)],
    )
    def test_difficult_objects_are_ignored(self, tmp_path: Path, text: str, difficult: bool) -> None:
        spec = write_voc(tmp_path, "train", {"a": xml(("cat", *VOC_BOX)).replace("t>0<", f"t>{text}<")})
        assert open_data(spec, "train")[0].ignore.tolist() == [difficult]

    def test_metadata_files_of_macos_are_skipped(self, tmp_path: Path) -> None:
        spec = write_voc(tmp_path, "train", {"a": xml(("cat", *VOC_BOX))})
        (tmp_path / "train" / "Annotations" / "._a.xml").write_bytes(b"\0\5\x16\7")
        (tmp_path / "train" / "Images" / "._a.png").write_bytes(b"\0\5\x16\7")
        assert len(open_data(spec, "train")[0].boxes) == 1

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("1.jpg\n2.JPG\n", ["1", "2"]),
            ("1.xml\n", ["1"]),
            ("\ufeff1\r\n2\r\n", ["1", "2"]),
            ("2\n1\n2\n2.jpg\n", ["2", "1"]),
            ("1  1\n2 -1\n3  0\n", ["1", "3"]),
            ("1.jpg -1\n2.jpg +1\n", ["2"]),
            ("\n  \n1\t1\n", ["1"]),
            ("a b 1\na b\n", ["a b 1", "a b"]),
        ],
    )
    def test_names_in_lists_may_have_extensions_and_flags(self, tmp_path: Path, text: str, expected: list[str]) -> None:
        spec = write_voc_lists(tmp_path, {"train": ["1", "2", "3", "a b 1", "a b"]})
        (tmp_path / "ImageSets" / "Main" / "train.txt").write_text(text, "utf-8")
        assert stems(open_data(spec, "train")) == expected

    def test_name_without_an_annotation_file_is_an_error(self, tmp_path: Path) -> None:
        spec = write_voc_lists(tmp_path, {"train": ["1"]})
        listing = tmp_path / "ImageSets" / "Main" / "train.txt"
        for name in ("4", "4.jpg 1", "x" * 300):
            listing.write_text(f"1\n{name}\n")
            with pytest.raises(
                ValueError, match=rf"{listing}: each name must have an annotation file in .*Annotations, got '{name}'"
            ):
                open_data(spec, "train")

    def test_two_images_with_the_same_name_are_an_error(self, tmp_path: Path) -> None:
        spec = write_voc(tmp_path, "train", {"a": xml(), "b": xml()})
        write_image(tmp_path / "train" / "Images" / "b.jpg")
        with pytest.raises(
            ValueError, match=r"Images/b\.\*: the image of .*b\.xml must be exactly one file, got .*b\.jpg.*b\.png"
        ):
            open_data(spec, "train")
        write_voc(tmp_path, "train", {"b": xml().replace("<size>", "<filename>b.jpg</filename><size>")})
        assert [Path(a.file).name for a in open_data(spec, "train").annotations()] == ["a.png", "b.jpg"]

    def test_relative_coordinates_cause_a_warning(self, tmp_path: Path) -> None:
        spec = write_voc(tmp_path, "train", {"a": xml(), "b": xml(("cat", 0.1, 0.2, 0.7, 0.8))})
        with pytest.warns(UserWarning, match=r"b\.xml: .* must be pixels"):
            open_data(spec, "train")

    def test_evaluation_uses_the_boxes_of_the_file(self, tmp_path: Path) -> None:
        spec = write_voc(tmp_path, "train", {"a": xml(("cat", -3, 1, 10, 10), ("cat", 5, 5, 5, 9), ("cat", *VOC_BOX))})
        with pytest.warns(UserWarning, match=r"a\.xml: .* \(1 in this data set"):
            data = open_data(spec, "train")
        assert data[0].boxes.tolist() == [[0, 0, 10, 10], READ_BOX]
        assert data.annotations()[0].boxes.tolist() == [[-4, 0, 10, 10], [4, 4, 5, 9], READ_BOX]

    def test_object_without_a_box_is_an_error(self, tmp_path: Path) -> None:
        spec = write_voc(tmp_path, "train", {"a": "<annotation><object><name>cat</name></object></annotation>"})
        with pytest.raises(ValueError, match=r"a\.xml"):
            open_data(spec, "train")

    def test_missing_files_are_errors(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="the folder must contain train"):
            open_data(f"voc:{tmp_path}", "train")
        spec = write_voc(tmp_path, "train", {"a": xml(("cat", *VOC_BOX))})
        with pytest.raises(ValueError, match="the folder must contain test or val"):
            open_data(spec, "test")
        (tmp_path / "train" / "Images" / "a.png").unlink()
        with pytest.raises(ValueError, match=r"Images/a\.\*: the image of .*a\.xml is missing"):
            open_data(spec, "train")
        (tmp_path / "train" / "Annotations" / "a.xml").unlink()
        with pytest.raises(ValueError, match="at least one image"):
            open_data(spec, "train")


class TestImages:
    @pytest.mark.parametrize("damage", ["truncate", "text", "empty", "remove"])
    @pytest.mark.parametrize("ending", ["png", "jpg"])
    def test_broken_image_is_an_error(self, tmp_path: Path, damage: str, ending: str) -> None:
        data = open_data(write_voc(tmp_path, "train", {"a": xml(("cat", *VOC_BOX))}, ending=ending), "train")
        file = tmp_path / "train" / "Images" / f"a.{ending}"
        content = {"truncate": file.read_bytes()[: file.stat().st_size // 2], "text": b"not an image", "empty": b""}
        file.unlink() if damage == "remove" else file.write_bytes(content[damage])
        with pytest.raises(ValueError, match=rf"{file}: the file must be an image"):
            data[0]

    def test_size_that_differs_from_the_annotation_is_an_error(self, tmp_path: Path) -> None:
        data = open_data(write_voc(tmp_path, "train", {"a": xml(("cat", *VOC_BOX), size=(40, 60))}), "train")
        with pytest.raises(ValueError, match=r"a\.png: .* 40 x 60 \(width x height\), got 60 x 40"):
            data[0]

    @pytest.mark.parametrize(
        ("mode", "color", "expected"),
        [
            ("L", 100, [100, 100, 100]),
            ("1", 1, [255, 255, 255]),
            ("LA", (100, 0), [100, 100, 100]),
            ("RGBA", (10, 20, 30, 0), [10, 20, 30]),
            ("P", 0, [0, 0, 0]),
            ("I;16", 100 << 8, [100, 100, 100]),
            ("CMYK", (255, 0, 0, 0), [0, 255, 255]),
        ],
    )
    def test_modes_are_converted_to_rgb(self, tmp_path: Path, mode: str, color: object, expected: object) -> None:
        ending = "tif" if mode == "CMYK" else "png"
        data = open_data(write_voc(tmp_path, "train", {"a": xml()}, ending=ending), "train")
        Image.new(mode, (60, 40), color).save(data.annotations()[0].file)
        assert Image.open(data.annotations()[0].file).mode == mode
        assert np.array_equal(data[0].image, np.broadcast_to(np.array(expected, np.uint8), (40, 60, 3)))

    @pytest.mark.parametrize(
        ("dtype", "values", "tags", "high"),
        [
            (np.uint16, (0, 1000, 4095), {}, 4095),
            (np.uint16, (0, 900, 1001), {}, 1023),
            (np.uint16, (0, 900, 16000), {}, 16383),
            (np.uint16, (0, 900, 16384), {}, 65535),
            (np.uint16, (0, 900, 1001), {281: 4095}, 4095),
            (np.uint16, (0, 900, 4000), {281: 65535}, 4095),
            (np.uint16, (0, 900, 4000), {281: 255}, 4095),
            (np.int32, (0, 100, 255), {}, 255),
            (np.int32, (0, 0, 1), {}, 1),
            (np.int32, (0, 30000, 70000), {}, 70000),
            (np.float32, (0, 0.25, 1), {}, 1),
            (np.float32, (0, 0.5, 200), {}, 255),
            (np.float32, (0, 0.5, 3.5), {}, 3.5),
            (np.float32, (0, np.nan, 0.5), {}, 1),
            (np.float32, (0, 1.5, 3000), {341: 3500.0}, 3500),
            (np.float32, (0, 1.01, 0.5), {}, 1),
            (np.float32, (-1, 256, 30), {}, 255),
            (np.float32, (0, 0.001, 0.0005), {}, 0.001),
            (np.float32, (0, -9999, 200), {42113: "-9999"}, 255),
            (np.float32, (0, 3e38, 200), {}, 255),
        ],
    )
    def test_pixels_that_are_not_bytes_are_scaled(
        self, tmp_path: Path, dtype: type, values: tuple, tags: dict[int, float], high: float
    ) -> None:
        """All images of the data set, even a black one, are scaled by the same range."""
        spec = write_voc(tmp_path, "train", {"a": xml(), "b": xml(), "c": xml()}, ending="tif")
        write_voc(tmp_path, "test", {"d": xml()}, ending="tif")
        for image, value in zip("abc", values):
            file = tmp_path / "train" / "Images" / f"{image}.tif"
            Image.fromarray(np.full((40, 60), value, dtype)).save(file, tiffinfo=tags)
        with pytest.warns(UserWarning, match=r"a\.tif: pixels have more than 8 bits, .* from 0 to [\d.]+ are scaled"):
            data = open_data(spec, "train")
        assert data.pixel_range == pytest.approx((0, high))
        for i, value in enumerate(values):
            assert (data[i].image == np.rint((np.nan_to_num(value) * 255 / high).clip(0, 255))).all()
        (tmp_path / "test" / "Images" / "d.tif").write_bytes((tmp_path / "train" / "Images" / "b.tif").read_bytes())
        test = open_data(spec, "test", ["cat"], pixel_range=data.pixel_range)
        assert np.array_equal(test[0].image, data[1].image)

    def test_negative_pixels_are_scaled(self, tmp_path: Path) -> None:
        file = tmp_path / "a.tif"
        Image.fromarray(np.array([[-1000, 0, 1000]], np.int32)).save(file)
        assert read_image(str(file))[0, :, 0].tolist() == [0, 128, 255]

    def test_dark_images_with_16_bits_per_channel_cause_a_warning(self, tmp_path: Path) -> None:
        spec = write_voc(tmp_path, "train", {"a": xml()})
        rows = b"".join(b"\0" + np.full((60, 3), 4000, ">u2").tobytes() for _ in range(40))
        png = b"\x89PNG\r\n\x1a\n"
        head = struct.pack(">IIBBBBB", 60, 40, 16, 2, 0, 0, 0)
        for kind, content in ((b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
            check = struct.pack(">I", zlib.crc32(kind + content))
            png += struct.pack(">I", len(content)) + kind + content + check
        (tmp_path / "train" / "Images" / "a.png").write_bytes(png)
        with pytest.warns(UserWarning, match=r"a\.png: images have 16 bits per color channel, .* at most 15 of 255"):
            assert (open_data(spec, "train")[0].image == 15).all()

    def test_orientation_is_not_applied(self, tmp_path: Path) -> None:
        data = open_data(write_voc(tmp_path, "train", {"a": xml()}, ending="jpg"), "train")
        exif = Image.Exif()
        exif[0x0112] = 6  # rotated by 90 degrees
        Image.new("RGB", (60, 40)).save(data.annotations()[0].file, exif=exif)
        assert data[0].image.shape == (40, 60, 3)


def coco_object(id: int, image: int, category: int, bbox: list, **more) -> dict:
    return {"id": id, "image_id": image, "category_id": category, "bbox": bbox, "area": 7.0, "iscrowd": 0, **more}


def write_coco(root: Path, objects: list[dict], split: str = "train2017", folder: str = "train2017") -> str:
    """Write a data set with two images of 60 x 40, ids 30 and 7, and the categories dog (id 18) and cat (id 3)."""
    content = {
        "images": [{"id": id, "file_name": f"{id}.png", "width": 60, "height": 40} for id in (30, 7)],
        "categories": [{"id": 18, "name": "dog"}, {"id": 3, "name": "cat"}],
        "annotations": objects,
    }
    for image in content["images"]:
        write_image(root / folder / image["file_name"])
    (root / "annotations").mkdir(exist_ok=True)
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return f"coco:{root}"


def change(spec: str, old: str, new: str) -> None:
    """Replace the first occurrence of `old` in the annotation file that `write_coco` wrote."""
    file = Path(spec.removeprefix("coco:")) / "annotations" / "instances_train2017.json"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new, 1))


class TestCOCO:
    def test_objects_are_read(self, tmp_path: Path) -> None:
        objects = [
            coco_object(1, 7, 18, [10, 5, 20, 20]),
            coco_object(2, 7, 3, [50.5, 30, 20, 20], iscrowd=1),
            coco_object(3, 7, 3, [1, 1, 0, 5]),
        ]
        spec = write_coco(tmp_path, objects)
        with pytest.warns(UserWarning, match=r"7\.png: .* \(1 in this data set"):
            data = open_data(spec, "train")
        assert data.classes == ["cat", "dog"] and data.category_ids == [3, 18] and not data.has_masks
        assert [data[i].image_id for i in range(2)] == [30, 7] and len(data[0].boxes) == 0
        sample = data[1]
        assert sample.boxes.tolist() == [READ_BOX, [50.5, 30, 60, 40]] and sample.boxes.dtype == np.float32
        assert sample.labels.tolist() == [1, 0] and sample.ignore.tolist() == [False, True]
        annotation = data.annotations()[1]  # contains all objects of the file without changes
        assert annotation.boxes.tolist() == [READ_BOX, [50.5, 30, 70.5, 50], [1, 1, 1, 6]]
        assert annotation.labels.tolist() == [1, 0, 0] and annotation.areas.tolist() == [7, 7, 7]

    @pytest.mark.parametrize("folder", ["train2017", "images/train2017", "images", "."])
    def test_images_are_found_in_several_folders(self, tmp_path: Path, folder: str) -> None:
        data = open_data(write_coco(tmp_path, [], folder=folder), "train")
        assert data[0].image.shape == (40, 60, 3)

    def test_classes_are_matched_by_name(self, tmp_path: Path) -> None:
        write_coco(tmp_path, [])
        spec = write_coco(tmp_path, [coco_object(1, 7, 3, [1, 1, 9, 9])], "val2017", "val2017")
        write_coco(tmp_path, [], "test2017", "test2017")
        data = open_data(spec, "test", ["dog", "ape", "cat", "emu"])
        assert data[1].labels.tolist() == [2] and [data.category_ids[i] for i in (0, 2)] == [18, 3]
        assert len(set(data.category_ids)) == 4
        with pytest.raises(
            ValueError, match=r"instances_val2017\.json: the class of object 1 must be one of \['dog'\], got 'cat'"
        ):
            open_data(spec, "test", ["dog"])

    def test_masks_are_decoded(self, tmp_path: Path) -> None:
        coco = pytest.importorskip("faster_coco_eval.core.mask")
        mask = np.zeros((40, 60), bool)
        mask[5:25, 10:30] = True
        compressed = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
        compressed["counts"] = compressed["counts"].decode()
        runs = [10 * 40 + 5, *[20, 20] * 19, 20, 15 + 30 * 40]  # in column order
        segmentations = [
            [[10, 5, 30, 5, 30, 25, 10, 25]],
            [[10, 5, 20, 5, 20, 25, 10, 25], [20, 5, 30, 5, 30, 25, 20, 25]],
            compressed,
            {"size": [40, 60], "counts": runs},
        ]
        objects = [coco_object(i + 1, 7, 3, [10, 5, 20, 20], segmentation=s) for i, s in enumerate(segmentations)]
        data = open_data(write_coco(tmp_path, objects), "train")
        assert data.has_masks and data[0].masks.shape == (0, 40, 60)
        assert data[1].masks.dtype == bool and all(np.array_equal(m, mask) for m in data[1].masks)
        data.has_masks = False
        assert data[1].masks is None

    @pytest.mark.parametrize(
        "segmentation", [{"size": [9, 9], "counts": [81]}, {"size": [40, 60], "counts": [5]}, "no"]
    )
    def test_malformed_mask_is_an_error(self, tmp_path: Path, segmentation: object) -> None:
        pytest.importorskip("faster_coco_eval")
        data = open_data(write_coco(tmp_path, [coco_object(1, 7, 3, [1, 1, 9, 9], segmentation=segmentation)]), "train")
        with pytest.raises(ValueError, match=r"7\.png: a segmentation must"):
            data[1]

    def test_objects_without_a_mask_cause_a_warning(self, tmp_path: Path) -> None:
        pytest.importorskip("faster_coco_eval")
        objects = [
            coco_object(1, 7, 3, [1, 1, 9, 9], segmentation=[[1, 1, 9, 1, 9, 9]]),
            coco_object(2, 7, 3, [1, 1, 9, 9], segmentation=[]),
            coco_object(3, 30, 3, [1, 1, 9, 9]),
        ]
        spec = write_coco(tmp_path, objects)
        with pytest.warns(UserWarning, match="2 of 3 objects have no mask, so only their boxes are used in training$"):
            data = open_data(spec, "train")
        assert data.has_masks and data[1].masks.any((1, 2)).tolist() == [True, False] and not data[0].masks.any()

    @pytest.mark.parametrize(
        ("segmentation", "problem"),
        [
            ([[]], "a polygon with 0 points"),
            ([[1, 1, 9, 9]], "a polygon with 2 points"),
            ([[1, 1, 9, 1, 9, 9, 5]], "a polygon with 7 coordinates, which is an odd number"),
            ([[61, 1, 70, 1, 70, 9]], "a polygon outside the image"),
            ([[1, -9, 9, -9, 9, -1]], "a polygon outside the image"),
            (
                [[-1e9, 1, 1e9, 1, 1e9, 9]],
                "a polygon whose total edge length exceeds 1000 times the height plus width",
            ),
            ([[-119, -119, 119, 119, 119, -119] * 2000], "a polygon whose total edge length exceeds 1000 times"),
            ([[5, 5, 5, 5, 5, 5]], "a polygon without area"),
            ([[5.1, 5.1, 10.1, 10.1, 15.1, 15.1]], "a polygon without area"),
            ({"size": [40, 60], "counts": [2400]}, "an RLE of zeros"),
            ({"size": [40, 60], "counts": "P[2"}, "an RLE of zeros"),
        ],
    )
    def test_unusable_masks_cause_a_warning(self, tmp_path: Path, segmentation: object, problem: str) -> None:
        pytest.importorskip("faster_coco_eval")
        objects = [coco_object(1, 7, 3, [1, 1, 9, 9], segmentation=segmentation)]
        spec = write_coco(tmp_path, objects)
        with pytest.warns(UserWarning, match=rf"annotations\[0\] of .*7\.png has {problem}"):
            assert not open_data(spec, "train").has_masks
        triangle = [1, 1, 9, 1, 9, 9]
        write_coco(tmp_path, [*objects, coco_object(2, 7, 3, [1, 1, 9, 9], segmentation=[triangle])])
        with pytest.warns(UserWarning, match=rf"1 of 2 objects have no mask.* has {problem}"):
            masks = open_data(spec, "train")[1].masks
        assert not masks[0].any() and masks[1].any()
        if isinstance(segmentation, list):  # an unusable polygon in addition to a usable one does not change the mask
            write_coco(tmp_path, [coco_object(1, 7, 3, [1, 1, 9, 9], segmentation=[*segmentation, triangle])])
            with pytest.warns(UserWarning, match=f"0 of 1 objects have no mask.* has {problem}"):
                assert np.array_equal(open_data(spec, "train")[1].masks[0], masks[1])

    def test_malformed_masks_are_detected_before_they_are_decoded(self, tmp_path: Path) -> None:
        pytest.importorskip("faster_coco_eval")
        segmentations = [
            "[[NaN, 1, 9, 1, 9, 9]]",
            "[[1, 1, Infinity, 1, 9, 9]]",
            "[[1, 1, 1e999, 1, 9, 9]]",
            '[{"size": [40, 60], "counts": [0, 2400]}]',
            '{"size": [40, 60], "counts": [0, 2400000000000]}',
            '{"size": [40, 60], "counts": [-1, 2401]}',
            '{"size": [40, 60], "counts": "ooooooooo1"}',
            '{"size": [40, 60], "counts": "\\u0001"}',
            '{"size": [400000, 600000], "counts": [0, 240000000000]}',
            '{"counts": [0, 2400]}',
            '[[1, 1, "a", 1, 9, 9]]',
            "[1, 1, 9, 1, 9, 9]",
            "7",
        ]
        spec = write_coco(tmp_path, [coco_object(1, 7, 3, [1, 1, 9, 9], segmentation="HERE")])
        # Decoding some of these masks would exhaust the memory.
        done = run_python(
            f"""
import pathlib, resource
from relops.training.data import open_data
resource.setrlimit(resource.RLIMIT_DATA, (4 << 30, 4 << 30))
file = pathlib.Path({str(tmp_path)!r}, "annotations", "instances_train2017.json")
text = file.read_text()
for segmentation in {segmentations!r}:
    file.write_text(text.replace('"HERE"', segmentation))
    data = open_data({spec!r}, "train")
    for read in (lambda: data[1], data.check_masks):
        try:
            read()
        except ValueError as error:
            print(error)
    data.has_masks = False
    assert len(data[1].boxes) == 1
"""
        )
        lines = done.stdout.splitlines()
        assert len(lines) == 2 * len(segmentations), done.stderr
        assert all(line.startswith(f"{tmp_path}/train2017/7.png: a segmentation must") for line in lines)

    @pytest.mark.parametrize("size", [[40.0, 60.0], [40, 60]])
    def test_size_of_an_rle_may_be_floats(self, tmp_path: Path, size: list) -> None:
        pytest.importorskip("faster_coco_eval")
        rle = {"size": size, "counts": [10, 15, 2375]}
        data = open_data(write_coco(tmp_path, [coco_object(1, 7, 3, [1, 1, 9, 9], segmentation=rle)]), "train")
        assert data[1].masks.sum() == 15

    def test_polygon_is_clipped_to_the_image(self, tmp_path: Path) -> None:
        pytest.importorskip("faster_coco_eval")
        square = [-500, -500, 20, -500, 20, 20, -500, 20]
        data = open_data(write_coco(tmp_path, [coco_object(1, 7, 3, [1, 1, 9, 9], segmentation=[square])]), "train")
        assert data[1].masks.sum() == 20 * 20

    def test_compressed_masks_are_decoded(self) -> None:
        mask_api = pytest.importorskip("faster_coco_eval.core.mask")
        rng = np.random.default_rng(0)
        for _ in range(50):
            height, width = rng.integers(1, 400, 2)
            mask = np.repeat(rng.random((height, width)) < rng.random(), rng.integers(1, 90), 1)
            rle = mask_api.encode(np.asfortranarray(mask.astype(np.uint8)))
            lengths = run_lengths(rle, *mask.shape)
            assert np.array_equal(np.repeat(np.arange(len(lengths)) % 2 == 1, lengths), mask.ravel(order="F"))
            assert mask_area(rle, *mask.shape) == mask.sum()

    @pytest.mark.parametrize("area", [None, float("nan"), -4, 0, [7], "x", float("inf"), 10**400, "absent"])
    def test_area_is_computed_if_the_file_has_no_valid_one(self, tmp_path: Path, area: object) -> None:
        polygon, rle = [[2, 2, 8, 2, 8, 12, 2, 12]], {"size": [40, 60], "counts": [10, 15, 2375]}
        objects = [
            coco_object(1, 7, 3, [1, 1, 10, 20], area=area),
            coco_object(2, 7, 3, [1, 1, 10, 20], area=area, segmentation=polygon),
            coco_object(3, 7, 3, [1, 1, 10, 20], area=area, segmentation=rle),
            coco_object(4, 7, 3, [50, 30, 20, 20], area="30.5", segmentation=polygon),
        ]
        if area == "absent":
            for item in objects[:3]:
                del item["area"]
        with pytest.warns(UserWarning, match="1 of 4 objects have no mask"):
            data = open_data(write_coco(tmp_path, objects), "train")
        assert data.annotations()[1].areas.tolist() == [200, 60, 15, 30.5]

    @pytest.mark.parametrize(
        ("value", "ignored"),
        [("0", False), ("1", True), (0.0, False), ("1.0", True), (True, True), ("false", False), ("Yes", True)],
    )
    def test_crowds_are_ignored(self, tmp_path: Path, value: object, ignored: bool) -> None:
        spec = write_coco(tmp_path, [coco_object(1, 7, 3, [1, 1, 9, 9], iscrowd=value)])
        assert open_data(spec, "train")[1].ignore.tolist() == [ignored]

    def test_numbers_may_be_strings(self, tmp_path: Path) -> None:
        spec = write_coco(tmp_path, [coco_object(1, "7", "3", ["10", "5", "20", "20"], area="9")])
        change(spec, '"width": 60', '"width": "60"')
        change(spec, '"area"', '"segmentation": [["1", "1", 9, "1", "9.0", 9]], "area"')
        data = open_data(spec, "train")
        assert data[1].boxes.tolist() == [READ_BOX] and data[1].labels.tolist() == [0] and data[1].masks.any()
        assert data.annotations()[1].areas.tolist() == [9]

    def test_image_ids_may_be_strings(self, tmp_path: Path) -> None:
        spec = write_coco(tmp_path, [coco_object(1, "seven", 3, [1, 1, 9, 9]), coco_object(2, 30, 3, [2, 2, 9, 9])])
        change(spec, '"id": 7, "file', '"id": "seven", "file')
        data = open_data(spec, "train")
        assert [data[i].image_id for i in range(2)] == [0, 1]  # numbered in the sorted order of the ids
        assert [a.original_id for a in data.annotations()] == [30, "seven"]
        assert data[0].boxes[0, 0] == 2 and data[1].boxes[0, 0] == 1

    @pytest.mark.parametrize("id", ["7.5", "null", str(2**63), "[7]", "true", "1e400"])
    def test_invalid_ids_are_errors(self, tmp_path: Path, id: str) -> None:
        spec = write_coco(tmp_path, [])
        change(spec, '"id": 7, "file', f'"id": {id}, "file')
        with pytest.raises(ValueError, match=r"train2017\.json: id must be a signed integer .* in images\[1\]"):
            open_data(spec, "train")

    def test_two_images_with_the_same_id_are_an_error(self, tmp_path: Path) -> None:
        spec = write_coco(tmp_path, [])
        change(spec, '"id": 7, "file', '"id": "30", "file')
        with pytest.raises(ValueError, match=r"image ids must be unique, got 30 for both .*30\.png and .*7\.png"):
            open_data(spec, "train")

    def test_two_entries_for_one_file_cause_a_warning(self, tmp_path: Path) -> None:
        spec = write_coco(tmp_path, [])
        change(spec, "7.png", "./30.png")
        with pytest.warns(UserWarning, match=r"each image should have one entry, got 2 entries for .*30\.png"):
            assert len(open_data(spec, "train")) == 2

    @pytest.mark.parametrize("key", ["id", "file_name", "height", "width"])
    def test_missing_key_is_an_error(self, tmp_path: Path, key: str) -> None:
        spec = write_coco(tmp_path, [])
        file = tmp_path / "annotations" / "instances_train2017.json"
        content = json.loads(file.read_text())
        del content["images"][1][key]
        file.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=rf"{file}: images\[1\] must have '{key}', got {{"):
            open_data(spec, "train")

    @pytest.mark.parametrize("width", ["null", "0", "-60", "60.5", "1e99", '"wide"', "[60]", "1" + "0" * 400, "NaN"])
    def test_invalid_width_is_an_error(self, tmp_path: Path, width: str) -> None:
        spec = write_coco(tmp_path, [])
        change(spec, '"width": 60', f'"width": {width}')
        with pytest.raises(ValueError, match=r"width must be a positive number of pixels, got .* in images\[0\]"):
            open_data(spec, "train")

    @pytest.mark.parametrize("text", ["[" * 100_000, '{"images": ' + "9" * 5000 + "}", "{", ""])
    def test_invalid_json_is_an_error(self, tmp_path: Path, text: str) -> None:
        spec = write_coco(tmp_path, [])
        file = tmp_path / "annotations" / "instances_train2017.json"
        file.write_text(text)
        with pytest.raises(ValueError, match=rf"{file}: the file must contain valid JSON"):
            open_data(spec, "train")

    def test_file_names_may_have_backslashes(self, tmp_path: Path) -> None:
        spec = write_coco(tmp_path, [], folder="images/a")
        change(spec, '"30.png', r'"a\\30.png')
        change(spec, '"7.png', r'".\\a\\7.png')
        files = [str(tmp_path / "images" / "a/30.png"), os.path.join(tmp_path, "images", "./a/7.png")]
        assert [a.file for a in open_data(spec, "train").annotations()] == files

    def test_relative_coordinates_cause_a_warning(self, tmp_path: Path) -> None:
        spec = write_coco(tmp_path, [coco_object(1, 7, 3, [0.1, 0.2, 0.3, 0.4]), coco_object(2, 30, 3, [0, 0, 1, 1])])
        with pytest.warns(UserWarning, match=r"30\.png: .* must be pixels: multiply x by the width"):
            open_data(spec, "train")

    def test_category_ids_may_be_negative(self, tmp_path: Path) -> None:
        spec = write_coco(tmp_path, [coco_object(1, 7, -1, [1, 1, 9, 9]), coco_object(2, 7, "x", [1, 1, 9, 9])])
        change(spec, '"id": 18', '"id": -1')
        change(spec, '"id": 3, "name"', '"id": "x", "name"')
        data = open_data(spec, "train", ["emu", "dog", "cat", "ape"])
        assert data[1].labels.tolist() == [1, 2]
        assert data.category_ids[1:3] == [-1, "x"] and len(set(data.category_ids)) == 4

    @pytest.mark.parametrize(
        ("broken", "message"),
        [
            (coco_object(1, 7, 5, [1, 1, 9, 9]), "the class of object 1 must be one of .* got 5"),
            (coco_object(1, 8, 3, [1, 1, 9, 9]), "image_id must be the id of an image in this file, got 8"),
            (coco_object(1, 7, 3, [1, 1, 9]), "bbox must be 4 numbers"),
            ({"id": 1, "image_id": 7, "category_id": 3}, r"annotations\[0\] must have 'bbox', got {'id': 1,"),
            ("text", r"annotations\[0\] must be an object, got 'text'"),
            (coco_object(1, 7, 3, [1, 1, 9, 10**400]), r"bbox must be 4 numbers, got .* in annotations\[0\]"),
            (coco_object(1, 7, 3, [[1, 1], [9, 9]]), "bbox must be 4 numbers"),
            (coco_object(1, 7, 3, [1, 1, 9, 9], iscrowd="maybe"), "iscrowd must be 0 or 1, got 'maybe'"),
            (coco_object(1, 7, 3, [1, 1, 9, 9], iscrowd=None), "iscrowd must be 0 or 1, got None"),
            (coco_object(1, 7.5, 3, [1, 1, 9, 9]), "image_id must be a signed integer of at most 64 bits or a string"),
            (coco_object(1, 7, None, [1, 1, 9, 9]), "category_id must be a signed integer .* got None"),
        ],
    )
    def test_invalid_object_is_an_error(self, tmp_path: Path, broken: object, message: str) -> None:
        with pytest.raises(ValueError, match=rf"instances_train2017\.json: .*{message}"):
            open_data(write_coco(tmp_path, [broken]), "train")

    def test_missing_and_broken_files_are_errors(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"annotations/instances_\*train\*\.json"):
            open_data(f"coco:{tmp_path}", "train")
        spec = write_coco(tmp_path, [])
        file = tmp_path / "annotations" / "instances_train2017.json"
        whole = file.read_text()
        for text, message in [(whole[:-9], "must contain valid JSON"), ("[]", "must have COCO's instances format")]:
            file.write_text(text)
            with pytest.raises(ValueError, match=rf"{file}: .*{message}"):
                open_data(spec, "train")
        file.write_text(whole)
        (tmp_path / "train2017" / "30.png").unlink()
        with pytest.raises(ValueError, match=r"30\.png: this image of .*instances_train2017\.json must be in one of"):
            open_data(spec, "train")
        (tmp_path / "annotations" / "instances_train2014.json").write_text(whole)
        with pytest.raises(
            ValueError, match=r"one file annotations/instances_\*train\*\.json, got \['instances_train2014"
        ):
            open_data(spec, "train")


class TestAnnotationFilesOfCOCO:
    """Tests of how the annotation file for a split is chosen. No file may be chosen for both splits."""

    def open_and_name(self, folder: Path, files: list[str], split: str, **options: str) -> str:
        for name in files:
            image = {"id": 1, "file_name": f"{name}.png", "width": 60, "height": 40}
            write_image(folder / image["file_name"])
            content = {"images": [image], "categories": [{"id": 1, "name": "cat"}], "annotations": []}
            (folder / "annotations").mkdir(parents=True, exist_ok=True)
            (folder / "annotations" / name).write_text(json.dumps(content))
        data = open_data(f"coco:{folder}", split, **options)
        return Path(data.annotations()[0].file).name.removesuffix(".png")

    @pytest.mark.parametrize(
        ("train", "test", "others"),
        [
            (
                "instances_train2017.json",
                "instances_val2017.json",
                ["captions_val2017.json", "image_info_test2017.json"],
            ),
            (
                "instances_train2017.json",
                "instances_val2017.json",
                ["instances_test2017.json", "person_keypoints_train2017.json"],
            ),
            ("instances_trainval.json", "instances_test.json", []),
            ("instances_trainval35k.json", "instances_test-dev2017.json", ["instances_val2014.json"]),
            ("instances_train_val.json", "instances_test.json", []),
            ("instances_train-val2014.json", "instances_test.json", ["instances_val.json"]),
            ("instances_retrieval_train.json", "instances_test.json", []),
            ("instances_latest_train.json", "instances_latest_val.json", ["._instances_latest_val.json"]),
            ("train.json", "val.json", []),
            ("Instances_Train2017.JSON", "INSTANCES_VAL2017.json", ["val.json"]),
            ("train.json", "valid.json", ["test.json"]),
            ("instances_train.json", "test.json", []),
            ("instances_stuff_train.json", "instances_stuff_val.json", ["stuff_train.json", "panoptic_val.json"]),
        ],
    )
    def test_files_are_found_by_name(self, tmp_path: Path, train: str, test: str, others: list[str]) -> None:
        files = [train, test, *others]
        assert (
            self.open_and_name(tmp_path, files, "train") == train
            and self.open_and_name(tmp_path, files, "test") == test
        )

    @pytest.mark.parametrize(
        ("files", "split"),
        [
            (["instances_latest_train.json", "instances_default.json"], "test"),
            (["instances_train.json", "instances_minival.json"], "test"),
            (["instances_trainval.json", "instances_val.json"], "test"),
            (["instances_train_test.json", "instances_a.json"], "test"),
            (["instances_train2014.json", "instances_train2017.json"], "train"),
            (["instances_train.json", "instances_val2014.json", "instances_val2017.json"], "test"),
            (["instances_contest.json", "instances_val.json"], "train"),
            (["person_keypoints_train2017.json"], "train"),
            (["instances_train_without_val.json", "instances_val.json"], "test"),
        ],
    )
    def test_ambiguous_files_are_an_error(self, tmp_path: Path, files: list[str], split: str) -> None:
        with pytest.raises(ValueError, match=rf"{tmp_path}: .*json.*Name the file with --{split}-annotations") as error:
            self.open_and_name(tmp_path, files, split)
        assert any(name in str(error.value) for name in files)

    def test_named_file_is_first_searched_in_the_data_folder(self, tmp_path: Path, monkeypatch: Any) -> None:
        (tmp_path / "a.json").write_text("{}")
        monkeypatch.chdir(tmp_path)
        assert self.open_and_name(tmp_path / "data", ["a.json"], "train", annotations="a.json") == "a.json"

    @pytest.mark.parametrize("named", ["instances_a.json", "annotations/instances_a.json", "/instances_a.json"])
    def test_file_can_be_named(self, tmp_path: Path, named: str) -> None:
        files = ["instances_a.json", "instances_train.json", "instances_val.json"]
        named = str(tmp_path / "annotations" / named[1:]) if named[0] == "/" else named
        assert self.open_and_name(tmp_path, files, "test", annotations=named) == "instances_a.json"
        with pytest.raises(ValueError, match=r"instances_b\.json: the annotation file must exist"):
            open_data(f"coco:{tmp_path}", "train", annotations="instances_b.json")
        with pytest.raises(ValueError, match="annotations can only be given for coco:DIR"):
            open_data("shapes:50", "train", annotations="instances_a.json")


@pytest.mark.parametrize("kind", ["shapes", "rotated-shapes"])
class TestShapes:
    def test_splits_have_lengths_and_classes(self, kind: str) -> None:
        train, test = open_data(f"{kind}:50", "train"), open_data(f"{kind}:50", "test")
        assert (len(train), len(test)) == (50, 10) and len(open_data(kind, "train")) == 1000
        assert train.classes == test.classes and train.has_masks
        with pytest.raises(ValueError, match=f"classes of {kind}"):
            open_data(kind, "test", ["emu"])

    def test_images_depend_only_on_split_and_index(self, kind: str) -> None:
        data = open_data(f"{kind}:50", "train")
        backwards = [data[i] for i in reversed(range(5))][::-1]
        for i, sample in enumerate(backwards):
            again = open_data(f"{kind}:99", "train")[i]
            assert np.array_equal(sample.image, again.image) and np.array_equal(sample.boxes, again.boxes)
            assert not np.array_equal(sample.image, open_data(f"{kind}:50", "test")[i].image)
            assert sample.file == again.file == f"{kind}[train][{i}]"
        assert not np.array_equal(backwards[0].image, backwards[1].image)

    def test_images_do_not_change_between_versions(self, kind: str) -> None:
        """Otherwise, the recorded precision of detectors could not be reproduced.

        The checksum covers the classes and the shapes of all objects. Pixels are compared by their mean, because numpy
        may round sines differently on other processors.
        """
        checksums = {
            "shapes": {"train": (2692365729, 124.1347), "test": (367061247, 131.8053)},
            "rotated-shapes": {"train": (1942043535, 124.3596), "test": (355965419, 130.9787)},
        }
        for split, expected in checksums[kind].items():
            data, checksum, means = open_data(f"{kind}:200", split), 0, []
            for i in range(40):
                sample = data[i]
                checksum = zlib.crc32(sample.masks.tobytes(), zlib.crc32(sample.labels.tobytes(), checksum))
                means.append(sample.image.mean())
            assert (checksum, np.mean(means)) == (expected[0], pytest.approx(expected[1], abs=1e-3))

    def test_boxes_and_masks_fit_the_objects(self, kind: str) -> None:
        data = open_data(f"{kind}:100", "train")
        counts, labels = [], []
        min_size, max_size = (5, 61) if kind == "shapes" else (3, 60 * 3**0.5 + 1)
        for i in range(60):
            sample = data[i]
            counts.append(len(sample.boxes))
            labels += sample.labels.tolist()
            assert sample.image.shape == (128, 160, 3) and sample.masks.shape == (len(sample.boxes), 128, 160)
            assert (sample.masks.sum(0) <= 1).all()  # a pixel shows at most one object
            for box, mask in zip(sample.boxes.astype(int), sample.masks):
                x1, y1, x2, y2 = box
                within = mask[y1:y2, x1:x2]
                assert within.sum() == mask.sum()
                assert within[0].any() and within[-1].any() and within[:, 0].any() and within[:, -1].any()
                assert min_size <= min(x2 - x1, y2 - y1) and max(x2 - x1, y2 - y1) <= max_size
                assert sample.image[mask].std(0).max() < 12  # one color, plus noise
        assert min(counts) == 0 and max(counts) >= 5 and set(labels) == {0, 1, 2, 3}

    def test_aspect_ratios_and_angles(self, kind: str) -> None:
        """Measure the ellipses that are completely visible."""
        data, aspects, angles = open_data(kind, "train"), [], []
        for i in range(200):
            sample = data[i]
            for mask in sample.masks[sample.labels == data.classes.index("circle")]:
                (minor, major), axes = np.linalg.eigh(np.cov(np.nonzero(mask)))
                area = 4 * np.pi * (minor * major) ** 0.5  # of a complete ellipse
                if abs(mask.sum() - area) < 0.005 * area and area > 400:
                    aspects.append((major / minor) ** 0.5)
                    angles.append(math.atan2(axes[0, 1], axes[1, 1]) % math.pi)
        assert len(aspects) > 30
        if kind == "shapes":
            assert max(aspects) < 1.1
        else:
            assert 1 <= min(aspects) < 1.2 and 2.7 < max(aspects) < 3.1
            assert all(3 < count for count in np.histogram(angles, 4, (0, math.pi))[0])

    def test_annotations_equal_the_samples(self, kind: str) -> None:
        data = open_data(f"{kind}:20", "train")
        for sample, annotation in zip((data[i] for i in range(20)), data.annotations()):
            assert np.array_equal(sample.boxes, annotation.boxes) and sample.file == annotation.file
            assert annotation.areas.tolist() == sample.masks.sum((1, 2)).tolist()
            for mask, rle in zip(sample.masks, annotation.masks):
                runs = np.repeat(np.arange(len(rle["counts"])) % 2, rle["counts"]).astype(bool)
                assert np.array_equal(runs.reshape(rle["size"], order="F"), mask)
        data.has_masks = False
        assert data[0].masks is None and data.annotations()[0].masks is None


def painted(height: int, width: int, *boxes: tuple[int, int, int, int], **more) -> Sample:
    """Return a sample with a black image and white rectangles. The rectangles are its objects and its proposals."""
    masks = np.zeros((len(boxes), height, width), bool)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes):
        mask[y1:y2, x1:x2] = True
    image = np.repeat(masks.any(0)[..., None] * np.uint8(255), 3, -1)
    corners = np.array(boxes, np.float32).reshape(-1, 4)
    labels, ignore = np.arange(len(boxes)), np.zeros(len(boxes), bool)
    sample = Sample(image, corners, labels, ignore, masks, corners.copy(), 5, "painted", (height, width))
    return dataclasses.replace(sample, **more)


def bounds(white: np.ndarray) -> np.ndarray:
    ys, xs = np.nonzero(white)
    return np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])


class TestPrepare:
    @pytest.mark.parametrize(
        ("size", "min_size", "max_size", "expected"),
        [
            ((40, 60), 80, 1000, (80, 120)),
            ((40, 60), 80, 90, (60, 90)),
            ((60, 40), 80, 90, (90, 60)),
            ((40, 60), 20, 1000, (20, 30)),
            ((41, 67), 20, 1000, (20, 33)),
            ((1000, 2), 4, 100, (100, 1)),
        ],
    )
    def test_size_is_within_the_limits(
        self, size: tuple[int, int], min_size: int, max_size: int, expected: object
    ) -> None:
        sample = prepare(painted(*size), min_size, max_size)
        assert sample.image.shape == (*expected, 3) and sample.masks.shape == (0, *expected)
        assert sample.original_size == size

    @pytest.mark.parametrize("flip", [False, True])
    @pytest.mark.parametrize("flip_vertical", [False, True])
    @pytest.mark.parametrize("min_size", [35, 64, 130])
    def test_boxes_are_transformed_like_pixels(self, flip: bool, flip_vertical: bool, min_size: int) -> None:
        before = painted(64, 90, (10, 6, 40, 26))
        after = prepare(before, min_size, 1000, flip=flip, flip_vertical=flip_vertical)
        height, width = after.image.shape[:2]
        x1, y1, x2, y2 = 10 * width / 90, 6 * height / 64, 40 * width / 90, 26 * height / 64
        if flip:
            x1, x2 = width - x2, width - x1
        if flip_vertical:
            y1, y2 = height - y2, height - y1
        assert after.boxes == pytest.approx(np.array([[x1, y1, x2, y2]]), abs=1e-4)
        assert after.boxes.dtype == np.float32 and np.array_equal(after.boxes, after.proposals)
        assert bounds(after.image[..., 0] > 127) == pytest.approx(after.boxes[0], abs=0.6)
        assert bounds(after.masks[0]) == pytest.approx(after.boxes[0], abs=0.6)
        assert np.array_equal(before.boxes, [[10, 6, 40, 26]])

    def test_boxes_stay_inside_of_the_image(self) -> None:
        boxes = prepare(painted(333, 501, (0, 0, 501, 333)), 100, 1000, flip=True, flip_vertical=True).boxes
        assert boxes.tolist() == [[0, 0, 150, 100]]

    def test_masks_and_proposals_may_be_missing(self) -> None:
        sample = prepare(painted(40, 60, masks=None, proposals=None), 20, 100, flip=True)
        assert sample.masks is None and sample.proposals is None


class TestTransformed:
    data = open_data("shapes:50", "train")

    def flips(self, transformed: Transformed, epoch: int) -> list[tuple[bool, bool]]:
        """Return, for each image, whether it was flipped horizontally and whether it was flipped vertically."""
        result = []
        for index in range(len(self.data)):
            plain, sample = self.data[index], transformed[epoch, index]
            result.append(
                next(
                    (h, v)
                    for h in (False, True)
                    for v in (False, True)
                    if np.array_equal(plain.image[:: -1 if v else 1, :: -1 if h else 1], sample.image)
                )
            )
        return result

    def test_flips_depend_only_on_seed_epoch_and_index(self) -> None:
        flips = self.flips(Transformed(self.data, 128, 160, augment=True, seed=3), 0)
        assert flips == self.flips(Transformed(self.data, 128, 160, augment=True, seed=3), 0)
        assert flips != self.flips(Transformed(self.data, 128, 160, augment=True, seed=3), 1)
        assert flips != self.flips(Transformed(self.data, 128, 160, augment=True, seed=4), 0)
        assert 15 < sum(h for h, _ in flips) < 35 and not any(v for _, v in flips)

    def test_half_of_the_images_are_flipped_vertically(self) -> None:
        flips = self.flips(Transformed(self.data, 128, 160, augment=True, vertical_flip=True), 0)
        assert len(set(flips)) == 4 and 15 < sum(v for _, v in flips) < 35

    def test_images_are_not_flipped_without_augment(self) -> None:
        assert not any(map(any, self.flips(Transformed(self.data, 128, 160, vertical_flip=True), 0)))

    def test_cache_does_not_change_the_samples(self) -> None:
        cached = Transformed(self.data, 64, 100, augment=True, vertical_flip=True, cache=True)
        plain = Transformed(self.data, 64, 100, augment=True, vertical_flip=True)
        for key in [(0, 3), (1, 3), (2, 3), (0, 4), (0, 3), (3, 3)]:
            a, b = cached[key], plain[key]
            assert a.image.shape == (64, 80, 3) and np.array_equal(a.image, b.image)
            assert np.array_equal(a.boxes, b.boxes) and np.array_equal(a.masks, b.masks)


class TestCollate:
    def test_batch_is_padded_and_normalized(self) -> None:
        samples = [
            prepare(painted(40, 60, (10, 6, 40, 26), (0, 0, 5, 5), ignore=np.array([False, True])), 80, 200),
            prepare(painted(100, 50, image_id=9), 50, 200),
        ]
        batch = collate(samples)
        assert batch.images.shape == (2, 3, 128, 128) and batch.images.dtype == torch.float32
        white, black = ((torch.tensor([value] * 3) - torch.tensor(MEAN)) / torch.tensor(STD) for value in (1.0, 0.0))
        assert torch.allclose(batch.images[0, :, 30, 40], white) and torch.allclose(batch.images[0, :, 70, 110], black)
        assert (batch.images[0, :, 80:] == 0).all() and (batch.images[0, :, :, 120:] == 0).all()
        assert (batch.images[1, :, 100:] == 0).all() and (batch.images[1, :, :, 50:] == 0).all()
        assert batch.sizes.tolist() == [[80, 120], [100, 50]] and batch.sizes.dtype == torch.float32
        assert batch.scales.tolist() == [[2, 2], [1, 1]] and batch.image_ids.tolist() == [5, 9]
        assert batch.targets.boxes.tolist() == [[[20, 12, 80, 52]], [[0, 0, 0, 0]]]
        assert batch.targets.labels.tolist() == [[0], [-1]] and batch.targets.labels.dtype == torch.int64
        assert batch.targets.masks.shape == (2, 1, 128, 128) and batch.targets.masks.dtype == torch.bool
        assert bounds(batch.targets.masks[0, 0].numpy()).tolist() == [20, 12, 80, 52]
        assert batch.targets.masks[0].sum() == 60 * 40 and not batch.targets.masks[1].any()
        assert batch.targets.proposals.tolist() == [[[20, 12, 80, 52], [0, 0, 10, 10]], [[0] * 4, [0] * 4]]

    def test_objects_masks_and_proposals_may_be_missing(self) -> None:
        batch = collate([painted(32, 64, masks=None, proposals=None)])
        assert batch.images.shape == (1, 3, 32, 64)
        assert batch.targets.boxes.shape == (1, 1, 4) and batch.targets.labels.tolist() == [[-1]]
        assert batch.targets.masks is None and batch.targets.proposals is None
        moved = batch.to("cpu")
        assert type(moved) is type(batch) and type(moved.targets) is type(batch.targets)

    def test_scales_restore_the_original_coordinates(self) -> None:
        sample = painted(333, 501, (100, 50, 300, 200))
        batch = collate([prepare(sample, 100, 1000)])
        scale = batch.scales[0].flip(0).repeat(2)
        assert (batch.targets.boxes[0, 0] / scale).tolist() == pytest.approx([100, 50, 300, 200], abs=1e-3)


def first_batches(sampler: EpochSampler, count: int, first: int = 0) -> list[list[tuple[int, int]]]:
    return list(itertools.islice(sampler.batches(first), count))


class TestEpochSampler:
    @pytest.mark.parametrize("ratios", [None, [0.5, 2] * 12])
    def test_every_image_occurs_once_per_epoch(self, ratios: list[float] | None) -> None:
        samplers = [EpochSampler(24, 4, 0, rank, 3, ratios) for rank in range(3)]
        assert samplers[0].batches_per_epoch == 2
        orders = []
        for epoch in range(3):
            batches = [batch for sampler in samplers for batch in first_batches(sampler, 2, 2 * epoch)]
            assert all(len(batch) == 4 for batch in batches)
            keys = [key for batch in batches for key in batch]
            assert sorted(keys) == [(epoch, index) for index in range(24)]
            orders.append([index for _, index in keys])
        assert orders[0] != orders[1] != orders[2] and orders[0] != list(range(24))

    def test_incomplete_batch_is_dropped(self) -> None:
        batches = first_batches(EpochSampler(23, 5, 0), 8)
        epochs = [{epoch for epoch, _ in batch} for batch in batches]
        assert epochs == [{0}] * 4 + [{1}] * 4
        assert len({key for batch in batches for key in batch}) == 40

    @pytest.mark.parametrize("ratios", [None, [0.5, 2, 2] * 9])
    def test_sampler_resumes_at_any_iteration(self, ratios: list[float] | None) -> None:
        sampler = EpochSampler(27, 2, 7, 1, 2, ratios)
        batches = first_batches(sampler, 30)
        for first in (0, 1, 5, 6, 7, 20):
            assert first_batches(EpochSampler(27, 2, 7, 1, 2, ratios), 5, first) == batches[first : first + 5]
        assert first_batches(EpochSampler(27, 2, 8, 1, 2, ratios), 5) != batches[:5]

    def test_wide_and_tall_images_are_separated(self) -> None:
        ratios = [1.5] * 13 + [0.7] * 9 + [1.0]
        sampler = EpochSampler(23, 4, 0, aspect_ratios=ratios)
        seen = set()
        for epoch in range(6):
            batches = first_batches(sampler, sampler.batches_per_epoch, epoch * sampler.batches_per_epoch)
            kinds = [{ratios[index] >= 1 for _, index in batch} for batch in batches]
            assert sum(len(kind) > 1 for kind in kinds) <= 1
            seen |= {index for batch in batches for _, index in batch}
        assert seen == set(range(23))

    def test_images_of_a_rare_shape_occur(self) -> None:
        sampler = EpochSampler(16, 4, 0, aspect_ratios=[2.0] * 14 + [0.5] * 2)
        assert {14, 15} <= {index for batch in first_batches(sampler, 4) for _, index in batch}

    def test_fewer_images_than_a_batch_are_an_error(self) -> None:
        with pytest.raises(ValueError, match=r"at most 7, the number of images, got 4 \* 2"):
            EpochSampler(7, 4, 0, 0, 2)

    def test_sampler_works_in_a_loader(self) -> None:
        data = Transformed(open_data("shapes:20", "train"), 64, 80, augment=True)
        sampler = EpochSampler(20, 4, 0)
        batches = list(itertools.islice(DataLoader(data, batch_sampler=sampler.batches(3), collate_fn=collate), 4))
        keys = first_batches(sampler, 4, 3)
        assert [batch.image_ids.tolist() for batch in batches] == [[index for _, index in batch] for batch in keys]
        assert torch.equal(batches[2].images, collate([data[key] for key in keys[2]]).images)


class TestProposals:
    data = open_data("shapes:5", "train")

    def test_proposals_can_be_saved_and_loaded(self, tmp_path: Path) -> None:
        rng = np.random.default_rng(0)
        given = {i: rng.random((i, 4), np.float32) * 60 for i in reversed(range(5))}
        save_proposals(tmp_path / "proposals", given)
        data = with_proposals(self.data, tmp_path / "proposals")
        assert len(data) == 5 and data.classes == self.data.classes and data.has_masks
        assert all(np.array_equal(data[i].proposals, given[i]) for i in range(5))
        assert np.array_equal(data[2].image, self.data[2].image)
        prepared = Transformed(data, 256, 1000)[0, 3]
        assert prepared.proposals == pytest.approx(given[3] * 2)
        assert collate([data[1], data[4]]).targets.proposals.shape == (2, 4, 4)

    def test_proposals_are_matched_by_ids_that_are_strings(self, tmp_path: Path) -> None:
        """Proposals are still assigned to the right image if the ids of other images change."""
        spec = write_coco(tmp_path, [])
        change(spec, '"id": 7, "file', '"id": "b", "file')
        data = open_data(spec, "train")
        save_proposals(tmp_path / "p.npz", {a.own_id: np.full((1, 4), i) for i, a in enumerate(data.annotations())})
        change(spec, '"id": 30, "file', '"id": "c", "file')
        with pytest.raises(ValueError, match=r"the proposals of image c, .*30\.png, are missing"):
            with_proposals(open_data(spec, "train"), tmp_path / "p.npz")
        change(spec, '"id": "c", "file', '"id": "30", "file')
        again = with_proposals(open_data(spec, "train"), tmp_path / "p.npz")
        assert [again[i].proposals[0, 0] for i in range(2)] == [0, 1]

    def test_image_without_proposals_is_an_error(self, tmp_path: Path) -> None:
        save_proposals(tmp_path / "p.npz", {i: np.zeros((1, 4)) for i in (0, 1, 2, 4)})
        with pytest.raises(ValueError, match=r"p\.npz: the proposals of image 3, shapes\[train\]\[3\], are missing"):
            with_proposals(self.data, tmp_path / "p.npz")

    @pytest.mark.parametrize(
        "wrong",
        [
            {"counts": [1, 1]},
            {"counts": [4, -1]},
            {"boxes": [[0.0, 0, 9, 9]] * 2},
            {"boxes": [[0.0]] * 3},
            {"boxes": [[0, 0, np.nan, 9]] * 3},
            {"image_ids": [0]},
        ],
    )
    def test_arrays_that_do_not_fit_are_an_error(self, wrong: dict, tmp_path: Path) -> None:
        arrays = {"image_ids": [0, 1], "counts": [1, 2], "boxes": [[0.0, 0, 9, 9]] * 3}
        np.savez(tmp_path / "p.npz", **arrays | wrong)
        with pytest.raises(ValueError, match=r"p\.npz: the file must have been written by save_proposals"):
            with_proposals(self.data, tmp_path / "p.npz")

    def test_broken_file_is_an_error(self, tmp_path: Path) -> None:
        for content in (None, b"text", b""):
            if content is not None:
                (tmp_path / "p.npz").write_bytes(content)
            with pytest.raises(ValueError, match=r"p\.npz: the file must have been written by save_proposals"):
                with_proposals(self.data, tmp_path / "p.npz")


def test_training_images_among_the_test_images_cause_a_warning(tmp_path: Path) -> None:
    spec = write_voc_lists(tmp_path, {"trainval": ["1", "2"], "test": ["1", "3"]})
    train = open_data(spec, "train", ["class 1", "class 2", "class 3"])
    with pytest.warns(UserWarning, match=r"1\.jpg: a test image should not also be .*, but 1 of 2 test images are$"):
        warn_of_common_images(train, open_data(spec, "test", train.classes))


def test_valid_data_causes_no_warnings(tmp_path: Path) -> None:
    spec = write_voc(tmp_path, "train", {"a": xml(("cat", *VOC_BOX))})
    write_voc(tmp_path, "test", {"b": xml(("cat", *VOC_BOX))})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = open_data(spec, "train")
        warn_of_common_images(data, open_data(spec, "test"))
        collate([Transformed(data, 20, 100)[0, 0]])
