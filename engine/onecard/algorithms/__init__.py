"""Each file reads from top to bottom: rows -> record -> loss, metrics."""
