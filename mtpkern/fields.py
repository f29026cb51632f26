"""The fields of GenerationConfig that change scores, and what values each may have.

transformers looks at most of them only when it makes a processor, some not at all; here a wrong one is an error that
begins with the field's name, before anything runs.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any


def _number(expected: str, fits: Callable[[float], bool]) -> Callable[[Any], float]:
    def check(value: Any) -> float:
        number = not isinstance(value, bool) and isinstance(value, (int, float)) and math.isfinite(value)
        if not number or not fits(value):
            raise ValueError(f"{expected}, got {value!r}")
        return float(value)

    return check


def _whole(least: int) -> Callable[[Any], int]:
    def check(value: Any) -> int:
        try:
            if isinstance(value, bool):
                raise TypeError
            number = operator.index(int(value) if isinstance(value, float) and value.is_integer() else value)
        except TypeError:
            raise ValueError(f"a whole number of at least {least}, got {value!r}") from None
        if number < least:
            raise ValueError(f"a whole number of at least {least}, got {value!r}")
        return number

    return check


_token = _whole(0)


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
    return _whole(0)(value[0]), _positive(value[1])


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"True or False, got {value!r}")
    return value


_positive = _number("a number above 0", lambda x: x > 0)
_share = _number("a number above 0 and at most 1", lambda x: 0 < x <= 1)
_part = _number("a number from 0 to 1", lambda x: 0 <= x <= 1)

OF_SCORES: dict[str, Callable[[Any], Any]] = {
    "repetition_penalty": _positive,
    "no_repeat_ngram_size": _whole(0),
    "bad_words_ids": _words,
    "sequence_bias": _biases,
    "suppress_tokens": _tokens,
    "begin_suppress_tokens": _tokens,
    "min_length": _whole(0),
    "min_new_tokens": _whole(0),
    "forced_bos_token_id": _token,
    "forced_eos_token_id": _token_or_tokens,
    "exponential_decay_length_penalty": _decay,
}
OF_SAMPLING: dict[str, Callable[[Any], Any]] = {
    "temperature": _positive,
    "top_k": _whole(0),
    "top_p": _share,
    "min_p": _part,
    "typical_p": _share,
    "top_h": _share,
    "epsilon_cutoff": _part,
    "eta_cutoff": _part,
}
_OTHERS: dict[str, Callable[[Any], Any]] = {
    "num_return_sequences": _whole(1),
    **dict.fromkeys(("do_sample", "renormalize_logits", "output_scores", "output_logits"), _flag),
}


def checked_field(name: str, value: Any) -> Any:
    """The value as transformers takes it; None for an empty list. Raises ValueError that begins with the name.

    checked_field("repetition_penalty", 2)  # 2.0
    """
    try:
        return (OF_SCORES | OF_SAMPLING | _OTHERS)[name](value)
    except ValueError as error:
        raise ValueError(f"{name} must be {error}") from None
