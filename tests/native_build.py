"""The native extension built quickly: one instruction set, little optimised, objects kept by what they are made of."""

import hashlib
import subprocess
import sysconfig
from pathlib import Path

FLAGS = ("-std=c++17", "-O1", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-w")


def build(csrc: Path, target: Path, objects: Path, *options: str) -> None:
    """Build ``target`` from a folder of sources, kernels with these options; ``CalledProcessError`` where that
    fails.
    """
    import pybind11

    includes = [f"-I{folder}" for folder in (pybind11.get_include(), sysconfig.get_paths()["include"])]
    made = []
    kernels = [(file.stem, ["-DFLOWROUTES_ISA=baseline", *options]) for file in sorted(csrc.glob("*_cpu.cpp"))]
    for name, more in [*kernels, ("bindings", includes)]:
        command = ["g++", *FLAGS, *more, csrc / f"{name}.cpp"]
        text = subprocess.run([*command, "-E", "-P"], capture_output=True, check=True).stdout
        made.append(objects / f"{name}-{hashlib.sha256(text).hexdigest()[:16]}.o")
        if not made[-1].exists():
            subprocess.run([*command, "-c", "-o", made[-1]], check=True)
    subprocess.run(["g++", "-shared", "-fopenmp", *made, "-o", target], check=True)
