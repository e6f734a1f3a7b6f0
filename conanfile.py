# SPDX-License-Identifier: MIT
"""`conan create . --build=missing -s compiler.cppstd=20` makes the package, and builds and runs a program with it. The target colt5::cuda
is in the CMake package alone."""
import os

from conan import ConanFile
from conan.tools.build import check_min_cppstd
from conan.tools.files import copy, load
from conan.tools.layout import basic_layout


class Colt5(ConanFile):
    name = 'colt5'
    description = 'Conditional computation of CoLT5: long-range transformer blocks with routed tokens'
    license = 'MIT'
    topics = ('transformer', 'attention', 'routing', 'header-only')
    package_type = 'header-library'
    settings = 'os', 'arch', 'compiler', 'build_type'
    options = {'openmp': [True, False]}
    default_options = {'openmp': True}
    exports = 'VERSION'
    exports_sources = 'include/*', 'LICENSE'
    no_copy_source = True
    test_package_folder = 'tests/consume/conan'

    def set_version(self):
        self.version = load(self, os.path.join(self.recipe_folder, 'VERSION')).strip()

    def requirements(self):
        self.requires('eigen/[>=3.4 <6]', transitive_headers=True)
        self.requires('xsimd/[>=8.1]', transitive_headers=True)
        self.requires('nlohmann_json/[>=3.11 <4]', transitive_headers=True)

    def validate(self):
        check_min_cppstd(self, 20)

    def layout(self):
        basic_layout(self)

    def package(self):
        copy(self, 'LICENSE', self.source_folder, os.path.join(self.package_folder, 'licenses'))
        copy(self, '*', os.path.join(self.source_folder, 'include'), os.path.join(self.package_folder, 'include'))

    def package_id(self):
        self.info.clear()

    def package_info(self):
        self.cpp_info.bindirs = []
        self.cpp_info.libdirs = []
        if self.options.openmp:
            self.cpp_info.cxxflags = ['-fopenmp']
            self.cpp_info.exelinkflags = ['-fopenmp']
            self.cpp_info.sharedlinkflags = ['-fopenmp']
