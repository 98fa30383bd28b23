"""The earlier place of these names."""

from flowroutes_fast.ops.attention import Attention as Attention
from flowroutes_fast.ops.attention import causal_mask as causal_mask
from flowroutes_fast.ops.bound import Bounds as Bounds
from flowroutes_fast.ops.bound import Candidates as Candidates
from flowroutes_fast.ops.bound import bound as bound
from flowroutes_fast.ops.bound import candidates as candidates
from flowroutes_fast.ops.pairs import pairs as pairs
