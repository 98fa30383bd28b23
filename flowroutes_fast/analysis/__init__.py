"""What a corpus run says about a model: the findings of the paper's section 5, as tables with numbers behind every
claim.
"""

from flowroutes_fast.analysis.bos import attention_on, untouched
from flowroutes_fast.analysis.clusters import Clusters, clusters
from flowroutes_fast.analysis.concepts import Concepts, concepts
from flowroutes_fast.analysis.domains import domain_heads, domain_means, domain_overlap
from flowroutes_fast.analysis.heads import positional_heads
from flowroutes_fast.analysis.report import analyze

__all__ = [
    "Clusters",
    "Concepts",
    "analyze",
    "attention_on",
    "clusters",
    "concepts",
    "domain_heads",
    "domain_means",
    "domain_overlap",
    "positional_heads",
    "untouched",
]
