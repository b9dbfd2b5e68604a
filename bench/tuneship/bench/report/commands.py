"""`tuneship bench history`: the verb. Heavy libraries are imported when it runs."""

from __future__ import annotations

from pathlib import Path

from tuneship.core.progress import say


def history(*folders: Path, html: Path | None = None) -> None:
    """List past reports, oldest first; reports that cannot be read are named and skipped.

    Parameters
    ----------
    folders
        Where to look for report.json files, however deep. Default: runs/ and bench-*/.
    html
        Also plot score, TTFT, TPOT and throughput over time into this file.

    """
    from tuneship.bench.report.history import collect, default_folders, show  # noqa: PLC0415
    from tuneship.bench.report.page import write_history_html  # noqa: PLC0415

    found = collect(folders or default_folders())
    for reason in found.skipped:
        say(f"skipped: {reason}")
    if found.rows:
        show(found.rows)
    else:
        say("no reports found")
    if html:
        write_history_html(found.rows, html)
        say(f"history: {html}")
