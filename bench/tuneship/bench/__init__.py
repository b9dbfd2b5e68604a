"""Measure an endpoint: how fast (`load`), how good (`eval`), and whether it got worse (`compare`).

Needs nothing but a URL: it meets the other stages through `endpoint.json`, artifacts and `report.json` alone.
"""
