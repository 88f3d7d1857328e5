"""Device code: portable TVM kernels for every operator, and tuned sources per target."""
