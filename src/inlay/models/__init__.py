"""Opening pretrained models: by embedded name, local folder, GGUF file or Hugging Face name."""

from inlay.models.catalogue import ModelError, fetch, names
from inlay.models.opening import TASKS, Opened, open

__all__ = ["TASKS", "ModelError", "Opened", "fetch", "names", "open"]
