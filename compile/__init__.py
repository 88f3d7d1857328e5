"""Everything ahead of time: model graphs, sharding, kernels, the library and its manifest."""
