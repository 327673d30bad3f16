from __future__ import annotations

from html.parser import HTMLParser

import pytest

from megatron_chord.data.demonstrations import load_demonstrations
from megatron_chord.data.inspect import Inspection, Inspector
from megatron_chord.data.page import page
from megatron_chord.data.templates import ChatTemplate
from tests.support.files import write_rows

HOSTILE = "1 < 2 & \"3\" > '2'\t<script>alert(1)</script>\n<img src=http://x.y/z onerror=alert(1)> &amp; é 🦆"


class Reader(HTMLParser):
    """Collects the page's elements and the text of each ``pre``."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "pre":
            self.inside = True
            self.texts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag != "pre"

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.texts[-1] += data


@pytest.fixture(scope="module")
def inspection(tmp_path_factory: pytest.TempPathFactory, chatml: ChatTemplate) -> Inspection:
    folder = tmp_path_factory.mktemp("<b>data")
    path = write_rows(
        folder / "<i>.jsonl",
        {"problem": HOSTILE, "solution": HOSTILE},
        {"problem": "1?", "solution": "1" * 90},
    )
    inspector = Inspector(300, 200, 3)
    _, report = load_demonstrations(
        path,
        chatml,
        max_prompt_tokens=300,
        max_response_tokens=200,
        overlong="drop",
        observe=inspector.observe["demonstrations"],
    )
    return inspector.inspection(chatml, [str(report)], lambda source: ("exact", "####"))


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    reader.close()
    return reader


def test_text_of_the_data_stays_text(inspection: Inspection) -> None:
    found = read(page(inspection, title="<b>run.yaml"))
    tags = [tag for tag, _ in found.elements]
    assert tags.count("script") == 1  # the page's own script
    assert not {"img", "b"} & {tag for tag, attrs in found.elements if "src" in attrs}
    assert "onerror" not in {name for _, attrs in found.elements for name in attrs}
    shown = found.texts[0].replace("↵", "").replace("→", "").replace("·", "")
    assert shown == f"<|im_start|>user\n{HOSTILE}<|im_end|>\n<|im_start|>assistant\n{HOSTILE}<|im_end|>"


def test_nothing_is_loaded_from_elsewhere(inspection: Inspection) -> None:
    text = page(inspection, title="run.yaml")
    for tag, attrs in read(text).elements:
        assert "src" not in attrs
        assert tag != "link"
        assert (attrs.get("href") or "#").startswith("#")
    assert "default-src 'none'" in text
    assert "@import" not in text
    assert "url(" not in text


def test_every_token_says_what_it_is(inspection: Inspection) -> None:
    example = inspection.sets[0].examples[0]
    found = read(page(inspection, title="run.yaml"))
    tokens = [attrs for tag, attrs in found.elements if tag == "span" and "data-i" in attrs]
    count = len(example.seen.token_ids)
    assert [int(attrs["data-i"] or "") for attrs in tokens[:count]] == list(example.seen.token_ids)
    kinds = [attrs.get("class") for attrs in tokens[:count]]
    answer = sum(example.seen.trainable)
    assert kinds[-answer:] == ["a"] * (answer - 1) + ["s"]
    assert kinds[0] == "o"
    assert None in kinds[:-answer]
