"""Settings of `onecard evaluate`."""

from __future__ import annotations

from dataclasses import dataclass

from onecard.config.base import NO_DATASET, ModelConfig, ScoringConfig, option, raise_first


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(ScoringConfig, ModelConfig):
    """Evaluate a policy's answers: rewards, win rate over a baseline, KL to the reference, length, diversity."""

    dataset: str = option("", "Rows with `prompt`; perplexity is measured on `completion` or `chosen`.")
    dataset_split: str = option("test", "Split to use when dataset is a folder or a hub dataset.")
    baseline: str = option("", "Model, run or adapter to compare with: its answers to the same prompts.")
    ref_adapter: str = option("", "Folder of the reference adapter, to which the KL is measured. Empty: the base.")
    output_dir: str = option("", "Folder for evaluation.json, evaluation.md and samples.jsonl. Empty: only print.")
    max_prompts: int = option(128, "Use the first max_prompts prompts; 0: all.", least=0)
    max_length: int = option(1024, "Longest sequence in tokens, prompt and response together.", least=2)
    response_length: int = option(64, "Longest response in tokens.", least=1)
    temperature: float = option(1.0, "Divides the logits in sampling and in log-probs; 0: greedy decoding.", least=0)
    per_device_eval_batch_size: int = option(16, "Sequences in one pass without gradients.", least=1)
    local_rollout_forward_batch_size: int = option(64, "Prompts sampled together.", least=1)
    seed: int = option(42, "Seed of the sampling.")

    def validate(self) -> None:
        super().validate()
        raise_first({NO_DATASET: not self.dataset})
