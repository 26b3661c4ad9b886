"""From a float model to the release's tensors."""

from __future__ import annotations

from collections.abc import Iterator

import ml_dtypes

from grok_engine.checkpoint.quantize import quantize_matrix
from grok_engine.checkpoint.xai.layout import layout, release_groups
from grok_engine.checkpoint.xai.pickles import Array
from grok_engine.layers.embedding import Embedding
from grok_engine.layers.weight import FusedWeight, NamedTensor, holders
from grok_engine.models.decoder import Decoder


def export_weights(model: Decoder, *, quantized: bool = True) -> Iterator[tuple[str, tuple[Array, Array | None]]]:
    """Every tensor of a float `model` as the release has it: its name, and the array as stored with its scales.

    quantized: int8 with the release's groups of scales; otherwise bf16. Norms, router and embedding stay fp32.
    ValueError for a model held in 8 bits, CheckpointError for one that the release has no names for.
    """
    specs = {spec.name: spec for spec in layout(model.config)}
    for _, module in holders(model):
        if isinstance(module, FusedWeight) and module.weight.scales is not None:
            raise ValueError(f"{module.parts[0].name} is {module.weight.format} with scales, expected a float model")
        if isinstance(module, (NamedTensor, Embedding)):
            if isinstance(module, NamedTensor):
                name, table = module.name, module.weight
            else:
                name, table = module.parts[0].name, module.matrices()[0]
            stored = table.mT if specs[name].transposed else table
            yield name, (stored.detach().float().contiguous().numpy(), None)
        else:
            matrices_ENK = module.matrices().detach()
            for part in module.parts:
                stored = matrices_ENK[:, part.start : part.stop].mT.float().contiguous()
                matrix = stored.view(specs[part.name].shape).numpy()
                if quantized:
                    yield part.name, quantize_matrix(matrix, release_groups(part.name))
                else:
                    yield part.name, (matrix.astype(ml_dtypes.bfloat16), None)
