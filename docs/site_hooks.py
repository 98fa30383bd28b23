"""What the site needs beyond MkDocs: maths without scripts, pages that are not there yet left out of the menu, result files beside the pages."""

from __future__ import annotations

import html
import posixpath
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
RESULTS = "benchmarks/results"
FORMULA = re.compile(r'<(span|div) class="arithmatex">\s*\\[(\[](.*?)\\[)\]]\s*</\1>', re.DOTALL)
OUTSIDE = re.compile(r"(!?\[[^\]]*\])\(((?:\.\./)+)(benchmarks/results/[^)\s]+)\)")
SHIM = re.compile(r"https://unpkg\.com/iframe-worker/shim")
ROLE = re.compile(r":(?:func|class|mod|meth|data|attr):<code>~?([^<]*)</code>")
PLAIN_ROLE = re.compile(r":(?:func|class|mod|meth|data|attr):`~?([^`]*)`")


def on_config(config: Any) -> Any:
    """Expand ``folder/*.md`` in the menu; leave out pages that do not exist (yet)."""
    config["nav"] = _existing(config["nav"], Path(config["docs_dir"]))
    return config


def _existing(nav: list[Any], folder: Path) -> list[Any]:
    kept: list[Any] = []
    for entry in nav:
        (title, target), *_ = entry.items() if isinstance(entry, dict) else [("", entry)]
        if isinstance(target, list):
            kept.append({title: _existing(target, folder)})
        elif "*" in target:
            pages = sorted(path.relative_to(folder).as_posix() for path in folder.glob(target))
            kept.append({title: pages})
        elif (folder / target).is_file():
            kept.append(entry)
    return kept


def on_files(files: Any, config: Any) -> Any:
    """Result files that pages quote are part of the site."""
    for path in sorted((ROOT / RESULTS).rglob("*")):
        if path.is_file():
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links to result files stay inside the site."""
    here = posixpath.dirname(page.file.src_uri)
    return OUTSIDE.sub(lambda m: f"{m[1]}({posixpath.relpath(m[3], here or '.')})", markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Formulas as MathML; Sphinx roles of docstrings as code."""
    content = PLAIN_ROLE.sub(lambda m: m[1], ROLE.sub(lambda m: f"<code>{m[1]}</code>", content))
    return FORMULA.sub(lambda m: convert(html.unescape(m[2]), display="block" if m[1] == "div" else "inline"), content)


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """The search of pages that are opened as files needs no network either."""
    return SHIM.sub(posixpath.relpath("offline_worker.js", posixpath.dirname(page.file.dest_uri) or "."), output)


def on_post_template(output_content: str, template_name: str, config: Any) -> str:
    return SHIM.sub("offline_worker.js", output_content)
