"""The roles of a run on one base: policy, reference, value, reward. A role is an adapter on the base, or the base.

| role      | weights                                                                       |
|-----------|-------------------------------------------------------------------------------|
| policy    | base + LoRA adapter `policy` (or the base itself when all weights are trained)  |
| reference | the base (adapters off), or a frozen copy of the adapter or model that training starts from |
| value     | base + LoRA adapter `value` (or the policy's) + a scalar head: PPO's critic     |
| reward    | base + LoRA adapter `reward` + a scalar head                                  |
| constraint | base + LoRA adapter `constraint` + a scalar head: the cost of a response      |
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, load_model, save_model
from torch import Tensor, nn

from onecard.data.batches import ResponseTargets, TokenBatch, last_rows
from onecard.models.adapters import ADAPTER_WEIGHTS, fill_adapter, write_adapter
from onecard.models.attention import structural_layout, use_transformers_attention
from onecard.models.head import LanguageHead, read_head
from onecard.models.layout import LAYOUTS
from onecard.models.load import save_model as save_plain_model
from onecard.models.offload import LEAST_BYTES, Offloader
from onecard.models.scalar import ScalarHead
from onecard.models.trunk import rotation_limit, trunk_of
from onecard.utils.errors import OnecardError, reason
from onecard_kernels import linear_logprobs

MODEL_WEIGHTS = "model.safetensors"
HEAD_WEIGHTS = "head.safetensors"


class Roles(nn.Module):
    """The weights of a run. `adapters[role]` is the name of its adapter, or None for the base with adapters off.

    One role is active at a time: `current`. It is the first of `trained`, except inside `with roles.active(other)`.
    Switching does not freeze trained roles, and a checkpointed layer is recomputed under the role of its forward.
    """

    def __init__(self, model: Any, trained: Sequence[str], adapters: dict[str, str | None], layout: str) -> None:
        super().__init__()
        self.model = model
        self.trained = tuple(trained)
        self.adapters = adapters
        self.layout = structural_layout(model.get_base_model() if self.has_adapters else model, layout)
        self.decoding = ""  # a mode of `rollout.make_decode_batch`; empty: chosen by the model's structure
        self.heads = nn.ModuleDict()
        self.copies = nn.ModuleDict()  # role -> a frozen copy of the whole model, where all weights are trained
        self.offloader: Offloader | None = None
        # for models with random noise in training mode that no setting of their config turns off
        self.trained_in_evaluation_mode = False
        self.left_out: tuple[str, ...] = ()  # descriptions of the layers that get no new adapter
        self.current = ""
        self.activate(self.trained[0])

    @property
    def has_adapters(self) -> bool:
        return hasattr(self.model, "peft_config")

    def has_own_weights(self, role: str) -> bool:
        """Whether a role is the first trained role or has another adapter; a critic on the policy's trunk has not."""
        first = self.trained[0]
        return role == first or self.adapters[role] != self.adapters[first]

    def rank(self, role: str) -> int:
        """The LoRA rank of a role's adapter."""
        return self.model.peft_config[self.adapters[role]].r

    def num_adapted_layers(self, role: str) -> int:
        """Number of layers that a role's adapter changes."""
        name = self.adapters[role]
        return sum(name in getattr(module, "lora_A", ()) or name in getattr(module, "lora_embedding_A", ())
                   for module in self.model.modules())  # fmt: skip

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    def activate(self, role: str) -> None:
        """Switch to a role's adapter; the adapters of all trained roles keep `requires_grad`.

        PEFT's `set_adapter` freezes every other adapter, so a backward of a loss that was computed under a trained role
        before the switch would give no gradient, without an error.
        """
        if role == self.current:
            return
        if self.has_adapters:
            adapter, tuner = self.adapters[role], self.model.base_model
            if adapter is None:
                tuner.disable_adapter_layers()
            else:
                tuner.enable_adapter_layers()
                tuner.set_adapter(adapter)
            trained = {self.adapters[name] for name in self.trained}
            for name in self.model.peft_config:
                self.model.set_requires_grad(name, name in trained)
        self.current = role

    @contextmanager
    def active(self, role: str) -> Iterator[None]:
        """`with roles.active("reference"): ...` switches to a role and back."""
        before = self.current
        self.activate(role)
        try:
            yield
        finally:
            self.activate(before)

    def train(self, mode: bool = True) -> Roles:
        """PyTorch's `train`. With `trained_in_evaluation_mode`, only checkpointed layers get training mode.

        They need it to checkpoint: in evaluation mode they would keep all activations.
        """
        super().train(mode)
        if mode and self.trained_in_evaluation_mode:
            for module in self.model.modules():
                module.training = getattr(module, "gradient_checkpointing", False)
        return self

    def checkpoint_activations(self) -> None:
        """Gradient checkpointing: keep one activation per layer and recompute the others in the backward.

        The recomputation runs under the role of the forward; otherwise it would use the adapter that is active when the
        backward runs.
        """

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return nullcontext(), self.active(self.current)

        base = self.model.get_base_model() if self.has_adapters else self.model
        try:
            base.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False, "context_fn": contexts}
            )
        except ValueError as error:  # models without gradient checkpointing
            raise OnecardError(f"gradient_checkpointing: {reason(error)}") from error

    def offload_activations(self, least_bytes: int = LEAST_BYTES) -> None:
        """Offload the trunk's saved activations to host memory, except storages smaller than `least_bytes`."""
        self.offloader = Offloader(self, self.device, least_bytes)

    def offloading(self) -> AbstractContextManager[None]:
        """Context of the trunk's forward. It does nothing without offloading or without gradients."""
        return self.offloader.hooks() if self.offloader is not None and torch.is_grad_enabled() else nullcontext()

    def cast_adapters(self, dtype: torch.dtype) -> None:
        """Cast the weights of all adapters to `dtype`, also those of frozen roles.

        PEFT creates them in float32 and casts the input of each adapted layer to float32, which the backward keeps.
        With adapters in the base's dtype there is no such copy.
        """
        prefix = self.model.base_model.prefix
        for name, parameter in self.model.named_parameters():
            if prefix in name:
                parameter.data = parameter.data.to(dtype)

    def causal_model(self) -> Any:
        """The Hugging Face model of the current role, with the adapters in its layers."""
        if self.current in self.copies:
            return self.copies[self.current]
        return self.model.get_base_model() if self.has_adapters else self.model

    def use_transformers_attention(self) -> None:
        """Set the attention implementation that transformers chose, for every model of the run."""
        for model in (self.model.get_base_model() if self.has_adapters else self.model, *self.copies.values()):
            use_transformers_attention(model)

    def head(self) -> LanguageHead:
        """The current role's language model head."""
        return read_head(self.causal_model())

    def hidden(self, batch: TokenBatch, rows: Tensor) -> Tensor:
        """Hidden states [r, D] of the current role at the flat rows `rows` [r]."""
        trunk = trunk_of(self.causal_model())
        limit = rotation_limit(trunk.config)
        single = limit is not None and batch.longest > limit
        layout = LAYOUTS["single" if single else self.layout](batch)
        with self.offloading():
            states = [trunk(**inputs).last_hidden_state.flatten(0, 1) for inputs in layout.passes]
        hidden = states[0] if len(states) == 1 else torch.cat(states)
        return hidden.index_select(0, layout.rows[rows])

    def logprobs(self, batch: TokenBatch, targets: ResponseTargets, temperature: float = 1.0) -> Tensor:
        """Log-probabilities [r] of the response tokens under the current role, fp32, nats."""
        head = self.head()
        return linear_logprobs(
            self.hidden(batch, targets.rows),
            head.weight,
            targets.targets,
            temperature=temperature,
            **head.keywords(),
        ).logprobs

    def scalars(self, batch: TokenBatch, rows: Tensor) -> Tensor:
        """Outputs of the current role's scalar head at the flat rows `rows` [r]: fp32 [r]."""
        return self.scalars_of(self.hidden(batch, rows), self.current)

    def scalars_of(self, hidden: Tensor, role: str) -> Tensor:
        """Outputs of a role's scalar head on hidden states [r, D]: fp32 [r]."""
        scalars: Tensor = self.heads[role](hidden.float()).squeeze(-1)
        return scalars

    def scores(self, batch: TokenBatch) -> Tensor:
        """The current role's scores: its scalar head at each sequence's last token, fp32 [S]."""
        return self.scalar_head(self.current).scores(self.scalars(batch, last_rows(batch)))

    def scalar_head(self, role: str) -> ScalarHead:
        """The scalar head of a role. A role without one raises KeyError."""
        return cast(ScalarHead, self.heads[role])

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Every parameter with `requires_grad`, by name."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def write(self, role: str, folder: Path) -> None:
        """Write a role's weights into `folder`: a PEFT adapter or all weights, and its scalar head.

        For a role without its own adapter (a critic on the policy's trunk), only the head is written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        if self.has_adapters and self.has_own_weights(role):
            write_adapter(self.model, str(self.adapters[role]), folder)
        elif not self.has_adapters:
            save_model(self.model, str(folder / MODEL_WEIGHTS))
        if role in self.heads:
            self.scalar_head(role).write(folder / HEAD_WEIGHTS)

    def save(self, folder: Path) -> None:
        """Write each trained role to `folder/<role>/`."""
        for role in self.trained:
            self.write(role, folder / role)

    def restore(self, folder: Path) -> None:
        """Load the weights that `save` wrote, bit for bit."""
        for role in self.trained:
            source = folder / role
            if self.has_adapters and self.has_own_weights(role):
                weights = load_file(str(source / ADAPTER_WEIGHTS))
                fill_adapter(self.model, str(self.adapters[role]), weights, f"checkpoint: adapter {source}")
            elif not self.has_adapters:
                load_model(self.model, str(source / MODEL_WEIGHTS))
            if role in self.heads:
                self.scalar_head(role).read(source / HEAD_WEIGHTS)

    def export(self, role: str, folder: Path, tokenizer: Any) -> None:
        """Write a role and the tokenizer such that PEFT or transformers loads `folder`."""
        self.write(role, folder)
        if not self.has_adapters:
            (folder / MODEL_WEIGHTS).unlink()  # transformers writes its own file, with its config
            save_plain_model(self.model, folder)
        tokenizer.save_pretrained(str(folder))
