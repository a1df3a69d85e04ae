"""Settings that several commands share. Names are those of TRL and transformers.

A field becomes a command line flag and a YAML key of the same name; the command line wins over the file, the file over
the default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from onecard.utils.errors import OnecardError

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
AdapterDtype = Literal["float32", "bfloat16"]
Optim = Literal["adamw_torch", "adamw_8bit", "paged_adamw_8bit"]
Scheduler = Literal["linear", "cosine", "constant", "constant_with_warmup"]
Truncation = Literal["keep_start", "keep_end", "error"]


def option(default: Any, help: str, least: float | None = None) -> Any:
    """A dataclass field with its help text and its minimum. A list as default is copied for each instance."""
    metadata = {"help": help, "least": least}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def raise_first(complaints: Mapping[str, bool]) -> None:
    """Raise `OnecardError` with the first message whose value is True. `complaints`: message -> whether it applies."""
    for message, applies in complaints.items():
        if applies:
            raise OnecardError(message)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model to load, the dtype or quantization of its weights, and its attention implementation."""

    model: str = option("", "Hugging Face model: a hub name, a folder, or an adapter folder that onecard wrote.")
    dtype: Dtype = option(
        "auto",
        "Data type of the weights. auto: float32 on a CPU and if all weights are trained, else bfloat16 (or float16 on "
        "a GPU without bfloat16).",
    )
    load_in_4bit: bool = option(
        False, "Load the base in NF4 with double quantization (head and embeddings stay in 16 bit)."
    )
    attn_implementation: str = option(
        "auto", "sdpa, eager or flash_attention_2. auto: flash-attn on a GPU where it is installed, else sdpa."
    )
    trust_remote_code: bool = option(False, "Run code that comes with the model. Only for sources you trust.")

    def validate(self) -> None:
        """Raise `OnecardError` if settings are out of range or contradict each other."""


NO_DATASET = "--dataset is missing: give a .jsonl, .json, .csv or .parquet file, or a hub dataset name."


@dataclass(frozen=True, kw_only=True)
class TrainConfig(ModelConfig):
    """Settings of all training commands. A step is an optimizer step; in PPO, an iteration."""

    INPUTS: ClassVar[tuple[str, ...]] = ("model", "dataset", "eval_dataset")

    dataset: str = option("", "Training rows: a .jsonl, .json, .csv or .parquet file, a folder, or a hub dataset name.")
    dataset_train_split: str = option("train", "Split of a folder or hub dataset to train on.")
    eval_dataset: str = option("", "Held-out rows. Empty: test_size of the training rows are held out.")
    dataset_test_split: str = option("test", "Split to use when eval_dataset is a folder or a hub dataset.")
    test_size: float = option(
        0.05, "Rows to hold out when there is no eval_dataset: a share below 1, or a count; 0: none.", least=0
    )
    skip_bad_rows: bool = option(False, "Count and list bad rows and continue, instead of stopping at the first.")
    max_length: int = option(1024, "Longest sequence in tokens, prompt and response together.", least=2)
    truncation_mode: Truncation = option(
        "keep_start", "What is cut from a sequence longer than max_length. keep_start: the response's end; keep_end: "
        "the prompt's start; error: nothing, such a row is a bad row.",
    )  # fmt: skip
    padding_free: bool = option(True, "Pack sequences end to end. Off: pad to the micro-batch's longest.")

    output_dir: str = option("", "Run folder. Empty: runs/<command>.")
    resume: bool = option(
        False, "Continue from the newest complete checkpoint in output_dir; if there is none, start at step 0."
    )
    overwrite: bool = option(False, "Replace a run that output_dir already holds.")
    dry_run: bool = option(
        False,
        "Print the settings, each role's parameters and the first example with learned tokens marked; train nothing.",
    )
    seed: int = option(42, "Seed of the data order and of every new weight.")

    use_peft: bool = option(True, "Train a LoRA adapter. Off: train all weights (no 4-bit).")
    lora_r: int = option(16, "Rank of the adapter.", least=1)
    lora_alpha: int = option(32, "Scale of the adapter: its output is multiplied by lora_alpha / lora_r.", least=1)
    adapter_dtype: AdapterDtype = option(
        "float32",
        "Data type of the adapters. bfloat16: faster, with smaller activations; the optimizer keeps float32 copies.",
    )
    lora_target_modules: list[str] = option(
        ["all-linear"],
        "Names of layers that get an adapter; may be given several times. all-linear: all linear layers except the "
        "head, experts and routers.",
    )

    optim: Optim = option(
        "adamw_torch",
        "Optimizer. adamw_8bit: bitsandbytes' 8-bit AdamW; paged_adamw_8bit: its states can move to host memory.",
    )
    learning_rate: float = option(1e-4, "Peak learning rate.", least=0)
    lr_scheduler_type: Scheduler = option("linear", "Schedule of the learning rate after the warm-up.")
    warmup_steps: float = option(0.0, "Steps of linear warm-up; below 1: that share of all steps.", least=0)
    weight_decay: float = option(0.0, "Decoupled weight decay.", least=0)
    adam_beta1: float = option(0.9, "Decay of Adam's first moment.", least=0)
    adam_beta2: float = option(0.999, "Decay of Adam's second moment.", least=0)
    adam_epsilon: float = option(1e-8, "Added to Adam's denominator.", least=0)
    max_grad_norm: float = option(1.0, "Gradients are clipped to this norm; 0: no clipping.", least=0)
    num_train_epochs: float = option(1.0, "Passes over the training rows.", least=0)
    max_steps: int = option(-1, "Number of steps; overrides num_train_epochs if above 0.")
    per_device_train_batch_size: int = option(
        8, "Sequences (for reward and dpo: pairs) in one micro-batch. With micro_batch_tokens, it "
        "sets only how many sequences a step has.", least=1,
    )  # fmt: skip
    gradient_accumulation_steps: int = option(1, "Micro-batches in one optimizer step.", least=1)
    per_device_eval_batch_size: int = option(
        16, "Sequences (for reward and dpo: pairs) in one pass of an evaluation.", least=1
    )
    micro_batch_tokens: int = option(
        0, "Most tokens in one micro-batch. It limits memory and does not change the result (except with kto, which "
        "estimates its KL in each micro-batch). 0: per_device_train_batch_size sequences.", least=0,
    )  # fmt: skip
    head_chunk_tokens: int = option(
        0, "Tokens whose logits are in memory at a time; fewer take less memory and more time. 0: the "
        "device's default.", least=0,
    )  # fmt: skip
    gradient_checkpointing: bool = option(
        False, "Recompute activations in the backward pass: less memory, about a third slower."
    )
    activation_offloading: bool = option(
        False, "Keep activations in host memory until the backward pass; they are copied while the GPU computes."
    )

    logging_steps: int = option(1, "Steps between rows of metrics.jsonl.", least=1)
    eval_steps: int = option(
        0, "Steps between evaluations on held-out rows; 0: only before and after training.", least=0
    )
    save_steps: int = option(100, "Steps between checkpoints; 0: only after the last step.", least=0)
    save_total_limit: int = option(2, "Number of checkpoints to keep, the newest ones.", least=1)

    def validate(self) -> None:
        super().validate()
        betas = {name: getattr(self, name) for name in ("adam_beta1", "adam_beta2")}
        raise_first(
            {f"{name}: {beta}, expected a number from 0 to below 1.": beta >= 1 for name, beta in betas.items()}
        )
        if self.use_peft:
            return
        raise_first({
            "use_peft: a 4-bit base can only be trained with adapters; leave --no_use_peft or --load_in_4bit out.": (
                self.load_in_4bit
            ),
            "dtype: float16 is only for adapter training: small updates of the weights would vanish; use float32.": (
                self.dtype == "float16"
            ),
            f"adapter_dtype: {self.adapter_dtype}, but with --no_use_peft there are no adapters.": (
                self.adapter_dtype != "float32"
            ),
        })  # fmt: skip

    def input_paths(self) -> dict[str, str]:
        """Setting -> its value, for the non-empty settings that name a model or data to read."""
        return {name: value for name in self.INPUTS if (value := getattr(self, name))}


@dataclass(frozen=True, kw_only=True)
class PolicyTrainConfig(TrainConfig):
    """Settings of SFT and DPO: samples of the policy at each evaluation."""

    eval_samples: int = option(
        4, "Held-out prompts that are answered at each evaluation, for samples.jsonl and the report; 0: none.", least=0
    )
    eval_sample_length: int = option(64, "Longest answer to an eval_samples prompt, in tokens.", least=1)


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """The reference model of the commands that have one."""

    ref_adapter: str = option("", "Folder of an adapter to use as the reference. Empty: the policy before training.")


@dataclass(frozen=True, kw_only=True)
class ScoringConfig:
    """The rewards that score responses, in training and in evaluation."""

    reward_model_path: str = option(
        "", "Reward adapter that `onecard reward` trained on the same base, or any Hugging Face sequence classifier."
    )
    reward_label: str = option(
        "", "For a classifier with several labels: the label, by name or number, whose log-odds are the reward."
    )
    reward_funcs: list[str] = option(
        [], "fluency, relevance, diversity, length, length:N, exact_answer, regex:PATTERN, or a Python function: "
        "module:function or file.py:function. May be given several times, or as one line: "
        "'0.5*fluency + 2*judge.py:polite'.",
    )  # fmt: skip
    reward_weights: list[float] = option(
        [], "One weight for each reward: the reward model's first, then those of reward_funcs in order. Empty: the "
        "weights in reward_funcs, or 1 each.",
    )  # fmt: skip
    missing_eos_penalty: float = option(
        0.0, "Subtracted from the score of a response that reached the length limit before it ended.", least=0
    )
    reward_timeout: float = option(
        60.0,
        "Print a message when a reward function runs longer than this many seconds; it is not stopped. 0: never.",
        least=0,
    )


@dataclass(frozen=True, kw_only=True)
class SamplingConfig(ModelConfig):
    """Sampling settings of `generate` and `chat`."""

    max_new_tokens: int = option(128, "Longest response in tokens.", least=1)
    temperature: float = option(1.0, "Divides the logits; 0: greedy decoding.", least=0)
    top_p: float = option(1.0, "Sample from the smallest set of tokens with this total probability.", least=0)
    top_k: int = option(0, "Sample from the top_k likeliest tokens; 0: from all.", least=0)
    seed: int = option(42, "Seed of the sampling.")

    def validate(self) -> None:
        super().validate()
        raise_first({f"top_p: {self.top_p:g}, expected 0 to 1.": self.top_p > 1})
