"""What is kept per row between the passes over a row of logits: names of the slots, shared by torch and Triton.

State of a softmax taken tile by tile, fp32 `[SLOTS, rows]`. Sums leave the target's column out.
"""

from __future__ import annotations

SHIFT = 0  # what is subtracted before exp: near enough to the largest logit that nothing overflows, -inf at the start
OFF = 1  # sum of exp(z - shift)
TARGET = 2  # z_y, -inf while its tile has not come
SLOPE = 3  # 1 - tanh^2 of the softcap at z_y, 1 without a softcap
MOMENT = 4  # sum of exp(z - shift) (z - shift)
SQUARE = 5  # sum of exp(2 (z - shift))
RESCALE = 6  # exp(old shift - new shift) of the last tile: what sums kept elsewhere are to be multiplied by
SLOTS = 8
