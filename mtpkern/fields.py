"""The fields of GenerationConfig that change scores, and what values each may have.

transformers looks at most of them only when it makes a processor, some not at all; here a wrong one is an error that
begins with the field's name, before anything runs.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from functools import partial
from typing import Any


def _number(expected: str, fits: Callable[[float], bool]) -> Callable[[Any], float]:
    def check(value: Any) -> float:
        number = not isinstance(value, bool) and isinstance(value, (int, float)) and math.isfinite(value)
        if not number or not fits(value):
            raise ValueError(f"{expected}, got {value!r}")
        return float(value)

    return check


def whole(value: Any, least: int | None = None) -> int:
    """The value as an int, where it is a whole number of any type (3, 3.0, a tensor of one); no bool is one.

    Raises TypeError for what is no number, ValueError for a fraction or for less than `least`.
    """
    said = "a whole number" + ("" if least is None else f" of at least {least}") + f", got {value!r}"
    if isinstance(value, float) and not value.is_integer():
        raise ValueError(said)
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(int(value) if isinstance(value, float) else value)
    except TypeError:
        raise TypeError(said) from None
    if least is not None and number < least:
        raise ValueError(said)
    return number


def whole_number(name: str, value: Any, *, least: int | None = None) -> int:
    """As `whole`, with messages that begin with the name: `whole_number("max_new_tokens", 3.0, least=1)` is 3."""
    try:
        return whole(value, least)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name} must be {error}") from None


_token = _count = partial(whole, least=0)


def _tokens(value: Any) -> list[int] | None:
    """Token ids; None for no id at all."""
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"a list of token ids, got {value!r}")
    return [_token(x) for x in value] or None


def _token_or_tokens(value: Any) -> int | list[int]:
    return _tokens(value) or _token(value) if isinstance(value, (list, tuple)) else _token(value)


def _words(value: Any) -> list[list[int]] | None:
    if not isinstance(value, (list, tuple)) or not all(isinstance(x, (list, tuple)) and x for x in value):
        raise ValueError(f"a list of lists of token ids, none of them empty, got {value!r}")
    return [[_token(t) for t in x] for x in value] or None


def _biases(value: Any) -> dict[tuple[int, ...], float] | None:
    pairs = list(value.items()) if isinstance(value, dict) else value
    if not isinstance(pairs, (list, tuple)) or not all(isinstance(x, (list, tuple)) and len(x) == 2 for x in pairs):
        raise ValueError(f"a bias for each sequence of token ids, {{(3, 4): -2.0}} or [[[3, 4], -2.0]], got {value!r}")
    found = {}
    for tokens, bias in pairs:
        if not isinstance(tokens, (list, tuple)) or not tokens or isinstance(bias, bool):
            raise ValueError(f"a bias for each sequence of token ids, got {value!r}")
        if not isinstance(bias, (int, float)) or math.isnan(bias) or bias == math.inf:
            raise ValueError(f"a bias that is a number for each sequence of token ids, got {value!r}")
        found[tuple(_token(t) for t in tokens)] = float(bias)
    return found or None


def _decay(value: Any) -> tuple[int, float]:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise ValueError(f"a pair of a number of tokens and a factor, got {value!r}")
    return _count(value[0]), _positive(value[1])


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"True or False, got {value!r}")
    return value


_positive = _number("a number above 0", lambda x: x > 0)
_share = _number("a number above 0 and at most 1", lambda x: 0 < x <= 1)
_part = _number("a number from 0 to 1", lambda x: 0 <= x <= 1)

OF_SCORES: dict[str, Callable[[Any], Any]] = {
    "repetition_penalty": _positive,
    **dict.fromkeys(("no_repeat_ngram_size", "min_length", "min_new_tokens"), _count),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens"), _tokens),
    "bad_words_ids": _words,
    "sequence_bias": _biases,
    "forced_bos_token_id": _token,
    "forced_eos_token_id": _token_or_tokens,
    "exponential_decay_length_penalty": _decay,
}
OF_SAMPLING: dict[str, Callable[[Any], Any]] = {
    "temperature": _positive,
    "top_k": _count,
    **dict.fromkeys(("top_p", "typical_p", "top_h"), _share),
    **dict.fromkeys(("min_p", "epsilon_cutoff", "eta_cutoff"), _part),
}
_OTHERS: dict[str, Callable[[Any], Any]] = {
    "num_return_sequences": partial(whole, least=1),
    **dict.fromkeys(("do_sample", "renormalize_logits", "output_scores", "output_logits"), _flag),
}


def checked_field(name: str, value: Any) -> Any:
    """The value as transformers takes it; None for an empty list. Raises ValueError that begins with the name.

    checked_field("repetition_penalty", 2)  # 2.0
    """
    try:
        return (OF_SCORES | OF_SAMPLING | _OTHERS)[name](value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be {error}") from None
