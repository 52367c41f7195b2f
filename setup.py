"""Build of the package: a check of the checkout, README's links, and the CUDA extension where its tools are found."""

import importlib.util
import os
import re
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).parent
LINKS = ("kernels", "csrc")
"""Folders of ``ipca`` that are symbolic links in git and plain folders in a source distribution."""


def load(name):
    """A module of the package by its path: importing ``ipca`` needs torch, which an isolated build does not have."""
    spec = importlib.util.spec_from_file_location(name, HERE / "ipca" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_links():
    """Exit where a symbolic link has become a text file: the package would be built without its kernels."""
    lost = [name for name in LINKS if not (HERE / "ipca" / name).is_dir()]
    if lost:
        paths = [f"ipca/{name}" for name in lost]
        copies = " && ".join(f"rm -f ipca/{name} && cp -r {name} ipca/{name}" for name in lost)
        sys.exit(
            f"{' and '.join(paths)} must be a folder each, by symbolic links that this copy of the sources has lost; "
            "the package would have no kernels. In a git checkout restore the links:\n"
            f"    git config core.symlinks true && rm -f {' '.join(paths)} && git checkout -- {' '.join(paths)}\n"
            "On Windows switch on Developer Mode first. In an archive without git copy the folders:\n"
            f"    {copies}"
        )


def readme(url, version):
    """README.md; with the repository's ``url`` its relative links point to the files of the tag ``version``."""
    text = (HERE / "README.md").read_text(encoding="utf-8")
    if not url:
        return text
    text = re.sub(r"(!\[[^]]*\]\()(?!\w+:|#)", rf"\g<1>{url}/raw/v{version}/", text)
    return re.sub(r"(\]\()(?!\w+:|#)", rf"\g<1>{url}/blob/v{version}/", text)


class Build(build_ext):
    """Compile the CUDA extension with nvcc."""

    def build_extension(self, ext):
        """Compile ``ipca._C``, the only extension."""
        archs = extension.architectures()
        print(f"ipca: compiling CUDA kernels for {', '.join(f'sm_{arch}' for arch in archs)}", flush=True)
        extension.compile_extension(Path(self.get_ext_fullpath(ext.name)), archs)


def extensions():
    """The CUDA extension, or nothing and a line in the build's log that says why."""
    wanted = extension.wanted()
    if wanted is False:
        return []
    try:
        extension.check_tools()
    except extension.CannotBuild as error:
        if wanted:
            sys.exit(f"IPCA_BUILD_CUDA=1, but the CUDA extension cannot be built. Missing: {error}")
        print(f"ipca: no CUDA extension in this build. Missing: {error}", flush=True)
        return []
    return [Extension("ipca._C", sources=[])]


check_links()
extension = load("_extension")
repository = os.environ.get("IPCA_REPOSITORY_URL", "").rstrip("/")
setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": Build},
    long_description=readme(repository, load("_version").__version__),
    long_description_content_type="text/markdown",
    project_urls={"Source": repository, "Issues": f"{repository}/issues"} if repository else {},
)
