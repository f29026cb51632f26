"""A model of `advance` in plain Python, one sequence at a time in lists and loops, beside the op through whole decodes.

At every pass a readout is drawn and given to both, and all that either of them knows is compared.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from hypothesis import strategies as st

from mtpkern.kernels.state import FAULT, LIMIT, RUNNING, STOPPED, Rows, Sequences, Terms
from mtpkern.kernels.worth import UNIT
from mtpkern.reference import likeliest_ends

MASK = 99


UNWRITTEN = -7


Form = Callable[..., None]


@dataclass
class Text:
    """One sequence: its standing tokens, of which the last `pending` are to be fed (again).

    sure: the confidences of those that are drafts; behind: how many masks stand behind each pending token.
    """

    tokens: list[int]
    limit: int
    pending: int = 1
    sure: list[float] = field(default_factory=list)
    behind: list[int] = field(default_factory=list)
    status: int = RUNNING
    blocks: list[int] = field(default_factory=list)
    hits: int = 0
    chains: int = 0

    def take_in(
        self,
        token: list[int],
        confidence: list[float],
        threshold: float,
        stops: set[int],
        verify: bool,
        price: float,
        k: int,
    ) -> None:
        """Accept from the readout of this sequence's rows: the pending tokens', the last's masks', then all others'."""
        if self.status != RUNNING:
            return
        drafts = self.tokens[len(self.tokens) - self.pending + 1 :] if verify else []
        certain = self.tokens[: len(self.tokens) - len(drafts)]
        if any(math.isnan(c) for c in confidence):
            self.tokens, self.pending, self.status = certain, 0, FAULT
            return

        row = 0 if verify else self.pending - 1  # the row behind the last token that surely stands
        news, next_drafts = [], []
        while row < len(drafts) and token[row] == drafts[row]:
            news.append(token[row])
            row += 1
        news.append(token[row])
        begin = self.pending + (0 if row == self.pending - 1 else self.behind[-1] + sum(self.behind[:row]))
        self.sure = []
        if verify or confidence[row] > threshold:
            for i in range(begin, begin + self.behind[row]):
                if confidence[i] <= threshold:
                    break
                (next_drafts if verify else news).append(token[i])
                self.sure.append(confidence[i])
        if verify:
            self.remember(row, tried=len(confidence) > 1, ended=row < k - 1)
            while self.sure and math.prod(self.sure) < price:
                self.sure.pop()
                next_drafts.pop()
            # What stands behind a stop token is never emitted.
            end = next((i + 1 for i, y in enumerate(next_drafts) if y in stops), len(next_drafts))
            del next_drafts[end:], self.sure[end:]

        self.blocks.append(0)
        for y in news:
            certain.append(y)
            self.blocks[-1] += 1
            if y in stops or len(certain) == self.limit:
                self.tokens, self.pending, self.status = certain, 0, STOPPED if y in stops else LIMIT
                return
        next_drafts = next_drafts[: self.limit - len(certain)]
        self.tokens = certain + next_drafts
        self.pending = 1 + len(next_drafts) if verify else self.blocks[-1]

    def remember(self, confirmed: int, tried: bool, ended: bool) -> None:
        """Confirmed drafts and ended chains, of which a 32nd is forgotten a chain and a 512th a pass without one."""
        bits = 5 if tried else 9
        self.hits += tried * confirmed * UNIT - (self.hits >> bits)
        self.chains += tried * ended * UNIT - (self.chains >> bits)

    def worthy(self, chance: float, most: int, price: float) -> int:
        """How many masks are worth the price behind a token at which the chain of drafts ends with that chance."""
        odds = (self.hits + 4 * UNIT) * 2**16 // (self.hits + self.chains + 6 * UNIT) / 2**16
        power, masks = odds, 0
        while masks < most and chance * power >= price:
            power *= odds
            masks += 1
        return masks


def deal(texts: list[Text], rows: int, k: int, extra: int, price: float, verify: bool, stops: list[set[int]]) -> None:
    """Masks for each sequence, dealt like cards: one a round to everybody who can use one more.

    Where there are not even rows for all that is pending, the longest drop drafts. Masks go behind the last pending
    token, then, `extra` at most, behind those where the drafts are likeliest to end.
    """
    cards = [0] * len(texts)
    wants = []
    level = k
    while verify and sum(min(text.pending, level) for text in texts) > rows and level > 1:
        level -= 1
    for text, own in zip(texts, stops):
        if text.pending > level:
            del text.tokens[len(text.tokens) - (text.pending - level) :]
            text.pending = level
        first = len(text.tokens) - text.pending
        text.behind = [max(0, min(k - 1, text.limit - first - i - 2)) for i in range(text.pending)]
        if verify and text.pending:
            sure = text.sure[: text.pending - 1]
            chances = [math.prod(sure[:i]) * (1 - c) for i, c in enumerate(sure)] + [math.prod(sure)]
            text.behind = [text.worthy(chance, most, price) for chance, most in zip(chances, text.behind)]
            if text.pending > 1 and text.tokens[-1] in own:
                text.behind[-1] = 0
        wants.append(text.behind[-1] + min(extra, sum(text.behind[:-1])) if text.status == RUNNING else 0)
    spare = rows - sum(text.pending for text in texts)
    assert spare >= 0
    while spare and (takers := [b for b, want in enumerate(wants) if cards[b] < want][:spare]):
        for b in takers:
            cards[b] += 1
        spare -= len(takers)
    for text, left in zip(texts, cards):
        for i in [text.pending - 1, *likeliest_ends(text.sure[: text.pending - 1])]:
            if text.behind:
                text.behind[i] = min(text.behind[i], left)
                left -= text.behind[i]


class Machine:
    """`advance` and the model, side by side through a decode."""

    def __init__(
        self,
        form: Form,
        prompts: list[list[int]],
        new_tokens: list[int],
        *,
        k: int,
        rows: int,
        verify: bool,
        threshold: float,
        stops: set[int] | list[set[int]],
        dtype: torch.dtype = torch.float32,
        masks: int = 0,
        price: float = 0.0,
        budget: Callable[[], int] | None = None,
    ) -> None:
        B = len(prompts)
        self.form, self.k, self.verify, self.dtype, self.masks = form, k, verify, dtype, masks
        # One set for all, or some that are dealt out in turns.
        each = stops if isinstance(stops, list) else [stops]
        self.stops = [each[b % len(each)] for b in range(B)]
        places = max(1, *map(len, each))
        stop_ids = torch.tensor([(sorted(own) + [-1] * places)[:places] for own in self.stops])
        self.threshold, self.price = threshold, price
        self.terms = Terms(torch.tensor(threshold), stop_ids, torch.tensor(price).double())
        # Of each pass, what the next may have of the rows.
        self.budget = budget
        if budget is not None:
            self.terms = replace(self.terms, budget=torch.tensor(0))
        self.texts = [Text(list(prompt), len(prompt) + n) for prompt, n in zip(prompts, new_tokens)]
        self.capacity = max(text.limit for text in self.texts)
        device = torch.device("cpu")
        self.sequences = Sequences.allocate(B, self.capacity, max(new_tokens), device)
        self.rows = Rows.allocate(rows, B, device, k)
        self.sequences.tokens.fill_(UNWRITTEN)
        for b, text in enumerate(self.texts):
            self.sequences.tokens[b, : len(text.tokens)] = torch.tensor(text.tokens)
            self.sequences.length[b] = len(text.tokens)
            self.sequences.limit[b] = text.limit
        self.sequences.pending.fill_(1)
        # As after the prefill: k rows each, whatever the budget of a step.
        self.rows.expect_prefill(k)
        for text in self.texts:
            text.behind = [k - 1]
        self.counts = [k] * B
        self.size = B * k
        self.addresses = self._addresses()

    def _addresses(self) -> list[int]:
        return [
            x.data_ptr()
            for state in (self.sequences, self.rows, self.terms)
            for x in vars(state).values()
            if x is not None
        ]

    @property
    def running(self) -> bool:
        return any(text.status == RUNNING for text in self.texts)

    def take_in(self, readouts: list[tuple[list[int], list[float]]]) -> None:
        """One pass: for each sequence the tokens and confidences of its rows."""
        token = [y for tokens, _ in readouts for y in tokens]
        confidence = [c for _, confidences in readouts for c in confidences]
        unused = self.size - len(token)
        # What is read out of unused rows means nothing: a sure stop token, or a fault.
        stop = min(set().union(*self.stops), default=0)
        token += [stop if r % 2 else -1 for r in range(unused)]
        confidence += [1.0 if r % 2 else math.nan for r in range(unused)]
        if self.budget is not None:
            self.terms.budget.fill_(self.budget())
        ended = [(b, self.sequences.tokens[b, :-1].clone()) for b, t in enumerate(self.texts) if t.status != RUNNING]
        self.form(
            self.sequences,
            self.rows,
            self.terms,
            torch.tensor(token, dtype=torch.int64),
            torch.tensor(confidence, dtype=self.dtype),
            k=self.k,
            verify=self.verify,
            mask_token_id=MASK,
            masks=self.masks,
        )
        for text, stops, (tokens, confidences) in zip(self.texts, self.stops, readouts):
            text.take_in(tokens, confidences, self.threshold, stops, self.verify, self.price, self.k)
        for b, tokens in ended:
            assert torch.equal(self.sequences.tokens[b, :-1], tokens)
        self.compare()

    def compare(self) -> None:
        sequences, rows, texts = self.sequences, self.rows, self.texts
        R, M = len(rows.seq), self.masks
        dealt = R if self.budget is None or not self.verify else min(R, int(self.terms.budget))
        deal(texts, dealt, self.k, M, self.price, self.verify, self.stops)
        assert self._addresses() == self.addresses
        assert sequences.status.tolist() == [text.status for text in texts]
        assert sequences.length.tolist() == [len(text.tokens) for text in texts]
        assert sequences.pending.tolist() == [text.pending for text in texts]
        assert sequences.passes.tolist() == [len(text.blocks) for text in texts]
        running = [b for b, text in enumerate(texts) if text.status == RUNNING]
        assert sequences.hits[running].tolist() == [texts[b].hits for b in running]
        assert sequences.chains[running].tolist() == [texts[b].chains for b in running]
        for b, text in enumerate(texts):
            assert sequences.tokens[b, : len(text.tokens)].tolist() == text.tokens
            assert (sequences.tokens[b, text.limit : self.capacity] == UNWRITTEN).all()
            assert sequences.blocks[b, : len(text.blocks)].tolist() == text.blocks
            assert not sequences.blocks[b, len(text.blocks) : -1].any()

        expected = []
        start = [0]
        for b, text in enumerate(texts):
            first, end = len(text.tokens) - text.pending, M + len(text.tokens)
            pending = text.tokens[first:]
            # Sequence, position, slot, token, and what it sees: tokens below a slot, its own masks from a slot on.
            expected += [(b, first + i, M + first + i, x, *[M + first + i + 1] * 2) for i, x in enumerate(pending)]
            last = text.behind[-1] if text.behind else 0
            expected += [(b, len(text.tokens) + j, end + j, MASK, end, end) for j in range(last)]
            slot = 0
            for i, n in enumerate(text.behind[:-1]):
                at = first + i + 1
                expected += [(b, at + j, slot + j, MASK, M + at, slot) for j in range(n)]
                slot += n
            assert slot <= M
            start.append(len(expected))
            if M:
                assert rows.behind[b].tolist() == text.behind + [0] * (self.k - text.pending)
        assert rows.start.tolist() == start
        used = len(expected)
        assert used <= dealt
        rule = (rows.prefix_end, rows.span_start) if M else ()
        planned = zip(*(x.tolist() for x in (rows.seq, rows.position, rows.slot, rows.token, *rule)))
        assert list(planned)[:used] == [row[: 4 + len(rule)] for row in expected]
        assert (rows.slot[used:] == M + self.capacity).all()
        if M:
            assert not rows.prefix_end[used:].any()
            assert (rows.span_start[used:] > M + self.capacity).all()
        assert not rows.position[used:].any()
        assert not rows.token[used:].any()
        assert ((rows.seq >= 0) & (rows.seq < len(texts))).all()
        self.counts = [text.pending + sum(text.behind) for text in texts]
        self.size = R


@st.composite
def scenarios(draw: st.DrawFn, behind_drafts: bool = False, interpreted: bool = False) -> dict[str, object]:
    """A batch, a strategy, a budget and how the model behaves: all that `decode` needs.

    Interpreted, a pass costs the same for any batch: more sequences, of fewer passes each.
    """
    k = draw(st.sampled_from([2, 3, 4, 5] if behind_drafts else [1, 2, 3, 4, 5, 6, 16, 20]))
    batch = draw(st.integers(3 if interpreted else 1, 4 if behind_drafts and not interpreted else 6))
    longest = 8 if interpreted else (4 if behind_drafts else 8) * k
    verify = behind_drafts or draw(st.booleans())
    masks = draw(st.integers(1, (k - 1) ** 2)) if behind_drafts else 0
    return {
        "k": k,
        # From what pending tokens need to more than anybody can use; near the lower end masks are scarce, and
        # Verified drops drafts, down to a row a sequence.
        "rows": batch * (draw(st.sampled_from([1, k, k])) if verify else k)
        + draw(st.one_of(st.integers(0, 2), st.integers(0, batch * (k - 1 + masks) + 3))),
        "price": draw(st.sampled_from([0.0, 0.0, 0.05, 0.25, 0.625, 2.0])) if verify else 0.0,
        "verify": verify,
        "capped": draw(st.booleans()),
        "masks": masks,
        # Exact in float32, so that a confidence can equal it; -1 is Static.
        "threshold": draw(st.sampled_from([0.0, 0.5, 0.875, 1.0] if verify else [-1.0, -1.0, 0.0, 0.5, 0.875, 1.0])),
        "prompts": draw(st.lists(st.integers(1, 5), min_size=batch, max_size=batch)),
        "new_tokens": draw(st.lists(st.integers(1, longest), min_size=batch, max_size=batch)),
        "stops": draw(st.sampled_from([set(), {0}, {0, 3}, {7}, [{0}, {3, 7}, set()]])),
        "vocabulary": draw(st.sampled_from([2, 10, 40])),
        "agreement": draw(st.sampled_from([0.0, 0.5, 0.9, 1.0])),
        "sureness": draw(st.sampled_from([0.0, 0.5, 0.9, 1.0, 1.0])),
        "fault": draw(st.sampled_from([0.0, 0.0, 0.02])),
        "dtype": draw(st.sampled_from([torch.float32, torch.float64])),
        "seed": draw(st.integers(0, 2**32)),
    }


def decode(
    form: Form,
    *,
    k: int,
    rows: int,
    verify: bool,
    masks: int,
    threshold: float,
    prompts: list[int],
    new_tokens: list[int],
    stops: set[int] | list[set[int]],
    vocabulary: int,
    agreement: float,
    sureness: float,
    fault: float,
    price: float,
    capped: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    """Decode with random readouts until every sequence is done, and one pass more."""
    rng = random.Random(seed)

    def readout(text: Text, count: int) -> tuple[list[int], list[float]]:
        tokens = [rng.randrange(vocabulary) for _ in range(count)]
        for i in range(text.pending - 1):
            if rng.random() < agreement:
                tokens[i] = text.tokens[len(text.tokens) - text.pending + 1 + i]
        unsure = [abs(threshold), 0.125]
        confidences = [rng.choice([1.0, 0.9375, 0.90625] if rng.random() < sureness else unsure) for _ in range(count)]
        for i in range(count):
            if rng.random() < fault:
                tokens[i], confidences[i] = -1, math.nan
        return tokens, confidences

    machine = Machine(
        form,
        [[rng.randrange(vocabulary) for _ in range(n)] for n in prompts],
        new_tokens,
        k=k,
        rows=rows,
        verify=verify,
        masks=masks,
        threshold=threshold,
        stops=stops,
        dtype=dtype,
        price=price,
        budget=(lambda: rng.randint(len(prompts), rows + 1)) if capped else None,
    )
    passes = 0
    while machine.running:
        machine.take_in([readout(text, count) for text, count in zip(machine.texts, machine.counts)])
        passes += 1
        assert passes <= max(new_tokens)
    machine.take_in([([], [])] * len(prompts))
    assert (machine.rows.slot == masks + machine.capacity).all()
    for text, prompt, n in zip(machine.texts, prompts, new_tokens):
        assert sum(text.blocks) == len(text.tokens) - prompt <= n
        assert all(1 <= block <= k for block in text.blocks)


def state(machine: Machine) -> tuple[int, int, list[int]]:
    """Status, pending and blocks of the first sequence."""
    sequences = machine.sequences
    return int(sequences.status[0]), int(sequences.pending[0]), sequences.blocks[0, : sequences.passes[0]].tolist()
