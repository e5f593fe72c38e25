"""`torch.compile` of target and draft, for the forwards that a graph is about to record.

The compiler fuses the small operations between matrix products. CUDA graphs are recorded by `capture.py`, so those of
the compiler are left out.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import CompileConfig

# Shapes of one function that are compiled before PyTorch runs others uncompiled: buffers come in several capacities.
MOST_SHAPES = 64
WITHOUT_OWN_GRAPHS = {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}


@contextmanager
def compiled(config: CompileConfig | None, *models: nn.Module) -> Iterator[None]:
    """
    While the context is open, `models` run compiled, if there is a `config`.

    **Effects**: what has been compiled stays known to PyTorch, on disk, too, so that the next time is shorter.
    """
    if config is None:
        yield
        return
    mode = WITHOUT_OWN_GRAPHS.get(config.mode, config.mode)
    settings = {"fullgraph": config.fullgraph, "backend": config.backend, "options": config.options}
    for model in models:
        model.forward = torch.compile(model.forward, dynamic=False, mode=mode, **settings)
    try:
        with torch._dynamo.config.patch(recompile_limit=MOST_SHAPES):
            yield
    finally:
        for model in models:
            del model.forward
