"""Outputs as they end, and readers that leave."""

import threading
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest

from mtpkern import Static
from mtpkern.batching import generate_batch, iterate_batch
from support.batches import STOP, alone, assert_as_alone, mixed_prompts


@pytest.fixture(scope="module")
def model(tiny: SimpleNamespace) -> Any:
    return tiny.model("llama")


# The iterator


def test_outputs_come_as_they_end(model: Any) -> None:
    prompts = [[5, 6], [7, 8], [9, 1]]
    options: dict[str, Any] = {"strategy": Static(1), "batch_size": 2, "order": "given", "max_new_tokens": [9, 2, 3]}
    assert [output.index for output in iterate_batch(model, prompts, **options)] == [1, 2, 0]


@pytest.mark.parametrize("leave", ["close", "break", "raise"])
def test_a_reader_that_leaves_leaves_the_model_whole(model: Any, leave: str) -> None:
    prompts, new = mixed_prompts()
    before = threading.active_count()
    outputs = iterate_batch(model, prompts, max_new_tokens=new, batch_size=2)
    if leave == "close":
        next(outputs)
        # Between two outputs the model is the reader's, as it was.
        assert model.config._attn_implementation == "sdpa"
        outputs.close()
        assert list(outputs) == []
    else:
        for _ in outputs:
            break
        with suppress(KeyboardInterrupt), outputs:
            if leave == "raise":
                raise KeyboardInterrupt
    assert threading.active_count() == before
    assert (
        alone(model, prompts[0], 5).tokens
        == generate_batch(model, prompts[:1], max_new_tokens=5, eos_token_id=STOP)[0].tokens
    )


def test_an_exception_in_the_middle_leaves_the_model_whole(model: Any) -> None:
    def interrupt(done: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    prompts, new = mixed_prompts()
    with pytest.raises(KeyboardInterrupt):
        generate_batch(model, prompts, max_new_tokens=new, batch_size=2, progress=interrupt)
    assert model.config._attn_implementation == "sdpa"
    assert_as_alone(model, prompts[:1], [5], generate_batch(model, prompts[:1], max_new_tokens=5, eos_token_id=STOP))
