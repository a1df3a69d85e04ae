"""Models: loading, LoRA adapters, scalar heads, roles on one base, layouts, attention, and micro-batching."""
