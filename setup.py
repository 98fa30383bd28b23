"""Builds the native extension. Metadata lives in pyproject.toml; without a compiler the package installs all the same."""

import platform
import sys

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext

X86 = platform.machine().lower() in ("x86_64", "amd64")
INSTRUCTION_SETS = {"baseline": []}
if X86:
    INSTRUCTION_SETS["avx2"] = ["-mavx2", "-mfma"]
    INSTRUCTION_SETS["avx512"] = ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"]


class BuildNative(build_ext):
    """Compile proximity_cpu.cpp once per instruction set and link the objects into one module."""

    def build_extension(self, ext):
        flags = ["-std=c++17", "-O3", "-fvisibility=hidden", "-Wall"]
        openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
        try:
            for name, options in INSTRUCTION_SETS.items():
                ext.extra_objects += self.compiler.compile(
                    ["csrc/proximity_cpu.cpp", "csrc/certified_cpu.cpp"],
                    output_dir=f"{self.build_temp}/{name}",
                    include_dirs=["csrc"],
                    extra_postargs=[*flags, *openmp, *options, f"-DFLOWROUTES_ISA={name}", "-fPIC"],
                )
            ext.extra_compile_args += [*flags, *openmp]
            ext.extra_link_args += openmp
            super().build_extension(ext)
        except Exception as error:  # any toolchain failure: the reference backend serves
            print(
                f"\nflowroutes_fast: the native extension was not built ({error}).\n"
                "The package works with the 'reference' backend; 'flowroutes doctor' says so too.\n",
                file=sys.stderr,
            )

    def get_outputs(self):
        import os

        return [path for path in super().get_outputs() if os.path.exists(path)]

    def copy_extensions_to_source(self):
        import os

        built = [
            ext
            for ext in self.extensions
            if os.path.exists(self.get_ext_fullpath(ext.name))
            or os.path.exists(os.path.join(self.build_lib, self.get_ext_filename(self.get_ext_fullname(ext.name))))
        ]
        self.extensions, kept = built, self.extensions
        super().copy_extensions_to_source()
        self.extensions = kept


setup(
    ext_modules=[
        Pybind11Extension(
            "flowroutes_fast._native",
            ["csrc/bindings.cpp"],
            include_dirs=["csrc"],
            depends=["csrc/proximity.h", "csrc/simd.h", "csrc/rows.h", "csrc/proximity_cpu.cpp", "csrc/certified_cpu.cpp"],
        )
    ],
    cmdclass={"build_ext": BuildNative},
    packages=["flowroutes_fast", "flowroutes_fast.models", "flowroutes_fast.view", "flowroutes_fast.kernels"],
    package_dir={"flowroutes_fast.kernels": "kernels"},
)
