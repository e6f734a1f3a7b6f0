# SPDX-License-Identifier: MIT
"""Copies the headers of the C++ library into the package, so that it needs no checkout once it is installed."""
import pathlib
import shutil

from setuptools import setup
from setuptools.command.build_py import build_py

HEADERS = pathlib.Path(__file__).resolve().parent.parent / 'include'


class BuildWithHeaders(build_py):
    def run(self):
        super().run()
        if not self.editable_mode:  # an editable install reads those of the checkout
            shutil.copytree(HEADERS, pathlib.Path(self.build_lib, 'colt5', 'include'), dirs_exist_ok=True)


setup(cmdclass={'build_py': BuildWithHeaders})
