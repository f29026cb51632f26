"""DDP and FSDP2 over gloo, two processes on a CPU: one the same as the other, and both resumed exactly.

The processes are forks: they need not import everything again.
"""

import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from mtpkern.adapter import load_adapter
from mtpkern.train.arithmetic import build_tokenizer
from mtpkern.train.collator import MTPCollator
from mtpkern.train.config import MTPConfig
from mtpkern.train.evaluate import HeldOut
from mtpkern.train.gated_trainer import GatedTrainer
from mtpkern.train.resume import newest_checkpoint
from mtpkern.train.trainer import MTPTrainer

V, MASK, EOS = 31, 30, 7
SECONDS = 240


def llama(seed=0, tied=False):
    torch.manual_seed(seed)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"eos_token_id": EOS, "bos_token_id": 1, "pad_token_id": 0}
    return LlamaForCausalLM(LlamaConfig(vocab_size=V, tie_word_embeddings=tied, **shape, **ends))


def rows(n=26):
    texts = [[1, *(8 + (i + j) % 20 for j in range(6 + i % 7)), EOS] for i in range(n)]
    return [{"input_ids": text, "prompt_length": 3} for text in texts]


def trainer(path, seed=0, tied=False, **change):
    arguments = {
        "max_steps": 6,
        "save_steps": 4,
        "logging_steps": 1,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "use_cpu": True,
        "ddp_backend": "gloo",
        "disable_tqdm": True,
        "k_min": 2,
        "k_max": 4,
        "k_scope": "rank",
        "num_spans": 2,
        "prefix_weight": 0.5,
        "teacher_target": "soft",
    }
    return MTPTrainer(
        model=llama(seed, tied).to(torch.bfloat16 if change.get("pure_bf16") else None),
        teacher=None if change.get("lora_rank") else llama(3, tied),
        args=MTPConfig(str(path), **arguments | change),
        mask_token_id=MASK,
        train_dataset=rows(),
        eval_dataset=rows(5),
        held_out=HeldOut([[1, 9, 10], [1, 12], [1, 20, 21, 22]], ["1", "2", "3"], build_tokenizer(), max_new_tokens=6),
        data_collator=MTPCollator(0),
    )


def let_accelerate_shard_on_a_cpu():
    """accelerate takes FSDP for GPUs only, and sets up plain DDP on a CPU without a word."""
    from accelerate.state import AcceleratorState, DistributedType, PartialState

    original = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            # The first one's values go over the second one's every time that one is asked for.
            PartialState._shared_state["distributed_type"] = self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = init


def forget_engine():
    """accelerate keeps the engine of the last trainer."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state()
    GradientState._reset_state()


def alone(work):
    """The work of a process to which accelerate has said nothing yet."""

    def run(rank):
        from accelerate.state import PartialState

        forget_engine()
        PartialState._reset_state()
        work(rank)

    return run


def run_engine(folder, tied, *, resumed=True, **change):
    """Six steps, in the fourth a new epoch, then two again from its checkpoint; rank 0 leaves losses and weights."""
    results = {}
    for name, seed in (("whole", 0), ("rest", 9))[: 1 + resumed]:
        forget_engine()
        run = trainer(folder / "run", seed, tied, **change)
        torch.manual_seed(seed + run.args.process_index)
        run.train(resume_from_checkpoint=None if name == "whole" else str(folder / "run" / "checkpoint-4"))
        assert run.is_fsdp_enabled == all(isinstance(p, DTensor) for p in run.model.parameters())
        evaluated = run.evaluate()
        run.save_model(str(folder / name))
        losses = [x["loss"] for x in run.state.log_history if "loss" in x]
        results[name] = {"losses": losses} | {key: evaluated[f"eval_{key}"] for key in ("loss", "tokens_per_pass")}
        run.accelerator.wait_for_everyone()
    if run.args.process_index == 0:
        torch.save(results, folder / "results.pt")


@pytest.mark.slow("distributed::test_two_processes_take_the_gated_step_of_one")
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_fsdp_equals_ddp_and_both_resume_exactly(tmp_path, tied, in_two_processes):
    """Weights that are shared matter to what gathers and saves them: tied, shards alone are resumed."""

    def work(rank):
        let_accelerate_shard_on_a_cpu()
        for name in ("ddp", "fsdp"):
            (tmp_path / name).mkdir(exist_ok=True)
        run_engine(tmp_path / "ddp", tied, resumed=not tied)
        run_engine(tmp_path / "fsdp", tied, fsdp=True, fsdp_config={"activation_checkpointing": True})
        forget_engine()
        with pytest.raises(ValueError, match="LoRA under FSDP"):
            trainer(tmp_path / "lora", fsdp=True, lora_rank=2)
        forget_engine()
        with pytest.raises(ValueError, match="torch_compile under FSDP"):
            trainer(tmp_path / "compiled", fsdp=True, torch_compile=True)

    in_two_processes(alone(work))
    results = {name: torch.load(tmp_path / name / "results.pt") for name in ("ddp", "fsdp")}
    weights = {}
    for name, result in results.items():
        assert len(result["whole"]["losses"]) == 6
        whole, *rest = (AutoModelForCausalLM.from_pretrained(tmp_path / name / part).state_dict() for part in result)
        assert len(rest) == (name == "fsdp" or not tied)
        for again in rest:
            assert result["whole"] == result["rest"]
            assert all(torch.equal(whole[key], again[key]) for key in whole)
        weights[name] = whole
        assert newest_checkpoint(tmp_path / name / "run") is not None
    for a, b in zip(results["ddp"]["whole"]["losses"], results["fsdp"]["whole"]["losses"]):
        assert a == pytest.approx(b, abs=1e-6)
    ddp, fsdp = (results[name]["whole"]["tokens_per_pass"] for name in ("ddp", "fsdp"))
    assert ddp == pytest.approx(fsdp)
    for key, weight in weights["ddp"].items():
        torch.testing.assert_close(weight, weights["fsdp"][key], rtol=0, atol=1e-6)
    start = llama(0, tied).state_dict()
    assert all((weights["ddp"][key] - start[key]).abs().max() > 1e-3 for key in start)


@pytest.mark.slow("distributed::test_two_processes_take_the_gated_step_of_one")
def test_bfloat16_weights_under_fsdp(tmp_path, in_two_processes):
    """Shards stay bfloat16: the losses are DDP's, and they resume exactly."""

    def work(rank):
        let_accelerate_shard_on_a_cpu()
        for name in ("ddp", "fsdp"):
            (tmp_path / name).mkdir(exist_ok=True)
            fsdp = name == "fsdp"
            run_engine(tmp_path / name, False, resumed=fsdp, pure_bf16=True, fsdp=fsdp)

    in_two_processes(alone(work))
    ddp, fsdp = (torch.load(tmp_path / name / "results.pt") for name in ("ddp", "fsdp"))
    assert fsdp["whole"] == fsdp["rest"]
    assert ddp["whole"]["losses"] == pytest.approx(fsdp["whole"]["losses"], abs=2e-2)
    assert ddp["whole"]["losses"][0] == pytest.approx(fsdp["whole"]["losses"][0], abs=1e-6)


@pytest.mark.slow("distributed::test_two_processes_take_the_gated_step_of_one")
def test_two_processes_take_the_step_of_one(tmp_path, in_two_processes):
    """Rows weigh the same on every rank; one rank's first micro-batch has no answer and so no span at all."""
    texts = rows(24)
    for text in (texts[2], texts[3]):
        text["prompt_length"] = len(text["input_ids"])

    def train(path, batch, **change):
        run = trainer(
            path,
            max_steps=3,
            per_device_train_batch_size=batch,
            # Plain gradient descent, and spans that depend on the text alone.
            optim="sgd",
            learning_rate=2.0,
            max_grad_norm=0,
            k_min=3,
            span_offset=1,
            # The longest text; else a region is as wide as the micro-batch makes it.
            max_length=14,
            k_max=3,
            anchor_kl_weight=0.3,
            train_sampling_strategy="sequential",
            save_strategy="no",
            **change,
        )
        run.train_dataset = texts
        run.train()
        run.accelerator.wait_for_everyone()
        return run, [x["loss"] for x in run.state.log_history if "loss" in x]

    def work(rank):
        run, losses = train(tmp_path, 2)
        if rank == 0:
            weights = run.accelerator.unwrap_model(run.model).state_dict()
            torch.save({"losses": losses, "weights": weights}, tmp_path / "two.pt")

    in_two_processes(alone(work))
    two = torch.load(tmp_path / "two.pt")
    run, losses = train(tmp_path, 4, ddp_backend=None)
    assert two["losses"] == pytest.approx(losses, abs=1e-6)
    start = llama().state_dict()
    for key, weight in run.model.state_dict().items():
        torch.testing.assert_close(two["weights"][key], weight, rtol=0, atol=1e-6)
        assert (weight - start[key]).abs().max() > 2e-5  # twenty times what may differ


def gated_trainer(path, batch, tied=False, dtype=None, **change):
    """Plain gradient descent, on spans that depend on the text alone; some texts have no answer and so no span.

    One comes twice in a batch, whose rank then needs a pass less than the other.
    """
    texts = rows(16)
    texts[7] = dict(texts[6])
    for text in texts[2:4]:
        text["prompt_length"] = len(text["input_ids"])
    arguments = {
        "gated": True,
        "lora_rank": 2,
        "teacher_target": "hard",
        "loss_support": "all",
        "k_min": 3,
        "k_max": 3,
        "num_spans": 2,
        "span_offset": 1,
        "max_length": 14,
        "max_steps": 3,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": 2,
        "train_sampling_strategy": "sequential",
        "optim": "sgd",
        "learning_rate": 2.0,
        "max_grad_norm": 0,
        "logging_steps": 1,
        "save_strategy": "no",
        "prefix_memory": 0.001,
        "use_cpu": True,
        "ddp_backend": "gloo",
        "disable_tqdm": True,
    }
    args = MTPConfig(str(path), **arguments | change)
    return GatedTrainer(
        model=gated_base(tied).to(dtype),
        args=args,
        train_dataset=texts,
        eval_dataset=rows(5),
        held_out=HeldOut([[1, 9, 10], [1, 12]], ["1", "2"], build_tokenizer(), max_new_tokens=6),
        data_collator=MTPCollator(0),
    )


def gated_base(tied):
    model = llama(tied=tied)
    with torch.no_grad():
        # Else so little depends on any query that its adapter would not move in three steps.
        for weight in model.parameters():
            weight *= 10 if weight.dim() > 1 else 1
    return model


def whole(run):
    """What is trained, gathered where it lies in shards."""
    trained = {name.removeprefix("module."): p.detach() for name, p in run.model.named_parameters() if p.requires_grad}
    return {name: (p.full_tensor() if isinstance(p, DTensor) else p).clone() for name, p in trained.items()}


def results(run):
    """Losses, what an evaluation finds, and the weights."""
    run.train()
    losses = [x["loss"] for x in run.state.log_history if "loss" in x]
    found = run.evaluate()
    return {"losses": losses, "found": [found["eval_loss"], found["eval_tokens_per_pass"]]}, whole(run)


@pytest.mark.parametrize("tied", [pytest.param(False, marks=pytest.mark.slow), True], ids=["untied", "tied"])
def test_two_processes_take_the_gated_step_of_one(tmp_path, tied, in_two_processes):
    """Adapters and the mask token's row, with prefixes kept on each rank; base and adapters whole and in shards."""

    def work(rank):
        let_accelerate_shard_on_a_cpu()
        for name, change in {"ddp": {}, "fsdp": {"fsdp": True}}.items():
            forget_engine()
            run = gated_trainer(tmp_path / name, 2, tied, **change)
            found = results(run)
            # Evaluation leaves what lies around the layers gathered.
            layers = [p for key, p in run.model.named_parameters() if ".layers." in key]
            assert all(isinstance(p, DTensor) == (name == "fsdp") for p in layers)
            units = [x for x in run.model.modules() if isinstance(x, FSDPModule) and isinstance(x, LlamaDecoderLayer)]
            assert len(units) == (2 if name == "fsdp" else 0)
            run.save_model(str(tmp_path / name / "adapter"))
            run.accelerator.wait_for_everyone()
            if rank == 0:
                # Three steps of two batches of two texts.
                assert len(run.prefixes) > 4
                torch.save(found, tmp_path / f"{name}.pt")

    in_two_processes(alone(work))
    run = gated_trainer(tmp_path, 4, tied, ddp_backend=None)
    start = whole(run)
    want, weights = results(run)
    for name in ("ddp", "fsdp"):
        found, theirs = torch.load(tmp_path / f"{name}.pt")
        assert found["losses"] == pytest.approx(want["losses"], abs=1e-6)
        # One process has other batches, the engines have the same.
        assert found["found"] == pytest.approx(torch.load(tmp_path / "ddp.pt")[0]["found"], abs=1e-5)
        assert theirs.keys() == weights.keys()
        for key, weight in weights.items():
            torch.testing.assert_close(theirs[key], weight, rtol=0, atol=1e-6)
            assert (weight - start[key]).abs().max() > 2e-5  # twenty times what may differ
        loaded = load_adapter(gated_base(tied), tmp_path / name / "adapter")
        saved = {key: p for key, p in loaded.named_parameters() if key in theirs}
        assert saved.keys() == theirs.keys()
        assert all(torch.equal(p, theirs[key]) for key, p in saved.items())


@pytest.mark.slow("distributed::test_two_processes_take_the_gated_step_of_one")
def test_a_gated_run_in_shards_resumes_exactly(tmp_path, in_two_processes):
    """A base in bfloat16, adapters and their moments in float32."""

    def work(rank):
        let_accelerate_shard_on_a_cpu()
        options = {"fsdp": True, "optim": "adamw_torch", "learning_rate": 1e-2}
        options |= {"save_strategy": "steps", "student_dtype": "bfloat16"}
        found = {}
        for name in ("whole", "rest"):
            forget_engine()
            run = gated_trainer(tmp_path, 2, save_steps=2, dtype=torch.bfloat16, **options)
            torch.manual_seed(len(found) + rank)
            run.train(resume_from_checkpoint=None if name == "whole" else str(tmp_path / "checkpoint-2"))
            found[name] = whole(run)
        assert all(torch.equal(found["rest"][key], x) for key, x in found["whole"].items())

    in_two_processes(alone(work))
