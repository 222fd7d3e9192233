# SPDX-License-Identifier: Apache-2.0
"""What a server counts, as Prometheus reads it. Knows nothing about HTTP."""

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from modelopt_dms.kvcache.hf_cache import KVStats

OUTCOMES = ("finished", "cancelled", "failed", "refused")


class Metrics:
    """Requests, tokens, and the KV cache of the request that runs. Set by one thread, read by another."""

    def __init__(self, max_cache_bytes: int | None) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"modelopt_dms_{name}", text, labels, registry=self.registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"modelopt_dms_{name}", text, registry=self.registry)

        self.requests = counter("requests", "Generations by how they ended.", "outcome")
        for outcome in OUTCOMES:
            self.requests.labels(outcome)
        self.running = gauge("requests_running", "Generations that run now: 0 or 1.")
        self.waiting = gauge("requests_waiting", "Generations that wait for their turn.")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts that were read.")
        self.generated_tokens = counter("generated_tokens", "Tokens that were generated.")
        self.kv_bytes = gauge(
            "kv_bytes", "Bytes that the KV cache of the running request has taken."
        )
        self.kv_peak = gauge("kv_bytes_peak", "The most of them since the server started.")
        self.resident = gauge(
            "kv_resident_tokens", "Mean resident tokens of a KV head, of the running request."
        )
        self.context = gauge("kv_context_tokens", "Context tokens of the running request.")
        self.ratio = gauge(
            "compression_ratio",
            "Context over resident tokens, of the last request that was measured.",
        )
        gauge("kv_max_bytes", "Limit of the KV cache; 0 is none.").set(max_cache_bytes or 0)
        self._peak = 0

    def saw(self, held: KVStats) -> None:
        """Take in what the cache of the running request holds."""
        self._peak = max(self._peak, held.reserved_bytes)
        self.kv_peak.set(self._peak)
        self.kv_bytes.set(held.reserved_bytes)
        self.resident.set(held.resident_tokens)
        self.context.set(held.context_tokens)
        self.ratio.set(held.compression_ratio)

    def cleared(self) -> None:
        """The cache is gone."""
        for x in (self.kv_bytes, self.resident, self.context):
            x.set(0)

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)
