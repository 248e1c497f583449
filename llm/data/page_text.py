"""Plain text of HTML manuals, with the standard library's parser."""

import re
from html.parser import HTMLParser

_SKIPPED = frozenset({"script", "style", "head", "nav", "header", "footer"})
_INLINE_TAGS = (
    "a abbr acronym b bdi bdo big cite code del dfn em font i img ins kbd mark q rp rt ruby s samp small span strike "
    "strong sub sup tt u var wbr"
)
_INLINE = frozenset(_INLINE_TAGS.split())
_MIN_PARAGRAPH = 40  # characters; shorter ones are menu entries, captions, signatures


def paragraphs(html: str) -> list[str]:
    """Paragraphs of at least 40 characters: block tags part them, `pre` is kept verbatim, entities are resolved."""
    parser = _TextParser()
    parser.feed(html)
    parser.close()
    parser.end_paragraph()
    return parser.paragraphs


class _TextParser(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.paragraphs: list[str] = []
        self._pieces: list[str] = []
        self._skipping: list[str] = []  # open skipped tags: their whole content is dropped
        self._pre_depth = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _SKIPPED:
            self._skipping.append(tag)
        elif tag == "br":
            self._pieces.append("\n" if self._pre_depth else " ")
        elif tag not in _INLINE:
            self.end_paragraph()
        if tag == "pre":
            self._pre_depth += 1

    def handle_endtag(self, tag: str) -> None:
        if tag in self._skipping:
            while self._skipping.pop() != tag:  # an unclosed tag inside ends with the one around it
                pass
        elif tag not in _INLINE and tag != "br":
            self.end_paragraph()
        if tag == "pre":
            self._pre_depth = max(0, self._pre_depth - 1)

    def handle_data(self, data: str) -> None:
        if not self._skipping:
            self._pieces.append(data)

    def end_paragraph(self) -> None:
        text = "".join(self._pieces)
        self._pieces.clear()
        text = text.strip("\n").rstrip() if self._pre_depth else re.sub(r"\s+", " ", text).strip()
        if len(text) >= _MIN_PARAGRAPH:
            self.paragraphs.append(text)
