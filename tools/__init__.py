"""Instruments: `python -m tools.NAME`. Nothing stands on them."""
