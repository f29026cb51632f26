"""What an evaluation adds to the card of a model that `mtpkern train` has written (mtpkern.train.card).

A section lies between two marks, one for each data set or task, and is written anew by a later evaluation of the same.
Cards of others, without the mark of ours, are left alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mtpkern.evidence import markdown
from mtpkern.output import write_whole

MARK = "<!-- card: written by mtpkern train, completed by mtpkern eval -->"
_FACTS = ("prompts", "metric", "baseline", "dtype", "hardware", "torch", "transformers", "commit", "command", "date")


def add_to_card(
    model: str, name: str, figures: Mapping[str, Mapping[str, Any]], facts: Mapping[str, str]
) -> Path | None:
    """Write the figures of an evaluation of some data into the card of a model's folder, if it has one that is ours;
    returns the card.

        add_to_card("runs/mine", "gsm8k_cot", found, {"prompts": "1319"})
    """
    card = Path(model) / "README.md"
    if not card.is_file():
        return None
    text = card.read_text(encoding="utf-8")
    if MARK not in text:
        return None
    # A name is of the user's, and must not end the comment.
    begin, end = f"<!-- measured: {name.replace('--', '- -')} -->", "<!-- end of measured -->"
    text = re.sub(rf"\n*{re.escape(begin)}\n.*?{re.escape(end)}\n", "", text, flags=re.DOTALL)
    page = markdown(figures, f"Measured: {name}", {fact: facts[fact] for fact in _FACTS if fact in facts})
    body = re.sub(r"^(#+ )", r"#\1", page, flags=re.MULTILINE)
    write_whole(card, f"{text.rstrip()}\n\n{begin}\n{body}{end}\n")
    return card
