"""Model graphs in relax nn, one file for each Hugging Face `model_type`."""
