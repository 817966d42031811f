"""What every process of a swarm would do at its start, done once before it is copied.

Importing torch's compiler, which its optimizers and its export do at first use, and exporting a
first model take seconds; no thread is left behind by it.
"""

from __future__ import annotations

import bokeh.plotting  # noqa: F401
import torch
import torch._dynamo
import torch._inductor
import torch.export
import torch.onnx
import transformers.models.llama.modeling_llama  # noqa: F401

import chaos.away
import chaos.driving
import chaos.scheduling
import chaos.volunteer
import dagflow
import dagflow.server.serve

torch.set_num_threads(1)
_recipe = chaos.driving.Recipe()
dagflow.capture(_recipe.model(), next(iter(_recipe.data())))
