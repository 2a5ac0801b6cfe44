from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from inlay.core.choices import Scores
from inlay.core.companion import Companion
from inlay.core.errors import AdapterError, SiteError
from inlay.core.method import option, register
from inlay.core.positions import IGNORED
from inlay.core.sites import Site


@register
class TFew(Companion):
    """loss = L_LM + L_UL + L_LN: −mean log(1 − p(token of a wrong answer)), and −log softmax(log p(answer)/length).

    T-Few's two losses over any methods; with the paper's own it is `[IA3(), TFew()]`. L_LM is the language model's loss
    on the right answer, which the model computes itself; L_UL is the unlikelihood of the tokens of wrong answers, and
    L_LN the cross-entropy among the answers' length-normalised log-likelihoods. Both are added to the model's own
    `loss` wherever it computes one with gradients: in a plain loop, in `transformers.Trainer` (with
    `remove_unused_columns=False`) and in `inlay train`. A batch says which rows are answers to one question with
    `choices`, see `inlay.core.choices`; a data set has them where its rows are `prompt`, `answer` and `choices`, or
    where classes are asked for as answers (`task: causal-lm` on text and label).

    The paper's recipe: Adafactor at 3e-3, batch 8, 1000 steps, linear decay, 6 % warm-up, IA3's vectors pretrained on
    the T0 mixture, answers chosen by length-normalised likelihood (the metric `choice_accuracy`).
    """

    kind: ClassVar[str] = "schedule"
    paper: ClassVar[str] = "Liu et al. 2022, arXiv 2205.05638"

    unlikelihood: float = option(default=1.0, doc="weight of L_UL", low=0.0)
    normalised: float = option(default=1.0, doc="weight of L_LN", low=0.0)
    exponent: float = option(default=1.0, doc="power of an answer's length that divides its log-likelihood", low=0.0)
    epsilon: float = option(default=0.01, doc="added inside the logarithm of L_UL, as official code does", low=0.0)

    def build(self, site: Site) -> None:
        if not site.peers:
            raise SiteError("T-Few adds to the loss of methods beside it, and there is none: [IA3(), TFew()]")

    def ready(self) -> None:
        """Nothing is to be done before a forward."""

    def added(self, given: Mapping[str, Any], output: Any) -> Tensor:
        ids, labels, choices = (given.get(name) for name in ("input_ids", "labels", "choices"))
        if choices is None or ids is None or labels is None:
            raise AdapterError(
                "T-Few compares answers: give batches with input_ids, labels and choices, as data sets have whose rows "
                "are prompt, answer and choices (inlay.core.choices)"
            )
        logits = output["logits"] if isinstance(output, Mapping) else output[1]
        if logits.shape[:2] != ids.shape or choices.shape != ids.shape:
            raise AdapterError(
                f"T-Few is for decoders that stand alone: choices {tuple(choices.shape)} and logits "
                f"{tuple(logits.shape)} must be of one place for every one of the ids {tuple(ids.shape)}"
            )
        scores = Scores(logits, ids, labels, choices)
        total = self.unlikelihood * self.of_wrong(scores) + self.normalised * self.of_choice(scores)
        whole = given.get("num_items_in_batch")  # of all batches of a step, by which Trainer lets the model divide
        return total if whole is None else total * ((labels[:, 1:] != IGNORED).sum() / whole)

    def of_wrong(self, scores: Scores) -> Tensor:
        """L_UL, the mean over the tokens of wrong answers."""
        wrong = scores.answer & ~scores.right[:, None]
        terms = -torch.log(1 - scores.likelihood.exp() + self.epsilon)
        return torch.where(wrong, terms, 0).sum() / wrong.sum().clamp_min(1)

    def of_choice(self, scores: Scores) -> Tensor:
        """L_LN, the mean over examples."""
        score = scores.by_row(self.exponent)
        among = torch.where(scores.rivals(), score, -torch.inf).logsumexp(1)
        return ((among - score) * scores.right).sum() / scores.right.sum().clamp_min(1)
