"""Which fusion works with which LLM of transformers, as the page `families`: `python
docs/family_table.py [FAMILY ...]` writes it (or the rows of those families anew).

A cell is what a run finds out before it loads weights: the fusion is tried on a tiny LLM of the
family.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import logging
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO / "tests" / "support"))
from families import small_fields  # noqa: E402
from helpers import VOCAB, backbone_for, yaml_nodes  # noqa: E402
from owlfuse.model.connectors.base import Connector  # noqa: E402
from owlfuse.model.fusion.probe import check_fusion  # noqa: E402
from owlfuse.model.llm import load_llm  # noqa: E402
from owlfuse.model.multimodal import make_part  # noqa: E402

PAGE = REPO / "docs" / "families.md"
# owlfuse's own is among them once it is registered.
FAMILIES = sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES} - {"owlfuse"})
TOKENS = 3
"""Visual tokens per image."""
HEAD = """# Which fusion works with which LLM

Every causal LM of transformers, by its `model_type`, with every fusion. This page is written by
`docs/family_table.py`, and a test compares the two. A cell is what a run finds out before it loads
a weight: the fusion is tried on an LLM of the family with small widths and random weights. A
picture has to change the logits behind it and none before it, and a row of text has the logits of
the LLM without the fusion. What does not hold is refused in the line that stands below the table.

"""
Outcomes = dict[str, str | None]
"""By fusion: the line that refuses it; None where it works."""


def fusion_nodes() -> dict[str, dict[str, Any]]:
    """Returns every fusion that has a yaml, in all four layers of a tiny LLM."""
    nodes = yaml_nodes("fusion")
    for node in nodes.values():
        if isinstance(node.get("layers"), list):
            node["layers"] = [0, 1, 2, 3]
    return nodes


def outcome(family: str, node: dict[str, Any]) -> str | None:
    """Returns the line by which a fusion is refused on a tiny LLM of a family; None where it
    works."""
    try:
        with torch.device("meta"):
            llm = load_llm(VOCAB, config=small_fields(family))
            fusion = make_part("fusion", {"fusion": node}, connector_tokens=TOKENS)
            fusion.set_levels(backbone_for(node).extra_levels, Connector())
            check_fusion(fusion, llm)
    except ValueError as error:
        return str(error)
    return None


def outcomes(family: str) -> Outcomes:
    """Returns the outcome of each fusion on a family."""
    return {name: outcome(family, node) for name, node in fusion_nodes().items()}


def page(rows: dict[str, Outcomes]) -> str:
    """Returns the page."""
    names = list(fusion_nodes())
    lines = [f"| LLM | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    reasons = []
    for family, row in sorted(rows.items()):
        cells = ["yes" if row[name] is None else "no" for name in names]
        lines.append(f"| {family} | {' | '.join(cells)} |")
        by_reason: dict[str, list[str]] = {}
        for name, reason in row.items():
            if reason is not None:
                by_reason.setdefault(reason, []).append(name)
        for reason, refused in by_reason.items():
            reasons.append(f"- {family}, {', '.join(refused)}: `{reason.replace('`', chr(39))}`")
    return HEAD + "\n".join([*lines, "", "## Why not", "", *reasons, ""])


def read_page() -> dict[str, Outcomes]:
    """Returns the outcomes of each family that the page lists; none before the page is written."""
    rows: dict[str, Outcomes] = {}
    names: list[str] = []
    # a test imports this while it is collected: a page that is missing must not stop the others
    lines = PAGE.read_text().splitlines() if PAGE.is_file() else []
    for line in lines:
        cells = re.findall(r"(?<=\| )[^|]+(?= \|)", line)
        if line.startswith("| LLM |"):
            names = cells[1:]
        elif refusal := re.fullmatch(r"- ([^,]+), ([^:]+): `(.*)`", line):
            family, refused, reason = refusal.groups()
            for name in refused.split(", "):
                rows[family][name] = reason
        elif names and cells:
            # the reason of a `no` comes below the table
            rows[cells[0]] = {
                name: None if cell == "yes" else ""
                for name, cell in zip(names, cells[1:], strict=True)
            }
    return rows


def documented() -> dict[str, dict[str, bool]]:
    """Returns which fusions work with each family, as the page says."""
    works_by_family = {}
    for family, row in read_page().items():
        works_by_family[family] = {name: reason is None for name, reason in row.items()}
    return works_by_family


if __name__ == "__main__":
    logging.set_verbosity_error()
    # the rows of other families stay as the page has them
    table = read_page() if sys.argv[1:] else {}
    for family in sys.argv[1:] or FAMILIES:
        table[family] = outcomes(family)
        print(family, *("no" if reason else "yes" for reason in table[family].values()))
    PAGE.write_text(page(table))
