"""What training holds, cut over ranks by DeepSpeed (ZeRO, arXiv:1910.02054): the gradients and the optimizer's state in
stage 2, the weights too in stage 3.

    require("zero2")                                     # before anything else: is DeepSpeed installed?
    zero = Zero(model, loss, optimizer, …)               # the optimizer over the model's weights from now on
    zero.backward(zero.loss(batch)["loss"], last=True)   # once a micro-batch
    zero.step()                                          # clips and updates; `zero.norm` was the gradient's norm

DeepSpeed's engine takes over an optimizer's step, its clipping and the adding up of gradients. Checkpoints do not know
it: `Zero.state_dict` is the state of the optimizer that was handed in, whole, as if nothing were cut.
"""

import importlib.util
import os
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from stages.errors import UserError
from stages.objectives import Batch, LossSums
from stages.train.sharding import Loss

STAGES: Mapping[str, int] = {"zero2": 2, "zero3": 3}
"""DeepSpeed's stage of each way to shard."""
BUCKET = 2**24
"""Numbers of gradient that are summed over ranks at once."""


def require(shard: str) -> None:
    """Raise UserError when DeepSpeed is asked for and not installed. Imports nothing heavy."""
    if shard in STAGES and importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            f"the runtime's shard is {shard}, which needs DeepSpeed: pip install 'regrow[deepspeed]', or set shard to "
            "fsdp"
        )


class Zero(torch.optim.Optimizer):
    """An elementwise optimizer over a model's trained weights, whose state DeepSpeed cuts over all ranks.

    All ranks call everything together. `param_groups` are those of the optimizer that was handed in.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        loss: LossSums,
        optimizer: torch.optim.Optimizer,
        stage: int,
        ranks: int,
        device: str,
        longest: float,
        example: Batch,
    ) -> None:
        """Cut `model` in place, and scale gradients down to the norm `longest` where they are longer. The model may
        still be on the CPU. `example` is any batch that the loss takes, on the device."""
        super().__init__([{**group, "params": list(group["params"])} for group in optimizer.param_groups], {})
        self._inner, self._stage, self._example = optimizer, stage, example
        self._engine = _engine(Loss(model, loss, ranks), optimizer, stage, device, longest)
        self._due = False
        self.norm = torch.zeros((), device=device)
        """Of the step's whole gradient, before it was clipped; known when the step is done."""

    def loss(self, batch: Batch) -> Any:
        """The objective's sums, the loss times the ranks (see `stages.train.sharding.Loss`)."""
        return self._engine(batch)

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Add a micro-batch's gradients; `last` says whether the step's others were added already."""
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss)
        self._due = last

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every weight by the gradients since the last step; nothing if there were none."""
        self.norm = torch.zeros_like(self.norm)
        if not self._due:
            return
        for own, theirs in zip(self.param_groups, self._inner.param_groups, strict=True):
            theirs["lr"] = own["lr"]
        self._engine.step()
        self._due = False
        self.norm += self._engine.get_global_grad_norm()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing to do: a step drops its gradients."""

    def state_dict(self, keep: bool = True) -> dict[str, Any]:
        """The optimizer's state, whole and in the CPU's memory; tensors are empty if not to `keep`."""
        from deepspeed.utils import safe_get_full_optimizer_state

        described: dict[str, Any] = super().state_dict()
        held: dict[str, Any] = next(iter(self._inner.state.values()), {})
        self._link()
        for number, parameter in enumerate(self._parameters()) if held else ():
            state = described["state"][number] = {}
            for name, like in held.items():
                if not _is_cut(like):
                    state[name] = like.cpu().clone() if isinstance(like, torch.Tensor) else like
                    continue
                whole = safe_get_full_optimizer_state(parameter, name)
                state[name] = whole.to("cpu", like.dtype) if keep else torch.empty(0)
        return described

    def load_state_dict(self, state_dict: Any) -> None:
        """Put in the state that some optimizer of the kind that was handed in had, cut or whole."""
        from deepspeed.utils import safe_set_full_optimizer_state

        super().load_state_dict({**state_dict, "state": {}})
        if not (saved := state_dict["state"]):
            return
        self._make_state()
        for number, parameter in enumerate(self._parameters()):
            for name, value in saved.get(number, {}).items():
                if _is_cut(value):
                    safe_set_full_optimizer_state(parameter, value.to(self.norm.device, torch.float32), name)
        for held in self._inner.state.values():
            for name, value in held.items():
                if not _is_cut(value):  # counts of steps, which a part of several weights shares
                    most = max(float(state[name]) for state in saved.values())
                    held[name] = torch.full_like(value, most) if isinstance(value, torch.Tensor) else type(value)(most)

    def _make_state(self) -> None:
        """Have the optimizer make its state: by a step without gradients, at a learning rate of zero."""
        self._engine.set_gradient_accumulation_boundary(True)
        self._engine.backward(self.loss(self._example)["loss"] * 0.0)
        for group in self._inner.param_groups:
            group["lr"] = 0.0
        self._engine.step()
        self._link()

    def _link(self) -> None:
        """Tell weights where their state is. In stage 2 the engine does so once the first group has been updated, when
        the others have no state yet."""
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        for own, theirs in zip(self.param_groups, self._inner.param_groups, strict=True):
            if self._stage == 2 and self._inner.state:
                lazy_init_hp_params_optimizer_state(own["params"], theirs["params"][0], self._inner.state)

    def _parameters(self) -> Iterator[torch.nn.Parameter]:
        for group in self.param_groups:
            yield from group["params"]


def whole(parameter: torch.Tensor) -> torch.Tensor:
    """A weight that stage 3 has cut, whole. All ranks call it."""
    from deepspeed.utils import safe_get_full_fp32_param

    found: torch.Tensor = safe_get_full_fp32_param(parameter)
    return found


def _is_cut(value: Any) -> bool:
    """Whether some state is one number a weight, and not one for all of them."""
    return isinstance(value, torch.Tensor) and value.dim() > 0


def _engine(module: Loss, optimizer: torch.optim.Optimizer, stage: int, device: str, longest: float) -> Any:
    import deepspeed

    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)  # its own calls
    deepspeed.utils.logger.setLevel("ERROR")
    # Its collectives through shared memory, which it would compile first: gloo's do.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    vectors = max((p.numel() for p in module.parameters() if p.dim() < 2), default=0)
    config = {
        "train_micro_batch_size_per_gpu": 1,  # of the caller's batches, whatever they hold
        "gradient_clipping": longest,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": BUCKET,
            # Norms and biases stay whole on every rank: they are small, and each would be one more message.
            "stage3_param_persistence_threshold": vectors + 1,
        },
    }
    # Which of the machine's devices this rank has: the only one it sees. It is asked for in every step. Others take it
    # for a launcher's sign, but only while they set up, which is done.
    os.environ["LOCAL_RANK"] = "0"
    if stage == 3:  # weight by weight, so that no device ever holds all
        deepspeed.zero.Init(module=module, config_dict_or_path=config)
        for buffer in module.buffers():
            buffer.data = buffer.data.to(device)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
    return engine
