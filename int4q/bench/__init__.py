"""Measurements: ``python -m int4q.bench`` (or ``make bench``)."""
