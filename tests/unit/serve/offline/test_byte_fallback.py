"""A model whose tokenizer falls back to bytes, and which writes whatever comes: bytes of no character before all."""

from __future__ import annotations

import json

import pytest
import transformers

from penstock import LLM, SamplingParams
from penstock.core.progress import silent
from penstock.serve.http.text import Tokens
from penstock.serve.offline.batch_file import BatchRun, Summary
from penstock.serve.offline.gather import Gatherer
from small_tokenizers import BYTES, made


@pytest.fixture(scope="module")
def llm(tmp_path_factory) -> LLM:
    folder = tmp_path_factory.mktemp("model")
    backend = made("byte fallback, strip")
    config = transformers.LlamaConfig(
        vocab_size=backend.get_vocab_size(),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        eos_token_id=backend.token_to_id("</s>"),
        bos_token_id=backend.token_to_id("<s>"),
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return LLM(folder, device="cpu", sequences=16, tokens=64, cache_tokens=2048)


def test_texts_are_those_of_all_tokens_at_once(llm):
    backend = llm.tokenizer.backend_tokenizer
    emoji = [backend.token_to_id(BYTES[byte]) for byte in "🎉".encode()]
    prompts = ["def", "漢字" * 40, [*llm.tokenizer("def")["input_ids"], *emoji[:2]]] * 8
    params = [SamplingParams(seed=seed, max_tokens=40, ignore_eos=True) for seed in range(len(prompts))]
    for result in llm.generate(prompts, params, progress=silent):
        (output,) = result.outputs
        before = backend.decode(result.prompt_token_ids)
        whole = backend.decode(result.prompt_token_ids + output.token_ids)
        assert (output.finish_reason, result.error) == ("length", None)
        assert whole.endswith(output.text)
        if whole.startswith(before):
            assert before + output.text == whole


def test_a_batch_of_such_lines_comes_to_its_end(llm, tmp_path):
    lines = [
        {
            "custom_id": str(seed),
            "method": "POST",
            "url": "/v1/completions",
            "body": {"prompt": "def add(a, b):", "max_tokens": 30, "seed": seed, "logprobs": 2, "echo": True},
        }
        for seed in range(20)
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = BatchRun(Gatherer(llm.engine, llm.tokenizer), Tokens(llm.tokenizer), "m", 8)
    summary = run.run(tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert summary == Summary(before=0, done=20, refused=0, stopped=False)
    for line in (tmp_path / "out.jsonl").read_text().splitlines():
        body = json.loads(line)["response"]["body"]
        (choice,), prompt = body["choices"], body["usage"]["prompt_tokens"]
        told = choice["logprobs"]
        assert told["text_offset"] == sorted(told["text_offset"])
        for name, place in zip(told["tokens"], told["text_offset"], strict=True):
            # The first token of a text has no space; a newline may be a part of bytes that are no characters.
            assert name.startswith(("bytes:", "<")) or choice["text"][place:].startswith((name, name[1:], "\ufffd"))
        sampled = zip(told["tokens"][prompt:], told["top_logprobs"][prompt:], strict=True)
        assert all(name in top for name, top in sampled)
