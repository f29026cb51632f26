"""Evaluation while training: held-out prompts decoded with `mtpkern.generate`.

Loss and agreement say how well single spans are predicted; what counts is tokens a pass and answers that are right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from mtpkern.compare import Tally, batches, ours, pad
from mtpkern.grading import is_right
from mtpkern.model import require_decodable
from mtpkern.options import strategy_for
from mtpkern.strategies import Strategy, Verified
from mtpkern.train.arguments import refuse


@contextmanager
def _as_loaded(model: PreTrainedModel) -> Iterator[None]:
    """The model as it decodes: in evaluation mode, cache on, its own forward instead of one cast by accelerate.

    Of its generation settings (those of published models sample, penalise repetition) only the tokens count: what is
    measured is greedy.
    """
    training, cache, settings = model.training, model.config.use_cache, model.generation_config
    forward = vars(model).pop("forward", None)
    tokens = {name: getattr(settings, name, None) for name in ("eos_token_id", "pad_token_id", "bos_token_id")}
    model.generation_config = GenerationConfig(**tokens)
    model.config.use_cache = True
    model.eval()
    try:
        yield
    finally:
        model.generation_config = settings
        model.config.use_cache = cache
        model.train(training)
        if forward is not None:
            setattr(model, "forward", forward)  # noqa: B010


@dataclass(frozen=True)
class HeldOut:
    """Held-out prompts that `MTPTrainer` decodes at every evaluation, in float32 or the dtype of the weights.

    prompts, answers  texts or token ids as the model is given them, and what is right for each
    tokenizer         encodes texts with its special tokens and decodes what is new
    is_right          of the decoded text and the expected answer; by the rules of mtpkern.grading unless given
    strategies        of `mtpkern.generate`, by the names that their figures bear; Verified unless given
    batch_size        prompts decoded at a time

    Raises ValueError for lists that are empty or do not match.

        held_out = HeldOut(["Question: 2 + 2?\\nAnswer:"], ["4"], tokenizer)
        MTPTrainer(..., held_out=held_out)  # logs eval_accuracy, eval_tokens_per_pass and eval_effective_k
        ways = {"verified": Verified(), "confadapt_0.9": ConfAdapt(threshold=0.9)}
        HeldOut(..., strategies=ways)       # and eval_accuracy_verified, eval_accuracy_confadapt_0.9 ...
    """

    prompts: Sequence[str | list[int]]
    answers: Sequence[str]
    tokenizer: PreTrainedTokenizerBase
    is_right: Callable[[str, str], bool] = is_right
    strategies: Mapping[str, Strategy] = field(default_factory=lambda: {"verified": Verified()})
    max_new_tokens: int = 256
    batch_size: int = 8

    def __post_init__(self) -> None:
        n, right = len(self.prompts), len(self.answers)
        refuse(not n or n != right, f"prompts and answers must be as many, at least one; got {n} and {right}")
        refuse(not self.strategies, "strategies must name at least one way to decode; leave it out for Verified alone")

    def require_fit(self, model: PreTrainedModel) -> None:
        """Raise ValueError for a model that cannot be decoded, or prompts that its positions do not hold."""
        with _as_loaded(model):
            require_decodable(model)
        positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        longest = max(len(self._ids(prompt)) for prompt in self.prompts)
        refuse(
            positions is not None and longest + self.max_new_tokens > positions,
            f"a held-out prompt of {longest} tokens and the {self.max_new_tokens} to decode must fit the model's "
            f"{positions} positions: lower decode_tokens (max_new_tokens), or leave long prompts out",
        )

    def try_out(self, model: PreTrainedModel) -> None:
        """Decode a token of the first prompt, so that what cannot be decoded fails before the first step."""
        first: dict[str, Any] = {"prompts": self.prompts[:1], "answers": self.answers[:1], "max_new_tokens": 1}
        replace(self, **first, is_right=lambda answer, expected: False).count(model)

    def _ids(self, prompt: str | list[int]) -> list[int]:
        return self.tokenizer(prompt).input_ids if isinstance(prompt, str) else prompt

    def count(self, model: PreTrainedModel, rank: int = 0, ranks: int = 1) -> Tensor:
        """Decode every prompt of this rank in every way: sums of which `metrics` takes those of all ranks.

        A row of float64 on the CPU for each strategy: [problems, right answers, tokens emitted, passes, mean k of each
        problem, its square].
        """
        mine = list(zip(self.prompts, self.answers))[rank::ranks]
        sums = torch.zeros(len(self.strategies), 6, dtype=torch.float64)
        with _as_loaded(model), torch.no_grad():
            for batch in batches(mine, self.batch_size):
                for row, strategy in zip(sums, self.strategies.values()):
                    row += self._count_batch(model, batch, strategy)
        return sums

    def metrics(self, sums: Tensor) -> dict[str, float]:
        """The figures of all strategies by their names; those of the first, which choose the best, without it, too."""
        found = figures(sums[0])
        for name, row in zip(self.strategies, sums):
            found |= {f"{figure}_{name}": value for figure, value in figures(row).items()}
        return found

    def _count_batch(self, model: PreTrainedModel, batch: Sequence[tuple[Any, str]], strategy: Strategy) -> Tensor:
        ids = [self._ids(prompt) for prompt, _ in batch]
        strategy = strategy_for(model, strategy)
        # All masks, so that tokens per pass tell of the model and not of the device and its row budget. Not compiled:
        # batches are of many shapes, each of which would be compiled anew.
        options = {"rows": len(ids) * (2 * strategy.k - 1), "compile": False, "max_new_tokens": self.max_new_tokens}
        found = ours(model, pad(ids, model.device), strategy=strategy, **options)
        texts = [str(self.tokenizer.decode(completion.tokens, skip_special_tokens=True)) for completion in found]
        tally = Tally()
        tally.add(found, sum(self.is_right(text, answer) for text, (_, answer) in zip(texts, batch)), seconds=0.0)
        ks = tally.sample_ks
        sums = [len(batch), tally.right, tally.tokens, tally.passes, sum(ks), sum(k * k for k in ks)]
        return torch.tensor(sums, dtype=torch.float64)


def figures(sums: Tensor) -> dict[str, float]:
    """What a strategy's sums of `HeldOut.count` say: accuracy, tokens per pass in both ways (mtpkern.compare.sample_k).

    figures(torch.tensor([2, 1, 16, 6, 4 + 2, 16 + 4]))["effective_k"]  # 3.0, and 16 / 6 tokens per pass
    """
    n, right, tokens, passes, k, square = sums.tolist()
    # Rounding may leave less than nothing.
    variance = max(0.0, square - k * k / n) / max(1.0, n - 1)
    return {
        "accuracy": right / n,
        "tokens_per_pass": tokens / passes,
        "effective_k": k / n,
        "effective_k_deviation": variance**0.5,
    }
