import gc
import os
import signal
import socket
import sys
import time
import traceback
import types
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.interpreter import prepare
from torch import Tensor

# Triton reads this when it is first imported: without a GPU, its interpreter runs the kernels on CPU tensors.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Autograd makes its threads for other devices than the CPU at the first backward, if it knows of any, and a process
# that has such threads cannot be forked: in a build with CUDA a made-up device of some test would count.
torch.ones((), requires_grad=True).backward()
# Of two processes that talk.
SECONDS = 240


def laid_out(x: Tensor, device: str) -> Tensor:
    """A copy of x on the device with the strides of x and as far from an address that is a multiple of 16 bytes.

    `x.to(device)` would make gaps vanish, and with them what passes 2^31 and what is not aligned.
    """
    reach = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride())) if x.numel() else 0
    offset = x.data_ptr() % 16 // x.element_size()
    there = torch.empty(offset + reach, dtype=x.dtype, device=device).as_strided(x.shape, x.stride(), offset)
    once(there).copy_(once(x))
    return there


def once(x: Tensor) -> Tensor:
    """Each element of an expanded tensor once."""
    for dim, stride in enumerate(x.stride()):
        if stride == 0 and x.shape[dim] > 1:
            x = x.narrow(dim, 0, 1)
    return x


def on_gpu(form: Callable[..., Any], device: str = "cuda") -> Callable[..., Any]:
    """The form with its tensors carried to the GPU and back, those that it changed in place included."""

    def carried(*args: Any, **kwargs: Any) -> Any:
        pairs: list[tuple[Tensor, Tensor]] = []

        def carry(x: Any) -> Any:
            if isinstance(x, Tensor):
                pairs.append((x, laid_out(x, device)))
                return pairs[-1][1]
            if isinstance(x, list):
                return [carry(y) for y in x]
            return type(x)(**{f.name: carry(getattr(x, f.name)) for f in fields(x)}) if is_dataclass(x) else x

        result = form(*map(carry, args), **{name: carry(x) for name, x in kwargs.items()})
        for here, there in pairs:
            once(here).copy_(once(there))
        if isinstance(result, tuple):
            return tuple(x.cpu() for x in result)
        return result.cpu() if isinstance(result, Tensor) else result

    return carried


@pytest.hookimpl(tryfirst=True)  # before pytest selects by marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Kernels run in Triton's interpreter, or on the GPU where there is one: the same tests either way."""
    gpu = torch.cuda.is_available()
    for item in items:
        if item.get_closest_marker("kernel"):
            params = getattr(getattr(item, "callspec", None), "params", {})
            # Said wherever tests are collected: where there is a GPU, it would end all of them.
            assert "form" in params, f"{item.nodeid}: a test of a kernel takes it as its parameter `form`"
            if gpu:
                item.add_marker("gpu")
                params["form"] = on_gpu(params["form"])
            elif not find_spec("triton"):
                item.add_marker(pytest.mark.skip(reason="Triton is not installed"))
        elif gpu and "interpreter" in getattr(item, "fixturenames", ()):
            item.add_marker("gpu")
        elif item.get_closest_marker("gpu") and not gpu:
            reason = "needs a CUDA or ROCm device; torch.cuda.is_available() is False"
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_collection_finish() -> None:
    """What has been imported stays: half a million objects that every `gc.collect`, as at a training's end, looked at.

    A fork does not copy them either.
    """
    gc.collect()
    gc.freeze()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note each failure at once where MTPKERN_FAILURES names a file: a run that is killed sums nothing up."""
    file = os.environ.get("MTPKERN_FAILURES")
    if file and report.failed and "PYTEST_XDIST_WORKER" not in os.environ:  # the workers' reports come here, too
        with open(file, "a") as out:
            out.write(f"==== {report.nodeid} ({report.when})\n{report.longreprtext}\n{report.capstderr[-2000:]}\n")


# So few tokens that drafts come true by chance every few passes.
VOCABULARY = 16
MASK = VOCABULARY - 1
PAD = 0

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "pad_token_id": PAD,
    "bos_token_id": None,
    "eos_token_id": None,
}


def random_model(model_type: str, *, seed: int = 0, attention: str = "sdpa", **settings: Any) -> Any:
    """A tiny random model in float32 whose text varies, its mask token recorded.

    Weights as transformers draws them make a model echo its input: they leave the residual stream to the embedding,
    which gemma scales up besides. Here every matrix is drawn wide, and neither embedding leans on the other.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, **{**_COMMON, **settings})
    config.mtpkern = {"mask_token_id": MASK, "k_max": 5, "version": 1}
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() >= 2:
                weight.normal_(0, 1.5 * weight.shape[-1] ** -0.5, generator=generator)
            elif "norm" not in name:
                weight.normal_(0, 0.5, generator=generator)
        model.get_input_embeddings().weight.normal_(0, 1, generator=generator)
        model.get_output_embeddings().weight.normal_(0, 0.5, generator=generator)
    return model


def random_prompts(*lengths: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Left-padded prompts [B, T] of these lengths, without the mask token, and their attention mask."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(1, MASK, (len(lengths), max(lengths)), generator=generator)
    real = torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]
    return words.masked_fill(~real, PAD), real.long()


def adapted_model(model: Any, targets: str = "all-linear", seed: int = 1) -> Any:
    """A model with a gated adapter of rank 4 that changes what its mask rows predict; none of it is trained."""
    lora = pytest.importorskip("mtpkern.train.lora")
    del model.config.mtpkern
    peft_model = lora.add_gated_lora(model, rank=4, k_max=4, targets=targets).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in peft_model.named_parameters():
        parameter.requires_grad_(False)
        if "lora_B" in name:
            parameter.normal_(0, 0.5, generator=generator)
    return peft_model


@pytest.fixture(scope="session")
def tiny() -> SimpleNamespace:
    """What the tests of decoding share; test files cannot import one another."""
    return SimpleNamespace(
        model=random_model,
        adapted=adapted_model,
        prompts=random_prompts,
        vocabulary=VOCABULARY,
        mask=MASK,
        pad=PAD,
    )


@pytest.fixture(scope="session")
def in_two_processes() -> Callable[[Callable[[int], None]], None]:
    """Runs work(rank) in two forks that can talk, as torchrun sets them up; fails with what either of them says."""
    if not hasattr(os, "fork"):
        pytest.skip("needs os.fork")
    return run_in_two_processes


def run_in_two_processes(work: Callable[[int], None]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = []
    for rank in range(2):
        if pid := os.fork():
            pids.append(pid)
            continue
        code = 1
        try:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            work(rank)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    deadline, codes = time.monotonic() + SECONDS, dict[int, int]()
    while len(codes) < 2 and time.monotonic() < deadline and not any(codes.values()):
        for pid in set(pids) - set(codes):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    for pid in set(pids) - set(codes):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert list(codes.values()) == [0, 0], "a process failed or took too long; its error stands above"


@pytest.fixture(autouse=True)
def uncompiled_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling takes seconds for each model and shape: only tests of it wait for that."""
    monkeypatch.setattr("mtpkern.layers.COMPILE_CAPTURED", False)


@pytest.fixture(autouse=True)
def rows_for_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which pass brings which tokens would follow the load of the machine; test_load.py has a fixture of this name."""
    monkeypatch.setattr("mtpkern.load.Load.price", lambda *_: 0.0)
    monkeypatch.setattr("mtpkern.load.Ladder.choose", lambda self, *_: (self.rungs[-1], 0.0))


@pytest.fixture(autouse=True)
def undrawn_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every training would end with half a second of matplotlib; `test_picture` undoes this."""
    monkeypatch.setattr("mtpkern.train.evaluate._draw", lambda *_: None)


@pytest.fixture(scope="session", autouse=True)
def prepared_interpreter() -> None:
    if find_spec("triton") and os.environ.get("TRITON_INTERPRET") == "1":
        prepare()


@pytest.fixture
def nan_in_new_tensors() -> Iterator[None]:
    """Every tensor that is allocated without values is full of NaN: reading what was not written shows."""
    # As a warning only: on a GPU products are called nondeterministic unless an environment variable says otherwise.
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def interpreter(nan_in_new_tensors: None) -> None:
    """A test of kernels in Triton's interpreter. What nobody has written is NaN, so that reading it shows."""


_TEMPLATES = {
    "llama": (
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
        "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    "qwen": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
}


def byte_tokenizer(kind: str) -> Any:
    """A tokenizer of bytes with the special tokens and the manner of template of Llama 3 ("llama") or Qwen3 ("qwen").

    A blank line is one token, as theirs is; a Llama has BOS put in front, a Qwen has none.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate([*letters, "ĊĊ"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ċ", "Ċ")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if kind == "llama":
        special = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
        others = ["<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"]
    else:
        special, others = {"eos_token": "<|im_end|>"}, ["<|endoftext|>", "<|im_start|>"]
    tokenizer.add_special_tokens([*special.values(), *others])
    if kind == "llama":
        bos = special["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=_TEMPLATES[kind], **special)


@pytest.fixture
def bytes_of() -> Callable[[str], Any]:
    """`bytes_of("llama")`: a new tokenizer."""
    return byte_tokenizer


@pytest.fixture
def start(tmp_path: Path, tiny: SimpleNamespace) -> Path:
    """A folder with a tiny random model that has never heard of a mask token, and a tokenizer of bytes."""
    tokenizer = byte_tokenizer("llama")
    model = tiny.model("llama", vocab_size=len(tokenizer), num_hidden_layers=1, max_position_embeddings=512)
    del model.config.mtpkern
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    return tmp_path / "start"


@pytest.fixture(scope="session")
def solver(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`solver(k_max)`: a folder with a tiny random Llama for word problems, whose weights vary enough not to echo."""
    import mtpkern
    from mtpkern.train.arithmetic import build_tokenizer

    def make(k_max: int, template: str | None = None) -> Path:
        from transformers import LlamaConfig, LlamaForCausalLM

        folder, tokenizer = tmp_path_factory.mktemp("checkpoint"), build_tokenizer()
        tokenizer.chat_template = template
        torch.manual_seed(0)
        names = ("eos_token_id", "bos_token_id", "pad_token_id")
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        special = {name: getattr(tokenizer, name) for name in names}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.3, **sizes, **special))
        mtpkern.add_mask_token(model, tokenizer)
        model.config.mtpkern = {**model.config.mtpkern, "k_max": k_max}
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


def llama_as_gguf(path: Any, *, pre: str = "smollm", eot: bool = True) -> tuple[Any, Any]:
    """A tiny llama as llama.cpp writes one, its matrices in Q8_0: returns the model that it is, and its tokenizer."""
    gguf = pytest.importorskip("gguf")
    tokenizer = byte_tokenizer("qwen")
    model = random_model("llama", vocab_size=261, hidden_size=32, intermediate_size=64, eos_token_id=256)
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    vocabulary.append("ĠĠ")  # a list of one merge is none, to some readers
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(261)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in vocabulary])
    writer.add_token_merges(["Ċ Ċ", "Ġ Ġ"])
    # As in SmolLM2's: BOS is the begin of a turn, which is not put in front.
    writer.add_bos_token_id(tokenizer.convert_tokens_to_ids("<|im_start|>"))
    writer.add_add_bos_token(False)
    # The template ends an answer with <|im_end|>; that is all that says so.
    writer.add_eos_token_id(tokenizer.convert_tokens_to_ids("<|endoftext|>"))
    if eot:
        writer.add_eot_token_id(tokenizer.convert_tokens_to_ids("<|im_start|>"))
    writer.add_chat_template(tokenizer.chat_template)
    heads = {"attn_q": 4, "attn_k": 2}
    names = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    names |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
    names |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    state = model.state_dict()
    for name, x in state.items():
        parts = name.split(".")
        if "layers" in parts:
            theirs = f"blk.{parts[2]}.{names[parts[-2]]}"
        else:
            theirs = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}[parts[-2]]
        data = x.numpy()
        if data.ndim == 1:
            writer.add_tensor(f"{theirs}.weight", data)
            continue
        n = heads.get(theirs.rpartition(".")[2])
        if n:  # llama.cpp turns neighbours, transformers halves
            data = data.reshape(n, 2, -1, data.shape[1]).swapaxes(1, 2).reshape(data.shape)
        kind = gguf.GGMLQuantizationType.Q8_0
        packed = gguf.quantize(data, kind)
        back = gguf.dequantize(packed, kind)
        if n:
            back = back.reshape(n, -1, 2, data.shape[1]).swapaxes(1, 2).reshape(data.shape)
        x.copy_(torch.from_numpy(back.copy()))
        writer.add_tensor(f"{theirs}.weight", packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model, tokenizer


@pytest.fixture
def write_gguf() -> Callable[..., tuple[Any, Any]]:
    """`write_gguf("tiny.gguf")`: a file of a tiny chat model."""
    return llama_as_gguf


@pytest.fixture
def gsm_symbolic(monkeypatch):
    """A stand-in for the module of reasoning-gym that makes word problems, with its names: twenty templates."""
    name = "reasoning_gym.arithmetic.gsm_symbolic.gsm_symbolic"
    module = types.ModuleType(name)

    def generator(i):
        def problem(rng, difficulty=1.0):
            n = rng.randrange(10**6)
            return {"question": f"Template {i}, {n} + {i}?", "answer": str(n + i), "answer_cot": f"#### {n + i}"}

        return problem

    class Problems:
        def __init__(self, config):
            self.generators = {i: generator(i) for i in range(20)}

    module.tasks_ok, module.GSMSymbolicDataset, module.GSMSymbolicDatasetConfig = list(range(20)), Problems, dict
    for i in range(name.count(".")):
        parent = ".".join(name.split(".")[: i + 1])
        monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    monkeypatch.setitem(sys.modules, name, module)
