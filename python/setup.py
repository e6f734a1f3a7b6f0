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
            copies = pathlib.Path(self.build_lib, 'colt5', 'include')
            shutil.rmtree(copies, ignore_errors=True)  # of an earlier build: it may have headers that are gone
            shutil.copytree(HEADERS, copies)


setup(cmdclass={'build_py': BuildWithHeaders})
