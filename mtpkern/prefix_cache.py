"""PrefixCache: what a call has read, for the next call whose prompts begin the same: it prefills only the rest.

Kept are the keys of each text of the last call, prompt and answer, and the tokens that they stand for. Keys of tokens
know neither masks nor drafts nor a strategy, so any other call of the same model may go on from them: each of its
prompts takes the text that it shares most of its beginning with. They are copied in and out: a decoder's buffers stay
its own. What keys depend on beside tokens is the model as it is: another, or one that has changed since, finds nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import ref

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from mtpkern.baked import fingerprint
from mtpkern.cache import KVCache
from mtpkern.host import on_host
from mtpkern.kernels.form import autocast_of
from mtpkern.model import has_latent_attention, plain_tensors
from mtpkern.parallel import is_parallel

# Fewer common tokens are not worth a copy.
LEAST_SHARED = 8
# Of each tensor of a model so many values are looked at, to see whether they are others.
_SAMPLED = 64


def common(a: np.ndarray, b: np.ndarray) -> int:
    """How many first tokens two texts have in common; 0 where so few are worth nothing."""
    n = min(len(a), len(b))
    if n < LEAST_SHARED or a[0] != b[0] or a[LEAST_SHARED - 1] != b[LEAST_SHARED - 1]:
        return 0
    differ = a[:n] != b[:n]
    shared = int(differ.argmax()) if differ.any() else n
    return shared if shared >= LEAST_SHARED else 0


class PrefixCache:
    """What the last call of `generate` or `stream` has read, for the next: chat turns, questions behind few shots.

        cache = mtpkern.PrefixCache()
        shots = "2 + 2 = 4; 3 + 5 = 8; 7 + 2 = 9; "
        for question in ("4 + 4 =", "1 + 6 ="):
            inputs = tokenizer(shots + question, return_tensors="pt")
            output = mtpkern.generate(model, **inputs, prefix_cache=cache, max_new_tokens=8)
        cache.shared  # [n]: the first n tokens of the last prompt were there already, and have not been read again

    Unlike transformers' past_key_values it may be given with any prompts: whole tokens are compared, from the first on,
    and what differs is read anew. Fewer than 8 are not worth a copy. So a chat need only give the whole conversation
    each time, rendered as ever. Strategy, k, masks, sampling, limits and padding may differ from call to call, and a
    batch may have more or fewer prompts: each looks among all texts of the last call. Tokens are those of a whole
    prefill but for rounding, as keys may come from passes of other shapes.

    Nothing is taken from what another model has read, or the same one before its weights, dtype, device, adapters,
    hooks, settings or autocast changed. Of weights, versions are compared and 64 values of each; a write of single ones
    past autograd's eyes (`weight.data[0] = 1`) may show in neither: call `clear()` behind one.

    A call that raises an error leaves what was there. The object alone holds the memory, on the model's device: the
    keys of the texts of one call. Threads may share one; what the last call to end has read is kept.
    """

    def __init__(self) -> None:
        self._kept: _Kept | None = None
        self._shared: list[int] = []

    @property
    def shared(self) -> list[int]:
        """How many tokens of each prompt [B] of the last call were there already."""
        return list(self._shared)

    @property
    def texts(self) -> list[list[int]]:
        """The tokens that are kept of each sequence of the last call: its prompt, its answer but for the end."""
        return [] if self._kept is None else [text.tolist() for text in self._kept.texts]

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values."""
        return 0 if self._kept is None else sum(x.nbytes for pair in self._kept.layers.values() for x in pair)

    def clear(self) -> None:
        """Forget all of it; the memory is free."""
        self._kept, self._shared = None, []


def require_prefix_cache(value: Any, model: PreTrainedModel) -> None:
    """Raise TypeError for what is neither a PrefixCache nor None, ValueError with a model that cannot have one."""
    if value is None:
        return
    if not isinstance(value, PrefixCache):
        raise TypeError(f"prefix_cache must be a mtpkern.PrefixCache() or None, got {type(value).__name__}")
    if has_latent_attention(model):
        why = ", whose latent attention does not go on from keys but from what they are made of"
    elif is_parallel(model):
        why = " split over processes, each of which would have to find the same"
    else:
        return
    raise ValueError(f"mtpkern.generate does not support prefix_cache with {type(model).__name__}{why}; leave it out")


@dataclass
class Reuse:
    """What one call takes out of a PrefixCache and puts into it, while it holds the model; prompts: ids [T].

    reuse = Reuse(prefix_cache, model, prompts)
    decoder.prefill(input_ids, attention_mask, known=reuse.fill)
    reuse.keep(decoder.cache, new_tokens, fed)    # behind all passes
    """

    prefix_cache: PrefixCache
    model: PreTrainedModel
    prompts: Sequence[np.ndarray]
    sample: bytes = b""

    def fill(self, cache: KVCache) -> int:
        """Store the keys that the prompts find there in the buffers; returns the first padded column to be run."""
        kept = self.prefix_cache._kept
        self.sample = _sample(self.model)
        best = [(0, 0)] * len(self.prompts)
        if kept is not None and kept.is_of(self.model, self.sample):
            kept.read_here(self.model.device)
            # All but the last token, whose prediction is wanted. Of equal ones the first is as good as any.
            found = [[common(prompt[:-1], text) for text in kept.texts] for prompt in self.prompts]
            best = [(max(row), row.index(max(row))) for row in found]
        self.prefix_cache._shared = shared = [n for n, _ in best]
        n = max(shared)
        if kept is None or not n:
            return 0
        device = self.model.device
        known, source = torch.tensor(best, device=device).unbind(1)
        o = torch.arange(n, device=device)
        slot = torch.where(o < known[:, None], cache.scratch + o, cache.held)  # what is not shared goes to the trash
        for layer, (key, value) in kept.layers.items():
            cache.fill(layer, key[source, :, :n], value[source, :, :n], slot)
        lengths = [len(prompt) for prompt in self.prompts]
        return max(lengths) - max(length - n for length, n in zip(lengths, shared))

    def keep(self, cache: KVCache, new: Tensor, fed: Sequence[int]) -> None:
        """Keep the keys of the prompts and of so many of each sequence's new tokens [B, new]."""
        # What was there goes first, so that there is no time at which both are.
        self.prefix_cache._kept = None
        answers = zip(self.prompts, new.cpu().numpy(), fed)
        texts = [np.concatenate([prompt, row[:n]]) for prompt, row, n in answers]
        here = slice(cache.scratch, cache.scratch + max(map(len, texts)))
        layers = {layer: (k[:, :, here].clone(), v[:, :, here].clone()) for layer, (k, v) in cache.layers.items()}
        ready = None
        if self.model.device.type == "cuda":
            ready = torch.Event(self.model.device)
            ready.record()
        self.prefix_cache._kept = _Kept(ref(self.model), _state_of(self.model), self.sample, texts, layers, ready)


@dataclass(frozen=True)
class _Kept:
    """Texts [B] of token ids [n] each, and their keys and values [B, Hkv, n, D] of each layer; never written to."""

    model: ref[PreTrainedModel]
    state: tuple[Any, ...]
    sample: bytes
    texts: list[np.ndarray]
    layers: dict[int, tuple[Tensor, Tensor]]
    # On a GPU, when they are there, on whatever stream they have been copied.
    ready: torch.Event | None = None

    def read_here(self, device: torch.device) -> None:
        """Have this thread's stream wait for them, and their memory for it."""
        if self.ready is not None:
            self.ready.wait()
            for x in (x for pair in self.layers.values() for x in pair):
                x.record_stream(torch.cuda.current_stream(device))

    def is_of(self, model: PreTrainedModel, sample: bytes) -> bool:
        """Whether the model is the one whose keys these are, as it was."""
        return self.model() is model and self.sample == sample and self.state == _state_of(model)


def _state_of(model: PreTrainedModel) -> tuple[Any, ...]:
    """What keys depend on beside tokens and the values of weights; and how often these were written to."""
    versions = [0 if x.is_inference() else x._version for x in plain_tensors(model)]
    return model.device, autocast_of(model.device), fingerprint(model), versions


def _sample(model: PreTrainedModel) -> bytes:
    """Some values of each weight: of those that are written to where no version tells, as by `weight.data`."""
    with torch.inference_mode():
        some = []
        for x in plain_tensors(model):
            flat = x.detach().flatten()
            some.append(flat[:: max(1, -(-flat.numel() // _SAMPLED))].contiguous().view(torch.uint8))
        return b"".join(x.numpy().tobytes() for x in on_host(*some))
