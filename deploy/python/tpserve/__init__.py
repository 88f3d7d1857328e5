"""Tensor-parallel LLM serving: the coordinator, workers, collectives and compiler live in the sub-packages."""
