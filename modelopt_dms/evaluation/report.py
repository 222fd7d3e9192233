# SPDX-License-Identifier: Apache-2.0
"""Figures for readers: tables of methods, of data and of settings tried."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from modelopt_dms.data.dry_run import Preview
from modelopt_dms.evaluation.tuning import TuneResult


def results_table(rows: Sequence[Mapping[str, Any]], title: str = "") -> Table:
    """A rich table of rows of `eval`, one line each; rows of one task stand together."""
    table = Table(title=title, title_justify="left", padding=(0, 0, 0, 1))
    named = any("method" in row for row in rows)
    for name in ("task", "context", *(["method"] if named else [])):
        table.add_column(name, no_wrap=True)
    for name in ("result", "held", "seen", "KV kB", "CR"):
        table.add_column(name, justify="right", no_wrap=True)
    previous = None
    for row in rows:
        group = (row["task"], row["length"])
        if previous not in (None, group):
            table.add_section()
        is_accuracy = row["metric"] == "accuracy"
        table.add_row(
            "" if group == previous else row["task"],
            "" if group == previous else str(row["length"]),
            *([str(row.get("method", ""))] if named else []),
            f"{100 * row['value']:.1f} %" if is_accuracy else f"ppl {row['value']:.2f}",
            f"{row['resident_tokens']:.0f}",
            f"{row['context_tokens']:.0f}",
            f"{row['kv_bytes'] / 1000:,.0f}/{row['dense_bytes'] / 1000:,.0f}",
            f"{row['compression_ratio']:.2f}x",
        )
        previous = group
    return table


def fidelity_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """A rich table of distances from the full cache, one line a category of text and length."""
    table = Table(
        title="distance from the full cache, KL in nats per token",
        title_justify="left",
        padding=(0, 0, 0, 1),
    )
    table.add_column("text", overflow="fold")
    for name in ("length", "KL", "p95", "p99", "max", "same token", "ppl, full", "ppl", "CR"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            escape(printable(row["category"])),
            str(row["length"]),
            *(f"{row[x]:.4f}" for x in ("value", "kl_p95", "kl_p99")),
            f"{row['kl_max']:.3f}",
            f"{100 * row['top1']:.1f} %",
            f"{row['perplexity_full']:.2f}",
            f"{row['perplexity']:.2f}",
            f"{row['compression_ratio']:.2f}x",
        )
    return table


def data_table(preview: Preview) -> Table:
    """A rich table of what a retrofit reads and visits, one line for each source."""
    visited = f"{preview.steps:,} steps x {preview.samples_per_step:,} samples x {preview.length:,} tokens"
    table = Table(
        title="data",
        title_justify="left",
        caption=f"{visited} = {preview.tokens:,} tokens\n"
        f"{preview.samples:,} samples to train on, {preview.held_out:,} held out\n"
        f"padding: {100 * preview.padding:.1f} %; can be evicted while their document lasts: "
        f"{100 * preview.in_effect:.1f} % of the others",
        caption_justify="left",
        padding=(0, 0, 0, 1),
    )
    table.add_column("source", overflow="fold")
    for name in ("records", "read", "tokens", "longest", "wanted", "in the run", "visited"):
        table.add_column(name, justify="right", no_wrap=True)
    for source in preview.sources:
        table.add_row(
            escape(printable(source.name)),
            f"{source.records:,}",
            f"{source.documents:,}",
            f"{source.tokens:,}",
            f"{source.longest:,}",
            f"{100 * source.wanted:.1f} %",
            f"{100 * source.share:.1f} %",
            f"{source.epochs:.2f}x",
        )
    return table


def trials_table(found: TuneResult) -> Table:
    """A rich table of the settings that `tune` tried, by compression ratio."""
    title = f"{found.samples} samples of {found.length} tokens"
    table = Table("compression ratio", "perplexity", "loss", title=title)
    table.add_row("1.00", f"{found.full_perplexity:.3f}", "")
    for trial in sorted(found.trials, key=lambda x: x.compression_ratio):
        mark = "  <- chosen" if trial == found.chosen else ""
        table.add_row(
            f"{trial.compression_ratio:.2f}", f"{trial.perplexity:.3f}", f"{trial.loss:.2f} %{mark}"
        )
    return table


def printable(text: str) -> str:
    """A text whose control characters cannot move a terminal's cursor: they are spelled out."""
    return "".join(x if x.isprintable() else x.encode("unicode_escape").decode() for x in text)
