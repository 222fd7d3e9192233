# SPDX-License-Identifier: Apache-2.0
"""The command that answers over HTTP: serve."""

import os
from enum import Enum
from importlib.util import find_spec
from typing import Annotated

import typer

from modelopt_dms.cli.opening import check_model, load_any, set_ratio
from modelopt_dms.cli.options import (
    DeviceOpt,
    DirArg,
    Dtype,
    DtypeOpt,
    RatioOpt,
    TrustOpt,
    err,
    warn,
)
from modelopt_dms.kvcache.limit import check_limit, limit_in_bytes
from modelopt_dms.serving.http.listening import ServeError, is_loopback, listen

KEY = "MODELOPT_DMS_API_KEY"
_NEEDED = ("fastapi", "uvicorn", "openai", "prometheus_client")


class OnFullChoice(str, Enum):
    """What happens when --max-cache-bytes are used up."""

    error = "error"
    evict = "evict"


def serve(
    model: DirArg,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 8000,
    name: Annotated[
        str | None,
        typer.Option("--name", help="Of the model, as clients ask for it. [default: MODEL]"),
    ] = None,
    max_cache_bytes: Annotated[
        str | None,
        typer.Option(
            help="Most bytes of a request's KV cache: 2000000000, 512M, 8GiB, or 80% of the memory that is free once "
            "the model is loaded. [default: no limit]"
        ),
    ] = None,
    on_full: Annotated[
        OnFullChoice,
        typer.Option(
            help="There: error ends the request; evict drops the oldest tokens of the longest lists, also those that "
            "the model wants to keep."
        ),
    ] = OnFullChoice.error,
    max_waiting: Annotated[
        int, typer.Option(min=1, help="Requests that may wait; more are answered with status 429.")
    ] = 64,
    api_key: Annotated[
        str | None,
        typer.Option(help=f"Key that clients must give. Better: in the environment, as {KEY}."),
    ] = None,
    grace: Annotated[
        int, typer.Option(min=0, help="Seconds that requests may go on after SIGTERM or Ctrl-C.")
    ] = 30,
    cr: RatioOpt = None,
    dtype: DtypeOpt = Dtype.auto,
    device: DeviceOpt = None,
    trust_remote_code: TrustOpt = False,
) -> None:
    """Answer OpenAI's chat and text completions over HTTP, one request after the other."""
    missing = [x for x in _NEEDED if find_spec(x) is None]
    if missing:
        raise ServeError(
            f"{', '.join(missing)} not installed; run: pip install 'modelopt-dms[serve]'"
        )
    if max_cache_bytes is not None:
        check_limit(max_cache_bytes, "--max-cache-bytes ")
    elif on_full is OnFullChoice.evict:
        raise ServeError("--on-full evict needs --max-cache-bytes: without it the cache grows")
    place = check_model(model)
    listening = listen(host, port)
    key = api_key or os.environ.get(KEY) or None
    if key is None and not is_loopback(listening):
        warn(f"anybody who reaches {host} can use this server; set {KEY} to ask for a key")
    err.print(f"loading {model} ...", highlight=False, markup=False, soft_wrap=True)
    network, tokenizer = load_any(place, dtype, device, trust_remote_code)
    set_ratio(network, cr)
    from modelopt_dms.serving.http.generation import Limits
    from modelopt_dms.serving.http.server import Options
    from modelopt_dms.serving.http.server import serve as run

    limit = None if max_cache_bytes is None else limit_in_bytes(max_cache_bytes, network.device)
    options = Options(name or str(model), Limits(limit, on_full.value, max_waiting), key, grace)
    if not tokenizer.chat_template:
        warn("this model has no chat template: only /v1/completions will work")
    address, taken = listening.getsockname()[:2]
    shown = f"[{address}]" if ":" in address else address
    line = f"serving {options.name} at http://{shown}:{taken}/v1"
    ended = run(
        network,
        tokenizer,
        listening,
        options,
        on_ready=lambda: err.print(line, highlight=False, markup=False, soft_wrap=True),
    )
    err.print("stopped" if ended else "stopped; a request did not end in time", highlight=False)
