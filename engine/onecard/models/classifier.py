"""Any Hugging Face sequence classifier as a frozen judge of texts, with its own tokenizer."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from onecard.config import ModelConfig
from onecard.models.load import Source, check_weights, find_source, pick_device, pick_dtype, reason
from onecard.models.micro_batching import TokenBudget, as_budget, map_micro_batches
from onecard.utils.errors import OnecardError, is_out_of_memory, nearest

ARCHITECTURE = "ForSequenceClassification"
LABELS_OF_THEIR_OWN = ("multi_label_classification", "regression")  # problem types without a softmax over the labels


def find_model_source(path: str, setting: str) -> Source:
    """`find_source` of a setting other than `model`."""
    try:
        return find_source(path)
    except OnecardError as error:
        raise OnecardError(f"{setting}: {str(error).removeprefix('model: ')}") from error


def is_classifier(path: str, setting: str, *, trust_remote_code: bool = False) -> bool:
    """Whether `path` names a sequence classifier, by the architecture in its config; an adapter folder is none."""
    from transformers import AutoConfig

    source = find_model_source(path, setting)
    if source.adapter is not None:
        return False
    try:
        config = AutoConfig.from_pretrained(source.base, trust_remote_code=trust_remote_code)
    except Exception as error:  # the loaders raise whatever their parsers raise
        raise OnecardError(f"{setting}: cannot load '{source.base}': {reason(error)}") from error
    return any(name.endswith(ARCHITECTURE) for name in config.architectures or [])


@dataclass(frozen=True)
class Classifier:
    """A classifier and the label that is asked for. `limit`: the longest text it reads, in tokens, if there is one.

    `pad` is what its config has as pad_token_id. A decoder reads at the last token that is not that one, so texts can
    be padded with nothing else.
    """

    model: Any
    tokenizer: Any
    label: int
    limit: int | None
    pad: int | None

    def values(self, texts: Sequence[Mapping[str, list[int]]], batch_size: int | TokenBudget) -> list[float]:
        """The label's value of each tokenized text, in their order; batches of like lengths, padded on the right."""

        def read(places: list[int]) -> list[float]:
            chosen = [texts[place] for place in places]
            check_known(chosen, self.rows, self.tokenizer)
            pad = spare_id(chosen) if self.pad is None or self.pad >= self.rows else self.pad
            self.model.config.get_text_config().pad_token_id = pad  # without one, a decoder refuses batches
            values: list[float] = self.value(self.model(**self.batch(chosen, pad)).logits.float()).tolist()
            return values

        return map_micro_batches([len(text["input_ids"]) for text in texts], as_budget(batch_size), read, padded=True)

    @property
    def rows(self) -> int:
        """How many tokens it has embeddings for."""
        rows: int = self.model.get_input_embeddings().weight.shape[0]
        return rows

    def batch(self, texts: Sequence[Mapping[str, list[int]]], pad: int) -> dict[str, Any]:
        """Keyword arguments of the model: what the tokenizer made, as far as the model takes it."""
        taken = inspect.signature(self.model.forward).parameters
        width = max(len(text["input_ids"]) for text in texts)
        fills = {"input_ids": pad, "attention_mask": 0, "token_type_ids": self.tokenizer.pad_token_type_id}
        inputs: dict[str, Any] = {
            name: torch.tensor(
                [text[name] + [fill] * (width - len(text[name])) for text in texts], device=self.model.device
            )
            for name, fill in fills.items()
            if name in texts[0] and name in taken
        }
        return inputs | ({"use_cache": False} if "use_cache" in taken else {})

    def value(self, logits: Tensor) -> Tensor:
        """Logits [b, L] -> [b]: the label's log-odds; log p / (1 - p) under a softmax over several labels, which is its
        logit less the log-sum-exp of the others. One label's, or one with a sigmoid of its own, is its logit.
        """
        own = logits[:, self.label]
        if logits.shape[1] == 1 or self.model.config.problem_type in LABELS_OF_THEIR_OWN:
            return own
        others = torch.arange(logits.shape[1], device=logits.device) != self.label
        return own - logits[:, others].logsumexp(1)


def load_classifier(path: str, setting: str, label: str, label_setting: str, config: ModelConfig) -> Classifier:
    """The classifier that `setting` names, on the run's device, frozen."""
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    base, remote = find_model_source(path, setting).base, {"trust_remote_code": config.trust_remote_code}
    try:
        names = AutoConfig.from_pretrained(base, **remote).id2label
        place = label_place(label, label_setting, names)  # before any weights are loaded
        tokenizer = AutoTokenizer.from_pretrained(base, truncation_side="left", **remote)
        model, info = AutoModelForSequenceClassification.from_pretrained(
            base,
            dtype=pick_dtype(config, train_all=False),
            device_map={"": pick_device()},
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # `check_weights` names them
            **remote,
        )
    except OnecardError:
        raise
    except Exception as error:  # the loaders raise whatever their parsers raise
        if is_out_of_memory(error):
            raise
        raise OnecardError(f"{setting}: cannot load '{base}': {reason(error)}") from error
    # RoBERTa's files often have a pooler, which its classifiers do not use.
    left = {key for key in info["unexpected_keys"] if ".pooler." not in key}
    check_weights(model, {**info, "unexpected_keys": left}, f"{setting}: '{base}'")
    pad = model.config.get_text_config().pad_token_id
    return Classifier(model.eval().requires_grad_(False), tokenizer, place, longest_text(model, tokenizer), pad)


def label_place(label: str, setting: str, names: Mapping[int, str]) -> int:
    """The number of a label that is given by its name or number; of a single one, 0."""
    known = {str(place): place for place in names} | {name: place for place, name in names.items()}
    if not label and len(names) == 1:
        return 0
    if label in known:
        return known[label]
    listed = ", ".join(f"{place} ({name})" for place, name in sorted(names.items()))
    what = f"'{label}' is no label of the classifier" if label else "missing, and the classifier has several labels"
    raise OnecardError(f"{setting}: {what}; expected one of {listed}.{nearest(label, known)}")


def longest_text(model: Any, tokenizer: Any) -> int | None:
    """What the tokenizer says, or the model's positions; RoBERTa's begin behind its padding's."""
    tables = [
        module
        for name, module in model.named_modules()
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding)
    ]
    before = next((table.padding_idx + 1 for table in tables if table.padding_idx is not None), 0)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 0
    limits = [limit for limit in (positions - before, tokenizer.model_max_length) if 0 < limit < 1 << 31]
    return min(limits, default=None)


def check_known(texts: Sequence[Mapping[str, list[int]]], rows: int, tokenizer: Any) -> None:
    """Stop at a token that the classifier has no embedding for."""
    beyond = next((token for text in texts for token in text["input_ids"] if token >= rows), None)
    if beyond is not None:
        raise OnecardError(
            f"{tokenizer.name_or_path}: token {tokenizer.convert_ids_to_tokens(beyond)!r} has id {beyond}, but the "
            f"classifier has embeddings for {rows} tokens."
        )


def spare_id(texts: Sequence[Mapping[str, list[int]]]) -> int:
    """The first id that no text has."""
    used = {token for text in texts for token in text["input_ids"]}
    return next(token for token in range(len(used) + 1) if token not in used)
