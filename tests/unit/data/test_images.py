"""Images from every kind of source: the same data, split and measured alike, and each fault told with its place."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
import torch
from PIL import Image

from tests.images import digits, png, write_folder
from toolkit.config import ImageDataConfig
from toolkit.data.images import SUFFIXES, ImageData, ImageProcessor, image_classification, open_image, read_processor
from toolkit.data.rows import Unfit
from toolkit.errors import ConfigError, DataError, ModelError
from toolkit.predict.kinds import IMAGES

WANTED = ImageProcessor(28)


@pytest.fixture(scope="module")
def rows() -> list[tuple[bytes, str]]:
    return digits(20)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert digits(1)  # out of everybody's cache
    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path / "cache"))


def prepare(path: Path, wanted: ImageProcessor = WANTED, **settings: object) -> ImageData:
    return image_classification(ImageDataConfig(name=str(path), **settings), wanted)  # type: ignore[arg-type]


def refused(path: Path, *said: str, **settings: object) -> None:
    with pytest.raises(DataError) as error:
        prepare(path, **settings)
    for part in said:
        assert part in str(error.value)


def write_csv(file: Path, lines: list[tuple[str, str]]) -> Path:
    with file.open("w", newline="", encoding="utf-8") as out:
        csv.writer(out).writerows([("image", "label"), *lines])
    return file


def test_every_source_gives_the_same_splits_and_statistics(rows: list[tuple[bytes, str]], tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", rows)
    files = sorted(folder.rglob("*.png"))
    table = write_csv(folder / "table.csv", [(str(f.relative_to(folder)), f.parent.name) for f in files])
    lines = [json.dumps({"image": str(f), "label": int(f.parent.name)}) for f in files]
    (tmp_path / "table.jsonl").write_text("\n".join(lines), encoding="utf-8")
    columns = {"picture": [f.read_bytes() for f in files], "class": [f.parent.name for f in files]}
    pq.write_table(pa.table(columns), tmp_path / "bytes.parquet")
    hub = [{"bytes": data, "path": None} for data in columns["picture"]]
    pq.write_table(pa.table({"image": hub, "label": columns["class"]}), tmp_path / "hub.parquet")
    found = [
        prepare(folder),
        prepare(table),
        prepare(tmp_path / "table.jsonl"),
        prepare(tmp_path / "bytes.parquet", image="picture", label="class"),
        prepare(tmp_path / "hub.parquet"),
    ]
    first = found[0]
    assert first.labels == ("0", "1", "2", "3")
    assert {name: sum(counts.values()) for name, counts in first.facts["samples"].items()} == {
        "train": 56, "validation": 8, "test": 16,
    }  # fmt: skip
    for other in found[1:]:
        assert other.processor == first.processor
        for split in ("train", "validation", "test"):
            mine, theirs = getattr(first, split), getattr(other, split)
            assert (mine["image"][:], mine["label"][:]) == (theirs["image"][:], theirs["label"][:])


def test_statistics_are_of_the_training_split_alone(rows: list[tuple[bytes, str]], tmp_path: Path) -> None:
    data = prepare(write_folder(tmp_path / "folder", rows))
    pixels = torch.stack([data.processor.pixels(open_image(image)) for image in data.train["image"]]).double() / 255
    assert data.processor.channels == 1
    assert data.processor.mean[0] == pytest.approx(float(pixels.mean()), abs=1e-6)
    assert data.processor.std[0] == pytest.approx(float(pixels.std(correction=0)), abs=1e-6)
    # Held-out images of another kind change nothing of it.
    white = [(png(Image.fromarray(np.full((28, 28), 255 - n, np.uint8))), str(n % 4)) for n in range(8)]
    other = prepare(tmp_path / "folder", test=str(write_folder(tmp_path / "test", white)), test_share=0.2)
    again = prepare(tmp_path / "folder", test=str(write_folder(tmp_path / "test 2", digits(21)[20::21])))
    assert other.processor == again.processor
    normalised = data.processor.normalise(pixels * 255)
    assert float(normalised.mean()) == pytest.approx(0, abs=1e-4)
    assert float(normalised.std()) == pytest.approx(1, abs=1e-2)


def test_repeats_are_dropped_before_the_split_by_their_pixels(rows: list[tuple[bytes, str]], tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", rows)
    picture = open_image(rows[0][0])
    (folder / "0" / "again.bmp").write_bytes(png(picture, "BMP"))
    (folder / "0" / "coloured.png").write_bytes(png(picture.convert("RGB")))
    (folder / "1" / "torn.png").write_bytes(rows[45][0])  # which is a 2
    data = prepare(folder)
    assert (data.facts["duplicates_dropped"], data.facts["conflicts_dropped"]) == (2, 2)
    keys = [
        open_image(image).tobytes() for split in (data.train, data.validation, data.test) for image in split["image"]
    ]
    assert len(set(keys)) == len(keys) == 79


def test_given_splits_are_taken_and_leaks_dropped(rows: list[tuple[bytes, str]], tmp_path: Path) -> None:
    write_folder(tmp_path / "all" / "train", rows)
    write_folder(tmp_path / "all" / "test", rows[:2] + digits(22)[20:22])
    data = prepare(tmp_path / "all")
    assert len(data.test) == 4
    assert data.facts["leaks_dropped"] == 2
    assert any("also in validation or test" in warning for warning in data.facts["warnings"])


def test_channels_follow_from_the_training_images(rows: list[tuple[bytes, str]], tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", rows)
    red = np.zeros((30, 40, 3), np.uint8)
    red[:, :20, 0] = 200
    for number in range(9):
        red[number, 0, 1] = 255
        (folder / "3" / f"red{number}.png").write_bytes(png(Image.fromarray(red)))
    data = prepare(folder)
    assert data.processor.channels == 3
    assert data.processor.mean[0] > data.processor.mean[2]
    assert data.processor.pixels(open_image((folder / "3" / "red0.png").read_bytes())).shape == (3, 28, 28)
    assert prepare(folder, channels="grey").processor.channels == 1
    with pytest.raises(ConfigError, match=r"data\.channels grey has no effect"):
        prepare(folder, dataclasses.replace(WANTED, channels=3), channels="grey")


def test_faults_are_told_with_their_places(rows: list[tuple[bytes, str]], tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", rows)
    whole = png(Image.effect_noise((64, 64), 50))
    deep = png(Image.fromarray(np.arange(900, dtype=np.uint16).reshape(30, 30)))
    bad = {
        "cut.png": (whole[: len(whole) // 2], "it is damaged"),
        "empty.png": (b"", "it is empty"),
        "text.png": (b"no image", "it is no image that Pillow knows"),
        "deep.png": (deep, "of 8 bits"),
        "small.png": (png(Image.new("L", (40, 3))), "it has 40 x 3 pixels"),
    }
    for name, (data, _) in bad.items():
        (folder / "2" / name).write_bytes(data)
    data = prepare(folder)
    assert data.facts["unfit_dropped"] == 5
    for name, (_, why) in bad.items():
        assert any(name in warning and why in warning for warning in data.facts["warnings"]), name
    first = data.facts["stages"][0]
    assert (first["stage"], first["in"], first["out"], len(first["examples"])) == ("unfit", 85, 80, 5)
    assert [stage["out"] for stage in data.facts["stages"]] == [80, 80, 80, 80]
    for _ in range(2):  # when all are looked at, and when that is in the cache
        refused(folder, "5 images cannot be learnt from", "cut.png, because it is damaged", max_bad_rows=4)


def test_no_patient_is_parted(rows: list[tuple[bytes, str]], tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", rows)
    files = sorted(folder.rglob("*.png"))
    patient = {file.read_bytes(): f"patient {number % 11}" for number, file in enumerate(files)}
    with (folder / "table.csv").open("w", newline="", encoding="utf-8") as out:
        lines = [(str(file.relative_to(folder)), file.parent.name, patient[file.read_bytes()]) for file in files]
        csv.writer(out).writerows([("image", "label", "patient"), *lines])
    tested: list[bytes] = []
    for fold in range(3):
        data = prepare(folder / "table.csv", group="patient", folds=3, fold=fold)
        whose = [{patient[image] for image in part["image"]} for part in (data.train, data.validation, data.test)]
        assert len(set.union(*whose)) == sum(map(len, whose)) == 11
        tested += data.test["image"]
    assert len(tested) == len(set(tested)) == len(files)
    refused(folder / "table.csv", "has no column 'doctor'", "--data.group", group="doctor")
    refused(write_folder(tmp_path / "another", rows), "folders of images have no column 'patient'", group="patient")


def test_rows_of_tables_are_told_by_number(rows: list[tuple[bytes, str]], tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", rows)
    lines = [(str(file), file.parent.name) for file in sorted(folder.rglob("*.png"))]
    lines[6] = (str(folder / "nowhere.png"), "0")
    lines[9] = (lines[9][0], "")
    lines[11] = ("", "0")
    told = prepare(write_csv(tmp_path / "table.csv", lines)).facts["warnings"][0]
    assert f"row 7 of {tmp_path / 'table.csv'}, because there is no file {folder / 'nowhere.png'}" in told
    assert "row 10 of" in told
    assert "it has no label" in told
    assert "row 12 of" in told
    assert "it has no image" in told
    refused(tmp_path / "table.csv", "has no column 'class'", "it has 'image', 'label'", label="class")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    refused(tmp_path / "broken.parquet", "broken.parquet cannot be read")


def test_classes_that_are_missing_are_told(rows: list[tuple[bytes, str]], tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", rows)
    (folder / "9").mkdir()
    refused(folder, "the folder of class '9'", "has no image")
    (folder / "9" / "one.png").write_bytes(digits(1, "9")[0][0])
    refused(folder, "too few rows to be in each of 3 splits", "'9' (1)")
    test = write_folder(tmp_path / "test", digits(2, "0123") + digits(2, "8"))
    refused(write_folder(tmp_path / "train", rows), "the test split has rows of class '8'", test=str(test))
    flat = tmp_path / "flat"
    flat.mkdir()
    (flat / "one.png").write_bytes(rows[0][0])
    refused(flat, "holds images without a class")
    refused(tmp_path / "nowhere", "there is no file or folder")


def test_the_second_call_loads_what_the_first_has_made(rows: list[tuple[bytes, str]], tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", rows)
    first, second = prepare(folder), prepare(folder)
    assert first.fingerprint == second.fingerprint
    assert len(list((tmp_path / "cache" / "data").glob("[0-9a-f]*"))) == 2  # the splits, and their statistics
    (folder / "0" / "0000.png").write_bytes(digits(21)[20][0])
    assert prepare(folder).fingerprint != first.fingerprint


def test_images_are_prepared_as_transformers_prepares_them(tmp_path: Path) -> None:
    from transformers import AutoImageProcessor

    picture = Image.effect_noise((70, 50), 80).convert("RGB")
    for processor in (
        ImageProcessor(32, 3, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)),
        ImageProcessor(32, 3, (0.5,) * 3, (0.5,) * 3, edge=40, resample=3),
        ImageProcessor(28, 1, (0.13,), (0.31,)),
    ):
        processor.save_pretrained(tmp_path)
        content = json.loads((tmp_path / "preprocessor_config.json").read_text(encoding="utf-8"))
        assert read_processor(content, "it") == processor
        given = picture if processor.channels == 3 else picture.convert("L")
        theirs = AutoImageProcessor.from_pretrained(tmp_path)(given, return_tensors="pt")["pixel_values"][0]
        ours = processor.normalise(processor.pixels(given))
        assert ours.shape == theirs.shape
        assert float((ours - theirs).abs().max()) < 1e-5


def test_processors_of_other_kinds(tmp_path: Path) -> None:
    from_minus_one = {"size": 16, "do_normalize": False, "rescale_factor": 1 / 127.5}
    assert read_processor(from_minus_one, "it").std == pytest.approx((0.5,) * 3)
    for unknown in ({}, {"size": {"height": 16, "width": 8}}, {"size": {"longest_edge": 5}, "image_mean": None}):
        with pytest.raises(ModelError, match="does not say how images are prepared"):
            read_processor(unknown, "it")


def test_modes_and_turns_of_files() -> None:
    picture = Image.effect_noise((12, 9), 60)
    turned = Image.Exif()
    turned[0x0112] = 6  # which is a quarter to the right
    assert open_image(png(picture.convert("RGB"), "JPEG", exif=turned)).size == (9, 12)
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    assert open_image(png(clear)).getpixel((3, 3)) == (255, 255, 255)
    for mode in ("1", "P", "CMYK", "LA"):
        kind = "JPEG" if mode == "CMYK" else "PNG"
        assert WANTED.pixels(open_image(png(picture.convert(mode), kind)), 3).shape == (3, 28, 28)
    with pytest.raises(Unfit, match="of 8 bits"):
        open_image(png(Image.new("F", (9, 9)), "TIFF"))


def test_what_a_folder_is_searched_for_is_what_is_predicted() -> None:
    assert IMAGES.suffixes == SUFFIXES
