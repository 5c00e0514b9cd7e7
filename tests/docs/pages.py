"""The fenced blocks of the pages, and the commands in them."""

import re
import shlex

from helpers import REPO

PAGES = sorted([REPO / "README.md", *(REPO / "docs").rglob("*.md")])


def blocks(page, language):
    """The contents of a page's fenced blocks of a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def commands(page):
    """Every `owlfuse` command of a page's sh blocks, as words after `owlfuse`, without comments and what follows a pipe."""
    found = []
    for block in blocks(page, "sh"):
        script = re.sub(r"<<'EOF'\n.*?^EOF$", "", block.replace("\\\n", " "), flags=re.MULTILINE | re.DOTALL)
        for line in script.splitlines():
            words = shlex.split(line, comments=True)
            if "owlfuse" in words or "owlfuse.cli" in words:
                start = next(n for n, word in enumerate(words) if word in ("owlfuse", "owlfuse.cli"))
                end = next((n for n, word in enumerate(words) if word in ("|", ">", "&&")), len(words))
                found.append(words[start + 1 : end])
    return found
