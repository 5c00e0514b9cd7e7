"""The fenced blocks of the pages, the commands and the files in them."""

import re
import shlex

from helpers import REPO

PAGES = sorted([REPO / "README.md", *(REPO / "docs").rglob("*.md")])
HEREDOC = re.compile(r"^cat > (\S+) <<'EOF'\n(.*?)^EOF$", flags=re.MULTILINE | re.DOTALL)


def blocks(page, language):
    """The contents of a page's fenced blocks of a language, in order."""
    return re.findall(
        rf"^```{language}\n(.*?)^```$", page.read_text(), flags=re.MULTILINE | re.DOTALL
    )


def files(page):
    """(path, content) of the files that a page writes, or shows under a first line `#
    experiments/...`."""
    found = [match for block in blocks(page, "sh") for match in HEREDOC.findall(block)]
    for block in blocks(page, "yaml"):
        if match := re.match(r"# (experiments/\S+\.yaml)", block):
            found.append((match[1], block))
    return found


def commands(page):
    """The words of every command in a page's sh blocks, from `owlfuse` or `make` on, without
    comments and what follows a pipe. What a script of torchrun or SLURM hands on counts as `owlfuse
    train`."""
    found = []
    for block in blocks(page, "sh"):
        for line in HEREDOC.sub("", block).splitlines():
            words = shlex.split(line, comments=True)
            words = words[
                : next((n for n, word in enumerate(words) if word in ("|", ">", "&&")), len(words))
            ]
            if script := next(
                (n for n, word in enumerate(words) if word.startswith("experiments/many_gpus/")),
                None,
            ):
                assert (REPO / words[script]).is_file()
                words = ["owlfuse", "train", *words[script + 1 :]]
            start = next((n for n, word in enumerate(words) if word in ("owlfuse", "make")), None)
            if start is not None:
                found.append(words[start:])
    return found
