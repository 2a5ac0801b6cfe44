"""`inlay.fuse`: one decoding interface for every rule, as a logits processor of `generate` or by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from inlay.core.errors import FusionError
from inlay.fusion.experts import Expert, check_vocabulary, vocabulary
from inlay.fusion.proxy import ProxyTuning
from inlay.fusion.rule import Pair, Rule
from inlay.fusion.voice import Acting, Voice

ROWS = 16
"""Rows that a rule sees at once while whole sequences are scored."""
NEVER = -1e4
"""The logit of a token that an expert does not have, of expert and anti-expert alike."""


def fuse(
    base: nn.Module | Acting,
    experts: Expert | Sequence[Expert],
    rule: Rule | None = None,
    tokenizer: Any = None,
) -> Fusion:
    """Steer a frozen decoder with experts at decoding time; nothing is trained or attached.

    ```python
    fusion = inlay.fuse(base, inlay.Expert(tuned, untuned))
    base.generate(**inputs, logits_processor=[fusion])     # greedy, sampling, beams, as ever
    fusion.generate(**inputs)                              # the same, and knows the padding
    ```

    Args:
        base: a causal language model of transformers, or `Acting(model, …)` for one with some of its adapters on.
        experts: one or several, with the base's vocabulary.
        rule: `ProxyTuning()` by default, `DExperts()`, `DynamicFusion()`.
        tokenizer: the base's; compared with those of the experts that name theirs.

    Raises:
        FusionError: vocabularies differ, or a model is no decoder.
    """
    several = [experts] if isinstance(experts, Expert) else list(experts)
    if not several:
        raise FusionError("fuse needs at least one Expert")
    for expert in several:
        check_vocabulary(base.model if isinstance(base, Acting) else base, tokenizer, expert)
    return Fusion(Voice(base), several, rule or ProxyTuning())


class Fusion:
    """A base and its experts; call it as a logits processor, or use `generate` and `log_probs`."""

    def __init__(self, base: Voice, experts: Sequence[Expert], rule: Rule, mask: Tensor | None = None) -> None:
        self.base, self.experts, self.rule = base, experts, rule
        self.size = vocabulary(base.model)
        self.mask = mask
        """Attention mask of the prompts (batch, tokens), where one was given."""
        self.weights: Tensor | None = None
        """The weight of each expert at the last step (experts, rows)."""
        self.voices: dict[Any, Voice] = {}
        for expert in experts if self.steers else ():
            for speaker in (expert.expert, expert.anti):
                if speaker is not None:  # one that several experts are compared with is run once
                    self.voices.setdefault(key_of(speaker), Voice(speaker))

    @property
    def steers(self) -> bool:
        """Whether any expert has a strength other than 0."""
        return any(expert.alpha for expert in self.experts)

    @property
    def alphas(self) -> list[float]:
        return [expert.alpha for expert in self.experts]

    # ------------------------------------------------------------------ decoding
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits processor: scores of the next token (rows, vocabulary) ↦ log P̃, as `generate` wants it.

        The padding of prompts is told by `processor(attention_mask)`, or by the pad token where it is not also the end
        of text, as `generate` itself does.
        """
        if scores.shape[-1] != self.size:
            raise FusionError(f"the base was said to choose among {self.size:,} tokens, not {scores.shape[-1]:,}")
        if not self.steers:
            return scores
        mask = self.seen(input_ids)
        z = scores.float()
        pairs = self.pairs(z, {name: voice.next(input_ids, mask) for name, voice in self.voices.items()})
        fused, self.weights = self.rule.combine(z, pairs, self.alphas)
        return fused.to(scores.dtype)

    def processor(self, attention_mask: Tensor | None = None) -> Fusion:
        """The same fusion with empty caches, for prompts padded as this mask (batch, tokens) says."""
        return Fusion(Voice(self.speaker), self.experts, self.rule, attention_mask)

    def generate(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, logits_processor: Sequence = (), **options: Any
    ) -> Any:
        """`base.generate` with this fusion after the given processors; `options` are those of transformers."""
        from transformers import LogitsProcessorList

        mine = self.processor(attention_mask)
        given = {} if attention_mask is None else {"attention_mask": attention_mask}
        with self.base.speaking():
            return self.base.model.generate(  # type: ignore[operator]
                input_ids, **given, logits_processor=LogitsProcessorList([*logits_processor, mine]), **options
            )

    @torch.no_grad()
    def log_probs(self, input_ids: Tensor, attention_mask: Tensor | None = None, at: Tensor | None = None) -> Tensor:
        """log P̃ of the token after every place of whole sequences, as for perplexities.

        Args:
            input_ids, attention_mask: (batch, tokens).
            at: the places that are wanted (batch, tokens), true = wanted; all of them by default.

        Returns:
            (batch, tokens, vocabulary), or (wanted places, vocabulary).
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        chosen = torch.ones_like(input_ids, dtype=torch.bool) if at is None else at
        z = self.base.all(input_ids, mask)[chosen]
        said = {name: voice.all(input_ids, mask)[chosen] for name, voice in self.voices.items()}
        if self.steers:
            parts = []
            for rows in torch.arange(len(z)).split(ROWS):
                pairs = self.pairs(z[rows], {name: logits[rows] for name, logits in said.items()})
                parts.append(self.rule.combine(z[rows], pairs, self.alphas)[0])
            found = torch.cat(parts) if parts else z
        else:
            found = z.log_softmax(-1)
        return found.view(*input_ids.shape, -1) if at is None else found

    def forget(self) -> None:
        """Free the experts' caches; the next call begins anew in any case."""
        for voice in self.voices.values():
            voice.forget()

    # ------------------------------------------------------------------ what the experts say
    @property
    def speaker(self) -> nn.Module | Acting:
        return self.base.model if self.base.adapters is None else Acting(self.base.model, *self.base.adapters)

    def pairs(self, z: Tensor, said: dict[Any, Tensor]) -> list[Pair]:
        """Expert and anti-expert of each, over the base's vocabulary; z itself where one is absent."""
        own = {name: self.fitted(logits.to(z)) for name, logits in said.items()}
        return [
            Pair(*(z if speaker is None else own[key_of(speaker)] for speaker in (expert.expert, expert.anti)))
            for expert in self.experts
        ]

    def fitted(self, logits: Tensor) -> Tensor:
        """Logits over the base's vocabulary: cut, or filled up with tokens that are never said."""
        missing = self.size - logits.shape[-1]
        return logits[..., : self.size] if missing <= 0 else nn.functional.pad(logits, (0, missing), value=NEVER)

    def seen(self, input_ids: Tensor) -> Tensor:
        """The attention mask (rows, tokens) of what was read and generated so far."""
        mask = self.mask
        if mask is None:
            return self.guessed(input_ids)
        beams, short = input_ids.shape[0] // mask.shape[0], input_ids.shape[1] - mask.shape[1]
        if input_ids.shape[0] % mask.shape[0] or short < 0:
            raise FusionError(
                f"the attention mask {tuple(mask.shape)} is not that of these prompts, whose rows are now "
                f"{tuple(input_ids.shape)}"
            )
        return nn.functional.pad(mask.to(input_ids).repeat_interleave(beams, 0), (0, short), value=1)

    def guessed(self, input_ids: Tensor) -> Tensor:
        """The mask without having been told: pad tokens before the first other one are padding."""
        config: Any = self.base.model.generation_config
        pad, end = config.pad_token_id, config.eos_token_id
        leading = torch.zeros_like(input_ids) if pad is None else input_ids.eq(pad).long().cumprod(1)
        if leading.any() and pad in (end if isinstance(end, list) else [end]):
            raise FusionError(
                f"a prompt begins with token {pad}, which is padding and the end of text alike: say which tokens are "
                "padding, logits_processor=[fusion.processor(attention_mask)], or call fusion.generate"
            )
        return 1 - leading


def key_of(speaker: nn.Module | Acting) -> Any:
    """One voice per model and what acts in it."""
    return (id(speaker.model), speaker.adapters) if isinstance(speaker, Acting) else (id(speaker), None)
