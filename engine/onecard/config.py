"""Every setting, documented where it is declared. Names are those of TRL and transformers.

A field becomes a command line flag and a YAML key of the same name; the command line wins over the file, the file over
the default.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
AdapterDtype = Literal["float32", "bfloat16"]
Optim = Literal["adamw_torch", "adamw_8bit", "paged_adamw_8bit"]
Scheduler = Literal["linear", "cosine", "constant", "constant_with_warmup"]
KLEstimator = Literal["k1", "k2", "k3"]
ValueInit = Literal["reward", "zero"]
Critic = Literal["adapter", "shared"]
Estimator = Literal["gae", "reinforce", "rloo", "grpo", "a2c"]
ConstraintMode = Literal["skip", "lagrangian"]
Truncation = Literal["keep_start", "keep_end", "error"]
Activation = Literal["none", "sigmoid"]
Algorithm = Literal["sft", "reward", "dpo", "ppo"]
Target = Literal["cuda", "cpu"]
Divergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]


def option(default: Any, help: str, least: float | None = None) -> Any:
    """A field with its help text and the least value it takes; a list default is copied for each instance."""
    metadata = {"help": help, "least": least}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which weights, and how they are held in memory."""

    model: str = option("", "Hugging Face model: a hub name, a folder, or an adapter folder that onecard wrote.")
    dtype: Dtype = option(
        "auto",
        "Weights' type. auto: float32 on CPU and where all weights are trained, else bfloat16 (float16 without it).",
    )
    load_in_4bit: bool = option(
        False, "Hold the base in NF4 with double quantization (head and embeddings stay 16-bit)."
    )
    attn_implementation: str = option(
        "auto", "sdpa, eager or flash_attention_2. auto: flash-attn on a GPU where it is installed, else sdpa."
    )
    trust_remote_code: bool = option(False, "Run code that comes with the model. Only for sources you trust.")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(ModelConfig):
    """What all training commands share. A step is an optimizer step; in PPO, an iteration."""

    dataset: str = option("", "Training rows: a .jsonl, .json, .csv or .parquet file, a folder, or a hub dataset name.")
    dataset_train_split: str = option("train", "Split of a folder or hub dataset to train on.")
    eval_dataset: str = option("", "Held-out rows. Empty: test_size of the training rows are held out.")
    dataset_test_split: str = option("test", "Split to use when eval_dataset is a folder or a hub dataset.")
    test_size: float = option(
        0.05, "Rows to hold out when there is no eval_dataset: a share below 1, or a count; 0: none.", least=0
    )
    skip_bad_rows: bool = option(False, "Count and list bad rows and go on, instead of stopping at the first.")
    max_length: int = option(1024, "Longest sequence in tokens, prompt and response together.", least=2)
    truncation_mode: Truncation = option(
        "keep_start", "What is cut beyond max_length: keep_start the response's end, keep_end the prompt's beginning; "
        "error: nothing, such a row is bad.",
    )  # fmt: skip
    padding_free: bool = option(True, "Pack sequences end to end. Off: pad to the longest of the micro-batch.")

    output_dir: str = option("", "Run folder. Empty: runs/<command>.")
    resume: bool = option(
        False, "Go on from the newest whole checkpoint in output_dir; from the start if there is none."
    )
    overwrite: bool = option(False, "Replace a run that output_dir already holds.")
    dry_run: bool = option(
        False,
        "Show the settings, each role's parameters and the first example with its mask; train nothing.",
    )
    seed: int = option(42, "Seed of the data order and of every new weight.")

    use_peft: bool = option(True, "Train a LoRA adapter. Off: train all weights (no 4-bit).")
    lora_r: int = option(16, "Rank of the adapter.", least=1)
    lora_alpha: int = option(32, "Scale of the adapter: its output is multiplied by lora_alpha / lora_r.", least=1)
    adapter_dtype: AdapterDtype = option(
        "float32", "Adapters' type. bfloat16: faster, with smaller activations; the optimizer keeps float32 copies."
    )
    lora_target_modules: list[str] = option(
        ["all-linear"], "Layers that get an adapter; all-linear: all but the head and a mixture's experts."
    )

    optim: Optim = option("adamw_torch", "Optimizer: adamw_torch, or bitsandbytes' 8-bit AdamW, plain or paged.")
    learning_rate: float = option(1e-4, "Peak learning rate.", least=0)
    lr_scheduler_type: Scheduler = option("linear", "How the learning rate falls after the warm-up.")
    warmup_steps: float = option(0.0, "Steps of linear warm-up; below 1: that share of all steps.", least=0)
    weight_decay: float = option(0.0, "Decoupled weight decay.", least=0)
    adam_beta1: float = option(0.9, "Decay of the first moment.", least=0)
    adam_beta2: float = option(0.999, "Decay of the second moment.", least=0)
    adam_epsilon: float = option(1e-8, "Term in the denominator of Adam.", least=0)
    max_grad_norm: float = option(1.0, "Gradient norm is clipped to this; 0: not clipped.", least=0)
    num_train_epochs: float = option(1.0, "Passes over the training rows.", least=0)
    max_steps: int = option(-1, "Steps; overrides num_train_epochs when above 0.")
    per_device_train_batch_size: int = option(
        8, "Sequences (pairs for reward and dpo) in one micro-batch; with micro_batch_tokens, only in a step's count.",
        least=1,
    )  # fmt: skip
    gradient_accumulation_steps: int = option(1, "Micro-batches in one optimizer step.", least=1)
    per_device_eval_batch_size: int = option(16, "Sequences (pairs) in one evaluation micro-batch.", least=1)
    micro_batch_tokens: int = option(
        0, "Tokens in one pass over the model: how a step's sequences are cut for memory, with the same result "
        "(but for kto, whose KL is each micro-batch's own). 0: per_device_train_batch_size sequences.", least=0,
    )  # fmt: skip
    head_chunk_tokens: int = option(
        0, "Tokens whose logits are held at a time; fewer take less memory and more time. 0: what suits the device.",
        least=0,
    )  # fmt: skip
    gradient_checkpointing: bool = option(
        False, "Recompute activations in the backward pass: less memory, a third slower."
    )
    activation_offloading: bool = option(
        False, "Hold what the backward pass needs in host memory, copied while the GPU computes."
    )

    logging_steps: int = option(1, "Steps between rows of metrics.jsonl.", least=1)
    eval_steps: int = option(
        0, "Steps between evaluations on held-out rows; 0: only before and after training.", least=0
    )
    save_steps: int = option(100, "Steps between checkpoints; 0: only after the last step.", least=0)
    save_total_limit: int = option(2, "Checkpoints to keep, newest first.", least=1)


@dataclass(frozen=True, kw_only=True)
class SpeakingConfig(TrainConfig):
    """What is shared by commands whose policy is also heard at each evaluation."""

    eval_samples: int = option(
        4, "Held-out prompts that are answered at each evaluation, for samples.jsonl and the report; 0: none.", least=0
    )
    eval_sample_length: int = option(64, "Longest of those answers, in tokens.", least=1)


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """What judges answers, in training and in evaluation."""

    reward_model_path: str = option(
        "", "Reward adapter that `onecard reward` trained on the same base, or any Hugging Face sequence classifier."
    )
    reward_label: str = option("", "Which label of a classifier with several is the reward, by name or number.")
    reward_funcs: list[str] = option(
        [], "fluency, relevance, diversity, length, exact_answer, regex:PATTERN, or a Python function: module:function "
        "or file.py:function. May be given several times, or as one line: '0.5*fluency + 2*judge.py:polite'.",
    )  # fmt: skip
    reward_weights: list[float] = option(
        [], "A weight for each reward, the reward model first, then reward_funcs in order; empty: those in "
        "reward_funcs, or 1 each.",
    )  # fmt: skip
    missing_eos_penalty: float = option(0.0, "Taken from the score of a response that does not end by itself.", least=0)
    reward_timeout: float = option(
        60.0, "Seconds after which a reward function that still runs is named; it is not stopped. 0: never.", least=0
    )


@dataclass(frozen=True, kw_only=True)
class SFTConfig(SpeakingConfig):
    """Supervised fine-tuning on `text`, `messages`, or `prompt` + `completion` rows."""

    completion_only_loss: bool = option(True, "With prompt + completion rows, learn the completion only.")
    assistant_only_loss: bool = option(True, "With messages, learn the assistant's turns only.")


@dataclass(frozen=True, kw_only=True)
class RewardConfig(TrainConfig):
    """A reward adapter with a scalar head, from pairs (`chosen`, `rejected`, maybe `margin`), scores (`completion`,
    `score`) or rankings (`completions`, the best first), each with `prompt`.
    """

    center_rewards_coefficient: float = option(
        0.0, "Weight of (r_chosen + r_rejected)^2, which keeps rewards around 0; pairs and rankings.", least=0
    )
    share_prompts: bool = option(True, "Run a prompt once for all its answers: same to rounding. Needs padding_free.")
    score_activation: Activation = option(
        "none", "sigmoid: scores are fitted by the sigmoid of the head, for scores from 0 to 1."
    )
    normalize_scores: bool = option(
        False, "Shift and scale the trained head so that training rows' scores have mean 0 and standard deviation 1."
    )


@dataclass(frozen=True, kw_only=True)
class DPOConfig(SpeakingConfig):
    """Direct preference optimization from `prompt`, `chosen`, `rejected` rows; kto: `prompt`, `completion`, `label`."""

    learning_rate: float = option(5e-5, "Peak learning rate.", least=0)
    beta: float = option(0.1, "Strength of the pull towards the reference; larger stays closer.", least=0)
    loss_type: list[str] = option(
        ["sigmoid"], "sigmoid, ipo, hinge, discopop, robust, exo_pair, nca_pair, bco_pair, sppo_hard, aot, "
        "aot_unpaired, apo_zero, apo_down, sigmoid_norm or sft; several are added up with loss_weights. Without a "
        "reference: simpo, orpo, cpo. From labelled answers: kto, apo_zero_unpaired. These five stand alone.",
    )  # fmt: skip
    loss_weights: list[float] = option([], "One weight for each loss_type; empty: 1 each.")
    label_smoothing: float = option(
        0.0, "Probability that a label is flipped, 0 to 0.5; used by sigmoid (cDPO), sigmoid_norm, aot, aot_unpaired, "
        "simpo, cpo, robust (below 0.5) and exo_pair (above 0).", least=0,
    )  # fmt: skip
    f_divergence_type: Divergence = option("reverse_kl", "Divergence to the reference.")
    f_alpha_divergence_coef: float = option(0.5, "alpha of alpha_divergence.")
    discopop_tau: float = option(0.05, "Temperature of discopop.")
    use_weighting: bool = option(False, "Weight each pair by how likely its answers are under the policy (WPO).")
    simpo_gamma: float = option(0.5, "Target margin of simpo.")
    cpo_alpha: float = option(1.0, "Weight of the likelihood of the chosen answer in cpo.", least=0)
    desirable_weight: float = option(1.0, "Weight of the desirable answers in kto and apo_zero_unpaired.", least=0)
    undesirable_weight: float = option(1.0, "Weight of the undesirable answers in kto and apo_zero_unpaired.", least=0)
    share_prompts: bool = option(True, "Run a prompt once for all its answers: same to rounding. Needs padding_free.")
    ref_adapter: str = option("", "Adapter folder that is the reference. Empty: the policy as it starts.")
    precompute_ref_log_probs: bool = option(
        False, "Compute the reference's log-probs once, before training, and keep them on disk for other runs."
    )


@dataclass(frozen=True, kw_only=True)
class PPOConfig(JudgeConfig, TrainConfig):
    """Proximal policy optimization from `prompt` rows: the policy answers, rewards judge, the policy learns.

    A step is one iteration: batch_size responses are sampled and scored, then learned from num_ppo_epochs times.
    """

    normalize_reward: bool = option(
        False, "Shift and scale scores so that the starting policy's answers have mean 0 and standard deviation 1."
    )
    constraint_model_path: str = option("", "Cost of each answer: what reward_model_path may be.")
    constraint_label: str = option("", "Which label of that is the cost, if it is a classifier with several.")
    constraint_funcs: list[str] = option([], "Cost of each answer: as reward_funcs; all costs are added up.")
    constraint_threshold: float = option(0.0, "An answer that costs more violates the constraint.")
    constraint_mode: ConstraintMode = option(
        "skip", "skip: an answer that violates the constraint gives no gradient. lagrangian: its cost is taken from "
        "the score, times a multiplier that is learned so that the mean cost comes to the threshold.",
    )  # fmt: skip
    constraint_lambda: float = option(1.0, "The multiplier at the start of lagrangian.", least=0)
    constraint_lambda_lr: float = option(0.1, "How fast the multiplier follows the mean cost.", least=0)

    total_episodes: int = option(
        0, "Responses to sample in all; 0: num_train_epochs over the prompts. max_steps overrides both.", least=0
    )
    batch_size: int = option(
        0, "Responses in one iteration; 0: num_mini_batches minibatches of per_device_train_batch_size "
        "* gradient_accumulation_steps.", least=0,
    )  # fmt: skip
    num_mini_batches: int = option(
        4, "Minibatches, each an optimizer step, in an iteration; not used where batch_size is given.", least=1
    )
    num_ppo_epochs: int = option(4, "Passes over an iteration's responses.", least=1)
    num_generations: int = option(1, "Responses to each prompt; batch_size counts all of them.", least=1)
    response_length: int = option(64, "Longest response in tokens.", least=1)
    stop_token: list[str] = option([], "Text that ends a response, besides its end tokens; may be given several times.")
    temperature: float = option(1.0, "Divides the logits wherever the policy or the reference is asked.", least=0)
    per_device_eval_batch_size: int = option(
        16, "Sequences in one pass without gradients: old and reference log-probs, values, scores.", least=1
    )
    local_rollout_forward_batch_size: int = option(64, "Prompts sampled together, at most.", least=1)
    rollout_cache_gib: float = option(
        0.0, "Memory for the keys and values of prompts that are sampled together, in GiB; 0: no limit.", least=0
    )

    kl_coef: float = option(0.05, "Weight of the KL to the reference in each token's reward.", least=0)
    kl_estimator: KLEstimator = option("k1", "Estimate of that KL from the sampled token.")
    adap_kl_ctrl: bool = option(False, "Adapt kl_coef, so that objective/kl comes to adap_kl_target.")
    adap_kl_target: float = option(6.0, "The KL per response, in nats, that adap_kl_ctrl aims at.", least=0)
    adap_kl_horizon: int = option(10000, "Episodes over which adap_kl_ctrl adapts; smaller is faster.", least=1)
    target_kl: float = option(
        0.0, "End an iteration's passes when a minibatch's policy/approxkl exceeds this; 0: never.", least=0
    )

    advantage_estimator: Estimator = option(
        "gae", "gae and a2c use a critic; reinforce, rloo and grpo do not. rloo and grpo compare num_generations "
        "answers to a prompt. reinforce and a2c pass over an iteration's answers once and do not clip.",
    )  # fmt: skip
    critic: Critic = option("adapter", "adapter: the critic has weights of its own; shared: a head on the policy.")
    bootstrap_truncated: bool = option(
        False, "The return of an answer that was cut goes on with the critic's value instead of ending."
    )
    ref_adapter: str = option("", "Adapter folder that is the reference. Empty: the policy as it starts.")
    gamma: float = option(1.0, "Discount of later rewards, per token.", least=0)
    lam: float = option(0.95, "lambda of GAE: 1 is Monte-Carlo, 0 is one step ahead.", least=0)
    whiten_rewards: bool = option(
        False, "Scale the rewards of an iteration to standard deviation 1, keeping their mean."
    )
    cliprange: float = option(0.2, "The policy's ratio is clipped to 1 - cliprange .. 1 + cliprange.", least=0)
    cliprange_high: float = option(0.0, "Upper range where it differs from cliprange (DAPO's clip-higher).", least=0)
    dual_clip: float = option(0.0, "Bounds the loss of tokens with a negative advantage; above 1, 0: off.", least=0)
    cliprange_value: float = option(0.2, "Values move at most this far from the old ones; 0: not clipped.", least=0)
    vf_coef: float = option(0.1, "Weight of the value loss.", least=0)
    entropy_coef: float = option(0.0, "Weight of the entropy bonus.", least=0)
    value_init: ValueInit = option("reward", "Critic starts as the reward model (where there is one), or at zero.")


@dataclass(frozen=True, kw_only=True)
class SampledConfig(ModelConfig):
    """How answers are drawn that a person reads."""

    max_new_tokens: int = option(128, "Longest response in tokens.", least=1)
    temperature: float = option(1.0, "Divides the logits; 0: the likeliest token each time.", least=0)
    top_p: float = option(1.0, "Sample from the smallest set of tokens with this much probability.", least=0)
    top_k: int = option(0, "Sample from this many likeliest tokens; 0: all.", least=0)
    seed: int = option(42, "Seed of the sampling.")


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(SampledConfig):
    """Responses to prompts, sampled from the model itself."""

    prompt: list[str] = option([], "A prompt; may be given several times.")
    dataset: str = option("", "Rows with a `prompt` column, instead of --prompt.")
    dataset_split: str = option("test", "Split to use when dataset is a folder or a hub dataset.")
    output: str = option("", "Write JSONL rows `prompt, completion` here. Empty: print them.")
    overwrite: bool = option(False, "Replace a file that output names.")
    num_generations: int = option(1, "Responses to each prompt.", least=1)
    batch_size: int = option(16, "Prompts generated together.", least=1)


@dataclass(frozen=True, kw_only=True)
class ChatConfig(SampledConfig):
    """A conversation with a model or an adapter, in the terminal."""

    system: str = option("", "Message that a chat opens with, before the first of yours.")
    max_new_tokens: int = option(256, "Longest answer in tokens.", least=1)
    temperature: float = option(0.7, "Divides the logits; 0: the likeliest token each time.", least=0)


@dataclass(frozen=True, kw_only=True)
class MergeConfig(ModelConfig):
    """An adapter and its base as one plain Hugging Face model."""

    output_dir: str = option("", "Folder of the merged model; it must not exist, or be empty.")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(JudgeConfig, ModelConfig):
    """How good a policy's answers are: rewards, win rate over a baseline, KL to the reference, length, variety."""

    dataset: str = option("", "Rows with a `prompt` column; perplexity is of `completion` or `chosen`.")
    dataset_split: str = option("test", "Split to use when dataset is a folder or a hub dataset.")
    baseline: str = option("", "Another model, run or adapter on the same base, whose answers are compared.")
    ref_adapter: str = option("", "Adapter that KL is measured to. Empty: the base.")
    output_dir: str = option("", "Folder of evaluation.json, evaluation.md and samples.jsonl. Empty: only print.")
    max_prompts: int = option(128, "Prompts to use, from the first on; 0: all.", least=0)
    max_length: int = option(1024, "Longest sequence in tokens, prompt and response together.", least=2)
    response_length: int = option(64, "Longest response in tokens.", least=1)
    temperature: float = option(1.0, "Divides the logits wherever a policy is asked.", least=0)
    per_device_eval_batch_size: int = option(16, "Sequences in one pass without gradients.", least=1)
    local_rollout_forward_batch_size: int = option(64, "Prompts sampled together.", least=1)
    seed: int = option(42, "Seed of the sampling.")


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """Whether a training run fits on a card, and which settings make it fit: planned without weights and without a GPU.

    Beside these it takes every setting of the command that it plans, and that command's config.yaml as --config.
    """

    algorithm: Algorithm = option("ppo", "The command that is planned: sft, reward, dpo or ppo.")
    card: str = option("", "Memory of the card, such as 12GB, or a card's name, such as 'RTX 3060'. Empty: only plan.")
    device: Target = option("cuda", "What the run is planned for. cpu: for comparison with what a CPU run allocates.")
    prompt_length: int = option(0, "Tokens of a prompt; 0: what max_length leaves beside the response.", least=0)
    response_length: int = option(0, "Tokens of a response; 0: half of max_length. In ppo its own setting.", least=0)
    json: bool = option(False, "Print the answer as JSON.")


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """The main job with nothing to download: a tiny model, from its first step to PPO."""

    output_dir: str = option("runs/demo", "Folder of the demo's runs and its report.html.")
    seed: int = option(4, "Seed of the corpus, the data order and every new weight.")
    fresh: bool = option(False, "Start over. Otherwise finished stages are taken from output_dir.")
