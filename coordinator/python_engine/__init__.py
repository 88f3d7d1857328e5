"""The Python doors: `MLCEngine` and `AsyncMLCEngine`, the gateway's own handlers called without HTTP."""
