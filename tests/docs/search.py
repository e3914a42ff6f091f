"""The site's search, in Python: the sections of the pages, ranked by BM25 as lunr.js ranks them in the browser.

The index of the built site has a document for each page and for each of its headings; this builds the same documents from the
Markdown, since building the site takes most of a minute.
"""

import math
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

WORD = re.compile(r"[a-z0-9_]+")
STOP = frozenset(
    WORD.findall(
        "a an and are as at be by can do does for from has have how i if in is it its my not of on or our so than that the their "
        "then there these they this to was we what when where which will with without you your"
    )
)
TITLE_WEIGHT = 10
K1, B = 1.2, 0.75
FENCE = re.compile(r"^ *```", re.MULTILINE)


class Part(NamedTuple):
    """A section of a page.

    Attributes:
        place: 'patch_a_model#choose-layers'; the page alone for what precedes its first section.
        title, text: what is searched.
    """

    place: str
    title: str
    text: str


def slug(title: str) -> str:
    """The anchor of a heading, as python-markdown makes it."""
    plain = re.sub(r"[^\w\s-]", "", title.replace("`", "")).strip().lower()
    return re.sub(r"[-\s]+", "-", plain)


def parts(docs: Path) -> list[Part]:
    """All sections of the Markdown pages of a folder; headings inside code blocks are none."""
    found = []
    for file in sorted(docs.rglob("*.md")):
        page = file.relative_to(docs).with_suffix("").as_posix()
        title, anchor, lines, code = page, "", [], False
        for line in [*file.read_text(encoding="utf-8").splitlines(), "## "]:
            code ^= FENCE.match(line) is not None
            if code or not re.match(r"#{1,3} ", line):
                lines.append(line)
                continue
            if lines and any(lines):
                found.append(Part(page + anchor, title, "\n".join(lines)))
            title, lines = line.lstrip("# "), []
            anchor = "" if line.startswith("# ") else f"#{slug(title)}"
    return found


def words(text: str) -> list[str]:
    """Words without endings, 'adapters' and 'adapter' alike; a dotted or underscored name also in its parts."""
    found = []
    for word in WORD.findall(text.lower()):
        found += {word, *word.split("_")} - {""}
    return [stem(word) for word in found if word not in STOP]


def stem(word: str) -> str:
    """A word without the commonest English endings."""
    for ending in ("ations", "ation", "ings", "ing", "ies", "ed", "es", "s", "e"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            return word.removesuffix(ending)
    return word


def search(documents: list[Part], question: str) -> list[str]:
    """Places of the sections that match a question, best first."""
    texts = [Counter(words(part.text)) for part in documents]
    titles = [Counter(words(part.title)) for part in documents]
    scores = Counter[str]()
    for counts, weight in ((texts, 1), (titles, TITLE_WEIGHT)):
        lengths = [sum(count.values()) for count in counts]
        mean = sum(lengths) / len(lengths)
        for word in set(words(question)):
            having = sum(word in count for count in counts)
            rarity = math.log(1 + (len(counts) - having + 0.5) / (having + 0.5))
            for part, count, length in zip(documents, counts, lengths, strict=True):
                if count[word]:
                    size = K1 * (1 - B + B * length / mean)
                    scores[part.place] += weight * rarity * count[word] * (K1 + 1) / (count[word] + size)
    return [place for place, _ in scores.most_common()]
