# SPDX-License-Identifier: Apache-2.0
"""Mistakes are one line before anything heavy is imported: every case runs where torch cannot be imported."""

import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socket import socket
from threading import Thread
from typing import ClassVar

import pytest
from paths import ROOT

# Runs every list of words that stands in a file as a command line, and prints exit code and what was said.
RUNNER = """
import contextlib, importlib.abc, io, json, sys

class NothingHeavy(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "modelopt", "datasets", "onnx"):
            raise RuntimeError(f"imports {name}")

sys.meta_path.insert(0, NothingHeavy())
from modelopt_dms import cli

for words in json.load(open(sys.argv[1])):
    sys.argv = ["modelopt-dms", *words]
    said, errors = io.StringIO(), io.StringIO()
    cli.options.out.file, cli.options.err.file = said, errors
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(errors):
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code
        except BaseException as error:
            code = repr(error)
    print(json.dumps([code, said.getvalue(), errors.getvalue()]))
"""


def run(cases: list[list[str]], place: Path, hub: str | None = None) -> list[tuple[int, str, str]]:
    """Exit code, standard output and standard error of command lines, in one process."""
    (place / "cases.json").write_text(json.dumps(cases))
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, str(place / "cases.json")],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env={
            **({"HF_HUB_OFFLINE": "1"} if hub is None else {"HF_ENDPOINT": hub}),
            "PYTHONPATH": ":".join(sys.path),
            "PATH": "",
            "HOME": str(place),
        },
    )
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files and directories of somebody who has got something wrong."""
    place = tmp_path_factory.mktemp("mistakes")
    (place / "data.jsonl").write_text('{"text": "x"}\n{oops\n')
    (place / "good.txt").write_text("x " * 1000)
    (place / "mine.txt").write_text("not yours")
    (place / "full").mkdir()
    (place / "full" / "thesis.tex").touch()
    (place / "bad.yaml").write_text("dms: [")
    curve = {"points": [{"compression_ratio": 1.0}, {"compression_ratio": 7.85}]}
    config = {"dms_config": {"window": 16}, "dms_curve": curve, "dtype": "bfloat16"}
    (place / "model").mkdir()
    (place / "model" / "config.json").write_text(json.dumps(config))
    (place / "packed").mkdir()
    (place / "packed" / "config.json").write_text('{"dms_quantization": {"samples": 1}}')
    return place


def _mistakes(place: Path) -> list[tuple[list[str], str]]:
    new, model, good = (str(place / x) for x in ("new", "model", "good.txt"))
    go = ["compress", "embedded", "-o", new]
    fp8 = ["-r", "fp8_default-kv_fp8-dms_cr8"]
    return [
        ([*go, "-r", "dms_cr5"], "unknown recipe 'dms_cr5', did you mean 'dms_cr"),
        ([*go, "-r", "no.yaml"], "recipe file no.yaml does not exist"),
        ([*go, "-r", str(place / "bad.yaml")], "bad.yaml cannot be read"),
        ([*go, "--set", "dms.windo=3"], "unknown key 'dms.windo', did you mean 'window'"),
        ([*go, "--set", "dms.window"], "must read KEY=VALUE"),
        (
            [*go, "--set", "dms.window=0"],
            "dms.window=0: Input should be greater than or equal to 1",
        ),
        ([*go, "--set", "dms.window=.nan"], "dms.window=nan"),
        ([*go, "--set", "dms.window=4000"], "cannot be reached with window=4000"),
        ([*go, *fp8, "--set", "quantize.sample=4"], "did you mean 'samples'"),
        ([*go, *fp8, "--set", "quantize.samples=0"], "quantize.samples=0"),
        ([*go, "--data", "no.jsonl"], "--data no.jsonl does not exist"),
        ([*go, "--data", str(place / "data.jsonl")], "data.jsonl:2 is not JSON"),
        ([*go, "--format", "alpaca"], "there is no --data"),
        ([*go, "--device", "gpu"], "--device gpu is no device"),
        ([*go, "--json", str(place / "mine.txt")], "holds no results"),
        (
            [*go, "-r", "dms_cr4", "--set", "retrofit.report_to=neptune"],
            "retrofit.report_to='neptune' needs neptune, not installed here: pip install neptune",
        ),
        (["compress", "embedded", "-o", str(place / "full")], "thesis.tex"),
        (["compress", "embedded", "-o", str(place / "mine.txt")], "is a file"),
        (["compress", "/no/where"], "/no/where does not exist; accepted: a directory"),
        (["compress", ""], "MODEL is empty; accepted: a directory"),
        (["compress", model, "-o", new], "already has DMS gates"),
        (["compress", str(place / "packed"), "-o", new], "is quantized already"),
        (["compress", "nosuch/"], "nosuch/ does not exist; accepted: a directory"),
        (["generate", "nosuch/", "-p", "x"], "nosuch/ does not exist; accepted: a directory"),
        (["traces", "nosuch/", "--prompts", good, "-o", f"{new}.jsonl"], "nosuch/ does not exist"),
        (["preview", "--tokenizer", "nosuch/", "--data", good], "nosuch/ does not exist"),
        (["tune", "nosuch/"], "nosuch does not exist; expected the directory of a compressed"),
        (["export", "nosuch", "-o", new], "nosuch does not exist; expected the directory of a"),
        (["plan", good], "is no model; accepted: a config.json"),
        (["plan", ""], "is no model; accepted: a config.json"),
        (["compress", "smolm2"], "did you mean 'smollm2'"),
        (["compress", "smollm2"], "modelopt-dms fetch smollm2"),
        (["compress", str(place / "full")], "has no config.json"),
        (["preview", "--tokenizer", "embedded"], "--data is missing"),
        (
            ["preview", "--tokenizer", "/no", "--data", str(place / "good.txt")],
            "/no does not exist",
        ),
        (
            ["preview", "--tokenizer", "embedded", "--data", str(place / "good.txt"), "-r", "x"],
            "unknown",
        ),
        (["traces", "embedded", "--prompts", "no.txt", "-o", new], "must be a .jsonl file"),
        (["traces", "embedded", "--prompts", "no.txt", "-o", f"{new}.jsonl"], "--prompts no.txt"),
        (
            ["traces", "embedded", "--prompts", "no", "-o", f"{new}.jsonl", "--top-p", "7"],
            "top_p=7",
        ),
        (["generate", "/no/where"], "/no/where does not exist"),
        (["generate", "embedded", "-p", "x", "--cr", "2"], "carries no curve"),
        (["generate", model, "-p", "x", "--cr", "9"], "can be set to 1 to 7.85"),
        (["generate", "embedded", "-p", "x", "--temperature", "1e-320"], "must be 0 (greedy)"),
        (["generate", "embedded", "-p", " "], "--prompt is empty"),
        (["generate", "embedded", "--stats"], "are of one --prompt"),
        (["eval", "/no/where"], "/no/where does not exist"),
        (["eval", "embedded", "--json", str(place / "mine.txt")], "holds no results"),
        (["eval", "embedded", "--fidelity"], "embedded has no gates, so it is its own full cache"),
        (["tune", "embedded"], "is a plain model, without gates"),
        (["tune", model, "-o", str(place / "full")], "thesis.tex"),
        (["export", "embedded", "-o", new], "is a plain model, without gates"),
        (["export", model, "-o", new, "--format", "gguf"], "accepted: hf, onnx, tensorrt, trtllm"),
        (["export", model, "-o", new, "--format", "hf", "--chunk", "32"], "chunk is no option"),
        (["export", model, "-o", new, "--format", "onnx"], "use --dtype float32"),
        (["export", model, "-o", str(place / "full")], "thesis.tex"),
        (["engine", "build", model], "holds no dms_engine.json"),
        (["engine", "run", model, "-p", "x"], "holds no dms_engine.json"),
        (["engine", "bench", model], "holds no dms_engine.json"),
        (["engine", "inspect", model], "holds no dms_engine.json"),
        (["recipes", "show", "nope"], "unknown recipe 'nope'"),
        (["fetch", "nope"], "unknown model 'nope'"),
    ]


def test_mistakes_are_one_line_without_torch(place: Path) -> None:
    cases = _mistakes(place)
    for (words, message), (code, said, errors) in zip(
        cases, run([words for words, _ in cases], place), strict=True
    ):
        found = [x for x in errors.splitlines() if x.startswith("error: ")]
        assert (code, len(found)) == (1, 1), (words, code, said, errors)
        assert message in found[0], (words, errors)
    assert not (place / "new").exists()


def test_what_needs_no_model_is_printed_without_torch(place: Path) -> None:
    words = (
        ["--version"],
        ["recipes", "--json", "-"],
        ["fetch", "--json", "-"],
        ["recipes", "show", "dms_cr8"],
    )
    found = run([*map(list, words)], place)
    assert [code for code, _, _ in found] == [0, 0, 0, 0]
    assert "modelopt-dms " in found[0][1] and "calibrated_cr4" in json.loads(found[1][1])
    assert json.loads(found[2][1])[0]["name"] == "smollm2"
    assert "\nretrofit:\n" in found[3][1]


class Hub(BaseHTTPRequestHandler):
    """Answers as the hub does: of no repository, of one without a config.json, and when it is down."""

    asked: ClassVar[list[str]] = []

    def do_HEAD(self) -> None:
        """Answer by the name that is asked for."""
        self.asked.append(self.path)
        down = "down" in self.path
        self.send_response(503 if down else 404)
        if not down:
            kind = "EntryNotFound" if "there" in self.path else "RepoNotFound"
            self.send_header("X-Error-Code", kind)
        self.end_headers()


def test_a_name_that_the_hub_does_not_have_is_asked_for_once(place: Path) -> None:
    Hub.asked.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    hub = f"http://127.0.0.1:{server.server_port}"
    go = ["-o", str(place / "new")]
    cases = [["compress", "smolm2", *go], ["compress", "me/down", *go]]
    try:
        found = run([*cases, ["compress", "me/there", *go]], place, hub)
    finally:
        server.shutdown()
        server.server_close()
    start = "error: MODEL 'smolm2' is no directory, no .gguf file, no known name (embedded, smollm2"
    assert found[0][0] == 1 and found[0][2].startswith(start)
    assert found[0][2].endswith("that you may read, did you mean 'smollm2'?\n")
    assert found[1][0] == 1 and "the hub answered with status 503" in found[1][2]
    # What may be a model goes on, here to what cannot be imported.
    assert "imports" in str(found[2][0])
    assert [x.split("/resolve")[0] for x in Hub.asked] == ["/smolm2", "/me/down", "/me/there"]


def test_a_hub_that_cannot_be_reached_is_said_at_once(place: Path) -> None:
    with socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens
        hub = f"http://127.0.0.1:{taken.getsockname()[1]}"
        ((code, said, errors),) = run([["compress", "nosuch"]], place, hub)
    assert code == 1 and not said
    assert "MODEL 'nosuch' is no directory" in errors and "could not be reached (" in errors


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize(
    "words", [["recipes", "show", "dms_cr8"], ["recipes"], ["recipes", "schema"], ["--version"]]
)
def test_an_output_that_cannot_be_written_is_named(words: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "modelopt_dms", *words],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
    assert done.returncode == 1
    assert done.stderr == "error: standard output cannot be written: No space left on device\n"


def test_a_reader_that_has_enough_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "modelopt_dms", "recipes", "show", "dms_cr8"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")
