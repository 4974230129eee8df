"""Records of a benchmark as Markdown: one table of the card's figures, one of each kind.

A record is what was measured once, as a flat dict; `kind` says what it is, and `model` and `mode`,
where there are any, of whom.
"""

import math
from collections.abc import Iterable, Sequence

Record = dict[str, str | int | float | None]

BATCH = (
    ("batch", "batch", "d"),
    ("mean_context", "context", ".0f"),
    ("step_ms", "step, ms", ".2f"),
    ("limit_step_ms", "limit, ms", ".2f"),
    ("decode_tokens_per_s", "decode, tok/s", ",.0f"),
    ("decode_share", "of the limit", "%"),
    ("num_prompt", "in", "d"),
    ("num_output", "out", "d"),
    ("output_tokens_per_s", "in and out, tok/s", ",.0f"),
    ("output_share", "of the limit", "%"),
    ("prefill_tokens_per_s", "prefill, tok/s", ",.0f"),
    ("ttft_s", "first token, s", ".3f"),
)
PREFILL = (
    ("num_prompt", "prompt", "d"),
    ("ttft_s", "first token, s", ".4f"),
    ("limit_s", "limit, s", ".4f"),
    ("prefill_tokens_per_s", "tok/s", ",.0f"),
    ("prefill_share", "of the limit", "%"),
)
KERNEL = (
    ("name", "kernel", ""),
    ("size", "size", ""),
    ("us", "µs", ",.1f"),
    ("limit_us", "limit, µs", ",.1f"),
    ("share", "of the limit", "%"),
    ("gb_per_s", "GB/s", ",.0f"),
    ("tflops_per_s", "TFLOP/s", ",.1f"),
)
STEP = (
    ("name", "kernel", ""),
    ("batch", "batch", "d"),
    ("launches", "launches a step", ".1f"),
    ("us", "µs a step", ",.1f"),
)
START = (
    ("load_s", "load, s", ".1f"),
    ("first_token_s", "load to first token, s", ".1f"),
    ("start_to_first_token_s", "process to first token, s", ".1f"),
    ("first_delay_s", "first request, s", ".2f"),
)
GRAPHS = (("num_graphs", "graphs", "d"), ("seconds", "captured in, s", ".1f"))
MEMORY = (
    ("weights_bytes", "weights", "GiB"),
    ("kv_cache_bytes", "K/V", "GiB"),
    ("workspace_bytes", "work space", "GiB"),
    ("logits_bytes", "logits", "GiB"),
    ("graphs_bytes", "graphs", "GiB"),
    ("planned_bytes", "planned", "GiB"),
    ("peak_allocated_bytes", "peak, allocated", "GiB"),
    ("peak_reserved_bytes", "peak, reserved", "GiB"),
)
PEER = (
    ("batch", "batch", "d"),
    ("num_prompt", "in", "d"),
    ("num_output", "out", "d"),
    ("output_tokens_per_s", "in and out, tok/s", ",.0f"),
    ("seconds", "s", ".1f"),
)
TESTS = (("what", "tests", ""), ("summary", "outcome", ""), ("seconds", "s", ".0f"))
OF_WHOM = (("model", "model", ""), ("mode", "mode", ""))
Columns = Sequence[tuple[str, str, str]]
TABLES: dict[str, tuple[str, Columns]] = {
    "tests": ("Tests", TESTS),
    "start": ("Start", (*OF_WHOM, *START)),
    "graphs": ("Graphs", (*OF_WHOM, *GRAPHS)),
    "batch": ("Batches", (*OF_WHOM, *BATCH)),
    "step": ("What a step is made of", (*OF_WHOM, *STEP)),
    "prefill": ("Prompts alone", (*OF_WHOM, *PREFILL)),
    "peer": ("transformers, continuous batching", (*OF_WHOM, *PEER)),
    "memory": ("Memory, GiB", (*OF_WHOM, *MEMORY)),
    "kernel": ("Kernels", KERNEL),
}


def markdown(records: Iterable[Record], title: str = "") -> str:
    """Return all tables that have rows, the card above them, what went wrong below."""
    by_kind: dict[str, list[Record]] = {}
    for record in records:
        by_kind.setdefault(str(record["kind"]), []).append(record)
    parts = [f"# {title}\n"] if title else []
    parts += [_card_line(card) for card in by_kind.get("card", [])]
    for kind, (heading, columns) in TABLES.items():
        if rows := by_kind.get(kind):
            parts.append(f"## {heading}\n\n{_table(columns, rows)}")
    if faults := by_kind.get("fault"):
        lines = "".join(f"- {_whose(fault)}{fault['what']}: {fault['error']}\n" for fault in faults)
        parts.append("## Without figures\n\n" + lines)
    return "\n".join(parts)


def line_of(record: Record) -> str:
    """Return a record in one line, for those who watch."""
    shown = {key: _short(value) for key, value in record.items() if key != "kind"}
    return f"{record['kind']}: " + ", ".join(f"{key} {value}" for key, value in shown.items())


def _card_line(card: Record) -> str:
    rates = f"copies at {_number(card, 'bytes_per_s') / 1e12:.2f} TB/s, "
    rates += f"{card['dtype']} products at {_number(card, 'flops_per_s') / 1e12:,.0f} TFLOP/s"
    if card.get("fp8_flops_per_s"):
        rates += f", fp8 at {_number(card, 'fp8_flops_per_s') / 1e12:,.0f}"
    return f"{card['name']}, {card['software']}: {rates}.\n"


def _number(record: Record, key: str) -> float:
    value = record.get(key)
    return float(value) if isinstance(value, int | float) else math.nan


def _whose(record: Record) -> str:
    words = [str(record[key]) for key in ("model", "mode") if record.get(key)]
    return " ".join(words) + ", " if words else ""


def _table(columns: Columns, rows: list[Record]) -> str:
    """Return a table of the columns for which any row has a value."""
    used = [column for column in columns if any(row.get(column[0]) is not None for row in rows)]
    lines = [
        [title for _, title, _ in used],
        ["---"] * len(used),
        *([_cell(row.get(key), form) for key, _, form in used] for row in rows),
    ]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _cell(value: str | int | float | None, form: str) -> str:
    if value is None:
        return "–"
    if isinstance(value, str):
        return value.replace("|", "/")
    if form == "%":
        return f"{100 * value:.0f} %"
    if form == "GiB":
        return f"{value / 2**30:.2f}"
    return format(value, form)


def _short(value: str | int | float | None) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
