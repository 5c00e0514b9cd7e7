"""What the built pages are: whole, without a warning, and without a request to elsewhere."""

import re
import subprocess
import sys

import pytest

from helpers import REPO
from pages import PAGES

ELSEWHERE = re.compile(
    r"""<(?:script|img|link|iframe|source|video)\b[^>]*\b(?:src|href)=["'](?:https?:)?//[^"']*["'][^>]*>"""
)
CSS_ELSEWHERE = re.compile(r"""(?:@import\s+(?:url\()?|url\()\s*["']?(?:https?:)?//""")


@pytest.mark.slow
def test_the_pages_build_without_a_warning_and_ask_no_other_machine(tmp_path):
    pytest.importorskip("sphinx")
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-W",
        "--keep-going",
        "-q",
        "-b",
        "html",
        REPO / "docs",
        tmp_path,
    ]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-4000:]
    pages = sorted(tmp_path.rglob("*.html"))
    assert len(pages) > 15
    for page in pages:
        assert ELSEWHERE.findall(page.read_text()) == [], page.name
    for style in [*tmp_path.rglob("*.css"), *pages]:
        assert CSS_ELSEWHERE.search(style.read_text()) is None, style.name
    reference = (tmp_path / "configuration.html").read_text()
    assert "model.fusion.gate" in reference
    assert "trainer.strategy.timeout_minutes" in reference
    assert "--max-new-tokens" in (tmp_path / "commands.html").read_text()


def test_a_request_to_elsewhere_would_be_seen():
    assert ELSEWHERE.search('<script async="async" src="https://cdn.example/a.js"></script>')
    assert ELSEWHERE.search('<link rel="stylesheet" href="//fonts.example/css">')
    assert not ELSEWHERE.search('<a href="https://arxiv.org/abs/2311.04257">paper</a>')
    assert CSS_ELSEWHERE.search("@import url('https://fonts.example/css');")


def test_the_readme_is_one_screen_and_a_half():
    assert len((REPO / "README.md").read_text().splitlines()) <= 90


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPO).as_posix())
def test_links_between_the_files_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    links = [
        link
        for link in re.findall(r"\]\(([^)]+)\)", text)
        if "://" not in link and not link.startswith("#")
    ]
    assert [link for link in links if not (page.parent / link.partition("#")[0]).exists()] == []
