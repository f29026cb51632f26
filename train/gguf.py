"""GGUF: a file of llama.cpp as transformers reads it, and what transformers leaves out of it.

    left out                       mended here
    the split of digits that some  each digit apart, before the bytes: without it two spaces in front of a number are
    tokenizers begin with          other tokens than the model was trained with
    all stop tokens but one        the file's own end of turn and end of message, and the token that the chat template
                                   writes behind an answer
    which tokens are special       as the file has them: 5.17 takes the first added token for the end of a text

Source   gguf (its reader); https://github.com/ggml-org/llama.cpp, the pre-tokenizers by their names
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# tokenizer.ggml.pre of the tokenizers whose first rule is that a digit stands alone.
_DIGITS_ALONE = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
_STOPS = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")


def gguf_of(source: str) -> Path | None:
    """The GGUF that `source` is, or that is the only model in that folder; None where it is something else.

    Raises ValueError for a folder of several, ImportError where the package that reads them is missing.

        gguf_of("SmolLM2-135M-Instruct.Q4_1.gguf")
    """
    path = Path(source)
    found = [path] if path.is_file() and path.suffix == ".gguf" else []
    if path.is_dir() and not (path / "config.json").exists():
        found = sorted(path.glob("*.gguf"))
    if not found:
        return None
    if len(found) > 1:
        raise ValueError(f"{source}: expected one GGUF; got {', '.join(p.name for p in found)}: give the path of one")
    if not find_spec("gguf"):
        raise ImportError(f"{found[0]}: reading a GGUF needs gguf; run: pip install 'mtpkern[train,gguf]'")
    return found[0]


def metadata(path: Path) -> dict[str, Any]:
    """The file's own description of its tokenizer, by name, without the long lists. Raises ValueError for no GGUF."""
    from gguf import GGUFReader

    try:
        fields = GGUFReader(path).fields
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise ValueError(f"{path}: no whole GGUF ({error}); download it again") from None
    lists = ("tokens", "scores", "token_type", "merges")
    return {name: field.contents() for name, field in fields.items() if name.rpartition(".")[2] not in lists}


def mend_tokenizer(tokenizer: PreTrainedTokenizerBase, described: dict[str, Any]) -> None:
    """Name the special tokens as the file does; split digits where its name says so and transformers does not."""
    from tokenizers import pre_tokenizers

    for name, called in _SPECIAL.items():
        number = described.get(f"tokenizer.ggml.{called}_token_id")
        if isinstance(number, int):
            setattr(tokenizer, f"{name}_token", tokenizer.convert_ids_to_tokens(number))
    if described.get("tokenizer.ggml.pre") not in _DIGITS_ALONE:
        return
    backend = tokenizer.backend_tokenizer
    if isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel):
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])


def stop_tokens(tokenizer: PreTrainedTokenizerBase, described: dict[str, Any]) -> list[int]:
    """The tokens that end an answer: those that the file names, and what the chat template writes behind an answer."""
    stops = [described[name] for name in _STOPS if isinstance(described.get(name), int)]
    if tokenizer.chat_template is not None:
        turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Bye"}]
        behind = str(tokenizer.apply_chat_template(turns, tokenize=False)).rpartition("Bye")[2].lstrip()
        ids = tokenizer(behind, add_special_tokens=False).input_ids[:1]
        stops += [i for i in ids if i in tokenizer.added_tokens_decoder and tokenizer.added_tokens_decoder[i].special]
    return list(dict.fromkeys(stops))
