"""Search in English and Chinese.

Sphinx splits text at everything that is not a letter, so a whole Chinese clause would be one word that nobody types. Here each pair of
neighbouring Chinese characters is a word of the index, and a query is split in the same way: 词向量 finds pages with 词向 and 向量.
"""

from __future__ import annotations

import re

import sphinx.search
from sphinx.application import Sphinx
from sphinx.search.en import SearchEnglish

HAN = r"\u3400-\u4dbf\u4e00-\u9fff"


def split(text: str) -> list[str]:
    "Words, and for each run of Chinese characters its pairs (the character itself if it stands alone)."
    words: list[str] = []
    for word in re.findall(rf"[{HAN}]+|(?:(?![{HAN}])\w)+", text):
        if re.match(f"[{HAN}]", word) and len(word) > 1: words += [word[i : i + 2] for i in range(len(word) - 1)]
        else: words.append(word)
    return words


class SearchBook(SearchEnglish):
    "English words are stemmed as before; the name of the language must stay: it names the stemmer in the pages."

    js_splitter_code = f"""
function splitQuery(query) {{
  return (query.match(/[{HAN}]+|(?:(?![{HAN}])[\\p{{L}}\\p{{N}}_])+/gu) || []).flatMap((word) =>
    /^[{HAN}]{{2,}}$/.test(word) ? Array.from({{ length: word.length - 1 }}, (_, i) => word.slice(i, i + 2)) : [word]
  );
}}
"""

    def split(self, input: str) -> list[str]: return split(input)


def setup(app: Sphinx) -> dict[str, bool]:
    sphinx.search.languages["en"] = SearchBook
    return {"parallel_read_safe": True, "parallel_write_safe": True}
