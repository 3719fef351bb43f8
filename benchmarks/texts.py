"""Texts for accuracy figures: Wikipedia articles and news of gensim's test data, word problems of reasoning-gym.

Nothing is installed: the wheel of gensim is unpacked under the cache folder (its texts: CC BY-SA).
"""

from __future__ import annotations

import bz2
import html
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO

REQUIREMENT = "gensim==4.4.0"
FOLDER = "gensim/test/test_data"
WIKI = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
NEWS = "lee_background.cor"
PARAGRAPH, ARTICLE, STORY = 200, 2000, 300  # shortest of each, in characters


def fetch(cache: Path) -> Path:
    """Folder with gensim's test texts, unpacked from its wheel at the first call."""
    folder = cache / "texts" / FOLDER
    if (folder / WIKI).exists() and (folder / NEWS).exists():
        return folder
    target = cache / "texts"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(target), REQUIREMENT]
    subprocess.run(command, check=True)
    with zipfile.ZipFile(next(target.glob("gensim-4.4.0-*.whl"))) as wheel:
        for name in (WIKI, NEWS):
            wheel.extract(f"{FOLDER}/{name}", target)
    return folder


def read_articles(folder: Path) -> list[str]:
    """Prose of the articles of the Wikipedia excerpt, in its order; redirects and stubs are left out."""
    with bz2.open(folder / WIKI) as dump:
        sources = list(_sources(dump))
    articles = [_prose(source) for source in sources if not source.lstrip().upper().startswith("#REDIRECT")]
    return [article for article in articles if len(article) > ARTICLE]


def read_news(folder: Path) -> list[str]:
    """News items, a line each."""
    lines = (folder / NEWS).read_text("utf-8", errors="ignore").splitlines()
    return [line.strip() for line in lines if len(line) > STORY]


def read_problems(count: int) -> list[list[dict[str, str]]]:
    """Grade-school word problems and their answers as chats."""
    import reasoning_gym

    rows = reasoning_gym.create_dataset("gsm_symbolic", size=count, seed=0)
    return [
        [{"role": "user", "content": r["question"]}, {"role": "assistant", "content": f"The answer is {r['answer']}."}]
        for r in rows
    ]


def _sources(dump: IO[bytes]) -> Iterator[str]:
    """Wiki source of every page of the main namespace; the dump was cut short, so it is no whole XML document."""
    page: dict[str, str] = {}
    with suppress(ElementTree.ParseError):  # its ragged end
        for _, element in ElementTree.iterparse(dump):
            tag = element.tag.rpartition("}")[2]
            if tag in ("ns", "text"):
                page[tag] = element.text or ""
            elif tag == "page":
                if page.get("ns") == "0":
                    yield page.get("text", "")
                page = {}
                element.clear()


INNERMOST = [  # removed again and again, from the inside out
    re.compile(r"\{\{[^{}]*\}\}"),
    re.compile(r"\{\|[^{}]*\|\}"),
    re.compile(r"\[\[[A-Za-z-]+:[^\[\]]*\]\]"),  # files, categories, other languages
]
REMOVED = re.compile(
    r"<!--.*?-->|<ref[^>]*/>|<(ref|math|gallery|timeline|table|div)\b.*?</\1>|<[^>]+>|'''?", re.DOTALL | re.IGNORECASE
)
LINK = re.compile(r"\[\[(?:[^\[\]|]*\|)?([^\[\]]*)\]\]|\[https?:\S+ ?([^\]]*)\]")


def _prose(source: str) -> str:
    """Long plain paragraphs of wiki source; markup removed, links replaced by what they show."""
    text = REMOVED.sub("", html.unescape(source))
    for pattern in INNERMOST:
        count = 1
        while count:
            text, count = pattern.subn("", text)
    text = LINK.sub(lambda link: link[1] or link[2] or "", text)
    paragraphs = (line.strip() for line in text.splitlines())
    return "\n\n".join(p for p in paragraphs if len(p) > PARAGRAPH and p[0] not in "*#:;|={}!" and "|" not in p)
