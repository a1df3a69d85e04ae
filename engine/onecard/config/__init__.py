"""The settings of all commands, each documented at its declaration. One file per command, with its `validate()`."""

from onecard.config.base import (
    AdapterDtype,
    Dtype,
    ModelConfig,
    Optim,
    PolicyTrainConfig,
    ReferenceConfig,
    SamplingConfig,
    Scheduler,
    ScoringConfig,
    TrainConfig,
    Truncation,
)
from onecard.config.chat import ChatConfig
from onecard.config.demo import DemoConfig
from onecard.config.dpo import Divergence, DPOConfig
from onecard.config.evaluate import EvaluateConfig
from onecard.config.fit import Algorithm, FitConfig, Target
from onecard.config.generate import GenerateConfig
from onecard.config.merge import MergeConfig
from onecard.config.ppo import ConstraintMode, Critic, Estimator, KLEstimator, PPOConfig, ValueInit
from onecard.config.reward import Activation, RewardConfig
from onecard.config.sft import SFTConfig

__all__ = [
    "Activation",
    "AdapterDtype",
    "Algorithm",
    "ChatConfig",
    "ConstraintMode",
    "Critic",
    "DPOConfig",
    "DemoConfig",
    "Divergence",
    "Dtype",
    "Estimator",
    "EvaluateConfig",
    "FitConfig",
    "GenerateConfig",
    "KLEstimator",
    "MergeConfig",
    "ModelConfig",
    "Optim",
    "PPOConfig",
    "PolicyTrainConfig",
    "ReferenceConfig",
    "RewardConfig",
    "SFTConfig",
    "SamplingConfig",
    "Scheduler",
    "ScoringConfig",
    "Target",
    "TrainConfig",
    "Truncation",
    "ValueInit",
]
