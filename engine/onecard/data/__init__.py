"""Data: files or datasets -> validated examples -> tokens and response masks.

    from onecard.data import hold_out, open_rows, preference_examples, step_indices

    rows = open_rows("pairs.jsonl", split="train")       # {"prompt": "Hello", "chosen": " you", "rejected": " no"}
    pairs = preference_examples(rows, tokenizer, max_length=512, skip_bad_rows=True)
    for note in pairs.notes:
        print(note)                                      # 2 of 1094 responses were cut at max_length 512
    train, held_out = hold_out(pairs.examples, pairs.groups, test_size=0.05, seed=42)
    for indices in step_indices(len(train), 8, seed=42, epoch=0):
        batch = pack_pairs([train[i] for i in indices])  # from onecard.data.batches

The first pair, if the token ids are `<s>` = 1, `Hello` = 7, ` you` = 9, ` no` = 4 and `</s>` = 2:

    pairs.examples[0].chosen     tokens (1, 7, 9, 2)   response_mask (False, False, True, True)
    pairs.examples[0].rejected   tokens (1, 7, 4, 2)   response_mask (False, False, True, True)

A row that cannot be used raises an `OnecardError` of one line, `pairs.jsonl:3: chosen is null`. With `skip_bad_rows`
it is listed in `bad_rows` and counted in `notes` instead.
"""

from onecard.data.data_report import BadRow, Tokenized
from onecard.data.examples import (
    Prompt,
    labelled_examples,
    preference_examples,
    prompt_examples,
    ranking_examples,
    scored_examples,
    sft_examples,
)
from onecard.data.files import Row, Rows, load_rows, open_rows, prompt_rows
from onecard.data.order import hold_out, step_indices, stream_indices
from onecard.data.tokens import prompt_text, prompt_tokens

__all__ = [
    "BadRow",
    "Prompt",
    "Row",
    "Rows",
    "Tokenized",
    "hold_out",
    "labelled_examples",
    "load_rows",
    "open_rows",
    "preference_examples",
    "prompt_examples",
    "prompt_rows",
    "prompt_text",
    "prompt_tokens",
    "ranking_examples",
    "scored_examples",
    "sft_examples",
    "step_indices",
    "stream_indices",
]
