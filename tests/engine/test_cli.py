"""The command line: what it prints, and how it fails."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rollmill.engine.cli import main
from rollmill.engine.env import TOGGLES


@pytest.fixture
def folder(hf_model, save):
    """A tiny Mixtral with a word-level tokenizer and a chat template."""
    folder = save(hf_model("mixtral"))
    vocabulary = {f"w{i}": i for i in range(200)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", pad_token="w0")
    fast.chat_template = "{% for m in messages %}w1 {{ m['content'] }} {% endfor %}w2"
    fast.save_pretrained(folder)
    return folder


def test_generate_prints_text_and_logprobs(folder, capsys):
    assert main(["generate", str(folder), "--prompt", "w5 w6", "--max-new-tokens", "3", "--seed", "1"]) == 0
    printed = capsys.readouterr().out
    assert "'w5 w6'" in printed
    assert "log-prob" in printed
    assert "mean log-prob" in printed


def test_generate_as_json(folder, capsys):
    command = ["generate", str(folder), "--prompt", "w5", "--prompt", "w6 w7", "--n", "2", "--quant", "nvfp4"]
    assert main([*command, "--chat", "--max-new-tokens", "3", "--seed", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [entry["prompt"] for entry in found] == ["w5", "w5", "w6 w7", "w6 w7"]
    for entry in found:
        assert len(entry["token_ids"]) == len(entry["logprobs"]) == 3
        assert entry["text"].split() == [f"w{token}" for token in entry["token_ids"]]


def test_chat_goes_through_the_template(folder):
    from rollmill.engine import Engine, SamplingParams

    with Engine(folder) as engine:
        messages = [{"role": "user", "content": "w9 w8"}]
        one, two = (engine.generate(p, SamplingParams(max_new_tokens=1))[0] for p in (messages, [messages]))
        assert one.prompt_token_ids == two.prompt_token_ids == [1, 9, 8, 2]


def test_env_lists_every_toggle(capsys):
    assert main(["env", "--json"]) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == [toggle.name for toggle in TOGGLES]
    assert main(["env"]) == 0
    assert all(toggle.name in capsys.readouterr().out for toggle in TOGGLES[:1])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "no/such/place", "--prompt", "x"], "no/such/place"),
        (["generate", ".", "--prompt", "x"], "config.json"),
    ],
)
def test_errors_are_one_paragraph(arguments, words, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("rollmill: ")
    assert words in error
    assert "Traceback" not in error


def test_bad_toggles_fail_every_command(folder, monkeypatch, capsys):
    monkeypatch.setenv("ROLLMILL_WARP", "9")
    assert main(["env"]) == 2
    assert main(["generate", str(folder), "--prompt", "w5"]) == 2
    assert capsys.readouterr().err.count("ROLLMILL_WARP") == 2
