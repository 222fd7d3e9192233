# SPDX-License-Identifier: Apache-2.0
"""Conversations on one cache, with chat templates and without; what is said about it."""

import io
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import modelopt_dms as dms
from modelopt_dms import cli
from modelopt_dms.cli.talking import Decoding, Talk, encode
from modelopt_dms.config.bundled import embedded_model_dir

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(embedded_model_dir())


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    found = AutoModelForCausalLM.from_pretrained(embedded_model_dir()).eval()
    found = dms.apply_dms(found, {"window": 8})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, x in found.named_parameters():
            if "dms_gate" in name:
                x.copy_(torch.randn(x.shape, generator=generator) * 0.01)
    return found


def test_a_prompt_is_a_turn_unless_it_is_raw(tokenizer: PreTrainedTokenizerBase) -> None:
    assert encode(tokenizer, "def f(", raw=False) == tokenizer("def f(")["input_ids"]
    tokenizer.chat_template = TEMPLATE
    try:
        assert tokenizer.decode(encode(tokenizer, "hey", raw=False)) == "user: hey\nassistant:"
        assert encode(tokenizer, "hey", raw=True) == tokenizer("hey")["input_ids"]
    finally:
        tokenizer.chat_template = None


def test_turns_on_one_cache_answer_what_one_text_would(
    tokenizer: PreTrainedTokenizerBase, model: torch.nn.Module
) -> None:
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    try:
        talk = Talk(model, tokenizer, Decoding(6, 0.0, 0), raw=False)  # type: ignore[arg-type]
        talk.ask("def add(a, b):", stream=False)
        first = talk.cache
        answer = talk.ask("\n    return ", stream=False)
        assert talk.cache is first, "the second turn read the first one again"
        alone = Talk(model, tokenizer, Decoding(6, 0.0, 0), raw=False)  # type: ignore[arg-type]
        alone.messages = talk.messages[:2]
        assert alone.ask("\n    return ", stream=False) == answer
    finally:
        tokenizer.chat_template = None


def test_a_plain_model_shows_the_dense_baseline(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["generate", "embedded", "-p", "def f(", "--max-new-tokens", "4", "--json", "-"]
    monkeypatch.setattr("sys.argv", ["modelopt-dms", *words])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    found = json.loads(capsys.readouterr().out)
    # 4 layers, 2 KV heads of 32 dimensions, keys and values in float32; the last token is in no cache yet.
    assert found["kv_bytes"] == found["context_tokens"] * 4 * 2 * 32 * 2 * 4
    assert found["compression_ratio"] == 1.0 and isinstance(found["answer"], str)


def test_a_conversation_ends_with_its_input_and_says_what_is_resident(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("x = 1\n/new\ny = 2\n"))
    monkeypatch.setattr(
        "sys.argv", ["modelopt-dms", "generate", "embedded", "--max-new-tokens", "3"]
    )
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    assert capsys.readouterr().err.count("all resident; KV cache") == 2


def test_an_interruption_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def stop_here(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("modelopt_dms.cli.making.load_base", stop_here)
    words = ["compress", "embedded", "-r", "tiny_cpu", "-o", str(tmp_path / "new")]
    monkeypatch.setattr("sys.argv", ["modelopt-dms", *words])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 130
    assert "there is no checkpoint yet" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "new").exists()
