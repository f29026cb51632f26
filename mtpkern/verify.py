"""Does a model decode right? `check` compares it with itself; `require_verified` does where nobody has tried its kind.

Two truths: the model's own forward on the whole text, and transformers' own greedy decoding, with all it prepares.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.generation import GenerationMixin

from mtpkern.adapter import adopt, gated
from mtpkern.arguments import plain_greedy, require_prompts, require_tensors
from mtpkern.attention import ended_by_interrupts, exclusive, masks_shown, routed
from mtpkern.decoder import Decoder
from mtpkern.fields import whole_number
from mtpkern.foreign import foreign, settings_of
from mtpkern.kernels.state import FAULT
from mtpkern.model import (
    cache_argument,
    evaluating,
    is_tested,
    require_decodable,
    resolve_mask_token,
    told_positions,
)
from mtpkern.output import first_line
from mtpkern.strategies import Static
from mtpkern.wrappers import unwrapped

# Prompts of a check are longer than the model's sliding window where that is no longer than this many tokens.
WINDOW = 1024
WINDOW_QUICK = 128
# Tokens, beyond any window.
LONGEST = 2**20


@dataclass(frozen=True)
class CheckReport:
    """How a model's packed steps compare with full recomputation: rows compared, error of logits, equal argmaxes.

    `max_error` is the largest absolute difference of two logits; `scale` the standard deviation of the logits, to
    read it by; `agreement` the share of rows with the same argmax. `noise` is how far transformers' own greedy decoding
    is from the same recomputation, and `against_generate` how far ours is from it. `not_covered` says, in words, what
    the comparison could not tell.
    """

    rows: int
    max_error: float
    scale: float
    agreement: float
    noise: float
    against_generate: float
    exact: bool
    not_covered: tuple[str, ...]

    @property
    def tolerance(self) -> float:
        """Of a logit: in float32 rounding, in less what transformers' own two ways differ by, and a margin."""
        if self.exact:
            return 1e-3 * self.scale
        return min(max(0.05 * self.scale, 4 * self.noise), 0.5 * self.scale)

    @property
    def ok(self) -> bool:
        """Every logit within the tolerance and, in float32, every argmax equal."""
        near = max(self.max_error, self.against_generate) <= self.tolerance
        return near and (self.agreement == 1.0 or not self.exact)


@ended_by_interrupts
def check(
    model: PreTrainedModel,
    input_ids: Tensor | None = None,
    *,
    mask_token_id: int | None = None,
    k: int = 4,
    steps: int = 4,
) -> CheckReport:
    """Compare packed decoding steps with full recomputation, for an architecture that nobody has tried.

    Decodes `steps` passes of Static(k) from two prompts of different length (or from input_ids [B, T]) and recomputes
    every pass without cache through the model's own attention; then compares passes of Static(1) with the logits of
    transformers' own greedy decoding. Meant for float32; in bfloat16 rounding hides small faults. Raises ValueError or
    TypeError for a model that is not decoded at all, and for prompts or numbers that are none.

        report = mtpkern.check(AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32))
        assert report.ok, report
    """
    adopt(model)
    plain = unwrapped(model, {})
    require_decodable(plain)
    mask_token_id = resolve_mask_token(plain, mask_token_id)
    k, steps = whole_number("k", k, least=1), whole_number("steps", steps, least=1)
    if input_ids is not None:
        require_tensors(input_ids, None)
        vocabulary = plain.get_input_embeddings().weight.shape[0]
        require_prompts(input_ids.cpu(), None, mask_token_id=-1, vocabulary=vocabulary)  # masks are as good as words
    with exclusive(plain), evaluating(plain):
        return _compare(plain, input_ids, mask_token_id, k, steps, WINDOW)


# Classes, with their settings, that decode right; of single models, what was found of them as they then were.
_verified: set[Any] = set()
_found: WeakKeyDictionary[PreTrainedModel, tuple[Any, str | None]] = WeakKeyDictionary()
# What was found of a model's windows, and what its config said of them then.
_told: WeakKeyDictionary[PreTrainedModel, tuple[Any, str | None]] = WeakKeyDictionary()


def require_verified(model: PreTrainedModel, mask_token_id: int) -> None:
    """Raise ValueError for a model of a kind that the tests do not cover and that a quick `check` finds decoding wrong.

    Once in a process for each class, with its settings and attention function, that decodes right; once for each model
    that does not, and for each state of one into which somebody has put hooks, forwards or modules of his own (see
    `foreign`). Of any kind, those whose windows are not what they tell attention. The caller holds the model.
    """
    fault = _compared(model, mask_token_id) or _windowed(model)
    if fault is not None:
        raise ValueError(
            f"mtpkern cannot decode {type(model).__name__}: {fault}. Use model.generate; check_model=False skips this "
            "check, and mtpkern.check(model) in float32 tells more"
        )


def _compared(model: PreTrainedModel, mask_token_id: int) -> str | None:
    """What a comparison finds wrong, or found before; None for nothing, and for a kind that the tests cover."""
    state = foreign(model)
    if not state and is_tested(model):
        return None
    kind, config = type(model), model.config.get_text_config(decoder=True)
    key = kind, config._attn_implementation, settings_of(model.config)
    seen, fault = _found.get(model, (None, None))
    if seen != (key, state):
        fault = None
        if state or key not in _verified:
            fault = _fault(model, mask_token_id)
            if fault is None and not state:
                _verified.add(key)
            else:
                _found[model] = (key, state), fault
    return fault


def _windowed(model: PreTrainedModel) -> str | None:
    """What is wrong with the windows of a model that has some; looked at once, and where its config changes."""
    config = model.config.get_text_config(decoder=True)
    windows = settings_of([getattr(config, name, None) for name in ("sliding_window", "layer_types")])
    if windows[0] is None:
        return None
    seen, fault = _told.get(model, (None, None))
    if seen != windows:
        fault = _said_of(model, lambda: _require_windows_told(model))
        _told[model] = windows, fault
    return fault


def _fault(model: PreTrainedModel, mask_token_id: int) -> str | None:
    """What a quick check finds wrong, in words; None for nothing."""

    def trial() -> None:
        report = _compare(model, None, mask_token_id, k=3, steps=2, window=WINDOW_QUICK)
        if not report.ok:
            raise ValueError(
                f"{type(model).__name__}: its logits differ by up to {report.max_error:.3g} from its own forward on "
                f"the whole text, and by up to {report.against_generate:.3g} from its own greedy decoding, where "
                f"{report.tolerance:.3g} would be rounding (standard deviation {report.scale:.3g}); "
                f"{report.agreement:.0%} of {report.rows} argmaxes agree"
            )

    return _said_of(model, trial)


def _said_of(model: PreTrainedModel, trial: Callable[[], None]) -> str | None:
    """What a trial that fails says of the model, without its name; None where it does not."""
    try:
        trial()
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # a model may fail in any way where it is called as it was not meant to be
        if isinstance(error, ValueError) and str(error).startswith(type(model).__name__):
            return str(error).partition(": ")[2].rstrip(".")
        return f"a trial of it ended in {first_line(error)}"
    return None


@torch.no_grad()
def _compare(
    model: PreTrainedModel, input_ids: Tensor | None, mask_token_id: int, k: int, steps: int, window: int
) -> CheckReport:
    not_covered = []
    if input_ids is None:
        input_ids, attention_mask = _prompts(model, mask_token_id, window, k * (steps + 1))
    else:
        attention_mask = torch.ones_like(input_ids)
    T = input_ids.shape[1]
    widest = _window(model)
    if widest is not None and widest >= T:
        not_covered.append(f"its sliding window of {widest} tokens, as the prompts have {T}: pass longer input_ids")
    if len(input_ids) == 1:
        not_covered.append("prompts of different length side by side")
    with _computed(model) as dtypes:
        errors, spread, equal = _against_recomputation(model, input_ids, attention_mask, mask_token_id, k, steps)
        noise, theirs = _against_generate(model, input_ids, attention_mask, mask_token_id, steps + 1)
    rounded = sorted(map(str, dtypes - {torch.float32, torch.float64}))
    exact = not rounded
    if not exact:
        not_covered.append(f"faults smaller than the rounding of {rounded[0]}: load it in float32, without autocast")
    report = CheckReport(
        rows=len(equal),
        max_error=max(errors),
        scale=sum(spread) / len(spread),
        agreement=equal.mean().item(),
        noise=noise,
        against_generate=theirs,
        exact=exact,
        not_covered=tuple(not_covered),
    )
    if report.ok:
        _require_windows_told(model)
    return report


@contextmanager
def _computed(model: PreTrainedModel) -> Iterator[set[torch.dtype]]:
    """Inside the block, in what the model computes: that of its weights, or of what its head makes under an autocast.

    Its own forward may open one and give its result back in float32.
    """
    dtypes = {model.dtype}
    head = model.get_output_embeddings()
    hook = None if head is None else head.register_forward_hook(lambda head, args, logits: dtypes.add(logits.dtype))
    try:
        yield dtypes
    finally:
        if hook is not None:
            hook.remove()


def _window(model: PreTrainedModel) -> int | None:
    config = model.config.get_text_config(decoder=True)
    window, types = (getattr(config, name, None) for name in ("sliding_window", "layer_types"))
    used = getattr(config, "use_sliding_window", True) and "sliding_attention" in (types or ["sliding_attention"])
    return window if used and isinstance(window, int) and window > 0 else None


def _prompts(model: PreTrainedModel, mask_token_id: int, window: int, new: int) -> tuple[Tensor, Tensor]:
    """Two prompts of ordinary tokens, one shorter and padded on the left, and their mask [2, T]."""
    config = model.config.get_text_config(decoder=True)
    T = 40
    widest = _window(model)
    if widest is not None and widest <= window:
        T = max(T, widest + 8)
    most = getattr(config, "max_position_embeddings", None)
    if isinstance(most, int) and most > 0:
        # Some count positions from behind the pad id.
        T = max(4, min(T, most - new - 2))
    vocabulary = model.get_input_embeddings().weight.shape[0]
    # Tokens with a meaning of their own, padding and images say, change what a model makes of a text.
    special = {x for name, x in vars(config).items() if name.endswith("token_id") and isinstance(x, int)}
    ordinary = torch.ones(vocabulary, dtype=torch.bool)
    ordinary[[x for x in {*special, mask_token_id} if 0 <= x < vocabulary]] = False
    words = ordinary.nonzero()[:, 0]
    # A fixed draw, so that a failure can be looked at again.
    drawn = torch.randint(len(words), (2, T), generator=torch.Generator().manual_seed(0))
    attention_mask = torch.ones(2, T, dtype=torch.int64)
    attention_mask[1, : T // 3] = 0
    pad = getattr(config, "pad_token_id", None)
    input_ids = words[drawn].masked_fill(attention_mask == 0, pad if isinstance(pad, int) and pad >= 0 else 0)
    return input_ids.to(model.device), attention_mask.to(model.device)


class _Masks(Cache):
    """The cache, empty, of a row behind `seen` tokens, and the context that looks at its layers' masks."""

    def __init__(self, model: PreTrainedModel, seen: int) -> None:
        super().__init__(layer_class_to_replicate=DynamicLayer)
        self.name, self.seen = type(model).__name__, seen
        layers = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
        self.kept = dict(enumerate(getattr(layer, "sliding_window", None) for layer in layers))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As given: nobody attends to them."""
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens before the row."""
        return self.seen

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Tokens that a mask covers, and the first of them."""
        return self.seen + query_length, 0

    def look(self, layer: int, mask: Tensor | None, window: int | None) -> None:
        """Raise ValueError where a layer sees other tokens than by the window that it tells of.

        mask [1, 1, 1, n]; transformers' cache may keep fewer, whatever the mask shows.
        """
        if window is not None and window < 1:
            raise ValueError(
                f"{self.name}: layer {layer} calls attention with sliding_window={window}, in which no token sees "
                "anything, in model.generate neither; set config.sliding_window to None, or to what it was trained with"
            )
        n = self.seen + 1
        shown = n if mask is None else int(mask.sum())
        kept = min(n, self.kept.get(layer) or n)
        told = min(n, window or n)
        if shown != told or kept < told:
            raise ValueError(
                f"{self.name}: layer {layer} calls attention with sliding_window={window}, by which alone a pass goes, "
                f"but of {n} tokens its mask shows {shown}, and transformers' own cache keeps {kept}: texts of more "
                f"than {min(shown, kept, told)} would come out otherwise"
            )


@torch.no_grad()
def _require_windows_told(model: PreTrainedModel) -> None:
    """Raise ValueError for a layer that keeps to another window than it tells attention of.

    Most windows are longer than prompts of a trial. Here one row stands at the model's last position, and nothing else
    does, so that it takes no time.
    """
    most = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    seen = (min(most, LONGEST) if isinstance(most, int) and most > 0 else LONGEST) - 1
    masks = _Masks(model, seen)
    row = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    with masks_shown(model, masks):
        model(input_ids=row, position_ids=row + seen, use_cache=True, **{cache_argument(model): masks})


def _decoder(model: PreTrainedModel, input_ids: Tensor, mask_token_id: int, k: int, steps: int) -> Decoder:
    B, T = input_ids.shape
    new = k * (steps + 1)
    sizes: dict[str, Any] = {"batch": B, "capacity": T + new, "max_new_tokens": new}
    no_stop = torch.tensor([-1])
    return Decoder(model, Static(k), mask_token_id=mask_token_id, stop_ids=no_stop, use_graph=False, **sizes)


def _step(model: PreTrainedModel, decoder: Decoder) -> Tensor:
    with routed(model, decoder.cache) as route:
        return decoder.step(route)


def _recomputed(model: PreTrainedModel, text: Tensor) -> Tensor:
    """Logits [n, V] of a text [1, n], without a cache."""
    with gated(model, text):
        return model(text, use_cache=False, **told_positions(model, text)).logits[0]


def _difference(a: Tensor, b: Tensor) -> float:
    """The largest; equal infinities do not differ."""
    return torch.where(a == b, 0.0, (a - b).abs().float()).max().item()


def _against_recomputation(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, mask_token_id: int, k: int, steps: int
) -> tuple[list[float], list[float], Tensor]:
    """Of every pass: the largest error of a logit, the spread of the logits, and which argmaxes are equal."""
    errors, equal, spread = [], [], []
    decoder = _decoder(model, input_ids, mask_token_id, k, steps)
    rows, sequences = decoder.rows, decoder.sequences
    with torch.accelerator.device_index(model.device.index):
        decoder.prefill(input_ids, attention_mask)
        for _ in range(steps):
            position, start = rows.position.clone(), rows.start.tolist()
            texts, length = sequences.tokens.clone(), sequences.length.tolist()
            logits = _step(model, decoder)
            if (sequences.status == FAULT).any():
                raise ValueError(f"{type(model).__name__}: its logits hold NaN or inf; check its weights and dtype")
            for b in range(len(input_ids)):
                of_b = slice(start[b], start[b + 1])
                texts[b, length[b] :] = mask_token_id
                full = _recomputed(model, texts[b : b + 1, : int(position[of_b][-1]) + 1])[position[of_b]]
                errors.append(_difference(logits[of_b], full))
                spread.append(full[full.isfinite()].float().std().item())
                equal.append((logits[of_b].argmax(-1) == full.argmax(-1)).float())
    return errors, spread, torch.cat(equal)


def _against_generate(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, mask_token_id: int, new: int
) -> tuple[float, float]:
    """The largest difference of a logit between greedy decoding by transformers and full recomputation, and ours."""
    B, T = input_ids.shape
    # What the model's own file asks for, beams or stop strings, is no question of its kind.
    settings: dict[str, Any] = plain_greedy(model.generation_config)
    settings |= {"max_new_tokens": new, "return_dict_in_generate": True, "output_logits": True}
    theirs = GenerationMixin.generate(
        model, input_ids, attention_mask=attention_mask, **settings, pad_token_id=0, eos_token_id=None
    )
    decoder = _decoder(model, input_ids, mask_token_id, 1, new)
    differences, noise = [], []
    with torch.accelerator.device_index(model.device.index):
        logits = decoder.prefill(input_ids, attention_mask)
        same = torch.ones(B, dtype=torch.bool, device=model.device)
        for i, expected in enumerate(theirs.logits):
            expected = expected.to(logits.dtype)
            differences += [_difference(logits[b], expected[b]) for b in range(B) if same[b]]
            for b in range(B):
                text = theirs.sequences[b : b + 1, : T + i][:, attention_mask[b].argmax() :]
                noise.append(_difference(expected[b], _recomputed(model, text)[-1].to(logits.dtype)))
            # From a token on that differs, which nearly equal logits allow, there is nothing to compare.
            last = decoder.sequences.tokens.gather(1, decoder.sequences.length[:, None] - 1)[:, 0]
            same &= last == theirs.sequences[:, T + i]
            if i + 1 == len(theirs.logits) or not same.any():
                break
            logits = _step(model, decoder)
    return max(noise), max(differences)
