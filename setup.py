"""Builds the native extension. Metadata lives in pyproject.toml; without a compiler the package installs all the
same.
"""

import contextlib
import ctypes
import glob
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile

from pybind11.setup_helpers import Pybind11Extension
from setuptools import find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = os.path.dirname(os.path.abspath(__file__))
X86 = platform.machine().lower() in ("x86_64", "amd64") and sys.maxsize > 2**32
INSTRUCTION_SETS = {"baseline": []}
if X86:
    INSTRUCTION_SETS["avx2"] = ["-mavx2", "-mfma"]
    INSTRUCTION_SETS["avx512"] = ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"]

# options that change figures, also where they are only given to the linker (-Ofast flushes small numbers to zero in the
# whole process)
WRONG = re.compile(
    r"-Ofast|-ffast-math|-funsafe-math-optimizations|-ffinite-math-only|-fassociative-math|-freciprocal-math|-fno-signed-zeros"
    r"|-ffp-model=(?:fast|aggressive)|-fapprox-func|-fno-honor-(?:nans|infinities)|-mrecip(?:=\S*)?|-mdaz-ftz"
)


def refuse_wrong_options():
    for name in ("CFLAGS", "CXXFLAGS", "CPPFLAGS", "LDFLAGS", "CC", "CXX", "LDSHARED", "LDCXXSHARED"):
        for option in os.environ.get(name, "").split():
            if WRONG.fullmatch(option):
                raise ValueError(f"{name} holds {option}, which makes figures wrong: take it out")


def find_nvcc():
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    path = [*(os.path.join(home, "bin") for home in homes), os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    return shutil.which("nvcc", path=os.pathsep.join(path))


def compile_cuda(directory):
    """Objects and link options of the CUDA kernels, or None without nvcc or where FLOWROUTES_CUDA=0. Whether there
    is a GPU does not matter.
    """
    nvcc = None if os.environ.get("FLOWROUTES_CUDA") == "0" or sys.platform != "linux" else find_nvcc()
    if nvcc is None:
        return None
    try:
        dry = subprocess.run(
            [nvcc, "--dryrun", "-x", "cu", "-c", "/dev/null"], capture_output=True, text=True, check=True
        ).stderr
        home = re.search(r"\bTOP=(.*)", dry).group(1).strip()
        folders = [
            os.path.join(home, *path)
            for path in (("lib64",), ("lib",), ("targets", f"{platform.machine()}-linux", "lib"))
        ]
        library = [
            path for path in (os.path.join(folder, "libcudart_static.a") for folder in folders) if os.path.exists(path)
        ]
        if not library:
            raise OSError(f"no libcudart_static.a under {home}")
        archs = os.environ.get("FLOWROUTES_CUDA_ARCHS")
        if not archs:
            known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
            archs = ";".join(arch for arch in ("80", "90", "100") if arch != "100" or "sm_100" in known)
        archs = re.split(r"[;, ]+", archs.strip())
        codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
        highest = max(archs, key=lambda arch: int(re.sub(r"\D", "", arch)))
        codes.append(f"-gencode=arch=compute_{highest},code=compute_{highest}")
        target = os.path.join(directory, "kernels_cuda.o")
        os.makedirs(directory, exist_ok=True)
        options = ["-std=c++17", "-O3", "--threads", "2", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
        subprocess.run([nvcc, *options, *codes, "-c", "csrc/kernels_cuda.cu", "-o", target], check=True)
    except (AttributeError, OSError, ValueError, subprocess.CalledProcessError) as error:
        print(f"\nflowroutes_fast: built without CUDA kernels ({error!r}).\n", file=sys.stderr)
        return None
    return [target, library[0]], ["-ldl", "-lrt", "-lpthread"]


class BuildNative(build_ext):
    """Compile the kernels once per instruction set and link the objects into one module."""

    def build_extension(self, ext):
        try:
            self.build_native(ext)
        except Exception as error:  # any toolchain failure: the reference backend serves
            self.remove_stale(ext)
            print(
                f"\nflowroutes_fast: the native extension was not built ({error}).\n"
                "The package works with the 'reference' backend; 'flowroutes doctor' says so too.\n",
                file=sys.stderr,
            )

    def build_native(self, ext):
        refuse_wrong_options()
        openmp = self.openmp()
        flags = ["-std=c++17", "-O3", "-fvisibility=hidden", "-Wall", *(openmp or ["-Wno-unknown-pragmas"])]
        for name, options in INSTRUCTION_SETS.items():
            try:
                ext.extra_objects += self.compiler.compile(
                    sorted(glob.glob("csrc/*_cpu.cpp")),
                    output_dir=f"{self.build_temp}/{name}",
                    include_dirs=["csrc"],
                    extra_postargs=[*flags, *options, f"-DFLOWROUTES_ISA={name}", "-fPIC"],
                )
            except Exception as error:
                if name == "baseline":
                    raise
                print(f"\nflowroutes_fast: built without {name} kernels ({error}).\n", file=sys.stderr)
            else:
                ext.define_macros.append((f"FLOWROUTES_{name.upper()}", None))
        cuda = compile_cuda(f"{self.build_temp}/cuda")
        if cuda:
            ext.extra_objects += cuda[0]
            ext.extra_link_args += cuda[1]
            ext.define_macros.append(("FLOWROUTES_CUDA", None))
        ext.extra_compile_args += flags
        ext.extra_link_args += [*openmp, *self.standard_library()]
        super().build_extension(ext)

    def openmp(self):
        """The options of OpenMP, or none where the compiler, its headers or its library lack it: the kernels then
        run on one thread.
        """
        with tempfile.TemporaryDirectory() as directory:
            source = os.path.join(directory, "openmp.cpp")
            with open(source, "w") as file:
                file.write("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n")
            try:
                objects = self.compiler.compile([source], output_dir=directory, extra_postargs=["-fopenmp", "-fPIC"])
                self.compiler.link_shared_object(
                    objects, os.path.join(directory, "openmp.so"), extra_postargs=["-fopenmp"], target_lang="c++"
                )
            except Exception as error:
                print(f"\nflowroutes_fast: built without OpenMP, for one thread ({error}).\n", file=sys.stderr)
                return []
        return ["-fopenmp"]

    def standard_library(self):
        """The option that links C++'s library where CXX is a driver of C, or nothing: such an extension would link,
        and not be imported.
        """
        with tempfile.TemporaryDirectory() as directory:
            source, library = os.path.join(directory, "throws.cpp"), os.path.join(directory, "throws.so")
            with open(source, "w") as file:
                file.write(
                    '#include <stdexcept>\nextern "C" void throws(int n) { if (n) throw std::runtime_error("n"); }\n'
                )
            try:
                objects = self.compiler.compile([source], output_dir=directory, extra_postargs=["-fPIC"])
                self.compiler.link_shared_object(objects, library, target_lang="c++")
                ctypes.CDLL(library, os.RTLD_NOW)
            except Exception:
                return [] if sys.platform == "darwin" else ["-lstdc++"]
        return []

    def remove_stale(self, ext):
        """An extension from an earlier build must not pass for this one."""
        name = self.get_ext_filename(self.get_ext_fullname(ext.name))
        for path in (self.get_ext_fullpath(ext.name), os.path.join(self.build_lib, name)):
            with contextlib.suppress(OSError):
                os.remove(path)

    def get_outputs(self):
        return [path for path in super().get_outputs() if os.path.exists(path)]

    def copy_extensions_to_source(self):
        built = [
            ext
            for ext in self.extensions
            if os.path.exists(self.get_ext_fullpath(ext.name))
            or os.path.exists(os.path.join(self.build_lib, self.get_ext_filename(self.get_ext_fullname(ext.name))))
        ]
        self.extensions, kept = built, self.extensions
        super().copy_extensions_to_source()
        self.extensions = kept


def elsewhere():
    """Where a build from a tree that cannot be written to puts its files."""
    if os.access(ROOT, os.W_OK):
        return {}
    folder = tempfile.mkdtemp(prefix="flowroutes_fast-")
    return {"build": {"build_base": folder}, "egg_info": {"egg_base": folder}}


setup(
    options=elsewhere(),
    ext_modules=[
        Pybind11Extension(
            "flowroutes_fast._native",
            ["csrc/bindings.cpp"],
            include_dirs=["csrc"],
            depends=glob.glob("csrc/*"),
        )
    ],
    cmdclass={"build_ext": BuildNative},
    packages=[
        *find_packages(include=["flowroutes_fast", "flowroutes_fast.*"], exclude=["flowroutes_fast.kernels"]),
        "flowroutes_fast.kernels",
    ],
    package_dir={"flowroutes_fast.kernels": "kernels"},
)
