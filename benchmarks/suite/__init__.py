"""The table of benchmarks, in the order of a run: what the library stands for comes first."""

from benchmarks.harness import Benchmark
from benchmarks.suite import linear_kl, linear_logprobs, linear_losses, selective, tokens

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        linear_logprobs.BENCHMARK,
        linear_losses.PPO,
        selective.BENCHMARK,
        tokens.PPO_LOSS,
        tokens.VALUE_LOSS,
        tokens.GAE_BENCHMARK,
        linear_losses.DPO,
        linear_kl.BENCHMARK,
    )
}
