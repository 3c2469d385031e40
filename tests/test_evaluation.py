"""Tests that compare average precision with values computed by hand and with COCO's tools, and tests of the plots."""

from __future__ import annotations

import json
import math
import pickle
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from relops.models.structures import Detections, Targets
from relops.training.data import Annotation, Batch, DetectionData, Sample, open_data
from relops.training.evaluation import METRICS, Evaluator
from relops.training.plots import draw_detections, plot_curves

Box = Sequence[float]


class FixedData(DetectionData):
    """A data set of 300 x 240 images with the ids 10, 11, ... and the given objects (box, label[, ignore])."""

    def __init__(self, *images: list[tuple], classes: Sequence[str] = ("cat", "dog"), masks: bool = False) -> None:
        self.classes, self.has_masks, self.category_ids = list(classes), masks, [7 * i + 3 for i in range(len(classes))]
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Sample:
        raise AssertionError("evaluation must not read images")

    def annotations(self) -> list[Annotation]:
        result = []
        for n, objects in enumerate(self._images):
            boxes = np.array([box for box, *_ in objects], np.float32).reshape(-1, 4)
            labels = np.array([label for _, label, *_ in objects], np.int64)
            ignore = np.array([bool(more) for _, _, *more in objects], bool)
            areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
            masks = [[[x1, y1, x2, y1, x2, y2, x1, y2]] for x1, y1, x2, y2 in boxes.tolist()]
            masks = masks if self.has_masks else None
            result.append(Annotation(n + 10, f"{n}", 240, 300, boxes, labels, ignore, areas, masks))
        return result


def batch_of(image_ids: Sequence[int], scales: Sequence[tuple[float, float]] | None = None) -> Batch:
    N = len(image_ids)
    targets = Targets(torch.zeros(N, 1, 4), torch.full((N, 1), -1))
    scales = torch.tensor(scales or [(1.0, 1.0)] * N)
    return Batch(torch.zeros(N, 3, 32, 32), torch.full((N, 2), 32.0), targets, torch.tensor(image_ids), scales)


def detections_of(*images: list[tuple[Box, float, int]], masks: Tensor | None = None) -> Detections:
    """Return a batch of the detections (box, score, label) of each image, with at least one row of padding."""
    D = 1 + max(map(len, images))
    boxes, scores = torch.zeros(len(images), D, 4), torch.zeros(len(images), D)
    labels = torch.full((len(images), D), -1)
    for n, found in enumerate(images):
        for d, (box, score, label) in enumerate(found):
            boxes[n, d], scores[n, d], labels[n, d] = torch.tensor(box), score, label
    return Detections(boxes, scores, labels, masks)


def evaluated(data: DetectionData, *images: list[tuple[Box, float, int]]) -> Evaluator:
    evaluator = Evaluator(data)
    evaluator.add(batch_of(range(10, 10 + len(images))), detections_of(*images))
    return evaluator


def box(x: float, y: float = 20, side: float = 40) -> list[float]:
    return [x, y, x + side, y + side]


def random_scene(rng: np.random.Generator, images: int) -> tuple[list[list[tuple]], list[list[tuple]]]:
    """Return random objects of two classes, and detections close to them. One object per image is ignored."""
    truth, found = [], []
    for _ in range(images):
        corners = rng.uniform(0, 180, (6, 2))
        boxes = np.concatenate([corners, corners + rng.uniform(8, 60, (6, 2))], 1).astype(np.float32)
        labels = rng.integers(2, size=6)
        truth.append(
            [(b.tolist(), int(c), *(["ignore"] if i == 0 else [])) for i, (b, c) in enumerate(zip(boxes, labels))]
        )
        near = [(b + rng.normal(0, 3, 4), rng.random(), int(c)) for b, c in zip(boxes, labels) for _ in range(2)]
        near = [(np.concatenate([b[:2], np.maximum(b[2:], b[:2] + 1)]).tolist(), s, c) for b, s, c in near]
        found.append(sorted(near, key=lambda item: -item[1]))
    return truth, found


class TestVOC:
    data = FixedData([(box(10), 0), (box(100), 0), (box(200, 100), 0), (box(10, 150), 0, "difficult")], [(box(10), 0)])
    found = (
        [
            (box(10, 150), 0.9, 0),  # overlaps the difficult object
            (box(10), 0.8, 0),  # correct
            (box(12), 0.7, 0),  # a duplicate
            (box(250), 0.6, 0),  # overlaps no object
            (box(100), 0.5, 0),  # correct
            (box(9, 152), 0.3, 0),  # overlaps the difficult object
        ],
        [(box(11), 0.4, 0), (box(100), 0.2, 0)],  # the first is correct, and the second overlaps no object
    )

    def test_area_metric_is_the_area_under_the_monotonic_curve(self) -> None:
        values = evaluated(self.data, *self.found).voc()
        # There are four objects. At recalls 1/4, 2/4 and 3/4, the precision is 1, 2/4 and 3/5. The monotonic precision
        # is 1, 3/5 and 3/5.
        assert values["AP/cat"] == pytest.approx((1 + 3 / 5 + 3 / 5) / 4)
        assert math.isnan(values["AP/dog"]) and values["mAP"] == values["AP/cat"]

    def test_11point_is_the_mean_of_11_precisions(self) -> None:
        # The precision is 1 at the three recalls from 0 to 0.2, and 3/5 at the five recalls from 0.3 to 0.7.
        assert evaluated(self.data, *self.found).voc(metric="11point")["AP/cat"] == pytest.approx((3 + 5 * 3 / 5) / 11)

    def test_recall_of_exactly_three_tenths_counts_for_its_point(self) -> None:
        data = FixedData([(box(50 * (i % 5), 20 + 60 * (i // 5)), 0) for i in range(10)])
        found = [(box(50 * i), 0.9, 0) for i in range(3)]
        assert evaluated(data, found).voc(metric="11point")["AP/cat"] == pytest.approx(4 / 11)

    def test_order_of_images_and_detections_does_not_matter(self) -> None:
        expected = evaluated(self.data, *self.found).voc()["mAP"]
        evaluator = Evaluator(self.data)
        evaluator.add(batch_of([11]), detections_of(self.found[1][::-1]))
        evaluator.add(batch_of([10]), detections_of(self.found[0][::-1]))
        assert evaluator.voc()["mAP"] == expected

    def test_iou_of_exactly_the_threshold_is_sufficient(self) -> None:
        data = FixedData([([0, 0, 40, 40], 0)])
        half = evaluated(data, [([0, 0, 40, 20], 0.9, 0)])  # IoU 0.5
        assert half.voc(0.5)["mAP"] == 1 and half.voc(0.51)["mAP"] == 0

    def test_classes_are_evaluated_separately(self) -> None:
        data = FixedData([(box(10), 0), (box(100), 1)])
        assert evaluated(data, [(box(10), 0.9, 1), (box(100), 0.8, 1)]).voc() == {
            "mAP": 0.25,
            "AP/cat": 0,
            "AP/dog": 0.5,
        }

    def test_ap_without_detections_or_objects(self) -> None:
        data = FixedData([(box(10), 0), (box(100), 1, "difficult")])
        for evaluator in (Evaluator(data), evaluated(data, [])):
            values = evaluator.voc()
            assert values["AP/cat"] == values["mAP"] == 0 and math.isnan(values["AP/dog"])
        assert math.isnan(evaluated(FixedData([]), [(box(10), 0.9, 0)]).voc()["mAP"])

    def test_unknown_metric_is_an_error(self) -> None:
        with pytest.raises(ValueError, match="metric must be 'area' or '11point', got '12point'"):
            evaluated(self.data, []).voc(metric="12point")


class TestEvaluator:
    def test_image_of_other_data_is_an_error(self) -> None:
        with pytest.raises(ValueError, match=r"batch\.image_ids .* got 99"):
            Evaluator(FixedData([])).add(batch_of([99]), detections_of([]))

    def test_detections_are_scaled_to_the_original_image(self) -> None:
        evaluator = Evaluator(FixedData([(box(10), 0)], [(box(100), 1)]))
        found = detections_of([([5, 60, 25, 180], 0.9, 0)], [([100, 10, 140, 30], 0.9, 1)])
        evaluator.add(batch_of([10, 11], [(3.0, 0.5), (0.5, 1.0)]), found)
        assert evaluator.voc(0.99)["mAP"] == 1
        assert [result["bbox"] for result in evaluator.coco_results()] == [[10, 20, 40, 40], [100, 20, 40, 40]]

    def test_coco_results_have_the_ids_of_the_data(self) -> None:
        evaluator = evaluated(FixedData([]), [(box(10), 0.75, 1), (box(20), 0.5, 0)])
        assert json.loads(json.dumps(evaluator.coco_results())) == [
            {"image_id": 10, "category_id": 10, "bbox": [10, 20, 40, 40], "score": 0.75},
            {"image_id": 10, "category_id": 3, "bbox": [20, 20, 40, 40], "score": 0.5},
        ]

    def test_merged_evaluators_equal_a_single_one(self) -> None:
        truth, found = random_scene(np.random.default_rng(1), 5)
        together = evaluated(FixedData(*truth), *found)
        parts = [Evaluator(FixedData(*truth)) for _ in range(2)]
        for i, detections in enumerate(found):
            parts[i % 2].add(batch_of([10 + i]), detections_of(detections))
        # Samplers may repeat images to give every rank the same number of images.
        parts[1].add(batch_of([10]), detections_of(found[0]))
        parts[0].merge([pickle.loads(pickle.dumps(part.state())) for part in parts])
        assert parts[0].voc() == together.voc() and 0 < together.voc()["mAP"] < 1


class TestCOCO:
    @pytest.fixture(autouse=True)
    def needs_faster_coco_eval(self) -> None:
        pytest.importorskip("faster_coco_eval")

    def test_perfect_detections_have_an_ap_of_one(self) -> None:
        data = open_data("shapes:100", "test")
        evaluator = Evaluator(data)
        for a in data.annotations():
            found = [((b * 1.5).tolist(), 0.5 + i / 100, int(c)) for i, (b, c) in enumerate(zip(a.boxes, a.labels))]
            evaluator.add(batch_of([a.image_id], [(1.5, 1.5)]), detections_of(found))
        metrics = evaluator.summarize()
        for name in ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AR_100", *(f"AP/{name}" for name in data.classes)):
            assert metrics[name] == pytest.approx(1), name
        assert math.isnan(metrics["AP_large"])  # no shape has 96 x 96 pixels
        assert not any(name.startswith("mask") for name in metrics)

    def test_one_of_two_objects_is_detected(self, capsys: pytest.CaptureFixture[str]) -> None:
        metrics = evaluated(FixedData([(box(10), 0), (box(100), 0)]), [(box(10), 0.9, 0)]).summarize()
        # The precision is 1 at 51 of the 101 recalls: 0, 0.01, ..., 0.5.
        assert metrics["AP"] == metrics["AP50"] == metrics["AP/cat"] == pytest.approx(51 / 101)
        assert metrics["AR_100"] == 0.5 and math.isnan(metrics["AP/dog"])
        assert capsys.readouterr() == ("", "")

    def test_detections_of_ignored_objects_do_not_count(self) -> None:
        data = FixedData([(box(10), 0), (box(100, side=80), 0, "crowd")])
        found = [(box(110, 40), 0.9, 0), (box(130, 40), 0.8, 0), (box(10), 0.7, 0)]
        assert evaluated(data, found).summarize()["AP"] == pytest.approx(1)
        assert evaluated(FixedData([(box(10), 0)]), found).summarize()["AP"] == pytest.approx(1 / 3)

    def test_ap_without_detections_or_objects(self) -> None:
        data = FixedData([(box(10), 0)], [])
        for evaluator in (Evaluator(data), evaluated(data, [], [])):
            assert evaluator.summarize()["AP"] == evaluator.summarize()["AP/cat"] == 0
        empty = evaluated(FixedData([], []), [(box(10), 0.9, 0)]).summarize()
        assert math.isnan(empty["AP"]) and math.isnan(Evaluator(FixedData([])).summarize()["AP50"])

    def test_metrics_equal_those_of_faster_coco_eval_on_files(self, tmp_path: Path) -> None:
        from faster_coco_eval import COCO, COCOeval_faster

        pil = pytest.importorskip("PIL.Image")
        truth, found = random_scene(np.random.default_rng(0), 8)
        (tmp_path / "annotations").mkdir()
        file = tmp_path / "annotations" / "instances_val.json"
        content = {"images": [], "annotations": [], "categories": [{"id": 9, "name": "dog"}, {"id": 4, "name": "cat"}]}
        for n, objects in enumerate(truth):
            pil.new("RGB", (300, 240)).save(tmp_path / f"{n}.png")
            content["images"].append({"id": 50 - n, "file_name": f"{n}.png", "width": 300, "height": 240})
            for (x1, y1, x2, y2), label, *ignore in objects:
                item = {"id": len(content["annotations"]) + 1, "image_id": 50 - n, "category_id": (4, 9)[label]}
                area = 0.7 * (x2 - x1) * (y2 - y1)
                item |= {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": area, "iscrowd": int(bool(ignore))}
                content["annotations"].append(item)
        file.write_text(json.dumps(content))

        # The classes are not in the order of their ids.
        evaluator = Evaluator(open_data(f"coco:{tmp_path}", "test", ["dog", "cat"]))
        for n, detections in enumerate(found):
            stretched = [((np.array(b) * [2, 3, 2, 3]).tolist(), score, 1 - label) for b, score, label in detections]
            evaluator.add(batch_of([50 - n], [(3.0, 2.0)]), detections_of(stretched))
        metrics = evaluator.summarize()

        results = [
            {"image_id": 50 - n, "category_id": (4, 9)[label], "bbox": [x1, y1, x2 - x1, y2 - y1], "score": score}
            for n, detections in enumerate(found)
            for (x1, y1, x2, y2), score, label in detections
        ]
        (tmp_path / "results.json").write_text(json.dumps(results))
        expected = COCO(str(file))
        expected = COCOeval_faster(expected, expected.loadRes(str(tmp_path / "results.json")), "bbox")
        expected.evaluate(), expected.accumulate(), expected.summarize()
        names = ["AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR_1", "AR_10", "AR_100"]
        for name, value in zip(names, expected.stats):
            assert metrics[name] == pytest.approx(value) if value >= 0 else math.isnan(metrics[name]), name
        precision = expected.eval["precision"][:, :, :, 0, -1].mean((0, 1))
        assert [metrics["AP/cat"], metrics["AP/dog"]] == pytest.approx(precision.tolist()) and metrics[
            "AP/cat"
        ] != metrics["AP/dog"]
        assert 0.1 < metrics["AP"] < 0.9 and metrics["AP"] == pytest.approx((metrics["AP/cat"] + metrics["AP/dog"]) / 2)

    @pytest.mark.parametrize("seed", range(6))
    def test_metrics_equal_those_of_pycocotools(self, tmp_path: Path, seed: int) -> None:
        """Include crowds, areas that do not match the boxes, empty boxes, boxes outside the image, and equal scores."""
        pil, api, evaluation = (
            pytest.importorskip(name) for name in ("PIL.Image", "pycocotools.coco", "pycocotools.cocoeval")
        )
        rng, ids = np.random.default_rng(seed), [-5, 4, 90]
        content = {"images": [], "annotations": [], "categories": [{"id": id, "name": f"{id}"} for id in ids]}
        found = []
        for n in range(12):
            pil.new("RGB", (300, 240)).save(tmp_path / f"{n}.png")
            content["images"].append({"id": f"image {n}", "file_name": f"{n}.png", "width": 300, "height": 240})
            found.append([])
            for _ in range(rng.integers(9)):
                x, y, w, h = rng.uniform([-40, -40, 4, 4], [290, 230, 160, 160])
                w, h = w * (rng.random() > 0.2), h * (rng.random() > 0.1)
                if rng.random() < 0.4:  # with whole numbers, an IoU may equal a threshold
                    x, y, w, h = np.rint([x, y, w, h])
                label = int(rng.integers(3))
                item = {"id": len(content["annotations"]) + 1, "image_id": f"image {n}", "category_id": ids[label]}
                item |= {"bbox": [float(x), float(y), float(w), float(h)], "area": rng.uniform(1, 12000)}
                content["annotations"].append(item | {"iscrowd": int(rng.random() < 0.2)})
                for _ in range(rng.integers(4)):
                    near = np.array([x, y, x + w, y + h]) + rng.normal(0, 1, 4) * rng.choice([0, 2, 6])
                    score = rng.choice([rng.random(), 0.5, 0.25])
                    found[-1].append((near.tolist(), float(score), label if rng.random() < 0.8 else 1))
            found[-1].sort(key=lambda item: -item[1])
        (tmp_path / "annotations").mkdir()
        file = tmp_path / "annotations" / "instances_val.json"
        file.write_text(json.dumps(content))

        with pytest.warns(UserWarning, match="Training ignores invalid boxes"):
            data = open_data(f"coco:{tmp_path}", "test")
        evaluator = Evaluator(data)
        for annotation, detections in zip(data.annotations(), found):
            evaluator.add(batch_of([annotation.image_id]), detections_of(detections))
        metrics = evaluator.summarize()

        truth = api.COCO(str(file))
        (tmp_path / "results.json").write_text(json.dumps(evaluator.coco_results()))
        expected = evaluation.COCOeval(truth, truth.loadRes(str(tmp_path / "results.json")), "bbox")
        expected.evaluate(), expected.accumulate(), expected.summarize()
        assert 0.1 < metrics["AP"] < 0.6
        for name, value in zip(METRICS, expected.stats, strict=False):
            assert metrics[name] == pytest.approx(value, abs=1e-9) if value >= 0 else math.isnan(metrics[name]), name
        per_class = expected.eval["precision"][:, :, :, 0, -1].mean((0, 1))
        assert [metrics[f"AP/{id}"] for id in ids] == pytest.approx(per_class.tolist(), abs=1e-9)

    def test_large_ids_are_distinguished(self, tmp_path: Path) -> None:
        pil = pytest.importorskip("PIL.Image")
        content = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "cat"}]}
        for i in range(2):
            pil.new("RGB", (300, 240)).save(tmp_path / f"{i}.png")
            content["images"].append({"id": 2**53 + i, "file_name": f"{i}.png", "width": 300, "height": 240})
            item = {"id": i + 1, "image_id": 2**53 + i, "category_id": 1, "bbox": [10 + 100 * i, 20, 40, 40]}
            content["annotations"].append(item)
        (tmp_path / "val.json").write_text(json.dumps(content))
        evaluator = Evaluator(open_data(f"coco:{tmp_path}", "test"))
        found = detections_of([(box(110), 0.9, 0)], [(box(10), 0.9, 0)])  # fits the object of the other image
        evaluator.add(batch_of([2**53, 2**53 + 1]), found)
        assert evaluator.summarize()["AP"] == 0
        assert [result["image_id"] for result in evaluator.coco_results()] == [2**53, 2**53 + 1]

    def test_mask_metrics_equal_those_of_pycocotools(self, tmp_path: Path) -> None:
        """Objects with empty masks count as missed."""
        pil, api, evaluation = (
            pytest.importorskip(name) for name in ("PIL.Image", "pycocotools.coco", "pycocotools.cocoeval")
        )
        rng = np.random.default_rng(0)
        content = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "cat"}]}
        found = []
        for n in range(8):
            pil.new("RGB", (100, 80)).save(tmp_path / f"{n}.png")
            content["images"].append({"id": n, "file_name": f"{n}.png", "width": 100, "height": 80})
            found.append([])
            for _ in range(6):
                x, y, w, h = (float(v) for v in rng.uniform([0, 0, 8, 8], [70, 50, 30, 30]))
                square = [[x, y, x + w, y, x + w, y + h, x, y + h]]
                segmentation = square if rng.random() < 0.7 else {"size": [80, 100], "counts": [8000]}
                item = {"id": len(content["annotations"]) + 1, "image_id": n, "category_id": 1, "bbox": [x, y, w, h]}
                item |= {"segmentation": segmentation, "area": w * h, "iscrowd": int(rng.random() < 0.2)}
                content["annotations"].append(item)
                near = np.array([x, y, x + w, y + h]) + rng.normal(0, 1, 4)
                found[-1].append((near.tolist(), rng.random(), 0))
            found[-1].sort(key=lambda item: -item[1])
        file = tmp_path / "val.json"
        file.write_text(json.dumps(content))
        with pytest.warns(UserWarning, match="an RLE of zeros"):
            evaluator = Evaluator(open_data(f"coco:{tmp_path}", "test"))
        for n, detections in enumerate(found):
            evaluator.add(batch_of([n]), detections_of(detections, masks=torch.ones(1, 7, 28, 28)))
        metrics = evaluator.summarize()
        truth = api.COCO(str(file))
        results = [{k: v for k, v in result.items() if k != "bbox"} for result in evaluator.coco_results()]
        expected = evaluation.COCOeval(truth, truth.loadRes(results), "segm")
        expected.evaluate(), expected.accumulate(), expected.summarize()
        assert 0.1 < metrics["mask_AP"] < 0.9
        assert metrics["mask_AP"] == pytest.approx(expected.stats[0], abs=1e-9)
        assert metrics["mask_AR_100"] == pytest.approx(expected.stats[8], abs=1e-9)

    def test_boxes_that_are_not_finite_are_missed(self) -> None:
        data = FixedData([(box(10), 0), ([math.nan, 0, 5, 5], 0), ([0, 0, math.inf, 5], 0), ([0, 0, 5, math.nan], 0)])
        evaluator = evaluated(data, [(box(10), 0.9, 0), ([0, 0, 5, 5], 0.8, 0)])
        assert evaluator.summarize()["AR_100"] == 0.25 and evaluator.voc()["AP/cat"] == 0.25

    def test_objects_without_a_mask_count_only_for_boxes(self) -> None:
        data = FixedData([(box(10), 0), (box(100), 0)], masks=True)
        annotations = data.annotations()
        annotations[0].masks[1] = None
        data.annotations = lambda: annotations
        evaluator = Evaluator(data)
        found = detections_of([(box(10), 0.8, 0), (box(100), 0.9, 0)], masks=torch.ones(1, 3, 28, 28))
        evaluator.add(batch_of([10]), found)
        metrics = evaluator.summarize()
        assert metrics["AP"] == pytest.approx(1) and metrics["mask_AP"] == pytest.approx(1)
        evaluator.add(batch_of([10]), detections_of([(box(100), 0.9, 0)], masks=torch.ones(1, 2, 28, 28)))
        assert evaluator.summarize()["mask_AP"] == 0  # the only object with a mask is missed

    def test_mask_metrics_use_the_iou_of_masks(self) -> None:
        evaluator = Evaluator(FixedData([(box(10), 0), (box(100), 1)], [], masks=True))
        masks = torch.ones(2, 3, 28, 28)
        masks[0, 1, 14:] = 0  # only the upper half of the dog is detected
        found = detections_of([(box(20, 40, 80), 0.9, 0), (box(200, 40, 80), 0.8, 1)], [], masks=masks)
        evaluator.add(batch_of([10, 11], [(2.0, 2.0)] * 2), found)
        metrics = evaluator.summarize()
        assert metrics["AP"] == pytest.approx(1)
        assert metrics["mask_AP/cat"] == pytest.approx(1) and metrics["mask_AP/dog"] == pytest.approx(0.1)  # IoU 0.5
        assert metrics["mask_AP50"] == pytest.approx(1) and metrics["mask_AP75"] == pytest.approx(0.5)
        assert all(
            isinstance(r["segmentation"]["counts"], str) for r in json.loads(json.dumps(evaluator.coco_results()))
        )


class TestPlots:
    image = np.full((60, 80, 3), 90, np.uint8)

    def test_boxes_and_names_are_drawn(self) -> None:
        pytest.importorskip("PIL")
        boxes, scores = np.array([[20, 25, 60, 50], [5, 5, 15, 55]], np.float32), np.array([0.9, 0.8])
        picture = np.array(draw_detections(self.image, boxes, np.array([1, -1]), scores, ["cat", "dog"]))
        assert picture.shape == self.image.shape and (self.image == 90).all()
        changed = (picture != 90).any(-1)
        assert changed[25, 20:61].all() and changed[50, 20:61].all() and changed[25:51, 20].all()
        assert not changed[30:45, 25:55].any() and not changed[:, :20].any()
        both = np.array(draw_detections(self.image, boxes, np.array([1, 0]), scores, ["a", "b"]))
        assert np.array_equal(both[50, 30], picture[50, 30]) and not np.array_equal(both[50, 5], picture[50, 30])

    def test_masks_are_drawn(self) -> None:
        pytest.importorskip("PIL")
        mask = np.zeros((1, 60, 80), bool)
        mask[0, 35:40, 35:45] = True
        boxes, scores, labels = np.array([[20, 25, 60, 50]]), np.array([0.9]), np.array([0])
        picture = np.array(draw_detections(self.image, boxes, labels, scores, ["cat"], mask))
        inside = (picture[30:46, 25:56] != 90).any(-1)
        assert np.array_equal(inside, mask[0, 30:46, 25:56]) and (self.image == 90).all()

    @pytest.mark.parametrize("lines", ["both", "training", "evaluation", "none"])
    def test_curves_are_plotted(self, tmp_path: Path, lines: str) -> None:
        pytest.importorskip("matplotlib")
        training = [
            {"iteration": i, "minutes": i / 60, "loss": 3 / i, "losses": {"rpn": 1 / i, "box": 2 / i}, "lr": 0.1}
            for i in range(1, 50)
        ] + [{"iteration": 50, "minutes": 1, "loss": math.nan, "losses": {"rpn": math.nan}, "lr": 0.1}]
        evaluation = [{"iteration": i, "minutes": i / 60, "AP": i / 100, "AP50": i / 60} for i in (20, 40)]
        log = {"both": training + evaluation, "training": training, "evaluation": evaluation, "none": []}[lines]
        plot_curves(log, str(tmp_path / "curves.png"))
        assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("module", ["faster_coco_eval", "PIL.Image", "matplotlib.figure"])
def test_missing_package_is_an_error(module: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    calls = {
        "faster_coco_eval": lambda: Evaluator(FixedData([])).summarize(),
        "PIL.Image": lambda: draw_detections(TestPlots.image, np.zeros((0, 4)), np.zeros(0, int), np.zeros(0), []),
        "matplotlib.figure": lambda: plot_curves([], str(tmp_path / "x.png")),
    }
    with pytest.raises(ImportError, match=r"pip install 'relops\[train\]'"):
        calls[module]()
