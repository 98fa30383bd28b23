"""A corpus of real texts through the demo model: tokens per second against the plain forward pass, then the paper's
findings.

    python benchmarks/corpus.py --fortunes /usr/share/games/fortunes --texts 300 --out FOLDER

Domains: fortunes in English; German, Spanish, Italian and Russian, half fortunes (Debian's packages fortunes,
fortunes-de, …; folders "off" are left out) and half paragraphs of manual pages (manpages-de, …); French manual pages;
functions of Python's own library, additions and subtractions. Writes the run into FOLDER/run, the report into
FOLDER/report, and the speed into benchmarks/results/corpus-<device>-<n>-cores.json.
"""

from __future__ import annotations

import argparse
import ast
import gzip
import json
import random
import re
import statistics
import sysconfig
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
ENGLISH = (
    "computers",
    "wisdom",
    "science",
    "education",
    "literature",
    "law",
    "medicine",
    "people",
    "work",
    "miscellaneous",
)
GERMAN = (
    "sprichworte",
    "zitate",
    "murphy",
    "computer",
    "mathematiker",
    "tips",
    "wusstensie",
    "anekdoten",
    "namen",
    "regeln",
    "woerterbuch",
)
LONGEST = 420  # characters
# where a manual page is still English
UNTRANSLATED = {"the", "of", "and", "to", "is", "are", "be", "with", "which", "this", "for", "that"}


def fortunes(root: Path, language: str, count: int, rng: random.Random) -> list[str]:
    folder = (
        root
        if language == "english"
        else root / {"german": "de", "spanish": "es", "italian": "it", "russian": "ru"}[language]
    )
    names = {"english": ENGLISH, "german": GERMAN}.get(language)
    files = [
        p
        for p in sorted(folder.glob("*"))
        if p.is_file() and p.suffix in ("", ".fortunes") and (names is None or p.name in names)
    ]
    found: list[str] = []
    for file in files:
        raw = file.read_bytes()
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            text = raw.decode({"russian": "koi8-r"}.get(language, "latin-1"))
        found += [t.strip() for t in text.split("\n%") if 80 <= len(t.strip()) <= LONGEST]
    return rng.sample(found, min(count, len(found)))


def manpages(root: Path, code: str, count: int, rng: random.Random) -> list[str]:
    """Paragraphs of manual pages as running text: lines of roff without its requests and escapes."""
    found: set[str] = set()
    for file in sorted((root / code).glob("man*/*.gz")):
        raw = gzip.decompress(file.read_bytes()).decode(errors="ignore")
        for block in re.split(r"(?m)^[.'].*$", raw):
            text = re.sub(r"\\f(\[[^]]*\]|\(..|.)|\\&|\\s[-+]?\d", "", " ".join(block.split()))
            text = (
                re.sub(r"\\\((?:aq|cq|oq)|\\\[(?:aq|cq|oq)\]", "'", text)
                .replace("\\-", "-")
                .replace("\\ ", " ")
                .replace("\\(em", "—")
            )
            words = text.lower().split()
            if sum(word in UNTRANSLATED for word in words) > 0.06 * len(words):
                continue
            if (
                80 <= len(text) <= LONGEST
                and "\\" not in text
                and sum(c.isalpha() or c.isspace() for c in text) > 0.85 * len(text)
            ):
                found.add(text)
    return rng.sample(sorted(found), min(count, len(found)))


def functions(count: int, rng: random.Random) -> list[str]:
    found: list[str] = []
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        source = file.read_text(encoding="utf-8", errors="ignore")
        try:
            nodes = ast.walk(ast.parse(source))
        except SyntaxError:
            continue
        pieces = (ast.get_source_segment(source, node) for node in nodes if isinstance(node, ast.FunctionDef))
        found += [p for p in pieces if p and 120 <= len(p) <= LONGEST]
    return rng.sample(found, min(count, len(found)))


def arithmetic(sign: str, count: int, rng: random.Random) -> list[str]:
    def one() -> str:
        a, b = rng.randrange(10, 1000), rng.randrange(10, 1000)
        a, b = (a, b) if sign == "+" else (max(a, b), min(a, b))
        return f"{a} {sign} {b} = {a + b if sign == '+' else a - b}"

    return ["\n".join(one() for _ in range(8)) for _ in range(count)]


def texts(root: Path, manuals: Path, count: int, seed: int = 0) -> dict[str, list[str]]:
    rng = random.Random(seed)
    found = {"english": fortunes(root, "english", count, rng)}
    for name, code in (("german", "de"), ("spanish", "es"), ("italian", "it"), ("russian", "ru"), ("french", "fr")):
        told = [] if name == "french" else fortunes(root, name, count // 2, rng)
        found[name] = told + manpages(manuals, code, count - len(told), rng)
    return found | {
        "code": functions(count, rng),
        "addition": arithmetic("+", count, rng),
        "subtraction": arithmetic("-", count, rng),
    }


def speed(model, tokenizer, sources: dict[str, list[str]], repeats: int = 3) -> dict[str, float]:  # type: ignore[no-untyped-def]
    """Seconds of a window of texts: with everything that corpus() does but writing, and the plain forward pass on
    the same batches.
    """
    import tempfile

    import flowroutes_fast as fr
    from flowroutes_fast.bench.harness import clock
    from flowroutes_fast.corpora.run import Item, batches

    chosen = [text for texts in sources.values() for text in texts[:4]]
    items = [Item(n, 0, t, "", tokenizer(t)["input_ids"], []) for n, t in enumerate(chosen)]

    def forward() -> None:
        for batch in batches(items, 2048):
            longest = max(len(i.ids) for i in batch)
            ids = torch.tensor([i.ids + i.ids[-1:] * (longest - len(i.ids)) for i in batch])
            mask = torch.tensor([[1] * len(i.ids) + [0] * (longest - len(i.ids)) for i in batch])
            with torch.no_grad():
                model(ids, attention_mask=mask, use_cache=False, logits_to_keep=1)

    def traced() -> None:
        with tempfile.TemporaryDirectory() as folder:
            fr.corpus(model, tokenizer, chosen, Path(folder) / "run")

    forward()
    pairs = [(clock(forward), clock(traced)) for _ in range(repeats)]
    tokens = sum(len(i.ids) for i in items)
    plain, ours = (statistics.median(p[n] for p in pairs) for n in (0, 1))
    share = statistics.median(p[0] / p[1] for p in pairs)
    return {
        "texts": len(items),
        "tokens": tokens,
        "forward tokens/s": tokens / plain,
        "corpus tokens/s": tokens / ours,
        "corpus / forward": share,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fortunes", type=Path, default=Path("/usr/share/games/fortunes"))
    parser.add_argument("--manuals", type=Path, default=Path("/usr/share/man"))
    parser.add_argument("--texts", type=int, default=300, help="per domain")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--speed-only", action="store_true")
    arguments = parser.parse_args()
    import flowroutes_fast as fr
    from flowroutes_fast.analysis import analyze
    from flowroutes_fast.bench.harness import conditions

    sources = texts(arguments.fortunes, arguments.manuals, arguments.texts)
    print({name: len(found) for name, found in sources.items()}, flush=True)
    model, tokenizer = fr.load("demo")
    report = {"conditions": conditions("cpu", "cpu"), "speed": speed(model, tokenizer, sources)}
    print(json.dumps(report["speed"]), flush=True)
    name = f"corpus-{report['conditions']['device']}-{torch.get_num_threads()}-cores".replace(" ", "-").lower()
    (ROOT / "benchmarks" / "results" / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    if arguments.speed_only:
        return
    run = fr.corpus(model, tokenizer, sources, arguments.out / "run", progress=True)
    print(run)
    print(
        analyze(
            run, arguments.out / "report", model=model, tokenizer=tokenizer, general="english", tagged_domain="english"
        )
    )


if __name__ == "__main__":
    main()
