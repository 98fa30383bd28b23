"""The functions everything is built on: they check their arguments, choose a backend and return tensors.

:func:`attention_importances`, :func:`part_proximity` and :func:`component_proximity` are public. They take PyTorch
tensors, or arrays of any library that speaks DLPack (NumPy, JAX, CuPy), and may be called inside
``torch.compile(fullgraph=True)``; there, shapes and dtypes are checked and numbers are not. None of them has a
gradient. What they call is registered with ``torch.library`` (namespace ``flowroutes``).
"""

from flowroutes_fast.ops import dense as dense
from flowroutes_fast.ops import reference as reference
from flowroutes_fast.ops.arguments import as_tensor as as_tensor
from flowroutes_fast.ops.attention import AttentionImportances as AttentionImportances
from flowroutes_fast.ops.attention import attention_importances as attention_importances
from flowroutes_fast.ops.backends import BACKENDS as BACKENDS
from flowroutes_fast.ops.backends import backend_status as backend_status
from flowroutes_fast.ops.backends import choose_backend as choose_backend
from flowroutes_fast.ops.components import component_proximity as component_proximity
from flowroutes_fast.ops.parts import part_proximity as part_proximity
