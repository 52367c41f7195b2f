"""Builds the CUDA extension with the package where that is possible; ipca/_extension.py says how."""

import importlib.util
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# By its path: importing the package would import torch, which an isolated build does not have.
spec = importlib.util.spec_from_file_location("_extension", Path(__file__).parent / "ipca" / "_extension.py")
extension = importlib.util.module_from_spec(spec)
spec.loader.exec_module(extension)


class Build(build_ext):
    """Every extension of this package is that one."""

    def build_extension(self, ext):
        """Compile with nvcc."""
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


setup(ext_modules=extensions(), cmdclass={"build_ext": Build})
