# SPDX-License-Identifier: Apache-2.0
"""The command `serve`: mistakes are one line before the model is loaded, and a signal ends it with exit code 0."""

import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest

from modelopt_dms import cli
from modelopt_dms.serving.http.listening import listen

CODE = (
    "import sys, modelopt_dms.cli as cli\n"
    "try: cli.main()\n"
    "finally: print([x for x in ('torch', 'transformers', 'uvicorn') if x in sys.modules])"
)


def test_a_busy_port_is_one_line_before_anything_heavy_is_imported() -> None:
    with listen("127.0.0.1", 0) as first:
        port = str(first.getsockname()[1])
        words = [sys.executable, "-c", CODE, "serve", "embedded", "--port", port]
        found = subprocess.run(words, capture_output=True, text=True)
    assert found.returncode == 1 and found.stdout.strip() == "[]"
    assert f"--port {port}: 127.0.0.1:{port} is taken by another program" in found.stderr
    assert len(found.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max-cache-bytes", "lots"], "--max-cache-bytes 'lots' must be a number of bytes"),
        (["--max-cache-bytes", "0"], "--max-cache-bytes '0' must be a number of bytes"),
        (["--on-full", "evict"], "--on-full evict needs --max-cache-bytes"),
        (["--port", "99999"], "--port 99999 must be 0"),
        (["--host", "203.0.113.7"], "--host 203.0.113.7 is no address of this machine"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.argv", ["modelopt-dms", "serve", "embedded", *words])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
    printed = capsys.readouterr().err
    assert message in printed and len(printed.strip().splitlines()) == 1


def test_what_is_not_installed_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("modelopt_dms.cli.serving._NEEDED", ("uvicorn", "no_such_package"))
    monkeypatch.setattr("sys.argv", ["modelopt-dms", "serve", "embedded"])
    with pytest.raises(SystemExit):
        cli.main()
    printed = " ".join(capsys.readouterr().err.split())
    assert "no_such_package not installed; run: pip install 'modelopt-dms[serve]'" in printed


@contextmanager
def serving(log: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], openai.OpenAI]]:
    """The command in a process of its own, once it answers, and a client; standard error goes to a file."""
    words = [sys.executable, "-m", "modelopt_dms", "serve", "embedded", "--port", "0", *options]
    with open(log, "w") as file:
        process = subprocess.Popen(words, stderr=file, text=True)
    try:
        for _ in range(1200):
            found = re.search(r"serving embedded at (\S+)", log.read_text())
            if found or process.poll() is not None:
                break
            time.sleep(0.1)
        assert found, log.read_text()
        with openai.OpenAI(base_url=found[1], api_key="none", max_retries=0) as client:
            yield process, client
    finally:
        process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_command_with_exit_code_0(number: int, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with serving(log) as (process, client):
        fields = {"model": "embedded", "prompt": "def f(", "max_tokens": 20, "stream": True}
        stream = client.completions.create(**fields)
        next(stream)
        process.send_signal(number)
        assert [x for x in stream][-1].choices[0].finish_reason in ("length", "stop")
        client.close()
        assert process.wait(60) == 0
        assert log.read_text().splitlines()[-1] == "stopped"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("grace", "signals"),
    [("1", [signal.SIGTERM]), ("1", [signal.SIGINT]), ("30", [signal.SIGINT, signal.SIGINT])],
)
@pytest.mark.parametrize("stream", [True, False])
def test_requests_that_are_cut_leave_no_traceback(
    grace: str, signals: list[int], stream: bool, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    fields = {"model": "embedded", "prompt": "def f(", "max_tokens": 4000, "stream": stream}
    # Else the model may end its text by itself.
    fields["logit_bias"] = {"0": -100, "1": -100, "2": -100}

    def ask(client: openai.OpenAI) -> None:
        found = client.completions.create(**fields)
        if stream:
            list(found)

    with serving(log, "--grace", grace) as (process, client), ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask, client)
        time.sleep(1.0)
        assert not asked.done()
        for number in signals:
            process.send_signal(number)
            time.sleep(0.5)
        with pytest.raises(openai.APIError, match="the server is stopping"):
            asked.result(60)
        assert process.wait(60) == 0
    printed = log.read_text()
    assert "Traceback" not in printed and "Exception" not in printed
    assert printed.splitlines()[-1].startswith("stopped")
