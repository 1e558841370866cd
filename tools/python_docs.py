"""Write lmbook/data/python_docs.txt: the paragraphs of Python's documentation that are the same in every release given.

    python -m tools.python_docs 3.11.2=FILE 3.11.7=FILE 3.12.1=FILE ...

Each FILE is the `pydoc_data/topics.py` of that release; it is parsed, not run. The more releases, the better: what has
stayed the same in all of them will most likely be in the next one too. The first release gives the topics and the order of their
paragraphs. What stands in several
topics is listed once, in the shortest of them. Only digests are written, never the text.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Mapping
from pathlib import Path

from lmbook.corpora import help_paragraphs, paragraph_digest

LIST = Path(__file__).resolve().parent.parent / "lmbook" / "data" / "python_docs.txt"


def read_topics(path: str | Path) -> dict[str, str]:
    "The topics of a `pydoc_data/topics.py`, of whichever Python."
    return ast.literal_eval(ast.parse(Path(path).read_text(encoding="utf-8")).body[-1].value)


def is_label(paragraph: str) -> bool:
    "`Note:` and the like, which mean nothing without what follows."
    return paragraph.endswith(":") and len(paragraph.split()) <= 2


def listed(releases: Mapping[str, Mapping[str, str]], shortest: int = 100) -> dict[str, list[str]]:
    # by topic, in the order of the first release
    "The paragraphs that all `releases` have, each once; topics of which fewer than `shortest` characters are left go out."
    common = set.intersection(*({p for text in topics.values() for p in help_paragraphs(text)} for topics in releases.values()))
    common = {p for p in common if not is_label(p)}
    first = next(iter(releases.values()))
    found = {}
    for topic in sorted(first, key=lambda topic: (len(first[topic]), topic)):
        found[topic] = [p for p in dict.fromkeys(help_paragraphs(first[topic])) if p in common]
        common -= set(found[topic])
    return {topic: found[topic] for topic in sorted(found) if sum(map(len, found[topic])) >= shortest}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("release", nargs="+", help="VERSION=FILE: a pydoc_data/topics.py")
    releases = {version: read_topics(path) for version, path in (arg.split("=", 1) for arg in parser.parse_args().release)}
    found = listed(releases)
    digests = {topic: [paragraph_digest(p) for p in paragraphs] for topic, paragraphs in found.items()}
    lines = [
        f"# the same in: {' '.join(releases)}",
        "# (written by tools/python_docs.py: a topic of help, and a digest of each of its paragraphs)",
    ]
    lines += [" ".join([topic, *row]) for topic, row in digests.items()]
    LIST.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
    print(
        f"{len(found)} topics, {sum(map(len, found.values()))} paragraphs, {sum(len(p) for row in found.values() for p in row):,} "
        "characters"
    )


if __name__ == "__main__": main()
