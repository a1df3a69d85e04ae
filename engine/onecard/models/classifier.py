"""A frozen Hugging Face sequence classifier that scores texts, with its own tokenizer."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from onecard.config import ModelConfig
from onecard.models.load import check_weights, find_source_of, pick_device, pick_dtype, reason
from onecard.models.micro_batching import TokenBudget, as_budget, map_micro_batches
from onecard.utils.errors import OnecardError, is_out_of_memory, nearest

ARCHITECTURE = "ForSequenceClassification"
INDEPENDENT_LABELS = ("multi_label_classification", "regression")  # problem types without a softmax over the labels


def is_classifier(path: str, setting: str, *, trust_remote_code: bool = False) -> bool:
    """Whether `path` is a sequence classifier, by the architecture in its config; False for an adapter folder."""
    from transformers import AutoConfig

    source = find_source_of(path, setting)
    if source.adapter is not None:
        return False
    try:
        config = AutoConfig.from_pretrained(source.base, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers' loaders may raise any exception
        raise OnecardError(f"{setting}: cannot load '{source.base}': {reason(error)}") from error
    return any(name.endswith(ARCHITECTURE) for name in config.architectures or [])


@dataclass(frozen=True)
class Classifier:
    """A classifier and the index of the label that is the score.

    `limit`: longest input in tokens, or None. `pad`: pad_token_id of its config, or None. A decoder reads its score at
    the last token that is not the pad token, so batches must be padded with this token.
    """

    model: Any
    tokenizer: Any
    label: int
    limit: int | None
    pad: int | None

    def scores(self, texts: Sequence[Mapping[str, list[int]]], batch_size: int | TokenBudget) -> list[float]:
        """The label's log-odds for each tokenized text, in order. Batches have similar lengths and are right-padded."""

        def read(indices: list[int]) -> list[float]:
            chosen = [texts[index] for index in indices]
            check_token_ids(chosen, self.embedding_rows, self.tokenizer)
            pad = unused_token_id(chosen) if self.pad is None or self.pad >= self.embedding_rows else self.pad
            self.model.config.get_text_config().pad_token_id = pad  # a decoder raises on batches without it
            scores: list[float] = self.log_odds(self.model(**self.batch(chosen, pad)).logits.float()).tolist()
            return scores

        return map_micro_batches([len(text["input_ids"]) for text in texts], as_budget(batch_size), read, padded=True)

    @property
    def embedding_rows(self) -> int:
        """Number of token ids that have an embedding."""
        rows: int = self.model.get_input_embeddings().weight.shape[0]
        return rows

    def batch(self, texts: Sequence[Mapping[str, list[int]]], pad: int) -> dict[str, Any]:
        """Keyword arguments of the model: the tokenizer's outputs that its forward accepts, right-padded."""
        accepted = inspect.signature(self.model.forward).parameters
        width = max(len(text["input_ids"]) for text in texts)
        fills = {"input_ids": pad, "attention_mask": 0, "token_type_ids": self.tokenizer.pad_token_type_id}
        inputs: dict[str, Any] = {
            name: torch.tensor(
                [text[name] + [fill] * (width - len(text[name])) for text in texts], device=self.model.device
            )
            for name, fill in fills.items()
            if name in texts[0] and name in accepted
        }
        return inputs | ({"use_cache": False} if "use_cache" in accepted else {})

    def log_odds(self, logits: Tensor) -> Tensor:
        """Logits [b, L] -> the label's log-odds [b].

        With a softmax over several labels, log(p / (1 - p)) is the label's logit minus the log-sum-exp of the others.
        With a single label, or a sigmoid or regression output for each label, it is the logit.
        """
        label = logits[:, self.label]
        if logits.shape[1] == 1 or self.model.config.problem_type in INDEPENDENT_LABELS:
            return label
        others = torch.arange(logits.shape[1], device=logits.device) != self.label
        return label - logits[:, others].logsumexp(1)


def load_classifier(path: str, setting: str, label: str, label_setting: str, config: ModelConfig) -> Classifier:
    """The classifier that `setting` names, frozen, on the run's device. Errors raise `OnecardError`."""
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    base, remote = find_source_of(path, setting).base, {"trust_remote_code": config.trust_remote_code}
    try:
        names = AutoConfig.from_pretrained(base, **remote).id2label
        index = label_index(label, label_setting, names)  # before any weights are loaded
        tokenizer = AutoTokenizer.from_pretrained(base, truncation_side="left", **remote)
        model, info = AutoModelForSequenceClassification.from_pretrained(
            base,
            dtype=pick_dtype(config, train_all=False),
            device_map={"": pick_device()},
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # `check_weights` reports them
            **remote,
        )
    except OnecardError:
        raise
    except Exception as error:  # transformers' loaders may raise any exception
        if is_out_of_memory(error):
            raise
        raise OnecardError(f"{setting}: cannot load '{base}': {reason(error)}") from error
    # RoBERTa checkpoints often have a pooler, which its classifiers do not use.
    unexpected = {key for key in info["unexpected_keys"] if ".pooler." not in key}
    check_weights(model, {**info, "unexpected_keys": unexpected}, f"{setting}: '{base}'")
    pad = model.config.get_text_config().pad_token_id
    return Classifier(model.eval().requires_grad_(False), tokenizer, index, max_input_tokens(model, tokenizer), pad)


def label_index(label: str, setting: str, names: Mapping[int, str]) -> int:
    """The index of a label that is given by name or number; 0 if the classifier has a single label."""
    known = {str(index): index for index in names} | {name: index for index, name in names.items()}
    if not label and len(names) == 1:
        return 0
    if label in known:
        return known[label]
    listed = ", ".join(f"{index} ({name})" for index, name in sorted(names.items()))
    problem = f"'{label}' is no label of the classifier" if label else "missing, and the classifier has several labels"
    raise OnecardError(f"{setting}: {problem}; expected one of {listed}.{nearest(label, known)}")


def max_input_tokens(model: Any, tokenizer: Any) -> int | None:
    """Longest input in tokens: the tokenizer's limit or the model's positions, whichever is smaller; None: no limit.

    RoBERTa numbers positions from `padding_idx + 1`, so it accepts fewer tokens than `max_position_embeddings` says.
    """
    tables = [
        module
        for name, module in model.named_modules()
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding)
    ]
    offset = next((table.padding_idx + 1 for table in tables if table.padding_idx is not None), 0)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 0
    limits = [limit for limit in (positions - offset, tokenizer.model_max_length) if 0 < limit < 1 << 31]
    return min(limits, default=None)


def check_token_ids(texts: Sequence[Mapping[str, list[int]]], embedding_rows: int, tokenizer: Any) -> None:
    """Raise for a token that the classifier has no embedding for."""
    unknown = next((token for text in texts for token in text["input_ids"] if token >= embedding_rows), None)
    if unknown is not None:
        raise OnecardError(
            f"{tokenizer.name_or_path}: token {tokenizer.convert_ids_to_tokens(unknown)!r} has id {unknown}, but the "
            f"classifier has embeddings for {embedding_rows} tokens."
        )


def unused_token_id(texts: Sequence[Mapping[str, list[int]]]) -> int:
    """The smallest id that occurs in no text."""
    used = {token for text in texts for token in text["input_ids"]}
    return next(token for token in range(len(used) + 1) if token not in used)
