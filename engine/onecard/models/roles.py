"""One base plays several parts: policy, reference, value, reward. A role is an adapter on the base, or the base alone.

| role      | weights                                                                       |
|-----------|-------------------------------------------------------------------------------|
| policy    | base + LoRA adapter `policy` (or the base itself when all weights are trained)  |
| reference | adapters off; or a frozen copy of the adapter or the base that training began from |
| value     | base + LoRA adapter `value` (or the policy's) + a scalar head: PPO's critic     |
| reward    | base + LoRA adapter `reward` + a scalar head                                  |
| constraint | the same with adapter `constraint`: what answers cost                        |
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
from onecard.models.attention import structural_layout, use_plain_attention
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

    Exactly one role is active at a time: `current`, the first of `trained`, except inside `with roles.playing(other)`.
    Switching freezes none of the trained roles, and a backward pass recomputes each layer under the role that ran it.
    """

    def __init__(self, model: Any, trained: Sequence[str], adapters: dict[str, str | None], layout: str) -> None:
        super().__init__()
        self.model = model
        self.trained = tuple(trained)
        self.adapters = adapters
        self.layout = structural_layout(model.get_base_model() if self.has_adapters else model, layout)
        self.decoding = ""  # a name of `rollout.make_decode_batch`; empty: what the model's structure allows
        self.heads = nn.ModuleDict()
        self.copies = nn.ModuleDict()  # role -> a whole frozen model; only where all weights are trained
        self.offloader: Offloader | None = None
        self.trained_in_evaluation_mode = False  # a model that draws noise in training mode which no setting turns off
        self.left_out: tuple[str, ...] = ()  # layers that new adapters are not on, in words
        self.current = ""
        self.activate(self.trained[0])

    @property
    def has_adapters(self) -> bool:
        return hasattr(self.model, "peft_config")

    def has_own_weights(self, role: str) -> bool:
        """Whether a role is more than a head on the trunk of the first trained one."""
        first = self.trained[0]
        return role == first or self.adapters[role] != self.adapters[first]

    def rank(self, role: str) -> int:
        """The rank of a role's adapter."""
        return self.model.peft_config[self.adapters[role]].r

    def adapted_layers(self, role: str) -> int:
        """How many layers a role's adapter is on."""
        name = self.adapters[role]
        return sum(name in getattr(module, "lora_A", ()) or name in getattr(module, "lora_embedding_A", ())
                   for module in self.model.modules())  # fmt: skip

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    def activate(self, role: str) -> None:
        """Switch adapters, and leave what is trained trainable.

        PEFT's own switch freezes every adapter but the active one, so a loss of a trained role recorded before the
        switch would silently give no gradient at all.
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
        """`with roles.playing("reference"): ...`, then back to the role before."""
        before = self.current
        self.activate(role)
        try:
            yield
        finally:
            self.activate(before)

    def train(self, mode: bool = True) -> Roles:
        """PyTorch's; of a model that is trained in evaluation mode, the checkpointed layers alone: they would keep all
        activations without it.
        """
        super().train(mode)
        if mode and self.trained_in_evaluation_mode:
            for module in self.model.modules():
                module.training = getattr(module, "gradient_checkpointing", False)
        return self

    def checkpoint_activations(self) -> None:
        """Keep one activation per layer, and recompute the rest in the backward, under the role that it was run in.

        Without the second half, whichever adapter is active when the backward comes would do the recomputing.
        """

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return nullcontext(), self.active(self.current)

        base = self.model.get_base_model() if self.has_adapters else self.model
        try:
            base.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False, "context_fn": contexts}
            )
        except ValueError as error:  # of models without it
            raise OnecardError(f"gradient_checkpointing: {reason(error)}") from error

    def offload_activations(self, least_bytes: int = LEAST_BYTES) -> None:
        """Hold what the trunk's backward needs in host memory, storages below `least_bytes` excepted."""
        self.offloader = Offloader(self, self.device, least_bytes)

    def offloading(self) -> AbstractContextManager[None]:
        """Around the trunk's forward, whatever the role; nothing to do where no backward follows."""
        return self.offloader.hooks() if self.offloader is not None and torch.is_grad_enabled() else nullcontext()

    def cast_adapters(self, dtype: torch.dtype) -> None:
        """Hold every adapter's weights in `dtype`, those of frozen roles too.

        PEFT holds them in float32 whatever the base is, and then casts the input of each adapted layer to float32, a
        copy that the backward needs. In the base's own dtype there is nothing to cast.
        """
        prefix = self.model.base_model.prefix
        for name, parameter in self.model.named_parameters():
            if prefix in name:
                parameter.data = parameter.data.to(dtype)

    def causal_model(self) -> Any:
        """The Hugging Face model of the current role, adapters injected."""
        if self.current in self.copies:
            return self.copies[self.current]
        return self.model.get_base_model() if self.has_adapters else self.model

    def use_plain_attention(self) -> None:
        """Give every model of the run back the attention that transformers chose for it."""
        for model in (self.model.get_base_model() if self.has_adapters else self.model, *self.copies.values()):
            use_plain_attention(model)

    def head(self) -> LanguageHead:
        """The current role's language model head."""
        return read_head(self.causal_model())

    def hidden(self, batch: TokenBatch, rows: Tensor) -> Tensor:
        """Hidden states [r, D] of the current role at flat `rows`."""
        trunk = trunk_of(self.causal_model())
        limit = rotation_limit(trunk.config)
        alone = limit is not None and batch.longest > limit
        layout = LAYOUTS["single" if alone else self.layout](batch)
        with self.offloading():
            states = [trunk(**inputs).last_hidden_state.flatten(0, 1) for inputs in layout.passes]
        whole = states[0] if len(states) == 1 else torch.cat(states)
        return whole.index_select(0, layout.places[rows])

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
        """The current role's scalar head at flat `rows`: fp32 [r]."""
        return self.scalars_of(self.hidden(batch, rows), self.current)

    def scalars_of(self, hidden: Tensor, role: str) -> Tensor:
        """A role's scalar head on hidden states [r, D]: fp32 [r]."""
        scalars: Tensor = self.heads[role](hidden.float()).squeeze(-1)
        return scalars

    def scores(self, batch: TokenBatch) -> Tensor:
        """The current role's scores, read by its scalar head on each sequence's last token: fp32 [S]."""
        return self.scalar_head(self.current).scores(self.scalars(batch, last_rows(batch)))

    def scalar_head(self, role: str) -> ScalarHead:
        """The scalar head of a role that has one."""
        return cast(ScalarHead, self.heads[role])

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Every parameter that the optimizer changes, by name."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def write(self, role: str, folder: Path) -> None:
        """Write a role's weights into `folder`: a PEFT adapter or all weights, and its scalar head.

        Of a role on another's trunk that is the head alone.
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
        """Read back what `save` wrote, bit for bit."""
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
        """Write a role so that PEFT or transformers loads `folder` as it is, tokenizer included."""
        self.write(role, folder)
        if not self.has_adapters:
            (folder / MODEL_WEIGHTS).unlink()  # transformers writes its own, with its config, in its own layout
            save_plain_model(self.model, folder)
        tokenizer.save_pretrained(str(folder))
