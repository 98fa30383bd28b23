"""Importances over many texts: :func:`corpus` runs them, :class:`Corpus` reads what it wrote."""

from flowroutes_fast.corpora.on_ray import corpus_on_ray
from flowroutes_fast.corpora.results import Corpus
from flowroutes_fast.corpora.run import corpus

__all__ = ["Corpus", "corpus", "corpus_on_ray", "open_corpus"]

open_corpus = Corpus
