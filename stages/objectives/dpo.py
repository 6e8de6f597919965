"""Direct preference optimization (arXiv:2305.18290) and losses that came after it.

With the log-ratios c and r of the chosen and the rejected answer (their log-probability under the model that trains,
minus that under the model before training), and d = c - r:

    sigmoid     -log s(beta d)                                    DPO, arXiv:2305.18290
    hinge       max(0, 1 - beta d)                                SLiC, arXiv:2305.10425
    ipo         (d a token - 1 / (2 beta))^2                      IPO, arXiv:2310.12036, each answer's ratio a token
    robust      DPO corrected for flipped labels                  arXiv:2403.00409
    exo_pair    reverse KL to the smoothed preference             EXO, arXiv:2402.00856
    nca_pair    -log s(beta c) - log s(-beta c)/2 - log s(-beta r)/2   NCA, arXiv:2402.05369
    sppo_hard   (c - 1/(2 beta))^2 + (r + 1/(2 beta))^2           SPPO, arXiv:2405.00675
    apo_zero    s(-beta c) + s(beta r)                            APO, arXiv:2408.06266
    apo_down    s(beta c) + s(-beta d)                            APO, arXiv:2408.06266
    discopop    a blend of -log s(beta d) and exp(-beta d)        DiscoPOP, arXiv:2406.08414
    sft         cross-entropy of the chosen answer a token        RPO's second term, arXiv:2404.19733

Several may be added up with weights: `loss: {sigmoid: 1.0, sft: 0.1}`. The mean is over the pairs of a step.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from stages.objectives import Batch, LossSums, Objective, Sums
from stages.stage import StageConfig

if TYPE_CHECKING:
    from torch import Tensor

    from stages.pairs import Pairs

Name = Literal[
    "sigmoid",
    "hinge",
    "ipo",
    "robust",
    "exo_pair",
    "nca_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
]


class DpoOptions(StageConfig):
    """Settings of direct preference optimization."""

    beta: float = Field(default=0.1, gt=0)
    """How strongly the model is held to the one before training: the smaller, the further it may move."""
    loss: Name | dict[Name, float] = "sigmoid"
    """Which loss, or several with their weights."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of pairs that are believed to be the wrong way round: for sigmoid, robust and exo_pair."""
    temperature: float = Field(default=0.05, gt=0)
    """Of discopop's blend."""

    @model_validator(mode="after")
    def _fits(self) -> "DpoOptions":
        named = self.weights
        if not named:
            raise ValueError("loss: name at least one")
        for name, weight in named.items():
            if not 0 < weight < math.inf:
                raise ValueError(f"loss: the weight of {name} is {weight}: expected a number above 0")
        for name in ("robust", "exo_pair"):
            if name in named and self.label_smoothing == 0:
                raise ValueError(f"loss {name} needs label_smoothing above 0, e.g. 0.001")
        if self.label_smoothing and not {"sigmoid", "robust", "exo_pair"} & set(named):
            raise ValueError(
                f"label_smoothing is for sigmoid, robust and exo_pair, not {', '.join(named)}: take it out"
            )
        if self.temperature != type(self).model_fields["temperature"].default and "discopop" not in named:
            raise ValueError(f"temperature is for discopop, not {', '.join(named)}: take it out")
        return self

    @property
    def weights(self) -> dict[Name, float]:
        """The losses by name, with their weights."""
        return {self.loss: 1.0} if isinstance(self.loss, str) else self.loss


def prepare(batch: Batch) -> dict[str, Any]:
    """See `stages.pairs.pick`."""
    from stages import pairs

    return pairs.pick(batch)


def loss(model: Any, options: DpoOptions, batch: Batch) -> LossSums:
    """The summed loss of a prepared batch's pairs as a function."""
    from stages import lm_head, pairs

    head = lm_head.find(model, batch)

    def sums(batch: Batch) -> Sums:
        policy = pairs.answers(head, batch)
        ratios = policy - pairs.reference(batch)
        total = sum(weight * LOSSES[name](policy, ratios, options).sum() for name, weight in options.weights.items())
        rewards = (options.beta * ratios.chosen, options.beta * ratios.rejected)
        return {"loss": total, **pairs.measures(*rewards)}  # type: ignore[dict-item]

    return sums


def _log_sigmoid(x: "Tensor") -> "Tensor":
    from torch.nn.functional import logsigmoid

    return logsigmoid(x)


def _delta(ratios: "Pairs") -> "Tensor":
    return ratios.chosen - ratios.rejected


def sigmoid(policy: "Pairs", ratios: "Pairs", options: DpoOptions) -> "Tensor":
    """[pairs] DPO; with label smoothing, conservative DPO (equation 3 of the cDPO note)."""
    scaled, flipped = options.beta * _delta(ratios), options.label_smoothing
    return -(1 - flipped) * _log_sigmoid(scaled) - flipped * _log_sigmoid(-scaled)


def hinge(policy: "Pairs", ratios: "Pairs", options: DpoOptions) -> "Tensor":
    """[pairs] SLiC."""
    return (1 - options.beta * _delta(ratios)).relu()


def ipo(policy: "Pairs", ratios: "Pairs", options: DpoOptions) -> "Tensor":
    """[pairs] IPO, equation 17, with each answer's log-ratio a token, so that beta means the same at any length."""
    return (ratios.chosen_mean - ratios.rejected_mean - 1 / (2 * options.beta)) ** 2


def robust(policy: "Pairs", ratios: "Pairs", options: DpoOptions) -> "Tensor":
    """[pairs] Robust DPO: unbiased where that share of labels is flipped."""
    scaled, flipped = options.beta * _delta(ratios), options.label_smoothing
    clean, wrong = -_log_sigmoid(scaled), -_log_sigmoid(-scaled)
    return ((1 - flipped) * clean - flipped * wrong) / (1 - 2 * flipped)


def exo_pair(policy: "Pairs", ratios: "Pairs", options: DpoOptions) -> "Tensor":
    """[pairs] EXO, equation 16: KL from the model's preference to the label's, smoothed."""
    import math

    scaled, flipped = options.beta * _delta(ratios), options.label_smoothing
    right = scaled.sigmoid() * (_log_sigmoid(scaled) - math.log1p(-flipped))
    return right + (-scaled).sigmoid() * (_log_sigmoid(-scaled) - math.log(flipped))


def nca_pair(policy: "Pairs", ratios: "Pairs", options: DpoOptions) -> "Tensor":
    """[pairs] NCA for two answers."""
    chosen, rejected = options.beta * ratios.chosen, options.beta * ratios.rejected
    return -_log_sigmoid(chosen) - 0.5 * _log_sigmoid(-chosen) - 0.5 * _log_sigmoid(-rejected)


def sppo_hard(policy: "Pairs", ratios: "Pairs", options: DpoOptions) -> "Tensor":
    """[pairs] SPPO, equation 4.7, where the winner wins for certain."""
    half = 1 / (2 * options.beta)
    return (ratios.chosen - half) ** 2 + (ratios.rejected + half) ** 2


def apo_zero(policy: "Pairs", ratios: "Pairs", options: DpoOptions) -> "Tensor":
    """[pairs] APO-zero, equation 7: chosen up, rejected down."""
    return (-options.beta * ratios.chosen).sigmoid() + (options.beta * ratios.rejected).sigmoid()


def apo_down(policy: "Pairs", ratios: "Pairs", options: DpoOptions) -> "Tensor":
    """[pairs] APO-down, equation 8: both down, rejected further."""
    return (options.beta * ratios.chosen).sigmoid() + (-options.beta * _delta(ratios)).sigmoid()


def discopop(policy: "Pairs", ratios: "Pairs", options: DpoOptions) -> "Tensor":
    """[pairs] DiscoPOP, equation 5: the log-ratio itself says how much of which."""
    scaled = options.beta * _delta(ratios)
    share = (scaled / options.temperature).sigmoid()
    return -(1 - share) * _log_sigmoid(scaled) + share * (-scaled).exp()


def sft(policy: "Pairs", ratios: "Pairs", options: DpoOptions) -> "Tensor":
    """[pairs] Cross-entropy of the chosen answer, a token."""
    return -policy.chosen_mean


LOSSES: dict[Name, Callable[["Pairs", "Pairs", DpoOptions], "Tensor"]] = {
    "sigmoid": sigmoid,
    "hinge": hinge,
    "ipo": ipo,
    "robust": robust,
    "exo_pair": exo_pair,
    "nca_pair": nca_pair,
    "sppo_hard": sppo_hard,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "discopop": discopop,
    "sft": sft,
}

OBJECTIVE = Objective(
    version=1, prepare=prepare, loss=loss, options=DpoOptions, kinds=("preference",), counts="pairs", reference=True
)
