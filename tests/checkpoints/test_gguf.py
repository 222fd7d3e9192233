# SPDX-License-Identifier: Apache-2.0
"""GGUF files as models: the same numbers, tokenizer and end tokens; saved as plain checkpoints; faults in one line."""

import json
import shutil
import subprocess
import sys

import gguf
import numpy as np
import pytest
import torch
from families import build
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import modelopt_dms as dms
from modelopt_dms import cli
from modelopt_dms.checkpoints.gguf import GgufError, gguf_file, load_model, read_header
from modelopt_dms.exporters import export
from modelopt_dms.serving.planner.model_shape import shape_of

# 64 tokens: three special ones, single characters, and one that is merged.
TOKENS = [
    *("<unk>", "<s>", "</s>"),
    *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ01234567",
    "ab",
]
END_OF_TURN = 9
TEMPLATE = "{% for m in messages %}<s>{{ m['content'] }}{% endfor %}"


def write(path, model, *, architecture="llama", change=None, leave_out=(), extra=(), packed=False):
    """A llama as llama.cpp's converter writes it: rows of q and k reordered, float32 or Q8_0."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3] + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(["a b"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_eot_token_id(END_OF_TURN)
    writer.add_chat_template(TEMPLATE)
    if change is not None:
        change(writer)
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "model.layers": "blk",
    }
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.float()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        for part, count in heads.items():
            if f".{part}." in name:
                values = values.unflatten(0, (count, 2, -1)).transpose(1, 2).flatten(0, 2)
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        if name in leave_out:
            continue
        array = values.contiguous().numpy()
        if packed and array.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    for name in extra:
        writer.add_tensor(name, np.ones(8, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def make_model(tied=True):
    return build("llama", vocab_size=len(TOKENS), tie_word_embeddings=tied, rms_norm_eps=2**-20)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write(tmp_path_factory.mktemp("gguf") / "tiny.gguf", make_model())


@pytest.mark.parametrize("tied", [True, False])
def test_a_plan_reads_of_the_header_what_the_model_is(tmp_path, tied):
    model = make_model(tied)
    path = write(tmp_path / "tiny.gguf", model)
    found = shape_of(str(path))
    assert found.parameters == sum(x.numel() for x in load_model(path).parameters())
    assert (found.layers, found.query_heads, found.kv_heads, found.head_dim) == (2, 4, 2, 8)
    assert found.max_length == model.config.max_position_embeddings and found.tied == tied
    assert found.name == "tiny" and found.itemsize == 2


IDS = torch.tensor([[5, 9, 33, 12, 7, 40, 41, 22]])


def logits(model):
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


@pytest.mark.parametrize("tied", [True, False])
def test_a_gguf_file_is_the_model_it_was_made_of(tmp_path, tied):
    original = make_model(tied)
    model, _ = dms.load_base(write(tmp_path / "x.gguf", original), dtype="float32")
    torch.testing.assert_close(logits(model), logits(original), rtol=0, atol=0)
    assert model.config.tie_word_embeddings is tied
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    assert model.config.architectures == ["LlamaForCausalLM"]


def test_weights_in_8_bits_are_dequantized_to_bfloat16_unless_asked_otherwise(tmp_path):
    original = make_model()
    path = write(tmp_path / "x.gguf", original, packed=True)
    assert load_model(path).dtype == torch.bfloat16
    exact = load_model(path, dtype=torch.float32)
    assert exact.dtype == torch.float32
    weights = dict(exact.named_parameters())
    for name, x in original.named_parameters():
        difference = (weights[name] - x).abs().max()
        assert difference <= x.abs().max() / 127, name
    assert (logits(exact) - logits(original)).norm() < 0.05 * logits(original).norm()


def test_the_tokenizer_comes_with_its_chat_template_and_end_tokens(tiny):
    model, tokenizer = dms.load_base(tiny)
    text = "hello42"
    assert tokenizer(text).input_ids == [TOKENS.index(x) for x in text]
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    # transformers would add one of GPT-2's, which this model has no embedding for.
    assert len(tokenizer) == len(TOKENS) and "<|endoftext|>" not in tokenizer.get_vocab()
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<s>",
        "</s>",
        "</s>",
    )
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "<s>hi"
    assert model.generation_config.eos_token_id == [2, END_OF_TURN]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_is_saved_is_a_plain_checkpoint(tiny, tmp_path, dtype):
    model, tokenizer = dms.load_base(tiny, dtype=dtype)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert not {"quantization_config", "_model_name_or_path"} & set(config)
    assert "gguf" not in "".join(x.read_text().lower() for x in tmp_path.glob("*.json"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert again.generation_config.eos_token_id == [2, END_OF_TURN]
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)
    words = AutoTokenizer.from_pretrained(tmp_path)
    assert len(words) == len(TOKENS)
    assert words("abc</s>ab").input_ids == tokenizer("abc</s>ab").input_ids
    assert words.chat_template == tokenizer.chat_template


def test_a_compressed_gguf_is_saved_loaded_and_exported(tiny, tmp_path):
    model, tokenizer = dms.load_base(tiny, dtype="float32")
    texts = ["abcdefgh" * 40] * 8
    changes = {
        "dms.window": 4,
        "retrofit.steps": 1,
        "retrofit.batch_size": 1,
        "retrofit.sequence_length": 64,
        "quantize.samples": 2,
        "quantize.sample_length": 64,
    }
    recipe = dms.load_recipe(
        "nvfp4_default-kv_nvfp4-tiny_cpu", [f"{key}={value}" for key, value in changes.items()]
    )
    made = dms.compress(
        model, recipe, tokenizer=tokenizer, data=texts, output_dir=tmp_path / "made"
    )
    again = dms.load(tmp_path / "made")
    torch.testing.assert_close(logits(again), logits(made), rtol=0, atol=0)
    export(again, tmp_path / "exported", tokenizer=tokenizer)
    torch.testing.assert_close(
        logits(dms.load(tmp_path / "exported")), logits(made), rtol=1e-5, atol=1e-5
    )


def test_the_bar_follows_the_bars_of_transformers(tiny, capfd):
    enabled = logging.is_progress_bar_enabled()
    try:
        logging.disable_progress_bar()
        load_model(tiny)
        assert "GGUF" not in capfd.readouterr().err
        logging.enable_progress_bar()
        load_model(tiny)
        assert "GGUF" in capfd.readouterr().err
    finally:
        (logging.enable_progress_bar if enabled else logging.disable_progress_bar)()


def test_a_directory_with_one_gguf_file_is_that_file(tiny, tmp_path):
    shutil.copy(tiny, tmp_path / "a.gguf")
    assert gguf_file(tmp_path) == tmp_path / "a.gguf"
    shutil.copy(tiny, tmp_path / "b.GGUF")
    with pytest.raises(GgufError, match=r"holds 2 GGUF files \(a.gguf, b.GGUF\); name one"):
        gguf_file(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert gguf_file(tmp_path) is None


def _faulty(tmp_path, tiny):
    model, place = make_model(), tmp_path / "x.gguf"
    data = tiny.read_bytes()

    def cut(keep):
        place.write_bytes(data[:keep])

    return {
        "no file": (lambda: None, "x.gguf does not exist"),
        "empty": (lambda: cut(0), "is not a GGUF file: it has 0 bytes"),
        "other file": (lambda: place.write_bytes(b"PK" * 50), "is not a GGUF file: it begins with"),
        "half a header": (lambda: cut(500), "is damaged: its header cannot be read"),
        "half the weights": (lambda: cut(len(data) - 9000), "is not whole"),
        "version": (
            lambda: place.write_bytes(data[:4] + b"\x01" + data[5:]),
            "is damaged: its header cannot be read (KeyError('version 1'))",
        ),
        "part": (
            lambda: write(place, model, change=lambda x: x.add_uint16("split.count", 3)),
            "is one of 3 parts",
        ),
        "scaled positions": (
            lambda: write(
                place,
                model,
                change=lambda x: x.add_rope_scaling_type(gguf.RopeScalingType.YARN),
            ),
            "scales its rotary positions (type yarn)",
        ),
        "factors of positions": (
            lambda: write(place, model, extra=("rope_freqs.weight",)),
            "scales its rotary positions (type none, rope_freqs.weight)",
        ),
        "architecture": (
            lambda: write(place, model, architecture="rwkv6"),
            "does not read the GGUF architecture 'rwkv6'; it reads bloom, ",
        ),
        "missing weights": (
            lambda: write(place, model, leave_out=("blk.1.ffn_up.weight",)),
            "lacks the weights model.layers.1.mlp.up_proj.weight (1 in all)",
        ),
        "dropped biases": (
            lambda: write(place, model, extra=("blk.0.attn_q.bias",)),
            "has biases (blk.0.attn_q.bias, 1 in all)",
        ),
    }


FAULTS = [
    "no file",
    "empty",
    "other file",
    "half a header",
    "half the weights",
    "version",
    "part",
    "scaled positions",
    "factors of positions",
    "architecture",
    "missing weights",
    "dropped biases",
]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_file_is_one_line(fault, tiny, tmp_path, monkeypatch, capsys):
    make, message = _faulty(tmp_path, tiny)[fault]
    make()
    monkeypatch.setattr(
        "sys.argv", ["modelopt-dms", "generate", str(tmp_path / "x.gguf"), "-p", "ab"]
    )
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
    printed = capsys.readouterr().err
    (line,) = [x for x in printed.splitlines() if x.startswith("error:")]
    assert message in line and "Traceback" not in printed


def test_a_header_is_read_without_importing_torch(tiny):
    code = (
        "import sys; from pathlib import Path; from modelopt_dms.checkpoints.gguf import read_header;"
        "header = read_header(Path(sys.argv[1]));"
        "print(header.architecture, [x for x in ('torch', 'transformers') if x in sys.modules])"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, str(tiny)], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "llama []"


def test_the_size_in_the_header_is_the_files(tiny):
    # The writer pads behind the last tensor.
    assert 0 <= tiny.stat().st_size - read_header(tiny).size < 32


def test_generate_on_the_command_line_takes_a_gguf_file(tiny, monkeypatch, capsys):
    words = ["modelopt-dms", "generate", str(tiny), "-p", "abc", "--max-new-tokens", "3"]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    assert "GGUF" not in capsys.readouterr().err


@pytest.mark.parametrize("command", [["export", "-o", "new"], ["tune"]])
def test_commands_for_compressed_models_say_what_to_do(command, tiny, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["modelopt-dms", command[0], str(tiny), *command[1:]])
    with pytest.raises(SystemExit):
        cli.main()
    assert "is a plain model, without gates; compress it first" in capsys.readouterr().err
