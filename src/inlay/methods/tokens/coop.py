from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from inlay.core.contexts import ContextMethod
from inlay.core.errors import OptionError
from inlay.core.method import option, register
from inlay.core.sites import Site


@register
class CoOp(ContextMethod):
    """prompt_c = [v]_1 … [v]_M [class_c], with M trained vectors v in the place of words such as "a photo of a".

    For dual encoders (CLIP, SigLIP, transformers' `VisionTextDualEncoderModel`), whose classifier is what the text
    tower makes of the class prompts; both towers stay frozen. One context serves all classes, and classes that come
    later; with `classes` each has its own (CSC), which depends on their list. Where text and images are classified the
    text features of a class list can be kept: nothing is left of the method then.
    """

    paper: ClassVar[str] = "Zhou, Yang, Loy & Liu 2022, arXiv 2109.01134"
    learning_rate: ClassVar[float] = 1e-2

    position: Literal["end", "middle", "front"] = option(
        default="end", doc="where the class stands: after the vectors, between ⌊M/2⌋ and the others, or before them"
    )
    classes: int | None = option(default=None, doc="classes with a context each; null: one context for all", low=1)

    def validate(self) -> None:
        if self.ahead < self.tokens and self.prompt and not self.closing:
            raise OptionError(f"CoOp: the prompt {self.prompt!r} has no token after the class: position='end'")

    @property
    def starts_at_base(self) -> bool:
        return self.init == "words" and self.tokens == len(self.words) and self.position == "end"

    @property
    def ahead(self) -> int:
        return {"end": self.tokens, "middle": self.tokens // 2, "front": 0}[self.position]

    def for_any_class(self) -> bool:
        return self.classes is None

    def build(self, site: Site) -> None:
        if self.ahead < self.tokens and not self.closing:
            raise OptionError("CoOp: to find where a class's name ends it must know the prompt: with_prompt(…)")
        v = [self.start(site) for _ in range(self.classes or 1)]
        self.v = nn.Parameter(torch.stack(v))

    def count(self, site: Site) -> int:
        """M·d, or C·M·d with a context per class."""
        return (self.classes or 1) * self.tokens * site.features

    def context(self, images: Tensor | None) -> Tensor:
        return self.v[None]
