"""The table of benchmarks, in the order of a run: what the library stands for comes first."""

from benchmarks.harness import Benchmark
from benchmarks.suite import gae, linear_dpo, linear_kl, linear_logprobs, linear_ppo, selective, tokens

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        linear_logprobs.BENCHMARK,
        linear_ppo.BENCHMARK,
        selective.BENCHMARK,
        tokens.PPO_LOSS,
        tokens.VALUE_LOSS,
        gae.BENCHMARK,
        linear_dpo.BENCHMARK,
        linear_kl.BENCHMARK,
    )
}
