"""The command line: text and files in, the same tokens as `generate` out."""

import json
import re
import shutil
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

import mtpkern
import mtpkern.batching
from mtpkern.bench.problems import HELD_OUT, problems
from mtpkern.cli import main
from mtpkern.compare import HF_GENERATE, Problem, Tally, pad, read_problems
from mtpkern.demo import ASSETS, summary
from mtpkern.prompting import Prompting
from mtpkern.train.arithmetic import build_tokenizer
from mtpkern.train.formats import conversation_of
from support.commands import write_jsonl


def read_jsonl(text):
    return [json.loads(line) for line in text.splitlines()]


def greedy(chat_solver, prompt, new, **options):
    """What the model's own generate writes, one prompt at a time."""
    tokenizer = build_tokenizer()
    model = LlamaForCausalLM.from_pretrained(chat_solver, dtype=torch.float32)
    ids = torch.tensor([tokenizer(prompt).input_ids])
    return model.generate(ids, do_sample=False, max_new_tokens=new, **options)[0, ids.shape[1] :].tolist()


def test_pad_is_on_the_left():
    inputs = pad([[5, 6], [7]], torch.device("cpu"))
    assert inputs["input_ids"].tolist()[0] == [5, 6]
    assert inputs["input_ids"].tolist()[1][1] == 7
    assert inputs["attention_mask"].tolist() == [[1, 1], [0, 1]]


def test_too_few_problems_are_refused(chat_solver):
    assert read_problems(chat_solver / "problems.jsonl", 2)[0] == problems("test", 1)[0]
    with pytest.raises(ValueError, match="holds 8 problems; expected at least 9"):
        read_problems(chat_solver / "problems.jsonl", 9)


def test_the_shipped_problems_are_the_test_split():
    assert read_problems(ASSETS / "problems.jsonl") == problems("test", HELD_OUT)
    assert isinstance(problems("test", 1)[0], Problem)


def test_prompt_prints_the_text(chat_solver, capsys):
    prompt = problems("test", 1)[0].prompt
    assert main(["generate", str(chat_solver), "--prompt", prompt, "--max-new-tokens", "12"]) == 0
    expected = build_tokenizer().decode(greedy(chat_solver, prompt, 12), skip_special_tokens=True)
    assert capsys.readouterr().out == expected + "\n"


def test_file_gives_the_same_rows_in_order_whatever_the_batch(chat_solver, tmp_path, capsys):
    prompts = [p.prompt for p in problems("test", 5)]
    file = write_jsonl(tmp_path / "in.jsonl", [{"prompt": p, "id": i} for i, p in enumerate(prompts)])
    output = tmp_path / "out.jsonl"
    command = ["generate", str(chat_solver), "--file", str(file), "--max-new-tokens", "10"]
    assert main([*command, "--batch-size", "2"]) == 0
    printed = capsys.readouterr().out
    assert main([*command, "--output", str(output)]) == 0
    assert capsys.readouterr().out == ""
    rows = read_jsonl(output.read_text(encoding="utf-8"))
    # The same tokens from batches of two and of eight; passes too, since sequences do not wait for each other.
    assert rows == read_jsonl(printed)
    for i, row in enumerate(rows):
        assert (row["id"], row["prompt"]) == (i, prompts[i])
        assert row["tokens"] == greedy(chat_solver, prompts[i], 10)
        assert sum(row["blocks"]) == len(row["tokens"])
        assert row["tokens_per_pass"] == round(len(row["tokens"]) / len(row["blocks"]), 3)


def test_strategy_options_reach_the_decoder(chat_solver, capsys, tmp_path):
    output = tmp_path / "out.jsonl"
    command = [
        "generate",
        str(chat_solver),
        "--prompt",
        "Ba has 3 eggs.",
        "--output",
        str(output),
        "--max-new-tokens",
        "8",
    ]
    blocks = {}
    for options in ("static --k 3", "static --k 1", "confadapt --k 4 --threshold 0", "confadapt --threshold 1"):
        assert main([*command, "--strategy", *options.split()]) == 0
        blocks[options] = read_jsonl(output.read_text())[0]["blocks"]
    assert max(blocks["static --k 3"]) == 3
    assert max(blocks["static --k 1"]) == 1
    assert max(blocks["confadapt --k 4 --threshold 0"]) == 4
    assert max(blocks["confadapt --threshold 1"]) == 1


def test_chat_applies_the_template(chat_solver, tmp_path, capsys):
    chat = [{"role": "user", "content": "Ba has 3 eggs."}]
    file = write_jsonl(tmp_path / "in.jsonl", [{"messages": chat}, {"prompt": "Ba has 3 eggs."}])
    command = ["generate", str(chat_solver), "--file", str(file), "--max-new-tokens", "6"]
    assert main([*command, "--chat"]) == 0
    both = read_jsonl(capsys.readouterr().out)
    assert both[0]["tokens"] == both[1]["tokens"]
    assert main(command) == 0
    plain = read_jsonl(capsys.readouterr().out)
    assert plain[0]["tokens"] == both[0]["tokens"]
    assert plain[1]["tokens"] == greedy(chat_solver, "Ba has 3 eggs.", 6)


def test_show_names_the_prompt_and_marks_the_blocks(chat_solver, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")  # no line is broken, however long the folder's name
    command = ["generate", str(chat_solver), "--prompt", "Ba has 3 eggs.", "--max-new-tokens", "6", "--show"]
    assert main([*command, "--strategy", "static", "--k", "3"]) == 0
    out = capsys.readouterr().out
    assert out.count("|") >= 1
    assert out.splitlines()[0] == "Ba has 3 eggs."
    assert out.splitlines()[-1] == "3 3 = 6 tokens in 2 passes, 3.00 a pass"
    file = write_jsonl(tmp_path / "in.jsonl", [{"prompt": "Ba has 3 eggs."}, {"prompt": "[b]Ba has 4"}])
    assert main([*command[:2], "--file", str(file), *command[4:]]) == 0
    out = capsys.readouterr().out.splitlines()
    assert f"{file}, row 1: Ba has 3 eggs." in out
    assert f"{file}, row 2: [b]Ba has 4" in out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "x"', "row 3: expected a JSON object"),
        ('"x"', "row 3: expected an object with either prompt or messages; got str"),
        ('{"text_in": "x"}', r"row 3: expected an object with either prompt or messages; got \['text_in'\]"),
        ('{"prompt": "x", "messages": []}', "row 3: expected an object with either"),
        ('{"prompt": 5}', "row 3: prompt must be a string with text in it; got 5"),
        ('{"prompt": ""}', "row 3: prompt must be a string"),
        ('{"messages": [{"role": "user"}]}', "row 3: messages must be a list"),
        ('{"messages": []}', "row 3: messages must be a list"),
        ('{"prompt": "x", "tokens": [1]}', "row 3: has tokens, which the result would overwrite"),
        ('{"prompt": "x", "n": ' + "9" * 5000 + "}", 'row 3: expected a JSON object, got \'{"prompt": "x", "n": 999'),
        ('{"messages": [{"role": "user", "content": "x"}], "tools": [{}]}', "row 3: has tools, which would change"),
        ('{"prompt": "x", "system": "be brief", "tools": []}', "row 3: has system, which would change"),
        ("[" * 100_000, "row 3: expected a JSON object, got"),
        ('{"prompt": "\udcff"}', "row 3: expected a JSON object, got .*(utf-8|UTF-8)"),
    ],
)
def test_a_bad_row_is_named_before_the_model_is_loaded(tmp_path, capsys, line, message):
    file = tmp_path / "in.jsonl"
    file.write_text(f'{{"prompt": "x"}}\n\n{line}\n', encoding="utf-8", errors="surrogateescape")
    assert main(["generate", str(tmp_path / "no-model"), "--file", str(file)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.search(message, err), err


@pytest.mark.parametrize("more", [[], ["--overwrite"]], ids=str)
def test_prompts_are_not_overwritten_by_their_answers(chat_solver, tmp_path, capsys, more):
    file = write_jsonl(tmp_path / "in.jsonl", [{"prompt": "Ba has 3 eggs."}])
    (tmp_path / "link").symlink_to(file)
    before = file.read_text()
    command = ["generate", str(chat_solver), "--file", str(file), "--max-new-tokens", "2", *more]
    for name in ("in.jsonl", "link"):
        assert main([*command, "--output", str(tmp_path / name)]) == 2
        assert f"{name}: --output would overwrite --file" in capsys.readouterr().err
    assert file.read_text() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "link"]


def test_an_empty_file_is_refused(tmp_path, capsys):
    file = tmp_path / "in.jsonl"
    file.write_text("\n")
    assert main(["generate", "no-model", "--file", str(file)]) == 2
    assert "expected at least one row" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--strategy static --threshold 0.5", "takes no --threshold"),
        ("--threshold 1.5", "threshold must be a probability"),
        ("--strategy confadapt --masks 3", "makes no drafts and takes no --masks"),
        ("--strategy verified:4:0.2:9 --masks 3", "says the masks by itself"),
        ("--k 3 --masks -1", "masks must be a whole number"),
        ("--overwrite --output x.jsonl", "--overwrite begins the --output of a --file anew; give both"),
        ("--overwrite", "--overwrite begins the --output of a --file anew; give both"),
        ("--output x.html --html ./x.html", "--html and --output would overwrite one another; give two names"),
        ("--output {loop} --html {loop}", "--html and --output would overwrite one another; give two names"),
        ("--seed 3", "--seed says how to sample"),
    ],
)
def test_wrong_options_are_refused_before_the_model_is_loaded(options, message, capsys, tmp_path):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    assert main(["generate", "no-model", "--prompt", "x", *options.format(loop=loop).split()]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "options", ["--k 0", "--k two", "--batch-size 0", "--max-new-tokens -1", "--file x", "--stop="]
)
def test_wrong_numbers_are_refused(options, capsys):
    with pytest.raises(SystemExit) as error:
        main(["generate", "no-model", "--prompt", "x", *options.split()])
    assert error.value.code == 2
    capsys.readouterr()


def test_a_row_that_cannot_be_encoded_is_named_before_any_is_decoded(chat_solver, tmp_path, capsys):
    """The third row has no template; what another program has put at the output is refused and stays as it was."""
    bare = tmp_path / "bare"
    LlamaForCausalLM.from_pretrained(chat_solver).save_pretrained(bare)
    build_tokenizer().save_pretrained(bare)
    rows = [{"prompt": "Ba has 3 eggs."}] * 2 + [{"messages": [{"role": "user", "content": "x"}]}]
    file = write_jsonl(tmp_path / "in.jsonl", rows)
    output = tmp_path / "out.jsonl"
    before = sorted(p.name for p in tmp_path.iterdir())
    command = ["generate", str(bare), "--file", str(file), "--output", str(output)]
    assert main(command) == 2
    assert "row 3: needs a chat template" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    output.write_text("before")
    assert main(command) == 2
    assert "line 1 is no answer to row 1" in capsys.readouterr().err
    assert output.read_text() == "before"


@pytest.fixture
def one_bad(monkeypatch):
    """The sixth row fails; `calls` counts the rows that were decoded."""
    calls = []

    def entering(decoder, newcomers, owner, **options):
        calls.extend(newcomers)
        return enter(decoder, newcomers, owner, **options)

    def jobs(self, prompts, new):
        found = original(self, prompts, new)
        for job in found[5:6] if faulty else []:
            self._fail(job.number, ValueError("max_new_tokens: no room"))
            found.remove(job)
        return found

    enter, original, faulty = mtpkern.refill.enter, mtpkern.batching.Batch._jobs, [True]
    monkeypatch.setattr("mtpkern.refill.enter", entering)
    monkeypatch.setattr("mtpkern.batching.Batch._jobs", jobs)
    return calls, faulty


def test_one_bad_row_loses_none_and_the_same_command_goes_on(chat_solver, tmp_path, capsys, one_bad, monkeypatch):
    calls, faulty = one_bad
    file = write_jsonl(tmp_path / "in.jsonl", [{"prompt": f"Ba has {i} eggs.", "id": i} for i in range(9)])
    whole, output = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    command = ["generate", str(chat_solver), "--file", str(file), "--batch-size", "4", "--max-new-tokens", "4"]
    assert main([*command, "--output", str(output)]) == 2
    assert "row 6: --max-new-tokens: no room" in capsys.readouterr().err
    # The row before it in its batch is there.
    assert [row["id"] for row in read_jsonl(output.read_text())] == [0, 1, 2, 3, 4]
    with output.open("a") as half:
        half.write('{"prompt": "Ba has 5 e')
    faulty.clear()
    calls.clear()
    assert main([*command, "--output", str(output)]) == 0
    said = capsys.readouterr().err
    assert "has the first 5 of 9 answers already" in said
    assert "4 prompts: 4 of 4" in said
    assert len(calls) == 4
    assert main([*command, "--output", str(whole)]) == 0
    assert output.read_text() == whole.read_text()
    # All there: no model is looked for.
    calls.clear()
    monkeypatch.setattr("mtpkern.loading.load", None)
    assert main([*command, "--output", str(output)]) == 0
    assert not calls
    assert output.read_text() == whole.read_text()
    for rows in ([{"prompt": "another", "id": 0}], [{"prompt": "Ba has 0 eggs.", "id": 1}]):
        write_jsonl(file, rows)
        assert main([*command, "--output", str(output)]) == 2
        assert "line 1 is no answer to row 1" in capsys.readouterr().err
        assert output.read_text() == whole.read_text()


def test_what_the_limit_cut_is_marked(chat_solver, tmp_path, capsys):
    prompt = problems("test", 1)[0].prompt
    file = write_jsonl(tmp_path / "in.jsonl", [{"prompt": prompt}])
    command = ["generate", str(chat_solver), "--file", str(file), "--max-new-tokens"]
    assert main([*command, "6"]) == 0
    (cut,) = read_jsonl(capsys.readouterr().out)
    assert (len(cut["tokens"]), cut["finished"]) == (6, False)
    assert not conversation_of(cut, "generated").finished
    # The same model with its third token as a stop.
    folder = tmp_path / "stops"
    shutil.copytree(chat_solver, folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": cut["tokens"][2]}))
    assert main(["generate", str(folder), *command[2:], "6"]) == 0
    (whole,) = read_jsonl(capsys.readouterr().out)
    assert whole["tokens"] == cut["tokens"][: cut["tokens"].index(cut["tokens"][2]) + 1]
    assert whole["finished"]


def test_an_untrained_model_is_decoded_one_token_a_pass(chat_solver, tmp_path, capsys):
    plain = tmp_path / "plain"
    shutil.copytree(chat_solver, plain)
    config = json.loads((plain / "config.json").read_text())
    del config["mtpkern"]
    (plain / "config.json").write_text(json.dumps(config))
    (plain / "generation_config.json").write_text(json.dumps({"eos_token_id": build_tokenizer().eos_token_id}))
    prompt, output = "Ba has 3 eggs.", tmp_path / "out.jsonl"
    command = ["generate", str(plain), "--prompt", prompt, "--max-new-tokens", "12", "--output", str(output)]
    for strategy in ("static", "confadapt", "verified"):
        assert main([*command, "--strategy", strategy, "--k", "1"]) == 0
        assert read_jsonl(output.read_text())[0]["tokens"] == greedy(plain, prompt, 12)
    capsys.readouterr()
    file = write_jsonl(tmp_path / "in.jsonl", [{"prompt": prompt}])
    for words, strategy in (
        (command, "--strategy"),
        (["eval", str(plain), "--data", str(file), "--output", str(tmp_path / "eval")], "--strategies"),
    ):
        assert main(words) == 2
        said = capsys.readouterr().err
        assert "pass --mask-token-id for a checkpoint trained elsewhere" in said
        assert f"with {strategy} static:1" in said
    assert "mask_token_id" not in said


def test_missing_things_are_named(tmp_path, capsys):
    assert main(["generate", str(tmp_path), "--prompt", "x"]) == 2
    assert f"{tmp_path}: there is no model in this folder" in capsys.readouterr().err
    for name in ("./nope", str(tmp_path / "nope"), "a/b/c"):
        assert main(["generate", name, "--prompt", "x"]) == 2
        assert f"{name}: there is no such file or folder" in capsys.readouterr().err
    assert main(["generate", str(tmp_path), "--prompt", "x", "--output", str(tmp_path / "no" / "out")]) == 2
    assert "there is no folder" in capsys.readouterr().err
    missing, folder = f"{tmp_path}/nope.jsonl: there is no such file", f"{tmp_path}: expected a file, this is a folder"
    for name, says in ((tmp_path / "nope.jsonl", missing), (tmp_path, folder)):
        assert main(["generate", "no-model", "--file", str(name)]) == 2
        assert capsys.readouterr().err == f"mtpkern generate: {says}\n"
    # Before the model is looked for.
    for command in (
        ["generate", "no-model", "--prompt", "x", "--output"],
        ["demo", "--checkpoint", "no-model", "--html"],
    ):
        assert main([*command, str(tmp_path)]) == 2
        assert f"{tmp_path}: expected a file to write to, this is a folder" in capsys.readouterr().err
    assert main(["demo", "--checkpoint", str(tmp_path)]) == 2
    assert "make checkpoint" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match=f"^{tmp_path}/problems.jsonl: there is no such file$"):
        read_problems(tmp_path / "problems.jsonl")


@pytest.mark.parametrize(
    ("values", "warned"),
    [
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [2, 3, 5]}, None),
        (
            {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.1},
            "repetition_pen",
        ),
        ({"cache_implementation": "hybrid", "eos_token_id": 2, "pad_token_id": 0}, None),
        ({"stop_strings": ["apples"], "eos_token_id": 2}, "stop_strings"),
    ],
    ids=["Llama-3.1", "Qwen2.5", "gemma-2", "stop strings"],
)
def test_a_checkpoint_whose_file_samples_is_decoded_greedily(chat_solver, tmp_path, capsys, values, warned):
    folder, output = tmp_path / "instruct", tmp_path / "out.jsonl"
    shutil.copytree(chat_solver, folder)
    (folder / "generation_config.json").write_text(json.dumps(values))
    prompt = problems("test", 1)[0].prompt
    command = ["generate", str(folder), "--prompt", prompt, "--max-new-tokens", "12", "--output", str(output)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert main(command) == 0, capsys.readouterr().err
    said = " ".join(str(w.message) for w in caught)
    assert (warned in said) if warned else "mtpkern" not in said
    tokens = greedy(chat_solver, prompt, 12, eos_token_id=values.get("eos_token_id", build_tokenizer().eos_token_id))
    assert read_jsonl(output.read_text())[0]["tokens"] == tokens


def test_a_template_that_refuses_names_the_row(chat_solver, tmp_path, capsys):
    folder = tmp_path / "strict"
    shutil.copytree(chat_solver, folder)
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('only users speak') }}"
    tokenizer.save_pretrained(folder)
    file = write_jsonl(tmp_path / "in.jsonl", [{"messages": [{"role": "user", "content": "x"}]}])
    assert main(["generate", str(folder), "--file", str(file)]) == 2
    assert "row 1: only users speak" in capsys.readouterr().err


def test_text_that_brings_its_own_bos_gets_no_second(bytes_of):
    tokenizer = bytes_of("llama")
    one = Prompting().encode(tokenizer, {"prompt": "Hi"})
    assert one[0] == tokenizer.bos_token_id
    assert one == Prompting().encode(tokenizer, {"prompt": f"{tokenizer.bos_token}Hi"})


def test_demo(chat_solver, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("mtpkern.demo.MAX_NEW_TOKENS", 8)
    monkeypatch.chdir(tmp_path)
    page = Path("blocks.html")
    assert main(["demo", "--checkpoint", str(chat_solver), "--problems", "2", "--html", str(page)]) == 0
    out, err = capsys.readouterr()
    assert "Verified(4, 0.6), batch 8" in out
    assert "{" not in out
    assert max(map(len, out.splitlines())) <= 80
    assert "2 of 2" in err
    assert page.read_text(encoding="utf-8").count('class="blocks"') == 4
    assert main(["demo", "--checkpoint", str(chat_solver), "--problems", "2", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    ways = ["hf_generate", "static_1", "confadapt_0.99", "confadapt_0.9", "confadapt_0.6", "verified"]
    for figure in ("tokens_per_pass", "accuracy", "speedup_vs_hf_generate"):
        assert list(result[figure]) == ways
    assert list(result["speedup_vs_hf_generate_batch_8"]) == ["hf_generate", "verified"]
    assert result["problems"] == 2
    assert result["tokens_per_pass"]["hf_generate"] == result["tokens_per_pass"]["static_1"] == 1
    assert result["tokens_per_pass"]["verified"] >= 1
    assert result["speedup_vs_hf_generate"]["hf_generate"] == 1
    assert all(0 <= a <= 1 for a in result["accuracy"].values())


def test_summary_divides_tokens_per_second():
    slow = Tally(problems=2, right=1, tokens=100, passes=100, seconds=2.0)
    fast = Tally(problems=2, right=2, tokens=90, passes=30, seconds=0.6)
    result = summary({HF_GENERATE: slow, "verified": fast}, {HF_GENERATE: slow, "verified": slow})
    assert result == {
        "problems": 2,
        "tokens_per_pass": {HF_GENERATE: 1.0, "verified": 3.0},
        "accuracy": {HF_GENERATE: 0.5, "verified": 1.0},
        "speedup_vs_hf_generate": {HF_GENERATE: 1.0, "verified": 3.0},
        "speedup_vs_hf_generate_batch_8": {HF_GENERATE: 1.0, "verified": 1.0},
    }


@pytest.mark.skipif(find_spec("fastapi") is not None, reason="fastapi is installed")
def test_a_server_without_its_packages_says_what_to_install(capsys):
    assert main(["serve", "nowhere"]) == 2
    assert "pip install 'transformers[serving]'" in capsys.readouterr().err
