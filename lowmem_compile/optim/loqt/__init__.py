"""LoQT: 4-bit weights trained through a low-rank factor (arXiv:2405.16528, NeurIPS 2024).

:func:`loqt` puts a model under it and returns a :class:`LoQT`; see docs/loqt.md.
"""

from lowmem_compile.optim.loqt.convert import loqt
from lowmem_compile.optim.loqt.handle import LoQT, Merged
from lowmem_compile.optim.loqt.linear import LoQTLinear
from lowmem_compile.optim.loqt.report import LayerRow, LoQTReport
from lowmem_compile.optim.loqt.updates import AdamW, PerLayerUpdates

__all__ = ["AdamW", "LayerRow", "LoQT", "LoQTLinear", "LoQTReport", "Merged", "PerLayerUpdates", "loqt"]
