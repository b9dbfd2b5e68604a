"""The page's charts, as Vega-Lite specifications that carry their data."""

from tuneship.bench.report.charts.history import over_time
from tuneship.bench.report.charts.latency import latency_ecdf, latency_over_time, throughput_latency
from tuneship.bench.report.charts.style import CATEGORIES, Spec, ramp
from tuneship.bench.report.charts.training import loss_curve

__all__ = [
    "CATEGORIES",
    "Spec",
    "latency_ecdf",
    "latency_over_time",
    "loss_curve",
    "over_time",
    "ramp",
    "throughput_latency",
]
