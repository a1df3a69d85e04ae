"""The command line: `onecard sft | reward | dpo | ppo | generate | chat | evaluate | merge | fit | demo`.

Each command's flags are the fields of its config dataclass. Torch is imported only when a command runs, so `--help` is
fast.
"""

from __future__ import annotations

import importlib
import io
import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import click
import yaml

from onecard import __version__, config
from onecard.utils import threads
from onecard.utils.errors import Interrupted, OnecardError, did_you_mean, escape_controls, is_out_of_memory

MAX_DEPTH = 8  # nesting of lists and mappings in a --config file
# command -> (config class, module:function that runs it, example shown under --help)
COMMANDS: dict[str, tuple[type, str, str]] = {
    "sft": (
        config.SFTConfig,
        "onecard.algorithms.sft:run",
        "onecard sft --model Qwen/Qwen2.5-0.5B --dataset stories.jsonl --output_dir runs/sft",
    ),
    "reward": (
        config.RewardConfig,
        "onecard.algorithms.reward:run",
        "onecard reward --model Qwen/Qwen2.5-0.5B --dataset pairs.jsonl --output_dir runs/reward",
    ),
    "dpo": (
        config.DPOConfig,
        "onecard.algorithms.dpo:run",
        "onecard dpo --model Qwen/Qwen2.5-0.5B-Instruct --dataset trl-lib/ultrafeedback_binarized --load_in_4bit",
    ),
    "ppo": (
        config.PPOConfig,
        "onecard.algorithms.ppo.command:run",
        "onecard ppo --model runs/sft/policy --dataset prompts.jsonl --reward_model_path runs/reward/reward",
    ),
    "generate": (
        config.GenerateConfig,
        "onecard.commands.generate:run",
        "onecard generate --model runs/dpo/policy --prompt 'Once upon a time'",
    ),
    "chat": (config.ChatConfig, "onecard.commands.chat:run", "onecard chat --model runs/dpo"),
    "evaluate": (
        config.EvaluateConfig,
        "onecard.commands.evaluate:run",
        "onecard evaluate --model runs/ppo --baseline runs/sft --dataset prompts.jsonl --reward_model_path runs/reward",
    ),
    "merge": (config.MergeConfig, "onecard.commands.merge:run", "onecard merge --model runs/dpo --output_dir merged"),
    "fit": (
        config.FitConfig,
        "onecard.commands.fit.command:run",
        "onecard fit --model Llama-3.1-8B --algorithm ppo --load_in_4bit --gradient_checkpointing --card 12GB",
    ),
    "demo": (config.DemoConfig, "onecard.commands.demo.flow:run", "onecard demo"),
}


LARGEST_FLOAT = 1e30  # largest absolute value of a float setting: leaves room for products in float32


class FiniteFloat(click.FloatRange):
    """A finite float. click's own range check accepts nan, which compares false with every bound."""

    name = "float"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            number = super().convert(value, param, ctx)
        except OverflowError:  # an integer of hundreds of digits
            number = math.inf
        if isinstance(value, bool) or not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        if abs(number) > LARGEST_FLOAT:
            self.fail(f"{number:g}, expected an absolute value of at most {LARGEST_FLOAT:g}.", param, ctx)
        return number

    def _describe_range(self) -> str:
        return "" if self.min is None else super()._describe_range()  # else click writes "x<=None"


class Integer(click.IntRange):
    """An integer that fits into 64 bits, signed or unsigned: torch accepts no other as a seed."""

    name = "integer"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, bool | float):  # a value in a file; click would convert True and 1.7 to 1
            self.fail(f"{value!r} is not a valid integer.", param, ctx)
        number = super().convert(value, param, ctx)
        if not -(2**63) <= number < 2**64:
            self.fail(f"{number} does not fit into 64 bits.", param, ctx)
        return number

    def _describe_range(self) -> str:
        return "" if self.min is None else super()._describe_range()


SCALARS: dict[Any, click.ParamType] = {str: click.STRING, int: Integer(), float: FiniteFloat()}
RANGES: dict[Any, Callable[..., click.ParamType]] = {int: Integer, float: FiniteFloat}


def field_option(item: Field[Any], hint: Any) -> click.Option:
    """One dataclass field as one click option."""
    default = item.default if item.default_factory is MISSING else item.default_factory()
    flag, least = f"--{item.name}", item.metadata["least"]
    common: dict[str, Any] = {
        "default": default,
        "help": item.metadata["help"],
        "show_default": default not in ("", []),
    }
    if hint is bool:
        return click.Option([f"{flag}/--no_{item.name}", item.name], **common)
    if get_origin(hint) is Literal:
        return click.Option([flag, item.name], type=click.Choice(get_args(hint)), **common)
    if get_origin(hint) is list:
        return click.Option([flag, item.name], type=SCALARS[get_args(hint)[0]], multiple=True, **common)
    kind = SCALARS[hint] if least is None else RANGES[hint](min=least)
    return click.Option([flag, item.name], type=kind, **common)


def check_yaml(text: str, path: str) -> None:
    """Raise for YAML aliases, with which a few lines can expand to gigabytes, and for deep nesting."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise OnecardError(f"--config: {path} has a YAML alias (*{event.anchor}), expected the value itself.")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise OnecardError(
                f"--config: {path} has more than {MAX_DEPTH} levels of nesting, expected `key: value` lines."
            )


def check_trust_remote_code(context: click.Context) -> None:
    """Raise if only a file sets `trust_remote_code`: the file may come from the model's author."""
    source = context.get_parameter_source("trust_remote_code")
    if context.params.get("trust_remote_code") and source is click.core.ParameterSource.DEFAULT_MAP:
        raise OnecardError(
            "--config turns on trust_remote_code, which runs code that comes with the model. To allow it, give "
            "--trust_remote_code on the command line too."
        )


def read_mapping(path: str) -> dict[Any, Any]:
    """The mapping in a YAML file; empty for an empty file."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        check_yaml(text, path)
        values = yaml.safe_load(text)
    except OSError as error:
        raise OnecardError(f"--config: cannot read {path}: {error.strerror}.") from None
    except (ValueError, yaml.YAMLError) as error:  # ValueError: an impossible date, or bytes that are not UTF-8
        raise OnecardError(f"--config: {path} is not YAML: {error}") from None
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise OnecardError(f"--config: {path} is a {type(values).__name__}, expected `key: value` lines.")
    return values


def load_config_file(context: click.Context, parameter: click.Parameter, path: str | None) -> None:
    """Make the values in a file the defaults of this command. Flags override them."""
    if path is None:
        return
    options = (item for item in context.command.params if isinstance(item, click.Option))
    known = {option.name: option for option in options if option.name and option.name != "config"}
    values = read_mapping(path)
    for key in values:
        if key not in known:
            raise OnecardError(f"--config: {path} has an unknown key '{key}'.{did_you_mean(str(key), known)}")
    for name, value in values.items():
        option = known[name]
        if any(part is None or isinstance(part, dict) for part in (value if isinstance(value, list) else [value])):
            raise OnecardError(
                f"--config: {path}: {name} is null or a mapping, expected a value or a list of values. Remove the line "
                "for the default."
            )
        if option.multiple and not isinstance(value, list):
            values[name] = [value]
        if option.is_flag and not isinstance(value, bool):
            raise OnecardError(f"--config: {path}: {name}: {value!r}, expected true or false.")
        try:  # the message of click does not name the file
            option.type_cast_value(context, values[name])
        except click.BadParameter as error:
            raise OnecardError(f"--config: {path}: {name}: {error.format_message()}") from None
        except (TypeError, ValueError):
            raise OnecardError(f"--config: {path}: {name}: {value!r}, expected {option.type.name}.") from None
    context.default_map = values


def options_of(settings: type) -> list[click.Parameter]:
    """A click option for each field of `settings`."""
    hints = get_type_hints(settings)
    return [field_option(item, hints[item.name]) for item in fields(settings)]


def config_option() -> click.Parameter:
    """The `--config` option: a YAML file with any of the command's settings."""
    return click.Option(
        ["--config"],
        type=click.Path(),
        is_eager=True,
        expose_value=False,
        callback=load_config_file,
        help="YAML file with any of these settings.",
    )


def build_config(settings: type, values: dict[str, Any]) -> Any:
    """An instance of the config class `settings` from click's parsed values; values of other fields are ignored."""
    names = {item.name for item in fields(settings)}
    own = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items() if key in names}
    return settings(**own)


def command_of_run(config_path: str) -> str:
    """The command of the run whose folder has this config.yaml; an empty string for other files."""
    try:
        return str(json.loads(Path(config_path).with_name("run.json").read_text(encoding="utf-8"))["command"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


class FitCommand(click.Command):
    """`onecard fit`. It takes its own flags and those of the planned command; `--help` shows only its own."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not {"-h", "--help"}.intersection(args):
            algorithm = self.find_algorithm(args)
            planned_flags = {param.name: param for param in options_of(COMMANDS[algorithm][0])}
            # If both have a flag (ppo has a response_length too), the planned command's is used.
            own_flags = [planned_flags.pop(param.name, param) for param in self.params]
            self.params = [*own_flags, *planned_flags.values()]
            next(param for param in own_flags if param.name == "algorithm").default = algorithm
        return super().parse_args(ctx, args)

    def find_algorithm(self, args: list[str]) -> str:
        """The algorithm of `--algorithm`, else of `--config`, else the default. click reports unknown values."""
        words = [word.partition("=") for word in args]
        for flag in ("--algorithm", "--config"):
            for position, (name, equals, value) in enumerate(words):
                if name != flag:
                    continue
                given = value if equals else args[position + 1] if position + 1 < len(args) else ""
                algorithm = given
                if flag == "--config":
                    algorithm = str(read_mapping(given).get("algorithm", "")) or command_of_run(given)
                if algorithm in get_args(config.Algorithm):
                    return algorithm
        return config.FitConfig.algorithm


def make_command(name: str, settings: type, target: str, example: str) -> click.Command:
    """A click command with an option for each field of `settings`. Parsing returns a function that runs the command."""
    params = [config_option(), *options_of(settings)]
    command_class = FitCommand if settings is config.FitConfig else click.Command

    def parse(**values: Any) -> Callable[[], object]:
        check_trust_remote_code(click.get_current_context())
        module, function = target.split(":")
        run: Callable[..., object] = getattr(importlib.import_module(module), function)
        if settings is config.FitConfig:
            return partial(run, build_config(settings, values), build_config(COMMANDS[values["algorithm"]][0], values))
        return partial(run, build_config(settings, values))

    summary = (settings.__doc__ or "").strip()
    return command_class(name, params=params, callback=parse, help=f"{summary}\n\n\b\nExample:\n  {example}")


class Commands(click.Group):
    """The commands in the order of `COMMANDS`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


def make_cli() -> click.Group:
    """All commands. `--learning-rate` is accepted as `--learning_rate`."""
    settings = {
        "help_option_names": ["-h", "--help"],
        "max_content_width": 120,
        "token_normalize_func": lambda token: token.replace("-", "_"),
    }
    group = Commands(
        "onecard",
        context_settings=settings,
        help="SFT, reward models, DPO and PPO for language models on one GPU. Start with: onecard demo",
    )
    for name, (config_class, target, example) in COMMANDS.items():
        group.add_command(make_command(name, config_class, target, example))
    return click.version_option(__version__, prog_name="onecard")(group)


def fail(message: str) -> int:
    """Print an error on one line of standard error. Returns 2, the exit code of errors that the user can fix."""
    click.echo(escape_controls(f"onecard: error: {message}", keep=""), err=True)
    return 2


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `onecard` command."""
    threads.configure()
    if isinstance(sys.stdout, io.TextIOWrapper):  # as on standard error, escape characters that its encoding lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    if not sys.stderr.isatty():  # no progress bars of model loading in log files
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # These warnings concern other libraries' code, not the user's settings.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers|peft")
    code = 0
    try:
        run = make_cli().main(args=arguments, prog_name="onecard", standalone_mode=False)
        if callable(run):  # else the exit code of --help or --version
            run()
    except OnecardError as error:
        code = fail(str(error))
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        code = 2
    except click.ClickException as error:
        command = f"{error.ctx.command_path}: " if isinstance(error, click.UsageError) and error.ctx else ""
        code = fail(f"{command}{' '.join(error.format_message().split())}")
    except BrokenPipeError:  # `onecard ... | head`: the reader has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:  # a full disk, a folder without write permission: the message names the file
        code = fail(" ".join(str(error).split()))
    except Interrupted as error:
        click.echo(escape_controls(f"onecard: {error}"), err=True)
        code = 130
    except (click.Abort, EOFError, KeyboardInterrupt):
        click.echo(
            "onecard: interrupted. To continue a training run from its last checkpoint, add --resume to the command.",
            err=True,
        )
        code = 130
    except RuntimeError as error:  # click.Abort, caught above, is a RuntimeError too
        if not is_out_of_memory(error):
            raise
        code = fail(  # out-of-memory errors in forward and backward passes are retried with smaller batches
            "out of memory while loading weights or in the optimizer step, where a smaller batch does not help. Try "
            "--load_in_4bit, --optim paged_adamw_8bit, a smaller --lora_r or a smaller model. `onecard fit` plans the "
            "memory of a run before it starts. A training run with changed settings cannot be resumed."
        )
    sys.exit(code)
