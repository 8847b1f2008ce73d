"""Plumbing: what the five scripts stand on. It knows none of them but loss.py and reward.py."""
