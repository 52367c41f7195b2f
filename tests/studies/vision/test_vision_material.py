"""The vision study's splits, from made-up packages."""

import hashlib
import io
import json
import tarfile
import zipfile
from dataclasses import replace

import pytest
import torch
from PIL import Image

from studies.vision import material, pictures
from studies.vision.material import LEARNED
from studies.vision.packages import PHOTOGRAPHS, TEXTILES, VENDORS
from tests.helpers.vision_study import model

CATEGORIES = ("Symbols", "Objects", *material.KEPT, "Flags")


def png(*color, size=(64, 64)):
    buffer = io.BytesIO()
    Image.new("RGBA", size, color).save(buffer, "png")
    return buffer.getvalue()


def archive(vendor, blue):
    """Six emoji of each category in two subcategories; the number of an emoji is its color."""
    buffer = io.BytesIO()
    entries, files = [], {}
    for number in range(6 * len(CATEGORIES)):
        category = CATEGORIES[number // 6]
        entry = {"unified": f"{number:04X}", "image": f"{number}.png", "category": category}
        entries.append({**entry, "subcategory": f"{category} {number % 2}"})
        files[f"package/img/{vendor}/64/{number}.png"] = png(number, 0, blue, 255)
    entries.append({**entries[0], "unified": "FFFF", "image": "alone.png"})
    if vendor == "google":
        files["package/img/google/64/alone.png"] = png(255, 0, blue, 255)
    files["package/emoji.json"] = json.dumps(entries).encode()
    with tarfile.open(fileobj=buffer, mode="w:gz") as made:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            made.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def zipped(names):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as made:
        for place, name in enumerate(names):
            made.writestr(name, png(0, 10 + place, 0, 255, size=(90, 60)))
    return buffer.getvalue()


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """A folder of packages, and small numbers of everything."""
    textiles = [f"x/simulated/{kind}/{n}.jpg" for kind in pictures.KINDS for n in range(3)]
    made = {
        **{name: archive(name, blue) for name, blue in zip(VENDORS, (100, 200), strict=True)},
        "textiles": zipped(textiles),
        "photographs": zipped([f"skimage/data/{name}" for name in pictures.SCENES]),
    }
    known = {**VENDORS, "textiles": TEXTILES, "photographs": PHOTOGRAPHS}
    published = {n: replace(known[n], sha256=hashlib.sha256(data).hexdigest()) for n, data in made.items()}
    for name, package in published.items():
        (tmp_path / package.file).write_bytes(made[name])
    for module in (material, pictures):
        monkeypatch.setattr(module, "VENDORS", {name: published[name] for name in VENDORS})
        monkeypatch.setattr(module, "TEXTILES", published["textiles"])
        monkeypatch.setattr(module, "PHOTOGRAPHS", published["photographs"])
    small = {"ENOUGH": 3, "HELD_OUT": 4, "KEPT_EACH": 2, "FITTED": 6, "PROBED": 16, "TEXTILES_EACH": 2}
    for name, value in {**small, "CROPS_EACH": 1}.items():
        monkeypatch.setattr(material, name, value)
    monkeypatch.setenv("IPCA_STUDY_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_no_emoji_is_on_two_sides(packages):
    found = material.task_images(model(), packages)

    def numbers(images):
        return [set(pair[:, 0, 40, 40].tolist()) for pair in images.split(2)]

    sides = [numbers(images) for images in (found.train, found.new, found.kept["emoji"])]
    assert all(len(pair) == 1 for side in sides for pair in side), "an emoji's two pictures are neighbors"
    learned, held_out, kept = (set().union(*side) for side in sides)
    assert len(held_out) == 4
    assert learned | held_out == set(range(12)), "of the two learned categories, and drawn by both vendors"
    assert not learned & held_out
    assert kept < set(range(12, 36)), "of the kept categories; flags are in neither"
    assert not set(LEARNED) & set(material.KEPT)
    assert found.labels.bincount().tolist() == [
        2 * sum(2 * (CATEGORIES[n // 6] == "Symbols") + n % 2 == place for n in learned) for place in range(4)
    ]
    assert found.groups.bincount().tolist() == [4] * 4
    assert found.groups[: found.fitted].unique().tolist() == [0, 1, 2, 3], "every category fits and tests the probe"
    assert {name: len(images) for name, images in found.kept.items()} == {"photos": 7, "emoji": 16, "textiles": 6}


def test_the_same_packages_give_the_same_images(packages, monkeypatch):
    first = material.task_images(model(), packages)
    monkeypatch.setenv("IPCA_STUDY_CACHE", str(packages / "other"))
    assert material.task_images(model(), packages).sha256() == first.sha256()


def test_what_is_transparent_becomes_white():
    clear = pictures._tensor(Image.new("RGBA", (64, 64), (200, 0, 0, 0)))
    assert torch.equal(clear, torch.full((3, pictures.SIDE, pictures.SIDE), 255, dtype=torch.uint8))
