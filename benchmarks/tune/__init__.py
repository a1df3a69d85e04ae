"""Tuning by measurement: a table of knobs, a sweep that turns them, and what it proposes."""
