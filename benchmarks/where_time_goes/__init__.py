"""Where the time of a PPO iteration goes. `python -m benchmarks.where_time_goes --help`."""
