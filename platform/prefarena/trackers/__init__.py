"""Trackers: where the metric rows of a comparison's trainings are shown, beside their own metrics.jsonl.

`interface.py` says what a tracker does; a module for each of them imports its package, and nothing else does.
"""
