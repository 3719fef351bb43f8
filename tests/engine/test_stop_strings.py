"""Stop strings and text as it grows, with a byte-level tokenizer made here."""

from __future__ import annotations

import asyncio

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rollmill.engine import Engine, EngineConfig, RequestError, SamplingParams
from rollmill.engine.llm.text import TextStream

MERGES = ["e n", "en d", "Ġ w", "l l", "ll o"]


@pytest.fixture(scope="module")
def tokenizer():
    """256 bytes, a few merges, one special token; spaces before punctuation would be cleaned up if asked."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*alphabet, *(merge.replace(" ", "") for merge in MERGES)])}
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=[tuple(merge.split(" ")) for merge in MERGES]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>", clean_up_tokenization_spaces=True)


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


def run(tokenizer, ids, stops=()):
    """(given pieces, text, stopped_by, number of tokens pushed)."""
    stream, pieces = TextStream(tokenizer, stops), []
    for count, token in enumerate(ids, start=1):
        hit = stream.push(token)
        pieces.append(stream.take(final=hit is not None or count == len(ids)))
        if hit is not None:
            break
    return pieces, stream.text, stream.stopped_by, len(pieces)


@pytest.mark.parametrize(
    ("text", "stops", "want", "stopped_by"),
    [
        ("say end now", ["end"], "say ", "end"),  # one token
        ("say xend", ["nd"], "say xe", "nd"),  # within a token
        ("hello world", ["lo wo"], "hel", "lo wo"),  # across tokens, from the middle of one
        ("a é b", ["é"], "a ", "é"),
        ("a 🙂 b", ["🙂"], "a ", "🙂"),
        ("a🙂🙂b", ["🙂b"], "a🙂", "🙂b"),
        ("one two end", ["end", "two"], "one ", "two"),
        ("abcd", ["bcd", "c"], "ab", "c"),  # token by token: "c" is there first
        ("aab", ["ab"], "a", "ab"),
        ("ababac", ["abac"], "ab", "abac"),
        ("nothing", ["x", "end"], "nothing", None),
        ("hello .", [], "hello .", None),  # no space is cleaned up
        ("almost en", ["end"], "almost en", None),
    ],
)
def test_where_the_text_ends(tokenizer, text, stops, want, stopped_by):
    pieces, found, by, _ = run(tokenizer, ids_of(tokenizer, text), stops)
    assert (found, by) == (want, stopped_by)
    assert "".join(pieces) == want


def test_streaming_never_gives_a_part_of_a_stop_string(tokenizer):
    pieces, *_ = run(tokenizer, ids_of(tokenizer, "x 🙂<|im_end|>"), ["<|im_end|>", "🙂!"])
    assert pieces[0] == "x"  # what begins no stop string comes at once
    shown = ""
    for piece in pieces:
        shown += piece
        assert "<" not in shown


def test_a_stop_string_before_an_unfinished_character_counts_at_once(tokenizer):
    ids = [*ids_of(tokenizer, "aXb"), *ids_of(tokenizer, "é")[:1]]
    tail = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()))
    tail.add_tokens(["STOP\ufffd"])  # one token: a stop string, and bytes that are no character
    _, text, by, count = run(tail, [*ids[:1], len(tail) - 1, *ids[1:]], ["STOP"])
    assert (text, by, count) == ("a", "STOP", 2)


def test_special_tokens_are_skipped(tokenizer):
    ids = ids_of(tokenizer, "be")
    assert run(tokenizer, [ids[0], tokenizer.eos_token_id, ids[1]], ["be"])[1:3] == ("", "be")


def test_bytes_that_never_become_a_character(tokenizer):
    ids = [*ids_of(tokenizer, "a"), ids_of(tokenizer, "🙂")[0], *ids_of(tokenizer, "b"), ids_of(tokenizer, "🙂")[0]]
    pieces, text, *_ = run(tokenizer, ids)
    assert text == "".join(pieces) == tokenizer.decode(ids) == "a\ufffdb\ufffd"


@pytest.fixture
def engine(hf_model, save, tokenizer):
    model = hf_model("llama")
    model.resize_token_embeddings(len(tokenizer))
    folder = save(model)
    tokenizer.save_pretrained(folder)
    with Engine(folder, EngineConfig(dtype="float32")) as engine:
        yield engine


def forced(tokenizer, text, **values):
    """Parameters that allow the characters of `text` only."""
    return SamplingParams(allowed_token_ids=ids_of(tokenizer, text), **values)


def test_token_ids_keep_what_the_text_leaves_out(engine, tokenizer):
    params = forced(tokenizer, "ab", stop=["ba"], seed=1, n=8, max_new_tokens=20)
    outs = engine.generate("ab", params)
    assert any(out.stopped_by == "ba" for out in outs)
    for out in outs:
        whole = tokenizer.decode(out.token_ids)
        assert "ba" not in out.text
        assert whole == (out.text + "ba" if out.finish_reason == "stop" else out.text)
        assert len(out.logprobs) == len(out.token_ids)


def test_the_end_of_the_prompt_does_not_count(engine, tokenizer):
    (out,) = engine.generate("xxa", forced(tokenizer, "b", stop=["ab"], max_new_tokens=3))
    assert (out.text, out.finish_reason) == ("bbb", "length")


@pytest.mark.parametrize("stop", ["a", "token", "eos"])
def test_streams_and_completions_have_one_text(engine, tokenizer, stop):
    """Also where a stop token ends them: a token that is text is part of the text, a special one is not."""
    stop = {"token": ids_of(tokenizer, "a"), "eos": [tokenizer.eos_token_id]}.get(stop, stop)
    params = SamplingParams(
        allowed_token_ids=[*ids_of(tokenizer, "abé ."), tokenizer.eos_token_id], stop=stop, seed=3, max_new_tokens=30
    )

    async def collect():
        return [chunk async for chunk in engine.stream("ab", params)]

    chunks = asyncio.run(collect())
    (out,) = engine.generate("ab", params)
    assert "".join(chunk.text for chunk in chunks) == chunks[-1].completion.text == out.text
    assert out.token_ids == chunks[-1].completion.token_ids


def test_stop_strings_without_a_tokenizer(hf_model, save):
    with Engine(save(hf_model("llama"))) as engine, pytest.raises(RequestError, match="stop strings need a tokenizer"):
        engine.generate([[1]], SamplingParams(stop=["x"]))
